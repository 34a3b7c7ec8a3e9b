// Preference losses on the CPU: items in blocks of lanes, groups as triangles of pairs over entries sorted by rank.
#include "cpu/ranking_kernels.h"

#include "common/ranking.h"
#include "cpu/simd.h"

PYALIGN_BEGIN
namespace {

using cpu::Group;
using cpu::kLanes;
using cpu::LossSum;
using cpu::RankingKernels;

// ---- Items ----

constexpr int64_t kItems = 256;  // at a time: fewer spend their time between the loops

// x[0 .. count) - reference[0 .. count), and zeros up to `padded`: in `to`, or where they are if nothing is to be done.
template <class T, class F = ValueOf<T>>
const F* load_items(const void* x, const void* reference, int64_t begin, int64_t count, int64_t padded, F* to) {
    const T* const from = static_cast<const T*>(x) + begin;
    if constexpr (std::is_same_v<T, F>) {
        if (!reference && count == padded) return from;
    }
    for (int64_t i = count; i < padded; ++i) to[i] = F(0);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = value(from[i]);
    if (!reference) return to;
    const T* const other = static_cast<const T*>(reference) + begin;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] -= value(other[i]);
    return to;
}

// Where a block's results are computed: in place, unless they aren't wanted or the last vector would not fit.
template <class F>
F* place_of(F* wanted, int64_t start, bool fits, F* buffer) {
    return wanted && fits ? wanted + start : buffer;
}

template <class F>
void store_items(const F* from, int64_t start, int64_t count, F* wanted) {
    if (wanted && from != wanted + start) std::memcpy(wanted + start, from, static_cast<size_t>(count) * sizeof(F));
}

template <class T, class Form>
LossSum pairs_of_form(const PairArgs& a, int64_t begin, int64_t end, Form form) {
    using F = ValueOf<T>;
    const F scale = F(a.options.scale), center = F(a.options.center);
    F* const losses = static_cast<F*>(a.reduction == Reduction::kNone ? a.loss : nullptr);
    F* const first_gradient = static_cast<F*>(a.first_gradient);
    F* const second_gradient = static_cast<F*>(a.second_gradient);
    const F* const weight = static_cast<const F*>(a.weight);
    LossSum sum;
    alignas(64) F inputs[2][kItems], outputs[3][kItems], margin[kItems], factor[kItems];
    for (int64_t i = 0; i < kItems; ++i) margin[i] = F(a.options.margin), factor[i] = F(1);

    for (int64_t start = begin; start < end; start += kItems) {
        const int64_t count = minimum(kItems, end - start), padded = (count + kLanes - 1) / kLanes * kLanes;
        F* const loss = place_of(losses, start, count == padded, outputs[0]);
        F* const by_first = place_of(first_gradient, start, count == padded, outputs[1]);
        F* const by_second = place_of(second_gradient, start, count == padded, outputs[2]);

        // Load
        const F* const first = load_items<T>(a.first, a.first_reference, start, count, padded, inputs[0]);
        const F* second = inputs[1];
        if (a.second) second = load_items<T>(a.second, a.second_reference, start, count, padded, inputs[1]);
        for (int64_t i = 0; !a.second && i < padded; ++i) inputs[1][i] = i < count && a.labels[start + i] ? F(1) : F(0);
        for (int64_t i = 0; a.margin && i < count; ++i)
            margin[i] = static_cast<const F*>(a.margin)[(start + i) * a.margin_stride];
        for (int64_t i = 0; weight && i < count; ++i) factor[i] = weight[start + i];
        if (a.first_reward) {
            F* const reward = static_cast<F*>(a.first_reward) + start;
            for (int64_t i = 0; i < count; ++i) reward[i] = scale * first[i];
        }
        if (a.second_reward) {
            F* const reward = static_cast<F*>(a.second_reward) + start;
            for (int64_t i = 0; i < count; ++i) reward[i] = scale * second[i];
        }

        // Loss and derivatives
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) {
            const Item<F> item = form(first[i], second[i], margin[i]);
            loss[i] = item.loss;
            by_first[i] = item.first;
            by_second[i] = item.second;
        }
        if (center != F(0)) {
#pragma omp simd
            for (int64_t i = 0; i < padded; ++i) {
                const F both = first[i] + second[i];
                loss[i] += center * (both * both);
                by_first[i] += F(2) * center * both;
                by_second[i] += F(2) * center * both;
            }
        }
        if (weight) {
#pragma omp simd
            for (int64_t i = 0; i < padded; ++i) {
                loss[i] *= factor[i];
                by_first[i] *= factor[i];
                by_second[i] *= factor[i];
            }
        }
        int64_t counted = count;
        for (int64_t i = 0; a.mask && i < count; ++i) {
            if (a.mask[start + i]) continue;
            loss[i] = by_first[i] = by_second[i] = F(0);
            --counted;
        }

        // Store
        F block = F(0);
#pragma omp simd reduction(+ : block)
        for (int64_t i = 0; i < count; ++i) block += loss[i];
        sum.loss += double(block);
        sum.count += double(counted);
        store_items(loss, start, count, losses);
        store_items(by_first, start, count, first_gradient);
        store_items(by_second, start, count, second_gradient);
    }
    return sum;
}

