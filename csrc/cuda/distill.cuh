// One row pair of the dense distillation losses, in whatever way it is held: by one block that reads it again from
// shared memory and L2 (distill.cu), or by a thread-block cluster that has all of it on chip (distill_sm90.cu).
//
//   fold   both rows into Softmax states and a KL's closed form, merged over all threads that hold a part of the row;
//   sum    the divergence's terms; where its slope needs no sums, the gradient is written in the same pass;
//   map    otherwise once more, into the gradient.
//
// Rows whose loss is large go by closed forms (closed.cuh): the sum is left out where the fold knows the loss.
#pragma once

#include "cuda/closed.cuh"
#include "cuda/losses.cuh"

namespace pyalign::cuda {

struct DistillParams {
    LossParams loss;
    Rows teacher;  // [teacher_count, vocab]
};

// The points of a row pair.
struct Points {
    Pair<float> pair;
    Exponential student, teacher;

    __device__ __forceinline__ Points(const Folded& row, float inverse_temperature)
        : pair(finish<float>(row.student, row.teacher, inverse_temperature)),
          student(row.student.max, inverse_temperature),
          teacher(row.teacher.max, inverse_temperature) {
        pair.student_scale *= student.correction(row.student.max);
        pair.teacher_scale *= teacher.correction(row.teacher.max);
    }
    __device__ __forceinline__ Point<float> at(float s, float t) const {
        return pair.with(student(s), teacher(t), s, t);
    }
    __device__ __forceinline__ float student_at(float s) const { return student(s) * pair.student_scale; }
};

// What a thread keeps in registers from one pass over the row to the next: a number for each entry of its first
// kVectors vectors, which part.held walks over; part.beyond walks over all else.
template <class Part, int kVectors>
struct Kept {
    float of[kVectors > 0 ? kVectors : 1][Part::kWidth];

    // body(element, x, numbers), which sets the numbers.
    template <class Body>
    __device__ __forceinline__ void fill(Part& part, Body body) {
        part.template held<kVectors>([&](int i, int element, const auto& x) { body(element, x, of[i]); });
        part.template beyond<kVectors>([&](int element, const auto& x) {
            float dropped[sizeof(x[0]) / sizeof(float)];
            body(element, x, dropped);
        });
    }
    // with(element, x, numbers) where they were kept, else without(element, x).
    template <class Without, class With>
    __device__ __forceinline__ void use(Part& part, Without without, With with) const {
        part.template held<kVectors>([&](int i, int element, const auto& x) { with(element, x, of[i]); });
        part.template beyond<kVectors>(without);
    }
};

// A pass of its own over what is on chip: the passes that every training step makes stay lean.
template <class Part>
__device__ __forceinline__ void write_metrics(const LossParams& p, int64_t row, const Folded& folded, Part& part) {
    Metrics metrics;
    const Entropy entropy(folded.student, p.inverse_temperature);
    part.again([&](int element, const auto& x) {
        constexpr int kCount = sizeof(x[0]) / sizeof(float);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            metrics.entropy += entropy.term(x[0][i]);
            if (x[0][i] == folded.student.max) metrics.student_top = min(metrics.student_top, element + i);
            if (x[1][i] == folded.teacher.max) metrics.teacher_top = min(metrics.teacher_top, element + i);
        }
    });
    metrics = part.merge(metrics, MetricsMerger{});
    if (part.thread() != 0) return;
    if (p.entropy) p.entropy[row] = metrics.entropy;
    if (p.agreement)
        p.agreement[row] =
            settle_top(metrics.student_top, folded.student) == settle_top(metrics.teacher_top, folded.teacher);
}

template <class D>
__device__ __forceinline__ D make_divergence(const LossParams& p) {
    if constexpr (std::is_same_v<D, JensenShannon<float>>)
        return {p.beta};
    else
        return {};
}

// A row whose loss is above kFarLoss: its sums and its gradient; false, and no gradient, for any other.
template <class G, class D, class Part>
__device__ __forceinline__ bool closed_row(const LossParams& p, const Folded& folded, const D& divergence, int64_t row,
                                           const TokenRow& token, Part& part, Sums<float>& sums) {
    if (!p.row_loss && !p.gradient.data) return true;
    Closed<D> closed(folded, p.inverse_temperature, divergence);
    Kept<Part, Part::kKept> kept;
    if constexpr (Closed<D>::kSums) {
        if (!closed.worthwhile(folded.kl<false>())) return false;
        Sums<float> own;
        kept.fill(part, [&](int, const auto& x, auto& pulls) {
            constexpr int kCount = sizeof(x[0]) / sizeof(float);
#pragma unroll
            for (int i = 0; i < kCount; ++i) pulls[i] = closed.add(own, x[0][i], x[1][i]);
        });
        sums = closed.finish(part.merge(own, SumsMerger{}));
    } else {
        sums.loss = closed.loss;
    }
    if (!(sums.loss > kFarLoss<float> && sums.loss < INFINITY)) return false;  // NaN isn't
    if (!p.gradient.data) return true;

    G* const gradient = row_pointer<G>(p.gradient, row);
    closed.settle(sums, token.factor * p.slope_weight);
    specialised(token.target >= 0, [&](auto targets) {
        const HardTerm hard(p, token, folded.hard);
        const auto write = [&](int element, auto& slopes, const auto& student) {
            if (decltype(targets)::value) hard.add(slopes, element, student);
            store(gradient + element, slopes);
        };
        const auto map = [&](int element, const auto& x) {
            constexpr int kCount = sizeof(x[0]) / sizeof(float);
            float slopes[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) slopes[i] = closed.slope(x[0][i], x[1][i]);
            write(element, slopes, x[0]);
        };
        if constexpr (!Closed<D>::kSums) {
            part.again(map);
        } else {
            kept.use(part, map, [&](int element, const auto& x, const auto& pulls) {
                constexpr int kCount = sizeof(x[0]) / sizeof(float);
                float slopes[kCount];
#pragma unroll
                for (int i = 0; i < kCount; ++i) slopes[i] = closed.slope_by(x[0][i], pulls[i]);
                write(element, slopes, x[0]);
            });
        }
    });
    return true;
}

