// One table of kernels per instruction set, of which the machine's is taken.
#pragma once

#include <string>

#include "cpu/kernels.h"

// PYALIGN_TABLES(Type, kName, function) declares every set's `const Type kName`, and defines `const Type& function()`.
#if defined(PYALIGN_HAVE_NEON)
#define PYALIGN_LEAST neon
#else
#define PYALIGN_LEAST baseline
#endif
#if defined(PYALIGN_HAVE_AVX2)
#define PYALIGN_DECLARE_AVX2(Type, kName) \
    namespace avx2 {                      \
    extern const cpu::Type kName;         \
    }
#define PYALIGN_TAKE_AVX2(kName) \
    if (isa == avx2::kName.isa) return avx2::kName;
#else
#define PYALIGN_DECLARE_AVX2(Type, kName)
#define PYALIGN_TAKE_AVX2(kName)
#endif
#if defined(PYALIGN_HAVE_AVX512)
#define PYALIGN_DECLARE_AVX512(Type, kName) \
    namespace avx512 {                      \
    extern const cpu::Type kName;           \
    }
#define PYALIGN_TAKE_AVX512(kName) \
    if (isa == avx512::kName.isa) return avx512::kName;
#else
#define PYALIGN_DECLARE_AVX512(Type, kName)
#define PYALIGN_TAKE_AVX512(kName)
#endif

// The set is that of kernels(), which PYALIGN_CPU_ISA may name.
#define PYALIGN_TABLES(Type, kName, function)                       \
    namespace pyalign {                                             \
    namespace PYALIGN_LEAST {                                       \
    extern const cpu::Type kName;                                   \
    }                                                               \
    PYALIGN_DECLARE_AVX2(Type, kName)                               \
    PYALIGN_DECLARE_AVX512(Type, kName)                             \
    namespace cpu {                                                 \
    static const Type& function() {                                 \
        static const Type& chosen = []() -> const Type& {           \
            [[maybe_unused]] const std::string isa = kernels().isa; \
            PYALIGN_TAKE_AVX512(kName)                              \
            PYALIGN_TAKE_AVX2(kName)                                \
            return PYALIGN_LEAST::kName;                            \
        }();                                                        \
        return chosen;                                              \
    }                                                               \
    }                                                               \
    }
