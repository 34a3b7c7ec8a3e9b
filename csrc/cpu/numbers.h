// Numbers in accumulation dtype: double where the data are float64, else float.
#pragma once

#include "common/distill_args.h"

namespace pyalign::cpu {

inline double read(const void* data, Dtype dtype, int64_t index = 0) {
    return dtype == Dtype::kFloat64 ? static_cast<const double*>(data)[index]
                                    : static_cast<double>(static_cast<const float*>(data)[index]);
}

inline void write(void* data, Dtype dtype, int64_t index, double value) {
    if (dtype == Dtype::kFloat64)
        static_cast<double*>(data)[index] = value;
    else
        static_cast<float*>(data)[index] = static_cast<float>(value);
}

}  // namespace pyalign::cpu
