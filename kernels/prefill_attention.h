// Causal attention of many queries over caches of halves in pages (FlashAttention-2: Dao, 2023, arXiv:2307.08691).
//
// A block takes 64 queries, some heads of a group of neighbouring tokens, and goes over the keys of their sequence, some at a time,
// multiplying 16 by 16 by 16. Where its tokens are of several sequences, it takes one after another, and of each keeps its own queries.
#pragma once
#include "attention.h"

constexpr int QUERIES = 64, PREFILL_THREADS = 128, SQUARES = QUERIES / 16 / (PREFILL_THREADS / WARP);

// Shared memory: keys and values with their columns in rows, and weights of both; results after that; and queries, before it where they
// stay in registers.
template <class S>
struct AttentionTile {
    static_assert(S::D % 16 == 0 && S::D <= 128, "heads are whole squares, and fit");
    // As many as registers are there for.
    static constexpr int KEYS = LEFT_STAYS || S::D <= 64 ? 64 : 32;
    // No two of eight neighbouring rows share a bank.
    static constexpr int WIDE = 2 * S::D + 16, NARROW = 2 * KEYS + 16;
    struct Inputs {
        u8 k[KEYS][WIDE], v[S::D][NARROW], p[QUERIES][NARROW];
    };
    union {
        alignas(16) Inputs in;
        alignas(16) u8 before[LEFT_STAYS ? QUERIES : 1][WIDE];
        alignas(16) float out[QUERIES][S::D + 4];
    };
    alignas(16) u8 beside[LEFT_STAYS ? 1 : QUERIES][WIDE];
    DEVICE u8* query(int r) { return LEFT_STAYS ? before[r] : beside[r]; }
    // What each query sees.
    i32 begin[QUERIES], end[QUERIES], sequence[QUERIES];
    // Rows of the caches that the keys are in, of these and of the next; -1 where there are no more.
    i32 rows[2][KEYS];
};

// The row of position `position` of a sequence, or -1 from `end` on.
template <class S>
DEVICE int row_of(const i32* tables, int sequence, int position, int end) {
    if (position >= end) return -1;
    return load_index(tables + sequence * S::PAGES + position / S::PAGE, S::ROWS / S::PAGE) * S::PAGE + position % S::PAGE;
}

// Sixteen bytes of a row of a cache, or zeros.
template <class S>
DEVICE Words load_cache(const u16* cache, int row, int kv, int column) {
    if (row < 0) return {{0, 0, 0, 0}};
    return *(const Words*)(cache + ((u64)row * S::KV + kv) * S::D + column);
}

