// Weights in blocks times the activations of many tokens, on matrix units of halves: activations are rounded to halves (`matmul_halves.h`), and
// weights are unpacked to such. A sum then takes neither a scale for each run nor integers that become floats, and activations keep eleven bits.
//
// A tile has 64 columns at once. A thread unpacks those of a row, threads of as many rows taking turns, and has those of its next turn on their way
// while the warps multiply.
#pragma once
#include "matmul_halves.h"

// Weights are multiplied by this in a tile: most are small, and halves below 2^-14 have fewer bits. Scales and weights of 1024 or more become
// infinite; no model is known to have any.
constexpr float LARGER = 64;

template <int ROWS, int TOKENS, int THREADS>
struct UnpackedTile : Squares<ROWS, TOKENS, THREADS> {
    // Activations are copied to the one while the other is multiplied, or held in registers until then.
    static constexpr int STAGES = Copy::IS_HELD ? 1 : 2;
    struct Columns {
        HalfRows<ROWS, TILE_COLUMNS> w;
        HalfRows<TOKENS, TILE_COLUMNS> x[STAGES];
    };
    union {
        Columns columns;
        typename Squares<ROWS, TOKENS, THREADS>::template Results<sizeof(Columns)> results;
    };
    static constexpr int TURNS = THREADS / ROWS;
    static_assert(ROWS % WARP == 0 && TURNS * ROWS == THREADS, "all lanes of a warp unpack in the same turn");
    // The row that this thread unpacks, and in which turn.
    static DEVICE int own_row() { return (u32)thread() % ROWS; }
    static DEVICE int turn() { return (u32)thread() / ROWS; }
};

// Bytes `2 * pair` and the next of a word, signed or of 0 to 127, as halves: those from 1024 on have a unit for their last bit.
template <bool IS_SIGNED>
DEVICE u32 halves_of_bytes(u32 bytes, int pair) {
    const u32 after = pick_bytes(IS_SIGNED ? bytes ^ 0x80808080 : bytes, 0x64646464, pair == 0 ? 0x04010400 : 0x04030402);
    return differences(after, IS_SIGNED ? 0x64806480 : 0x64006400);
}

// Unpacks 64 columns of a row, those that are number `step`.
template <class F, int ROWS>
DEVICE void unpack_row(HalfRows<ROWS, TILE_COLUMNS>& to, int row, const typename F::Raw (&raw)[TILE_COLUMNS / F::SPAN], int step) {
    constexpr int CHUNKS = TILE_COLUMNS / F::SPAN;
#pragma unroll
    for (int p = 0; p < CHUNKS; p++) {
        const typename F::Chunk w = F::unpack(raw[p], (step * CHUNKS + p) % F::CHUNKS);
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            const u32 scale = two_halves(LARGER * w.scale[g]);
            u32 less = 0;
            if constexpr (F::MIN) less = two_halves(-LARGER * w.min[g]);
#pragma unroll
            for (int v = g * F::RUN / 8; v < (g + 1) * F::RUN / 8; v++) {
                Words words;
                // Of formats with a minimum no byte is negative.
#pragma unroll
                for (int i = 0; i < 4; i++) words.x[i] = fused_halves(halves_of_bytes<!F::MIN>(w.q[2 * v + i / 2], i % 2), scale, less);
                *(Words*)to.at(row, 0, p * F::SPAN / 8 + v) = words;
            }
        }
    }
}

// What a thread copies of activations at each step: a vector of each of some rows, in the order in which a format's weights are unpacked.
template <class F, class T, int K>
struct ColumnCopies {
    typedef HalfRows<T::TOKENS, TILE_COLUMNS> To;
    static constexpr int AT_ONCE = T::THREADS / To::VECTORS, EACH = T::TOKENS / AT_ONCE;
    static_assert(AT_ONCE % 8 == 0 && T::TOKENS % AT_ONCE == 0, "rows that a thread copies have their vectors in the same places");
    const u8* from;
    // Rows after the first.
    int last;
    Copy copies[EACH];

    DEVICE ColumnCopies(const u8* base, int rows, int step) {
        const int first = least(row(), rows - 1);
        last = rows - 1 - first;
        // Runs of a chunk lie apart in some formats, by as much in each.
        const int column = column_of_run<F>(0, vector() * 8 / F::RUN) + vector() * 8 % F::RUN;
        from = base + 2 * (first * K + column + column_of_run<F>(step, 0));
    }
    static DEVICE int row() { return (u32)thread() / To::VECTORS; }
    static DEVICE int vector() { return (u32)thread() % To::VECTORS; }

