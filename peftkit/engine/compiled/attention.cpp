// Attention of examples that stand one after the other in a row, each to itself, forward and backward.
//
// A task is one example and one head of keys. It lays its keys and values out in float32 once and takes queries by
// fours, so that scores never leave the cache: the backward pass makes them again, from the logarithm of what each
// query's softmax divided by, and dropout's masks from a seed. No two tasks write to the same place, so that results do
// not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t rows = 4;
constexpr int64_t step = 2 * lanes;  // keys of one block of scores
constexpr bool half = HALF;  // numbers are bfloat16, else float32
constexpr int64_t parts = PARTS;
constexpr int64_t width = parts * lanes;  // of a head, with zeros at its end

inline Floats& at(float* place) { return *reinterpret_cast<Floats*>(place); }
inline const Floats& at(const float* place) { return *reinterpret_cast<const Floats*>(place); }
inline int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// All sixteen joined by a function, in halves.
template <typename Join>
inline float joined(Floats values, Join join) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight halves[2];
    std::memcpy(halves, &values, sizeof values);
    const Eight eight = join(halves[0], halves[1]);
    Four quarters[2];
    std::memcpy(quarters, &eight, sizeof eight);
    const Four four = join(quarters[0], quarters[1]);
    return join(join(four[0], four[2]), join(four[1], four[3]));
}

inline float sum(Floats values) {
    return joined(values, [](auto a, auto b) { return a + b; });
}