// Tokens from `block_y() * (QUERIES / GROUP)` on, `GROUP` heads from `block_x() * GROUP` on.
template <int GROUP, class S, class Out>
DEVICE void attend(AttentionTile<S>& tile, const float* q, const u16* k, const u16* v, const i32* tables, const i32* lengths,
                   const i32* sequences, const i32* positions, float scale, int tokens, Out out) {
    typedef AttentionTile<S> Tile;
    constexpr int D = S::D, KEYS = Tile::KEYS, TOKENS = QUERIES / GROUP;
    const int token = block_y() * TOKENS, head = block_x() * GROUP, kv = head / (S::HEADS / S::KV);
    const int count = least(TOKENS, tokens - token), square = warp() * SQUARES;
    for (int r = thread(); r < QUERIES; r += PREFILL_THREADS) {
        tile.begin[r] = tile.end[r] = 0, tile.sequence[r] = -1;
        if (r >= count * GROUP) continue;
        const int t = token + r / GROUP, sequence = load_index(sequences + t, S::SEQUENCES);
        const Seen seen = seen_by<1, S::WINDOW, S::PAGES * S::PAGE>(load_step(positions + t), load_step(lengths + sequence));
        tile.begin[r] = seen.begin, tile.end[r] = seen.end, tile.sequence[r] = sequence;
    }
    wait_for_previous();
    for (int first = 0, last = 0; first < count * GROUP; first = last) {
        barrier();
        // The queries of one sequence, and what they see together.
        const int sequence = tile.sequence[first];
        int begin = tile.begin[first], end = tile.end[first];
        for (last = first; last < count * GROUP && tile.sequence[last] == sequence; last += GROUP) {
            begin = least(begin, tile.begin[last]), end = end > tile.end[last] ? end : tile.end[last];
        }
#pragma unroll 4
        for (int i = thread(); i < QUERIES * (D / 4); i += PREFILL_THREADS) {
            const int r = i / (D / 4), column = i % (D / 4) * 4;
            const u64 at = ((u64)(token + r / GROUP) * S::HEADS + head + r % GROUP) * D + column;
            const Words x = first <= r && r < last ? *(const Words*)(q + at) : Words{{0, 0, 0, 0}};
            u16 halves[4];
            for (int j = 0; j < 4; j++) halves[j] = float_to_half(float_of(x.x[j]) * scale);
            *(Pair*)(tile.query(r) + 2 * column) = {{halves[0] | (u32)halves[1] << 16, halves[2] | (u32)halves[3] << 16}};
        }
        barrier();
        Left<32> queries[LEFT_STAYS ? SQUARES : 1][LEFT_STAYS ? D / 16 : 1];
        float most[SQUARES][LEFT_OF_LANE], sum[SQUARES][LEFT_OF_LANE], values[SQUARES][D / 16][SUMS];
        i32 seen_from[SQUARES][LEFT_OF_LANE], seen_to[SQUARES][LEFT_OF_LANE];
#pragma unroll
        for (int s = 0; s < SQUARES; s++) {
            if constexpr (LEFT_STAYS) {
                for (int c = 0; c < D / 16; c++) queries[s][c].load(tile.query(16 * (square + s)) + 32 * c, Tile::WIDE);
            }
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                const int r = 16 * (square + s) + left_row(i), l = left_of_sum(i);
                most[s][l] = LOWEST, sum[s][l] = 0;
                // Queries of other sequences see nothing.
                const bool is_there = first <= r && r < last;
                seen_from[s][l] = tile.begin[r], seen_to[s][l] = is_there ? tile.end[r] : 0;
                for (int n = 0; n < D / 16; n++) values[s][n][i] = 0;
            }
        }
        if (thread() < KEYS) tile.rows[0][thread()] = row_of<S>(tables, sequence, begin + thread(), end);
        for (int from = begin, now_at = 0; from < end; from += KEYS, now_at ^= 1) {
            barrier();
            const i32* rows_of_keys = tile.rows[now_at];
            constexpr int ALL = KEYS * (D / 8), EACH = (ALL + PREFILL_THREADS - 1) / PREFILL_THREADS;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = e * PREFILL_THREADS + thread(), n = i / (D / 8), column = i % (D / 8) * 8;
                if (ALL % PREFILL_THREADS == 0 || i < ALL) {
                    *(Words*)(tile.in.k[n] + 2 * column) = load_cache<S>(k, rows_of_keys[n], kv, column);
                }
            }
#pragma unroll
            for (int e = 0; e < (EACH + 1) / 2; e++) {
                const int i = e * PREFILL_THREADS + thread(), n = i % (KEYS / 2) * 2, column = i / (KEYS / 2) * 8;
                if (ALL / 2 % PREFILL_THREADS == 0 || i < ALL / 2) {
                    const Words a = load_cache<S>(v, rows_of_keys[n], kv, column), b = load_cache<S>(v, rows_of_keys[n + 1], kv, column);
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        const u32 x = a.x[j / 2], y = b.x[j / 2];
                        *(u32*)(tile.in.v[column + j] + 2 * n) = j % 2 == 0 ? (x & 0xffff) | y << 16 : x >> 16 | (y & 0xffff0000);
                    }
                }
            }
            if (thread() < KEYS) tile.rows[now_at ^ 1][thread()] = row_of<S>(tables, sequence, from + KEYS + thread(), end);
            barrier();
