// What differs between a host compiler and nvcc, and between one instruction set and the next.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYALIGN_HD __host__ __device__ __forceinline__
#else
#define PYALIGN_HD inline __attribute__((always_inline))
#endif

// Code under csrc/common is compiled once per CPU instruction set. The namespace carries the set's name, so that
// the linker can never take an AVX-512 copy of an inline function for the baseline.
#if !defined(PYALIGN_ISA)
#define PYALIGN_ISA generic
#endif
#define PYALIGN_BEGIN   \
    namespace pyalign { \
    inline namespace PYALIGN_ISA {
#define PYALIGN_END \
    }               \
    }
