// Weights in 16 bits times the activations of many tokens, on matrix units: activations are rounded to the weight's format, those of a
// token scaled by a power of two before where that has five bits of exponent.
//
// A launch before rounds the activations, once for all blocks. Tiles are copied to shared memory as they are, some steps ahead of what the
// warps multiply. Where there are too few tiles to keep a GPU busy, each is of a range of the columns, and a launch after adds the sums of all
// ranges.
#pragma once
#include "matmul.h"

// Activations `[tokens, K]`, as numbers of `F`, and by what each token's are to be multiplied.
template <class F, int K>
struct Rounded {
    u8* base;
    float* scales;
    static constexpr int ROW = 2 * K;
    DEVICE u8* row(int token) const { return base + (u64)token * ROW; }
    DEVICE float scale(int token) const { return F::IS_HALF ? scales[token] : 1; }
};

// A power of two that brings a number to 2^14 or more, so that halves of it and of what is less are as good as they can be, and its inverse.
struct PowerOfTwo {
    float up, down;
    DEVICE explicit PowerOfTwo(float most) {
        const int exponent = (int)(bits_of(most) >> 23), near = exponent < 15 ? 15 : exponent;
        up = float_of((u32)(268 - near) << 23), down = float_of((u32)(near - 14) << 23);
    }
};

// Rounds the activations of a token; `room` has a place for each warp.
template <class F, int THREADS, int K>
DEVICE void round_row(float* room, Floats<K> x, Rounded<F, K> to, int token) {
    constexpr int VECTORS = K / 4;
    const Words* from = (const Words*)(x.base + (u64)token * K);
    float up = 1;
    if constexpr (F::IS_HALF) {
        float most = 0;
        for (int v = thread(); v < VECTORS; v += THREADS) {
            const Words words = from[v];
            for (int i = 0; i < 4; i++) most = largest(most, magnitude(float_of(words.x[i])));
        }
        const PowerOfTwo scale(largest_of_block<THREADS>(most, room));
        up = scale.up;
        if (thread() == 0) to.scales[token] = scale.down;
    }
    for (int v = thread(); v < VECTORS; v += THREADS) {
        const Words words = from[v];
        u32 near[4];
        for (int i = 0; i < 4; i++) near[i] = F::nearest(float_of(words.x[i]) * up);
        *(Pair*)(to.row(token) + 8 * v) = {{near[0] | near[1] << 16, near[2] | near[3] << 16}};
    }
}

// Columns that are multiplied between two barriers, and vectors of 16 bytes of a row of those.
constexpr int HALF_COLUMNS = 32, HALF_VECTORS = 2 * HALF_COLUMNS / 16;

// Columns of as many rows, of weights or activations. Vectors of neighbouring rows change places, so that those of eight rows, which are loaded at
// once, share no bank.
template <int ROWS>
struct HalfRows {
    alignas(16) u8 bytes[ROWS * 16 * HALF_VECTORS];
    static DEVICE u32 place(u32 row, u32 vector) { return 16 * (row * HALF_VECTORS + (vector ^ row / 2 % HALF_VECTORS)); }
    // Vector `vector` of row `row + more`, of which `more` is a multiple of 8: vectors change places there alike, and no other place is kept.
    DEVICE u8* at(int row, int more, int vector) { return bytes + place(row, vector) + more * (16 * HALF_VECTORS); }
    // The same of the two vectors of 16 columns, whose places differ by a bit from those of other columns.
    DEVICE const u8* at(int row, int more, int vector, int columns) const {
        return bytes + (place(row, vector) ^ 32 * columns) + more * (16 * HALF_VECTORS);
    }
};

// A tile of as many rows and tokens, and its shared memory: the columns that are multiplied, and of those after them as many as can be on their way.
// The warps share it by squares of 16 tokens and 16 rows, two of them its rows.
template <int ROWS_, int TOKENS_, int THREADS_>
struct HalfTile {
    static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, THREADS = THREADS_;
    static constexpr int STAGES = Copy::IS_HELD ? 2 : least(4, (48 << 10) / (16 * HALF_VECTORS * (ROWS + TOKENS)));
    struct Stage {
        HalfRows<ROWS> w;
        HalfRows<TOKENS> x;
    };
    // Floats from token to token of results that are stored in rows: that of the next has another bank, where that takes no more room.
    static constexpr int HALF = ROWS / 2, STRIDE = HALF + (4 * TOKENS * (HALF + 4) <= (int)sizeof(Stage) * STAGES ? 4 : 0);
    union {
        Stage stages[STAGES];
        float results[TOKENS][STRIDE];
    };

