//! How each quantised format is decoded. The layouts are those of [`crate::gguf::blocks`], whose slow reading of them is what
//! the tests compare with.

use super::blocks::{Format, Group, Order};
use super::isa::Isa;
use crate::gguf::blocks::BlockMXFP4;
use crate::ir::DType;

#[inline(always)]
fn f16_at<I: Isa>(bytes: &[u8]) -> f32 {
    I::from_f16_one([bytes[0], bytes[1]])
}

/// `N` bytes of a block from `at` on.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&block[at..at + N]);
    part
}

/// The low nibbles of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: [u8; 16]) -> [u8; 32] {
    let mut q = [0; 32];
    for l in 0..16 {
        q[l] = bytes[l] & 15;
        q[l + 16] = bytes[l] >> 4;
    }
    q
}

/// [`nibbles`] with a fifth bit each: element `l` has bit `l` of `high`.
#[inline(always)]
fn five_bits<I: Isa>(bytes: [u8; 16], high: [u8; 4]) -> [u8; 32] {
    let (mut q, high) = (nibbles(bytes), I::spread(high));
    for (q, high) in q.iter_mut().zip(high) {
        *q |= high & 16;
    }
    q
}

/// Gives the first 32 `q` bit `LOW` of 32 bytes as bit `TO`, the last bit `HIGH`.
#[inline(always)]
fn add_bits<const LOW: u32, const HIGH: u32, const TO: u32>(q: &mut [u8; 64], bytes: &[u8; 32]) {
    for l in 0..32 {
        q[l] |= (bytes[l] >> LOW & 1) << TO;
        q[l + 32] |= (bytes[l] >> HIGH & 1) << TO;
    }
}

/// Where the `q` of block `i` of 32 lie in plain order.
#[inline(always)]
fn q_of(group: &mut Group, i: usize) -> &mut [u8; 32] {
    &mut group.q.as_flattened_mut().as_chunks_mut().0[i]
}

/// The blocks of a group in a format of `BYTES` for 32 elements, numbered.
#[inline(always)]
fn blocks_of_32<const BYTES: usize>(blocks: &[u8]) -> impl Iterator<Item = (usize, &[u8; BYTES])> {
    blocks.as_chunks::<BYTES>().0.iter().enumerate().take(8)
}

/// The half at byte `at` of each of such blocks, and zeros where there are no more.
#[inline(always)]
fn f16_of_each<I: Isa, const BYTES: usize>(blocks: &[u8], at: usize) -> [f32; 8] {
    let mut bits = [0; 8];
    for (i, block) in blocks_of_32::<BYTES>(blocks) {
        bits[i] = u16::from_le_bytes([block[at], block[at + 1]]);
    }
    I::from_f16x8(bits)
}

/// See [`crate::ir::DType::Q4_0`].
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        const BYTES: usize = DType::Q4_0.block_bytes();
        group.scale[0] = f16_of_each::<I, BYTES>(blocks, 0);
        for (min, d) in group.min[0].iter_mut().zip(group.scale[0]) {
            *min = 8.0 * d;
        }
        for (i, block) in blocks_of_32::<BYTES>(blocks) {
            *q_of(group, i) = nibbles(part(block, 2));
        }
    }
}

/// See [`crate::ir::DType::Q4_1`].
pub(super) struct Q4_1;

impl Format for Q4_1 {
    const DTYPE: DType = DType::Q4_1;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        const BYTES: usize = DType::Q4_1.block_bytes();
        group.scale[0] = f16_of_each::<I, BYTES>(blocks, 0);
        group.min[0] = f16_of_each::<I, BYTES>(blocks, 2);
        for min in &mut group.min[0] {
            *min = -*min;
        }
        for (i, block) in blocks_of_32::<BYTES>(blocks) {
            *q_of(group, i) = nibbles(part(block, 4));
        }
    }
}

/// See [`crate::ir::DType::Q5_0`].
pub(super) struct Q5_0;

impl Format for Q5_0 {
    const DTYPE: DType = DType::Q5_0;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        const BYTES: usize = DType::Q5_0.block_bytes();
        group.scale[0] = f16_of_each::<I, BYTES>(blocks, 0);
        for (min, d) in group.min[0].iter_mut().zip(group.scale[0]) {
            *min = 16.0 * d;
        }
        for (i, block) in blocks_of_32::<BYTES>(blocks) {
            *q_of(group, i) = five_bits::<I>(part(block, 6), part(block, 2));
        }
    }
}

/// See [`crate::ir::DType::Q5_1`].
pub(super) struct Q5_1;

