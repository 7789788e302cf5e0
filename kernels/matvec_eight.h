// Weights times the activations of up to eight tokens on matrix units: y[t, row] = sum over columns of w[row, column] * x[t, column].
//
// A warp goes over slices of 256 columns. What it has of a slice's activations stays in registers while it multiplies the weights of several
// tiles of sixteen rows with them, which come from memory as its lanes take them, each while the one before is multiplied. The warps of
// a block share its rows, slice by slice, and their sums are added at the end. What is done with a row's sums is the epilogue's.
#pragma once
#include "matvec.h"
#include "quads.h"

constexpr int EIGHT = 8, TILE = 16;

// Shared memory of a warp: of each run of its slice what a step and all of them together are, of all tokens; then its sums.
template <int TILES>
union EightRoom {
    alignas(16) Pair scales[QUAD_RUNS][EIGHT];
    float sums[TILES][EIGHT][TILE];
};

// Activations of a slice: of this lane's token its columns, and of all tokens the scales. Tokens from `tokens` on repeat the first.
template <int BYTES>
struct Slice {
    u32 q[QUAD_RUNS][BYTES][2];
    template <int TOKENS, int K>
    DEVICE void load(Quantised<TOKENS, K, BYTES> x, int slice, int tokens, Pair (&scales)[QUAD_RUNS][EIGHT]) {
        const int own = lane() / 4, t = own < tokens ? own : 0;
#pragma unroll
        for (int byte = 0; byte < BYTES; byte++) {
            const u8* from = x.bytes(t, byte) + slice * QUAD_COLUMNS + of_quad() * 8;
#pragma unroll
            for (int r = 0; r < QUAD_RUNS; r++) {
                const Pair words = *(const Pair*)(from + 32 * r);
                for (int i = 0; i < 2; i++) q[r][byte][i] = words.x[i];
            }
        }
        const Words two = *(const Words*)(x.scales(t) + (slice * QUAD_RUNS + 2 * of_quad()) * 2);
        // All have read what was there.
        warp_barrier();
        for (int i = 0; i < 2; i++) scales[2 * of_quad() + i][own] = {{bits_of(step_of<BYTES>(float_of(two.x[2 * i]))), two.x[2 * i + 1]}};
        warp_barrier();
    }
};

// Adds the products of a slice of rows `g` and `g + 8` of a tile with all tokens.
template <class F, int BYTES>
DEVICE void multiply_slice(const Quad<F> (&w)[2], const Slice<BYTES>& x, const Pair (&scales)[QUAD_RUNS][EIGHT], float (&sums)[4]) {
    typedef Quad<F> Q;
    float products[4] = {}, minima[4] = {};
#pragma unroll
    for (int r = 0; r < QUAD_RUNS; r++) {
        const u32 left[4] = {w[0].word(r, 0), w[1].word(r, 0), w[0].word(r, 1), w[1].word(r, 1)};
        // Two lanes of four have the first half of a run, and two its last.
        const bool is_first = of_quad() < 2;
        float dots[2][4];
#pragma unroll
        for (int half = 0; half < (Q::HALVES ? 2 : 1); half++) {
            float of_bytes[BYTES][4];
#pragma unroll
            for (int byte = 0; byte < BYTES; byte++) {
                u32 right[2];
                for (int i = 0; i < 2; i++) right[i] = !Q::HALVES || is_first == (half == 0) ? x.q[r][byte][i] : 0;
                multiply_eight(left, right, of_bytes[byte]);
            }
            for (int i = 0; i < 4; i++) {
                dots[half][i] = of_bytes[BYTES - 1][i];
                if constexpr (BYTES == 2) dots[half][i] = fused((float)FINE_STEPS, of_bytes[0][i], dots[half][i]);
            }
        }
        const Words of = *(const Words*)&scales[r][2 * of_quad()];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float step = float_of(of.x[i % 2 * 2]), sum = float_of(of.x[i % 2 * 2 + 1]);
            if constexpr (Q::HALVES) {
                products[i] = fused(fused(dots[1][i], w[i / 2].scale(2 * r + 1), dots[0][i] * w[i / 2].scale(2 * r)), step, products[i]);
            } else {
                products[i] = fused(dots[0][i] * step, w[i / 2].scale(r), products[i]);
            }
            if constexpr (Q::MIN) minima[i] = fused(w[i / 2].min(r), sum, minima[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i] = fused(w[i / 2].unit(), products[i], sums[i]);
        if constexpr (Q::MIN) sums[i] = fused(-w[i / 2].min_unit(), minima[i], sums[i]);
    }
}

// The sums of `TILES` tiles over every `W`-th slice from this warp's on, to its room. Tile `i` is of weight `base_of(i)`, whose row `row_of(i)` is its
// first; a row that is none repeats the last.
template <int W, class F, int ROWS, int K, int TILES, class X, class BaseOf, class RowOf>
DEVICE void sum_tiles(EightRoom<TILES>& room, X x, int tokens, int share, const BaseOf& base_of, const RowOf& row_of) {
    static_assert(K % QUAD_COLUMNS == 0, "rows are whole slices");
    constexpr int SLICES = K / QUAD_COLUMNS;
    constexpr u64 BLOCKS = (u64)ROWS * (K / F::BLOCK);
    // One tile ahead: more would not fit the registers.
    Quad<F> next[2];
    const auto load = [&](int slice, int tile) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = least(row_of(tile) + lane() / 4 + 8 * h, ROWS - 1);
            next[h].load(base_of(tile), BLOCKS, (u32)(row * SLICES + slice) * (QUAD_COLUMNS / F::BLOCK));
        }
    };
    float sums[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        for (int i = 0; i < 4; i++) sums[tile][i] = 0;
    }
    load(least(share, SLICES - 1), 0);
    wait_for_previous();
    for (int slice = share; slice < SLICES; slice += W) {
        Slice<X::OF_EACH> of;
        of.load(x, slice, tokens, room.scales);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            multiply_slice<F>(next, of, room.scales, sums[tile]);
            if (tile + 1 < TILES) {
                load(slice, tile + 1);
            } else if (slice + W < SLICES) {
                load(slice + W, 0);
            }
        }
    }
    // All have read the scales.
    warp_barrier();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        for (int i = 0; i < 4; i++) room.sums[tile][2 * of_quad() + i % 2][lane() / 4 + i / 2 * 8] = sums[tile][i];
    }
}

