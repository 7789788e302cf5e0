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

/// 32 weights: value = `d · q`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    pub d: F16Le,
    pub q: [i8; 32],
}

/// 256 weights in 8 groups of 32: value = `(d · scale) · q - (dmin · min)` with 4-bit `q`, 6-bit
/// `scale` and `min`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    pub d: F16Le,
    pub dmin: F16Le,
    /// Scales and minima, packed: see [`BlockQ4K::scale_min`].
    pub scales: [u8; 12],
    /// Groups 2g and 2g + 1 are the low and the high nibbles of bytes 32g to 32g + 31.
    pub q: [u8; 128],
}

impl BlockQ4K {
    /// Scale and minimum of `group` (0 to 7).
    ///
    /// The low six bits of bytes 0–3 and 4–7 are scales and minima of groups 0–3. For groups 4–7 the
    /// nibbles of bytes 8–11 are the low four bits, and the top two bits of bytes 0–7 the rest.
    pub fn scale_min(&self, group: usize) -> (u8, u8) {
        let s = &self.scales;
        if group < 4 {
            (s[group] & 63, s[group + 4] & 63)
        } else {
            let low = s[group + 4];
            ((low & 15) | (s[group - 4] >> 6 << 4), (low >> 4) | (s[group] >> 6 << 4))
        }
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

/// 32 activations: value = `d · q`; `s = d · Σq` serves formats with a minimum.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8Act {
    pub d: F32Le,
    pub s: F32Le,
    pub q: [i8; 32],
}

impl Block for BlockQ8_0 {
    const DTYPE: DType = DType::Q8_0;
}

impl Block for BlockQ4K {
    const DTYPE: DType = DType::Q4_K;
}

impl Block for BlockQ6K {
    const DTYPE: DType = DType::Q6_K;
}

impl Block for BlockQ8Act {
    const DTYPE: DType = DType::Q8Act;
}

const fn has_size_of_its_dtype<B: Block>() -> bool {
    size_of::<B>() == B::DTYPE.block_bytes() && align_of::<B>() == 1
}

const _: () = assert!(has_size_of_its_dtype::<BlockQ8_0>());
const _: () = assert!(has_size_of_its_dtype::<BlockQ4K>());
const _: () = assert!(has_size_of_its_dtype::<BlockQ6K>());
const _: () = assert!(has_size_of_its_dtype::<BlockQ8Act>());
