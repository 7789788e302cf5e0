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

// What a chunk meets of one token: bytes of its runs, and d and the sum of each 32.
template <class F, int TOKENS, int K, int BYTES>
struct Meets {
    u32 q[BYTES][F::SPAN / 4];
    Pair scales[F::GROUPS];

    // The block of the chunk begins at column `first`.
    DEVICE void load(Quantised<TOKENS, K, BYTES> x, int token, int first, int part) {
        const float* of_blocks = x.scales(token) + first / 32 * 2;
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            const int column = F::column(part, g);
#pragma unroll
            for (int byte = 0; byte < BYTES; byte++) {
                const u8* bytes = x.bytes(token, byte) + first + column;
#pragma unroll
                for (int i = 0; i < F::RUN / 16; i++) {
                    const Words words = *(const Words*)(bytes + 16 * i);
                    for (int j = 0; j < 4; j++) q[byte][g * (F::RUN / 4) + 4 * i + j] = words.x[j];
                }
            }
            scales[g] = *(const Pair*)(of_blocks + column / 32 * 2);
        }
    }

    // The sum of a run's numbers times bytes of `w(word)`, in steps of the last byte.
    template <class W>
    DEVICE int dot(int g, W w) const {
        constexpr int WORDS = F::RUN / 4;
        int sums[BYTES] = {};
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
#pragma unroll
            for (int byte = 0; byte < BYTES; byte++) sums[byte] = dot4(w(i), q[byte][g * WORDS + i], sums[byte]);
        }
        return in_steps(sums);
    }

    // Adds the products with a chunk of each of `R` rows.
    template <int R>
    DEVICE void add_products(const typename F::Chunk (&w)[R], float (&sums)[R]) const {
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            const float step = step_of<BYTES>(float_of(scales[g].x[0])), s = float_of(scales[g].x[1]);
            int own = 0;
            if constexpr (F::MIN && F::RUN < 32) own = dot(g, [](int) { return 0x01010101u; });
#pragma unroll
            for (int r = 0; r < R; r++) {
                const int products = dot(g, [&](int i) { return w[r].q[g * (F::RUN / 4) + i]; });
                sums[r] = fused(step * w[r].scale[g], (float)products, sums[r]);
                if constexpr (F::MIN && F::RUN < 32) {
                    sums[r] = fused(-step * w[r].min[g], (float)own, sums[r]);
                } else if constexpr (F::MIN) {
                    sums[r] = fused(-w[r].min[g], s, sums[r]);
                }
            }
        }
    }

    // Those of `N` tokens, one after another. Tokens from `tokens` on repeat the first.
    template <int R, int N>
    static DEVICE void add_products_of(const typename F::Chunk (&w)[R], Quantised<TOKENS, K, BYTES> x, int token, int tokens, int first, int part,
                                       float (&sums)[N][R]) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            Meets meets;
            meets.load(x, token + (token + n < tokens ? n : 0), first, part);
            meets.template add_products<R>(w, sums[n]);
        }
    }
};

// The same of float activations, which are loaded as they are met.
template <class F, int K>
struct MeetsFloats {
    const float* block;
    int part;

    DEVICE void load(Floats<K> x, int token, int first, int of_part) {
        block = x.base + (u64)token * K + first;
        part = of_part;
    }

    template <int R>
    DEVICE void add_products(const typename F::Chunk (&w)[R], float (&sums)[R]) const {
        for (int g = 0; g < F::GROUPS; g++) {
            const float* run = block + F::column(part, g);
            float dots[R] = {}, own = 0;
            for (int i = 0; i < F::RUN; i++) {
                const float value = run[i];
                own += value;
                const int at = g * F::RUN + i;
                for (int r = 0; r < R; r++) dots[r] = fused((float)(i8)(w[r].q[at / 4] >> (8 * (at % 4))), value, dots[r]);
            }
            for (int r = 0; r < R; r++) {
                sums[r] = fused(w[r].scale[g], dots[r], sums[r]);
                if constexpr (F::MIN) sums[r] = fused(-w[r].min[g], own, sums[r]);
            }
        }
    }

