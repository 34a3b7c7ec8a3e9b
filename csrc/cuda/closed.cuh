// The divergences of distill.h in closed form, over exponentials as the hardware takes them: for rows whose loss is
// above kFarLoss, where the series of near entries would cost more than all else.
//
//   x, y      log2 of e^((s - max) / T) and e^((t - max) / T): one multiply-add each
//   q = a 2^x, p = b 2^y, and the constants a, b of the row carry the normalisers.
//
// A logit of -inf makes the sums of all but TotalVariation NaN or infinite, which is no loss above kFarLoss: such rows
// go the general way.
#pragma once

#include "cuda/common.cuh"

namespace pyalign::cuda {

// Which of the two sums below the fold takes: KL(q || p) for a reverse KL, else KL(p || q).
template <class D>
constexpr bool kStudentWeighs = std::is_same_v<D, ReverseKL<float>>;

// Both rows while a thread folds them, and sum 2^y (y - x) or, by the student, sum 2^x (x - y): what a KL divergence is
// made of beside the normalisers.
template <bool kByStudent>
struct PairFolding {
    Folding student, teacher;
    float cross = 0.f;

    template <int N>
    __device__ __forceinline__ void fold(const float (&s)[N], const float (&t)[N], float inverse_temperature) {
        const Folding::Step by_student = student.raise(largest_of(s), inverse_temperature);
        const Folding::Step by_teacher = teacher.raise(largest_of(t), inverse_temperature);
        const float apart = by_student.shift - by_teacher.shift;  // how far y - x rises
        float crosses[2] = {kByStudent ? __fmaf_rn(student.sum, -apart, cross) * by_student.scale
                                       : __fmaf_rn(teacher.sum, apart, cross) * by_teacher.scale,
                            0.f};
        float student_sums[2] = {student.sum * by_student.scale, 0.f};
        float teacher_sums[2] = {teacher.sum * by_teacher.scale, 0.f};
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float x = by_student.now.exponent(s[i]), y = by_teacher.now.exponent(t[i]);
            const float q = exp2_fast(x), p = exp2_fast(y);
            student_sums[i % 2] += q;
            teacher_sums[i % 2] += p;
            crosses[i % 2] += kByStudent ? q * (x - y) : p * (y - x);
        }
        student.sum = student_sums[0] + student_sums[1];
        teacher.sum = teacher_sums[0] + teacher_sums[1];
        cross = crosses[0] + crosses[1];
    }

    // The sum at the states' max, which the exponents' origin was rounded from.
    __device__ __forceinline__ float crossed(float inverse_temperature) const {
        const Exponential of_student(student.max, inverse_temperature), of_teacher(teacher.max, inverse_temperature);
        const float x = of_student.lost(student.max), y = of_teacher.lost(teacher.max);
        return kByStudent ? __fmaf_rn(student.sum, x - y, cross) * exp2_fast(x)
                          : __fmaf_rn(teacher.sum, y - x, cross) * exp2_fast(y);
    }
};

// A row pair, folded.
struct Folded {
    Softmax<float> student, teacher;
    Softmax<float> hard;  // the student at temperature 1
    float cross;          // see PairFolding

    // KL(p || q), or KL(q || p) by the student's weights.
    template <bool kByStudent>
    __device__ __forceinline__ float kl() const {
        const float ratio = log_positive(student.sum / teacher.sum);
        return kByStudent ? Exponential::kLn2 * cross / student.sum - ratio
                          : Exponential::kLn2 * cross / teacher.sum + ratio;
    }
};

template <bool kByStudent>
struct FoldedMerger {
    float inverse_temperature;
    bool hard;

