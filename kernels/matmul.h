// Weights times the activations of many tokens, in tiles: y[t, row] = sum over columns of w[row, column] * x[t, column].
//
// A block takes 128 rows of weights and 64 tokens, and 64 columns at a time: those of one chunk of 64, or of two of 32. Each thread
// unpacks a row's into shared memory as bytes, and loads the next while the warps multiply what is there, each its share of the tile,
// on matrix units where there are some. What is in 8 bits is summed as integers, run by run.
#pragma once
#include "matvec.h"

constexpr int TILE_ROWS = 128, TILE_TOKENS = 64, TILE_COLUMNS = 64, TILE_THREADS = 128;
// Bytes from row to row: no two of eight neighbouring rows share a bank.
constexpr int TILE_STRIDE = TILE_COLUMNS + 16;

// Shared memory of a tile whose scales are of `RUN` columns.
template <int RUN>
struct Tile {
    static constexpr int RUNS = TILE_COLUMNS / RUN;
    alignas(16) u8 w[TILE_ROWS][TILE_STRIDE];
    alignas(16) u8 x[TILE_TOKENS][TILE_STRIDE];
    float scale[RUNS][TILE_ROWS];
    float min[RUNS][TILE_ROWS];
    // Of each run of a token: d and d times the sum of its bytes.
    Pair x_scale[RUNS][TILE_TOKENS];
};

// What a thread has on its way to a tile: chunks of its row, and activations.
template <class F>
struct OnTheWay {
    static constexpr int PARTS = TILE_COLUMNS / F::SPAN, VECTORS = TILE_TOKENS * TILE_COLUMNS / 16 / TILE_THREADS,
                         PAIRS = TILE_TOKENS * (TILE_COLUMNS / F::RUN) / TILE_THREADS;
    typename F::Raw raw[PARTS];
    Words x[VECTORS];
    Pair scales[PAIRS];
};

// The column where run `run` of step `step` begins.
template <class F>
DEVICE int column_of_run(int step, int run) {
    const int chunk = step * (TILE_COLUMNS / F::SPAN) + run / F::GROUPS;
    return chunk / F::CHUNKS * F::BLOCK + F::column(chunk % F::CHUNKS, run % F::GROUPS);
}

template <class F, class L, int K>
DEVICE void load_weights(OnTheWay<F>& to, const u8* weight, int rows, int row, int step) {
    const u64 blocks = (u64)rows * (K / F::BLOCK);
#pragma unroll
    for (int p = 0; p < OnTheWay<F>::PARTS; p++) {
        const int chunk = step * OnTheWay<F>::PARTS + p;
        // A chunk that is none repeats the last; what it meets is zero.
        const int near = least(chunk, K / F::SPAN - 1);
        to.raw[p] = F::template load<L>(weight, blocks, (u64)row * (K / F::BLOCK) + near / F::CHUNKS, near % F::CHUNKS);
    }
}

template <class F, int TOKENS, int K>
DEVICE void load_activations(OnTheWay<F>& to, Quantised<TOKENS, K> x, int token, int tokens, int step) {
    constexpr int IN_ROW = TILE_COLUMNS / 16, RUNS = TILE_COLUMNS / F::RUN;
#pragma unroll
    for (int v = 0; v < OnTheWay<F>::VECTORS; v++) {
        const int i = v * TILE_THREADS + thread(), t = token + i / IN_ROW, part = i % IN_ROW * 16;
        const int column = column_of_run<F>(step, part / F::RUN) + part % F::RUN;
        if (t < tokens && column < K) {
            to.x[v] = *(const Words*)(x.bytes(t) + column);
        } else {
            to.x[v] = {{0, 0, 0, 0}};
        }
    }
#pragma unroll
    for (int p = 0; p < OnTheWay<F>::PAIRS; p++) {
        const int i = p * TILE_THREADS + thread(), t = token + i / RUNS, column = column_of_run<F>(step, i % RUNS);
        if (t < tokens && column < K) {
            to.scales[p] = *(const Pair*)(x.scales(t) + column / 32 * 2);
        } else {
            to.scales[p] = {{0, 0}};
        }
    }
}

template <class F>
DEVICE void store_tile(Tile<F::RUN>& tile, const OnTheWay<F>& from, int step) {
    constexpr int IN_ROW = TILE_COLUMNS / 16, RUNS = TILE_COLUMNS / F::RUN;
    const int row = thread();
#pragma unroll
    for (int p = 0; p < OnTheWay<F>::PARTS; p++) {
        const typename F::Chunk w = F::unpack(from.raw[p], (step * OnTheWay<F>::PARTS + p) % F::CHUNKS);
#pragma unroll
        for (int i = 0; i < F::SPAN / 16; i++) {
            *(Words*)(tile.w[row] + p * F::SPAN + 16 * i) = {{w.q[4 * i], w.q[4 * i + 1], w.q[4 * i + 2], w.q[4 * i + 3]}};
        }
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            tile.scale[p * F::GROUPS + g][row] = w.scale[g];
            if constexpr (F::MIN) tile.min[p * F::GROUPS + g][row] = w.min[g];
        }
    }
