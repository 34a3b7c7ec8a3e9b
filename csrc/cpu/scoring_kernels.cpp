// Scoring on the CPU: heads over rows of hidden states, matrices of win probabilities and sums over their rows, and
// the figures of pairs.
#include "cpu/scoring_kernels.h"

#include "common/scoring.h"
#include "cpu/simd.h"

PYALIGN_BEGIN
namespace {

using cpu::GroupPart;
using cpu::kStrip;
using cpu::ScoringKernels;

// ---- Reward heads ----

// The last nonzero of mask [count], or -1.
int64_t last_counted(const uint8_t* mask, int64_t count) {
    for (; count >= 8; count -= 8) {
        uint64_t eight;
        std::memcpy(&eight, mask + count - 8, sizeof eight);
        if (eight != 0) break;
    }
    while (count > 0 && !mask[count - 1]) --count;
    return count - 1;
}

int64_t last_row(const RewardArgs& a, int64_t sequence) {
    if (a.offsets) return a.offsets[sequence + 1] > a.offsets[sequence] ? a.offsets[sequence + 1] - 1 : -1;
    const int64_t first = sequence * a.length;
    const int64_t last = a.mask ? last_counted(a.mask + first, a.length) : a.length - 1;
    return last < 0 ? -1 : first + last;
}

// Entry i is added to lane i % kLanes, wherever x and w lie in memory: the sum has the same bits in every batch.
template <class F>
double dot(const F* x, const F* w, int64_t width) {
    double sum = 0;
    for (int64_t first = 0; first < width; first += kBlock) {
        const int64_t length = minimum(kBlock, width - first), whole = length / kLanes * kLanes;
        alignas(64) F lanes[kLanes] = {};
        for (int64_t i = first; i < first + whole; i += kLanes) {
#pragma omp simd
            for (int lane = 0; lane < int(kLanes); ++lane) lanes[lane] += x[i + lane] * w[i + lane];
        }
        for (int64_t i = whole; i < length; ++i) lanes[i - whole] += x[first + i] * w[first + i];
        F block = F(0);
#pragma omp simd reduction(+ : block)
        for (int lane = 0; lane < int(kLanes); ++lane) block += lanes[lane];
        sum += double(block);
    }
    return sum;
}

template <class T>
void reward_of(const RewardArgs& a, int64_t begin, int64_t end, std::byte* scratch) {
    using F = ValueOf<T>;
    F* const row = reinterpret_cast<F*>(scratch);
    const F* const head = static_cast<const F*>(a.head);
    const F* const bias = static_cast<const F*>(a.bias);
    for (int64_t b = begin; b < end; ++b) {
        const int64_t last = last_row(a, b);
        F* const scores = static_cast<F*>(a.scores) + b * a.heads;
        a.last[b] = last;
        if (last < 0) {
            for (int64_t c = 0; c < a.heads; ++c) scores[c] = F(kNaN);
            continue;
        }
        const T* const x = reinterpret_cast<const T*>(row_of(a.hidden, last));
#pragma omp simd
        for (int64_t i = 0; i < a.width; ++i) row[i] = value(x[i]);
        for (int64_t c = 0; c < a.heads; ++c)
            scores[c] = F(dot(row, head + c * a.width, a.width) + (bias ? double(bias[c]) : 0.0));
    }
}

void reward(const RewardArgs& args, int64_t begin, int64_t end, std::byte* scratch) {
    with_element(args.hidden.dtype, [&](auto type) { reward_of<decltype(type)>(args, begin, end, scratch); });
}

// dL/dx = sum_c u_c w_c
template <class T>
void reward_hidden_gradient_of(const RewardGradientArgs& a, int64_t begin, int64_t end) {
    using F = ValueOf<T>;
    for (int64_t b = begin; b < end; ++b) {
        if (a.last[b] < 0) continue;
        const F* const upstream = static_cast<const F*>(a.upstream) + b * a.heads;
        T* const to = static_cast<T*>(a.hidden_gradient) + a.last[b] * a.width;
        for (int64_t first = 0; first < a.width; first += kBlock) {
            const int64_t length = minimum(kBlock, a.width - first);
            alignas(64) F sum[kBlock] = {};
            for (int64_t c = 0; c < a.heads; ++c) {
                const F* const head = static_cast<const F*>(a.head) + c * a.width + first;
                const F u = upstream[c];
#pragma omp simd
                for (int64_t i = 0; i < length; ++i) sum[i] += u * head[i];
            }
#pragma omp simd
            for (int64_t i = 0; i < length; ++i) to[first + i] = round_to(sum[i], T{});
        }
    }
}

void reward_hidden_gradient(const RewardGradientArgs& args, int64_t begin, int64_t end) {
    with_element(args.dtype, [&](auto type) { reward_hidden_gradient_of<decltype(type)>(args, begin, end); });
}

// dL/dw_c = sum_b u_bc x_b, over the sequences in their order.
template <class T>
void reward_head_gradient_of(const RewardGradientArgs& a, int64_t begin, int64_t end) {
    using F = ValueOf<T>;
    for (int64_t c = 0; c < a.heads; ++c) {
        F* const to = static_cast<F*>(a.head_gradient) + c * a.width;
        for (int64_t first = begin; first < end; first += kBlock) {
            const int64_t length = minimum(kBlock, end - first);
            alignas(64) double sum[kBlock] = {};
            for (int64_t b = 0; b < a.sequences; ++b) {
                if (a.last[b] < 0) continue;
                const double u = at<F>(a.upstream, b * a.heads + c);
                const T* const x = reinterpret_cast<const T*>(row_of(a.hidden, a.last[b])) + first;
#pragma omp simd
                for (int64_t i = 0; i < length; ++i) sum[i] += u * double(value(x[i]));
            }
            for (int64_t i = 0; i < length; ++i) to[first + i] = F(sum[i]);
        }
    }
}

void reward_head_gradient(const RewardGradientArgs& args, int64_t begin, int64_t end) {
    with_element(args.dtype, [&](auto type) { reward_head_gradient_of<decltype(type)>(args, begin, end); });
}

// ---- Groups ----

struct Range {
    int64_t begin, size;
};

Range range_of(const GroupArgs& a, int64_t group) {
    if (!a.offsets) return {group * a.size, a.size};
    return {a.offsets[group], a.offsets[group + 1] - a.offsets[group]};
}

// Rows of matrices, which lie in memory one after the other.
template <class T>
void win_rows(const GroupArgs& a, const GroupPart& part, std::byte* scratch) {
    using F = ValueOf<T>;
    F* const x = reinterpret_cast<F*>(scratch);
    const F scale = F(a.scale);
    const int64_t block_begin = a.blocks ? a.blocks[part.begin] : part.begin * a.size * a.size;
    const int64_t skipped = part.is_whole() ? 0 : part.first * range_of(a, part.begin).size;
    RowWriter<F> writer(static_cast<std::byte*>(a.result) + (block_begin + skipped) * int64_t(sizeof(F)),
                        DtypeOf<F>::value, part.stream);
    alignas(64) F wins[kBlock + kLanes];  // what a vector holds beyond a row is overwritten by the next
    int64_t filled = 0;
    const auto flush = [&](int64_t count) {
        std::memcpy(writer.block(), wins, static_cast<size_t>(count) * sizeof(F));
        writer.write(count);
        filled = 0;
    };

    for (int64_t group = part.begin; group < part.end; ++group) {
        const Range range = range_of(a, group);
        const int64_t n = range.size, last = part.is_whole() ? n : part.last;
        const T* const scores = static_cast<const T*>(a.scores) + range.begin;
        for (int64_t i = 0; i < n; ++i) x[i] = value(scores[i]);
        for (int64_t i = n; i < n + kLanes; ++i) x[i] = F(0);
        for (int64_t i = part.first; i < last; ++i) {
            const F xi = x[i];
            for (int64_t from = 0; from < n;) {
                const int64_t count = minimum(n - from, kBlock - filled);
                for (int64_t j = 0; j < count; j += kLanes) {
                    F* const to = wins + filled + j;
#pragma omp simd
                    for (int lane = 0; lane < int(kLanes); ++lane) to[lane] = win(scale * (xi - x[from + j + lane])).p;
                }
                if (i >= from && i < from + count) wins[filled + i - from] = F(0.5);  // also of what isn't finite
                filled += count, from += count;
                if (filled == kBlock) flush(kBlock);
            }
        }
    }
    if (filled > 0) flush(filled);
    writer.finish(0, 0);
    if (part.stream) finish_streams();
}

constexpr int64_t kRun = 16;  // opponents that are added up in F, before double

static_assert(kLanes == kStrip);

// Up to kLanes rows from `first` on, side by side in lanes: lane l's adds term(win, l, j) for every opponent j, in
// their order, and ends with finish(row, sum).
template <class F, class Term, class Finish>
void sum_strip(const F* x, int64_t n, F scale, int64_t first, int64_t count, Term term, Finish finish) {
    alignas(64) F mine[kLanes];
    alignas(64) double total[kLanes] = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) mine[lane] = x[first + minimum(lane, count - 1)];
    for (int64_t run = 0; run < n; run += kRun) {
        alignas(64) F sum[kLanes] = {};
        for (int64_t j = run, end = minimum(run + kRun, n); j < end; ++j) {
            const F other = x[j];
            const int own = j >= first && j < first + kLanes ? int(j - first) : -1;
#pragma omp simd
            for (int lane = 0; lane < int(kLanes); ++lane) {
                const F one = term(win(scale * (mine[lane] - other)), lane, j);
                sum[lane] += lane == own ? F(0) : one;
            }
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) total[lane] += double(sum[lane]);
    }
    for (int64_t lane = 0; lane < count; ++lane) finish(first + lane, total[lane]);
}

