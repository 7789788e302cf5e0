// Attention of a few queries that turns them, and the keys of the step, as it begins: what `rope_kv.h` and `attention.h` do in two
// kernels, of which the second would wait for the first.
//
// Every block turns its own queries and the keys of the step that lie in pages it goes over, which are few. Where it comes by their rows
// of the caches it goes on, as other blocks may be writing these (the first part of each token and cache head does), and meets them at
// the end.
#pragma once
#include "attention.h"
#include "rope_kv.h"

// A projection `[tokens, heads * D]`, and how its heads are normed.
struct Heads {
    const float* x;
    HeadNorm by;
};

// What a block shares: its queries, and keys and values of `N` tokens as the caches have them.
template <int N, int GROUP, class S, class KC, class VC>
struct Fresh {
    alignas(16) typename KC::Element keys[N][S::D];
    alignas(16) typename VC::Element values[N][S::D];
    float queries[GROUP][S::D];
};

template <int THREADS, int N, int GROUP, int DIMS, bool INTERLEAVED, class S, class KC, class VC>
struct Turning {
    static constexpr int COUNT = N;
    typedef Fresh<N, GROUP, S, KC, VC> Room;
    Room& room;
    Heads q, k;
    const float* v;
    const double* turns;
    const float* factors;
    const i32* positions;
    int tokens;
    typename KC::Element* key_cache;
    typename VC::Element* value_cache;
    // The row of the caches that each token's key and value go to, and how often a lane came by it, two tokens to a word.
    int rows[N];
    u32 met[(N + 1) / 2];

    DEVICE void rows_from(const i32* of_tokens) {
#pragma unroll
        for (int t = 0; t < N; t++) rows[t] = t < tokens ? (int)load_index(of_tokens + t, S::ROWS) : -1, met[t / 2] = 0;
    }

    // Turns what is met of the positions `from` to `to`, which lie in the pages that `table` has.
    DEVICE void begin(int token, int head, bool first_part, int from, int to, const i32* table) {
        const int each = S::HEADS / S::KV, kv = head / each;
        const bool writes = first_part && head % each == 0;
        if (!writes && from >= to) return wait_for_previous();
        // A bit for each token whose key and value are needed.
        u32 needed = writes ? 1u << token : 0;
        const int end = from < to ? (to + S::PAGE - 1) / S::PAGE : 0;
        for (int first = from / S::PAGE; first < end; first += WARP) {
            const int at = first + lane(), page = at < end ? (int)load_index(table + at, S::ROWS / S::PAGE) : -1;
#pragma unroll
            for (int t = 0; t < N; t++) {
                if (any_of_warp(rows[t] >= 0 && page == rows[t] / S::PAGE)) needed |= 1u << t;
            }
        }
        // A warp turns a head: those of the queries, then the keys of the tokens.
        for (int i = warp(); i < GROUP + tokens; i += THREADS / WARP) {
            const bool is_query = i < GROUP;
            const int t = is_query ? token : i - GROUP;
            if (!is_query && !(needed >> t & 1)) continue;
            Turn<WARP, S::D, DIMS, INTERLEAVED> turn;
            turn.to(load_step(positions + t), lane(), turns, factors);
            wait_for_previous();
            const Heads from = is_query ? q : k;
            const float* x = from.x + ((u64)t * (is_query ? S::HEADS : S::KV) + (is_query ? head + i : kv)) * S::D;
            float scale = 1;
            if (from.by.norm) {
                float squares = 0;
                for (int c = lane(); c < S::D; c += WARP) squares = fused(x[c], x[c], squares);
                scale = from.by.scale(sum_of_lanes(squares), S::D);
            }
            turn.apply(
                lane(), [&](int c) { return from.by.norm ? x[c] * scale * from.by.norm[c] : x[c]; },
                [&](int c, float y) {
                    if (is_query) {
                        room.queries[i][c] = y;
                    } else {
                        KC::put(&room.keys[t][c], y);
                    }
                });
        }
        wait_for_previous();
        for (int i = thread(); i < tokens * S::D; i += THREADS) {
            const int t = i / S::D, c = i % S::D;
            if (!(needed >> t & 1)) continue;
            VC::put(&room.values[t][c], v[((u64)t * S::KV + kv) * S::D + c]);
        }
        barrier();
        if (!writes) return;
#pragma unroll
        for (int t = 0; t < N; t++) {
            if (t != token) continue;
            const u64 row = ((u64)rows[t] * S::KV + kv) * S::D;
            for (int c = thread(); c < S::D; c += THREADS) {
                key_cache[row + c] = room.keys[t][c];
                value_cache[row + c] = room.values[t][c];
            }
        }
    }

    DEVICE float query(int, int, int h, int column) const { return room.queries[h][column]; }

    DEVICE bool meets(int row) {
        bool is_new = false;
#pragma unroll
        for (int t = 0; t < N; t++) {
            const bool is = row == rows[t];
            met[t / 2] += (u32)is << t % 2 * 16, is_new |= is;
        }
        return is_new;
    }
    DEVICE int times(int t) const { return met[t / 2] >> t % 2 * 16 & 0xffff; }
    template <class K, class V>
    DEVICE void load(int t, K& key, V& value) const {
        Columns<KC, S::D>::load(room.keys[t], true, key);
        Columns<VC, S::D>::load(room.values[t], true, value);
    }
};
