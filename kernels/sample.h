// The best token: the index of the largest of a row, the earliest of equals.
#pragma once
#include "reduce.h"

// Of the threads' candidates, in thread 0.
template <int THREADS>
DEVICE Best best_of_block(Best best) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ float values[WARPS];
    __shared__ i32 indices[WARPS];
    best = best_of_lanes(best);
    if (lane() == 0) values[warp()] = best.value, indices[warp()] = best.index;
    barrier();
    for (int w = 0; w < WARPS; w++) best.take(values[w], indices[w]);
    return best;
}

// Of `COUNT` numbers of row `row`, whose indices are `indices`, or their places.
template <int THREADS, int COUNT>
DEVICE void best_of_row(const float* values, const i32* indices, i32* out, int row) {
    Best best = {-INFINITE, NONE};
    for (int i = thread(); i < COUNT; i += THREADS) {
        const u64 at = (u64)row * COUNT + i;
        best.take(values[at], indices ? indices[at] : i);
    }
    best = best_of_block<THREADS>(best);
    // Where nothing is a number, the first.
    if (thread() == 0) out[row] = best.index == NONE ? 0 : best.index;
}
