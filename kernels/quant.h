// The block formats of GGUF, in the file's order or with each field of all blocks in a plane of its own, and activations in bytes.
//
// A lane holds a chunk of a row, `SPAN` columns in `GROUPS` runs of neighbours that share a scale. Of what it loads it makes bytes,
// signed as the format allows, so that `scale * byte - min` is the weight.
#pragma once
#include "device.h"

// Where a field of the blocks of a matrix lies: at byte `FILE` of a block of the file; where planes begin, after `BEFORE` bytes for
// each block.
template <int FILE, int BEFORE, int SIZE>
struct Field {};

// As the file has blocks: one after another, at any address.
struct RowMajor {
    template <class F, int FILE, int BEFORE, int SIZE>
    static DEVICE const u8* at(Field<FILE, BEFORE, SIZE>, const u8* base, u64, u64 block) {
        return base + block * F::BYTES + FILE;
    }
    template <int N>
    static DEVICE void load(const u8* from, u32 (&to)[N]) {
        for (int i = 0; i < N; i++) {
            to[i] = from[4 * i] | from[4 * i + 1] << 8 | from[4 * i + 2] << 16 | (u32)from[4 * i + 3] << 24;
        }
    }
    static DEVICE u16 load_half(const u8* from) { return (u16)(from[0] | from[1] << 8); }
};

// The blocks' fields in planes, the largest first, so that each is aligned to what is loaded at once.
struct Planes {
    template <class F, int FILE, int BEFORE, int SIZE>
    static DEVICE const u8* at(Field<FILE, BEFORE, SIZE>, const u8* base, u64 blocks, u64 block) {
        return base + blocks * BEFORE + block * SIZE;
    }
    template <int N>
    static DEVICE void load(const u8* from, u32 (&to)[N]) {
        if constexpr (N == 4) {
            const Words w = load_once(from);
            for (int i = 0; i < 4; i++) to[i] = w.x[i];
        } else if constexpr (N % 2 == 0 && N != 6) {
            for (int i = 0; i < N; i += 2) {
                const Pair p = *(const Pair*)(from + 4 * i);
                to[i] = p.x[0], to[i + 1] = p.x[1];
            }
        } else {
            for (int i = 0; i < N; i++) to[i] = *(const u32*)(from + 4 * i);
        }
    }
    static DEVICE u16 load_half(const u8* from) { return *(const u16*)from; }
};

// A chunk as numbers.
template <int SPAN, int GROUPS>
struct Weights {
    u32 q[SPAN / 4];
    float scale[GROUPS];
    float min[GROUPS];
};

DEVICE float low_half(u32 word) { return half_to_float((u16)word); }
DEVICE float high_half(u32 word) { return half_to_float((u16)(word >> 16)); }
constexpr u32 NIBBLES = 0x0f0f0f0f;

// Where a field of a chunk's block lies, and some words of it.
#define FIELD(field, offset) (L::template at<Self>(field{}, base, blocks, block) + (offset))

// What formats say of their blocks and chunks.
template <int OF_COLUMNS, int OF_BYTES, int OF_SPAN, int OF_GROUPS, bool WITH_MIN>
struct Blocks {
    static constexpr int BLOCK = OF_COLUMNS, BYTES = OF_BYTES, SPAN = OF_SPAN, GROUPS = OF_GROUPS;
    // Chunks of a block.
    static constexpr int CHUNKS = BLOCK / SPAN;
    // Columns of a run.
    static constexpr int RUN = SPAN / GROUPS;
    // Whether weights have a minimum. Runs that have are of 32 columns, whose sums the activations have, or take sums of their own.
    static constexpr bool MIN = WITH_MIN;
    typedef Weights<SPAN, GROUPS> Chunk;
    // Where a run of a chunk begins, within its block.
    static DEVICE int column(int, int g) { return RUN * g; }
};