template <class T>
LossSum pairs_of_type(const PairArgs& args, int64_t begin, int64_t end) {
    LossSum sum;
    with_form<ValueOf<T>>(args.options, [&](auto form) { sum = pairs_of_form<T>(args, begin, end, form); });
    return sum;
}

LossSum pairs(const PairArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
        case Dtype::kFloat32: return pairs_of_type<float>(args, begin, end);
        case Dtype::kBFloat16: return pairs_of_type<BFloat16>(args, begin, end);
        case Dtype::kFloat16: return pairs_of_type<Float16>(args, begin, end);
        case Dtype::kFloat64: return pairs_of_type<double>(args, begin, end);
    }
    return {};
}

// ---- Groups ----

void insertion_sort(int64_t* ranks, int64_t* order, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
        const int64_t rank = ranks[i], place = order[i];
        int64_t j = i;
        for (; j > 0 && ranks[j - 1] > rank; --j) ranks[j] = ranks[j - 1], order[j] = order[j - 1];
        ranks[j] = rank, order[j] = place;
    }
}

template <class T>
void open_group_of(const RankArgs& a, int64_t index, std::byte* scratch, Group& g) {
    using F = ValueOf<T>;
    constexpr int64_t kFewEntries = 32;
    g.begin = a.offsets ? a.offsets[index] : index * a.size;
    g.size = a.offsets ? a.offsets[index + 1] - g.begin : a.size;
    const int64_t room = g.size + kLanes;
    g.order = reinterpret_cast<int64_t*>(scratch);
    g.ranks = g.order + room;
    g.after = g.ranks + room;
    g.gradient = reinterpret_cast<double*>(g.after + room);
    g.scores = g.gradient + room;
    g.distances = static_cast<double*>(g.scores) + room;
    g.tile = static_cast<double*>(g.distances) + room;

    // Present entries, best first
    int64_t n = 0;
    bool sorted = true;
    for (int64_t i = 0; i < g.size; ++i) {
        const int64_t rank = a.ranks[g.begin + i];
        if (rank < 0) continue;
        sorted = sorted && (n == 0 || g.ranks[n - 1] <= rank);
        g.ranks[n] = rank;
        g.order[n++] = i;
    }
    g.present = n;
    if (!sorted && n <= kFewEntries) insertion_sort(g.ranks, g.order, n);
    if (!sorted && n > kFewEntries) cpu::sort_by_rank(g.ranks, g.order, n);
    for (int64_t i = n - 1; i >= 0; --i)
        g.after[i] = i + 1 < n && g.ranks[i] == g.ranks[i + 1] ? g.after[i + 1] : i + 1;

    // Scores and distances
    const F scale = F(a.options.scale), margin = F(a.options.margin);
    const T* const scores = static_cast<const T*>(a.scores) + g.begin;
    F *const x = static_cast<F*>(g.scores), *const distance = static_cast<F*>(g.distances);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = scale * value(scores[g.order[i]]);
        distance[i] = margin * F(g.ranks[i] - g.ranks[0]);
        g.gradient[i] = 0;
    }
    for (int64_t i = n; i < n + kLanes; ++i) x[i] = distance[i] = F(0);  // read, and not used
}