#pragma unroll
            for (int s = 0; s < SQUARES; s++) {
                float scores[KEYS / 16][SUMS], now[LEFT_OF_LANE];
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    for (int i = 0; i < SUMS; i++) scores[n][i] = 0;
                }
#pragma unroll
                for (int c = 0; c < D / 16; c++) {
                    Left<32> left;
                    if constexpr (LEFT_STAYS) {
                        left = queries[s][c];
                    } else {
                        left.load(tile.query(16 * (square + s)) + 32 * c, Tile::WIDE);
                    }
#pragma unroll
                    for (int n = 0; n < KEYS / 16; n++) {
                        Right<32> keys;
                        keys.load(tile.in.k[16 * n] + 32 * c, Tile::WIDE);
                        multiply_halves(left, keys, scores[n]);
                    }
                }
                for (int l = 0; l < LEFT_OF_LANE; l++) now[l] = most[s][l];
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
#pragma unroll
                    for (int i = 0; i < SUMS; i++) {
                        const int position = from + 16 * n + right_row(i), l = left_of_sum(i);
                        if (position < seen_from[s][l] || position >= seen_to[s][l]) scores[n][i] = -INFINITE;
                        now[l] = largest(now[l], scores[n][i]);
                    }
                }
                float by[LEFT_OF_LANE];
#pragma unroll
                for (int l = 0; l < LEFT_OF_LANE; l++) {
                    now[l] = largest_of_lanes<LANES_OF_LEFT>(now[l]);
                    by[l] = exponential(most[s][l] - now[l]);
                    most[s][l] = now[l], sum[s][l] *= by[l];
                }
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
#pragma unroll
                    for (int i = 0; i < SUMS; i++) values[s][n][i] *= by[left_of_sum(i)];
                }
                u8* rows = tile.in.p[16 * (square + s)];
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
#pragma unroll
                    for (int i = 0; i < SUMS; i++) {
                        const float weight = exponential(scores[n][i] - now[left_of_sum(i)]);
                        sum[s][left_of_sum(i)] += weight;
                        *(u16*)(rows + left_row(i) * Tile::NARROW + 2 * (16 * n + right_row(i))) = float_to_half(weight);
                    }
                }
                warp_barrier();
#pragma unroll
                for (int c = 0; c < KEYS / 16; c++) {
                    Left<32> weights;
                    weights.load(rows + 32 * c, Tile::NARROW);
#pragma unroll
                    for (int n = 0; n < D / 16; n++) {
                        Right<32> of_values;
                        of_values.load(tile.in.v[16 * n] + 32 * c, Tile::NARROW);
                        multiply_halves(weights, of_values, values[s][n]);
                    }
                }
            }
        }
        barrier();
#pragma unroll
        for (int s = 0; s < SQUARES; s++) {
            float total[LEFT_OF_LANE];
            for (int l = 0; l < LEFT_OF_LANE; l++) total[l] = sum_of_lanes<LANES_OF_LEFT>(sum[s][l]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
#pragma unroll
                for (int i = 0; i < SUMS; i++) {
                    const float all = total[left_of_sum(i)];
                    // A query that sees nothing gets nothing.
                    tile.out[16 * (square + s) + left_row(i)][16 * n + right_row(i)] = all > 0 ? values[s][n][i] / all : 0.0f;
                }
            }
        }
        barrier();
        for (int i = thread(); i < QUERIES * (D / 4); i += PREFILL_THREADS) {
            const int r = i / (D / 4), column = i % (D / 4) * 4;
            const Words x = *(const Words*)&tile.out[r][column];
            const float value[4] = {float_of(x.x[0]), float_of(x.x[1]), float_of(x.x[2]), float_of(x.x[3])};
            out.store(token + r / GROUP, (head + r % GROUP) * D + column, value, first <= r && r < last);
        }
    }
}
