// The CPU engines: what bindings.cpp calls. `threads` is how many OpenMP threads to use, from torch.get_num_threads().
#pragma once

#include <string>
#include <vector>

#include "common/bradley_terry_args.h"
#include "common/distill_args.h"
#include "common/logprob_args.h"
#include "common/ranking_args.h"
#include "common/scoring_args.h"

namespace pyalign::cpu {

// They throw std::invalid_argument for an out-of-range or repeated index, before anything is written in place.
void distill(const DistillArgs& args, int threads);
void topk_distill(const TopKDistillArgs& args, int threads);
void topk(const TopKArgs& args, int threads);
void outside(const OutsideArgs& args, int threads);

// x *= factor[0] for rows of `width`; returns at once where the factor is 1. `factor` has x's accumulation dtype.
void scale(const Rows& x, int64_t count, int64_t width, const void* factor, int threads);

// out = a [+ b] [+ out] in float32 for rows of `width`; a and, if given, b are dense, of a 16-bit dtype.
void widen(const Rows& out, int64_t count, int64_t width, const void* a, const void* b, Dtype dtype, bool add,
           int threads);

// Throws std::invalid_argument for an out-of-range target, before anything is written.
void logprob(const LogprobArgs& args, int threads);

// They throw std::invalid_argument for offsets that don't cut the scores into groups.
void pair_loss(const PairArgs& args, int threads);
void ranked_loss(const RankArgs& args, int threads);
void score_gradient(const ScoreGradientArgs& args, int threads);

// The first and the third throw std::invalid_argument for offsets that don't cut what they say into parts.
void reward_scores(const RewardArgs& args, int threads);
void reward_gradient(const RewardGradientArgs& args, int threads);
void score_groups(const GroupArgs& args, int threads);
void preference_metrics(const MetricArgs& args, int threads);

// One fit per sample, samples over threads.
void bradley_terry(const BradleyTerryArgs& args, int threads);

// The inverse of a symmetric positive definite [n, n] of which the lower triangle is read, in place; false where it is
// not positive definite. For small ones: one thread, so that it never waits for those of a BLAS on a busy machine.
bool invert(double* matrix, int64_t n);

// The instruction set that was chosen for this machine (or by PYALIGN_CPU_ISA), and those compiled in.
std::string isa();
std::vector<std::string> isas();

}  // namespace pyalign::cpu