// d * (q - 8)
struct Q4_0 : Blocks<32, 18, 32, 1, true> {
    typedef Q4_0 Self;
    typedef Field<0, 16, 2> D;
    typedef Field<2, 0, 16> Q;
    struct Raw {
        u32 q[4];
        float d;
    };
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int) {
        Raw r;
        L::load(FIELD(Q, 0), r.q);
        r.d = half_to_float(L::load_half(FIELD(D, 0)));
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        for (int i = 0; i < 4; i++) w.q[i] = r.q[i] & NIBBLES, w.q[4 + i] = r.q[i] >> 4 & NIBBLES;
        w.scale[0] = r.d;
        w.min[0] = 8 * r.d;
        return w;
    }
};

// d * q + m
struct Q4_1 : Blocks<32, 20, 32, 1, true> {
    typedef Q4_1 Self;
    typedef Field<0, 16, 4> DM;
    typedef Field<4, 0, 16> Q;
    struct Raw {
        u32 q[4];
        u32 dm[1];
    };
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int) {
        Raw r;
        L::load(FIELD(Q, 0), r.q);
        L::load(FIELD(DM, 0), r.dm);
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        for (int i = 0; i < 4; i++) w.q[i] = r.q[i] & NIBBLES, w.q[4 + i] = r.q[i] >> 4 & NIBBLES;
        w.scale[0] = low_half(r.dm[0]);
        w.min[0] = -high_half(r.dm[0]);
        return w;
    }
};

// Bits `4i..4i + 4` of a word as bit 4 of the four bytes of word `i`.
DEVICE u32 fifth_bits(u32 bits, int i) {
    const u32 four = bits >> (4 * i);
    return (four & 1) << 4 | (four & 2) << 11 | (four & 4) << 18 | (four & 8) << 25;
}

// d * (q - 16)
struct Q5_0 : Blocks<32, 22, 32, 1, true> {
    typedef Q5_0 Self;
    typedef Field<0, 20, 2> D;
    typedef Field<2, 16, 4> H;
    typedef Field<6, 0, 16> Q;
    struct Raw {
        u32 q[4];
        u32 h[1];
        float d;
    };
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int) {
        Raw r;
        L::load(FIELD(Q, 0), r.q);
        L::load(FIELD(H, 0), r.h);
        r.d = half_to_float(L::load_half(FIELD(D, 0)));
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        for (int i = 0; i < 4; i++) {
            w.q[i] = (r.q[i] & NIBBLES) | fifth_bits(r.h[0], i);
            w.q[4 + i] = (r.q[i] >> 4 & NIBBLES) | fifth_bits(r.h[0], 4 + i);
        }
        w.scale[0] = r.d;
        w.min[0] = 16 * r.d;
        return w;
    }
};

// d * q + m
struct Q5_1 : Blocks<32, 24, 32, 1, true> {
    typedef Q5_1 Self;
    typedef Field<0, 20, 4> DM;
    typedef Field<4, 16, 4> H;
    typedef Field<8, 0, 16> Q;
    struct Raw {
        u32 q[4];
        u32 h[1];
        u32 dm[1];
    };
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int) {
        Raw r;
        L::load(FIELD(Q, 0), r.q);
        L::load(FIELD(H, 0), r.h);
        L::load(FIELD(DM, 0), r.dm);
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        for (int i = 0; i < 4; i++) {
            w.q[i] = (r.q[i] & NIBBLES) | fifth_bits(r.h[0], i);
            w.q[4 + i] = (r.q[i] >> 4 & NIBBLES) | fifth_bits(r.h[0], 4 + i);
        }
        w.scale[0] = low_half(r.dm[0]);
        w.min[0] = -high_half(r.dm[0]);
        return w;
    }
};

// d * q
struct Q8_0 : Blocks<32, 34, 32, 1, false> {
    typedef Q8_0 Self;
    typedef Field<0, 32, 2> D;
    typedef Field<2, 0, 32> Q;
    struct Raw {
        u32 a[4], b[4];
        float d;
    };
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int) {
        Raw r;
        L::load(FIELD(Q, 0), r.a);
        L::load(FIELD(Q, 16), r.b);
        r.d = half_to_float(L::load_half(FIELD(D, 0)));
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        for (int i = 0; i < 4; i++) w.q[i] = r.a[i], w.q[4 + i] = r.b[i];
        w.scale[0] = r.d;
        return w;
    }
};

