//! How each quantised format is decoded. The layouts are those of [`crate::gguf::blocks`], whose slow reading of them is what
//! the tests compare with.

use super::blocks::{Format, Group};
use super::isa::Isa;
use crate::gguf::blocks::BlockMXFP4;
use crate::ir::DType;

#[inline(always)]
fn half<I: Isa>(bytes: &[u8]) -> f32 {
    I::from_half([bytes[0], bytes[1]])
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
fn five_bits(bytes: [u8; 16], high: [u8; 4]) -> [u8; 32] {
    let mut q = nibbles(bytes);
    for (l, q) in q.iter_mut().enumerate() {
        *q |= (high[l / 8] >> (l % 8) & 1) << 4;
    }
    q
}

/// The blocks of a group in a format of `BYTES` for 32 elements, numbered.
#[inline(always)]
fn blocks_of_32<const BYTES: usize>(blocks: &[u8]) -> impl Iterator<Item = (usize, &[u8; BYTES])> {
    blocks.as_chunks::<BYTES>().0.iter().enumerate().take(8)
}

/// See [`crate::ir::DType::Q4_0`].
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        for (i, block) in blocks_of_32::<{ DType::Q4_0.block_bytes() }>(blocks) {
            group.scale[0][i] = half::<I>(block);
            group.min[0][i] = 8.0 * group.scale[0][i];
            group.q[i] = nibbles(part(block, 2));
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
        for (i, block) in blocks_of_32::<{ DType::Q4_1.block_bytes() }>(blocks) {
            group.scale[0][i] = half::<I>(block);
            group.min[0][i] = -half::<I>(&block[2..]);
            group.q[i] = nibbles(part(block, 4));
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
        for (i, block) in blocks_of_32::<{ DType::Q5_0.block_bytes() }>(blocks) {
            group.scale[0][i] = half::<I>(block);
            group.min[0][i] = 16.0 * group.scale[0][i];
            group.q[i] = five_bits(part(block, 6), part(block, 2));
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
        for (i, block) in blocks_of_32::<{ DType::Q5_1.block_bytes() }>(blocks) {
            group.scale[0][i] = half::<I>(block);
            group.min[0][i] = -half::<I>(&block[2..]);
            group.q[i] = five_bits(part(block, 8), part(block, 4));
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
        for (i, block) in blocks_of_32::<{ DType::Q8_0.block_bytes() }>(blocks) {
            group.scale[0][i] = half::<I>(block);
            group.q[i] = part(block, 2);
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
        for (i, block) in blocks_of_32::<{ DType::MXFP4.block_bytes() }>(blocks) {
            group.scale[0][i] = BlockMXFP4 { e: block[0], q: [0; 16] }.half_d();
            group.min[0][i] = f32::from(E2M1_RAISE) * group.scale[0][i];
            group.q[i] = I::look_up(&E2M1, &nibbles(part(block, 1)));
        }
    }
}

/// Four sub-blocks of 32 pairs of bits, from the lowest bits up.
#[inline(always)]
fn pairs(bytes: &[u8], out: &mut [[u8; 32]]) {
    for (j, out) in out.iter_mut().enumerate() {
        for (q, byte) in out.iter_mut().zip(bytes) {
            *q = byte >> (2 * j) & 3;
        }
    }
}

/// See [`crate::ir::DType::Q2_K`].
pub(super) struct Q2K;

impl Format for Q2K {
    const DTYPE: DType = DType::Q2_K;
    const SIGNED: bool = false;
    const SPLIT: bool = true;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q2_K.block_bytes() }>() else { return };
        let (d, dmin) = (half::<I>(&block[80..]), half::<I>(&block[82..]));
        for (b, scales) in block[..16].as_chunks::<2>().0.iter().enumerate() {
            for (h, scale) in scales.iter().enumerate() {
                group.scale[h][b] = d * f32::from(scale & 15);
                group.min[h][b] = dmin * f32::from(scale >> 4);
            }
        }
        pairs(&block[16..48], &mut group.q[..4]);
        pairs(&block[48..80], &mut group.q[4..]);
    }
}

/// See [`crate::ir::DType::Q3_K`].
pub(super) struct Q3K;

impl Format for Q3K {
    const DTYPE: DType = DType::Q3_K;
    const SIGNED: bool = false;
    const SPLIT: bool = true;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q3_K.block_bytes() }>() else { return };
        let d = half::<I>(&block[108..]);
        let packed = &block[96..108];
        for g in 0..16 {
            let low = packed[g % 8] >> (g / 8 * 4) & 15;
            let high = packed[8 + g % 4] >> (g / 4 * 2) & 3;
            let scale = d * f32::from((low | high << 4) as i8 - 32);
            (group.scale[g % 2][g / 2], group.min[g % 2][g / 2]) = (scale, 4.0 * scale);
        }
        pairs(&block[32..64], &mut group.q[..4]);
        pairs(&block[64..96], &mut group.q[4..]);
        for (b, q) in group.q.iter_mut().enumerate() {
            for (q, third) in q.iter_mut().zip(&block[..32]) {
                *q |= (third >> b & 1) * 4;
            }
        }
    }
}

