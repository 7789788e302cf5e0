// RMSNorm of rows of `K`: y = x / sqrt(mean(x²) + eps) * weight, of a sum, of dequantised embedding rows or of floats; to floats, to 8
// bits, or to both. A block takes a row, which its threads keep in registers: thread `i` columns i, i + THREADS, …
#pragma once
#include "embed.h"
#include "reduce.h"

// Where rows come from.
template <int K>
struct FromFloats {
    const float* x;
    DEVICE void prepare(int) const {}
    DEVICE float at(int row, int column) const { return x[(u64)row * K + column]; }
};
template <int K>
struct FromSum {
    const float *a, *b;
    DEVICE void prepare(int) const {}
    DEVICE float at(int row, int column) const { return a[(u64)row * K + column] + b[(u64)row * K + column]; }
};
// Rows `ids[row]` of a table of `height` rows, dequantised on the way through `room`.
template <int THREADS, int K, class Table>
struct FromTable {
    Table table;
    const i32* ids;
    int height;
    float* room;
    DEVICE void prepare(int row) const {
        dequantise_row<THREADS>(table, load_index(ids + row, height), room);
        barrier();
    }
    DEVICE float at(int, int column) const { return room[column]; }
};

template <int THREADS, int K, class Source, class Quant>
DEVICE void rms_norm(Source source, const float* weight, float eps, int row, float* rows, float* norm, Quant quant) {
    constexpr int EACH = (K + THREADS - 1) / THREADS;
    __shared__ float room[THREADS / WARP];
    source.prepare(row);
    float x[EACH], squares = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int column = e * THREADS + thread();
        x[e] = column < K ? source.at(row, column) : 0.0f;
        squares = fused(x[e], x[e], squares);
    }
    const float mean = sum_of_block<THREADS>(squares, room) / (float)K;
    const float scale = 1.0f / square_root(mean + eps);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int column = e * THREADS + thread();
        const bool is_there = column < K;
        const float y = is_there ? x[e] * scale * weight[column] : 0.0f;
        if (rows && is_there) rows[(u64)row * K + column] = x[e];
        if (norm && is_there) norm[(u64)row * K + column] = y;
        // Whole runs of 32 are there, or none of them.
        if (is_there) quant.store(row, column, y, true);
    }
}