#pragma unroll
    for (int v = 0; v < OnTheWay<F>::VECTORS; v++) {
        const int i = v * TILE_THREADS + thread();
        *(Words*)(tile.x[i / IN_ROW] + i % IN_ROW * 16) = from.x[v];
    }
#pragma unroll
    for (int p = 0; p < OnTheWay<F>::PAIRS; p++) {
        const int i = p * TILE_THREADS + thread();
        Pair pair = from.scales[p];
        if constexpr (F::MIN && F::RUN == 16) {
            // Vector `p` of the thread has just the bytes of this run, whose sum is its own.
            int own = 0;
            for (int j = 0; j < 4; j++) own = dot4(0x01010101, from.x[p].x[j], own);
            pair.x[1] = bits_of(float_of(pair.x[0]) * (float)own);
        }
        tile.x_scale[i % RUNS][i / RUNS] = pair;
    }
}

// How the warps share a tile, each in squares of 16 tokens and 16 rows.
constexpr int TILE_WARPS = TILE_THREADS / WARP, WARPS_OF_TOKENS = TILE_WARPS / 2, WARPS_OF_ROWS = 2;
constexpr int DOWN = TILE_TOKENS / WARPS_OF_TOKENS / 16, ACROSS = TILE_ROWS / WARPS_OF_ROWS / 16;
DEVICE int first_token() { return warp() / WARPS_OF_ROWS * DOWN * 16; }
DEVICE int first_row() { return warp() % WARPS_OF_ROWS * ACROSS * 16; }

// What a lane sums.
struct TileSums {
    float x[DOWN][ACROSS][SUMS];
};

// Adds the products of a step.
template <class F>
DEVICE void multiply_tile(const Tile<F::RUN>& tile, int tokens, TileSums& sums) {
#pragma unroll
    for (int run = 0; run < TILE_COLUMNS / F::RUN; run++) {
        Right<F::RUN> w[ACROSS];
        float scale[ACROSS][SUMS], min[ACROSS][SUMS];
#pragma unroll
        for (int a = 0; a < ACROSS; a++) {
            const int row = first_row() + 16 * a;
            w[a].load(tile.w[row] + run * F::RUN, TILE_STRIDE);
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                scale[a][i] = tile.scale[run][row + right_row(i)];
                if constexpr (F::MIN) min[a][i] = tile.min[run][row + right_row(i)];
            }
        }
#pragma unroll
        for (int d = 0; d < DOWN; d++) {
            const int token = first_token() + 16 * d;
            if (token >= tokens) continue;
            Left<F::RUN> x;
            x.load(tile.x[token] + run * F::RUN, TILE_STRIDE);
            Pair pairs[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; i++) pairs[i] = tile.x_scale[run][token + left_row(i)];
#pragma unroll
            for (int a = 0; a < ACROSS; a++) {
                float dots[SUMS];
                multiply_rows<F::RUN>(x, w[a], dots);
#pragma unroll
                for (int i = 0; i < SUMS; i++) {
                    float& sum = sums.x[d][a][i];
                    sum = fused(dots[i] * float_of(pairs[i].x[0]), scale[a][i], sum);
                    if constexpr (F::MIN) sum = fused(-min[a][i], float_of(pairs[i].x[1]), sum);
                }
            }
        }
    }
}

// All products of a tile. The weight and row of thread `i` is what it unpacks.
template <class F, class L, int TOKENS, int K>
DEVICE void sum_tile(Tile<F::RUN>& tile, const u8* weight, int rows, int row, Quantised<TOKENS, K> x, int token, int tokens, TileSums& sums) {
    constexpr int STEPS = (K + TILE_COLUMNS - 1) / TILE_COLUMNS;
#pragma unroll
    for (int d = 0; d < DOWN; d++) {
        for (int a = 0; a < ACROSS; a++) {
            for (int i = 0; i < SUMS; i++) sums.x[d][a][i] = 0;
        }
    }
    OnTheWay<F> next;
    load_weights<F, L, K>(next, weight, rows, row, 0);
    wait_for_previous();
    load_activations<F>(next, x, token, tokens, 0);
    for (int step = 0; step < STEPS; step++) {
        barrier();
        store_tile<F>(tile, next, step);
        barrier();
        if (step + 1 < STEPS) {
            load_weights<F, L, K>(next, weight, rows, row, step + 1);
            load_activations<F>(next, x, token, tokens, step + 1);
        }
        multiply_tile<F>(tile, tokens - token, sums);
    }
}

