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

// Elements of caches.
struct AsFloat {
    typedef float Element;
    static DEVICE void put(float* to, float x) { *to = x; }
};
struct AsHalf {
    typedef u16 Element;
    static DEVICE void put(u16* to, float x) { *to = float_to_half(x); }
};

// A head of `D` columns to `to`: normed by `norm` where that is not null, then its first `DIMS` columns turned, if any. `turns` has
// the turns of each pair for one position. Pairs are neighbours where `INTERLEAVED`, else columns `i` and `i + DIMS / 2`.
template <int THREADS, int D, int DIMS, bool INTERLEAVED, class As>
DEVICE void rope_head(const float* x, const float* norm, float eps, const double* turns, const float* factors, int position,
                      typename As::Element* to) {
    constexpr int PAIRS = DIMS / 2, EACH = (PAIRS + THREADS - 1) / THREADS;
    __shared__ float room[THREADS / WARP];
    __shared__ float head[D];
    // Angles, before the heads are there.
    float c[EACH > 0 ? EACH : 1], s[EACH > 0 ? EACH : 1];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = e * THREADS + thread();
        if (i >= PAIRS) break;
        double of_pair = turns[i] * position;
        if (factors) of_pair /= factors[i];
        cos_sin_of_turns(of_pair, c[e], s[e]);
    }
    wait_for_previous();
    float squares = 0;
    for (int i = thread(); i < D; i += THREADS) {
        const float value = x[i];
        head[i] = value;
        squares = fused(value, value, squares);
    }
    float scale = 1;
    if (norm) scale = 1.0f / square_root(sum_of_block<THREADS>(squares, room) / (float)D + eps);
    barrier();
    const auto at = [&](int i) { return norm ? head[i] * scale * norm[i] : head[i]; };
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = e * THREADS + thread();
        if (i >= PAIRS) break;
        const int first = INTERLEAVED ? 2 * i : i, second = INTERLEAVED ? 2 * i + 1 : i + PAIRS;
        const float a = at(first), b = at(second);
        As::put(to + first, a * c[e] - b * s[e]);
        As::put(to + second, a * s[e] + b * c[e]);
    }
    for (int i = DIMS + thread(); i < D; i += THREADS) As::put(to + i, at(i));
}
