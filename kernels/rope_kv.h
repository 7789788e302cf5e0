// Rotary position embedding of heads, with or without an RMSNorm of each before it, and the append of keys and values to their caches.
//
// Pair `i` turns by position * frequency[i]; how much of a whole turn that leaves is computed in double precision, as float32 has no
// bits left for it after some thousand positions.
#pragma once
#include "reduce.h"

// Cosine and sine of `turns` whole turns, to 1e-7: the nearest quarter, then the rest by polynomials.
DEVICE void cos_sin_of_turns(double turns, float& cosine, float& sine) {
    const double quarters = 4 * (turns - rounded(turns)), whole = rounded(quarters);
    const float x = (float)((quarters - whole) * 1.57079632679489661923), y = x * x;
    const float s = x * (1 + y * (-1.6666666667e-1f + y * (8.3333333333e-3f + y * (-1.9841269841e-4f + y * 2.7557319224e-6f))));
    const float c = 1 + y * (-0.5f + y * (4.1666666667e-2f + y * (-1.3888888889e-3f + y * (2.4801587302e-5f - y * 2.7557319224e-7f))));
    const int quarter = (int)whole & 3;
    const float a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
    cosine = quarter == 1 || quarter == 2 ? -a : a;
    sine = quarter == 2 || quarter == 3 ? -b : b;
}

// How far the pairs of a head turn, of which each of `LANES` lanes has some. Pairs are neighbours where `INTERLEAVED`, else columns `i`
// and `i + DIMS / 2`.
template <int LANES, int D, int DIMS, bool INTERLEAVED>
struct Turn {
    static constexpr int PAIRS = DIMS / 2, EACH = (PAIRS + LANES - 1) / LANES;
    float c[EACH > 0 ? EACH : 1], s[EACH > 0 ? EACH : 1];

    // `turns` has the turns of each pair for one position.
    DEVICE void to(int position, int lane, const double* turns, const float* factors) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = e * LANES + lane;
            if (i >= PAIRS) break;
            double of_pair = turns[i] * position;
            if (factors) of_pair /= factors[i];
            cos_sin_of_turns(of_pair, c[e], s[e]);
        }
    }

    // Puts the columns of the head that has `at(i)`: turned, and those after `DIMS` as they are.
    template <class At, class Put>
    DEVICE void apply(int lane, const At& at, const Put& put) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = e * LANES + lane;
            if (i >= PAIRS) break;
            const int first = INTERLEAVED ? 2 * i : i, second = INTERLEAVED ? 2 * i + 1 : i + PAIRS;
            const float a = at(first), b = at(second);
            put(first, a * c[e] - b * s[e]);
            put(second, a * s[e] + b * c[e]);
        }
        for (int i = DIMS + lane; i < D; i += LANES) put(i, at(i));
    }
};

// The columns of a head, normed by `norm` where that is not null.
struct HeadNorm {
    const float* norm;
    float eps;
    // What columns are scaled by whose squares have this sum.
    DEVICE float scale(float squares, int columns) const { return 1.0f / square_root(squares / (float)columns + eps); }
};

// A head of `D` columns to `to`, by the threads of a block: normed, then its first `DIMS` columns turned, if any.
template <int THREADS, int D, int DIMS, bool INTERLEAVED, class As>
DEVICE void rope_head(const float* x, HeadNorm by, const double* turns, const float* factors, int position,
                      typename As::Element* to) {
    __shared__ float room[THREADS / WARP];
    __shared__ float head[D];
    // Angles, before the heads are there.
    Turn<THREADS, D, DIMS, INTERLEAVED> turn;
    turn.to(position, thread(), turns, factors);
    wait_for_previous();
    float squares = 0;
    for (int i = thread(); i < D; i += THREADS) {
        const float value = x[i];
        head[i] = value;
        squares = fused(value, value, squares);
    }
    const float* norm = by.norm;
    const float scale = norm ? by.scale(sum_of_block<THREADS>(squares, room), D) : 1.0f;
    barrier();
    turn.apply(
        thread(), [&](int i) { return norm ? head[i] * scale * norm[i] : head[i]; }, [&](int i, float y) { As::put(to + i, y); });
}
