// Dropout whose masks nobody keeps: whether a number falls is told by its place and a seed.
//
// Numbers are taken in blocks of places, each with a row of draws of its own, so that neither where a part of them
// begins nor the number of threads changes what falls.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace {

constexpr bool half = HALF;  // numbers are bfloat16, else float32
constexpr int64_t block = 4096;
constexpr int64_t worth = 8 * block;  // numbers that a second thread gains something from

typedef uint16_t Halves __attribute__((vector_size(2 * lanes), aligned(2), may_alias));
using Number = std::conditional_t<half, uint16_t, float>;

inline Floats load(const Number* from) {
    Floats found;
    if constexpr (half) {
        const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
        std::memcpy(&found, &bits, sizeof found);
    } else {
        found = *reinterpret_cast<const Floats*>(from);
    }
    return found;
}

inline void store(Floats values, Number* to) {
    if constexpr (half) {
        Words bits;
        std::memcpy(&bits, &values, sizeof bits);
        const Words nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // ties to even
        const Words nothing = Words{} + 0x7FC0u;
        const Words found = (bits & 0x7FFFFFFFu) > 0x7F800000u ? nothing : nearest;
        *reinterpret_cast<Halves*>(to) = __builtin_convertvector(found, Halves);
    } else {
        *reinterpret_cast<Floats*>(to) = values;
    }
}

struct Draws {
    uint64_t seed;
    uint32_t drop;
    float kept;
};

// Places `from` to `end` of one block, of which `values` and `to` begin with the first.
template <bool adds>
void within(const Number* values, Number* to, int64_t from, int64_t end, uint64_t row, const Draws& draws) {
    for (int64_t at = from; at < end; at += lanes, values += lanes, to += lanes) {
        const Floats kept = factors(row, at, draws.drop, draws.kept);
        const int64_t count = std::min(lanes, end - at);
        if (count == lanes) {
            const Floats found = load(values) * kept;
            store(adds ? load(to) + found : found, to);
            continue;
        }
        Number last[lanes] = {}, total[lanes] = {};
        std::copy(values, values + count, last);
        if (adds) std::copy(to, to + count, total);
        const Floats found = load(last) * kept;
        store(adds ? load(total) + found : found, total);
        std::copy(total, total + count, to);
    }
}

template <bool adds>
void all(const Number* values, Number* to, int64_t first, int64_t count, const Draws& draws, int threads) {
    const int64_t begin = first / block, end = (first + count + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > worth)
    for (int64_t number = begin; number < end; ++number) {
        const int64_t start = number * block;
        const int64_t from = std::max(first, start), until = std::min(first + count, start + block);
        const uint64_t row = mixed(draws.seed ^ mixed(static_cast<uint64_t>(number)));
        within<adds>(values + (from - first), to + (from - first), from - start, until - start, row, draws);
    }
}

}  // namespace

// values, each times `kept` or, with a chance of `drop` in 2^32, times 0: into `to`, or added to what is there.
// `first` is the place of the first of them among those that share a seed.
extern "C" void drop(const void* values, void* to, int64_t first, int64_t count, uint64_t seed, uint32_t drop,
                     float kept, int32_t adds, int32_t threads) {
    const Draws draws = {seed, drop, kept};
    const Number* from = static_cast<const Number*>(values);
    adds ? all<true>(from, static_cast<Number*>(to), first, count, draws, threads)
         : all<false>(from, static_cast<Number*>(to), first, count, draws, threads);
}
