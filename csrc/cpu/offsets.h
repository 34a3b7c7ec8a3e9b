// The check that offsets cut `count` entries into parts. Not for code that is compiled per instruction set.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyalign::cpu {

// Throws std::invalid_argument, naming the argument and the entry.
inline void check_offsets(const int64_t* offsets, int64_t parts, int64_t count, const std::string& name,
                          const std::string& of_what) {
    const auto refuse = [&](int64_t place, const std::string& wanted) {
        throw std::invalid_argument(name + ": entry " + std::to_string(place) + " is " +
                                    std::to_string(offsets[place]) + "; wanted " + wanted);
    };
    if (offsets[0] != 0) refuse(0, "0");
    for (int64_t i = 0; i < parts; ++i)
        if (offsets[i + 1] < offsets[i]) refuse(i + 1, "no less than the one before it, " + std::to_string(offsets[i]));
    if (offsets[parts] != count) refuse(parts, std::to_string(count) + ", " + of_what);
}

}  // namespace pyalign::cpu