    // Those of step `step`, which come one after another from the constructor's on. Beyond the last row it is copied again, but where squares of no
    // row are passed over.
    DEVICE void begin(To& to, int step) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (is_copied(i)) copies[i].begin(to.at(row(), i * AT_ONCE, vector()), from + (u64)(u32)least(i * AT_ONCE, last) * (2 * K));
        }
        from += 2 * (column_of_run<F>(step + 1, 0) - column_of_run<F>(step, 0));
    }
    DEVICE void finish(To& to) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (is_copied(i)) copies[i].finish(to.at(row(), i * AT_ONCE, vector()));
        }
    }
    DEVICE bool is_copied(int i) const { return !T::SKIPS || i * AT_ONCE <= last; }
};

// All products of a tile, of range `range` of the columns. Row `row` of the weight's is what this thread unpacks.
template <class F, class L, int RANGES, class T, int K>
DEVICE void sum_unpacked_tile(T& tile, const u8* weight, int rows, int row, Rounded<F16, K> x, int token, int tokens, int range,
                              typename T::Sums& sums) {
    constexpr int STEPS = K / TILE_COLUMNS;
    static_assert(K % TILE_COLUMNS == 0 && RANGES <= STEPS, "steps are whole, and each range has one");
    const int first = STEPS * range / RANGES, end = STEPS * (range + 1) / RANGES;
    sums.clear();
    tokens -= token;
    typename F::Raw raw[TILE_COLUMNS / F::SPAN];
    if (first + T::turn() < end) load_weights<F, L, K>(raw, weight, rows, row, first + T::turn());
    ColumnCopies<F, T, K> activations(x.row(token), tokens, first);
    const auto begin = [&](int step) {
        activations.begin(tile.columns.x[(step - first) % T::STAGES], step);
        end_step_of_copies();
    };
    wait_for_previous();
    begin(first);
#pragma unroll 1
    for (int step = first; step < end; step++) {
        const auto& now = tile.columns.x[(step - first) % T::STAGES];
        // No warp multiplies what is written over now.
        barrier();
        if ((step - first) % T::TURNS == T::turn()) {
            unpack_row<F>(tile.columns.w, T::own_row(), raw, step);
            if (step + T::TURNS < end) load_weights<F, L, K>(raw, weight, rows, row, step + T::TURNS);
        }
        activations.finish(tile.columns.x[(step - first) % T::STAGES]);
        wait_for_copies<0>();
        barrier();
        if (step + 1 < end) begin(step + 1);
        // Else compilers keep the places of all columns in registers.
        u32 zero = 0;
        forget(zero);
#pragma unroll
        for (int columns = 0; columns < TILE_COLUMNS / 16; columns++) {
            HalfShares<T> shares;
            shares.load(tile.columns.w, now, 32 * columns ^ zero, tokens);
            shares.template multiply<F16>(tokens, sums);
        }
    }
}

// As `matmul_halves`.
template <class F, class L, int RANGES, class T, int K>
DEVICE void matmul_unpacked(T& tile, Part part, Rounded<F16, K> x, int block, int tokens) {
    const int token = block_x() * T::TOKENS, first = block * T::ROWS;
    const int range = RANGES > 1 ? block_z() : 0;
    typename T::Sums sums;
    sum_unpacked_tile<F, L, RANGES>(tile, part.weight, part.rows, least(first + T::own_row(), part.rows - 1), x, token, tokens, range, sums);
    store_sums<T>(part, x, 1 / LARGER, first, token, tokens, range, sums);
}

// As `matmul_halves_swiglu`.
template <class F, class L, class T, int K, class Out>
DEVICE void matmul_unpacked_swiglu(T& tile, const u8* gate, const u8* up, int rows, Rounded<F16, K> x, int block, int tokens, Out out) {
    const int token = block_x() * T::TOKENS, first = block * T::HALF;
    const u8* weight = OfBoth<T>::is_up(T::own_row()) ? up : gate;
    typename T::Sums sums;
    sum_unpacked_tile<F, L, 1>(tile, weight, rows, least(first + OfBoth<T>::row(T::own_row()), rows - 1), x, token, tokens, 0, sums);
    store_swiglu(tile, x, 1 / LARGER, first, rows, token, tokens, sums, out);
}
