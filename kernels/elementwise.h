// Operations that take each element by itself, and quantising to 8 bits, which takes 32.
#pragma once
#include "embed.h"

// Row `row` of floats to 8 bits. Whole runs of 32 columns are there.
template <int THREADS, int K, class Out>
DEVICE void quantise_row(const float* x, int row, Out out) {
    for (int column = thread(); column < K; column += THREADS) {
        const float value[1] = {x[(u64)row * K + column]};
        out.store(row, column, value);
    }
}

// Row `row` of activations in 8 bits to floats.
template <int THREADS, int TOKENS, int K>
DEVICE void dequantise_activations(Quantised<TOKENS, K> x, int row, float* to) {
    for (int column = thread(); column < K; column += THREADS) {
        to[column] = x.scales(row)[column / 32 * 2] * (float)*(const i8*)(x.bytes(row) + column);
    }
}

template <int THREADS, int TOKENS, int K>
DEVICE void dequantise_activations(QuantisedTwice<TOKENS, K> x, int row, float* to) {
    for (int column = thread(); column < K; column += THREADS) {
        const int both = FINE_STEPS * *(const i8*)(x.bytes(row) + column) + *(const i8*)(x.fine(row) + column);
        to[column] = x.scales(row)[column / 32 * 2] / (float)FINE_STEPS * (float)both;
    }
}

// silu(gate) * up of column `column` and token `token`, wherever `out` stores it.
template <int K, class Out>
DEVICE void swiglu(const float* gate, const float* up, int token, int column, Out out) {
    if (column >= K) return;
    const u64 at = (u64)token * K + column;
    const float value[1] = {silu(gate[at]) * up[at]};
    out.store(token, column, value);
}

// Row `ids[row]` of `height` of activations in 8 bits, or in `BYTES` of those, as row `row` of others.
template <int THREADS, int BYTES, class From, class To>
DEVICE void get_activations(From from, const i32* ids, int height, To to, int row) {
    constexpr int K = From::WIDTH;
    const int id = load_index(ids + row, height);
    for (int i = thread(); i < BYTES * K / 4; i += THREADS) ((u32*)to.bytes(row))[i] = ((const u32*)from.bytes(id))[i];
    for (int i = thread(); i < K / 16; i += THREADS) to.scales(row)[i] = from.scales(id)[i];
}
