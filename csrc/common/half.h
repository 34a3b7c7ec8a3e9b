// 16-bit floats as branch-free integer code, vectorised like math.h. Rounding is to nearest, ties to even.
#pragma once

#include "common/math.h"

PYALIGN_BEGIN

PYALIGN_HD float bfloat16_to_float(uint16_t x) {
    return bits_float(static_cast<int32_t>(static_cast<uint32_t>(x) << 16));
}

PYALIGN_HD uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(x));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

PYALIGN_HD float float16_to_float(uint16_t x) {
    const uint32_t magnitude = (x & 0x7fffu) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
    const uint32_t finite = static_cast<uint32_t>(float_bits(bits_float(static_cast<int32_t>(magnitude)) * 0x1p112f));
    const uint32_t value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
    return bits_float(static_cast<int32_t>(value | static_cast<uint32_t>(x & 0x8000u) << 16));
}

PYALIGN_HD uint16_t float_to_float16(float x) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(x)), magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent, round the 13 lost bits; what overflows becomes infinity.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = normal < 0x7c00u ? normal : 0x7c00u;
    // Subnormal results are multiples of 2^-24: adding 1/2 leaves them in the low bits, rounded.
    const float absolute = bits_float(static_cast<int32_t>(magnitude));
    const uint32_t tiny = static_cast<uint32_t>(float_bits(absolute + 0.5f)) - 0x3f000000u;
    const uint32_t rounded = magnitude < 0x38800000u ? tiny : magnitude >= 0x47800000u ? 0x7c00u : finite;
    const uint32_t value = magnitude > 0x7f800000u ? 0x7e00u : rounded;
    return static_cast<uint16_t>(value | (bits >> 16 & 0x8000u));
}

PYALIGN_END
