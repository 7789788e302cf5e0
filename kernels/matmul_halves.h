// Weights in 16 bits times the activations of many tokens, on matrix units: an activation is the sum of two numbers of the weight's format, what
// one has of it and what that leaves. Two halves have 22 of a float's 24 bits, of what is 2^-17 of a token's largest or more, and two of BF16 16.
//
// A launch before splits the activations, once for all blocks. Tiles are copied to shared memory as they are, some steps ahead of what the
// warps multiply. Where there are too few tiles to keep a GPU busy, each is of a range of the columns, and a launch after adds the sums of all
// ranges.
#pragma once
#include "matmul.h"

// Activations `[tokens, K]`, of each token those numbers of `F` that are nearest, then those nearest to what is left; and by what each
// token's are to be multiplied.
template <class F, int K>
struct Split {
    u8* base;
    float* scales;
    static constexpr int ROW = 4 * K;
    DEVICE u8* row(int token, int part) const { return base + (u64)token * ROW + part * (2 * K); }
};

// A power of two that brings a number to 2^14 or more, so that halves of it and of what is less are as good as they can be, and its
// inverse. What has eight bits of exponent as a float has needs none.
template <class F>
struct PowerOfTwo {
    float up = 1, down = 1;
    DEVICE explicit PowerOfTwo(float most) {
        if constexpr (F::IS_HALF) {
            const int exponent = (int)(bits_of(most) >> 23), near = exponent < 15 ? 15 : exponent;
            up = float_of((u32)(268 - near) << 23), down = float_of((u32)(near - 14) << 23);
        }
    }
};

// Splits the activations of a token; `room` has a place for each warp.
template <class F, int THREADS, int K>
DEVICE void split_row(float* room, Floats<K> x, Split<F, K> to, int token) {
    constexpr int VECTORS = K / 4;
    const Words* from = (const Words*)(x.base + (u64)token * K);
    float most = 0;
    if constexpr (F::IS_HALF) {
        for (int v = thread(); v < VECTORS; v += THREADS) {
            const Words words = from[v];
            for (int i = 0; i < 4; i++) most = largest(most, magnitude(float_of(words.x[i])));
        }
        most = largest_of_block<THREADS>(most, room);
    }
    const PowerOfTwo<F> scale(most);
    for (int v = thread(); v < VECTORS; v += THREADS) {
        const Words words = from[v];
        u32 parts[2][4];
        for (int i = 0; i < 4; i++) {
            const float value = float_of(words.x[i]) * scale.up;
            parts[0][i] = F::nearest(value);
            const float near = F::number((u16)parts[0][i]);
            // Infinity leaves nothing.
            parts[1][i] = magnitude(near) < INFINITE ? F::nearest(value - near) : 0;
        }
        for (int part = 0; part < 2; part++) {
            *(Pair*)(to.row(token, part) + 8 * v) = {{parts[part][0] | parts[part][1] << 16, parts[part][2] | parts[part][3] << 16}};
        }
    }
    if (thread() == 0) to.scales[token] = scale.down;
}

// Rows of a tile, columns that are multiplied between two barriers, and vectors of 16 bytes of a row of those.
constexpr int HALF_ROWS = 64, HALF_COLUMNS = 32, HALF_VECTORS = 2 * HALF_COLUMNS / 16;

// Columns of as many rows, of weights or activations. Vectors of neighbouring rows change places, so that those of eight rows, which are loaded at
// once, share no bank.
struct HalfRows {
    alignas(16) u8 bytes[HALF_ROWS][16 * HALF_VECTORS];
    DEVICE u8* at(int row, int vector) { return bytes[row] + 16 * (vector ^ row / 2 % HALF_VECTORS); }
    DEVICE const u8* at(int row, int vector) const { return bytes[row] + 16 * (vector ^ row / 2 % HALF_VECTORS); }
};
static_assert(HALF_ROWS == TILE_TOKENS, "a row for each token");

// Shared memory of a tile: the columns that are multiplied, and of those after them as many as can be on their way.
struct HalfTile {
    static constexpr int STAGES = Copy::IS_HELD ? 2 : 4;
    HalfRows w[STAGES], x[STAGES][2];
};

