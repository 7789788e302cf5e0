// Operations that take each element by itself, and quantising, which takes 32.
#pragma once
#include "embed.h"

// Row `row` of floats to bytes. Whole runs of 32 columns are there.
template <int THREADS, int K, class Out>
DEVICE void quantise_row(const float* x, int row, Out out) {
    for (int column = thread(); column < K; column += THREADS) {
        const float value[1] = {x[(u64)row * K + column]};
        out.store(row, column, value);
    }
}

// Row `row` of activations in bytes to floats.
template <int THREADS, int TOKENS, int K, int BYTES>
DEVICE void dequantise_activations(Quantised<TOKENS, K, BYTES> x, int row, float* to) {
    for (int column = thread(); column < K; column += THREADS) {
        int q[BYTES];
        for (int byte = 0; byte < BYTES; byte++) q[byte] = *(const i8*)(x.bytes(row, byte) + column);
        to[column] = step_of<BYTES>(x.scales(row)[column / 32 * 2]) * (float)in_steps(q);
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

// Row `ids[row]` of `height` of activations in bytes as row `row` of others.
template <int THREADS, class From, class To>
DEVICE void get_activations(From from, const i32* ids, int height, To to, int row) {
    constexpr int K = From::WIDTH;
    const int id = load_index(ids + row, height);
    for (int byte = 0; byte < From::OF_EACH; byte++) {
        for (int i = thread(); i < K / 4; i += THREADS) ((u32*)to.bytes(row, byte))[i] = ((const u32*)from.bytes(id, byte))[i];
    }
    for (int i = thread(); i < K / 16; i += THREADS) to.scales(row)[i] = from.scales(id)[i];
}
