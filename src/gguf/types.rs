//! GGML's tensor element types.

use crate::ir::DType;
use std::fmt;

/// An element type that GGML defines, whether or not this compiler can run it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GgmlType {
    id: u32,
    name: &'static str,
    block_len: u64,
    block_bytes: u64,
}

/// The types a file may hold, numbered as in GGML's `ggml.h`: id, name, elements and bytes a block.
const TYPES: [(u32, &str, u64, u64); 34] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// Ids that GGML once used and gave up; files that hold them have to be made again.
const RETIRED: [(u32, &str); 8] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
];

impl GgmlType {
    /// The type with GGML's number `id`, unless it is retired or unknown.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        let &(id, name, block_len, block_bytes) = TYPES.iter().find(|t| t.0 == id)?;
        Some(GgmlType { id, name, block_len, block_bytes })
    }

    /// The type in which a file stores `dtype`; none for activations, which no file holds.
    pub fn of(dtype: DType) -> Option<GgmlType> {
        let id = match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::Q4_0 => 2,
            DType::Q4_1 => 3,
            DType::Q5_0 => 6,
            DType::Q5_1 => 7,
            DType::Q8_0 => 8,
            DType::Q2_K => 10,
            DType::Q3_K => 11,
            DType::Q4_K => 12,
            DType::Q5_K => 13,
            DType::Q6_K => 14,
            DType::I32 => 26,
            DType::BF16 => 30,
            DType::MXFP4 => 39,
            DType::Q8Act | DType::Q16Act => return None,
        };
        GgmlType::from_id(id)
    }

    /// The compiler's element type, if it supports this one.
    pub fn dtype(self) -> Option<DType> {
        DType::ALL.into_iter().find(|&d| GgmlType::of(d) == Some(self))
    }

    /// GGML's number.
    pub const fn id(self) -> u32 {
        self.id
    }

    /// GGML's name, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Elements in one storage block; 1 for plain types.
    pub const fn block_len(self) -> u64 {
        self.block_len
    }

    /// Bytes of one storage block.
    pub const fn block_bytes(self) -> u64 {
        self.block_bytes
    }
}

/// The name of a retired type.
pub(super) fn retired(id: u32) -> Option<&'static str> {
    RETIRED.iter().find(|t| t.0 == id).map(|t| t.1)
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_geometry_agrees_with_the_ir() {
        for dtype in DType::ALL.into_iter().filter(|&d| !d.is_activations()) {
            let ty = GgmlType::of(dtype).unwrap();
            assert_eq!(ty.dtype(), Some(dtype));
            assert_eq!(ty.block_len(), dtype.block_len() as u64, "{dtype}");
            assert_eq!(ty.block_bytes(), dtype.block_bytes() as u64, "{dtype}");
            assert_eq!(ty.name().to_lowercase(), dtype.name());
        }
        assert_eq!([DType::Q8Act, DType::Q16Act].map(GgmlType::of), [None; 2]);
    }

    #[test]
    fn every_number_is_in_one_table_at_most() {
        for id in 0..=41 {
            let known = GgmlType::from_id(id).is_some();
            assert_ne!(known, retired(id).is_some(), "{id}");
        }
        assert_eq!(GgmlType::from_id(42), None);
        assert_eq!(GgmlType::from_id(20).unwrap().name(), "IQ4_NL");
        assert_eq!(GgmlType::from_id(21).unwrap().name(), "IQ3_S");
        assert_eq!(GgmlType::from_id(22).unwrap().name(), "IQ2_S");
    }
}