// What all warps have of a row and token.
template <int W, int TILES>
DEVICE float sum_of_warps(const EightRoom<TILES> (&rooms)[W], int tile, int token, int row) {
    float y = 0;
#pragma unroll
    for (int w = 0; w < W; w++) y += rooms[w].sums[tile][token][row];
    return y;
}

// Stores y = w x (+ bias) (+ residual) for `TILES` tiles of rows, those of block `block`.
template <class F, class L, int ROWS, int K, int W, int TILES, class X>
DEVICE void matvec_eight(EightRoom<TILES> (&rooms)[W], Matrix<F, L, ROWS, K> weight, X x, int block, int tokens, const float* bias,
                         const float* residual, float* out) {
    constexpr int OF_BLOCK = TILES * TILE;
    const int first = block * OF_BLOCK;
    sum_tiles<W, F, ROWS, K>(
        rooms[warp()], x, tokens, warp(), [&](int) { return weight.base; }, [&](int tile) { return first + tile * TILE; });
    barrier();
    for (int i = thread(); i < EIGHT * OF_BLOCK; i += W * WARP) {
        const int t = i / OF_BLOCK, own = i % OF_BLOCK, row = first + own;
        if (t >= tokens || row >= ROWS) continue;
        const u64 at = (u64)t * ROWS + row;
        float y = sum_of_warps(rooms, own / TILE, t, own % TILE);
        if (bias) y += bias[row];
        if (residual) y += residual[at];
        out[at] = y;
    }
}

// silu(gate) * up for 32 rows of both, which have one format and may have biases, stored by `out`.
template <class F, class L, int ROWS, int K, int W, class X, class Out>
DEVICE void matvec_eight_swiglu(EightRoom<4> (&rooms)[W], Matrix<F, L, ROWS, K> gate, Matrix<F, L, ROWS, K> up, const float* gate_bias,
                                const float* up_bias, X x, int block, int tokens, Out out) {
    sum_tiles<W, F, ROWS, K>(
        rooms[warp()], x, tokens, warp(), [&](int tile) { return tile < 2 ? gate.base : up.base; },
        [&](int tile) { return block * 32 + tile % 2 * TILE; });
    barrier();
    for (int n = warp(); n < EIGHT; n += W) {
        const int own = lane(), row = block * 32 + own;
        // Rows are whole runs of 32 where lanes quantise together.
        if (n < tokens && row < ROWS) {
            float g = sum_of_warps(rooms, own / TILE, n, own % TILE), u = sum_of_warps(rooms, 2 + own / TILE, n, own % TILE);
            if (gate_bias) g += gate_bias[row];
            if (up_bias) u += up_bias[row];
            const float value[1] = {silu(g) * u};
            out.store(n, row, value);
        }
    }
}
