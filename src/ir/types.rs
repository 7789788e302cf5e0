//! Element types, symbolic dimensions and tensor types.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Element type of a tensor. Quantised formats are element types whose storage unit is a block.
///
/// Layouts are those of GGML, except [`DType::Q8Act`] and [`DType::Q16Act`], which are this compiler's own formats for
/// activations quantised on the fly.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    F32,
    F16,
    /// The upper half of an f32.
    BF16,
    I32,
    /// 32 weights: `f16 d`, 16 bytes of nibbles; value = `d · (q − 8)`.
    Q4_0,
    /// 32 weights: `f16 d`, `f16 m`, 16 bytes of nibbles; value = `d · q + m`.
    Q4_1,
    /// 32 weights: `f16 d`, 4 bytes of fifth bits, 16 bytes of nibbles; value = `d · (q − 16)`.
    Q5_0,
    /// 32 weights: `f16 d`, `f16 m`, 4 bytes of fifth bits, 16 bytes of nibbles; value = `d · q + m`.
    Q5_1,
    /// 32 weights: `f16 d`, 32 × `i8`.
    Q8_0,
    /// 256 weights: 16 bytes of 4-bit scales and minima, 64 bytes of pairs, `f16 d`, `f16 dmin`.
    Q2_K,
    /// 256 weights: 32 bytes of third bits, 64 bytes of pairs, 12 bytes of 6-bit scales, `f16 d`.
    Q3_K,
    /// 256 weights: `f16 d`, `f16 dmin`, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
    Q4_K,
    /// 256 weights: as [`DType::Q4_K`], with 32 bytes of fifth bits before the nibbles.
    Q5_K,
    /// 256 weights: 128 bytes of low nibbles, 64 bytes of high pairs, 16 × `i8` scales, `f16 d`.
    Q6_K,
    /// 32 weights of the OCP Microscaling format: a power of two, 16 bytes of E2M1 nibbles.
    MXFP4,
    /// 32 activations: `f32 d`, `f32 s = d · Σq`, 32 × `i8 q`; value = `d · q`, `d = max|x| / 127`.
    Q8Act,
    /// 32 activations: as [`DType::Q8Act`], then 32 × `i8 r` of what that leaves; value = `d · (q + r / 254)`, `s` its sum.
    Q16Act,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [DType; 17] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::I32,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::MXFP4,
        DType::Q8Act,
        DType::Q16Act,
    ];

    /// What a model file may store its weights in: every kernel that reads a weight takes each of them.
    pub const WEIGHTS: [DType; 14] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::MXFP4,
    ];

    /// The name used in the text form and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
            DType::Q4_0 => "q4_0",
            DType::Q4_1 => "q4_1",
            DType::Q5_0 => "q5_0",
            DType::Q5_1 => "q5_1",
            DType::Q8_0 => "q8_0",
            DType::Q2_K => "q2_k",
            DType::Q3_K => "q3_k",
            DType::Q4_K => "q4_k",
            DType::Q5_K => "q5_k",
            DType::Q6_K => "q6_k",
            DType::MXFP4 => "mxfp4",
            DType::Q8Act => "q8_act",
            DType::Q16Act => "q16_act",
        }
    }

    /// The inverse of [`DType::name`].
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }

    /// Elements in one storage block; 1 for plain types.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 => 32,
            DType::MXFP4 | DType::Q8Act | DType::Q16Act => 32,
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K => 256,
        }
    }

    /// Bytes of one storage block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2_K => 84,
            DType::Q3_K => 110,
            DType::Q4_K => 144,
            DType::Q5_K => 176,
            DType::Q6_K => 210,
            DType::MXFP4 => 17,
            DType::Q8Act => 40,
            DType::Q16Act => 72,
        }
    }

    /// Whether elements share scales within a block.
    pub const fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// Whether it is a format of activations, whose sums with a quantised weight are of integers.
    pub const fn is_activations(self) -> bool {
        matches!(self, DType::Q8Act | DType::Q16Act)
    }

    /// Whether `dequant` turns this type into f32.
    pub const fn is_dequantisable(self) -> bool {
        !matches!(self, DType::F32 | DType::I32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Values of the symbols, or their upper bounds. They are sizes only: what a step reads and where it writes is in
/// its inputs ([`super::step`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Syms {
    /// `T`: token rows of this step, of whatever sequences.
    pub t: u64,
    /// `R`: rows whose results are wanted, at most `T`.
    pub r: u64,
}

/// A dimension: a constant, a symbol, or a sum of those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Dim {
    /// The constant term.
    pub c: u64,
    /// How often `T` and `R` occur.
    pub t: u8,
    pub r: u8,
}

