// Rows in blocks: loading any dtype as F, folding, and storing a block of gradients.
//
// Loops are plain scalar code under `#pragma omp simd`. Sums run in F over a block of 512 entries (32 per AVX-512
// lane) and in double over the blocks of a row.
#pragma once

#include <cstring>

#include "common/distill.h"
#include "common/half.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

PYALIGN_BEGIN

using cpu::kBlock;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

PYALIGN_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

PYALIGN_HD std::byte* row_of(const Rows& rows, int64_t row) {
    return static_cast<std::byte*>(rows.data) + rows.start(row) * static_cast<int64_t>(size_of(rows.dtype));
}

// Elements of arrays in accumulation dtype; what is put into a null one is dropped.
template <class F>
PYALIGN_HD double at(const void* data, int64_t index) {
    return static_cast<double>(static_cast<const F*>(data)[index]);
}

template <class F>
PYALIGN_HD void put(void* data, int64_t index, double value) {
    if (data) static_cast<F*>(data)[index] = F(value);
}

// Elements as they lie in memory. Loops convert as they read: it costs two instructions, and a converted copy of the
// row would cost the cache its room.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
PYALIGN_HD float value(float x) { return x; }
PYALIGN_HD double value(double x) { return x; }
PYALIGN_HD float value(BFloat16 x) { return bfloat16_to_float(x.bits); }
PYALIGN_HD float value(Float16 x) { return float16_to_float(x.bits); }

template <class T>
using ValueOf = decltype(value(T()));

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
    static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
    static constexpr Dtype value = Dtype::kFloat64;
};
template <>
struct DtypeOf<BFloat16> {
    static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<Float16> {
    static constexpr Dtype value = Dtype::kFloat16;
};

PYALIGN_HD float round_to(float x, float) { return x; }
PYALIGN_HD double round_to(double x, double) { return x; }
PYALIGN_HD BFloat16 round_to(float x, BFloat16) { return {float_to_bfloat16(x)}; }
PYALIGN_HD Float16 round_to(float x, Float16) { return {float_to_float16(x)}; }

// Calls body(T{}) for the elements' type.
template <class Body>
void with_element(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::kFloat32: return body(float{});
        case Dtype::kBFloat16: return body(BFloat16{});
        case Dtype::kFloat16: return body(Float16{});
        case Dtype::kFloat64: return body(double{});
    }
}

template <class T>
PYALIGN_HD ValueOf<T> max_of(const T* x, int64_t count) {
    using F = ValueOf<T>;
    F max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < count; ++i) max = value(x[i]) > max ? value(x[i]) : max;
    return max;
}

// e^(x / T) for x / T <= 88: 2^(x c) with c = log2(e) / T, so that dividing by T costs nothing. To relative 2e-7, for a
// T that is itself off by less than a float's rounding. Below e^-87.33, where float turns subnormal, 0. NaN stays NaN.
template <class F>
class ScaledExp;

template <>
class ScaledExp<float> {
  public:
    explicit ScaledExp(double inverse_temperature) {
        factor_ = static_cast<float>(1.4426950408889634 * inverse_temperature);
        lowest_ = static_cast<float>(-87.33654 / inverse_temperature);
    }

    PYALIGN_HD float operator()(float x) const {
        // x c = n + r; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
        constexpr float kRound = 12582912.0f;
        const float shifted = x * factor_ + kRound;
        const float n = shifted - kRound;
        const float r = x * factor_ - n;
        float y = 1.32645907e-3f;
        y = y * r + 9.67161901e-3f;
        y = y * r + 5.55073503e-2f;
        y = y * r + 2.40222405e-1f;
        y = y * r + 6.93146976e-1f;
        y = y * r + 1.0f;
        const uint32_t power = static_cast<uint32_t>(float_bits(shifted)) << 23;
        const float result = bits_float(static_cast<int32_t>(static_cast<uint32_t>(float_bits(y)) + power));
        return x < lowest_ ? 0.0f : result;
    }

  private:
    float factor_, lowest_;
};