    static constexpr int WARPS_OF_TOKENS = THREADS / WARP / 2, DOWN = TOKENS / 16 / WARPS_OF_TOKENS, ACROSS = ROWS / 2 / 16;
    static_assert(DOWN * WARPS_OF_TOKENS * 16 == TOKENS && ACROSS * 32 == ROWS, "the warps have whole squares");
    static DEVICE int token() { return (u32)warp() / 2 * DOWN * 16; }
    static DEVICE int row() { return (u32)warp() % 2 * ACROSS * 16; }
    // Whether squares of no tokens are passed over, which costs more than it saves where there are few.
    static constexpr bool SKIPS = TOKENS <= 64;
    // What a lane sums.
    struct Sums {
        float x[DOWN][ACROSS][SUMS];
    };
};

// What a thread copies of rows at each step: a vector of each of some, or of those that there are.
template <class T, int ROWS, bool ALL>
struct RowCopies {
    static constexpr int AT_ONCE = T::THREADS / HALF_VECTORS, EACH = ROWS / AT_ONCE;
    static_assert(AT_ONCE % 8 == 0 && ROWS % AT_ONCE == 0, "rows that a thread copies have their vectors in the same places");
    // 32 bits for each row leave registers for sums.
    const u8* base;
    u32 from[EACH];
    bool is_row[EACH];
    Copy copies[EACH];

    // `offset(i)` is how far from `base` row `i` of `rows` begins.
    template <class Offset>
    DEVICE RowCopies(const u8* base, Offset offset, int rows) : base(base) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            is_row[i] = ALL || row(i) < rows;
            from[i] = offset(least(row(i), rows - 1)) + 16 * vector();
        }
    }
    static DEVICE int row(int i) { return i * AT_ONCE + (u32)thread() / HALF_VECTORS; }
    static DEVICE int vector() { return (u32)thread() % HALF_VECTORS; }

    // The next columns. What no row has is left as it is: nothing of a row is made of it.
    DEVICE void begin(HalfRows<ROWS>& to) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (is_row[i]) copies[i].begin(to.at(row(0), i * AT_ONCE, vector()), base + from[i]);
        }
        base += 2 * HALF_COLUMNS;
    }
    DEVICE void finish(HalfRows<ROWS>& to) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (is_row[i]) copies[i].finish(to.at(row(0), i * AT_ONCE, vector()));
        }
    }
};

// What a warp multiplies of 16 columns.
template <class T>
struct HalfShares {
    Right<32> w[T::ACROSS];
    Left<32> x[T::DOWN];

    // Those of columns `16 * columns` and after, of so many tokens.
    DEVICE void load(const typename T::Stage& from, int columns, int tokens) {
#pragma unroll
        for (int a = 0; a < T::ACROSS; a++) {
            w[a].load([&](int row, int vector) { return from.w.at(T::row() + row, 16 * a, vector, columns); });
        }
#pragma unroll
        for (int d = 0; d < T::DOWN; d++) {
            if (T::SKIPS && T::token() + 16 * d >= tokens) continue;
            x[d].load([&](int row, int vector) { return from.x.at(T::token() + row, 16 * d, vector, columns); });
        }
    }
    template <class F>
    DEVICE void multiply(int tokens, typename T::Sums& sums) const {
#pragma unroll
        for (int d = 0; d < T::DOWN; d++) {
            if (T::SKIPS && T::token() + 16 * d >= tokens) continue;
#pragma unroll
            for (int a = 0; a < T::ACROSS; a++) {
                if constexpr (F::IS_HALF) {
                    multiply_any_halves(x[d], w[a], sums.x[d][a]);
                } else {
                    multiply_bfloats(x[d], w[a], sums.x[d][a]);
                }
            }
        }
    }
};

// All products of a tile, whose row `i` begins `offset(i)` from `weight`, of range `range` of the columns. While a warp multiplies, the shares that it takes
// next are on their way to registers, and later columns to shared memory.
template <int RANGES, class T, class F, int K, class Offset>
DEVICE void sum_half_tile(T& tile, const u8* weight, Offset offset, Rounded<F, K> x, int token, int tokens, int range, typename T::Sums& sums) {
    constexpr int STEPS = K / HALF_COLUMNS, STAGES = T::STAGES, SHARES = HALF_COLUMNS / 16;
    static_assert(K % HALF_COLUMNS == 0 && RANGES <= STEPS, "steps are whole, and each range has one");
    static_assert(SHARES == 2, "shares take turns");
    const int first = STEPS * range / RANGES, end = STEPS * (range + 1) / RANGES;
#pragma unroll
    for (int d = 0; d < T::DOWN; d++) {
        for (int a = 0; a < T::ACROSS; a++) {
            for (int i = 0; i < SUMS; i++) sums.x[d][a][i] = 0;
        }
    }
    tokens -= token;
    constexpr int STEP = 2 * HALF_COLUMNS;
    RowCopies<T, T::ROWS, true> weights(weight + first * STEP, offset, T::ROWS);
    RowCopies<T, T::TOKENS, !T::SKIPS> activations(x.row(token) + first * STEP, [&](int i) { return (u32)i * (2 * K); }, tokens);
    weights.begin(tile.stages[0].w);
    wait_for_previous();
    activations.begin(tile.stages[0].x);
    weights.finish(tile.stages[0].w);
    activations.finish(tile.stages[0].x);
    end_step_of_copies();
#pragma unroll
    for (int i = 1; i < STAGES; i++) {
        if (first + i < end) {
            weights.begin(tile.stages[i].w);
            activations.begin(tile.stages[i].x);
        }
        end_step_of_copies();
    }
    wait_for_copies<STAGES - 1>();
    barrier();
    HalfShares<T> shares[2];
    shares[0].load(tile.stages[0], 0, tokens);
    int now = 0;
#pragma unroll 1
    for (int left = end - first; left > 0; left--) {
        shares[1].load(tile.stages[now], 1, tokens);
        shares[0].template multiply<F>(tokens, sums);
        const int next = now + 1 == STAGES ? 0 : now + 1;
        if (left > 1) {
            // What was begun in the step before, where registers hold it.
            weights.finish(tile.stages[next].w);
            activations.finish(tile.stages[next].x);
            wait_for_copies<STAGES - 2>();
            // Nor does any warp load what is copied over now.
            barrier();
            if (left > STAGES) {
                weights.begin(tile.stages[now].w);
                activations.begin(tile.stages[now].x);
            }
            end_step_of_copies();
            shares[0].load(tile.stages[next], 0, tokens);
        }
        shares[1].template multiply<F>(tokens, sums);
        now = next;
    }
}