// An E8M0 scale times E2M1: twice 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives are integers.
struct MXFP4 : Blocks<32, 17, 32, 1, false> {
    typedef MXFP4 Self;
    typedef Field<0, 16, 1> E;
    typedef Field<1, 0, 16> Q;
    struct Raw {
        u32 q[4];
        u32 e;
    };
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int) {
        Raw r;
        L::load(FIELD(Q, 0), r.q);
        r.e = *FIELD(E, 0);
        return r;
    }
    static DEVICE u32 values(u32 nibbles) {
        const u32 index = nibbles & 0x07070707, negative = (nibbles >> 3 & 0x01010101) * 255;
        const u32 up = pick_bytes(0x03020100, 0x0c080604, index), down = pick_bytes(0xfdfeff00, 0xf4f8fafc, index);
        return (up & ~negative) | (down & negative);
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        for (int i = 0; i < 4; i++) w.q[i] = values(r.q[i] & NIBBLES), w.q[4 + i] = values(r.q[i] >> 4 & NIBBLES);
        w.scale[0] = scale_of(r.e);
        return w;
    }
    // 2^(e - 128), which is subnormal for the smallest two.
    static DEVICE float scale_of(u32 e) { return float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23); }
};

// Byte `i` of 0 to 3 of a word.
DEVICE u32 byte_of(u32 word, int i) { return word >> (8 * i) & 255; }

// Scales and minima of sub-blocks `2j` and `2j + 1` of Q4_K and Q5_K, of a header of d, dmin and twelve bytes with six bits of each.
DEVICE void scale_and_min(const u32 (&head)[4], int j, float (&scale)[2], float (&min)[2]) {
    const int shift = 16 * (j & 1);
    const u32 a = head[1] >> shift, b = head[2] >> shift, c = head[3] >> shift;
    const u32 scales = j < 2 ? a & 0x3f3f : (c & 0x0f0f) | (a >> 2 & 0x3030);
    const u32 mins = j < 2 ? b & 0x3f3f : (c >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
    const float d = low_half(head[0]), dmin = high_half(head[0]);
    for (int g = 0; g < 2; g++) scale[g] = d * (float)byte_of(scales, g), min[g] = dmin * (float)byte_of(mins, g);
}

// d * scale * q - dmin * min. A chunk has the 32 low nibbles of one sub-block and the high ones of the next.
struct Q4_K : Blocks<256, 144, 64, 2, true> {
    typedef Q4_K Self;
    typedef Field<0, 128, 16> HEAD;
    typedef Field<16, 0, 128> Q;
    struct Raw {
        u32 q[2][4];
        u32 head[4];
    };
    static DEVICE int column(int part, int g) { return 64 * part + 32 * g; }
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int part) {
        Raw r;
        L::load(FIELD(Q, 32 * part), r.q[0]);
        L::load(FIELD(Q, 32 * part + 16), r.q[1]);
        L::load(FIELD(HEAD, 0), r.head);
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int part) {
        Chunk w;
        for (int i = 0; i < 8; i++) w.q[i] = r.q[i / 4][i % 4] & NIBBLES, w.q[8 + i] = r.q[i / 4][i % 4] >> 4 & NIBBLES;
        scale_and_min(r.head, part, w.scale, w.min);
        return w;
    }
};

