// The block formats of GGUF, each field of all blocks in a plane of its own, as matrix units of `multiply_eight` take them: four lanes share 256 columns
// of a row, and lane `t` of them has columns `8 t` to `8 t + 7` of each run of 32.
//
// Of run `r`, `word(r, 0)` and `word(r, 1)` are its bytes. What is summed of the run counts `scale` times `unit`, and of the activations' sum
// `min` times `min_unit` is taken off. Where `HALVES` are told apart, the run has two scales: of its first 16 columns, and of its last.
#pragma once
#include "quant.h"

constexpr int QUAD_COLUMNS = 256, QUAD_RUNS = QUAD_COLUMNS / 32;

// Which of the four lanes this is.
DEVICE int of_quad() { return lane() % 4; }

template <bool WITH_HALVES, bool WITH_MIN>
struct QuadOf {
    static constexpr bool HALVES = WITH_HALVES, MIN = WITH_MIN;
    DEVICE float unit() const { return 1; }
    DEVICE float min_unit() const { return 1; }
};

template <class F>
struct Quad;

// Where a field of the block `block` lies: less than 4 GiB from the first block's, so that all lanes share a base and have offsets of 32 bits.
template <int FILE, int BEFORE, int SIZE>
DEVICE const u8* in_plane(Field<FILE, BEFORE, SIZE>, const u8* base, u64 blocks, u32 block) {
    return base + blocks * BEFORE + (u64)(block * (u32)SIZE);
}
#define PLANE(format, field) (in_plane(format::field{}, base, blocks, block))

// Number `i` of eight halves.
DEVICE float half_of(const Words& halves, int i) { return half_to_float((u16)(halves.x[i / 2] >> (i % 2 * 16))); }

// Nibbles of eight blocks of 32 columns, whose low ones are of the first 16: two lanes have the same bytes.
struct NibblesOfEight {
    Pair q[QUAD_RUNS];
    DEVICE void load(const u8* from) {
        for (int r = 0; r < QUAD_RUNS; r++) q[r] = load_once_pair(from + 16 * r + of_quad() % 2 * 8);
    }
    DEVICE u32 word(int r, int i) const { return q[r].x[i] >> (of_quad() / 2 * 4) & NIBBLES; }
};

template <>
struct Quad<Q4_0> : QuadOf<false, true> {
    NibblesOfEight q;
    Words d;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        q.load(PLANE(Q4_0, Q));
        d = *(const Words*)PLANE(Q4_0, D);
    }
    DEVICE u32 word(int r, int i) const { return q.word(r, i); }
    DEVICE float scale(int r) const { return half_of(d, r); }
    DEVICE float min(int r) const { return scale(r); }
    DEVICE float min_unit() const { return 8; }
};

template <>
struct Quad<Q4_1> : QuadOf<false, true> {
    NibblesOfEight q;
    Words dm[2];
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        q.load(PLANE(Q4_1, Q));
        for (int i = 0; i < 2; i++) dm[i] = *(const Words*)(PLANE(Q4_1, DM) + 16 * i);
    }
    DEVICE u32 word(int r, int i) const { return q.word(r, i); }
    DEVICE float scale(int r) const { return low_half(dm[r / 4].x[r % 4]); }
    DEVICE float min(int r) const { return high_half(dm[r / 4].x[r % 4]); }
    DEVICE float min_unit() const { return -1; }
};

template <>
struct Quad<Q5_0> : QuadOf<false, true> {
    NibblesOfEight q;
    Words h[2], d;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        q.load(PLANE(Q5_0, Q));
        for (int i = 0; i < 2; i++) h[i] = *(const Words*)(PLANE(Q5_0, H) + 16 * i);
        d = *(const Words*)PLANE(Q5_0, D);
    }
    DEVICE u32 word(int r, int i) const { return q.word(r, i) | fifth_bits(h[r / 4].x[r % 4], 2 * of_quad() + i); }
    DEVICE float scale(int r) const { return half_of(d, r); }
    DEVICE float min(int r) const { return scale(r); }
    DEVICE float min_unit() const { return 16; }
};

template <>
struct Quad<Q5_1> : QuadOf<false, true> {
    NibblesOfEight q;
    Words h[2], dm[2];
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        q.load(PLANE(Q5_1, Q));
        for (int i = 0; i < 2; i++) h[i] = *(const Words*)(PLANE(Q5_1, H) + 16 * i), dm[i] = *(const Words*)(PLANE(Q5_1, DM) + 16 * i);
    }
    DEVICE u32 word(int r, int i) const { return q.word(r, i) | fifth_bits(h[r / 4].x[r % 4], 2 * of_quad() + i); }
    DEVICE float scale(int r) const { return low_half(dm[r / 4].x[r % 4]); }
    DEVICE float min(int r) const { return high_half(dm[r / 4].x[r % 4]); }
    DEVICE float min_unit() const { return -1; }
};