// Adds label smoothing: e z per pair, whose derivative is e, times the entries below less those above.
template <class F>
double smooth(const RankArgs& a, const Group& g) {
    const double e = a.options.label_smoothing;
    if (e == 0) return 0;
    const F *const x = static_cast<const F*>(g.scores), *const distance = static_cast<const F*>(g.distances);
    double loss = 0;
    for (int64_t i = 0, above = 0; i < g.present; ++i) {
        if (i > 0 && g.after[i] != g.after[i - 1]) above = i;
        const double wins = double(g.present - g.after[i] - above);
        loss += e * wins * (double(x[i]) + double(distance[i]));
        g.gradient[i] += e * wins;
    }
    return loss;
}

// Completes a group's loss and writes the gradient of its scores, in their order.
template <class T>
void close_group_of(const RankArgs& a, const Group& g, LossSum& result) {
    using F = ValueOf<T>;
    const double pairs = result.count;
    if (a.options.method == RankMethod::kPairwise && pairs > 0) result.loss += smooth<F>(a, g);
    if (!a.gradient) return;
    F* const gradient = static_cast<F*>(a.gradient) + g.begin;
    std::memset(gradient, 0, static_cast<size_t>(g.size) * sizeof(F));
    if (pairs == 0) return;
    const double factor = a.options.scale / (divides_by_pairs(a) ? pairs : 1);
    for (int64_t i = 0; i < g.present; ++i) gradient[g.order[i]] = F(factor * g.gradient[i]);
}

// The sum of log(1 + e) over many e in [0, 1], a lane each: the products of 1 + e, less 1, which loses nothing of a
// small e, and a logarithm before they can overflow.
template <class F>
struct LogProducts {
    static constexpr int kFactors = sizeof(F) == 4 ? 96 : 768;
    alignas(64) F less_one[kLanes] = {};
    int factors = 0;
    double sum = 0;

    PYALIGN_HD void reserve() {
        if (++factors > kFactors) flush();
    }
    PYALIGN_HD void flush() {
        alignas(64) F logs[kLanes];
#pragma omp simd
        for (int lane = 0; lane < int(kLanes); ++lane)
            logs[lane] = log1p_nonnegative(less_one[lane], F(1) / (F(1) + less_one[lane]));
        for (int lane = 0; lane < int(kLanes); ++lane) {
            sum += double(logs[lane]);
            less_one[lane] = F(0);
        }
        factors = 1;
    }
};