impl Format for Q5_1 {
    const DTYPE: DType = DType::Q5_1;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        const BYTES: usize = DType::Q5_1.block_bytes();
        group.scale[0] = f16_of_each::<I, BYTES>(blocks, 0);
        group.min[0] = f16_of_each::<I, BYTES>(blocks, 2);
        for min in &mut group.min[0] {
            *min = -*min;
        }
        for (i, block) in blocks_of_32::<BYTES>(blocks) {
            *q_of(group, i) = five_bits::<I>(part(block, 8), part(block, 4));
        }
    }
}

/// See [`crate::ir::DType::Q8_0`].
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const SIGNED: bool = true;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        const BYTES: usize = DType::Q8_0.block_bytes();
        group.scale[0] = f16_of_each::<I, BYTES>(blocks, 0);
        for (i, block) in blocks_of_32::<BYTES>(blocks) {
            *q_of(group, i) = part(block, 2);
        }
    }
}

/// What makes the least of [`BlockMXFP4::TWICE`] zero.
const E2M1_RAISE: u8 = 12;

/// [`BlockMXFP4::TWICE`], raised.
const E2M1: [u8; 16] = {
    let mut raised = [0; 16];
    let mut i = 0;
    while i < 16 {
        raised[i] = (BlockMXFP4::TWICE[i] + E2M1_RAISE as i8) as u8;
        i += 1;
    }
    raised
};

/// See [`crate::ir::DType::MXFP4`].
pub(super) struct Mxfp4;

impl Format for Mxfp4 {
    const DTYPE: DType = DType::MXFP4;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        const BYTES: usize = DType::MXFP4.block_bytes();
        let mut exponents = [0; 8];
        for (i, block) in blocks_of_32::<BYTES>(blocks) {
            exponents[i] = block[0];
            *q_of(group, i) = I::look_up(&E2M1, &nibbles(part(block, 1)));
        }
        for (scale, e) in group.scale[0].iter_mut().zip(exponents) {
            *scale = BlockMXFP4 { e, q: [0; 16] }.half_d();
        }
        for (min, d) in group.min[0].iter_mut().zip(group.scale[0]) {
            *min = f32::from(E2M1_RAISE) * d;
        }
    }
}

/// Of each 32 of 64 bytes, four sub-blocks of 32 pairs of bits, from the lowest bits up: those of the first half are sub-blocks
/// 0 to 3, and [`PAIRS`] is the order of all.
#[inline(always)]
fn pairs(bytes: &[u8; 64], group: &mut Group) {
    for (j, q) in group.q.iter_mut().enumerate() {
        for l in 0..64 {
            q[l] = bytes[l] >> (2 * j) & 3;
        }
    }
}

/// See [`pairs`].
const PAIRS: Order = [0, 4, 1, 5, 2, 6, 3, 7];

/// See [`crate::ir::DType::Q2_K`].
pub(super) struct Q2K;

impl Format for Q2K {
    const DTYPE: DType = DType::Q2_K;
    const SIGNED: bool = false;
    const SPLIT: bool = true;
    const ORDER: Order = PAIRS;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q2_K.block_bytes() }>() else { return };
        let (d, dmin) = (f16_at::<I>(&block[80..]), f16_at::<I>(&block[82..]));
        for (b, scales) in block[..16].as_chunks::<2>().0.iter().enumerate() {
            for (h, scale) in scales.iter().enumerate() {
                group.scale[h][b] = d * f32::from(scale & 15);
                group.min[h][b] = dmin * f32::from(scale >> 4);
            }
        }
        pairs(&part(block, 16), group);
    }
}

/// See [`crate::ir::DType::Q3_K`].
pub(super) struct Q3K;

impl Format for Q3K {
    const DTYPE: DType = DType::Q3_K;
    const SIGNED: bool = false;
    const SPLIT: bool = true;
    const ORDER: Order = PAIRS;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q3_K.block_bytes() }>() else { return };
        let d = f16_at::<I>(&block[108..]);
        // Low nibbles of 16 scales in 8 bytes; then their high pairs of bits in 4.
        let word = |i: usize| u32::from_le_bytes(part(block, i));
        let (a, b, pairs_of) = (word(96), word(100), word(104));
        let mut scales = [0; 16];
        for (i, four) in scales.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let low = if i % 2 == 0 { a } else { b } >> (i / 2 * 4) & 0x0f0f_0f0f;
            *four = (low | (pairs_of >> (2 * i) & 0x0303_0303) << 4).to_le_bytes();
        }
        for (b, scales) in scales.as_chunks::<2>().0.iter().enumerate() {
            for (h, scale) in scales.iter().enumerate() {
                let scale = d * (f32::from(*scale) - 32.0);
                (group.scale[h][b], group.min[h][b]) = (scale, 4.0 * scale);
            }
        }
        pairs(&part(block, 32), group);
        let thirds: [u8; 32] = part(block, 0);
        let [a, b, c, d] = &mut group.q;
        add_bits::<0, 4, 2>(a, &thirds);
        add_bits::<1, 5, 2>(b, &thirds);
        add_bits::<2, 6, 2>(c, &thirds);
        add_bits::<3, 7, 2>(d, &thirds);
    }
}