    // Of several tokens at once, column by column: a weight that is a number now takes four times the registers it took as a byte.
    template <int R, int N>
    static DEVICE void add_products_of(const typename F::Chunk (&w)[R], Floats<K> x, int token, int tokens, int first, int part,
                                       float (&sums)[N][R]) {
        // What rows that come later meet too would else be kept, of all tokens.
        forget_loads();
        const float* blocks[N];
        for (int n = 0; n < N; n++) blocks[n] = x.base + (u64)(token + (token + n < tokens ? n : 0)) * K + first;
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            float dots[N][R] = {}, own[N] = {};
#pragma unroll
            for (int i = 0; i < F::RUN; i += 4) {
                float weights[R][4];
                for (int r = 0; r < R; r++) {
                    for (int j = 0; j < 4; j++) weights[r][j] = (float)(i8)(w[r].q[(g * F::RUN + i) / 4] >> (8 * j));
                }
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const Words words = *(const Words*)(blocks[n] + F::column(part, g) + i);
                    for (int j = 0; j < 4; j++) {
                        const float value = float_of(words.x[j]);
                        own[n] += value;
                        for (int r = 0; r < R; r++) dots[n][r] = fused(weights[r][j], value, dots[n][r]);
                    }
                }
            }
            for (int n = 0; n < N; n++) {
                for (int r = 0; r < R; r++) {
                    sums[n][r] = fused(w[r].scale[g], dots[n][r], sums[n][r]);
                    if constexpr (F::MIN) sums[n][r] = fused(-w[r].min[g], own[n], sums[n][r]);
                }
            }
        }
    }
};

// Which of these it is.
template <class F, class X>
struct MeetsOf;
template <class F, int TOKENS, int K, int BYTES>
struct MeetsOf<F, Quantised<TOKENS, K, BYTES>> {
    typedef Meets<F, TOKENS, K, BYTES> Type;
};
template <class F, int K>
struct MeetsOf<F, Floats<K>> {
    typedef MeetsFloats<F, K> Type;
};

// A weight `[ROWS, K]` of blocks, laid out so.
template <class F, class L, int ROWS, int K>
struct Matrix {
    static constexpr int HEIGHT = ROWS, LANES = lanes_of_row<K, F::SPAN>();
    const u8* base;

    // Adds to `sums` the products of row `rows[r]` of each of `R` weights of this kind with `N` tokens, each lane of `W` warps its own
    // columns. Tokens from `tokens` on repeat the first.
    template <int W, int R, int N, class X>
    static DEVICE void multiply(const Matrix (&weights)[R], const int (&rows)[R], X x, int token, int tokens, float (&sums)[N][R]) {
        constexpr int CHUNKS = K / F::SPAN, SHARING = LANES * W;
        constexpr u64 BLOCKS = (u64)ROWS * (K / F::BLOCK);
        // Chunks of a row that are loaded before the first is used: small ones of a lone row are too few bytes on their way.
        constexpr int AHEAD = F::SPAN == 32 && R == 1 && N == 1 && CHUNKS >= 2 * SHARING ? 2 : 1;
        bool is_first = true;
        for (int c = thread() % SHARING; c < CHUNKS; c += SHARING * AHEAD) {
            typename F::Raw raw[AHEAD][R];
            typename MeetsOf<F, X>::Type meets[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int chunk = c + a * SHARING;
                if (CHUNKS % (SHARING * AHEAD) == 0 || chunk < CHUNKS) {
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        const u64 block = (u64)rows[r] * (K / F::BLOCK) + chunk / F::CHUNKS;
                        raw[a][r] = F::template load<L>(weights[r].base, BLOCKS, block, chunk % F::CHUNKS);
                    }
                }
            }
            // Weights are on their way before the activations are there.
            if (is_first) wait_for_previous();
            is_first = false;
            if constexpr (N == 1) {
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    const int chunk = c + a * SHARING;
                    if (CHUNKS % (SHARING * AHEAD) == 0 || chunk < CHUNKS) {
                        meets[a].load(x, token, chunk / F::CHUNKS * F::BLOCK, chunk % F::CHUNKS);
                    }
                }
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int chunk = c + a * SHARING, part = chunk % F::CHUNKS;
                if (CHUNKS % (SHARING * AHEAD) == 0 || chunk < CHUNKS) {
                    typename F::Chunk w[R];
#pragma unroll
                    for (int r = 0; r < R; r++) w[r] = F::unpack(raw[a][r], part);
                    if constexpr (N == 1) {
                        meets[a].template add_products<R>(w, sums[0]);
                    } else {
                        MeetsOf<F, X>::Type::template add_products_of<R, N>(w, x, token, tokens, chunk / F::CHUNKS * F::BLOCK, part, sums);
                    }
                }
            }
        }
    }
};

