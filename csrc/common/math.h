// Elementary functions as branch-free scalar code: under `#pragma omp simd` a compiler turns each into vector code
// of any width, and under nvcc they are the device's own. float carries the polynomials; double uses libm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/platform.h"

PYALIGN_BEGIN

PYALIGN_HD int32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_int(x);
#else
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

PYALIGN_HD float bits_float(int32_t bits) {
#if defined(__CUDA_ARCH__)
    return __int_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

// e^x for x <= 0, relative error 1e-7. Below -87.33, where float turns subnormal, 0. NaN stays NaN.
PYALIGN_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
    return ::expf(x);
#else
    // x = n ln 2 + r; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
    constexpr float kLowest = -87.33654f, kLog2E = 1.442695041f, kRound = 12582912.0f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    const float clamped = x < kLowest ? kLowest : x;
    const float shifted = clamped * kLog2E + kRound;
    const float n = shifted - kRound;
    const float r = (clamped - n * kLn2High) - n * kLn2Low;
    float y = 1.3814540e-3f;
    y = y * r + 8.3687454e-3f;
    y = y * r + 4.1668389e-2f;
    y = y * r + 1.6666521e-1f;
    y = y * r + 4.9999994e-1f;
    y = y * (r * r) + r + 1.0f;
    const float scaled =
        bits_float(float_bits(y) + static_cast<int32_t>(static_cast<uint32_t>(float_bits(shifted)) << 23));
    return x < kLowest ? 0.0f : scaled;
#endif
}

PYALIGN_HD double exp_nonpositive(double x) { return ::exp(x); }

// log x for normal x > 0 (0 gives -inf), relative error 1e-7.
PYALIGN_HD float log_positive(float x) {
#if defined(__CUDA_ARCH__)
    return ::logf(x);
#else
    // x = 2^n m with m in [sqrt(1/2), sqrt(2)).
    constexpr int32_t kSqrtHalf = 0x3f3504f3;
    const int32_t offset = float_bits(x) - kSqrtHalf;
    const float n = static_cast<float>(offset >> 23);
    const float r = bits_float((offset & 0x007fffff) + kSqrtHalf) - 1.0f;
    float y = 7.0376836292e-2f;
    y = y * r - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    const float r2 = r * r;
    const float result = ((y * r * r2 - n * 2.12194440e-4f) - 0.5f * r2) + r + n * 0.693359375f;
    return x > 0.0f    ? result
           : x == 0.0f ? -std::numeric_limits<float>::infinity()
                       : x * std::numeric_limits<float>::quiet_NaN();
#endif
}

PYALIGN_HD double log_positive(double x) { return ::log(x); }

// log(1 + x) for -1 <= x <= 0.
PYALIGN_HD double log1p_nonpositive(double x) { return ::log1p(x); }

// e^x for x <= 0 and log x for x in (0, 1], to 3e-7 absolutely: where the relative error of what is small has no
// weight.
PYALIGN_HD float exp_unit(float x) {
#if defined(__CUDA_ARCH__)
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x * 1.442695041f));
    return x;
#else
    return exp_nonpositive(x);
#endif
}

PYALIGN_HD float log_unit(float x) {
#if defined(__CUDA_ARCH__)
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x * 0.6931471806f;
#else
    return log_positive(x);
#endif
}

// Where e^x - 1 - x is taken from its series: beyond, the closed form has lost less than the series would need.
template <class F>
PYALIGN_HD bool in_series(F x) {
    return (x < F(0) ? -x : x) < F(0.25);
}

// phi(x) = e^x - 1 - x for |x| < 1/4, to relative 1e-8 (float) or 1e-16 (double). Never negative.
PYALIGN_HD float phi_series(float x) {
    float y = 1.9841270e-4f;
    y = y * x + 1.3888889e-3f;
    y = y * x + 8.3333333e-3f;
    y = y * x + 4.1666667e-2f;
    y = y * x + 1.6666667e-1f;
    y = y * x + 0.5f;
    return y * (x * x);
}

PYALIGN_HD double phi_series(double x) {
    double y = 1.0;  // x^2/2 (1 + x/3 (1 + x/4 (1 + ...)))
    for (int n = 14; n >= 3; --n) y = 1.0 + y * x / n;
    return 0.5 * y * (x * x);
}

// e^x - 1 for x <= 0.
template <class F>
PYALIGN_HD F expm1_nonpositive(F x) {
    const F closed = exp_nonpositive(x) - F(1);
    return in_series(x) ? x + phi_series(x) : closed;
}

// tanh x and its derivative, from e^(-2 |x|); neither cancels, near 0 or far from it.
template <class F>
struct Tanh {
    F value, slope;
};

template <class F>
PYALIGN_HD Tanh<F> tanh_with_slope(F x) {
    const F twice = F(-2) * (x < F(0) ? -x : x);
    const F e = exp_nonpositive(twice), scale = F(1) / (F(1) + e);
    const F below = in_series(twice) ? -(twice + phi_series(twice)) : F(1) - e;
    const F value = below * scale;
    return {x < F(0) ? -value : value, F(4) * e * (scale * scale)};
}

PYALIGN_END