// sum_j p_ij p_ji (u_ij - u_ji) without walking down columns: the term t_ij = p_ij p_ji u_ij is added to entry i's
// gradient and taken from entry j's, by rows. Sums run in F over kRun vectors of a row and kRun rows of a column.
template <class F>
void add_matrix_gradient(const F* x /* [n] and kLanes more */, const F* u /* [n, n] */, int64_t n, F scale,
                         int64_t first, int64_t last, F* tile /* [n] and kLanes more */, double* gradient /* [n] */) {
    const int64_t whole = n / kLanes * kLanes, rest = n - whole;
    for (int64_t begin = first; begin < last; begin += kRun) {
        const int64_t end = minimum(begin + kRun, last);
        std::memset(tile, 0, static_cast<size_t>(n + kLanes) * sizeof(F));
        for (int64_t i = begin; i < end; ++i) {
            const F xi = x[i];
            const F* const row = u + i * n;
            alignas(64) F sum[kLanes] = {};
            double total = 0;
            const auto add = [&](const F* upstream, int64_t j) {
                const int own = i >= j && i < j + kLanes ? int(i - j) : -1;
#pragma omp simd
                for (int lane = 0; lane < int(kLanes); ++lane) {
                    const F term = win(scale * (xi - x[j + lane])).slope * upstream[lane];
                    const F one = lane == own ? F(0) : term;
                    sum[lane] += one;
                    tile[j + lane] -= one;
                }
            };
            const auto flush = [&] {
                F run = F(0);
#pragma omp simd reduction(+ : run)
                for (int lane = 0; lane < int(kLanes); ++lane) run += sum[lane];
                total += double(run);
            };
            for (int64_t j = 0; j < whole; j += kLanes) {
                add(row + j, j);
                if (j / kLanes % kRun != kRun - 1) continue;
                flush();
                std::memset(sum, 0, sizeof sum);
            }
            if (rest > 0) {
                alignas(64) F upstream[kLanes] = {};
                for (int64_t lane = 0; lane < rest; ++lane) upstream[lane] = row[whole + lane];
                add(upstream, whole);
            }
            flush();
            gradient[i] += total;
        }
        for (int64_t j = 0; j < n; ++j) gradient[j] += double(tile[j]);
    }
}

