//! Storage layouts of the quantised formats.
//!
//! Every field is made of bytes, so blocks have alignment 1 and a tensor's bytes can be viewed as
//! blocks wherever they lie (`bytemuck::cast_slice`).

use crate::ir::DType;
use bytemuck::{Pod, Zeroable};
use half::f16;

/// A little-endian IEEE half-precision number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F16Le(pub [u8; 2]);

impl F16Le {
    pub fn get(self) -> f32 {
        f16::from_le_bytes(self.0).to_f32()
    }
}

/// The upper half of a little-endian IEEE single-precision number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Bf16Le(pub [u8; 2]);

impl Bf16Le {
    pub fn get(self) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(self.0)) << 16)
    }
}

/// A little-endian IEEE single-precision number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F32Le(pub [u8; 4]);

impl F32Le {
    pub fn new(value: f32) -> F32Le {
        F32Le(value.to_le_bytes())
    }

    pub fn get(self) -> f32 {
        f32::from_le_bytes(self.0)
    }
}

/// A storage block of one quantised format.
pub trait Block: Pod {
    /// The format; its block length and size are those of the implementing type.
    const DTYPE: DType;
}

/// Element `i` of 32 nibbles: of byte `i` the low one, of byte `i - 16` the high one.
fn nibble(q: &[u8; 16], i: usize) -> u8 {
    q[i % 16] >> (i / 16 * 4) & 15
}

/// 32 weights: value = `d · (q - 8)` with 4-bit `q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    pub d: F16Le,
    /// Element i is the low nibble of byte i, element i + 16 the high one; so in all blocks of 32.
    pub q: [u8; 16],
}

impl BlockQ4_0 {
    /// `q` of element `i` (0 to 31).
    pub fn q(&self, i: usize) -> u8 {
        nibble(&self.q, i)
    }
}

/// 32 weights: value = `d · q + m` with 4-bit `q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_1 {
    pub d: F16Le,
    pub m: F16Le,
    pub q: [u8; 16],
}

impl BlockQ4_1 {
    /// `q` of element `i` (0 to 31).
    pub fn q(&self, i: usize) -> u8 {
        nibble(&self.q, i)
    }
}

/// 32 weights: value = `d · (q - 16)` with 5-bit `q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    pub d: F16Le,
    /// Little endian; bit i is the fifth bit of element i.
    pub high: [u8; 4],
    pub low: [u8; 16],
}

impl BlockQ5_0 {
    /// `q` of element `i` (0 to 31).
    pub fn q(&self, i: usize) -> u8 {
        nibble(&self.low, i) | (self.high[i / 8] >> (i % 8) & 1) << 4
    }
}

/// 32 weights: value = `d · q + m` with 5-bit `q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    pub d: F16Le,
    pub m: F16Le,
    pub high: [u8; 4],
    pub low: [u8; 16],
}

impl BlockQ5_1 {
    /// `q` of element `i` (0 to 31).
    pub fn q(&self, i: usize) -> u8 {
        nibble(&self.low, i) | (self.high[i / 8] >> (i % 8) & 1) << 4
    }
}

/// 32 weights: value = `d · q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    pub d: F16Le,
    pub q: [i8; 32],
}

/// 256 weights in 16 groups of 16: value = `(d · scale) · q - (dmin · min)` with 2-bit `q`, 4-bit `scale` and `min`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Of each group, the scale in the low nibble and the minimum in the high one.
    pub scales: [u8; 16],
    /// Of each half of 128 weights, 32 bytes hold weights l, l + 32, l + 64, l + 96 from the lowest bits up.
    pub q: [u8; 64],
    pub d: F16Le,
    pub dmin: F16Le,
}

impl BlockQ2K {
    /// `q` of element `i` (0 to 255).
    pub fn q(&self, i: usize) -> u8 {
        pair(&self.q, i)
    }
}

/// Element `i` of 256 pairs of bits, as in [`BlockQ2K::q`].
fn pair(q: &[u8; 64], i: usize) -> u8 {
    q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// 256 weights in 16 groups of 16: value = `(d · scale) · q` with `q` in -4..=3 and 6-bit `scale`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// Bit b of byte l belongs to weight 32b + l; where it is clear, `q` is four less.
    pub high: [u8; 32],
    /// The low pairs, as in [`BlockQ2K::q`].
    pub low: [u8; 64],
    /// Scales, packed: see [`BlockQ3K::scale`].
    pub scales: [u8; 12],
    pub d: F16Le,
}

impl BlockQ3K {
    /// `q` of element `i` (0 to 255).
    pub fn q(&self, i: usize) -> i8 {
        let set = self.high[i % 32] >> (i / 32) & 1;
        pair(&self.low, i) as i8 - if set == 1 { 0 } else { 4 }
    }

