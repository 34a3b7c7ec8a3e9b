// The CPU entry points: which kernels this machine runs, the split of rows over threads, the checks of indices, and the
// reduction of row losses, whose order doesn't depend on the number of threads.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace pyalign {
// Each instruction set's table, in the namespace that its copy of the code lives in.
#if defined(PYALIGN_HAVE_NEON)
namespace neon {
extern const cpu::Kernels kKernels;
}
#else
namespace baseline {
extern const cpu::Kernels kKernels;
}
#endif
#if defined(PYALIGN_HAVE_AVX2)
namespace avx2 {
extern const cpu::Kernels kKernels;
}
#endif
#if defined(PYALIGN_HAVE_AVX512)
namespace avx512 {
extern const cpu::Kernels kKernels;
}
#endif
}  // namespace pyalign

namespace pyalign::cpu {
namespace {

// ---- Instruction sets ----

// Compiled in and supported by this machine, best first.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> tables;
#if defined(PYALIGN_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        tables.push_back(&avx512::kKernels);
#endif
#if defined(PYALIGN_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::kKernels);
#endif
#if defined(PYALIGN_HAVE_NEON)
    tables.push_back(&neon::kKernels);
#else
    tables.push_back(&baseline::kKernels);
#endif
    return tables;
}

const Kernels& choose() {
    const std::vector<const Kernels*> tables = usable();
    const char* wanted = std::getenv("PYALIGN_CPU_ISA");
    if (!wanted || !*wanted) return *tables.front();
    std::string names;
    for (const Kernels* table : tables) {
        if (std::string(table->isa) == wanted) return *table;
        names += std::string(names.empty() ? "" : ", ") + table->isa;
    }
    throw std::invalid_argument(std::string("PYALIGN_CPU_ISA: got '") + wanted + "'; wanted one of " + names);
}

// ---- Indices ----

void check_tokens(const Tokens& tokens, const DistillOptions& options) {
    const bool hard = options.hard_weight > 0;
    if (!tokens.teacher_rows && !hard) return;
    for (int64_t row = 0; row < tokens.count; ++row) {
        if (!is_counted(tokens, row)) continue;
        if (tokens.teacher_rows && tokens.teacher_rows[row] >= tokens.teacher_count)
            refuse("teacher_rows", row, tokens.teacher_rows[row], tokens.teacher_count);
        if (!hard || tokens.targets[row] == tokens.ignore_index || tokens.targets[row] == kElsewhere) continue;
        if (tokens.targets[row] < 0 || tokens.targets[row] >= options.vocab)
            refuse("targets", row, tokens.targets[row], options.vocab);
    }
}

size_t entries_scratch(int64_t entries, int64_t values) {
    return sizeof(Entry) * static_cast<size_t>(entries) + sizeof(double) * static_cast<size_t>(values);
}

// Throws for the first counted row whose entries are out of range or repeated, if there is one.
void check_entries(const TopKDistillArgs& args, int threads) {
    const TopK& teacher = args.teacher;
    const auto teacher_row_of = [&](int64_t row) {
        return args.tokens.teacher_rows ? args.tokens.teacher_rows[row] : row;
    };
    std::atomic<int64_t> first_bad{args.tokens.count};
    const int64_t work = 16 * teacher.k;  // a sort's
    parallel(args.tokens.count, grain_of(args.tokens.count, work, threads), work, entries_scratch(teacher.k, 0),
             threads, [&](int64_t begin, int64_t end, std::byte* memory) {
                 for (int64_t row = begin; row < end; ++row) {
                     if (!is_counted(args.tokens, row)) continue;
                     Entry* const entries = reinterpret_cast<Entry*>(memory);
                     if (sorted_entries(teacher, teacher_row_of(row), args.options.vocab, entries) >= 0) continue;
                     int64_t lowest = first_bad;
                     while (row < lowest && !first_bad.compare_exchange_weak(lowest, row)) {
                     }
                     return;
                 }
             });
    const int64_t row = first_bad;
    if (row == args.tokens.count) return;
    for (int64_t place = 0; place < teacher.k; ++place) {
        const int64_t index = teacher.index(teacher_row_of(row) * teacher.k + place);
        if (index < -1 || index >= args.options.vocab) refuse("teacher.indices", row, index, args.options.vocab);
    }
    throw std::invalid_argument("teacher.indices: row " + std::to_string(row) + " holds an index twice");
}

// ---- Losses ----

double denominator_of(const Tokens& tokens, Dtype dtype) {
    if (tokens.reduction != Reduction::kMean) return 1;
    if (tokens.num_items) return read(tokens.num_items, dtype);
    int64_t counted = 0;
    for (int64_t row = 0; row < tokens.count; ++row) counted += is_counted(tokens, row);
    return static_cast<double>(counted);
}

template <class F>
void reduce(const Outputs& out, int64_t count, double denominator) {
    const F* losses = static_cast<const F*>(out.row_loss);
    double sum = 0;
    for (int64_t row = 0; row < count; ++row) sum += static_cast<double>(losses[row]);
    *static_cast<F*>(out.loss) = static_cast<F>(denominator == 0 ? 0 : sum / denominator);
}

// Runs one of the loss kernels over all rows. `Args` is DistillArgs or TopKDistillArgs.
template <class Args>
void run_loss(const Args& args, void (*kernel)(const Args&, double, void*, Span), size_t scratch_bytes, int threads) {
    const Dtype dtype = args.student.dtype;
    const int64_t count = args.tokens.count;
    const bool stream = begin_stream(args.out.gradient, args.student, count * args.out.width);
    const double denominator = denominator_of(args.tokens, dtype);
    void* const row_loss = args.out.row_loss ? args.out.row_loss : args.out.loss;
    const int64_t grain = grain_of(count, args.options.vocab, threads);

    parallel(count, grain, args.options.vocab, scratch_bytes, threads,
             [&](int64_t begin, int64_t end, std::byte* memory) {
                 kernel(args, denominator, row_loss, Span{begin, end, memory, stream});
             });
    if (!args.out.row_loss) return;
    if (dtype == Dtype::kFloat64)
        reduce<double>(args.out, count, denominator);
    else
        reduce<float>(args.out, count, denominator);
}

}  // namespace