template <class T>
void finish_gradient(const GroupArgs& a, int64_t group, const double* gradient) {
    const Range range = range_of(a, group);
    T* const to = static_cast<T*>(a.result) + range.begin;
    for (int64_t i = 0; i < range.size; ++i) to[i] = round_to(ValueOf<T>(a.scale * gradient[i]), T{});
}

template <class T>
void matrix_gradients(const GroupArgs& a, const GroupPart& part, std::byte* scratch, double* gradient) {
    using F = ValueOf<T>;
    for (int64_t group = part.begin; group < part.end; ++group) {
        const Range range = range_of(a, group);
        const int64_t n = range.size, last = part.is_whole() ? n : part.last;
        F *const x = reinterpret_cast<F*>(scratch), *const tile = x + n + kLanes;
        double* const sums = gradient ? gradient : reinterpret_cast<double*>(scratch) + 2 * (n + kLanes);
        const T* const scores = static_cast<const T*>(a.scores) + range.begin;
        const F* const upstream = static_cast<const F*>(a.upstream) + (a.blocks ? a.blocks[group] : group * n * n);
        for (int64_t i = 0; i < n; ++i) x[i] = value(scores[i]);
        for (int64_t i = n; i < n + kLanes; ++i) x[i] = F(0);
        std::memset(sums, 0, static_cast<size_t>(n) * sizeof(double));
        add_matrix_gradient<F>(x, upstream, n, F(a.scale), part.first, last, tile, sums);
        if (!gradient) finish_gradient<T>(a, group, sums);
    }
}

