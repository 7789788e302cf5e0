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

// Columns that are multiplied between two barriers.
constexpr int HALF_COLUMNS = 32;

// So many columns of as many rows, of weights or activations. Vectors of neighbouring rows change places, so that those of eight rows, which are loaded
// at once, share no bank.
template <int ROWS, int COLUMNS>
struct HalfRows {
    // Vectors of 16 bytes of a row.
    static constexpr int VECTORS = COLUMNS / 8;
    static_assert(VECTORS == 4 || VECTORS == 8, "eight rows have each vector in eight places, or in four of two rows each");
    alignas(16) u8 bytes[ROWS * 16 * VECTORS];
    static DEVICE u32 place(u32 row, u32 vector) { return 16 * (row * VECTORS + (vector ^ row / (8 / VECTORS) % VECTORS)); }
    // Vector `vector` of row `row + more`, of which `more` is a multiple of 8: vectors change places there alike, and no other place is kept.
    DEVICE u8* at(int row, int more, int vector) { return bytes + place(row, vector) + more * (16 * VECTORS); }
    // The same of the two vectors of columns from `16 * n` on, whose places differ from those of the first by the bits of `32 * n`.
    DEVICE const u8* at(int row, int more, int vector, u32 bits) const {
        return bytes + (place(row, vector) ^ bits) + more * (16 * VECTORS);
    }
};

// How the warps share a tile of as many rows and tokens: by squares of 16 tokens and 16 rows, two of them its rows.
template <int ROWS_, int TOKENS_, int THREADS_>
struct Squares {
    static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, THREADS = THREADS_;
    static constexpr int WARPS_OF_TOKENS = THREADS / WARP / 2, DOWN = TOKENS / 16 / WARPS_OF_TOKENS, ACROSS = ROWS / 2 / 16;
    static_assert(DOWN * WARPS_OF_TOKENS * 16 == TOKENS && ACROSS * 32 == ROWS, "the warps have whole squares");
    static DEVICE int token() { return (u32)warp() / 2 * DOWN * 16; }
    static DEVICE int row() { return (u32)warp() % 2 * ACROSS * 16; }
    // Whether squares of no tokens are passed over, which costs more than it saves where there are few.
    static constexpr bool SKIPS = TOKENS <= 64;
    // What a lane sums.
    struct Sums {
        float x[DOWN][ACROSS][SUMS];
        DEVICE void clear() {
#pragma unroll
            for (int d = 0; d < DOWN; d++) {
                for (int a = 0; a < ACROSS; a++) {
                    for (int i = 0; i < SUMS; i++) x[d][a][i] = 0;
                }
            }
        }
    };
    // Results that are stored in rows, where `ROOM` bytes were a tile.
    static constexpr int HALF = ROWS / 2;
    template <int ROOM>
    struct Results {
        // Floats from token to token: that of the next has another bank, where that takes no more room.
        static constexpr int STRIDE = HALF + (4 * TOKENS * (HALF + 4) <= ROOM ? 4 : 0);
        float x[TOKENS][STRIDE];
    };
};

// A tile, and its shared memory: the columns that are multiplied, and of those after them as many as can be on their way.
template <int ROWS, int TOKENS, int THREADS>
struct HalfTile : Squares<ROWS, TOKENS, THREADS> {
    struct Stage {
        HalfRows<ROWS, HALF_COLUMNS> w;
        HalfRows<TOKENS, HALF_COLUMNS> x;
    };
    static constexpr int STAGES = Copy::IS_HELD ? 2 : least(4, (48 << 10) / (int)sizeof(Stage));
    union {
        Stage stages[STAGES];
        typename Squares<ROWS, TOKENS, THREADS>::template Results<(int)sizeof(Stage) * STAGES> results;
    };
};

// What a thread copies of rows at each step: a vector of each of some, or of those that there are.
template <class T, int ROWS, int COLUMNS, bool ALL>
struct RowCopies {
    typedef HalfRows<ROWS, COLUMNS> To;
    static constexpr int AT_ONCE = T::THREADS / To::VECTORS, EACH = ROWS / AT_ONCE;
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
    static DEVICE int row(int i) { return i * AT_ONCE + (u32)thread() / To::VECTORS; }
    static DEVICE int vector() { return (u32)thread() % To::VECTORS; }