template <>
class ScaledExp<double> {
  public:
    explicit ScaledExp(double inverse_temperature) : inverse_temperature_(inverse_temperature) {}
    PYALIGN_HD double operator()(double x) const { return std::exp(x * inverse_temperature_); }

  private:
    double inverse_temperature_;
};

// Fetches an operand's rows into the second-level cache ahead of their use. Without it a thread waits for memory while
// it folds and leaves memory idle while it maps: the processor's own prefetching doesn't reach past a page.
class Ahead {
  public:
    // Where the work is: on row `row`, and where it goes next; a row < 0 is none.
    void start(const Rows& rows, int64_t row, int64_t next, int64_t vocab) {
        element_ = static_cast<int64_t>(size_of(rows.dtype));
        size_ = vocab * element_;
        at_ = at_ > size_ && expected_ == row ? at_ - size_ : 0;
        expected_ = next;
        current_ = row_of(rows, row);
        next_ = next < 0 ? nullptr : row_of(rows, next);
    }

    // Called before each block, which begins at the row's entry `used`: a third of what a block reads is fetched while
    // a row is folded, two thirds while it is mapped, so that the next row is there when its turn comes.
    PYALIGN_HD void fold(int64_t used) { fetch(used * element_, kBlock * element_ / 3); }
    PYALIGN_HD void map() { fetch(size_, kBlock * element_ * 2 / 3); }

  private:
    static constexpr int64_t kLine = 64, kFarthest = 256 << 10, kNearest = 16 << 10;

    PYALIGN_HD void fetch(int64_t used, int64_t bytes) {
        if (at_ < used) at_ = used;
        if (at_ - used < kNearest) bytes = kBlock * element_ * 9 / 8;  // falling behind
        for (int64_t end = minimum(at_ + bytes, used + kFarthest); at_ < end;) {
            const bool second = at_ >= size_;
            const int64_t offset = second ? at_ - size_ : at_;
            if (second && (!next_ || offset >= size_)) return;
            const std::byte* const from = (second ? next_ : current_) + offset;
            const int64_t count = minimum(end - at_, size_ - offset);
            for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
            at_ += count;
        }
    }

    const std::byte *current_ = nullptr, *next_ = nullptr;
    int64_t element_ = 0, size_ = 0, expected_ = -1;
    int64_t at_ = 0;  // bytes fetched so far, from the start of the current row
};

// The sum of e^((x - origin) / T), and the max in passing.
template <class F>
struct BlockSum {
    F sum, max;
};

template <class T, class F>
PYALIGN_HD BlockSum<F> sum_exp(const T* x, int64_t count, F origin, ScaledExp<F> exp) {
    F sum = 0, max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t i = 0; i < count; ++i) {
        sum += exp(value(x[i]) - origin);
        max = value(x[i]) > max ? value(x[i]) : max;
    }
    return {sum, max};
}

// The same, and the exponentials themselves into `kept`.
template <class T, class F>
PYALIGN_HD BlockSum<F> sum_exp(const T* x, int64_t count, F origin, ScaledExp<F> exp, F* kept) {
    F sum = 0, max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t i = 0; i < count; ++i) {
        kept[i] = exp(value(x[i]) - origin);
        sum += kept[i];
        max = value(x[i]) > max ? value(x[i]) : max;
    }
    return {sum, max};
}

// Lanes in which a block is summed where something is fetched between its lines. (A loop of its own for every 16
// entries leaves room for that; GCC keeps the lanes in registers.)
constexpr int64_t kLanes = 16;

// For rows that are read once and not mapped: what lies kFar bytes after the entries x + first, where row `next` is
// read after row x. Fetched line by line, it keeps memory busy without a burst.
template <class T>
PYALIGN_HD const std::byte* lying_ahead(const T* x, const T* next, int64_t vocab, int64_t first) {
    constexpr int64_t kFar = (32 << 10) / static_cast<int64_t>(sizeof(T));
    const int64_t at = first + kFar;
    return reinterpret_cast<const std::byte*>(at < vocab ? x + at : next + (at - vocab));
}

// The line of it to fetch before the entries from `first` of a block.
template <class T>
PYALIGN_HD void fetch_line(const std::byte* ahead, int64_t first) {
    __builtin_prefetch(ahead + first * static_cast<int64_t>(sizeof(T)), 0, 2);
}