void matrix_gradient(const GroupArgs& args, const GroupPart& part, std::byte* scratch, double* gradient) {
    with_element(args.dtype, [&](auto type) { matrix_gradients<decltype(type)>(args, part, scratch, gradient); });
}

void finish(const GroupArgs& args, int64_t group, const double* gradient) {
    with_element(args.dtype, [&](auto type) { finish_gradient<decltype(type)>(args, group, gradient); });
}

template <class T>
void win_sums(const GroupArgs& a, const GroupPart& part, std::byte* scratch) {
    using F = ValueOf<T>;
    F* const x = reinterpret_cast<F*>(scratch);
    const F scale = F(a.scale);
    for (int64_t group = part.begin; group < part.end; ++group) {
        const Range range = range_of(a, group);
        const int64_t n = range.size, last = part.is_whole() ? n : part.last;
        const T* const scores = static_cast<const T*>(a.scores) + range.begin;
        for (int64_t i = 0; i < n; ++i) x[i] = value(scores[i]);
        const double share = n > 1 ? 1.0 / double(n - 1) : 0.0;
        T* const gradient = static_cast<T*>(a.result) + range.begin;
        for (int64_t strip = part.first; strip < last; strip += kLanes) {
            const int64_t count = minimum(kLanes, last - strip);
            if (a.op == GroupOp::kWinRates) {
                F* const rates = static_cast<F*>(a.result) + range.begin;
                sum_strip(
                    x, n, scale, strip, count, [](Win<F> at, int, int64_t) { return at.p; },
                    [&](int64_t i, double sum) { rates[i] = n > 1 ? F(sum * share) : F(0.5); });
            } else {
                const F* const upstream = static_cast<const F*>(a.upstream) + range.begin;
                alignas(64) F mine[kLanes];
                for (int64_t lane = 0; lane < kLanes; ++lane) mine[lane] = upstream[strip + minimum(lane, count - 1)];
                sum_strip(
                    x, n, scale, strip, count,
                    [&](Win<F> at, int lane, int64_t j) { return at.slope * (mine[lane] - upstream[j]); },
                    [&](int64_t i, double sum) { gradient[i] = round_to(F(sum * a.scale * share), T{}); });
            }
        }
    }
}

