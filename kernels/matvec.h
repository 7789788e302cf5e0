// Weights times the activations of a few tokens: y[t, row] = sum over columns of w[row, column] * x[t, column].
//
// Neighbouring lanes share a row: each takes a chunk of its columns, then the next but as many. Chunks that were unpacked, of one row or
// of several that lanes hold at once, meet all tokens of the block, so a weight is read once for `N` tokens. What is done with a row's
// sums is the epilogue's.
#pragma once
#include "quant.h"
#include "reduce.h"

// Lanes of a row of `K` columns: as many as have a chunk of `SPAN`, a power of two.
template <int K, int SPAN>
DEVICE constexpr int lanes_of_row() {
    int lanes = WARP;
    while (lanes > 1 && lanes > K / SPAN) lanes /= 2;
    return lanes;
}

// Float activations `[tokens, K]`.
template <int K>
struct Floats {
    static constexpr int WIDTH = K;
    const float* base;
};

// Adds the products of a chunk of each of `R` rows, whose block begins at column `first`, with one token.
template <class F, int R, int TOKENS, int K>
DEVICE void add_products(const typename F::Chunk (&w)[R], Quantised<TOKENS, K> x, int token, int first, int part, float (&sums)[R]) {
    constexpr int RUN = F::RUN;
    const u8* bytes = x.bytes(token) + first;
    const float* scales = x.scales(token) + first / 32 * 2;
#pragma unroll
    for (int g = 0; g < F::GROUPS; g++) {
        const int column = F::column(part, g);
        u32 q[RUN / 4];
#pragma unroll
        for (int i = 0; i < RUN / 16; i++) {
            const Words words = *(const Words*)(bytes + column + 16 * i);
            for (int j = 0; j < 4; j++) q[4 * i + j] = words.x[j];
        }
        const Pair pair = *(const Pair*)(scales + column / 32 * 2);
        const float d = float_of(pair.x[0]), s = float_of(pair.x[1]);
        int own = 0;
        if constexpr (F::MIN && RUN < 32) {
            for (int i = 0; i < RUN / 4; i++) own = dot4(0x01010101, q[i], own);
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            int dot = 0;
            for (int i = 0; i < RUN / 4; i++) dot = dot4(w[r].q[g * (RUN / 4) + i], q[i], dot);
            sums[r] = fused(d * w[r].scale[g], (float)dot, sums[r]);
            if constexpr (F::MIN && RUN < 32) {
                sums[r] = fused(-d * w[r].min[g], (float)own, sums[r]);
            } else if constexpr (F::MIN) {
                sums[r] = fused(-w[r].min[g], s, sums[r]);
            }
        }
    }
}

template <class F, int R, int K>
DEVICE void add_products(const typename F::Chunk (&w)[R], Floats<K> x, int token, int first, int part, float (&sums)[R]) {
    constexpr int RUN = F::RUN;
    const float* row = x.base + (u64)token * K + first;
    for (int g = 0; g < F::GROUPS; g++) {
        const float* run = row + F::column(part, g);
        float dots[R] = {}, own = 0;
        for (int i = 0; i < RUN; i++) {
            const float value = run[i];
            own += value;
            for (int r = 0; r < R; r++) dots[r] = fused((float)(i8)(w[r].q[(g * RUN + i) / 4] >> (8 * (i % 4))), value, dots[r]);
        }
        for (int r = 0; r < R; r++) {
            sums[r] = fused(w[r].scale[g], dots[r], sums[r]);
            if constexpr (F::MIN) sums[r] = fused(-w[r].min[g], own, sums[r]);
        }
    }
}

// A weight `[ROWS, K]` of blocks, laid out so.
template <class F, class L, int ROWS, int K>
struct Matrix {
    static constexpr int HEIGHT = ROWS, LANES = lanes_of_row<K, F::SPAN>();
    const u8* base;

