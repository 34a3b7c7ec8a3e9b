// Before and after the row kernels: the count of tokens that a mean divides by, and the sum of the rows' losses. Both
// add in a fixed order, so the same input gives the same bits.
#include <stdexcept>

#include "cuda/losses.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kMostThreads = 1024;

// The block's sum in thread 0.
template <class N>
__device__ N block_sum(N x) {
    __shared__ N warps[kWarp];
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_down_sync(~0u, x, lane);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    if (threadIdx.x >= kWarp) return x;
    x = threadIdx.x < blockDim.x / kWarp ? warps[threadIdx.x] : N(0);
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_down_sync(~0u, x, lane);
    return x;
}

// One block: counts of 16M tokens take it a millisecond, where their logits take seconds.
__global__ void __launch_bounds__(kMostThreads) count_tokens(const Tokens tokens, float* denominator /* [1] */) {
    long long counted = 0;
    for (int64_t row = threadIdx.x; row < tokens.count; row += blockDim.x) counted += is_counted(tokens, row);
    counted = block_sum(counted);
    if (threadIdx.x == 0) *denominator = static_cast<float>(counted);
}

// Block b adds losses[b * chunk], [b * chunk + stride], ... of its chunk. `partial` goes back to the chunk's first
// place, which no other block reads; `last` divides and writes the result.
__global__ void __launch_bounds__(kMostThreads)
    sum_losses(float* losses /* [count] */, int64_t count, int64_t chunk, int64_t stride, float* result /* [1] */,
               const float* denominator /* [1] or null */, float known_denominator) {
    const int64_t first = blockIdx.x * chunk, end = first + chunk < count ? first + chunk : count;
    double sum = 0;
    for (int64_t i = first + threadIdx.x * stride; i < end; i += blockDim.x * stride) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    if (!result) {
        losses[first] = static_cast<float>(sum);
        return;
    }
    const float over = denominator ? *denominator : known_denominator;
    *result = over == 0.f ? 0.f : static_cast<float>(sum / over);
}

}  // namespace

LossParams prepare_loss(const Rows& student, const Tokens& tokens, const Outputs& out, const DistillOptions& options,
                        cudaStream_t stream) {
    if (options.vocab < 1 || options.vocab > kNowhere - 65536)
        throw std::invalid_argument("vocab: got " + std::to_string(options.vocab) + "; wanted 1 to 2^31 - 2^16");
    LossParams p{};
    p.tokens = tokens;
    p.student = student;
    p.gradient = out.gradient;
    p.width = out.width;
    p.vocab = int(options.vocab);
    p.inverse_temperature = float(1 / options.temperature);
    const double squared = options.temperature_squared ? options.temperature * options.temperature : 1;
    p.soft_weight = float((1 - options.hard_weight) * squared);
    p.slope_weight = float((1 - options.hard_weight) * squared / options.temperature);
    p.hard_weight = float(options.hard_weight);
    p.beta = float(options.beta);
    p.divergence = options.divergence;
    p.row_loss = static_cast<float*>(tokens.reduction == Reduction::kNone ? out.loss : out.row_loss);
    if (!out.loss) p.row_loss = nullptr;
    p.entropy = static_cast<float*>(out.entropy);
    p.agreement = out.agreement;

    p.known_denominator = 1;
    if (tokens.reduction != Reduction::kMean) return p;
    if (tokens.num_items) {
        p.denominator = static_cast<const float*>(tokens.num_items);
    } else if (tokens.mask || tokens.labels || tokens.teacher_rows) {
        float* const denominator = static_cast<float*>(out.denominator);
        check(launch({1, kMostThreads, 0, stream}, count_tokens, tokens, denominator), "count_tokens");
        p.denominator = denominator;
    } else {
        p.known_denominator = float(tokens.count);
    }
    return p;
}

void reduce_loss(const LossParams& p, const Outputs& out, cudaStream_t stream) {
    if (!out.loss || p.tokens.reduction == Reduction::kNone) return;
    constexpr int64_t kChunk = 65536;
    const int64_t count = p.tokens.count;
    int64_t stride = 1;
    if (count > kChunk) {
        const int64_t chunks = (count + kChunk - 1) / kChunk;
        check(launch({chunks, kMostThreads, 0, stream}, sum_losses, p.row_loss, count, kChunk, stride,
                     static_cast<float*>(nullptr), p.denominator, p.known_denominator),
              "sum_losses");
        stride = kChunk;
    }
    check(launch({1, kMostThreads, 0, stream}, sum_losses, p.row_loss, count, count, stride,
                 static_cast<float*>(out.loss), p.denominator, p.known_denominator),
          "sum_losses");
}

}  // namespace pyalign::cuda
