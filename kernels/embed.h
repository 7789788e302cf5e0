// Rows of tables and whole tensors as floats.
#pragma once
#include "matvec.h"

// A table of blocks with `ROWS` rows.
template <class F, class L, int ROWS, int K>
struct Table {
    const u8* base;

    // Thread `i` of `THREADS` dequantises chunks i, i + THREADS, … of a row.
    template <int THREADS>
    DEVICE void dequantise(int row, float* to) const {
        constexpr u64 BLOCKS = (u64)ROWS * (K / F::BLOCK);
        for (int chunk = thread(); chunk < K / F::SPAN; chunk += THREADS) {
            const int part = chunk % F::CHUNKS;
            const u64 block = (u64)row * (K / F::BLOCK) + chunk / F::CHUNKS;
            const auto w = F::unpack(F::template load<L>(base, BLOCKS, block, part), part);
            float* block_to = to + chunk / F::CHUNKS * F::BLOCK;
            for (int i = 0; i < F::SPAN; i++) {
                const int g = i / F::RUN;
                float value = w.scale[g] * (float)(i8)(w.q[i / 4] >> (8 * (i % 4)));
                if constexpr (F::MIN) value -= w.min[g];
                block_to[F::column(part, g) + i % F::RUN] = value;
            }
        }
    }
};
// A table of numbers.
template <class F, int K>
struct NumberTable {
    const u8* base;

    template <int THREADS>
    DEVICE void dequantise(int row, float* to) const {
        for (int k = thread(); k < K; k += THREADS) to[k] = F::value(base + ((u64)row * K + k) * F::BYTES);
    }
};

// A row of a table, by all threads of a block; a barrier must follow.
template <int THREADS, class T>
DEVICE void dequantise_row(T table, int row, float* to) {
    table.template dequantise<THREADS>(row, to);
}

// Copies row `ids[row]` of `height` rows of `BYTES` bytes to row `row`.
template <int THREADS, int BYTES>
DEVICE void get_row(const u8* table, const i32* ids, int height, u8* out, int row) {
    const u8* from = table + (u64)load_index(ids + row, height) * BYTES;
    u8* to = out + (u64)row * BYTES;
    if constexpr (BYTES % 4 == 0) {
        for (int i = 4 * thread(); i < BYTES; i += 4 * THREADS) *(u32*)(to + i) = *(const u32*)(from + i);
    } else {
        for (int i = thread(); i < BYTES; i += THREADS) to[i] = from[i];
    }
}