    // The columns at `base`; the next begin so many bytes after those. What no row has is left as it is: nothing of a row is made of it.
    DEVICE void begin(To& to, int bytes) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (is_row[i]) copies[i].begin(to.at(row(0), i * AT_ONCE, vector()), base + from[i]);
        }
        base += bytes;
    }
    DEVICE void finish(To& to) {
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

    // Those of columns from `16 * n` on, where `bits` is `32 * n` (see `HalfRows::at`), of so many tokens.
    template <int COLUMNS>
    DEVICE void load(const HalfRows<T::ROWS, COLUMNS>& weights, const HalfRows<T::TOKENS, COLUMNS>& activations, u32 bits, int tokens) {
#pragma unroll
        for (int a = 0; a < T::ACROSS; a++) {
            w[a].load([&](int row, int vector) { return weights.at(T::row() + row, 16 * a, vector, bits); });
        }
#pragma unroll
        for (int d = 0; d < T::DOWN; d++) {
            if (T::SKIPS && T::token() + 16 * d >= tokens) continue;
            x[d].load([&](int row, int vector) { return activations.at(T::token() + row, 16 * d, vector, bits); });
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
    sums.clear();
    tokens -= token;
    constexpr int STEP = 2 * HALF_COLUMNS;
    RowCopies<T, T::ROWS, HALF_COLUMNS, true> weights(weight + first * STEP, offset, T::ROWS);
    RowCopies<T, T::TOKENS, HALF_COLUMNS, !T::SKIPS> activations(
        x.row(token) + first * STEP, [&](int i) { return (u32)i * (2 * K); }, tokens);
    weights.begin(tile.stages[0].w, STEP);
    wait_for_previous();
    activations.begin(tile.stages[0].x, STEP);
    weights.finish(tile.stages[0].w);
    activations.finish(tile.stages[0].x);
    end_step_of_copies();
#pragma unroll
    for (int i = 1; i < STAGES; i++) {
        if (first + i < end) {
            weights.begin(tile.stages[i].w, STEP);
            activations.begin(tile.stages[i].x, STEP);
        }
        end_step_of_copies();
    }
    wait_for_copies<STAGES - 1>();
    barrier();
    HalfShares<T> shares[2];
    shares[0].load(tile.stages[0].w, tile.stages[0].x, 0, tokens);
    int now = 0;
#pragma unroll 1
    for (int left = end - first; left > 0; left--) {
        shares[1].load(tile.stages[now].w, tile.stages[now].x, 32, tokens);
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
                weights.begin(tile.stages[now].w, STEP);
                activations.begin(tile.stages[now].x, STEP);
            }
            end_step_of_copies();
            shares[0].load(tile.stages[next].w, tile.stages[next].x, 0, tokens);
        }
        shares[1].template multiply<F>(tokens, sums);
        now = next;
    }
}

// Stores the sums of a tile from row `first` on, of range `range` of the columns; each is to be multiplied by `scale` and its token's.
template <class T, class X>
DEVICE void store_sums(Part part, X x, float scale, int first, int token, int tokens, int range, const typename T::Sums& sums) {
    part.out += (u64)range * tokens * part.rows;
#pragma unroll
    for (int d = 0; d < T::DOWN; d++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int t = token + T::token() + 16 * d + left_row(i);
            const float each = x.scale(least(t, tokens - 1)) * scale;
            for (int a = 0; a < T::ACROSS; a++) store_sum(part, t, first + T::row() + 16 * a + right_row(i), tokens, sums.x[d][a][i] * each);
        }
    }
}

// Of a tile for silu(gate) * up, of whose rows each warp has as many of both weights: the weight of row `row`, and which of the weight's rows it is.
template <class T>
struct OfBoth {
    static constexpr int QUARTER = T::ROWS / 4;
    static DEVICE bool is_up(int row) { return row / QUARTER % 2 != 0; }
    static DEVICE int row(int row) { return row / T::HALF * QUARTER + row % QUARTER; }
};

// Stores silu(gate) * up of its sums by `out`.
template <class T, class X, class Out>
DEVICE void store_swiglu(T& tile, X x, float scale, int first, int rows, int token, int tokens, const typename T::Sums& sums, Out out) {
    barrier();
#pragma unroll
    for (int d = 0; d < T::DOWN; d++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int t = T::token() + 16 * d + left_row(i);
            const float each = x.scale(least(token + t, tokens - 1)) * scale;
            for (int a = 0; a < T::ACROSS / 2; a++) {
                tile.results.x[t][T::row() / 2 + 16 * a + right_row(i)] =
                    silu(sums.x[d][a][i] * each) * (sums.x[d][T::ACROSS / 2 + a][i] * each);
            }
        }
    }
    barrier();
    for (int i = thread(); i < T::TOKENS * T::HALF; i += T::THREADS) {
        const int t = i / T::HALF, r = i % T::HALF;
        const float value[1] = {tile.results.x[t][r]};
        out.store(token + t, first + r, value, token + t < tokens && first + r < rows);
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
    store_sums<T>(part, x, 1, first, token, tokens, range, sums);
}

// As `matmul_swiglu`, for half as many rows as a tile has.
template <class M, class T, int K, class Out>
DEVICE void matmul_halves_swiglu(T& tile, const u8* gate, const u8* up, int rows, Rounded<typename M::Format, K> x, int block, int tokens,
                                 Out out) {
    typedef RowCopies<T, T::ROWS, HALF_COLUMNS, true> Copies;
    const int token = block_x() * T::TOKENS, first = block * T::HALF;
    static_assert(Copies::AT_ONCE % (2 * OfBoth<T>::QUARTER) == 0, "all rows that a thread copies are of one weight");
    const u8* weight = OfBoth<T>::is_up(Copies::row(0)) ? up : gate;
    const auto offset = [&](int i) { return (u32)least(OfBoth<T>::row(i), rows - 1 - first) * (2 * K); };
    typename T::Sums sums;
    sum_half_tile<1>(tile, weight + (u64)first * (2 * K), offset, x, token, tokens, 0, sums);
    store_swiglu(tile, x, 1, first, rows, token, tokens, sums, out);
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
