// The CUDA engines: what bindings.cpp calls. Everything runs on `stream` of the current device; nothing is allocated,
// and the host never waits. They throw std::invalid_argument for a bad argument and CudaError for a call that failed.
//
// Both logits operands have one dtype: float32, bfloat16 or float16. Everything else that is not an index is float32.
// An out-of-range or repeated index makes its row NaN, and nothing is read through it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/distill_args.h"
#include "common/logprob_args.h"
#include "common/ranking_args.h"
#include "common/scoring_args.h"

namespace pyalign::cuda {

// Says which kernel or call failed, where, and why.
class CudaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A layout that isn't among distill_layouts(), or topk_distill_layouts(), is a bad argument.
void distill(const DistillArgs& args, cudaStream_t stream);
void topk_distill(const TopKDistillArgs& args, cudaStream_t stream);

// The k <= 256 largest logits of every row.
void topk(const TopKArgs& args, cudaStream_t stream);

// x *= factor[0] for rows of `width`, a float read on the device; returns at once where it is 1.
void scale(const Rows& x, int64_t count, int64_t width, const void* factor, cudaStream_t stream);

// The gradient has the logits' dtype or, of float32 logits, any.
void logprob(const LogprobArgs& args, cudaStream_t stream);

// Offsets that don't cut the scores into groups make the loss and its gradients NaN.
void pair_loss(const PairArgs& args, cudaStream_t stream);
void ranked_loss(const RankArgs& args, cudaStream_t stream);
void score_gradient(const ScoreGradientArgs& args, cudaStream_t stream);

// Offsets are trusted. The metrics come as a table for each of args.pieces.
void reward_scores(const RewardArgs& args, cudaStream_t stream);
void reward_gradient(const RewardGradientArgs& args, cudaStream_t stream);
void score_groups(const GroupArgs& args, cudaStream_t stream);
void preference_metrics(const MetricArgs& args, cudaStream_t stream);

// The layouts of `distill` that rows of this length fit on this device; the first is the rule's.
std::vector<Layout> distill_layouts(int64_t vocab, Dtype dtype, Divergence divergence, int device);

std::vector<Layout> topk_distill_layouts(int64_t vocab, Dtype dtype, int device);

// Which kernel `distill` runs for rows of this length on this device, and how it is laid out there.
std::string explain_distill(int64_t vocab, Dtype dtype, Layout layout, int device);

}  // namespace pyalign::cuda
