// Weights times the activations of many tokens, in tiles: y[t, row] = sum over columns of w[row, column] * x[t, column].
//
// A thread unpacks 64 columns of a row at a time, those of one chunk of 64 or of two of 32, into shared memory as bytes, and loads the
// next while the warps multiply what is there, each its share of the tile, on matrix units where there are some. What is in 8 bits is
// summed as integers, run by run.
//
// A tile is of 64 tokens and, `WIDE`, of 128 rows and 64 columns. Of few tokens there are too few of those to keep a GPU busy: `NARROW` it
// is of 32 rows and 256 columns, of which each warp has a part, and the sums of the parts are added at the end.
#pragma once
#include "matvec.h"

constexpr int TILE_TOKENS = 64, TILE_COLUMNS = 64, TILE_THREADS = 128;
// Parts of 64 columns.
constexpr int WIDE = 1, NARROW = 4;
// Bytes from row to row: no two of eight neighbouring rows share a bank.
constexpr int TILE_STRIDE = TILE_COLUMNS + 16;

// How the warps share a tile of `PARTS` parts, each in squares of 16 tokens and 16 rows: in four quarters, or part by part.
template <int PARTS>
struct Division {
    static constexpr int WARPS = TILE_THREADS / WARP, ROWS = TILE_THREADS / PARTS, WARPS_OF_ROWS = PARTS == WIDE ? 2 : 1,
                         WARPS_OF_TOKENS = PARTS == WIDE ? WARPS / 2 : 1, WARPS_OF_PARTS = PARTS == WIDE ? 1 : WARPS;
    static constexpr int DOWN = TILE_TOKENS / WARPS_OF_TOKENS / 16, ACROSS = ROWS / WARPS_OF_ROWS / 16;
    static DEVICE int token() { return PARTS == WIDE ? warp() / WARPS_OF_ROWS * DOWN * 16 : 0; }
    static DEVICE int row() { return PARTS == WIDE ? warp() % WARPS_OF_ROWS * ACROSS * 16 : 0; }
    // Parts of this warp.
    static constexpr int EACH = PARTS / WARPS_OF_PARTS;
    static DEVICE int part() { return PARTS == WIDE ? 0 : warp() * EACH; }
};

// Shared memory of a tile whose scales are of `RUN` columns. Thread `i` fills row `i` of weights: row `i % ROWS` of part `i / ROWS`.
template <int RUN, int PARTS>
struct Tile {
    static constexpr int RUNS = TILE_COLUMNS / RUN;
    alignas(16) u8 w[TILE_THREADS][TILE_STRIDE];
    alignas(16) u8 x[PARTS][TILE_TOKENS][TILE_STRIDE];
    float scale[RUNS][TILE_THREADS];
    float min[RUNS][TILE_THREADS];
    // Of each run of a token: d and d times the sum of its bytes.
    Pair x_scale[PARTS][RUNS][TILE_TOKENS];
};

// What a thread has on its way to a tile: chunks of its row, and activations of each part.
template <class F, int PARTS>
struct OnTheWay {
    static constexpr int CHUNKS = TILE_COLUMNS / F::SPAN, VECTORS = TILE_TOKENS * TILE_COLUMNS / 16 / TILE_THREADS,
                         PAIRS = TILE_TOKENS * (TILE_COLUMNS / F::RUN) / TILE_THREADS;
    typename F::Raw raw[CHUNKS];
    Words x[PARTS][VECTORS];
    Pair scales[PARTS][PAIRS];
};

// The column where run `run` of 64 columns begins, those that are number `step`.
template <class F>
DEVICE int column_of_run(int step, int run) {
    const int chunk = step * (TILE_COLUMNS / F::SPAN) + run / F::GROUPS;
    return chunk / F::CHUNKS * F::BLOCK + F::column(chunk % F::CHUNKS, run % F::GROUPS);
}

template <class F, class L, int K>
DEVICE void load_weights(typename F::Raw (&to)[TILE_COLUMNS / F::SPAN], const u8* weight, int rows, int row, int step) {
    constexpr int CHUNKS = TILE_COLUMNS / F::SPAN;
    const u64 blocks = (u64)rows * (K / F::BLOCK);
#pragma unroll
    for (int p = 0; p < CHUNKS; p++) {
        const int chunk = step * CHUNKS + p;
        // A chunk that is none repeats the last; what it meets is zero.
        const int near = least(chunk, K / F::SPAN - 1);
        to[p] = F::template load<L>(weight, blocks, (u64)row * (K / F::BLOCK) + near / F::CHUNKS, near % F::CHUNKS);
    }
}

template <class F, int PARTS, int TOKENS, int K>
DEVICE void load_activations(OnTheWay<F, PARTS>& to, Quantised<TOKENS, K> x, int token, int tokens, int step) {
    constexpr int IN_ROW = TILE_COLUMNS / 16, RUNS = TILE_COLUMNS / F::RUN;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int v = 0; v < OnTheWay<F, PARTS>::VECTORS; v++) {
            const int i = v * TILE_THREADS + thread(), t = token + i / IN_ROW, in_row = i % IN_ROW * 16;
            const int column = column_of_run<F>(step * PARTS + part, in_row / F::RUN) + in_row % F::RUN;
            if (t < tokens && column < K) {
                to.x[part][v] = *(const Words*)(x.bytes(t) + column);
            } else {
                to.x[part][v] = {{0, 0, 0, 0}};
            }
        }