template <>
struct Quad<Q8_0> : QuadOf<false, false> {
    Pair q[QUAD_RUNS];
    Words d;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        for (int r = 0; r < QUAD_RUNS; r++) q[r] = load_once_pair(PLANE(Q8_0, Q) + 32 * r + of_quad() * 8);
        d = *(const Words*)PLANE(Q8_0, D);
    }
    DEVICE u32 word(int r, int i) const { return q[r].x[i]; }
    DEVICE float scale(int r) const { return half_of(d, r); }
};

template <>
struct Quad<MXFP4> : QuadOf<false, false> {
    NibblesOfEight q;
    Pair e;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        q.load(PLANE(MXFP4, Q));
        e = *(const Pair*)PLANE(MXFP4, E);
    }
    DEVICE u32 word(int r, int i) const { return MXFP4::values(q.word(r, i)); }
    DEVICE float scale(int r) const { return MXFP4::scale_of(byte_of(e.x[r / 4], r % 4)); }
};

// Scales and minima of the eight sub-blocks of Q4_K and Q5_K, as bytes.
struct SixBits {
    Words head;
    DEVICE u32 scales(int four) const { return four == 0 ? head.x[1] & 0x3f3f3f3f : (head.x[3] & NIBBLES) | (head.x[1] >> 2 & 0x30303030); }
    DEVICE u32 mins(int four) const { return four == 0 ? head.x[2] & 0x3f3f3f3f : (head.x[3] >> 4 & NIBBLES) | (head.x[2] >> 2 & 0x30303030); }
    DEVICE float scale(int r) const { return (float)byte_of(scales(r / 4), r % 4); }
    DEVICE float min(int r) const { return (float)byte_of(mins(r / 4), r % 4); }
    DEVICE float unit() const { return low_half(head.x[0]); }
    DEVICE float min_unit() const { return high_half(head.x[0]); }
};

template <>
struct Quad<Q4_K> : SixBits {
    static constexpr bool HALVES = false, MIN = true;
    Pair q[4];
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        for (int c = 0; c < 4; c++) q[c] = load_once_pair(PLANE(Q4_K, Q) + 32 * c + of_quad() * 8);
        head = *(const Words*)PLANE(Q4_K, HEAD);
    }
    DEVICE u32 word(int r, int i) const { return q[r / 2].x[i] >> (r % 2 * 4) & NIBBLES; }
};

template <>
struct Quad<Q5_K> : SixBits {
    static constexpr bool HALVES = false, MIN = true;
    Pair q[4], h;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        for (int c = 0; c < 4; c++) q[c] = load_once_pair(PLANE(Q5_K, Q) + 32 * c + of_quad() * 8);
        h = load_once_pair(PLANE(Q5_K, H) + of_quad() * 8);
        head = *(const Words*)PLANE(Q5_K, HEAD);
    }
    DEVICE u32 word(int r, int i) const { return (q[r / 2].x[i] >> (r % 2 * 4) & NIBBLES) | (h.x[i] >> r & 0x01010101) << 4; }
};

template <>
struct Quad<Q6_K> : QuadOf<true, false> {
    Pair low[4], high[2];
    Words scales;
    u16 d;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        for (int c = 0; c < 4; c++) low[c] = load_once_pair(PLANE(Q6_K, LOW) + 32 * c + of_quad() * 8);
        for (int n = 0; n < 2; n++) high[n] = load_once_pair(PLANE(Q6_K, HIGH) + 32 * n + of_quad() * 8);
        scales = *(const Words*)PLANE(Q6_K, SCALES);
        d = *(const u16*)PLANE(Q6_K, D);
    }
    // As bytes 4 * (q - 32), which is q shifted up with its highest bit turned.
    DEVICE u32 word(int r, int i) const {
        const int n = r / 4, j = r % 4;
        const u32 four = low[2 * n + j % 2].x[i] >> (j / 2 * 4) & NIBBLES, two = high[n].x[i] >> (2 * j) & 0x03030303;
        return (four << 2 | two << 6) ^ 0x80808080;
    }
    DEVICE float scale(int half) const { return (float)(i8)byte_of(scales.x[half / 4], half % 4); }
    DEVICE float unit() const { return 0.25f * half_to_float(d); }
};

template <>
struct Quad<Q3_K> : QuadOf<true, false> {
    Pair q[2], h;
    u32 scales[3];
    u16 d;
    DEVICE void load(const u8* base, u64 blocks, u32 block) {
        for (int n = 0; n < 2; n++) q[n] = load_once_pair(PLANE(Q3_K, Q) + 32 * n + of_quad() * 8);
        h = load_once_pair(PLANE(Q3_K, H) + of_quad() * 8);
        Planes::load(PLANE(Q3_K, SCALES), scales);
        d = *(const u16*)PLANE(Q3_K, D);
    }
    // As bytes 32 * (q - 4).
    DEVICE u32 word(int r, int i) const {
        return ((q[r / 4].x[i] >> (r % 4 * 2) & 0x03030303) << 5 | (h.x[i] >> r & 0x01010101) << 7) ^ 0x80808080;
    }
    DEVICE float scale(int half) const { return (float)Q3_K::scale_of(scales, half); }
    DEVICE float unit() const { return half_to_float(d) / 32; }
};
#undef PLANE