// As Q4_K with a fifth bit: of byte l bit 2j for low nibbles of the j-th 64 columns, bit 2j + 1 for high ones.
struct Q5_K : Blocks<256, 176, 64, 2, true> {
    typedef Q5_K Self;
    typedef Field<0, 160, 16> HEAD;
    typedef Field<16, 128, 32> H;
    typedef Field<48, 0, 128> Q;
    struct Raw {
        u32 q[2][4];
        u32 h[2][4];
        u32 head[4];
    };
    static DEVICE int column(int part, int g) { return 64 * part + 32 * g; }
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int part) {
        Raw r;
        for (int i = 0; i < 2; i++) {
            L::load(FIELD(Q, 32 * part + 16 * i), r.q[i]);
            L::load(FIELD(H, 16 * i), r.h[i]);
        }
        L::load(FIELD(HEAD, 0), r.head);
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int part) {
        Chunk w;
        for (int i = 0; i < 8; i++) {
            const u32 q = r.q[i / 4][i % 4], high = r.h[i / 4][i % 4] >> (2 * part);
            w.q[i] = (q & NIBBLES) | (high & 0x01010101) << 4;
            w.q[8 + i] = (q >> 4 & NIBBLES) | (high & 0x02020202) << 3;
        }
        scale_and_min(r.head, part, w.scale, w.min);
        return w;
    }
};

// d * scale * (q - 32). As bytes 4 * (q - 32), which is q shifted up with its highest bit turned. A chunk has low nibbles of 32
// columns and high ones of those 64 later; scales are of 16.
struct Q6_K : Blocks<256, 210, 64, 4, false> {
    typedef Q6_K Self;
    typedef Field<0, 0, 128> LOW;
    typedef Field<128, 128, 64> HIGH;
    typedef Field<192, 192, 16> SCALES;
    typedef Field<208, 208, 2> D;
    struct Raw {
        u32 low[2][4];
        u32 high[2][4];
        u16 scales[2];
        float d;
    };
    static DEVICE int column(int part, int g) { return part / 2 * 128 + part % 2 * 32 + g / 2 * 64 + g % 2 * 16; }
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int part) {
        Raw r;
        for (int i = 0; i < 2; i++) {
            L::load(FIELD(LOW, 32 * part + 16 * i), r.low[i]);
            L::load(FIELD(HIGH, part / 2 * 32 + 16 * i), r.high[i]);
            r.scales[i] = L::load_half(FIELD(SCALES, part / 2 * 8 + part % 2 * 2 + 4 * i));
        }
        r.d = 0.25f * half_to_float(L::load_half(FIELD(D, 0)));
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int part) {
        Chunk w;
        const int shift = part % 2 * 2;
        for (int i = 0; i < 8; i++) {
            const u32 low = r.low[i / 4][i % 4], high = r.high[i / 4][i % 4] >> shift;
            w.q[i] = ((low & NIBBLES) << 2 | (high & 0x03030303) << 6) ^ 0x80808080;
            w.q[8 + i] = ((low >> 2 & 0x3c3c3c3c) | (high & 0x30303030) << 2) ^ 0x80808080;
        }
        for (int g = 0; g < 4; g++) w.scale[g] = r.d * (float)(i8)(r.scales[g / 2] >> (8 * (g % 2)));
        return w;
    }
};

// d * scale * q - dmin * min, scales and minima of 16 columns in four bits each. Sixteen bytes have two bits each of sixteen columns,
// and of those 32, 64 and 96 later.
struct Q2_K : Blocks<256, 84, 64, 4, true> {
    typedef Q2_K Self;
    typedef Field<0, 64, 16> SCALES;
    typedef Field<16, 0, 64> Q;
    typedef Field<80, 80, 4> DM;
    struct Raw {
        u32 q[4];
        u8 scales[4];
        u32 dm[1];
    };
    static DEVICE int column(int part, int g) { return part / 2 * 128 + part % 2 * 16 + 32 * g; }
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int part) {
        Raw r;
        L::load(FIELD(Q, 16 * part), r.q);
        const u8* scales = FIELD(SCALES, part / 2 * 8 + part % 2);
        for (int g = 0; g < 4; g++) r.scales[g] = scales[2 * g];
        L::load(FIELD(DM, 0), r.dm);
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int) {
        Chunk w;
        const float d = low_half(r.dm[0]), dmin = high_half(r.dm[0]);
        for (int g = 0; g < 4; g++) {
            for (int i = 0; i < 4; i++) w.q[4 * g + i] = r.q[i] >> (2 * g) & 0x03030303;
            w.scale[g] = d * (float)(r.scales[g] & 15);
            w.min[g] = dmin * (float)(r.scales[g] >> 4);
        }
        return w;
    }
};

