// Rows in blocks: loading any dtype as F, folding, and storing a block of gradients.
//
// Loops are plain scalar code under `#pragma omp simd`. Sums run in F over a block of 1024 entries (64 per AVX-512
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

PYALIGN_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

PYALIGN_HD size_t size_of(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

PYALIGN_HD std::byte* row_of(const Rows& rows, int64_t row) {
    const int64_t offset = (row / rows.inner) * rows.outer_stride + (row % rows.inner) * rows.inner_stride;
    return static_cast<std::byte*>(rows.data) + offset * static_cast<int64_t>(size_of(rows.dtype));
}

// What a row's block is in F: the row itself where it has that dtype, else `buffer`, converted.
template <class F>
PYALIGN_HD const F* load(const std::byte* row, Dtype dtype, int64_t first, int64_t count, F* buffer) {
    const std::byte* data = row + first * static_cast<int64_t>(size_of(dtype));
    if (dtype == (sizeof(F) == 4 ? Dtype::kFloat32 : Dtype::kFloat64)) return reinterpret_cast<const F*>(data);
    if (dtype == Dtype::kFloat32) {
        const float* x = reinterpret_cast<const float*>(data);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) buffer[i] = F(x[i]);
    } else {
        const uint16_t* x = reinterpret_cast<const uint16_t*>(data);
        if (dtype == Dtype::kBFloat16) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) buffer[i] = F(bfloat16_to_float(x[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) buffer[i] = F(float16_to_float(x[i]));
        }
    }
    return buffer;
}

// Asks for the block at `first` while the one before it is worked on: the hardware's own prefetch stops at every page.
PYALIGN_HD void prefetch(const std::byte* row, Dtype dtype, int64_t first, int64_t vocab) {
    const int64_t element = static_cast<int64_t>(size_of(dtype));
    const int64_t end = minimum(first + kBlock, vocab) * element;
    for (int64_t at = first * element; at < end; at += 64) __builtin_prefetch(row + at);
}

template <class F>
PYALIGN_HD F max_of(const F* x, int64_t count) {
    F max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < count; ++i) max = x[i] > max ? x[i] : max;
    return max;
}

// e^(x / T) for x / T <= 88, to relative 1e-7: 2^(x c) with c = log2(e) / T in two floats, so that dividing by T costs nothing
// and rounds nothing. Below e^-87.33, where float turns subnormal, 0. NaN stays NaN.
template <class F>
class ScaledExp;

template <>
class ScaledExp<float> {
public:
    explicit ScaledExp(double inverse_temperature) {
        const double factor = 1.4426950408889634 * inverse_temperature;
        high_ = static_cast<float>(factor);
        low_ = static_cast<float>(factor - static_cast<double>(high_));
        lowest_ = static_cast<float>(-87.33654 / inverse_temperature);
    }

    PYALIGN_HD float operator()(float x) const {
        // x c = n + r; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
        constexpr float kRound = 12582912.0f;
        const float shifted = x * high_ + kRound;
        const float n = shifted - kRound;
        const float r = (x * high_ - n) + x * low_;
        float y = 1.5353258e-4f;
        y = y * r + 1.3399003e-3f;
        y = y * r + 9.6184386e-3f;
        y = y * r + 5.5503322e-2f;
        y = y * r + 2.4022648e-1f;
        y = y * r + 6.9314720e-1f;
        y = y * r + 1.0f;
        const uint32_t power = static_cast<uint32_t>(float_bits(shifted)) << 23;
        const float result = bits_float(static_cast<int32_t>(static_cast<uint32_t>(float_bits(y)) + power));
        return x < lowest_ ? 0.0f : result;
    }

private:
    float high_, low_, lowest_;
};

template <>
class ScaledExp<double> {
public:
    explicit ScaledExp(double inverse_temperature) : inverse_temperature_(inverse_temperature) {}
    PYALIGN_HD double operator()(double x) const { return std::exp(x * inverse_temperature_); }

private:
    double inverse_temperature_;
};

// The sum of e^((x - max) / T).
template <class F>
PYALIGN_HD F sum_exp(const F* x, int64_t count, F max, ScaledExp<F> exp) {
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp(x[i] - max);
    return sum;
}

template <class F>
struct BlockSum {
    F sum, max;
};

// The same over any origin, with the block's max; the exponentials stay in `kept`.
template <class F>
PYALIGN_HD BlockSum<F> sum_exp(const F* x, int64_t count, F origin, ScaledExp<F> exp, F* kept) {
    F sum = 0, max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t i = 0; i < count; ++i) {
        kept[i] = exp(x[i] - origin);
        sum += kept[i];
        max = x[i] > max ? x[i] : max;
    }
    return {sum, max};
}

// A row's state so far: the max is a logit, exact in F; the sum runs in double.
PYALIGN_HD Softmax<double> raise_max(Softmax<double> state, double max, double inverse_temperature) {
    if (!(max > state.max)) return state;
    return {max, state.sum == 0 ? 0 : state.sum * rescale(state.max, max, inverse_temperature)};
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
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
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