impl Dim {
    pub const ZERO: Dim = Dim { c: 0, t: 0, r: 0 };
    /// Token rows of this step.
    pub const T: Dim = Dim { c: 0, t: 1, r: 0 };
    /// Rows whose results are wanted.
    pub const R: Dim = Dim { c: 0, t: 0, r: 1 };

    /// A constant dimension.
    pub const fn n(c: u64) -> Dim {
        Dim { c, t: 0, r: 0 }
    }

    /// The constant, if no symbol occurs.
    pub const fn as_const(self) -> Option<u64> {
        if self.t == 0 && self.r == 0 { Some(self.c) } else { None }
    }

    /// The sum of two dimensions, if the counts still fit.
    pub fn checked_add(self, o: Dim) -> Option<Dim> {
        Some(Dim { c: self.c.checked_add(o.c)?, t: self.t.checked_add(o.t)?, r: self.r.checked_add(o.r)? })
    }

    /// The value at `at`, saturating; at the bounds the largest that it can have.
    pub fn eval(self, at: &Syms) -> u64 {
        let term = |n: u8, v: u64| u64::from(n).saturating_mul(v);
        self.c.saturating_add(term(self.t, at.t)).saturating_add(term(self.r, at.r))
    }
}

impl From<u64> for Dim {
    fn from(c: u64) -> Dim {
        Dim::n(c)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        let mut term = |f: &mut fmt::Formatter<'_>, s: &dyn fmt::Display| {
            let plus = if std::mem::take(&mut first) { "" } else { "+" };
            write!(f, "{plus}{s}")
        };
        for (count, name) in [(self.t, "T"), (self.r, "R")] {
            for _ in 0..count {
                term(f, &name)?;
            }
        }
        if self.c > 0 || (self.t == 0 && self.r == 0) {
            term(f, &self.c)?;
        }
        Ok(())
    }
}

/// A row-major tensor; blocks of a quantised type run along the last dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    pub dtype: DType,
    pub shape: Vec<Dim>,
}

impl TensorType {
    /// The most dimensions a tensor may have.
    pub const MAX_RANK: usize = 8;

    pub fn new(dtype: DType, shape: impl IntoIterator<Item = impl Into<Dim>>) -> TensorType {
        TensorType { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }

    /// The first dimension (1 for a scalar).
    pub fn first(&self) -> Dim {
        self.shape.first().copied().unwrap_or(Dim::n(1))
    }

    /// The last dimension (1 for a scalar).
    pub fn last(&self) -> Dim {
        self.shape.last().copied().unwrap_or(Dim::n(1))
    }

    /// The same shape with another element type.
    pub fn with_dtype(&self, dtype: DType) -> TensorType {
        TensorType { dtype, shape: self.shape.clone() }
    }

    /// The shape as numbers at `at`.
    pub fn dims(&self, at: &Syms) -> Vec<u64> {
        self.shape.iter().map(|d| d.eval(at)).collect()
    }

    /// Elements at `at`, saturating; at the bounds the most that there can be.
    pub fn elements(&self, at: &Syms) -> u64 {
        self.shape.iter().fold(1u64, |n, d| n.saturating_mul(d.eval(at)))
    }

    /// Bytes at `at`, saturating; at the bounds the most that there can be.
    pub fn bytes(&self, at: &Syms) -> u64 {
        self.bytes_of(self.elements(at))
    }

    fn bytes_of(&self, elements: u64) -> u64 {
        (elements / self.dtype.block_len() as u64).saturating_mul(self.dtype.block_bytes() as u64)
    }

    /// Whether the last dimension is a whole number of blocks.
    pub fn is_blocked(&self) -> bool {
        let block = self.dtype.block_len() as u64;
        block == 1 || self.last().as_const().is_some_and(|n| n > 0 && n % block == 0)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, d) in self.shape.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{d}")?;
        }
        f.write_str("]")
    }
}