// What a lane sums. The warps share a tile by squares of 16 tokens and 16 rows, two of them its rows.
struct HalfSums {
    static constexpr int WARPS_OF_TOKENS = TILE_THREADS / WARP / 2, DOWN = TILE_TOKENS / 16 / WARPS_OF_TOKENS, ACROSS = HALF_ROWS / 2 / 16;
    static DEVICE int token() { return warp() / 2 * DOWN * 16; }
    static DEVICE int row() { return warp() % 2 * ACROSS * 16; }
    float x[DOWN][ACROSS][SUMS];
};

// What a thread copies to a tile at each step: a vector of each of some rows.
template <int K>
struct HalfCopies {
    static constexpr int AT_ONCE = TILE_THREADS / HALF_VECTORS, EACH = HALF_ROWS / AT_ONCE;
    const u8 *weights[EACH], *activations[EACH];
    bool is_token[EACH];
    Copy of_weights[EACH], of_activations[EACH][2];

    // `weight(i)` is where row `i` of the tile begins.
    template <class F, class Weight>
    DEVICE HalfCopies(Weight weight, Split<F, K> x, int token, int tokens) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            weights[i] = weight(row(i)) + 16 * vector();
            is_token[i] = token + row(i) < tokens;
            activations[i] = x.row(token + row(i), 0) + 16 * vector();
        }
    }
    static DEVICE int row(int i) { return i * AT_ONCE + thread() / HALF_VECTORS; }
    static DEVICE int vector() { return thread() % HALF_VECTORS; }

    DEVICE void begin_weights(HalfTile& tile, int step) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            of_weights[i].begin(tile.w[step % HalfTile::STAGES].at(row(i), vector()), weights[i] + step * (2 * HALF_COLUMNS));
        }
    }
    // What no token has is left as it is: nothing of a token is made of it.
    DEVICE void begin_activations(HalfTile& tile, int step) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (!is_token[i]) continue;
            for (int part = 0; part < 2; part++) {
                u8* to = tile.x[step % HalfTile::STAGES][part].at(row(i), vector());
                of_activations[i][part].begin(to, activations[i] + part * (2 * K) + step * (2 * HALF_COLUMNS));
            }
        }
    }
    DEVICE void finish(HalfTile& tile, int step) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            of_weights[i].finish(tile.w[step % HalfTile::STAGES].at(row(i), vector()));
            if (!is_token[i]) continue;
            for (int part = 0; part < 2; part++) {
                of_activations[i][part].finish(tile.x[step % HalfTile::STAGES][part].at(row(i), vector()));
            }
        }
    }
};

// Adds the products of 16 columns.
template <class F>
DEVICE void multiply_split(const Left<32> (&x)[2], const Right<32>& w, float (&sums)[SUMS]) {
    if constexpr (F::IS_HALF) {
        multiply_pairs_of_halves(x[0], x[1], w, sums);
    } else {
        for (int part = 0; part < 2; part++) multiply_bfloats(x[part], w, sums);
    }
}