// One of the weights that share activations, and where its products go.
struct Part {
    const u8* weight;
    int rows;
    const float* bias;
    const float* residual;
    float* out;
};

// Stores y = w x (+ bias) (+ residual) for the rows of block `block` and the tokens from `TILE_TOKENS * block_x()` on.
template <class F, class L, int TOKENS, int K>
DEVICE void matmul(Tile<F::RUN>& tile, Part part, Quantised<TOKENS, K> x, int block, int tokens) {
    const int token = block_x() * TILE_TOKENS, row = block * TILE_ROWS;
    TileSums sums;
    sum_tile<F, L>(tile, part.weight, part.rows, least(row + thread(), part.rows - 1), x, token, tokens, sums);
#pragma unroll
    for (int d = 0; d < DOWN; d++) {
#pragma unroll
        for (int a = 0; a < ACROSS; a++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                const int t = token + first_token() + 16 * d + left_row(i), r = row + first_row() + 16 * a + right_row(i);
                if (t >= tokens || r >= part.rows) continue;
                const u64 at = (u64)t * part.rows + r;
                float y = sums.x[d][a][i];
                if (part.bias) y += part.bias[r];
                if (part.residual) y += part.residual[at];
                part.out[at] = y;
            }
        }
    }
}

// silu(gate) * up for 64 rows of two weights of one format, stored by `out`: each warp has 32 of both.
template <class F, class L, int TOKENS, int K, class Out>
DEVICE void matmul_swiglu(Tile<F::RUN>& tile, const u8* gate, const u8* up, int rows, Quantised<TOKENS, K> x, int block, int tokens, Out out) {
    constexpr int HALF = TILE_ROWS / 2, STRIDE = HALF + 4;
    static_assert(sizeof(float) * TILE_TOKENS * STRIDE <= sizeof(tile), "the results have room where the tile was");
    const int token = block_x() * TILE_TOKENS, first = block * HALF;
    const int row = first + thread() / HALF * 32 + thread() % 32;
    TileSums sums;
    sum_tile<F, L>(tile, thread() / 32 % 2 == 0 ? gate : up, rows, least(row, rows - 1), x, token, tokens, sums);
    barrier();
    float* y = (float*)&tile;
#pragma unroll
    for (int d = 0; d < DOWN; d++) {
#pragma unroll
        for (int a = 0; a < ACROSS / 2; a++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                const int t = first_token() + 16 * d + left_row(i), r = first_row() / 2 + 16 * a + right_row(i);
                y[t * STRIDE + r] = silu(sums.x[d][a][i]) * sums.x[d][ACROSS / 2 + a][i];
            }
        }
    }
    barrier();
    for (int i = thread(); i < TILE_TOKENS * HALF; i += TILE_THREADS) {
        const int t = i / HALF, r = i % HALF;
        const float value[1] = {y[t * STRIDE + r]};
        out.store(token + t, first + r, value, token + t < tokens && first + r < rows);
    }
}

// Floats: activations in 32 bits, or weights that are numbers already. A block takes 64 rows and 64 tokens, and 64 columns at a time; a
// thread sums four rows of eight tokens.
constexpr int FLOAT_TILE = 64, FLOAT_STRIDE = FLOAT_TILE + 4;

struct FloatTile {
    alignas(16) float w[TILE_COLUMNS][FLOAT_STRIDE];
    alignas(16) float x[TILE_COLUMNS][FLOAT_STRIDE];
};

// Columns of a weight in the order in which a tile has them, as numbers.
template <class M>
struct ColumnsOf;
template <class F, class L, int ROWS, int K>
struct ColumnsOf<Matrix<F, L, ROWS, K>> {
    static constexpr int SPAN = F::SPAN;
    static DEVICE int column(int step, int i) { return column_of_run<F>(step, i / F::RUN) + i % F::RUN; }
    template <class Put>
    static DEVICE void unpack(const u8* base, int rows, int row, int chunk, Put put) {
        const u64 block = (u64)row * (K / F::BLOCK) + chunk / F::CHUNKS;
        const auto w = F::unpack(F::template load<L>(base, (u64)rows * (K / F::BLOCK), block, chunk % F::CHUNKS), chunk % F::CHUNKS);
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
            const int g = i / F::RUN;
            float value = w.scale[g] * (float)(i8)(w.q[i / 4] >> (8 * (i % 4)));
            if constexpr (F::MIN) value -= w.min[g];
            put(i, value);
        }
    }
};
template <class F, int ROWS, int K>
struct ColumnsOf<Numbers<F, ROWS, K>> {
    static constexpr int SPAN = 32;
    static DEVICE int column(int step, int i) { return step * TILE_COLUMNS + i; }
    template <class Put>
    static DEVICE void unpack(const u8* base, int, int row, int chunk, Put put) {
        for (int i = 0; i < SPAN; i++) {
            const int k = chunk * SPAN + i;
            put(i, k < K ? F::value(base + ((u64)row * K + k) * F::BYTES) : 0.0f);
        }
    }
};