// A weight `[ROWS, K]` of numbers, row after row.
template <class F, int ROWS, int K>
struct Numbers {
    typedef F Format;
    static constexpr int HEIGHT = ROWS, LANES = lanes_of_row<K, 32>();
    const u8* base;

    template <int W, int R, int N, class X>
    static DEVICE void multiply(const Numbers (&weights)[R], const int (&rows)[R], X x, int token, int tokens, float (&sums)[N][R]) {
        constexpr int VECTOR = 16 / F::BYTES, SHARING = LANES * W;
        if constexpr (K % VECTOR == 0) {
            // Vectors of sixteen bytes, some of them on their way at once, and before the activations are there.
            constexpr int VECTORS = K / VECTOR, MOST = N * R == 1 ? 4 : 2, AHEAD = least(MOST, (VECTORS + SHARING - 1) / SHARING);
            bool is_first = true;
            for (int v = thread() % SHARING; v < VECTORS; v += SHARING * AHEAD) {
                Words raw[AHEAD][R];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    // What is beyond the row is not used.
                    const int near = least(v + a * SHARING, VECTORS - 1);
                    for (int r = 0; r < R; r++) raw[a][r] = F::load(weights[r].base + ((u64)rows[r] * K + near * VECTOR) * F::BYTES);
                }
                if (is_first) wait_for_previous();
                is_first = false;
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    const int first = (v + a * SHARING) * VECTOR;
                    if (VECTORS % (SHARING * AHEAD) != 0 && first >= K) break;
#pragma unroll
                    for (int n = 0; n < N; n++) {
                        const int t = token + (token + n < tokens ? n : 0);
                        float values[VECTOR];
                        values_of(x, t, first, values);
                        for (int r = 0; r < R; r++) {
                            for (int i = 0; i < VECTOR; i++) sums[n][r] = fused(F::value(raw[a][r], i), values[i], sums[n][r]);
                        }
                    }
                }
            }
        } else {
            wait_for_previous();
            for (int k = thread() % SHARING; k < K; k += SHARING) {
                float w[R];
                for (int r = 0; r < R; r++) w[r] = F::value(weights[r].base + ((u64)rows[r] * K + k) * F::BYTES);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const float value = value_of(x, token + (token + n < tokens ? n : 0), k);
                    for (int r = 0; r < R; r++) sums[n][r] = fused(w[r], value, sums[n][r]);
                }
            }
        }
    }

    static DEVICE float value_of(Floats<K> x, int token, int k) { return x.base[(u64)token * K + k]; }
    template <int N>
    static DEVICE void values_of(Floats<K> x, int token, int first, float (&to)[N]) {
        for (int i = 0; i < N; i += 4) {
            const Words words = *(const Words*)(x.base + (u64)token * K + first + i);
            for (int j = 0; j < 4; j++) to[i + j] = float_of(words.x[j]);
        }
    }
};

// The sums of row `rows[r]` of `R` weights over the lanes of `W` warps that share it, each warp's own.
template <int W, int R, int N, class M, class X>
DEVICE void row_sums(const M (&weights)[R], const int (&rows)[R], X x, int token, int tokens, float (&sums)[N][R]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) sums[n][r] = 0;
    }
    M::template multiply<W, R, N>(weights, rows, x, token, tokens, sums);
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) sums[n][r] = sum_of_lanes<M::LANES>(sums[n][r]);
    }
}

