// Preference losses on the CPU: the split of items and groups over threads, and sums whose order depends on the input
// alone.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/numbers.h"
#include "cpu/offsets.h"
#include "cpu/parallel.h"
#include "cpu/ranking_kernels.h"
#include "cpu/tables.h"

PYALIGN_TABLES(RankingKernels, kRankingKernels, ranking_kernels)

namespace pyalign::cpu {
namespace {

// Writes the reduced loss and what it was divided by. `Args` is PairArgs or RankArgs.
template <class Args>
void finish(const Args& args, LossSum sum) {
    if (args.num_items) sum.count = read(args.num_items, args.dtype);
    const double denominator = args.reduction == Reduction::kMean ? sum.count : 1;
    write(args.denominator, args.dtype, 0, denominator);
    if (args.reduction != Reduction::kNone)
        write(args.loss, args.dtype, 0, denominator == 0 ? 0 : sum.loss / denominator);
}

// ---- Groups ----

int64_t size_of_group(const RankArgs& args, int64_t group) {
    return args.offsets ? args.offsets[group + 1] - args.offsets[group] : args.size;
}

// Groups from this size on are shared by threads.
constexpr int64_t kLarge = 768;

bool is_shared(const RankArgs& args, int64_t size) {
    return args.options.method == RankMethod::kPairwise && size >= kLarge;
}

int64_t work_of(const RankArgs& args, int64_t size) {
    return 64 + (args.options.method == RankMethod::kPairwise ? size * (size + 16) / 4 : 32 * size);
}

// One group by all threads: rows in parts of about equal numbers of pairs, whose gradients are added part by part.
LossSum shared_group(const RankArgs& args, int64_t index, int threads) {
    constexpr int64_t kParts = 8;
    const int64_t size = size_of_group(args, index);
    const std::unique_ptr<std::byte[], Deleter> memory(
        static_cast<std::byte*>(::operator new[](group_scratch(size), std::align_val_t(64))));
    Group group;
    ranking_kernels().open_group(args, index, memory.get(), group);
    const int64_t n = group.present, pairs = pairs_of(group);
    LossSum sum{0, double(pairs)};
    if (pairs > 0) {
        int64_t bounds[kParts + 1] = {}, before = 0, part = 1;
        for (int64_t row = 0; row < n; ++row) {
            before += n - group.after[row];
            while (part < kParts && before * kParts >= part * pairs) bounds[part++] = row + 1;
        }
        while (part <= kParts) bounds[part++] = n;
        std::vector<double> gradients(static_cast<size_t>(kParts * n)), losses(kParts);
        parallel(kParts, 1, 1 + pairs / kParts, sizeof(double) * static_cast<size_t>(n + kLanes), threads,
                 [&](int64_t begin, int64_t, std::byte* tile) {
                     losses[begin] = ranking_kernels().pair_rows(args, group, bounds[begin], bounds[begin + 1], tile,
                                                                 gradients.data() + begin * n);
                 });
        for (int64_t i = 0; i < kParts * n; ++i) group.gradient[i % n] += gradients[i];
        for (const double loss : losses) sum.loss += loss;
    }
    ranking_kernels().close_group(args, group, sum);
    return sum;
}

}  // namespace

size_t group_scratch(int64_t size) { return sizeof(double) * 8 * static_cast<size_t>(size + kLanes); }

int64_t pairs_of(const Group& group) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < group.present; ++i) pairs += group.present - group.after[i];
    return pairs;
}

void sort_by_rank(int64_t* ranks, int64_t* order, int64_t count) {
    std::vector<std::pair<int64_t, int64_t>> entries(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) entries[i] = {ranks[i], order[i]};
    std::sort(entries.begin(), entries.end());
    for (int64_t i = 0; i < count; ++i) ranks[i] = entries[i].first, order[i] = entries[i].second;
}

void pair_loss(const PairArgs& args, int threads) {
    constexpr int64_t kGrain = 8192, kWorkPerItem = 4;
    std::vector<LossSum> sums(static_cast<size_t>((args.count + kGrain - 1) / kGrain));
    parallel(args.count, kGrain, kWorkPerItem, 0, threads, [&](int64_t begin, int64_t end, std::byte*) {
        sums[begin / kGrain] = ranking_kernels().pairs(args, begin, end);
    });
    LossSum all;
    for (const LossSum& sum : sums) all = {all.loss + sum.loss, all.count + sum.count};
    finish(args, all);
}

void ranked_loss(const RankArgs& args, int threads) {
    if (args.offsets) check_offsets(args.offsets, args.groups, args.count, "group_offsets", "the number of scores");

    // Pieces of about equal work; the groups that threads share come afterwards, one by one.
    constexpr int64_t kWork = 16384;
    struct Piece {
        int64_t begin, end;
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> shared;
    int64_t work = 0, largest = 0;
    for (int64_t group = 0; group < args.groups; ++group) {
        const int64_t size = size_of_group(args, group);
        if (is_shared(args, size)) {
            shared.push_back(group);
            work = 0;
            continue;
        }
        if (work == 0) pieces.push_back({group, group});
        pieces.back().end = group + 1;
        largest = std::max(largest, size);
        work += work_of(args, size);
        if (work >= kWork) work = 0;
    }
    std::vector<LossSum> results(static_cast<size_t>(args.groups));
    parallel(static_cast<int64_t>(pieces.size()), 1, kWork, group_scratch(largest), threads,
             [&](int64_t piece, int64_t, std::byte* memory) {
                 ranking_kernels().rank_groups(args, pieces[piece].begin, pieces[piece].end, memory, results.data());
             });
    for (const int64_t group : shared) results[group] = shared_group(args, group, threads);

    LossSum all;
    for (int64_t group = 0; group < args.groups; ++group) {
        const LossSum& result = results[group];
        const double loss = divides_by_pairs(args) && result.count > 0 ? result.loss / result.count : result.loss;
        if (args.reduction == Reduction::kNone) write(args.loss, args.dtype, group, loss);
        all.loss += loss;
        all.count += args.options.over_groups ? double(result.count > 0) : result.count;
    }
    finish(args, all);
}

void score_gradient(const ScoreGradientArgs& args, int threads) {
    constexpr int64_t kGrain = 65536;
    const int64_t count = args.per_group ? args.groups : args.count;
    const int64_t sides = args.second_result ? 2 : 1;
    const int64_t per_item = sides * (args.per_group && args.groups > 0 ? args.count / args.groups + 1 : 1);
    parallel(count, std::max<int64_t>(kGrain / per_item, 1), per_item, 0, threads,
             [&](int64_t begin, int64_t end, std::byte*) { ranking_kernels().score_gradient(args, begin, end); });
}

}  // namespace pyalign::cpu