template <int K>
DEVICE float activation(Floats<K> x, int token, int k) {
    return x.base[(u64)token * K + k];
}
template <int TOKENS, int K>
DEVICE float activation(Quantised<TOKENS, K> x, int token, int k) {
    return x.scales(token)[k / 32 * 2] * (float)*(const i8*)(x.bytes(token) + k);
}

// Sums of a tile of floats. Place `i` of it has row `row_at(i)` of weight `weight_at(i)`; a thread has four places from `thread() % 16 *
// 4` on, and eight tokens from `thread() / 16 * 8` on.
template <class M, class X, class WeightAt, class RowAt>
DEVICE void sum_float_tile(FloatTile& tile, int rows, X x, int token, int tokens, WeightAt weight_at, RowAt row_at, float (&sums)[8][4]) {
    typedef ColumnsOf<M> C;
    constexpr int K = X::WIDTH, PARTS = TILE_COLUMNS / C::SPAN, CHUNKS = (K + C::SPAN - 1) / C::SPAN;
    for (int n = 0; n < 8; n++) {
        for (int r = 0; r < 4; r++) sums[n][r] = 0;
    }
    wait_for_previous();
    for (int step = 0; step * TILE_COLUMNS < K; step++) {
        barrier();
        for (int i = thread(); i < FLOAT_TILE * PARTS; i += TILE_THREADS) {
            const int place = i % FLOAT_TILE, part = i / FLOAT_TILE, chunk = step * PARTS + part;
            const auto put = [&](int column, float value) { tile.w[part * C::SPAN + column][place] = value; };
            if (chunk < CHUNKS) {
                C::unpack(weight_at(place), rows, least(row_at(place), rows - 1), chunk, put);
            } else {
                for (int column = 0; column < C::SPAN; column++) put(column, 0.0f);
            }
        }
        for (int i = thread(); i < FLOAT_TILE * TILE_COLUMNS; i += TILE_THREADS) {
            const int t = i % FLOAT_TILE, at = i / FLOAT_TILE, k = C::column(step, at);
            tile.x[at][t] = token + t < tokens && k < K ? activation(x, token + t, k) : 0.0f;
        }
        barrier();
        for (int k = 0; k < TILE_COLUMNS; k++) {
            const Words w = *(const Words*)&tile.w[k][thread() % 16 * 4];
            const Words a = *(const Words*)&tile.x[k][thread() / 16 * 8], b = *(const Words*)&tile.x[k][thread() / 16 * 8 + 4];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float value = float_of(n < 4 ? a.x[n] : b.x[n - 4]);
#pragma unroll
                for (int r = 0; r < 4; r++) sums[n][r] = fused(float_of(w.x[r]), value, sums[n][r]);
            }
        }
    }
}

// As `matmul`.
template <class M, class X>
DEVICE void matmul_floats(FloatTile& tile, Part part, X x, int block, int tokens) {
    const int token = block_x() * FLOAT_TILE, first = block * FLOAT_TILE;
    float sums[8][4];
    sum_float_tile<M>(
        tile, part.rows, x, token, tokens, [&](int) { return part.weight; }, [&](int place) { return first + place; }, sums);
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = token + thread() / 16 * 8 + n, r = first + thread() % 16 * 4 + i;
            if (t >= tokens || r >= part.rows) continue;
            const u64 at = (u64)t * part.rows + r;
            float y = sums[n][i];
            if (part.bias) y += part.bias[r];
            if (part.residual) y += part.residual[at];
            part.out[at] = y;
        }
    }
}

// As `matmul_swiglu`, for 32 rows: a thread has two rows of both weights.
template <class M, class X, class Out>
DEVICE void matmul_floats_swiglu(FloatTile& tile, const u8* gate, const u8* up, int rows, X x, int block, int tokens, Out out) {
    const int token = block_x() * FLOAT_TILE, first = block * 32;
    float sums[8][4];
    sum_float_tile<M>(
        tile, rows, x, token, tokens, [&](int place) { return place % 4 < 2 ? gate : up; },
        [&](int place) { return first + place / 4 * 2 + place % 2; }, sums);
    barrier();
    float* y = (float*)&tile;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        for (int i = 0; i < 2; i++) y[(thread() / 16 * 8 + n) * 33 + thread() % 16 * 2 + i] = silu(sums[n][i]) * sums[n][2 + i];
    }
    barrier();
    for (int i = thread(); i < FLOAT_TILE * 32; i += TILE_THREADS) {
        const int t = i / 32, r = i % 32;
        const float value[1] = {y[t * 33 + r]};
        out.store(token + t, first + r, value, token + t < tokens && first + r < rows);
    }
}
