//! Block formats: from bytes to integers and scales, or to floats, a group of up to 256 elements at a time.

use super::formats::*;
use super::isa::Isa;
use crate::ir::DType;

/// Elements that are decoded at once; the largest block.
pub(super) const GROUP: usize = 256;

/// A decoded group: element `l` of sub-block `b` of 32 is `scale[h][b] · q − min[h][b]`, where `h` is `l / 16` for formats
/// that [split](Format::SPLIT) and else 0. Its `q` lies where the format [orders](Format::ORDER) it. Minima make up for `q` that
/// would be negative, but where a format is [signed](Format::SIGNED): its `q` are two's complements and its minima zero.
pub struct Group {
    pub q: [[u8; 64]; 4],
    pub scale: [[f32; 8]; 2],
    pub min: [[f32; 8]; 2],
}

impl Group {
    pub const ZERO: Group = Group { q: [[0; 64]; 4], scale: [[0.0; 8]; 2], min: [[0.0; 8]; 2] };
}

/// [`GROUP`] activations of 8 bits in vectors; what is beyond a row is zero. No vector crosses a cache line.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct XGroup {
    /// In the order of the weights.
    pub q: [[i8; 64]; 4],
    pub d: [f32; 8],
    /// `d · Σq` over the first and the last 16 of each 32.
    pub s: [[f32; 8]; 2],
}

impl XGroup {
    pub const ZERO: XGroup = XGroup { q: [[0; 64]; 4], d: [0.0; 8], s: [[0.0; 8]; 2] };
}

/// Where the `q` of a group lie: the sub-blocks of 32 whose `q` are the first, second, … 32 bytes.
pub(super) type Order = [usize; 8];

/// One after another.
pub(super) const PLAIN: Order = [0, 1, 2, 3, 4, 5, 6, 7];

/// A quantised weight format.
pub(super) trait Format {
    const DTYPE: DType;
    /// Elements of a block.
    const BLOCK: usize = Self::DTYPE.block_len();
    /// `q` are signed bytes.
    const SIGNED: bool;
    /// The two halves of 32 elements have scales and minima of their own.
    const SPLIT: bool;
    /// The order in which 64 bytes of a block at a time yield `q`.
    const ORDER: Order = PLAIN;

    /// Decodes whole blocks, at most [`GROUP`] elements, into the front of `group`.
    fn decode<I: Isa>(blocks: &[u8], group: &mut Group);
}

/// Calls `$go!` with the [`Format`] of a dtype, or else evaluates `$rest`.
macro_rules! with_format {
    ($dtype:expr, $go:ident, $rest:expr) => {
        match $dtype {
            DType::Q4_0 => $go!(Q4_0),
            DType::Q4_1 => $go!(Q4_1),
            DType::Q5_0 => $go!(Q5_0),
            DType::Q5_1 => $go!(Q5_1),
            DType::Q8_0 => $go!(Q8_0),
            DType::Q2_K => $go!(Q2K),
            DType::Q3_K => $go!(Q3K),
            DType::Q4_K => $go!(Q4K),
            DType::Q5_K => $go!(Q5K),
            DType::Q6_K => $go!(Q6K),
            DType::MXFP4 => $go!(Mxfp4),
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::Q8Act | DType::Q16Act => $rest,
        }
    };
}
pub(super) use with_format;

/// The values of the whole blocks in `blocks`.
#[inline(always)]
fn dequantise<I: Isa, F: Format>(blocks: &[u8], out: &mut [f32]) {
    let mut group = Group::ZERO;
    F::decode::<I>(blocks, &mut group);
    dequantise_group::<F>(&group, out);
}

/// The values of a group.
#[inline(always)]
pub(super) fn dequantise_group<F: Format>(group: &Group, out: &mut [f32]) {
    let out = out.as_chunks_mut::<32>().0;
    for (q, b) in group.q.as_flattened().as_chunks::<32>().0.iter().zip(F::ORDER) {
        let Some(out) = out.get_mut(b) else { continue };
        for (l, (out, q)) in out.iter_mut().zip(q).enumerate() {
            let h = if F::SPLIT { l / 16 } else { 0 };
            let scale = group.scale[h][b];
            *out =
                if F::SIGNED { scale * f32::from(*q as i8) } else { scale * f32::from(*q) - group.min[h][b] };
        }
    }
}

/// Whether halves of 32 elements have scales of their own.
#[inline(always)]
pub(super) fn is_split(dtype: DType) -> bool {
    macro_rules! split {
        ($format:ty) => {
            <$format>::SPLIT
        };
    }
    with_format!(dtype, split, false)
}

/// See [`Format::ORDER`].
#[inline(always)]
pub(super) fn order_of(dtype: DType) -> Order {
    macro_rules! order {
        ($format:ty) => {
            <$format>::ORDER
        };
    }
    with_format!(dtype, order, PLAIN)
}

/// Bytes of `n` elements, whole blocks, of `dtype`.
#[inline(always)]
pub(super) fn bytes_of(dtype: DType, n: usize) -> usize {
    n / dtype.block_len() * dtype.block_bytes()
}

/// The values of `out.len()` elements of `dtype`: whole blocks, and of a quantised type at most [`GROUP`].
#[inline(always)]
pub(super) fn decode<I: Isa>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    macro_rules! go {
        ($format:ty) => {
            dequantise::<I, $format>(bytes, out)
        };
    }
    with_format!(dtype, go, decode_simple::<I>(dtype, bytes, out));
}

/// As [`decode`], of a type that is no weight's or has no blocks.
#[inline(always)]
fn decode_simple<I: Isa>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::Q8Act => {
            for (out, block) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<40>().0) {
                let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                for (out, q) in out.iter_mut().zip(&block[8..]) {
                    *out = d * f32::from(*q as i8);
                }
            }
        }
        DType::BF16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        _ => decode_plain::<I>(dtype, bytes, out),
    }
}

/// The values of `out.len()` elements of `dtype`, which is f16 or f32.
#[inline(always)]
pub(super) fn decode_plain<I: Isa>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    if dtype == DType::F16 {
        let (whole, rest) = out.as_chunks_mut::<16>();
        let (f16s, rest_f16) = bytes.as_chunks::<32>();
        for (out, h) in whole.iter_mut().zip(f16s) {
            I::from_f16(h, out);
        }
        for (out, h) in rest.iter_mut().zip(rest_f16.as_chunks::<2>().0) {
            *out = I::from_f16_one(*h);
        }
    } else {
        for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*b);
        }
    }
}

/// `x` as f16, into the front of `out`.
#[inline(always)]
pub(super) fn encode_f16<I: Isa>(x: &[f32], out: &mut [u8]) {
    let (whole, rest) = x.as_chunks::<8>();
    let (f16s, rest_f16) = out.as_chunks_mut::<16>();
    for (x, h) in whole.iter().zip(f16s.iter_mut()) {
        *h = I::to_f16(x);
    }
    if !rest.is_empty() {
        let mut padded = [0.0; 8];
        padded[..rest.len()].copy_from_slice(rest);
        let h = I::to_f16(&padded);
        let to = match f16s.get_mut(whole.len()) {
            Some(to) => &mut to[..],
            None => rest_f16,
        };
        to[..2 * rest.len()].copy_from_slice(&h[..2 * rest.len()]);
    }
}