void refuse(const char* name, int64_t row, int64_t value, int64_t limit) {
    throw std::invalid_argument(std::string(name) + ": row " + std::to_string(row) + " holds " + std::to_string(value) +
                                "; wanted 0 <= " + name + " < " + std::to_string(limit));
}

void widen(const Rows& out, int64_t count, int64_t width, const void* a, const void* b, Dtype dtype, bool add,
           int threads) {
    if (dtype != Dtype::kBFloat16 && dtype != Dtype::kFloat16) throw std::invalid_argument("widen: wanted 16 bits");
    constexpr int64_t kGrain = 65536;
    const int64_t rows = width < kGrain ? kGrain / (width + 1) + 1 : 1;
    parallel(count, rows, width, 0, threads, [&](int64_t begin, int64_t end, std::byte*) {
        for (int64_t row = begin; row < end; ++row) {
            const auto at = [&](const void* x) { return x ? static_cast<const uint16_t*>(x) + row * width : nullptr; };
            kernels().widen(static_cast<float*>(out.data) + out.start(row), at(a), at(b), dtype, width, add);
        }
    });
}

bool begin_stream(const Rows& gradient, const Rows& logits, int64_t elements) {
    constexpr int64_t kStreamBytes = int64_t{16} << 20;
    const int64_t bytes = elements * static_cast<int64_t>(size_of(gradient.dtype));
    if (!gradient.data || gradient.data == logits.data || bytes <= kStreamBytes) return false;
    prefer_huge_pages(gradient.data, static_cast<size_t>(bytes));
    return true;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

std::string isa() { return kernels().isa; }

std::vector<std::string> isas() {
    std::vector<std::string> names;
#if defined(PYALIGN_HAVE_AVX512)
    names.push_back("avx512");
#endif
#if defined(PYALIGN_HAVE_AVX2)
    names.push_back("avx2");
#endif
#if defined(PYALIGN_HAVE_NEON)
    names.push_back("neon");
#else
    names.push_back("baseline");
#endif
    return names;
}

void distill(const DistillArgs& args, int threads) {
    check_tokens(args.tokens, args.options);
    run_loss(args, kernels().distill, kernels().distill_scratch(args), threads);
}

void topk_distill(const TopKDistillArgs& args, int threads) {
    check_tokens(args.tokens, args.options);
    check_entries(args, threads);
    run_loss(args, kernels().topk_distill, entries_scratch(args.teacher.k, args.teacher.k), threads);
}

void topk(const TopKArgs& args, int threads) {
    const int64_t grain = grain_of(args.count, args.vocab, threads);
    parallel(
        args.count, grain, args.vocab, kernels().topk_scratch(args), threads,
        [&](int64_t begin, int64_t end, std::byte* memory) { kernels().topk(args, Span{begin, end, memory, false}); });
}

void outside(const OutsideArgs& args, int threads) {
    const bool stream = begin_stream(args.gradient, args.logits, args.count * args.width);
    parallel(args.count, grain_of(args.count, args.vocab, threads), args.vocab, entries_scratch(args.k, args.k),
             threads, [&](int64_t begin, int64_t end, std::byte* memory) {
                 kernels().outside(args, Span{begin, end, memory, stream});
             });
}

void scale(const Rows& x, int64_t count, int64_t width, const void* factor, int threads) {
    const double value = read(factor, x.dtype);
    if (value == 1) return;
    constexpr int64_t kGrain = 65536;
    parallel(count * width, kGrain, 1, 0, threads, [&](int64_t begin, int64_t end, std::byte*) {
        while (begin < end) {
            const int64_t row = begin / width, column = begin % width;
            const int64_t length = width - column < end - begin ? width - column : end - begin;
            const int64_t first = x.start(row) + column;
            kernels().scale(x.data, x.dtype, first, first + length, value);
            begin += length;
        }
    });
}

}  // namespace pyalign::cpu