// The pairs that the entries [begin, end) win, without label smoothing, which is linear in the scores (`smooth`). Rows
// are taken in tiles: within one, gradients of the losing entries add up in F; over tiles, in double.
template <class F>
double pair_rows_of(const Group& g, int64_t begin, int64_t end, F* tile, double* gradient) {
    constexpr int64_t kRows = 64;
    alignas(64) static constexpr F kKeep[2 * kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const F* const x = static_cast<const F*>(g.scores);
    const F* const distance = static_cast<const F*>(g.distances);
    const int64_t n = g.present;
    double loss = 0;

    for (int64_t first = begin; first < end; first += kRows) {
        const int64_t last = minimum(first + kRows, end), from = g.after[first];
        if (from >= n) break;
        std::memset(tile + from, 0, static_cast<size_t>(n + kLanes - from) * sizeof(F));
        alignas(64) F base[kLanes] = {};
        LogProducts<F> products;
        for (int64_t i = first; i < last; ++i) {
            const F xi = x[i], di = distance[i];
            alignas(64) F row[kLanes] = {};
            for (int64_t start = g.after[i]; start < n; start += kLanes) {
                const F* const keep = kKeep + (kLanes - minimum(kLanes, n - start));
                products.reserve();
                F* const less_one = products.less_one;
#pragma omp simd
                for (int lane = 0; lane < int(kLanes); ++lane) {
                    const LogisticParts<F> at = logistic_parts((xi - x[start + lane]) - (distance[start + lane] - di));
                    const F e = at.e * keep[lane], down = at.down * keep[lane];
                    less_one[lane] += e + less_one[lane] * e;
                    base[lane] += keep[lane] != F(0) ? at.base : F(0);
                    row[lane] += down;
                    tile[start + lane] += down;
                }
            }
            F sum = F(0);
#pragma omp simd reduction(+ : sum)
            for (int lane = 0; lane < int(kLanes); ++lane) sum += row[lane];
            gradient[i] -= double(sum);
        }
        products.flush();
        loss += products.sum;
        for (const F x : base) loss += double(x);
        for (int64_t j = from; j < n; ++j) gradient[j] += double(tile[j]);
    }
    return loss;
}

// All pairs of a small group, around a circle: entry i meets entry i + d, for d up to half the way. Vectors stay full,
// where the rows of a triangle would be 16, 15, .. 1 long, and no row has to be summed across its lanes.
constexpr int64_t kCircle = 64;

template <class F>
double pair_circle_of(const Group& g) {
    constexpr int64_t kTwice = 2 * kCircle + kLanes;
    const int64_t n = g.present, step = kLanes;
    alignas(64) F x[kTwice], distance[kTwice], level[kTwice], lost[kTwice] = {}, won[kCircle + kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
        x[i] = x[i + n] = static_cast<const F*>(g.scores)[i];
        distance[i] = distance[i + n] = static_cast<const F*>(g.distances)[i];
        level[i] = level[i + n] = F(g.after[i]);
    }
    for (int64_t i = 2 * n; i < 2 * n + step; ++i) x[i] = distance[i] = level[i] = F(0);

    alignas(64) F base[kLanes] = {};
    LogProducts<F> products;
    F* const less_one = products.less_one;
    for (int64_t d = 1; 2 * d <= n; ++d) {
        const int end = int(2 * d == n ? d : n), turn = int(n - d);
        for (int first = 0; first < end; first += int(step)) {
            products.reserve();
#pragma omp simd
            for (int lane = 0; lane < int(kLanes); ++lane) {
                const int i = first + lane, j = i + int(d);
                const F keep = F(i < end) * F(level[i] != level[j]), sign = i < turn ? F(1) : F(-1);
                const F gap = (x[i] - x[j]) - (distance[j] - distance[i]);
                const LogisticParts<F> at = logistic_parts(keep != F(0) ? sign * gap : F(0));
                const F e = at.e * keep, slope = at.down * (keep * sign);
                less_one[lane] += e + less_one[lane] * e;
                base[lane] += at.base;
                won[i] -= slope;
                lost[j] += slope;
            }
        }
    }
    products.flush();
    double loss = products.sum;
    for (const F x : base) loss += double(x);
    for (int64_t i = 0; i < n; ++i) g.gradient[i] = double(won[i] + (lost[i] + lost[i + n]));
    return loss;
}

double pair_rows(const RankArgs& args, const Group& group, int64_t begin, int64_t end, void* tile, double* gradient) {
    if (args.dtype == Dtype::kFloat64)
        return pair_rows_of<double>(group, begin, end, static_cast<double*>(tile), gradient);
    return pair_rows_of<float>(group, begin, end, static_cast<float*>(tile), gradient);
}

// Plackett-Luce. A stage is a block of d tied entries with everything that is ranked after it: R = sum e^s over the
// block and what comes after, T over the block, and a stage costs
//   Breslow  d log R - sum s,
//   Efron    sum_l log(R - l/d T) - sum s,  l = 0 .. d - 1.
// Backwards over the blocks R is a suffix sum. Forwards, an entry's derivative is e^s / R times the sum of the weights
// of the stages so far (in units of 1 / R, which never falls: every exponent is <= 0), minus 1. The last stage of a
// single entry is nothing.
template <class F>
double listwise_of(const RankArgs& a, const Group& g) {
    const bool efron = a.options.method == RankMethod::kEfron;
    const F* const x = static_cast<const F*>(g.scores);
    double *const maxima = static_cast<double*>(g.tile), *const sums = maxima + g.size;  // of a block's R, at its start
    const int64_t n = g.present;

    Softmax<double> suffix;
    for (int64_t i = n - 1; i >= 0; --i) {
        suffix = fold(suffix, double(x[i]), 1.0);
        maxima[i] = suffix.max;
        sums[i] = suffix.sum;
    }

    double loss = 0, weights = 0;
    for (int64_t begin = 0, end, previous = 0; begin < n; previous = begin, begin = end) {
        end = g.after[begin];
        const double max = maxima[begin], sum = sums[begin], d = double(end - begin);
        if (begin > 0) weights *= exp_nonpositive(max - maxima[previous]) * sum / sums[previous];
        if (begin + 1 == n) {
            g.gradient[begin] = weights;
            break;
        }
        double tied = 0;  // what a block's own stages don't take from its members
        if (efron && end - begin > 1) {
            double block = 0, rest = 0;
            for (int64_t i = begin; i < end; ++i) block += exp_nonpositive(double(x[i]) - max);
            if (end < n) rest = weigh(sums[end], exp_nonpositive(maxima[end] - max));
            for (int64_t l = 0; l < end - begin; ++l) {
                const double part = double(l) / d, left = rest + (1 - part) * block;
                loss += log_positive(left) + (max - double(x[begin + l]));
                weights += sum / left;
                tied += part * (sum / left);
            }
        } else {
            for (int64_t i = begin; i < end; ++i) loss += log_positive(sum) + (max - double(x[i]));
            weights += d;
        }
        for (int64_t i = begin; i < end; ++i)
            g.gradient[i] = exp_nonpositive(double(x[i]) - max) / sum * (weights - tied) - 1;
    }
    return loss;
}

template <class F>
double pairs_of_group(const Group& g) {
    if (g.present <= kCircle) return pair_circle_of<F>(g);
    return pair_rows_of<F>(g, 0, g.present, static_cast<F*>(g.tile), g.gradient);
}

// A group's loss and its pairs; a group without pairs costs nothing.
template <class T>
void rank_groups_of(const RankArgs& a, int64_t begin, int64_t end, std::byte* scratch, LossSum* results) {
    using F = ValueOf<T>;
    for (int64_t index = begin; index < end; ++index) {
        Group g;
        open_group_of<T>(a, index, scratch, g);
        LossSum& result = results[index];
        result = {0, double(cpu::pairs_of(g))};
        if (result.count > 0)
            result.loss = a.options.method == RankMethod::kPairwise ? pairs_of_group<F>(g) : listwise_of<F>(a, g);
        close_group_of<T>(a, g, result);
    }
}

void rank_groups(const RankArgs& args, int64_t begin, int64_t end, std::byte* scratch, LossSum* results) {
    with_element(args.dtype, [&](auto type) { rank_groups_of<decltype(type)>(args, begin, end, scratch, results); });
}

void open_group(const RankArgs& args, int64_t index, std::byte* scratch, Group& group) {
    with_element(args.dtype, [&](auto type) { open_group_of<decltype(type)>(args, index, scratch, group); });
}

void close_group(const RankArgs& args, const Group& group, LossSum& result) {
    with_element(args.dtype, [&](auto type) { close_group_of<decltype(type)>(args, group, result); });
}

// ---- Backward ----

template <class T, class F = ValueOf<T>>
void multiply(const F* gradient, int64_t count, F factor, T* result) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = round_to(gradient[i] * factor, T{});
}

