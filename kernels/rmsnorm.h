// RMSNorm of rows of `K`: y = x / sqrt(mean(x²) + eps) * weight, of a sum, of dequantised embedding rows or of floats; to floats, to
// bytes, or to both. A block takes a row, which its threads keep in registers, `V` neighbouring columns at a time.
#pragma once
#include "embed.h"
#include "reduce.h"

template <int V>
DEVICE void load_floats(const float* from, float (&to)[V]) {
    if constexpr (V == 4) {
        const Words w = *(const Words*)from;
        for (int v = 0; v < 4; v++) to[v] = float_of(w.x[v]);
    } else {
        to[0] = *from;
    }
}

// Where rows come from.
template <int K>
struct FromFloats {
    const float* x;
    DEVICE void prepare(int) const {}
    template <int V>
    DEVICE void load(int row, int column, float (&to)[V]) const {
        load_floats<V>(x + (u64)row * K + column, to);
    }
};
template <int K>
struct FromSum {
    const float *a, *b;
    DEVICE void prepare(int) const {}
    template <int V>
    DEVICE void load(int row, int column, float (&to)[V]) const {
        float other[V];
        load_floats<V>(a + (u64)row * K + column, to);
        load_floats<V>(b + (u64)row * K + column, other);
        for (int v = 0; v < V; v++) to[v] += other[v];
    }
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
    template <int V>
    DEVICE void load(int, int column, float (&to)[V]) const {
        load_floats<V>(room + column, to);
    }
};

template <int THREADS, int K, class Source, class Quant>
DEVICE void rms_norm(Source source, const float* weight, float eps, int row, float* rows, float* norm, Quant quant) {
    constexpr int V = K % 4 == 0 ? 4 : 1, EACH = (K + THREADS * V - 1) / (THREADS * V);
    __shared__ float room[THREADS / WARP];
    float x[EACH][V], w[EACH][V], squares = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int column = (e * THREADS + thread()) * V;
        for (int v = 0; v < V; v++) x[e][v] = w[e][v] = 0;
        if (column < K) load_floats<V>(weight + column, w[e]);
    }
    wait_for_previous();
    source.prepare(row);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int column = (e * THREADS + thread()) * V;
        if (column < K) source.load(row, column, x[e]);
        for (int v = 0; v < V; v++) squares = fused(x[e][v], x[e][v], squares);
    }
    const float mean = sum_of_block<THREADS>(squares, room) / (float)K;
    const float scale = 1.0f / square_root(mean + eps);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int column = (e * THREADS + thread()) * V;
        const bool is_there = column < K;
        float y[V];
        for (int v = 0; v < V; v++) y[v] = x[e][v] * scale * w[e][v];
        if (rows) StoreFloats<K>{rows}.store(row, column, x[e], is_there);
        if (norm) StoreFloats<K>{norm}.store(row, column, y, is_there);
        quant.store(row, column, y, is_there);
    }
}