/// Scales and minima of [`Q4K`] and [`Q5K`]. The 6-bit scales and minima of sub-blocks 0..4 are the low bits of bytes 0..4
/// and 4..8; of those of 4..8, bytes 8..12 hold the low nibbles and the top bits of bytes 0..8 the rest.
#[inline(always)]
fn scales_and_minima<I: Isa>(block: &[u8], group: &mut Group) {
    let (d, dmin) = (f16_at::<I>(block), f16_at::<I>(&block[2..]));
    let word = |i: usize| u32::from_le_bytes(part(block, i));
    let (a, b, c) = (word(4), word(8), word(12));
    let scales = [a & 0x3f3f_3f3f, (c & 0x0f0f_0f0f) | (a >> 2 & 0x3030_3030)];
    let minima = [b & 0x3f3f_3f3f, (c >> 4 & 0x0f0f_0f0f) | (b >> 2 & 0x3030_3030)];
    let bytes = |[low, high]: [u32; 2]| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let (scales, minima) = (bytes(scales), bytes(minima));
    for b in 0..8 {
        group.scale[0][b] = d * f32::from(scales[b]);
        group.min[0][b] = dmin * f32::from(minima[b]);
    }
}

/// 128 bytes of nibbles: of each 32, the low ones are a sub-block and the high ones the next; [`NIBBLES`] is the order of all.
#[inline(always)]
fn long_nibbles(bytes: [u8; 128], group: &mut Group) {
    for (i, q) in group.q.iter_mut().enumerate() {
        for l in 0..64 {
            q[l] = bytes[i / 2 * 64 + l] >> (i % 2 * 4) & 15;
        }
    }
}

/// See [`long_nibbles`].
const NIBBLES: Order = [0, 2, 1, 3, 4, 6, 5, 7];

/// See [`crate::ir::DType::Q4_K`].
pub(super) struct Q4K;

impl Format for Q4K {
    const DTYPE: DType = DType::Q4_K;
    const SIGNED: bool = false;
    const SPLIT: bool = false;
    const ORDER: Order = NIBBLES;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q4_K.block_bytes() }>() else { return };
        scales_and_minima::<I>(block, group);
        long_nibbles(part(block, 16), group);
    }
}

/// See [`crate::ir::DType::Q5_K`].
pub(super) struct Q5K;

impl Format for Q5K {
    const DTYPE: DType = DType::Q5_K;
    const SIGNED: bool = false;
    const SPLIT: bool = false;
    const ORDER: Order = NIBBLES;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q5_K.block_bytes() }>() else { return };
        scales_and_minima::<I>(block, group);
        long_nibbles(part(block, 48), group);
        let fifths: [u8; 32] = part(block, 16);
        let [a, b, c, d] = &mut group.q;
        add_bits::<0, 2, 4>(a, &fifths);
        add_bits::<1, 3, 4>(b, &fifths);
        add_bits::<4, 6, 4>(c, &fifths);
        add_bits::<5, 7, 4>(d, &fifths);
    }
}

/// See [`crate::ir::DType::Q6_K`].
pub(super) struct Q6K;

impl Format for Q6K {
    const DTYPE: DType = DType::Q6_K;
    const SIGNED: bool = false;
    const SPLIT: bool = true;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q6_K.block_bytes() }>() else { return };
        let d = f16_at::<I>(&block[208..]);
        for (b, scales) in block[192..208].as_chunks::<2>().0.iter().enumerate() {
            for (h, scale) in scales.iter().enumerate() {
                let scale = d * f32::from(*scale as i8);
                (group.scale[h][b], group.min[h][b]) = (scale, 32.0 * scale);
            }
        }
        let (low, high): ([u8; 128], [u8; 64]) = (part(block, 0), part(block, 128));
        // Of each half of 128 elements, 64 bytes hold the low bits of the first 64 and of the last, 32 the high bits of all.
        let halves = group.q.as_chunks_mut::<2>().0.iter_mut();
        for ((q, low), high) in halves.zip(low.as_chunks::<64>().0).zip(high.as_chunks::<32>().0) {
            for l in 0..32 {
                let (a, b, pairs) = (low[l], low[l + 32], high[l]);
                q[0][l] = (a & 15) | (pairs & 3) << 4;
                q[0][l + 32] = (b & 15) | (pairs >> 2 & 3) << 4;
                q[1][l] = (a >> 4) | (pairs >> 4 & 3) << 4;
                q[1][l + 32] = (b >> 4) | (pairs >> 6) << 4;
            }
        }
    }
}