// The gradient of one side; `sign` is -1 where what is stored is that of the other.
template <class T, class F = ValueOf<T>>
void score_gradient_of(const ScoreGradientArgs& a, int64_t begin, int64_t end, const void* from, F sign, void* to) {
    const F denominator = a.denominator ? *static_cast<const F*>(a.denominator) : F(1);
    const F inverse = denominator == F(0) ? F(0) : sign / denominator;
    const F *const gradient = static_cast<const F*>(from), *const upstream = static_cast<const F*>(a.upstream);
    T* const result = static_cast<T*>(to);
    if (!a.per_group) {  // `begin` and `end` count entries
        multiply<T>(gradient + begin, end - begin, F(*upstream * inverse), result + begin);
    } else if (!a.offsets && a.size == 1) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) result[i] = round_to(gradient[i] * (upstream[i] * inverse), T{});
    } else {  // groups
        for (int64_t group = begin; group < end; ++group) {
            const int64_t first = a.offsets ? a.offsets[group] : group * a.size;
            const int64_t last = a.offsets ? a.offsets[group + 1] : first + a.size;
            multiply<T>(gradient + first, last - first, F(upstream[group] * inverse), result + first);
        }
    }
}

void score_gradient(const ScoreGradientArgs& args, int64_t begin, int64_t end) {
    with_element(args.dtype, [&](auto type) {
        using T = decltype(type);
        using F = ValueOf<T>;
        score_gradient_of<T>(args, begin, end, args.gradient, F(1), args.result);
        if (!args.second_result) return;
        const bool stored = args.second_gradient;
        score_gradient_of<T>(args, begin, end, stored ? args.second_gradient : args.gradient, F(stored ? 1 : -1),
                             args.second_result);
    });
}

}  // namespace

#define PYALIGN_STRING(x) #x
#define PYALIGN_NAME(x) PYALIGN_STRING(x)
extern const RankingKernels kRankingKernels;
const RankingKernels kRankingKernels = {
    PYALIGN_NAME(PYALIGN_ISA), pairs, rank_groups, open_group, pair_rows, close_group, score_gradient};

PYALIGN_END
