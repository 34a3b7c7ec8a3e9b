// One row of distillation from a teacher's k entries, and all the rest as one more category ("bucket"), as no category
// ("renormalize"), or left out of a bare sum ("drop"): loss and gradient with respect to every logit. In whatever way
// the row is held: by one block that reads it again from shared memory and L2 (topk_distill.cu), or by a thread-block
// cluster that has all of it on chip (topk_distill_sm90.cu).
//
//   1. A bitmap in shared memory marks the entries' places: the student's rest is a log-sum-exp over what isn't marked.
//   2. The row is read once, folding the rest; the entries' own logits are gathered. Together they are the categories,
//      which go through the same divergences as the entries of a dense row.
//   3. The map writes what isn't marked: the slope of the rest times exp(s - its log-sum-exp). The entries' slopes are
//      written by the threads that hold them. Nobody reads what another writes, so the gradient may overwrite the
//      student.
//
// Every block of a cluster marks all entries; what they add to the sums, and their slopes, are the first block's.
#pragma once

#include "cuda/losses.cuh"

namespace pyalign::cuda {

struct TopKParams {
    LossParams loss;
    TopK teacher;
    Tail tail;
};

// ---- The teacher's entries ----

__device__ __forceinline__ float load_float(const void* data, Dtype dtype, int64_t at) {
    switch (dtype) {
        case Dtype::kFloat32: return static_cast<const float*>(data)[at];
        case Dtype::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(data)[at]);
        case Dtype::kFloat16: return widen(static_cast<const __half*>(data)[at]);
        default: return static_cast<float>(static_cast<const double*>(data)[at]);
    }
}

// One row's entries; each thread of a block has every blockDim.x-th.
struct Entries {
    const TopK& teacher;
    int64_t row;

    __device__ __forceinline__ int64_t index(int64_t place) const { return teacher.index(row * teacher.k + place); }
    __device__ __forceinline__ float logprob(int64_t place) const {
        return load_float(teacher.logprobs, teacher.dtype, row * teacher.k + place);
    }
    // body(place, index) for this thread's entries that are there.
    template <class Body>
    __device__ __forceinline__ void each(Body body) const {
        for (int64_t place = threadIdx.x; place < teacher.k; place += blockDim.x) {
            const int64_t at = index(place);
            if (at != -1) body(place, at);
        }
    }
};

// Which elements of a row are entries. Bits are counted from 16 before the first vector, so that a vector's bits never
// straddle words.
struct Bitmap {
    static constexpr int kBefore = 16;

    uint32_t* words;
    int origin;  // the element of bit 0

    static __host__ __device__ int64_t words_for(int64_t vocab) { return (vocab + 2 * kBefore + 127) / 128 * 4; }

    __device__ __forceinline__ bool set(int element) const {  // whether it was set before
        const uint32_t bit = 1u << ((element - origin) & 31);
        return atomicOr(&words[(element - origin) >> 5], bit) & bit;
    }
    __device__ __forceinline__ void clear(int element) const { words[(element - origin) >> 5] = 0; }
    // Whether all elements of the row are set; all threads of the block must ask.
    __device__ __forceinline__ bool covers(int64_t vocab) const {
        bool open = false;
        for (int64_t i = threadIdx.x; i < vocab; i += blockDim.x) open |= !of<1>(int(i));
        return !__syncthreads_or(open);
    }
    template <int N>
    __device__ __forceinline__ uint32_t of(int element) const {
        return words[(element - origin) >> 5] >> ((element - origin) & 31) & ((1u << N) - 1);
    }
};

// ---- Categories ----

struct States {
    Softmax<float> rest, members, hard;  // of the student: outside the entries, at the entries, all at temperature 1
    Softmax<float> entries;              // of the teacher's log-probs
};

struct StatesMerger {
    float inverse_temperature;
    __device__ __forceinline__ States warp(const States& x) const {
        return {warp_merge(x.rest, inverse_temperature), warp_merge(x.members, inverse_temperature),
                warp_merge(x.hard, 1.f), warp_merge(x.entries, 1.f)};
    }
};

// The student's and the teacher's log-probabilities over the categories. Max and sum stay apart
// (csrc/common/distill.h).
struct Categories {
    float student_max, student_log_sum, teacher_max, teacher_log_sum, inverse_temperature;

