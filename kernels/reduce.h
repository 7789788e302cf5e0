// Sums and maxima over the lanes of a warp and the threads of a block.
#pragma once
#include "device.h"

// The sum over `LANES` neighbouring lanes, a power of two, in each of them.
template <int LANES = WARP>
DEVICE float sum_of_lanes(float x) {
    for (int mask = LANES / 2; mask > 0; mask /= 2) x += exchange(x, mask);
    return x;
}

template <int LANES = WARP>
DEVICE float largest_of_lanes(float x) {
    for (int mask = LANES / 2; mask > 0; mask /= 2) x = largest(x, exchange(x, mask));
    return x;
}

// The sum over all threads of a block, in each of them. `room` has a place for each warp, and is used once; all threads come here.
template <int THREADS>
DEVICE float sum_of_block(float x, float* room) {
    constexpr int WARPS = THREADS / WARP;
    static_assert(WARPS <= WARP, "a warp has a lane for each");
    x = sum_of_lanes(x);
    if (WARPS == 1) return x;
    if (lane() == 0) room[warp()] = x;
    barrier();
    return sum_of_lanes(lane() < WARPS ? room[lane()] : 0.0f);
}

// The largest over all threads of a block, as `sum_of_block`.
template <int THREADS>
DEVICE float largest_of_block(float x, float* room) {
    constexpr int WARPS = THREADS / WARP;
    x = largest_of_lanes(x);
    if (lane() == 0) room[warp()] = x;
    barrier();
    return largest_of_lanes(room[lane() % WARPS]);
}

// The index of nothing.
constexpr i32 NONE = 0x7fffffff;

// The better of two candidates for the largest value: the earlier one of equals. What is no number is better than all, and has index -1.
struct Best {
    float value;
    i32 index;
    DEVICE void take(float v, i32 i) {
        if (v != v) v = INFINITE, i = -1;
        if (v > value || (v == value && i < index)) value = v, index = i;
    }
};

template <int LANES = WARP>
DEVICE Best best_of_lanes(Best best) {
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        const float value = exchange(best.value, mask);
        best.take(value, exchange(best.index, mask));
    }
    return best;
}