// Groups of a block of kBlock entries: group g holds the entries g, g + kGroups, g + 2 kGroups, ... A group is a vector
// lane, so that its max and its sum cost nothing beside the block's.
constexpr int64_t kGroups = kLanes, kMembers = kBlock / kGroups;

template <class F>
struct BlockGroups {
    const std::byte* ahead;            // [kBlock] what is fetched meanwhile, line by line
    F *max = nullptr, *sum = nullptr;  // [kGroups] where they go, if anywhere
};

// The same, and each group's own max and sum; a short block has no groups.
template <class T, class F>
PYALIGN_HD BlockSum<F> sum_exp(const T* x, int64_t count, F origin, ScaledExp<F> exp, BlockGroups<F> groups) {
    if (count != kBlock) return sum_exp(x, count, origin, exp);
    F sums[kLanes], maxima[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) sums[i] = 0, maxima[i] = std::numeric_limits<F>::lowest();
    for (int64_t first = 0; first < kBlock; first += kLanes) {
        fetch_line<T>(groups.ahead, first);
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
            const F logit = value(x[first + i]);
            sums[i] += exp(logit - origin);
            maxima[i] = logit > maxima[i] ? logit : maxima[i];
        }
    }
    F sum = 0, max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t i = 0; i < kLanes; ++i) {
        sum += sums[i];
        max = maxima[i] > max ? maxima[i] : max;
    }
    if (groups.max) {
        std::memcpy(groups.max, maxima, sizeof maxima);
        std::memcpy(groups.sum, sums, sizeof sums);
    }
    return {sum, max};
}

// Folds a row block by block. The sum is kept over an origin near the max, which moves only to a block whose own max
// is far above it: the rounding of 1 / T grows with the distance.
template <class F>
class RowFold {
  public:
    explicit RowFold(double inverse_temperature)
        : exp_(inverse_temperature), inverse_temperature_(inverse_temperature), reach_(kReach / inverse_temperature) {}

    // `kept...` is nothing, or where the block's e^((x - origin()) / T) or its groups go.
    template <class T, class... Kept>
    PYALIGN_HD void add(const T* x, int64_t count, Kept... kept) {
        if (sums_.sum == 0) raise_origin(max_of(x, count));
        BlockSum<F> block = sum_exp(x, count, F(sums_.max), exp_, kept...);
        if (double(block.max) > sums_.max + reach_) {
            raise_origin(block.max);
            block = sum_exp(x, count, F(sums_.max), exp_, kept...);
        }
        max_ = block.max > max_ ? block.max : max_;
        sums_.sum += double(block.sum);
    }

    PYALIGN_HD double origin() const { return sums_.max; }

    PYALIGN_HD Softmax<double> finish() {
        raise_origin(max_);
        return sums_;
    }

  private:
    static constexpr double kReach = 4;

    PYALIGN_HD void raise_origin(F max) {
        if (!(double(max) > sums_.max)) return;
        const double scale = sums_.sum == 0 ? 0 : rescale(sums_.max, double(max), inverse_temperature_);
        sums_ = {double(max), sums_.sum * scale};
    }

    ScaledExp<F> exp_;
    double inverse_temperature_, reach_;
    F max_ = std::numeric_limits<F>::lowest();
    Softmax<double> sums_;
};

// The exponentials of a row, kept from the fold for the map: two vectors of memory in the cache are cheaper than a
// dozen instructions. Rows that are too long for that take them again.
template <class F>
struct KeptRow {
    F* exp = nullptr;           // [vocab] e^((x - origin) / T), or null: not kept
    double* origins = nullptr;  // [blocks]

    static constexpr size_t kMost = 256 << 10;  // bytes of one row
    static bool fits(int64_t vocab) { return static_cast<size_t>(vocab) * sizeof(F) <= kMost; }
    static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
    static size_t origin_bytes(int64_t vocab) {
        return lines(static_cast<size_t>(vocab / kBlock + 1) * sizeof(double));
    }
    static size_t bytes(int64_t vocab) {
        return fits(vocab) ? origin_bytes(vocab) + lines(static_cast<size_t>(vocab) * sizeof(F)) : 0;
    }
    static KeptRow in(std::byte* memory, int64_t vocab) {  // memory at a cache line's start
        if (!fits(vocab)) return {};
        return {reinterpret_cast<F*>(memory + origin_bytes(vocab)), reinterpret_cast<double*>(memory)};
    }
};