#pragma unroll
        for (int p = 0; p < OnTheWay<F, PARTS>::PAIRS; p++) {
            const int i = p * TILE_THREADS + thread(), t = token + i / RUNS;
            const int column = column_of_run<F>(step * PARTS + part, i % RUNS);
            if (t < tokens && column < K) {
                to.scales[part][p] = *(const Pair*)(x.scales(t) + column / 32 * 2);
            } else {
                to.scales[part][p] = {{0, 0}};
            }
        }
    }
}

// `step` is that of the 64 columns of the thread's row.
template <class F, int PARTS>
DEVICE void store_tile(Tile<F::RUN, PARTS>& tile, const OnTheWay<F, PARTS>& from, int step) {
    constexpr int IN_ROW = TILE_COLUMNS / 16, RUNS = TILE_COLUMNS / F::RUN, CHUNKS = OnTheWay<F, PARTS>::CHUNKS;
    const int row = thread();
#pragma unroll
    for (int p = 0; p < CHUNKS; p++) {
        const typename F::Chunk w = F::unpack(from.raw[p], (step * CHUNKS + p) % F::CHUNKS);
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
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int v = 0; v < OnTheWay<F, PARTS>::VECTORS; v++) {
            const int i = v * TILE_THREADS + thread();
            *(Words*)(tile.x[part][i / IN_ROW] + i % IN_ROW * 16) = from.x[part][v];
        }
#pragma unroll
        for (int p = 0; p < OnTheWay<F, PARTS>::PAIRS; p++) {
            const int i = p * TILE_THREADS + thread();
            Pair pair = from.scales[part][p];
            if constexpr (F::MIN && F::RUN == 16) {
                // Vector `p` of the thread has just the bytes of this run, whose sum is its own.
                int own = 0;
                for (int j = 0; j < 4; j++) own = dot4(0x01010101, from.x[part][p].x[j], own);
                pair.x[1] = bits_of(float_of(pair.x[0]) * (float)own);
            }
            tile.x_scale[part][i % RUNS][i / RUNS] = pair;
        }
    }
}

// What a lane sums.
template <int PARTS>
struct TileSums {
    typedef Division<PARTS> S;
    float x[S::DOWN][S::ACROSS][SUMS];

    // Each sum, with its token and row in the tile.
    template <class Put>
    DEVICE void each(const Put& put) const {
#pragma unroll
        for (int d = 0; d < S::DOWN; d++) {
#pragma unroll
            for (int a = 0; a < S::ACROSS; a++) {
#pragma unroll
                for (int i = 0; i < SUMS; i++) put(S::token() + 16 * d + left_row(i), S::row() + 16 * a + right_row(i), x[d][a][i]);
            }
        }
    }
};

// Adds the products of a step.
template <class F, int PARTS>
DEVICE void multiply_tile(const Tile<F::RUN, PARTS>& tile, int tokens, TileSums<PARTS>& sums) {
    typedef Division<PARTS> S;
    constexpr int AT = least(S::ACROSS, SQUARES_AT_ONCE);
#pragma unroll
    for (int i = 0; i < S::EACH * Tile<F::RUN, PARTS>::RUNS; i++) {
        const int part = S::part() + i / Tile<F::RUN, PARTS>::RUNS, run = i % Tile<F::RUN, PARTS>::RUNS;
#pragma unroll
        for (int first = 0; first < S::ACROSS; first += AT) {
            Right<F::RUN> w[AT];
            float scale[AT][SUMS], min[AT][SUMS];
#pragma unroll
            for (int a = 0; a < AT; a++) {
                const int row = part * S::ROWS + S::row() + 16 * (first + a);
                w[a].load(tile.w[row] + run * F::RUN, TILE_STRIDE);
#pragma unroll
                for (int i = 0; i < SUMS; i++) {
                    scale[a][i] = tile.scale[run][row + right_row(i)];
                    if constexpr (F::MIN) min[a][i] = tile.min[run][row + right_row(i)];
                }
            }
#pragma unroll
            for (int d = 0; d < S::DOWN; d++) {
                const int token = S::token() + 16 * d;
                if (token >= tokens) continue;
                Left<F::RUN> x;
                x.load(tile.x[part][token] + run * F::RUN, TILE_STRIDE);
                Pair pairs[SUMS];
#pragma unroll
                for (int i = 0; i < SUMS; i++) pairs[i] = tile.x_scale[part][run][token + left_row(i)];
#pragma unroll
                for (int a = 0; a < AT; a++) {
                    float dots[SUMS];
                    multiply_rows<F::RUN>(x, w[a], dots);
#pragma unroll
                    for (int i = 0; i < SUMS; i++) {
                        float& sum = sums.x[d][first + a][i];
                        sum = fused(dots[i] * float_of(pairs[i].x[0]), scale[a][i], sum);
                        if constexpr (F::MIN) sum = fused(-min[a][i], float_of(pairs[i].x[1]), sum);
                    }
                }
            }
        }
    }
}