    /// The scale of `group` (0 to 15), -32 to 31.
    ///
    /// Bytes 0–7 hold the low four bits of groups 0–7 in their low nibbles and of groups 8–15 in their high ones; bytes
    /// 8–11 the upper pairs, those of group g in byte 8 + g mod 4 from bit 2·(g / 4) up.
    pub fn scale(&self, group: usize) -> i8 {
        let low = self.scales[group % 8] >> (group / 8 * 4) & 15;
        let high = self.scales[8 + group % 4] >> (group / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    }
}

/// 256 weights in 8 groups of 32: value = `(d · scale) · q - (dmin · min)` with 4-bit `q`, 6-bit
/// `scale` and `min`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    pub d: F16Le,
    pub dmin: F16Le,
    /// Scales and minima, packed: see [`scale_min`].
    pub scales: [u8; 12],
    /// Groups 2g and 2g + 1 are the low and the high nibbles of bytes 32g to 32g + 31.
    pub q: [u8; 128],
}

impl BlockQ4K {
    /// `q` of element `i` (0 to 255).
    pub fn q(&self, i: usize) -> u8 {
        self.q[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15
    }
}

/// As [`BlockQ4K`], but with 5-bit `q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    pub d: F16Le,
    pub dmin: F16Le,
    pub scales: [u8; 12],
    /// Bit b of byte l is the fifth bit of weight 32b + l.
    pub high: [u8; 32],
    pub low: [u8; 128],
}

impl BlockQ5K {
    /// `q` of element `i` (0 to 255).
    pub fn q(&self, i: usize) -> u8 {
        let low = self.low[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        low | (self.high[i % 32] >> (i / 32) & 1) << 4
    }
}

/// Scale and minimum of `group` (0 to 7) of a [`BlockQ4K`] or [`BlockQ5K`].
///
/// The low six bits of bytes 0–3 and 4–7 are scales and minima of groups 0–3. For groups 4–7 the
/// nibbles of bytes 8–11 are the low four bits, and the top two bits of bytes 0–7 the rest.
pub fn scale_min(scales: &[u8; 12], group: usize) -> (u8, u8) {
    let s = scales;
    if group < 4 {
        (s[group] & 63, s[group + 4] & 63)
    } else {
        let low = s[group + 4];
        ((low & 15) | (s[group - 4] >> 6 << 4), (low >> 4) | (s[group] >> 6 << 4))
    }
}

/// 256 weights in 16 groups of 16: value = `(d · scale) · (q - 32)` with 6-bit `q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// Low nibbles: of each half of 128 weights, 64 bytes hold the first 64 weights low, the others high.
    pub low: [u8; 128],
    /// High pairs: of each half, 32 bytes hold weights l, l + 32, l + 64, l + 96 from the lowest bits up.
    pub high: [u8; 64],
    pub scales: [i8; 16],
    pub d: F16Le,
}

impl BlockQ6K {
    /// `q - 32` of element `i` (0 to 255).
    pub fn q(&self, i: usize) -> i8 {
        let (half, l) = (i / 128, i % 128);
        let low = self.low[half * 64 + l % 64] >> (l / 64 * 4) & 15;
        let high = self.high[half * 32 + l % 32] >> (l / 32 * 2) & 3;
        (low | high << 4) as i8 - 32
    }
}

/// 32 weights: value = `d · E2M1(q)`, with `d = 2^(e - 127)` (OCP Microscaling Formats, 5.3.3 and 5.4.1).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMXFP4 {
    pub e: u8,
    pub q: [u8; 16],
}

impl BlockMXFP4 {
    /// Twice the values of E2M1, so that they are integers.
    pub const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

    /// Half of `d`. GGML has no NaN: e = 255 is one more power of two.
    pub fn half_d(&self) -> f32 {
        let e = u32::from(self.e);
        f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
    }

    /// Twice the value of element `i` (0 to 31) before scaling.
    pub fn q(&self, i: usize) -> i8 {
        BlockMXFP4::TWICE[usize::from(nibble(&self.q, i))]
    }
}

/// 32 activations: value = `d · q`; `s = d · Σq` serves formats with a minimum.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8Act {
    pub d: F32Le,
    pub s: F32Le,
    pub q: [i8; 32],
}

/// 32 activations: value = `d · (q + r / 254)`; `s` is the sum of those.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ16Act {
    pub d: F32Le,
    pub s: F32Le,
    pub q: [i8; 32],
    pub r: [i8; 32],
}

/// Says of how many elements of which format a struct is the block, and asserts that the format agrees, in bytes too.
macro_rules! blocks {
    ($($block:ty: $len:literal of $dtype:expr;)*) => {$(
        impl Block for $block {
            const DTYPE: DType = $dtype;
        }

        const _: () = assert!($len == $dtype.block_len());
        const _: () = assert!(size_of::<$block>() == $dtype.block_bytes() && align_of::<$block>() == 1);
    )*};
}

blocks! {
    BlockQ4_0: 32 of DType::Q4_0;
    BlockQ4_1: 32 of DType::Q4_1;
    BlockQ5_0: 32 of DType::Q5_0;
    BlockQ5_1: 32 of DType::Q5_1;
    BlockQ8_0: 32 of DType::Q8_0;
    BlockQ2K: 256 of DType::Q2_K;
    BlockQ3K: 256 of DType::Q3_K;
    BlockQ4K: 256 of DType::Q4_K;
    BlockQ5K: 256 of DType::Q5_K;
    BlockQ6K: 256 of DType::Q6_K;
    BlockMXFP4: 32 of DType::MXFP4;
    BlockQ8Act: 32 of DType::Q8Act;
    BlockQ16Act: 32 of DType::Q16Act;
}
