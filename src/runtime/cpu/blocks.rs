//! Block formats: from bytes to integers and scales, or to floats, a group of up to 256 elements at a time.

use super::isa::Isa;
use crate::ir::DType;

/// Elements that are decoded at once; the largest block.
pub(super) const GROUP: usize = 256;

/// A decoded group: element `e` is `scale[e/16] · q[e/32][e%32] − min[e/32]`.
pub(super) struct Group {
    pub q: [[i8; 32]; 8],
    pub scale: [f32; 16],
    pub min: [f32; 8],
}

impl Group {
    pub const ZERO: Group = Group { q: [[0; 32]; 8], scale: [0.0; 16], min: [0.0; 8] };
}

/// A quantised weight format.
pub(super) trait Format {
    const BLOCK: usize;
    /// No `q` is negative.
    const UNSIGNED: bool;
    /// The two halves of 32 elements have scales of their own.
    const SPLIT: bool;
    /// Minima may differ from zero.
    const MINIMA: bool;

    /// Decodes whole blocks, at most [`GROUP`] elements, into the front of `group`.
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group);
}

#[inline(always)]
fn half<I: Isa>(bytes: [u8; 2]) -> f32 {
    let mut h = [0; 16];
    h[..2].copy_from_slice(&bytes);
    I::from_halves(&h)[0]
}

/// See [`DType::Q8_0`].
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const BLOCK: usize = 32;
    const UNSIGNED: bool = false;
    const SPLIT: bool = false;
    const MINIMA: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        for (i, block) in blocks.as_chunks::<34>().0.iter().enumerate().take(8) {
            let d = half::<I>([block[0], block[1]]);
            group.scale[2 * i] = d;
            group.scale[2 * i + 1] = d;
            for (q, b) in group.q[i].iter_mut().zip(&block[2..]) {
                *q = *b as i8;
            }
        }
    }
}

/// See [`DType::Q4_K`]. The 6-bit scales and minima of sub-blocks 0..4 are the low bits of bytes 0..4 and 4..8; of those of
/// 4..8, bytes 8..12 hold the low nibbles and the top bits of bytes 0..8 the rest.
pub(super) struct Q4K;

impl Format for Q4K {
    const BLOCK: usize = 256;
    const UNSIGNED: bool = true;
    const SPLIT: bool = false;
    const MINIMA: bool = true;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<144>() else { return };
        let d = half::<I>([block[0], block[1]]);
        let dmin = half::<I>([block[2], block[3]]);
        let word = |i: usize| u32::from_le_bytes([block[i], block[i + 1], block[i + 2], block[i + 3]]);
        let (a, b, c) = (word(4), word(8), word(12));
        let scales = [a & 0x3f3f_3f3f, (c & 0x0f0f_0f0f) | (a >> 2 & 0x3030_3030)];
        let minima = [b & 0x3f3f_3f3f, (c >> 4 & 0x0f0f_0f0f) | (b >> 2 & 0x3030_3030)];
        for i in 0..8 {
            let byte = |words: [u32; 2]| (words[i / 4] >> (8 * (i % 4)) & 0xff) as f32;
            let scale = d * byte(scales);
            group.scale[2 * i] = scale;
            group.scale[2 * i + 1] = scale;
            group.min[i] = dmin * byte(minima);
        }
        for (i, bytes) in block[16..].as_chunks::<32>().0.iter().enumerate() {
            for l in 0..32 {
                group.q[2 * i][l] = (bytes[l] & 15) as i8;
                group.q[2 * i + 1][l] = (bytes[l] >> 4) as i8;
            }
        }
    }
}

/// See [`DType::Q6_K`].
pub(super) struct Q6K;

impl Format for Q6K {
    const BLOCK: usize = 256;
    const UNSIGNED: bool = false;
    const SPLIT: bool = true;
    const MINIMA: bool = false;