template <class T, class F = ValueOf<T>>
PYALIGN_HD Softmax<double> fold_row(const T* x, int64_t count, double inverse_temperature, Ahead* ahead = nullptr,
                                    KeptRow<F> kept = {}) {
    RowFold<F> fold(inverse_temperature);
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t length = minimum(kBlock, count - first);
        if (ahead) ahead->fold(first);
        if (kept.exp) {
            fold.add(x + first, length, kept.exp + first);
            kept.origins[first / kBlock] = fold.origin();
        } else {
            fold.add(x + first, length);
        }
    }
    return fold.finish();
}

// Copies whole cache lines past the caches, to a line's start: for results too large to stay in them.
PYALIGN_HD void stream_lines(std::byte* to, const std::byte* from, size_t bytes) {
#if defined(__AVX512F__)
    for (size_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
    for (size_t i = 0; i < bytes; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__SSE2__)
    for (size_t i = 0; i < bytes; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
    std::memcpy(to, from, bytes);
#endif
}

// Streamed lines become visible to other threads here.
PYALIGN_HD void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Writes one row of gradients in blocks of kBlock entries: fill `block()`, then `write` how many there are.
//
// Streamed rows leave in whole cache lines, so the few entries past the last line wait for the next block.
template <class F>
class RowWriter {
  public:
    RowWriter(std::byte* row, Dtype dtype, bool stream) : to_(row), dtype_(dtype), stream_(stream) {}

    F* block() { return block_; }

    void write(int64_t count) {
        if (dtype_ == (sizeof(F) == 4 ? Dtype::kFloat32 : Dtype::kFloat64))
            return put(reinterpret_cast<const std::byte*>(block_), static_cast<size_t>(count) * sizeof(F));
        if (dtype_ == Dtype::kBFloat16) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) half_[i] = float_to_bfloat16(float(block_[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) half_[i] = float_to_float16(float(block_[i]));
        }
        put(reinterpret_cast<const std::byte*>(half_), static_cast<size_t>(count) * 2);
    }

    // The columns of the row from where the blocks ended to `width` are zero.
    void finish(int64_t vocab, int64_t width) {
        std::memcpy(to_, line_, waiting_);
        std::memset(to_ + waiting_, 0, static_cast<size_t>(width - vocab) * size_of(dtype_));
    }

  private:
    void put(const std::byte* from, size_t bytes) {
        if (!stream_) {
            std::memcpy(to_, from, bytes);
            to_ += bytes;
            return;
        }
        // Up to the next line's start: with what waits, a whole line, or the row's ragged beginning.
        const size_t offset = reinterpret_cast<uintptr_t>(to_ + waiting_) % kLine;
        if (offset != 0) {
            const size_t missing = kLine - offset < bytes ? kLine - offset : bytes;
            std::memcpy(line_ + waiting_, from, missing);
            waiting_ += missing;
            from += missing;
            bytes -= missing;
            if (offset + missing < kLine) return;
            if (waiting_ == kLine)
                stream_lines(to_, line_, kLine);
            else
                std::memcpy(to_, line_, waiting_);
            to_ += waiting_;
            waiting_ = 0;
        }
        const size_t lines = bytes - bytes % kLine;
        stream_lines(to_, from, lines);
        to_ += lines;
        waiting_ = bytes - lines;
        std::memcpy(line_, from + lines, waiting_);
    }

    static constexpr size_t kLine = 64;
    std::byte* to_;
    Dtype dtype_;
    bool stream_;
    size_t waiting_ = 0;  // bytes of line_ that come at to_
    alignas(64) F block_[kBlock];
    alignas(64) uint16_t half_[kBlock];
    alignas(64) std::byte line_[kLine];
};

PYALIGN_END