/// Scales and minima of [`Q4K`] and [`Q5K`]. The 6-bit scales and minima of sub-blocks 0..4 are the low bits of bytes 0..4
/// and 4..8; of those of 4..8, bytes 8..12 hold the low nibbles and the top bits of bytes 0..8 the rest.
#[inline(always)]
fn scales_and_minima<I: Isa>(block: &[u8], group: &mut Group) {
    let (d, dmin) = (half::<I>(block), half::<I>(&block[2..]));
    let word = |i: usize| u32::from_le_bytes(part(block, i));
    let (a, b, c) = (word(4), word(8), word(12));
    let scales = [a & 0x3f3f_3f3f, (c & 0x0f0f_0f0f) | (a >> 2 & 0x3030_3030)];
    let minima = [b & 0x3f3f_3f3f, (c >> 4 & 0x0f0f_0f0f) | (b >> 2 & 0x3030_3030)];
    let bytes = |words: [u32; 2]| -> [u8; 8] { bytemuck::cast(words) };
    let (scales, minima) = (bytes(scales), bytes(minima));
    for b in 0..8 {
        group.scale[0][b] = d * f32::from(scales[b]);
        group.min[0][b] = dmin * f32::from(minima[b]);
    }
}

/// 128 bytes of nibbles: of each 32, the low ones are a sub-block and the high ones the next.
#[inline(always)]
fn long_nibbles(bytes: &[u8], group: &mut Group) {
    for (i, bytes) in bytes.as_chunks::<32>().0.iter().enumerate().take(4) {
        for (l, byte) in bytes.iter().enumerate() {
            group.q[2 * i][l] = byte & 15;
            group.q[2 * i + 1][l] = byte >> 4;
        }
    }
}

/// See [`crate::ir::DType::Q4_K`].
pub(super) struct Q4K;

impl Format for Q4K {
    const DTYPE: DType = DType::Q4_K;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q4_K.block_bytes() }>() else { return };
        scales_and_minima::<I>(block, group);
        long_nibbles(&block[16..], group);
    }
}

/// See [`crate::ir::DType::Q5_K`].
pub(super) struct Q5K;

impl Format for Q5K {
    const DTYPE: DType = DType::Q5_K;
    const SIGNED: bool = false;
    const SPLIT: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<{ DType::Q5_K.block_bytes() }>() else { return };
        scales_and_minima::<I>(block, group);
        long_nibbles(&block[48..], group);
        for (b, q) in group.q.iter_mut().enumerate() {
            for (q, fifth) in q.iter_mut().zip(&block[16..48]) {
                *q |= (fifth >> b & 1) * 16;
            }
        }
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
        let d = half::<I>(&block[208..]);
        for (b, scales) in block[192..208].as_chunks::<2>().0.iter().enumerate() {
            for (h, scale) in scales.iter().enumerate() {
                let scale = d * f32::from(*scale as i8);
                (group.scale[h][b], group.min[h][b]) = (scale, 32.0 * scale);
            }
        }
        let low = block[..128].as_chunks::<32>().0;
        let high = block[128..192].as_chunks::<32>().0;
        for h in 0..2 {
            for l in 0..32 {
                let (a, b, pairs) = (low[2 * h][l], low[2 * h + 1][l], high[h][l]);
                group.q[4 * h][l] = (a & 15) | (pairs & 3) << 4;
                group.q[4 * h + 1][l] = (b & 15) | (pairs >> 2 & 3) << 4;
                group.q[4 * h + 2][l] = (a >> 4) | (pairs >> 4 & 3) << 4;
                group.q[4 * h + 3][l] = (b >> 4) | (pairs >> 6) << 4;
            }
        }
    }
}