// d * (scale - 32) * (q - 4), the third bit of q in a mask. As bytes 32 * (q - 4). Columns as in Q2_K.
struct Q3_K : Blocks<256, 110, 64, 4, false> {
    typedef Q3_K Self;
    typedef Field<0, 64, 32> H;
    typedef Field<32, 0, 64> Q;
    typedef Field<96, 96, 12> SCALES;
    typedef Field<108, 108, 2> D;
    struct Raw {
        u32 q[4];
        u32 h[4];
        u32 scales[3];
        float d;
    };
    static DEVICE int column(int part, int g) { return part / 2 * 128 + part % 2 * 16 + 32 * g; }
    template <class L>
    static DEVICE Raw load(const u8* base, u64 blocks, u64 block, int part) {
        Raw r;
        L::load(FIELD(Q, 16 * part), r.q);
        L::load(FIELD(H, part % 2 * 16), r.h);
        L::load(FIELD(SCALES, 0), r.scales);
        r.d = half_to_float(L::load_half(FIELD(D, 0))) / 32;
        return r;
    }
    static DEVICE Chunk unpack(const Raw& r, int part) {
        Chunk w;
        for (int g = 0; g < 4; g++) {
            for (int i = 0; i < 4; i++) {
                const u32 third = r.h[i] >> (part / 2 * 4 + g) & 0x01010101;
                w.q[4 * g + i] = ((r.q[i] >> (2 * g) & 0x03030303) << 5 | third << 7) ^ 0x80808080;
            }
            w.scale[g] = r.d * (float)scale_of(r.scales, part / 2 * 8 + 2 * g + part % 2);
        }
        return w;
    }
    // Scale `s` of sixteen has its low four bits in byte s % 8, below or above, and its high two in byte 8 + s % 4.
    static DEVICE int scale_of(const u32 (&scales)[3], int s) {
        const u32 low = byte_of(s % 8 < 4 ? scales[0] : scales[1], s % 4) >> (s / 8 * 4) & 15, high = byte_of(scales[2], s % 4) >> (s / 4 * 2) & 3;
        return (int)(low | high << 4) - 32;
    }
};