    // Adds to `sums` the products of row `rows[r]` of each of `R` weights of this kind with `N` tokens, each lane its own columns. Tokens
    // from `tokens` on repeat the first.
    template <int R, int N, class X>
    static DEVICE void multiply(const Matrix (&weights)[R], const int (&rows)[R], X x, int token, int tokens, float (&sums)[N][R]) {
        constexpr int CHUNKS = K / F::SPAN;
        constexpr u64 BLOCKS = (u64)ROWS * (K / F::BLOCK);
        // Chunks of a row that are loaded before the first is used.
        constexpr int AHEAD = N <= 2 && CHUNKS >= 2 * LANES ? 2 : 1;
        for (int c = lane() % LANES; c < CHUNKS; c += LANES * AHEAD) {
            typename F::Raw raw[AHEAD][R];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int chunk = c + a * LANES;
                if (CHUNKS % (LANES * AHEAD) == 0 || chunk < CHUNKS) {
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        const u64 block = (u64)rows[r] * (K / F::BLOCK) + chunk / F::CHUNKS;
                        raw[a][r] = F::template load<L>(weights[r].base, BLOCKS, block, chunk % F::CHUNKS);
                    }
                }
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int chunk = c + a * LANES, part = chunk % F::CHUNKS;
                if (CHUNKS % (LANES * AHEAD) == 0 || chunk < CHUNKS) {
                    typename F::Chunk w[R];
#pragma unroll
                    for (int r = 0; r < R; r++) w[r] = F::unpack(raw[a][r], part);
#pragma unroll
                    for (int n = 0; n < N; n++) {
                        const int t = token + (token + n < tokens ? n : 0);
                        add_products<F, R>(w, x, t, chunk / F::CHUNKS * F::BLOCK, part, sums[n]);
                    }
                }
            }
        }
    }
};

// A weight `[ROWS, K]` of numbers, row after row.
template <class F, int ROWS, int K>
struct Numbers {
    static constexpr int HEIGHT = ROWS, LANES = lanes_of_row<K, 32>();
    const u8* base;

    template <int R, int N, class X>
    static DEVICE void multiply(const Numbers (&weights)[R], const int (&rows)[R], X x, int token, int tokens, float (&sums)[N][R]) {
        for (int k = lane() % LANES; k < K; k += LANES) {
            float w[R];
            for (int r = 0; r < R; r++) w[r] = F::value(weights[r].base + ((u64)rows[r] * K + k) * F::BYTES);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const float value = value_of(x, token + (token + n < tokens ? n : 0), k);
                for (int r = 0; r < R; r++) sums[n][r] = fused(w[r], value, sums[n][r]);
            }
        }
    }

    static DEVICE float value_of(Floats<K> x, int token, int k) { return x.base[(u64)token * K + k]; }
    template <int TOKENS>
    static DEVICE float value_of(Quantised<TOKENS, K> x, int token, int k) {
        return x.scales(token)[k / 32 * 2] * (float)*(const i8*)(x.bytes(token) + k);
    }
};

// The sums of row `rows[r]` of `R` weights over the lanes that share it.
template <int R, int N, class M, class X>
DEVICE void row_sums(const M (&weights)[R], const int (&rows)[R], X x, int token, int tokens, float (&sums)[N][R]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) sums[n][r] = 0;
    }
    M::template multiply<R, N>(weights, rows, x, token, tokens, sums);
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) sums[n][r] = sum_of_lanes<M::LANES>(sums[n][r]);
    }
}

// Stores y = w x (+ bias) (+ residual) for the rows of block `block`, each group of lanes `R` of them, and the tokens from
// `N * block_y()` on.
template <int THREADS, int R, int N, class M, class X>
DEVICE void matvec(M weight, X x, int block, int tokens, const float* bias, const float* residual, float* out) {
    const int first = (block * (THREADS / M::LANES) + thread() / M::LANES) * R, token = block_y() * N;
    M weights[R];
    int rows[R];
    for (int r = 0; r < R; r++) {
        weights[r] = weight;
        // Whole warps come here, so a row that is none repeats the last.
        rows[r] = least(first + r, M::HEIGHT - 1);
    }
    float sums[N][R];
    row_sums<R, N>(weights, rows, x, token, tokens, sums);
    if (lane() % M::LANES != 0) return;
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) {
            if (token + n >= tokens || first + r >= M::HEIGHT) continue;
            const u64 at = (u64)(token + n) * M::HEIGHT + first + r;
            float y = sums[n][r];
            if (bias) y += bias[first + r];
            if (residual) y += residual[at];
            out[at] = y;
        }
    }
}