    // The cross sum with the exponents taken at other maxima.
    __device__ __forceinline__ float raise(const Folded& a, float student, float teacher) const {
        const float c = inverse_temperature * Exponential::kLog2E;
        const Softmax<float>& weights = kByStudent ? a.student : a.teacher;
        const float apart = ((student - a.student.max) - (teacher - a.teacher.max)) * c;
        return (a.cross + weigh(weights.sum, kByStudent ? -apart : apart)) *
               rescale(weights.max, kByStudent ? student : teacher, inverse_temperature);
    }
    __device__ __forceinline__ Folded warp(const Folded& a) const {
        const Softmax<float> student = warp_merge(a.student, inverse_temperature);
        const Softmax<float> teacher = warp_merge(a.teacher, inverse_temperature);
        return {student, teacher, hard ? warp_merge(a.hard, 1.f) : a.hard,
                warp_sum(raise(a, student.max, teacher.max))};
    }
};

// What the closed forms share: the exponentials of a row pair.
struct Exponents {
    Exponential student, teacher;
    float a, b, log2_ratio;  // log2 b/a

    __device__ __forceinline__ Exponents(const Folded& row, float inverse_temperature)
        : student(row.student.max, inverse_temperature), teacher(row.teacher.max, inverse_temperature) {
        const float x = student.lost(row.student.max), y = teacher.lost(row.teacher.max);
        a = exp2_fast(x) / row.student.sum;
        b = exp2_fast(y) / row.teacher.sum;
        log2_ratio = (y - x) + Exponential::kLog2E * log_positive(row.student.sum / row.teacher.sum);
    }
};

// Each divergence has
//   kSums       whether its sums need the normalisers; else `loss` is known from the fold;
//   worthwhile  (kSums) whether KL(p || q) promises a loss above kFarLoss: a guess, as the sums will show;
//   add         (kSums) the entry into the thread's sums; finish() makes the row's Sums of those of all threads. It
//               returns the entry's pull (csrc/common/distill.h), which a thread may keep;
//   slope       factor times the derivative by the entry's student logit, after settle(the row's Sums, factor);
//               slope_by (kSums) is the same from the student's logit and the pull.
template <class D>
struct Closed;

template <>
struct Closed<ForwardKL<float>> {
    static constexpr bool kSums = false;
    Exponents at;
    float loss;

    __device__ __forceinline__ Closed(const Folded& row, float inverse_temperature, ForwardKL<float>)
        : at(row, inverse_temperature), loss(row.kl<false>()) {}
    __device__ __forceinline__ void settle(Sums<float>, float factor) { at.a *= factor, at.b *= factor; }
    __device__ __forceinline__ float slope(float s, float t) const {
        return __fmaf_rn(at.a, at.student(s), -(at.b * at.teacher(t)));
    }
};

// q (d - D), d = ln 2 (x - y - log2 b/a)
template <>
struct Closed<ReverseKL<float>> {
    static constexpr bool kSums = false;
    Exponents at;
    float loss, by, constant;

    __device__ __forceinline__ Closed(const Folded& row, float inverse_temperature, ReverseKL<float>)
        : at(row, inverse_temperature), loss(row.kl<true>()) {}
    __device__ __forceinline__ void settle(Sums<float> row, float factor) {
        by = factor * at.a * Exponential::kLn2;
        constant = -factor * at.a * (Exponential::kLn2 * at.log2_ratio + row.loss);
    }
    __device__ __forceinline__ float slope(float s, float t) const {
        const float x = at.student.exponent(s), y = at.teacher.exponent(t);
        return exp2_fast(x) * __fmaf_rn(x - y, by, constant);
    }
};

template <>
struct Closed<TotalVariation<float>> {
    static constexpr bool kSums = true;
    Exponents at;
    float by, constant;