void win_part(const GroupArgs& args, const GroupPart& part, std::byte* scratch) {
    with_element(args.dtype, [&](auto type) {
        using T = decltype(type);
        if (args.op == GroupOp::kWinProbabilities)
            win_rows<T>(args, part, scratch);
        else if (args.op == GroupOp::kWinProbabilitiesGradient)
            matrix_gradients<T>(args, part, scratch, nullptr);
        else
            win_sums<T>(args, part, scratch);
    });
}

template <class T>
void best_of(const GroupArgs& a, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
        const Range range = range_of(a, group);
        const T* const scores = static_cast<const T*>(a.scores) + range.begin;
        int64_t best = -1;
        ValueOf<T> highest = 0;
        for (int64_t i = 0; i < range.size; ++i) {
            const auto score = value(scores[i]);
            if (best < 0 ? score != score : !(score > highest)) continue;
            best = i, highest = score;
        }
        static_cast<int64_t*>(a.result)[group] = best < 0 ? -1 : a.offsets ? range.begin + best : best;
    }
}

void best(const GroupArgs& args, int64_t begin, int64_t end) {
    with_element(args.dtype, [&](auto type) { best_of<decltype(type)>(args, begin, end); });
}

// ---- Metrics ----

constexpr int64_t kPairs = 256;  // at a time

template <class T>
void metrics_of(const MetricArgs& a, int64_t begin, int64_t end, double* table) {
    using F = ValueOf<T>;
    const F scale = F(a.scale), margin = F(a.margin);
    const F* const margins = static_cast<const F*>(a.margins);
    alignas(64) F z[kPairs], right[kPairs], tied[kPairs], loss[kPairs], brier[kPairs], confidence[kPairs];
    for (int64_t start = begin; start < end; start += kPairs) {
        const int64_t count = minimum(kPairs, end - start);
        const T* const chosen = static_cast<const T*>(a.chosen) + start;
        const T* const rejected = static_cast<const T*>(a.rejected) + start;
        for (int64_t i = count; i < kPairs; ++i) z[i] = F(0);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = scale * (value(chosen[i]) - value(rejected[i])) - margin;
        for (int64_t i = 0; margins && i < count; ++i)
            z[i] = scale * (value(chosen[i]) - value(rejected[i])) - margins[start + i];
#pragma omp simd
        for (int64_t i = 0; i < kPairs; ++i) {
            const PairFigures<F> pair = pair_figures(z[i]);
            right[i] = pair.right;
            tied[i] = pair.tied;
            loss[i] = pair.loss;
            brier[i] = pair.brier;
            confidence[i] = pair.confidence;
        }
        for (int64_t i = 0; i < count; ++i) {
            if (a.mask && !a.mask[start + i]) continue;
            const int64_t category = a.category ? a.category[start + i] : 0;
            double* const cell = table + (category * (a.bins + 1) + bin_of(confidence[i], a.bins)) * kStatistics;
            const double w = a.weight ? at<F>(a.weight, start + i) : 1.0;
            cell[0] += 1;
            cell[1] += w;
            cell[2] += w * w;
            cell[3] += w * double(right[i]);
            cell[4] += w * double(tied[i]);
            cell[5] += w * double(loss[i]);
            cell[6] += w * double(brier[i]);
            cell[7] += w * double(confidence[i]);
        }
    }
}

void metrics(const MetricArgs& args, int64_t begin, int64_t end, double* table) {
    with_element(args.dtype, [&](auto type) { metrics_of<decltype(type)>(args, begin, end, table); });
}

}  // namespace

#define PYALIGN_STRING(x) #x
#define PYALIGN_NAME(x) PYALIGN_STRING(x)
extern const ScoringKernels kScoringKernels;
const ScoringKernels kScoringKernels = {PYALIGN_NAME(PYALIGN_ISA),
                                        reward,
                                        reward_hidden_gradient,
                                        reward_head_gradient,
                                        win_part,
                                        matrix_gradient,
                                        finish,
                                        best,
                                        metrics};

PYALIGN_END
