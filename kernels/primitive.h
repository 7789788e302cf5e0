// Operations of graphs that nothing fused: what the parts of attention, experts and recurrences are before they are fused, plainly.
#pragma once
#include "matvec.h"
#include "rope_kv.h"

// Row `row` of `K` floats to row `rows[row]` of a cache of `HEIGHT`.
template <int THREADS, int K, int HEIGHT, class As>
DEVICE void kv_append(const float* x, const i32* rows, int row, typename As::Element* cache) {
    const u64 to = load_index(rows + row, HEIGHT);
    for (int i = thread(); i < K; i += THREADS) As::put(cache + to * K + i, x[(u64)row * K + i]);
}

// What position `position` of sequence `sequence` has in a cache of `HEIGHT` rows of `K` elements, or zeros where it has nothing. A
// sequence has up to `PAGES` pages of `PAGE` rows.
template <int THREADS, int K, int HEIGHT, int PAGE, int PAGES, class E>
DEVICE void kv_read(const E* cache, const i32* tables, const i32* lengths, int sequence, int position, E* out) {
    const bool is_there = position < load_step(lengths + sequence);
    const int page = load_index(tables + sequence * PAGES + position / PAGE, HEIGHT / PAGE);
    const E* from = cache + ((u64)page * PAGE + position % PAGE) * K;
    E* to = out + ((u64)sequence * PAGES * PAGE + position) * K;
    for (int i = thread(); i < K; i += THREADS) to[i] = is_there ? from[i] : (E)0;
}

// scale * q · k of a token, a head, and position `l` of its sequence, of which there are `SEQUENCES` of `LONGEST` positions.
template <class F, int HEADS, int KV, int D, int SEQUENCES, int LONGEST>
DEVICE void scores(const float* q, const u8* k, const i32* sequences, float scale, int head, int token, int tokens, int l, float* out) {
    if (l >= LONGEST) return;
    const int sequence = load_index(sequences + token, SEQUENCES);
    const float* row = q + ((u64)token * HEADS + head) * D;
    const u8* key = k + (((u64)sequence * LONGEST + l) * KV + head / (HEADS / KV)) * D * F::BYTES;
    float dot = 0;
    for (int i = 0; i < D; i++) dot = fused(row[i], F::value(key + (u64)i * F::BYTES), dot);
    out[((u64)head * tokens + token) * LONGEST + l] = scale * dot;
}

// What the query at `position` does not see of `N` scores becomes -∞. Without a window it is 0.
template <int THREADS, int N>
DEVICE void causal_mask(const float* scores, int position, int window, u64 row, float* out) {
    for (int l = thread(); l < N; l += THREADS) {
        const bool is_seen = l <= position && (window == 0 || l > position - window);
        out[row * N + l] = is_seen ? scores[row * N + l] : -INFINITE;
    }
}

// e^(x - max) / Σ over a row of `N`.
template <int THREADS, int N>
DEVICE void softmax(const float* x, u64 row, float* out) {
    __shared__ float room[2][THREADS / WARP];
    float most = -INFINITE, sum = 0;
    for (int i = thread(); i < N; i += THREADS) most = largest(most, x[row * N + i]);
    most = largest_of_lanes(most);
    if (lane() == 0) room[0][warp()] = most;
    barrier();
    for (int w = 0; w < THREADS / WARP; w++) most = largest(most, room[0][w]);
    for (int i = thread(); i < N; i += THREADS) sum += exponential(x[row * N + i] - most);
    sum = sum_of_block<THREADS>(sum, room[1]);
    for (int i = thread(); i < N; i += THREADS) out[row * N + i] = exponential(x[row * N + i] - most) / sum;
}

// Σ p · v over the positions of the token's sequence, of a head. What has no weight does not count, even if it is not finite.
template <int THREADS, class F, int HEADS, int KV, int D, int SEQUENCES, int LONGEST>
DEVICE void weighted_sum(const float* p, const u8* v, const i32* sequences, int head, int token, int tokens, float* out) {
    const int sequence = load_index(sequences + token, SEQUENCES);
    const float* weights = p + ((u64)head * tokens + token) * LONGEST;
    for (int i = thread(); i < D; i += THREADS) {
        float sum = 0;
        for (int l = 0; l < LONGEST; l++) {
            const u64 at = (((u64)sequence * LONGEST + l) * KV + head / (HEADS / KV)) * D + i;
            if (weights[l] != 0) sum = fused(weights[l], F::value(v + at * F::BYTES), sum);
        }
        out[((u64)token * HEADS + head) * D + i] = sum;
    }
}

// x · wᵀ of a token and matrix `ids[token]` of `E` matrices `[N, K]`, a warp for each row.
template <int THREADS, int E, int N, int K>
DEVICE void matmul_id(const float* x, const float* w, const i32* ids, int token, int block, float* out) {
    const int n = block * (THREADS / WARP) + warp();
    const u64 row = (u64)load_index(ids + token, E) * N + least(n, N - 1);
    float sum = 0;
    for (int k = lane(); k < K; k += WARP) sum = fused(x[(u64)token * K + k], w[row * K + k], sum);
    sum = sum_of_lanes(sum);
    if (lane() == 0 && n < N) out[(u64)token * N + n] = sum;
}

// h = decay * h + x (times silu of the gate, where there is one), token by token, of column `column` of the states of `SEQUENCES`, which
// begin at zero at position 0.
template <int SEQUENCES, int N>
DEVICE void gated_scan(float* state, const float* decay, const float* x, const float* gate, const i32* sequences, const i32* positions,
                       int tokens, int column, float* out) {
    if (column >= N) return;
    for (int t = 0; t < tokens; t++) {
        const u64 at = (u64)t * N + column;
        float* h = state + (u64)load_index(sequences + t, SEQUENCES) * N + column;
        const float before = load_step(positions + t) == 0 ? 0.0f : *h, input = gate ? x[at] * silu(gate[at]) : x[at];
        out[at] = *h = fused(decay[at], before, input);
    }
}