DEVICE float silu(float x) { return x / (1 + exponential(-x)); }

// The sums of a row of two weights: at once where they are of one kind.
template <int N, class M, class X>
DEVICE void gate_and_up(M gate, M up, int row, X x, int token, int tokens, float (&sums)[N][2]) {
    const M weights[2] = {gate, up};
    const int rows[2] = {row, row};
    row_sums<2, N>(weights, rows, x, token, tokens, sums);
}
template <int N, class G, class U, class X>
DEVICE void gate_and_up(G gate, U up, int row, X x, int token, int tokens, float (&sums)[N][2]) {
    const G gates[1] = {gate};
    const U ups[1] = {up};
    const int rows[1] = {row};
    float a[N][1], b[N][1];
    row_sums<1, N>(gates, rows, x, token, tokens, a);
    row_sums<1, N>(ups, rows, x, token, tokens, b);
    for (int n = 0; n < N; n++) sums[n][0] = a[n][0], sums[n][1] = b[n][0];
}

// silu(gate) * up for 32 rows of both, which have one format or two, stored by `out`.
template <int THREADS, int N, class G, class U, class X, class Out>
DEVICE void matvec_swiglu(G gate, U up, X x, int block, int tokens, Out out) {
    constexpr int LANES = G::LANES < U::LANES ? G::LANES : U::LANES;
    static_assert(G::LANES == U::LANES, "rows of gate and up are shared by as many lanes");
    constexpr int AT_ONCE = THREADS / LANES, STEPS = (32 + AT_ONCE - 1) / AT_ONCE;
    __shared__ float y[N][32];
    const int token = block_y() * N;
    for (int step = 0; step < STEPS; step++) {
        const int r = step * AT_ONCE + thread() / LANES, row = least(block * 32 + r, G::HEIGHT - 1);
        float sums[N][2];
        gate_and_up<N>(gate, up, row, x, token, tokens, sums);
        if (r < 32 && lane() % LANES == 0) {
#pragma unroll
            for (int n = 0; n < N; n++) y[n][r] = silu(sums[n][0]) * sums[n][1];
        }
    }
    barrier();
    for (int n = thread() / 32; n < N; n += THREADS / 32) {
        const int row = block * 32 + thread() % 32;
        // Lanes of a warp that have a token that is none go along.
        const int t = least(token + n, tokens - 1);
        out.store(t, row, y[t - token < N ? t - token : 0][thread() % 32], row < G::HEIGHT);
    }
}

// The best of the rows of a block for each token, to `values` and `indices` `[tokens, BLOCKS]`.
template <int THREADS, int N, int BLOCKS, int EACH, class M, class X>
DEVICE void matvec_best(M weight, X x, int block, int tokens, const float* bias, float* values, i32* indices) {
    constexpr int GROUPS = THREADS / M::LANES;
    __shared__ float best_value[GROUPS][N];
    __shared__ i32 best_index[GROUPS][N];
    const int token = block_y() * N, group = thread() / M::LANES;
    Best best[N];
#pragma unroll
    for (int n = 0; n < N; n++) best[n] = {-INFINITE, NONE};
    for (int e = 0; e < EACH; e++) {
        const int row = (block * EACH + e) * GROUPS + group;
        const M weights[1] = {weight};
        const int rows[1] = {least(row, M::HEIGHT - 1)};
        float sums[N][1];
        row_sums<1, N>(weights, rows, x, token, tokens, sums);
        if (row < M::HEIGHT) {
#pragma unroll
            for (int n = 0; n < N; n++) best[n].take(sums[n][0] + (bias ? bias[row] : 0.0f), row);
        }
    }
    if (lane() % M::LANES == 0) {
#pragma unroll
        for (int n = 0; n < N; n++) best_value[group][n] = best[n].value, best_index[group][n] = best[n].index;
    }
    barrier();
    for (int n = thread(); n < N && token + n < tokens; n += THREADS) {
        Best all = {-INFINITE, NONE};
        for (int g = 0; g < GROUPS; g++) all.take(best_value[g][n], best_index[g][n]);
        values[(u64)(token + n) * BLOCKS + block] = all.value;
        indices[(u64)(token + n) * BLOCKS + block] = all.index;
    }
}
