// Sixteen numbers at once, and what dropout draws for them: words mixed from a seed and a place, so that none are kept.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t lanes = 16;

typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

inline Words counted() {
    Words lane;
    for (int64_t i = 0; i < lanes; ++i) lane[i] = static_cast<uint32_t>(i);
    return lane;
}

inline uint64_t mixed(uint64_t x) {  // splitmix64
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Of sixteen places from `first` in row `row`, the factors that dropout gives: 0 below `drop` of 2^32, else `kept`.
inline Floats factors(uint64_t row, int64_t first, uint32_t drop, float kept) {
    Words x = counted() + (static_cast<uint32_t>(first) + static_cast<uint32_t>(row));
    x = (x ^ (x >> 17)) * 0xED5AD4BBu;  // Wellons' triple32, with the row's other half in its middle
    x = ((x ^ (x >> 11)) + static_cast<uint32_t>(row >> 32)) * 0xAC4C1B51u;
    x = (x ^ (x >> 15)) * 0x31848BABu;
    x = x ^ (x >> 14);
    const Floats all = Floats{} + kept;
    return x < drop ? Floats{} : all;
}

}  // namespace