    // `log_mass` is that of the category's entries, relative to exp(logit / T).
    __device__ __forceinline__ Point<float> at(float logit, float log_mass, float logprob) const {
        const float log_q = (logit - student_max) * inverse_temperature + (log_mass - student_log_sum);
        const float log_p = (logprob - teacher_max) - teacher_log_sum;
        return {exp_nonpositive(log_p), exp_nonpositive(log_q), log_q - log_p};
    }
};

// ---- Row ----

// Whether a row's loss and gradient can be had without its logits outside the entries.
__host__ __device__ inline bool reads_row(const LossParams& p, Tail tail, bool has_target) {
    return tail != Tail::kRenormalize || has_target || p.wants_metrics();
}

// `part` is this block's part of the row, as in distill.cuh; part.is_first() says whether the block is the first of
// those at the row, and where Part::kSkips, part.positions(body) is part.again(body) without the logits. `bits` are
// Bitmap::words_for of this block's shared memory, 0 before and after. G is the gradient's type.
template <class G, class T, class Part>
__device__ __forceinline__ void topk_row(const TopKParams& params, int64_t row, const TokenRow& token,
                                         float target_logit, const T* student, int head, uint32_t* bits, Part& part) {
    const LossParams& p = params.loss;
    const float inverse_temperature = p.inverse_temperature;
    const Tail tail = params.tail;
    const Bitmap bitmap{bits, head - Bitmap::kBefore};
    const Entries entries{params.teacher, token.teacher};
    const bool has_target = token.target >= 0;

    // Entries
    __syncthreads();  // the bitmap is clear
    Folding rest, members, everything, logprobs;
    bool valid = true;
    entries.each([&](int64_t place, int64_t index) {
        if (index < 0 || index >= p.vocab || bitmap.set(int(index))) {
            valid = false;
        } else if (part.is_first()) {
            const float logit[1] = {widen(student[index])}, logprob[1] = {entries.logprob(place)};
            members.fold(logit, inverse_temperature);
            logprobs.fold(logprob, 1.f);
        }
    });
    valid = !__syncthreads_or(!valid);
    if (!valid) {
        entries.each([&](int64_t, int64_t index) {
            if (index >= 0 && index < p.vocab) bitmap.clear(int(index));
        });
        write_lossless<G>(p, row, Token::kInvalid, part.thread(), part.threads());
        return;
    }

    // Fold
    const bool reads = !Part::kSkips || reads_row(p, tail, has_target);
    if (reads) {
        specialised(has_target, [&](auto targets) {
            part.first([&](int element, auto& x) {
                constexpr int kCount = sizeof(x[0]) / sizeof(float);
                if (decltype(targets)::value) everything.fold(x[0], 1.f);
                const uint32_t marked = bitmap.of<kCount>(element);
                if (marked) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i) x[0][i] = marked >> i & 1 ? -INFINITY : x[0][i];
                }
                rest.fold(x[0], inverse_temperature);
            });
        });
    }
    const States states = part.merge(States{rest.state(inverse_temperature), members.state(inverse_temperature),
                                            everything.state(1.f), logprobs.state(1.f)},
                                     StatesMerger{inverse_temperature});
    const Softmax<float> all = merge(states.rest, states.members, inverse_temperature);
    const Softmax<float> student_state = tail == Tail::kRenormalize ? states.members : all;
    float residual = -INFINITY;
    if (tail == Tail::kBucket) {
        if (params.teacher.residual)
            residual = load_float(params.teacher.residual, params.teacher.residual_dtype, token.teacher);
        else if (params.teacher.k < p.vocab || !bitmap.covers(p.vocab))
            residual = log1mexp(fminf(states.entries.max + log_positive(states.entries.sum), 0.f));
    }
    // Stored log-probs are rounded: the categories are normalised again, or their KL could be negative.
    Softmax<float> teacher_state{0.f, 1.f};
    if (tail == Tail::kRenormalize) teacher_state = states.entries;
    if (tail == Tail::kBucket) teacher_state = merge(states.entries, {residual, 1.f}, 1.f);
    const Categories categories{student_state.max, log_positive(student_state.sum), teacher_state.max,
                                log_positive(teacher_state.sum), inverse_temperature};

    // Metrics
    if (p.wants_metrics()) {
        Metrics metrics;
        const Entropy entropy(all, inverse_temperature);
        part.again([&](int element, const auto& x) {
            constexpr int kCount = sizeof(x[0]) / sizeof(float);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                metrics.entropy += entropy.term(x[0][i]);
                if (x[0][i] == all.max) metrics.student_top = min(metrics.student_top, element + i);
            }
        });
        entries.each([&](int64_t place, int64_t) {
            if (entries.logprob(place) == states.entries.max)
                metrics.teacher_top = min(metrics.teacher_top, int(place));
        });
        metrics = part.merge(metrics, MetricsMerger{});
        if (part.thread() == 0) {
            const int64_t teacher_top = metrics.teacher_top == kNowhere ? -2 : entries.index(metrics.teacher_top);
            if (p.entropy) p.entropy[row] = metrics.entropy;
            if (p.agreement) p.agreement[row] = settle_top(metrics.student_top, all) == teacher_top;
        }
    }

    // Sum over the categories; `drop` sums the terms as they are, and its flow
    Point<float> outside{exp_nonpositive((residual - teacher_state.max) - categories.teacher_log_sum), 0.f, -INFINITY};
    if (states.rest.sum != 0.f) outside = categories.at(states.rest.max, log_positive(states.rest.sum), residual);
    Sums<float> sums;
    if (part.is_first()) {
        with_divergence(p.divergence, p.beta, [&](const auto& divergence) {
            entries.each([&](int64_t place, int64_t index) {
                const Point<float> at = categories.at(widen(student[index]), 0.f, entries.logprob(place));
                sums = sums + (tail == Tail::kDrop ? Sums<float>{divergence.plain(at), divergence.flow(at)}
                                                   : divergence.term(at));
            });
            if (tail == Tail::kBucket && threadIdx.x == 0) sums = sums + divergence.term(outside);
        });
    }
    sums = part.merge(sums, SumsMerger{});
    if (p.row_loss && part.thread() == 0)
        write_row_loss(p, row, token.weight, sums.loss, hard_loss(p, token, states.hard, target_logit));

    // Map
    if (p.gradient.data) {
        G* const gradient = row_pointer<G>(p.gradient, row);  // [width]
        const float slope_factor = token.factor * p.slope_weight;
        const HardTerm hard(p, token, states.hard);
        Softmax<float> over = all;  // outside the entries the gradient is scale * exp((s - over.max) / T)
        float scale = 0.f;
        with_divergence(p.divergence, p.beta, [&](const auto& divergence) {
            if (part.is_first()) {
                entries.each([&](int64_t place, int64_t index) {
                    const float logit[1] = {widen(student[index])};
                    const Point<float> at = categories.at(logit[0], 0.f, entries.logprob(place));
                    const float slope =
                        tail == Tail::kDrop ? divergence.flow(at) - at.q * sums.aux : divergence.slope(at, sums);
                    float value[1] = {slope_factor == 0.f ? 0.f : slope_factor * slope};
                    if (has_target) hard.add(value, int(index), logit);
                    store(gradient + index, value);
                });
            }
            if (slope_factor == 0.f) return;
            if (tail == Tail::kBucket && states.rest.sum != 0.f)
                over = states.rest, scale = slope_factor * divergence.slope(outside, sums) / over.sum;
            if (tail == Tail::kDrop) scale = -slope_factor * sums.aux / over.sum;
        });
        const Exponential exponential(over.max, inverse_temperature);
        scale = weigh(scale, exponential.correction(over.max));
        specialised(has_target, [&](auto targets) {
            const auto write = [&](int element, const auto& x) {
                constexpr int kCount = sizeof(x[0]) / sizeof(float);
                float values[kCount];
#pragma unroll
                for (int i = 0; i < kCount; ++i) values[i] = scale == 0.f ? 0.f : scale * exponential(x[0][i]);
                if (decltype(targets)::value) hard.add(values, element, x[0]);
                const uint32_t marked = bitmap.of<kCount>(element);
                if (!marked) {
                    store(gradient + element, values);
                    return;
                }
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    const float value[1] = {values[i]};
                    if (!(marked >> i & 1)) store(gradient + element + i, value);
                }
            };
            if constexpr (Part::kSkips) {
                if (!reads) return part.positions(write);
            }
            part.again(write);
        });
        fill(gradient + p.vocab, p.width - p.vocab, 0.f, part.thread(), part.threads());
    }
    __syncthreads();  // everybody is done with the bitmap
    entries.each([&](int64_t, int64_t index) { bitmap.clear(int(index)); });
}

// The Hopper kernel's part, in topk_distill_sm90.cu: false if the device has no clusters that can hold such rows, and
// then nothing was launched.
bool topk_distill_cluster(const TopKParams& params, Layout layout, cudaStream_t stream);
std::vector<Layout> topk_distill_clusters_layouts(const Device& device, int64_t vocab, Dtype dtype);

}  // namespace pyalign::cuda