    #[inline(always)]
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group) {
        let Some(block) = blocks.first_chunk::<210>() else { return };
        let d = half::<I>([block[208], block[209]]);
        for (scale, b) in group.scale.iter_mut().zip(&block[192..208]) {
            *scale = d * f32::from(*b as i8);
        }
        let low = block[..128].as_chunks::<32>().0;
        let high = block[128..192].as_chunks::<32>().0;
        for h in 0..2 {
            for l in 0..32 {
                let (a, b, pairs) = (low[2 * h][l], low[2 * h + 1][l], high[h][l]);
                group.q[4 * h][l] = ((a & 15) | (pairs & 3) << 4) as i8 - 32;
                group.q[4 * h + 1][l] = ((b & 15) | (pairs >> 2 & 3) << 4) as i8 - 32;
                group.q[4 * h + 2][l] = ((a >> 4) | (pairs >> 4 & 3) << 4) as i8 - 32;
                group.q[4 * h + 3][l] = ((b >> 4) | (pairs >> 6) << 4) as i8 - 32;
            }
        }
    }
}

/// The values of the whole blocks in `blocks`.
#[inline(always)]
fn dequantise<I: Isa, F: Format>(blocks: &[u8], out: &mut [f32]) {
    let mut group = Group::ZERO;
    F::decode::<I>(blocks, &mut group);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate().take(8) {
        for l in 0..32 {
            let value = group.scale[2 * i + l / 16] * f32::from(group.q[i][l]);
            out[l] = if F::MINIMA { value - group.min[i] } else { value };
        }
    }
}

/// Bytes of `n` elements, whole blocks, of `dtype`.
#[inline(always)]
pub(super) fn bytes_of(dtype: DType, n: usize) -> usize {
    n / dtype.block_len() * dtype.block_bytes()
}

/// The values of `out.len()` elements of `dtype`: whole blocks, and of a quantised type at most [`GROUP`].
#[inline(always)]
pub(super) fn decode<I: Isa>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::Q8_0 => dequantise::<I, Q8_0>(bytes, out),
        DType::Q4_K => dequantise::<I, Q4K>(bytes, out),
        DType::Q6_K => dequantise::<I, Q6K>(bytes, out),
        DType::Q8Act => {
            for (out, block) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<40>().0) {
                let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                for (out, q) in out.iter_mut().zip(&block[8..]) {
                    *out = d * f32::from(*q as i8);
                }
            }
        }
        DType::F32 | DType::F16 | DType::I32 => decode_plain::<I>(dtype, bytes, out),
    }
}

/// The values of `out.len()` elements of `dtype`, which is f16 or f32.
#[inline(always)]
pub(super) fn decode_plain<I: Isa>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    if dtype == DType::F16 {
        let (whole, rest) = out.as_chunks_mut::<8>();
        let (halves, rest_halves) = bytes.as_chunks::<16>();
        for (out, h) in whole.iter_mut().zip(halves) {
            *out = I::from_halves(h);
        }
        for (out, h) in rest.iter_mut().zip(rest_halves.as_chunks::<2>().0) {
            *out = half::<I>(*h);
        }
    } else {
        for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*b);
        }
    }
}

/// Halves of `x`, into the front of `out`.
#[inline(always)]
pub(super) fn encode_halves<I: Isa>(x: &[f32], out: &mut [u8]) {
    let (whole, rest) = x.as_chunks::<8>();
    let (halves, rest_halves) = out.as_chunks_mut::<16>();
    for (x, h) in whole.iter().zip(halves.iter_mut()) {
        *h = I::to_halves(x);
    }
    if !rest.is_empty() {
        let mut padded = [0.0; 8];
        padded[..rest.len()].copy_from_slice(rest);
        let h = I::to_halves(&padded);
        let to = match halves.get_mut(whole.len()) {
            Some(to) => &mut to[..],
            None => rest_halves,
        };
        to[..2 * rest.len()].copy_from_slice(&h[..2 * rest.len()]);
    }
}