// All products of a tile. The weight and row of thread `i` is what it unpacks.
template <class F, class L, int PARTS, int TOKENS, int K>
DEVICE void sum_tile(Tile<F::RUN, PARTS>& tile, const u8* weight, int rows, int row, Quantised<TOKENS, K> x, int token, int tokens,
                     TileSums<PARTS>& sums) {
    typedef Division<PARTS> S;
    constexpr int STEPS = (K + TILE_COLUMNS * PARTS - 1) / (TILE_COLUMNS * PARTS);
    const int part = thread() / S::ROWS;
#pragma unroll
    for (int d = 0; d < S::DOWN; d++) {
        for (int a = 0; a < S::ACROSS; a++) {
            for (int i = 0; i < SUMS; i++) sums.x[d][a][i] = 0;
        }
    }
    OnTheWay<F, PARTS> next;
    load_weights<F, L, K>(next.raw, weight, rows, row, part);
    wait_for_previous();
    load_activations<F>(next, x, token, tokens, 0);
    for (int step = 0; step < STEPS; step++) {
        barrier();
        store_tile<F>(tile, next, step * PARTS + part);
        barrier();
        if (step + 1 < STEPS) {
            load_weights<F, L, K>(next.raw, weight, rows, row, (step + 1) * PARTS + part);
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

// y = w x (+ bias) (+ residual) of a token and row.
DEVICE void store_sum(Part part, int token, int row, int tokens, float y) {
    if (token >= tokens || row >= part.rows) return;
    const u64 at = (u64)token * part.rows + row;
    if (part.bias) y += part.bias[row];
    if (part.residual) y += part.residual[at];
    part.out[at] = y;
}

// Stores the rows of block `block` and the tokens from `TILE_TOKENS * block_x()` on.
template <class F, class L, int PARTS, int TOKENS, int K>
DEVICE void matmul(Tile<F::RUN, PARTS>& tile, Part part, Quantised<TOKENS, K> x, int block, int tokens) {
    typedef Division<PARTS> S;
    const int token = block_x() * TILE_TOKENS, row = block * S::ROWS;
    TileSums<PARTS> sums;
    sum_tile<F, L>(tile, part.weight, part.rows, least(row + thread() % S::ROWS, part.rows - 1), x, token, tokens, sums);
    if constexpr (PARTS == WIDE) {
        sums.each([&](int t, int r, float y) { store_sum(part, token + t, row + r, tokens, y); });
    } else {
        constexpr int STRIDE = S::ROWS + 1;
        static_assert(sizeof(float) * S::WARPS * TILE_TOKENS * STRIDE <= sizeof(tile), "the sums have room where the tile was");
        barrier();
        float* of_warps = (float*)&tile;
        sums.each([&](int t, int r, float y) { of_warps[(warp() * TILE_TOKENS + t) * STRIDE + r] = y; });
        barrier();
        for (int i = thread(); i < TILE_TOKENS * S::ROWS; i += TILE_THREADS) {
            const int t = i / S::ROWS, r = i % S::ROWS;
            float y = 0;
            for (int w = 0; w < S::WARPS; w++) y += of_warps[(w * TILE_TOKENS + t) * STRIDE + r];
            store_sum(part, token + t, row + r, tokens, y);
        }
    }
}

// silu(gate) * up for 64 rows of two weights of one format, stored by `out`: each warp has 32 of both.
template <class F, class L, int TOKENS, int K, class Out>
DEVICE void matmul_swiglu(Tile<F::RUN, WIDE>& tile, const u8* gate, const u8* up, int rows, Quantised<TOKENS, K> x, int block, int tokens,
                          Out out) {
    typedef Division<WIDE> S;
    constexpr int HALF = S::ROWS / 2, STRIDE = HALF + 4;
    static_assert(sizeof(float) * TILE_TOKENS * STRIDE <= sizeof(tile), "the results have room where the tile was");
    const int token = block_x() * TILE_TOKENS, first = block * HALF;
    const int row = first + thread() / HALF * 32 + thread() % 32;
    TileSums<WIDE> sums;
    sum_tile<F, L>(tile, thread() / 32 % 2 == 0 ? gate : up, rows, least(row, rows - 1), x, token, tokens, sums);
    barrier();
    float* y = (float*)&tile;
#pragma unroll
    for (int d = 0; d < S::DOWN; d++) {
#pragma unroll
        for (int a = 0; a < S::ACROSS / 2; a++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                const int t = S::token() + 16 * d + left_row(i), r = S::row() / 2 + 16 * a + right_row(i);
                y[t * STRIDE + r] = silu(sums.x[d][a][i]) * sums.x[d][S::ACROSS / 2 + a][i];
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
            store_sum(part, token + thread() / 16 * 8 + n, first + thread() % 16 * 4 + i, tokens, sums[n][i]);
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