// Weights that are numbers already.
struct F32 {
    static constexpr int BYTES = 4;
    static DEVICE float value(const u8* at) { return *(const float*)at; }
    // Sixteen bytes, and of those number `i`. A weight of floats may be what a kernel before this one made.
    static DEVICE Words load(const u8* at) { return *(const Words*)at; }
    static DEVICE float value(const Words& words, int i) { return float_of(words.x[i]); }
};
struct F16 {
    static constexpr int BYTES = 2;
    static constexpr bool IS_HALF = true;
    static DEVICE u16 nearest(float x) { return float_to_half(x); }
    static DEVICE float number(u16 bits) { return half_to_float(bits); }
    static DEVICE float value(const u8* at) { return half_to_float(*(const u16*)at); }
    static DEVICE Words load(const u8* at) { return load_once(at); }
    static DEVICE float value(const Words& words, int i) { return half_to_float((u16)(words.x[i / 2] >> (i % 2 * 16))); }
};
struct BF16 {
    static constexpr int BYTES = 2;
    static constexpr bool IS_HALF = false;
    // The even one of two that are as near.
    static DEVICE u16 nearest(float x) {
        const u32 bits = bits_of(x);
        return x == x ? (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
    }
    static DEVICE float number(u16 bits) { return float_of((u32)bits << 16); }
    static DEVICE float value(const u8* at) { return float_of((u32) * (const u16*)at << 16); }
    static DEVICE Words load(const u8* at) { return load_once(at); }
    static DEVICE float value(const Words& words, int i) { return float_of(words.x[i / 2] >> (i % 2 * 16) << 16); }
};

// Activations `[TOKENS, K]` in `BYTES` bytes each: the first ones of all tokens, then the second ones, d * (q + r / 254); then, of each 32,
// d and their sum.
template <int TOKENS, int K, int BYTES = 1>
struct Quantised {
    static constexpr int WIDTH = K, OF_EACH = BYTES;
    u8* base;
    DEVICE u8* bytes(int token, int byte = 0) const { return base + ((u64)byte * TOKENS + token) * K; }
    DEVICE float* scales(int token) const { return (float*)(base + (u64)BYTES * TOKENS * K) + (u64)token * (K / 32 * 2); }
};

// Steps of a second byte in one of the first.
constexpr int FINE_STEPS = 254;
// What the last byte counts in.
template <int BYTES>
DEVICE float step_of(float d) {
    return BYTES == 1 ? d : d / (float)FINE_STEPS;
}
// Numbers, or sums of products of them, in steps of the last byte.
template <int BYTES>
DEVICE int in_steps(const int (&of)[BYTES]) {
    return BYTES == 1 ? of[0] : FINE_STEPS * of[0] + of[BYTES - 1];
}

// Lanes that have `V` neighbouring columns each of 32 quantise them together: 127 steps to the largest, halves away from zero, and what
// that leaves to a second byte, if there is one. Numbers that are not finite leave d so, and zeros. All lanes of a warp come here, though
// not all of them store.
template <int V, int TOKENS, int K, int BYTES>
DEVICE void quantise_lanes(const float (&x)[V], Quantised<TOKENS, K, BYTES> to, int token, int column, bool is_there) {
    constexpr int LANES = 32 / V;
    u32 most = 0;
    // Magnitudes are ordered as their bits are, with infinity and then NaN above all else.
#pragma unroll
    for (int v = 0; v < V; v++) most = larger(most, bits_of(magnitude(x[v])));
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) most = larger(most, exchange(most, mask));
    const float d = float_of(most) / 127.0f;
    int sum = 0;
    u32 packed[BYTES] = {};
#pragma unroll
    for (int v = 0; v < V; v++) {
        int q[BYTES];
        float rest = x[v];
#pragma unroll
        for (int byte = 0; byte < BYTES; byte++) {
            const float step = byte == 0 ? d : step_of<BYTES>(d);
            float exact = step > 0 && d < INFINITE ? rest / step : 0.0f;
            exact = exact > 127 ? 127.0f : exact < -127 ? -127.0f : exact;
            q[byte] = (int)rounded(exact);
            rest -= d * (float)q[byte];
            packed[byte] |= (u32)(q[byte] & 255) << (8 * v);
        }
        sum += in_steps(q);
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) sum += exchange(sum, mask);
    if (!is_there) return;
#pragma unroll
    for (int byte = 0; byte < BYTES; byte++) {
        u8* bytes = to.bytes(token, byte) + column;
        if constexpr (V == 4) {
            *(u32*)bytes = packed[byte];
        } else {
            *bytes = (u8)packed[byte];
        }
    }
    float* scales = to.scales(token) + column / 32 * 2;
    if (lane() % LANES == 0) scales[0] = d, scales[1] = step_of<BYTES>(d) * (float)sum;
}

// Where numbers of a row go, `V` neighbouring columns at a time.
template <int K>
struct StoreFloats {
    float* base;
    template <int V>
    DEVICE void store(int token, int column, const float (&x)[V], bool is_there = true) const {
        if (!is_there) return;
        float* to = base + (u64)token * K + column;
        if constexpr (V == 4) {
            *(Words*)to = {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
        } else {
            *to = x[0];
        }
    }
};
template <int TOKENS, int K, int BYTES = 1>
struct StoreQuantised {
    Quantised<TOKENS, K, BYTES> to;
    template <int V>
    DEVICE void store(int token, int column, const float (&x)[V], bool is_there = true) const {
        quantise_lanes(x, to, token, column, is_there);
    }
};
// Nowhere.
struct StoreNothing {
    template <int V>
    DEVICE void store(int, int, const float (&)[V], bool = true) const {}
};