// Stores y = w x (+ bias) (+ residual) for the rows of block `block`, each `W` warps (or group of lanes, if `W` is 1) `R` of them, and the
// tokens from `N * block_y()` on.
template <int THREADS, int W, int R, int N, class M, class X>
DEVICE void matvec(M weight, X x, int block, int tokens, const float* bias, const float* residual, float* out) {
    constexpr int SHARING = M::LANES * W, GROUPS = THREADS / SHARING;
    static_assert(W == 1 || M::LANES == WARP, "only whole warps share a row");
    const int group = thread() / SHARING, first = (block * GROUPS + group) * R, token = block_y() * N;
    M weights[R];
    int rows[R];
    for (int r = 0; r < R; r++) {
        weights[r] = weight;
        // Whole blocks come here, so a row that is none repeats the last.
        rows[r] = least(first + r, M::HEIGHT - 1);
    }
    float sums[N][R];
    row_sums<W, R, N>(weights, rows, x, token, tokens, sums);
    if constexpr (W > 1) {
        __shared__ float others[GROUPS][W][N][R];
        if (lane() == 0) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                for (int r = 0; r < R; r++) others[group][warp() % W][n][r] = sums[n][r];
            }
        }
        barrier();
#pragma unroll
        for (int n = 0; n < N; n++) {
            for (int r = 0; r < R; r++) {
                sums[n][r] = 0;
                for (int w = 0; w < W; w++) sums[n][r] += others[group][w][n][r];
            }
        }
    }
    if (thread() % SHARING != 0) return;
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

// The sums of `P` neighbouring rows of two weights, those of the first first: at once where they are of one kind.
template <int P, int N, class M, class X>
DEVICE void gate_and_up(M gate, M up, const int (&rows)[P], X x, int token, int tokens, float (&sums)[N][2 * P]) {
    M weights[2 * P];
    int all[2 * P];
    for (int p = 0; p < P; p++) weights[p] = gate, weights[P + p] = up, all[p] = all[P + p] = rows[p];
    row_sums<1, 2 * P, N>(weights, all, x, token, tokens, sums);
}
template <int P, int N, class G, class U, class X>
DEVICE void gate_and_up(G gate, U up, const int (&rows)[P], X x, int token, int tokens, float (&sums)[N][2 * P]) {
    G gates[P];
    U ups[P];
    for (int p = 0; p < P; p++) gates[p] = gate, ups[p] = up;
    float a[N][P], b[N][P];
    row_sums<1, P, N>(gates, rows, x, token, tokens, a);
    row_sums<1, P, N>(ups, rows, x, token, tokens, b);
    for (int n = 0; n < N; n++) {
        for (int p = 0; p < P; p++) sums[n][p] = a[n][p], sums[n][P + p] = b[n][p];
    }
}

// The sums of rows `32 * block` to `32 * block + 31` of both weights to shared memory, `P` neighbouring rows at once, as pairs.
template <int THREADS, int P, int N, class G, class U, class X>
DEVICE void gates_and_ups(G gate, U up, X x, int block, int token, int tokens, float (&gates)[N][32], float (&ups)[N][32]) {
    constexpr int AT_ONCE = THREADS / G::LANES * P, STEPS = (32 + AT_ONCE - 1) / AT_ONCE;
    static_assert(G::LANES == U::LANES, "rows of gate and up are shared by as many lanes");
    // Of one token loads of the next rows are on their way while these meet; of several there are registers for one step.
    constexpr int UNROLLED = N == 1 ? STEPS : 1;
#pragma unroll UNROLLED
    for (int step = 0; step < STEPS; step++) {
        const int first = step * AT_ONCE + thread() / G::LANES * P;
        int rows[P];
        for (int p = 0; p < P; p++) rows[p] = least(block * 32 + first + p, G::HEIGHT - 1);
        float sums[N][2 * P];
        gate_and_up<P, N>(gate, up, rows, x, token, tokens, sums);
        if (first < 32 && lane() % G::LANES == 0) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                for (int p = 0; p < P; p++) gates[n][first + p] = sums[n][p], ups[n][first + p] = sums[n][P + p];
            }
        }
    }
}