// All products of a tile, whose row `i` begins at `weight(i)`, of range `range` of the columns.
template <int RANGES, class F, int K, class Weight>
DEVICE void sum_half_tile(HalfTile& tile, Weight weight, Split<F, K> x, int token, int tokens, int range, HalfSums& sums) {
    typedef HalfSums S;
    constexpr int STEPS = K / HALF_COLUMNS, AHEAD = HalfTile::STAGES - 1;
    static_assert(K % HALF_COLUMNS == 0 && RANGES <= STEPS, "steps are whole, and each range has one");
    const int first = STEPS * range / RANGES, end = STEPS * (range + 1) / RANGES;
    for (int d = 0; d < S::DOWN; d++) {
        for (int a = 0; a < S::ACROSS; a++) {
            for (int i = 0; i < SUMS; i++) sums.x[d][a][i] = 0;
        }
    }
    HalfCopies<K> copies(weight, x, token, tokens);
    copies.begin_weights(tile, first);
    wait_for_previous();
    copies.begin_activations(tile, first);
    copies.finish(tile, first);
    end_step_of_copies();
#pragma unroll
    for (int i = 1; i < AHEAD; i++) {
        if (first + i < end) {
            copies.begin_weights(tile, first + i);
            copies.begin_activations(tile, first + i);
            copies.finish(tile, first + i);
        }
        end_step_of_copies();
    }
    for (int step = first; step < end; step++) {
        wait_for_copies<AHEAD - 1>();
        // Nor does any warp multiply what is copied over now.
        barrier();
        const bool is_more = step + AHEAD < end;
        if (is_more) {
            copies.begin_weights(tile, step + AHEAD);
            copies.begin_activations(tile, step + AHEAD);
        }
        end_step_of_copies();
        const int stage = step % HalfTile::STAGES;
#pragma unroll
        for (int c = 0; c < HALF_COLUMNS / 16; c++) {
            Right<32> w[S::ACROSS];
            for (int a = 0; a < S::ACROSS; a++) {
                w[a].load([&](int row, int vector) { return tile.w[stage].at(S::row() + 16 * a + row, 2 * c + vector); });
            }
#pragma unroll
            for (int d = 0; d < S::DOWN; d++) {
                const int at = S::token() + 16 * d;
                if (token + at >= tokens) continue;
                Left<32> parts[2];
                for (int part = 0; part < 2; part++) {
                    parts[part].load([&](int row, int vector) { return tile.x[stage][part].at(at + row, 2 * c + vector); });
                }
                for (int a = 0; a < S::ACROSS; a++) multiply_split<F>(parts, w[a], sums.x[d][a]);
            }
        }
        if (is_more) copies.finish(tile, step + AHEAD);
    }
}

// As `matmul`; of several ranges, each block stores the sums of range `block_z()`, for `join_sums`.
template <class M, int RANGES, int K>
DEVICE void matmul_halves(HalfTile& tile, Part part, Split<typename M::Format, K> x, int block, int tokens) {
    typedef HalfSums S;
    const int token = block_x() * TILE_TOKENS, first = block * HALF_ROWS;
    const int range = RANGES > 1 ? block_z() : 0;
    part.out += (u64)range * tokens * part.rows;
    S sums;
    const auto weight = [&](int i) { return part.weight + (u64)least(first + i, part.rows - 1) * (2 * K); };
    sum_half_tile<RANGES>(tile, weight, x, token, tokens, range, sums);
#pragma unroll
    for (int d = 0; d < S::DOWN; d++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int t = token + S::token() + 16 * d + left_row(i);
            const float scale = x.scales[least(t, tokens - 1)];
            for (int a = 0; a < S::ACROSS; a++) store_sum(part, t, first + S::row() + 16 * a + right_row(i), tokens, sums.x[d][a][i] * scale);
        }
    }
}

// As `matmul_swiglu`, for half as many rows as a tile has: of its rows each warp has as many of both weights.
template <class M, int K, class Out>
DEVICE void matmul_halves_swiglu(HalfTile& tile, const u8* gate, const u8* up, int rows, Split<typename M::Format, K> x, int block,
                                 int tokens, Out out) {
    typedef HalfSums S;
    constexpr int HALF = HALF_ROWS / 2, QUARTER = HALF_ROWS / 4, STRIDE = HALF + 4;
    static_assert(sizeof(float) * TILE_TOKENS * STRIDE <= sizeof(tile), "the results have room where the tile was");
    const int token = block_x() * TILE_TOKENS, first = block * HALF;
    const auto weight = [&](int i) {
        const int row = first + i / HALF * QUARTER + i % QUARTER;
        return (i / QUARTER % 2 == 0 ? gate : up) + (u64)least(row, rows - 1) * (2 * K);
    };
    S sums;
    sum_half_tile<1>(tile, weight, x, token, tokens, 0, sums);
    barrier();
    float* y = (float*)&tile;
#pragma unroll
    for (int d = 0; d < S::DOWN; d++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int t = S::token() + 16 * d + left_row(i);
            const float scale = x.scales[least(token + t, tokens - 1)];
            for (int a = 0; a < S::ACROSS / 2; a++) {
                y[t * STRIDE + S::row() / 2 + 16 * a + right_row(i)] =
                    silu(sums.x[d][a][i] * scale) * (sums.x[d][S::ACROSS / 2 + a][i] * scale);
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
