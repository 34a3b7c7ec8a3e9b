// What every loss over rows of logits shares beside its divergence: which tokens count, the factor of a row's gradient,
// the hard term, the metrics, and the reduction of the rows' losses.
#pragma once

#include "cuda/common.cuh"

namespace pyalign::cuda {

struct LossParams {
    Tokens tokens;
    Rows student;   // [count, vocab]
    Rows gradient;  // [count, width], or data is null
    int64_t width;
    int vocab;
    float inverse_temperature;
    float soft_weight;   // (1 - h), times T^2 if asked for: of the divergence in the loss
    float slope_weight;  // soft_weight / T: of its slope in the gradient
    float hard_weight;   // h
    float beta;
    Divergence divergence;
    const float* denominator;  // [1], or null: known_denominator
    float known_denominator;
    float* row_loss;     // [count], or null
    float* entropy;      // [count], or null
    uint8_t* agreement;  // [count], or null

    __host__ __device__ bool wants_metrics() const { return entropy || agreement; }
};

// Counts the tokens if the mean needs it, and says where the kernel finds what it needs.
LossParams prepare_loss(const Rows& student, const Tokens& tokens, const Outputs& out, const DistillOptions& options,
                        cudaStream_t stream);

// Reduces the rows' losses into out.loss, for sum and mean.
void reduce_loss(const LossParams& params, const Outputs& out, cudaStream_t stream);

// The lead_of<T> of the row that is written, or of the one that is read where none is. G is the gradient's type.
template <class T, class G>
__device__ __forceinline__ int written_lead(const LossParams& p, int64_t row, const T* student) {
    return p.gradient.data ? lead_of<T>(row_pointer<const G>(p.gradient, row)) : lead_of<T>(student);
}

// ---- One token ----

enum class Token : int { kUncounted, kCounted, kInvalid };

struct TokenRow {
    Token kind;
    int target;       // -1: no hard term
    int64_t teacher;  // the row of the teacher
    float weight;     // of the loss
    float factor;     // d result / d loss of the row
};

__device__ __forceinline__ bool is_counted(const Tokens& tokens, int64_t row) {
    return (!tokens.mask || tokens.mask[row]) && (!tokens.labels || tokens.labels[row] != tokens.ignore_index) &&
           (!tokens.teacher_rows || tokens.teacher_rows[row] >= 0);
}

__device__ __forceinline__ TokenRow read_token(const LossParams& p, int64_t row) {
    const Tokens& tokens = p.tokens;
    if (!is_counted(tokens, row)) return {Token::kUncounted, -1, 0, 0.f, 0.f};

    const int64_t teacher = tokens.teacher_rows ? tokens.teacher_rows[row] : row;
    bool valid = teacher < tokens.teacher_count;
    int target = -1;
    if (p.hard_weight > 0 && tokens.targets[row] != tokens.ignore_index) {
        const int64_t wanted = tokens.targets[row];
        valid = valid && wanted >= 0 && wanted < p.vocab;
        target = valid ? int(wanted) : -1;
    }
    const float weight = tokens.weight ? static_cast<const float*>(tokens.weight)[row] : 1.f;
    const int64_t which = tokens.reduction == Reduction::kNone ? row : 0;
    const float upstream = tokens.upstream ? static_cast<const float*>(tokens.upstream)[which] : 1.f;
    const float denominator = p.denominator ? *p.denominator : p.known_denominator;
    return {valid ? Token::kCounted : Token::kInvalid, target, teacher, weight,
            denominator == 0.f ? 0.f : weight * upstream / denominator};
}

// The outputs of a token that has no loss: zeros where it isn't counted, NaN where an index was out of range.
template <class T>
__device__ __forceinline__ void write_lossless(const LossParams& p, int64_t row, Token kind, int thread, int threads) {
    const float value = kind == Token::kInvalid ? __int_as_float(0x7fffffff) : 0.f;
    if (thread == 0) {
        if (p.row_loss) p.row_loss[row] = value;
        if (p.entropy) p.entropy[row] = value;
        if (p.agreement) p.agreement[row] = 0;
    }
    if (!p.gradient.data) return;
    T* const gradient = row_pointer<T>(p.gradient, row);
    fill(gradient, p.vocab, value, thread, threads);
    fill(gradient + p.vocab, p.width - p.vocab, 0.f, thread, threads);
}

// ---- h * cross-entropy(student at temperature 1, target) ----

__device__ __forceinline__ float hard_loss(const LossParams& p, const TokenRow& token, Softmax<float> state,
                                           float target_logit) {
    if (token.target < 0) return 0.f;
    return p.hard_weight * (log_positive(state.sum) + (state.max - target_logit));
}

// Its gradient: factor * (softmax - 1[target]).
struct HardTerm {
    int target;
    Exponential exponential;
    float factor, scaled;  // factor * softmax = scaled * exponential

    __device__ __forceinline__ HardTerm(const LossParams& p, const TokenRow& token, Softmax<float> state)
        : target(token.target),
          exponential(state.max, 1.f),
          factor(token.factor * p.hard_weight),
          scaled(factor / state.sum * exponential.correction(state.max)) {}

    // Adds it to the gradients of the elements from `element` on.
    template <int N>
    __device__ __forceinline__ void add(float (&gradient)[N], int element, const float (&student)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) gradient[i] += scaled * exponential(student[i]);
        if (unsigned(target - element) >= unsigned(N)) return;
#pragma unroll
        for (int i = 0; i < N; ++i) gradient[i] -= element + i == target ? factor : 0.f;
    }
};

// What one thread puts by while a row is at work.
struct Note {
    float weight, hard;  // of the token, its hard loss
};

// weight * (soft + hard)
__device__ __forceinline__ void write_row_loss(const LossParams& p, int64_t row, float weight, float divergence,
                                               float hard) {
    p.row_loss[row] = weight * ((p.soft_weight == 0.f ? 0.f : p.soft_weight * divergence) + hard);
}

// ---- Metrics ----

constexpr int kNowhere = 0x7fffffff;

// -sum q log q of softmax(logits / T).
struct Entropy {
    float max, scale, log_sum, inverse_temperature;

    __device__ __forceinline__ Entropy(Softmax<float> state, float inverse_temperature)
        : max(state.max),
          scale(1.f / state.sum),
          log_sum(log_positive(state.sum)),
          inverse_temperature(inverse_temperature) {}

    __device__ __forceinline__ float term(float logit) const {
        const float x = (logit - max) * inverse_temperature;
        return weigh(exp_nonpositive(x) * scale, log_sum - x);
    }
};

// The lowest index that holds the row's largest entry, given the lowest that was found equal to the state's max. In a
// row of -inf all are equal; one with NaN has none.
__device__ __forceinline__ int settle_top(int found, Softmax<float> state) {
    const bool has_nan = state.sum != state.sum && !isinf(state.max);
    return has_nan ? -1 : found == kNowhere ? 0 : found;
}

// What a row's metrics are made of, over the threads.
struct Metrics {
    float entropy = 0;
    int student_top = kNowhere, teacher_top = kNowhere;
};

struct MetricsMerger {
    __device__ __forceinline__ Metrics warp(const Metrics& x) const {
        return {warp_sum(x.entropy), warp_min(x.student_top), warp_min(x.teacher_top)};
    }
};

// ---- Sums ----

struct SumsMerger {
    __device__ __forceinline__ Sums<float> warp(Sums<float> x) const { return {warp_sum(x.loss), warp_sum(x.aux)}; }
};

}  // namespace pyalign::cuda