// Those of one weight.
template <int THREADS, int P, int N, class M, class X>
DEVICE void rows_of_32(M weight, X x, int block, int token, int tokens, float (&y)[N][32]) {
    constexpr int AT_ONCE = THREADS / M::LANES * P, STEPS = (32 + AT_ONCE - 1) / AT_ONCE;
    M weights[P];
    for (int p = 0; p < P; p++) weights[p] = weight;
    for (int step = 0; step < STEPS; step++) {
        const int first = step * AT_ONCE + thread() / M::LANES * P;
        int rows[P];
        for (int p = 0; p < P; p++) rows[p] = least(block * 32 + first + p, M::HEIGHT - 1);
        float sums[N][P];
        row_sums<1, P, N>(weights, rows, x, token, tokens, sums);
        if (first < 32 && lane() % M::LANES == 0) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                for (int p = 0; p < P; p++) y[n][first + p] = sums[n][p];
            }
        }
    }
}

// silu(gate) * up for 32 rows of both, which have one format or two and may have biases, stored by `out`. Each group of lanes takes `P`
// rows at once.
template <int THREADS, int P, int N, class G, class U, class X, class Out>
DEVICE void matvec_swiglu(G gate, U up, const float* gate_bias, const float* up_bias, X x, int block, int tokens, Out out) {
    __shared__ float gates[N][32];
    __shared__ float ups[N][32];
    const int token = block_y() * N;
    if constexpr (G::LANES == U::LANES) {
        gates_and_ups<THREADS, P, N>(gate, up, x, block, token, tokens, gates, ups);
    } else {
        rows_of_32<THREADS, P, N>(gate, x, block, token, tokens, gates);
        rows_of_32<THREADS, P, N>(up, x, block, token, tokens, ups);
    }
    barrier();
    for (int n = thread() / 32; n < N; n += THREADS / 32) {
        const int row = block * 32 + thread() % 32;
        // Rows are whole runs of 32 where lanes quantise together.
        if (token + n < tokens && row < G::HEIGHT) {
            float g = gates[n][thread() % 32], u = ups[n][thread() % 32];
            if (gate_bias) g += gate_bias[row];
            if (up_bias) u += up_bias[row];
            const float value[1] = {silu(g) * u};
            out.store(token + n, row, value);
        }
    }
}

// The best of the rows of a block for each token, to `values` and `indices` `[tokens, BLOCKS]`. Each group of lanes takes `R` rows at
// once, `EACH` times.
template <int THREADS, int R, int N, int BLOCKS, int EACH, class M, class X>
DEVICE void matvec_best(M weight, X x, int block, int tokens, const float* bias, float* values, i32* indices) {
    constexpr int GROUPS = THREADS / M::LANES;
    __shared__ float best_value[GROUPS][N];
    __shared__ i32 best_index[GROUPS][N];
    const int token = block_y() * N, group = thread() / M::LANES;
    Best best[N];
    M weights[R];
    for (int r = 0; r < R; r++) weights[r] = weight;
#pragma unroll
    for (int n = 0; n < N; n++) best[n] = {-INFINITE, NONE};
    for (int e = 0; e < EACH; e++) {
        const int first = ((block * EACH + e) * GROUPS + group) * R;
        int rows[R];
        for (int r = 0; r < R; r++) rows[r] = least(first + r, M::HEIGHT - 1);
        float sums[N][R];
        row_sums<1, R, N>(weights, rows, x, token, tokens, sums);
        for (int r = 0; r < R; r++) {
            if (first + r >= M::HEIGHT) break;
#pragma unroll
            for (int n = 0; n < N; n++) best[n].take(sums[n][r] + (bias ? bias[first + r] : 0.0f), first + r);
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
