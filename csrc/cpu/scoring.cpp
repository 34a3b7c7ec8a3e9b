// Scoring on the CPU: the split of sequences, groups and pairs over threads. No result depends on their number.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/numbers.h"
#include "cpu/offsets.h"
#include "cpu/parallel.h"
#include "cpu/scoring_kernels.h"
#include "cpu/tables.h"

PYALIGN_TABLES(ScoringKernels, kScoringKernels, scoring_kernels)

namespace pyalign::cpu {
namespace {

int64_t size_of_group(const GroupArgs& args, int64_t group) {
    return args.offsets ? args.offsets[group + 1] - args.offsets[group] : args.size;
}

// One large group by all threads, in parts of its rows.
void shared_matrix_gradient(const GroupArgs& args, int64_t group, int threads) {
    constexpr int64_t kParts = 8;
    const int64_t size = size_of_group(args, group), rows = (size + kParts - 1) / kParts;
    std::vector<double> gradients(static_cast<size_t>(kParts * size));
    parallel(kParts, 1, rows * size, group_row_scratch(size), threads, [&](int64_t part, int64_t, std::byte* scratch) {
        const int64_t first = std::min(part * rows, size), last = std::min(first + rows, size);
        if (first == last) return;
        const GroupPart range{group, group + 1, first, last};
        scoring_kernels().matrix_gradient(args, range, scratch, gradients.data() + part * size);
    });
    for (int64_t i = size; i < kParts * size; ++i)
        gradients[static_cast<size_t>(i % size)] += gradients[static_cast<size_t>(i)];
    scoring_kernels().finish_gradient(args, group, gradients.data());
}

}  // namespace

void reward_scores(const RewardArgs& args, int threads) {
    if (args.offsets) check_offsets(args.offsets, args.sequences, args.count, "offsets", "the number of tokens");
    const int64_t work = args.width * (args.heads + 1) + args.length;
    parallel(args.sequences, std::max<int64_t>(1, 16384 / work), work, sizeof(double) * static_cast<size_t>(args.width),
             threads, [&](int64_t begin, int64_t end, std::byte* scratch) {
                 scoring_kernels().reward(args, begin, end, scratch);
             });
}

void reward_gradient(const RewardGradientArgs& args, int threads) {
    if (args.hidden_gradient) {
        constexpr int64_t kPiece = int64_t{1} << 20;
        const int64_t bytes = args.count * args.width * static_cast<int64_t>(size_of(args.dtype));
        std::byte* const gradient = static_cast<std::byte*>(args.hidden_gradient);
        prefer_huge_pages(gradient, static_cast<size_t>(bytes));
        parallel(bytes, kPiece, 1, 0, threads, [&](int64_t begin, int64_t end, std::byte*) {
            std::memset(gradient + begin, 0, static_cast<size_t>(end - begin));
        });
        const int64_t work = args.width * (args.heads + 1);
        parallel(args.sequences, std::max<int64_t>(1, 16384 / work), work, 0, threads,
                 [&](int64_t begin, int64_t end, std::byte*) {
                     scoring_kernels().reward_hidden_gradient(args, begin, end);
                 });
    }
    if (args.head_gradient)
        parallel(
            args.width, kBlock, args.sequences * args.heads, 0, threads,
            [&](int64_t begin, int64_t end, std::byte*) { scoring_kernels().reward_head_gradient(args, begin, end); });
    for (int64_t c = 0; args.bias_gradient && c < args.heads; ++c) {
        double sum = 0;
        for (int64_t b = 0; b < args.sequences; ++b) {
            if (args.last[b] < 0) continue;
            sum += read(args.upstream, args.dtype, b * args.heads + c);
        }
        write(args.bias_gradient, args.dtype, c, sum);
    }
}

void score_groups(const GroupArgs& args, int threads) {
    if (args.offsets) check_offsets(args.offsets, args.groups, args.count, "group_offsets", "the number of scores");
    if (args.op == GroupOp::kBest) {
        const int64_t size = args.groups > 0 ? 1 + args.count / args.groups : 1;
        return parallel(args.groups, std::max<int64_t>(1, 65536 / size), size, 0, threads,
                        [&](int64_t begin, int64_t end, std::byte*) { scoring_kernels().best(args, begin, end); });
    }

    // Pieces of about equal work: some groups, or some rows of a large one.
    constexpr int64_t kWork = 32768;
    const bool by_rows = args.op == GroupOp::kWinProbabilitiesGradient;  // which all add to all entries
    std::vector<GroupPart> parts;
    std::vector<int64_t> shared;
    int64_t work = 0, largest = 0, entries = 0;
    for (int64_t group = 0; group < args.groups; ++group) {
        const int64_t size = size_of_group(args, group);
        largest = std::max(largest, size);
        entries += size * size;
        if (size * size >= 2 * kWork && by_rows) {
            shared.push_back(group);
            work = 0;
            continue;
        }
        if (size * size >= 2 * kWork) {
            const int64_t rows = std::max<int64_t>(kStrip, kWork / size / kStrip * kStrip);
            for (int64_t row = 0; row < size; row += rows)
                parts.push_back({group, group + 1, row, std::min(row + rows, size)});
            work = 0;
            continue;
        }
        if (work == 0) parts.push_back({group, group});
        parts.back().end = group + 1;
        work += size * size + 4 * size + 8;
        if (work >= kWork) work = 0;
    }
    if (entries == 0) return;  // and nowhere to write
    const bool matrix = args.op == GroupOp::kWinProbabilities;
    const Dtype wide = args.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    const bool stream = matrix && begin_stream(Rows{args.result, wide}, Rows{}, entries);
    parallel(static_cast<int64_t>(parts.size()), 1, kWork, group_row_scratch(largest), threads,
             [&](int64_t part, int64_t, std::byte* scratch) {
                 parts[part].stream = stream;
                 scoring_kernels().win_part(args, parts[part], scratch);
             });
    for (const int64_t group : shared) shared_matrix_gradient(args, group, threads);
}

void preference_metrics(const MetricArgs& args, int threads) {
    constexpr int64_t kGrain = 65536, kNumbers = int64_t{1} << 21;  // of all pieces' tables
    const int64_t size = args.cells() * kStatistics;
    const int64_t pieces =
        std::clamp<int64_t>((args.count + kGrain - 1) / kGrain, 1, std::max<int64_t>(1, kNumbers / size));
    const int64_t grain = std::max<int64_t>(1, (args.count + pieces - 1) / pieces);
    std::vector<double> tables(static_cast<size_t>(pieces * size));
    parallel(args.count, grain, 8, 0, threads, [&](int64_t begin, int64_t end, std::byte*) {
        scoring_kernels().metrics(args, begin, end, tables.data() + begin / grain * size);
    });
    for (int64_t i = 0; i < size; ++i) {
        double sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) sum += tables[static_cast<size_t>(piece * size + i)];
        args.table[i] = sum;
    }
}

}  // namespace pyalign::cpu