inline float most(Floats values) {
    return joined(values, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for x up to about 0, relative error 1e-7 (Cephes' expf); 0 below -87, NaN for NaN.
inline Floats exponential(Floats x) {
    const float magic = 12582912.0f;  // adding it rounds to an integer
    const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats power = (bounded * 1.44269504088896341f + magic) - magic;
    const Floats r = bounded - power * 0.693359375f + power * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < -87.0f ? Floats{} : p * scale;
}

struct Place {
    void* data;
    int64_t token, head;  // steps from one to the next, in numbers
};

void load(const Place& from, int64_t token, int64_t head, int64_t count, float* to) {
    const int64_t start = token * from.token + head * from.head;
    if (half) {
        const uint16_t* numbers = static_cast<const uint16_t*>(from.data) + start;
        for (int64_t c = 0; c < count; ++c) {
            const uint32_t bits = static_cast<uint32_t>(numbers[c]) << 16;
            std::memcpy(to + c, &bits, 4);
        }
    } else {
        std::memcpy(to, static_cast<const float*>(from.data) + start, 4 * count);
    }
}

void store(const float* from, const Place& to, int64_t token, int64_t head, int64_t count) {
    const int64_t start = token * to.token + head * to.head;
    if (half) {
        uint16_t* numbers = static_cast<uint16_t*>(to.data) + start;
        for (int64_t c = 0; c < count; ++c) {
            uint32_t bits;
            std::memcpy(&bits, from + c, 4);
            const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // ties to even
            numbers[c] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest);
        }
    } else {
        std::memcpy(static_cast<float*>(to.data) + start, from, 4 * count);
    }
}

}  // namespace

extern "C" struct Call {
    Place query, key, value, output;
    float* logarithm;  // (heads, tokens): of what the softmax of a query divided by
    Place output_gradient, query_gradient, key_gradient, value_gradient;
    const int64_t* starts;  // of the examples, and the end of the last
    int64_t examples, heads, key_heads, width, tokens;
    float scale, kept;
    uint32_t drop;
    int32_t causal, threads;
    uint64_t seed;
};

namespace {

// What a task lays out: numbers of a key head in float32, by token and, transposed, by place in the width. What is
// behind the last token is left from tasks before; nothing that comes of it is read.
struct Scratch {
    std::vector<float> store;
    float *keys, *keys_by_place, *values, *values_by_place, *key_gradients, *value_gradients, *scores, *gradients;

    void fit(int64_t length, bool backward) {
        const int64_t columns = rounded(length, step), matrix = columns * width;
        const int64_t matrices = backward ? 6 : 2;
        const size_t needed = static_cast<size_t>(matrices * matrix + 2 * rows * columns);
        if (store.size() < needed) store.resize(needed);
        float* next = store.data();
        auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
        keys_by_place = take(matrix);
        values = take(matrix);
        if (backward) {
            keys = take(matrix);
            values_by_place = take(matrix);
            key_gradients = take(matrix);
            value_gradients = take(matrix);
            std::fill(key_gradients, next, 0.0f);
        }
        scores = take(rows * columns);
        gradients = take(rows * columns);
    }
};

class Task {
    const Call& call;
    Scratch& scratch;
    const int64_t start, length, columns, key_head;

public:
    Task(const Call& call, Scratch& scratch, int64_t number, bool backward)
        : call(call), scratch(scratch), start(call.starts[number / call.key_heads]),
          length(call.starts[number / call.key_heads + 1] - start), columns(rounded(length, step)),
          key_head(number % call.key_heads) {
        scratch.fit(length, backward);
        lay_out(call.key, backward ? scratch.keys : nullptr, scratch.keys_by_place);
        lay_out(call.value, scratch.values, backward ? scratch.values_by_place : nullptr);
    }

    void forward() {
        for (int64_t head = first_head(); head < first_head() + group(); ++head)
            for (int64_t query = 0; query < length; query += rows) forward(head, query);
    }

    void backward() {
        for (int64_t head = first_head(); head < first_head() + group(); ++head)
            for (int64_t query = 0; query < length; query += rows) backward(head, query);
        for (int64_t key = 0; key < length; ++key) {
            store(scratch.key_gradients + key * width, call.key_gradient, start + key, key_head, call.width);
            store(scratch.value_gradients + key * width, call.value_gradient, start + key, key_head, call.width);
        }
    }

private:
    int64_t group() const { return call.heads / call.key_heads; }
    int64_t first_head() const { return key_head * group(); }

    void lay_out(const Place& from, float* by_token, float* by_place) {
        float row[width] = {};
        for (int64_t token = 0; token < length; ++token) {
            load(from, start + token, key_head, call.width, row);
            if (by_token) std::copy(row, row + width, by_token + token * width);
            if (by_place)
                for (int64_t c = 0; c < call.width; ++c) by_place[c * columns + token] = row[c];
        }
    }

    // Of four queries from `query`: their numbers, times `scale`; 0 for those behind the last.
    void rows_of(const Place& from, int64_t head, int64_t query, float scale, float (&to)[rows][width]) const {
        for (int64_t r = 0; r < rows; ++r) {
            std::fill(to[r], to[r] + width, 0.0f);
            if (query + r >= length) continue;
            load(from, start + query + r, head, call.width, to[r]);
            for (int64_t c = 0; c < width; ++c) to[r][c] *= scale;
        }
    }

    int64_t seen(int64_t query) const { return call.causal ? std::min(query + 1, length) : length; }
    int64_t seen_together(int64_t query) const { return seen(std::min(query + rows, length) - 1); }
    uint64_t dice(int64_t head, int64_t query) const {
        return mixed(call.seed ^ mixed(static_cast<uint64_t>(head * call.tokens + start + query)));
    }

    // given (rows, width) times by_place (width, columns), for the first `count` columns and those of their block.
    void multiply(const float (&given)[rows][width], const float* by_place, int64_t count, float* to) const {
        for (int64_t j = 0; j < count; j += step) {
            Floats found[rows][2] = {};
            const float* column = by_place + j;
            for (int64_t c = 0; c < call.width; ++c, column += columns) {
                const Floats left = at(column), right = at(column + lanes);
                for (int64_t r = 0; r < rows; ++r) {
                    found[r][0] += given[r][c] * left;
                    found[r][1] += given[r][c] * right;
                }
            }
            for (int64_t r = 0; r < rows; ++r) {
                at(to + r * columns + j) = found[r][0];
                at(to + r * columns + j + lanes) = found[r][1];
            }
        }
    }

    // given (rows, columns) times by_token (columns, width), over the first `count` columns.
    void gather(const float* given, const float* by_token, int64_t count, float (&to)[rows][width]) const {
        Floats found[rows][parts] = {};
        for (int64_t j = 0; j < count; ++j)
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t p = 0; p < parts; ++p)
                    found[r][p] += given[r * columns + j] * at(by_token + j * width + p * lanes);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t p = 0; p < parts; ++p) at(to[r] + p * lanes) = found[r][p];
    }

    // by_token (columns, width) plus the transpose of weights (rows, columns) times given (rows, width).
    void spread(const float* weights, const float (&given)[rows][width], int64_t count, float* by_token) const {
        for (int64_t j = 0; j < count; ++j)
            for (int64_t p = 0; p < parts; ++p) {
                Floats& place = at(by_token + j * width + p * lanes);
                Floats total = place;
                for (int64_t r = 0; r < rows; ++r)
                    total += weights[r * columns + j] * at(given[r] + p * lanes);
                place = total;
            }
    }

    // What a query does not see, from the block of its last key on.
    void hide(float* scores, int64_t count) const {
        const Floats nothing = Floats{} - __builtin_inff();
        for (int64_t j = count / lanes * lanes; j < columns; j += lanes) {
            const Words place = counted() + static_cast<uint32_t>(j);
            at(scores + j) = place < static_cast<uint32_t>(count) ? at(scores + j) : nothing;
        }
    }

    void forward(int64_t head, int64_t query) {
        float queries[rows][width], output[rows][width];
        rows_of(call.query, head, query, call.scale, queries);
        const int64_t together = seen_together(query), blocks = rounded(together, lanes);
        multiply(queries, scratch.keys_by_place, together, scratch.scores);
        float divisors[rows];
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = scratch.scores + r * columns;
            hide(scores, seen(query + r));
            Floats high = at(scores);
            for (int64_t j = lanes; j < blocks; j += lanes) high = at(scores + j) > high ? at(scores + j) : high;
            const float highest = most(high);
            Floats total = {};
            for (int64_t j = 0; j < blocks; j += lanes) total += at(scores + j) = exponential(at(scores + j) - highest);
            divisors[r] = sum(total);
            if (call.drop) {
                const uint64_t own = dice(head, query + r);
                for (int64_t j = 0; j < blocks; j += lanes) at(scores + j) *= factors(own, j, call.drop, call.kept);
            }
            if (query + r < length)
                call.logarithm[head * call.tokens + start + query + r] = highest + __builtin_logf(divisors[r]);
        }
        gather(scratch.scores, scratch.values, together, output);
        for (int64_t r = 0; r < rows && query + r < length; ++r) {
            for (int64_t c = 0; c < width; ++c) output[r][c] /= divisors[r];
            store(output[r], call.output, start + query + r, head, call.width);
        }
    }

    void backward(int64_t head, int64_t query) {
        float queries[rows][width], given[rows][width], output[rows][width], gradient[rows][width];
        rows_of(call.query, head, query, call.scale, queries);
        rows_of(call.output_gradient, head, query, 1.0f, given);
        rows_of(call.output, head, query, 1.0f, output);
        const int64_t together = seen_together(query), blocks = rounded(together, lanes);
        multiply(queries, scratch.keys_by_place, together, scratch.scores);
        multiply(given, scratch.values_by_place, together, scratch.gradients);
        for (int64_t r = 0; r < rows; ++r) {
            // the sum over keys of weight times gradient, which the softmax takes off
            Floats products = {};
            for (int64_t p = 0; p < parts; ++p) products += at(given[r] + p * lanes) * at(output[r] + p * lanes);
            const float taken = sum(products);
            const bool is_there = query + r < length;
            const float logarithm = is_there ? call.logarithm[head * call.tokens + start + query + r] : 0.0f;
            const uint64_t own = dice(head, query + r);
            float *weights = scratch.scores + r * columns, *gradients = scratch.gradients + r * columns;
            hide(weights, is_there ? seen(query + r) : 0);
            for (int64_t j = 0; j < blocks; j += lanes) {
                const Floats weight = exponential(at(weights + j) - logarithm);
                const Floats factor = call.drop ? factors(own, j, call.drop, call.kept) : Floats{} + 1.0f;
                at(weights + j) = weight * factor;
                at(gradients + j) = weight * (at(gradients + j) * factor - taken);
            }
        }
        gather(scratch.gradients, scratch.keys, together, gradient);
        for (int64_t r = 0; r < rows && query + r < length; ++r) {
            for (int64_t c = 0; c < width; ++c) gradient[r][c] *= call.scale;
            store(gradient[r], call.query_gradient, start + query + r, head, call.width);
        }
        spread(scratch.gradients, queries, together, scratch.key_gradients);
        spread(scratch.scores, given, together, scratch.value_gradients);
    }
};

}  // namespace

extern "C" void attend(const Call* call, int backward) {
    const int64_t tasks = call->examples * call->key_heads;
#pragma omp parallel num_threads(call->threads)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < tasks; ++number) {
            Task task(*call, scratch, number, backward);
            backward ? task.backward() : task.forward();
        }
    }
}