// As `matmul`; of several ranges, each block stores the sums of range `block_z()`, for `join_sums`.
template <class M, int RANGES, class T, int K>
DEVICE void matmul_halves(T& tile, Part part, Rounded<typename M::Format, K> x, int block, int tokens) {
    const int token = block_x() * T::TOKENS, first = block * T::ROWS;
    const int range = RANGES > 1 ? block_z() : 0;
    typename T::Sums sums;
    const auto offset = [&](int i) { return (u32)least(i, part.rows - 1 - first) * (2 * K); };
    sum_half_tile<RANGES>(tile, part.weight + (u64)first * (2 * K), offset, x, token, tokens, range, sums);
    part.out += (u64)range * tokens * part.rows;
#pragma unroll
    for (int d = 0; d < T::DOWN; d++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int t = token + T::token() + 16 * d + left_row(i);
            const float scale = x.scale(least(t, tokens - 1));
            for (int a = 0; a < T::ACROSS; a++) store_sum(part, t, first + T::row() + 16 * a + right_row(i), tokens, sums.x[d][a][i] * scale);
        }
    }
}

// As `matmul_swiglu`, for half as many rows as a tile has: of its rows each warp has as many of both weights.
template <class M, class T, int K, class Out>
DEVICE void matmul_halves_swiglu(T& tile, const u8* gate, const u8* up, int rows, Rounded<typename M::Format, K> x, int block, int tokens,
                                 Out out) {
    constexpr int HALF = T::ROWS / 2, QUARTER = T::ROWS / 4;
    const int token = block_x() * T::TOKENS, first = block * HALF;
    // All rows that a thread copies are of one weight.
    static_assert(T::THREADS / HALF_VECTORS % (2 * QUARTER) == 0, "rows that a thread copies are as many apart");
    const u8* weight = thread() / HALF_VECTORS / QUARTER % 2 == 0 ? gate : up;
    const auto offset = [&](int i) { return (u32)least(i / HALF * QUARTER + i % QUARTER, rows - 1 - first) * (2 * K); };
    typename T::Sums sums;
    sum_half_tile<1>(tile, weight + (u64)first * (2 * K), offset, x, token, tokens, 0, sums);
    barrier();
#pragma unroll
    for (int d = 0; d < T::DOWN; d++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int t = T::token() + 16 * d + left_row(i);
            const float scale = x.scale(least(token + t, tokens - 1));
            for (int a = 0; a < T::ACROSS / 2; a++) {
                tile.results[t][T::row() / 2 + 16 * a + right_row(i)] =
                    silu(sums.x[d][a][i] * scale) * (sums.x[d][T::ACROSS / 2 + a][i] * scale);
            }
        }
    }
    barrier();
    for (int i = thread(); i < T::TOKENS * HALF; i += T::THREADS) {
        const int t = i / HALF, r = i % HALF;
        const float value[1] = {tile.results[t][r]};
        out.store(token + t, first + r, value, token + t < tokens && first + r < rows);
    }
}

// Adds the sums of all ranges, which lie one after another, each of all tokens; a thread has one row of a token.
template <int THREADS, int RANGES>
DEVICE void join_sums(Part part, const float* sums, int block, int token, int tokens) {
    const int row = block * THREADS + thread();
    if (row >= part.rows) return;
    float y = 0;
#pragma unroll
    for (int range = 0; range < RANGES; range++) y += sums[((u64)range * tokens + token) * part.rows + row];
    store_sum(part, token, row, tokens, y);
}