// Any row, by the divergence's own terms.
template <class G, class D, class Part>
__device__ __forceinline__ Sums<float> general_row(const LossParams& p, const Folded& folded, const D& divergence,
                                                   int64_t row, const TokenRow& token, Part& part) {
    const Points points(folded, p.inverse_temperature);
    const HardTerm hard(p, token, folded.hard);
    const float slope_factor = token.factor * p.slope_weight;
    const bool has_target = token.target >= 0;
    G* const gradient = p.gradient.data ? row_pointer<G>(p.gradient, row) : nullptr;
    const auto write = [&](int element, auto& slopes, const auto& student) {
        for (float& slope : slopes) slope = slope_factor == 0.f ? 0.f : slope * slope_factor;  // 0 weighs even NaN off
        if (has_target) hard.add(slopes, element, student);
        store(gradient + element, slopes);
    };

    Sums<float> sums;
    if constexpr (D::kMapNeedsSums) {
        Kept<Part, Part::kKept / 2> kept;  // the series take registers too
        kept.fill(part, [&](int, const auto& x, auto& pulls) {
            constexpr int kCount = sizeof(x[0]) / sizeof(float);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const Point<float> at = points.at(x[0][i], x[1][i]);
                sums = sums + divergence.term(at);
                pulls[i] = divergence.pull(at);
            }
        });
        sums = part.merge(sums, SumsMerger{});
        if (sums.loss != sums.loss) sums.aux = sums.loss;  // no loss, no gradient
        if (!gradient) return sums;
        kept.use(
            part,
            [&](int element, const auto& x) {
                constexpr int kCount = sizeof(x[0]) / sizeof(float);
                float slopes[kCount];
#pragma unroll
                for (int i = 0; i < kCount; ++i) slopes[i] = divergence.slope(points.at(x[0][i], x[1][i]), sums);
                write(element, slopes, x[0]);
            },
            [&](int element, const auto& x, const auto& pulls) {
                constexpr int kCount = sizeof(x[0]) / sizeof(float);
                float slopes[kCount];
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    slopes[i] = divergence.slope(points.student_at(x[0][i]), pulls[i], sums);
                write(element, slopes, x[0]);
            });
    } else {
        part.again([&](int element, const auto& x) {
            constexpr int kCount = sizeof(x[0]) / sizeof(float);
            float slopes[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const Point<float> at = points.at(x[0][i], x[1][i]);
                sums = sums + divergence.term(at);
                slopes[i] = divergence.slope(at, {});
            }
            if (gradient) write(element, slopes, x[0]);
        });
        if (p.row_loss) sums = part.merge(sums, SumsMerger{});
    }
    return sums;
}

// `part` is this block's part of the row: part.first(body) and part.again(body) call body(element, {student, teacher})
// over its elements (part.held and part.beyond over two halves of them, see Kept), part.merge(state, merger) joins the
// states of all threads that work on the row, and `note` is memory of one thread's own for what is needed at the end. G
// is the gradient's type.
template <class G, class D, class Part>
__device__ __forceinline__ void distill_row(const DistillParams& params, int64_t row, const TokenRow& token,
                                            float target_logit, Part& part, Note* note) {
    const LossParams& p = params.loss;
    const D divergence = make_divergence<D>(p);
    const float inverse_temperature = p.inverse_temperature;
    const bool has_target = token.target >= 0;

    // Fold
    const bool folds_hard = has_target && inverse_temperature != 1.f;
    PairFolding<kStudentWeighs<D>> folding;
    Folding student_hard;
    specialised(folds_hard, [&](auto hard) {
        part.first([&](int, const auto& x) {
            folding.fold(x[0], x[1], inverse_temperature);
            if (decltype(hard)::value) student_hard.fold(x[0], 1.f);
        });
    });
    const Folded own{folding.student.state(inverse_temperature), folding.teacher.state(inverse_temperature),
                     student_hard.state(1.f), folding.crossed(inverse_temperature)};
    Folded folded = part.merge(own, FoldedMerger<kStudentWeighs<D>>{inverse_temperature, folds_hard});
    if (!folds_hard) folded.hard = folded.student;
    if (part.thread() == 0) *note = {token.weight, hard_loss(p, token, folded.hard, target_logit)};
    if (p.wants_metrics()) write_metrics(p, row, folded, part);

    Sums<float> sums;
    const bool is_far = closed_row<G>(p, folded, divergence, row, token, part, sums);
    if (!is_far) sums = general_row<G>(p, folded, divergence, row, token, part);
    if (p.gradient.data)
        fill(row_pointer<G>(p.gradient, row) + p.vocab, p.width - p.vocab, 0.f, part.thread(), part.threads());
    if (p.row_loss && part.thread() == 0) write_row_loss(p, row, note->weight, sums.loss, note->hard);
}

// The Hopper kernel's part, in distill_sm90.cu: false if the device has no clusters that can hold such rows, and then
// nothing was launched.
bool distill_cluster(const DistillParams& params, Layout layout, cudaStream_t stream);
std::string explain_cluster(const Device& device, int64_t vocab, Dtype dtype, Layout layout);  // empty: can't
std::vector<Layout> distill_clusters_layouts(const Device& device, int64_t vocab, Dtype dtype, Divergence divergence);

}  // namespace pyalign::cuda