    __device__ __forceinline__ Closed(const Folded& row, float inverse_temperature, TotalVariation<float>)
        : at(row, inverse_temperature) {}
    __device__ __forceinline__ static bool worthwhile(float kl) { return !(kl < 0.01f); }
    __device__ __forceinline__ float gap(float q, float t) const {  // q - p
        return __fmaf_rn(at.a, q, -(at.b * at.teacher(t)));
    }
    __device__ __forceinline__ static float pull(float gap) { return gap > 0.f ? 0.5f : gap < 0.f ? -0.5f : 0.f; }
    __device__ __forceinline__ float add(Sums<float>& sums, float s, float t) const {
        const float q = at.student(s), gap = this->gap(q, t), pull = this->pull(gap);
        sums.loss += fabsf(gap);
        sums.aux = __fmaf_rn(q, pull, sums.aux);
        return pull;
    }
    __device__ __forceinline__ Sums<float> finish(Sums<float> sums) const {
        return {0.5f * sums.loss, at.a * sums.aux};
    }
    __device__ __forceinline__ void settle(Sums<float> row, float factor) {
        by = factor * at.a, constant = -by * row.aux;
    }
    __device__ __forceinline__ float slope(float s, float t) const {
        const float q = at.student(s);
        return q * __fmaf_rn(pull(gap(q, t)), by, constant);
    }
    __device__ __forceinline__ float slope_by(float s, float pull) const {
        return at.student(s) * __fmaf_rn(pull, by, constant);
    }
};

// In units of a 2^x and with e = y - x, m is (1 - beta) 2^x + of_teacher 2^y. Taken from the larger of the two, as
// 2^max(x, y) w with w = of_larger + of_smaller 2^-|e|, its logarithm is one of a number near 1, exact to 2^-22, where
// that of m itself would carry the rounding of log m. Each pass takes three values of the hardware's, but one by the
// pull, log2 m/q.
template <>
struct Closed<JensenShannon<float>> {
    static constexpr bool kSums = true;
    Exponents at;
    float beta, of_student, of_teacher;
    float by, constant;

    __device__ __forceinline__ Closed(const Folded& row, float inverse_temperature, JensenShannon<float> divergence)
        : at(row, inverse_temperature), beta(divergence.beta) {
        of_student = 1.f - beta;
        of_teacher = beta * exp2_fast(at.log2_ratio);
    }
    __device__ __forceinline__ static bool worthwhile(float kl) { return kl > 0.25f; }
    __device__ __forceinline__ float add(Sums<float>& sums, float s, float t) const {
        const float x = at.student.exponent(s), y = at.teacher.exponent(t), e = y - x;
        const float larger = exp2_fast(fmaxf(x, y)), smaller = exp2_fast(-fabsf(e));  // beside the larger
        const bool teacher_larger = e > 0.f;
        const float of_smaller = (teacher_larger ? of_student : of_teacher) * smaller;
        const float w = (teacher_larger ? of_teacher : of_student) + of_smaller, log2_w = log2_fast(w);
        sums.loss += larger * __fmaf_rn(w, log2_w, of_smaller * fabsf(e));
        const float pull = log2_w + fmaxf(e, 0.f);
        sums.aux += larger * ((teacher_larger ? smaller : 1.f) * pull);
        return pull;
    }
    __device__ __forceinline__ Sums<float> finish(Sums<float> sums) const {
        return {Exponential::kLn2 * (beta * at.log2_ratio - at.a * sums.loss), -Exponential::kLn2 * (at.a * sums.aux)};
    }
    __device__ __forceinline__ void settle(Sums<float> row, float factor) {
        const float scale = (beta - 1.f) * factor * at.a;
        by = scale * Exponential::kLn2, constant = scale * row.aux;
    }
    __device__ __forceinline__ float slope_by(float s, float pull) const {
        return at.student(s) * __fmaf_rn(pull, by, constant);
    }
    // Where q is next to nothing, log m/q is finite all the same.
    __device__ __forceinline__ float slope(float s, float t) const {
        const float x = at.student.exponent(s), e = fminf(at.teacher.exponent(t) - x, 120.f);
        return exp2_fast(x) * __fmaf_rn(log2_fast(__fmaf_rn(of_teacher, exp2_fast(e), of_student)), by, constant);
    }
};

}  // namespace pyalign::cuda
