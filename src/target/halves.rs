//! How the matrix units of a GPU go over weights in 16 bits, F16 or BF16, for many tokens (`kernels/matmul_halves.h`).

use super::{FEW_TOKENS, Target, TargetKind};
use crate::ir::DType;
use crate::ir::fused::{Epilogue, MatmulSpec};

/// Rows and tokens of a tile.
pub const HALF_TILE: u64 = 64;
/// Columns that a tile has at once.
const COLUMNS: u64 = 32;
/// Tiles that keep a GPU busy: of fewer, each is of a range of the columns. (An H200, a 1B: with 800 prompts of 128 and 256 tokens run 1.17 and 1.13
/// times as fast as with 512, and of 64 tokens 0.97 times; with 1200 1.21, 1.20 and 0.95 times.)
const ENOUGH: u64 = 800;
/// Columns of a range, at least, and ranges, at most.
const RANGE_COLUMNS: u64 = 256;
const MOST_RANGES: u64 = 32;

/// The launches of a matmul of many tokens beside that of its tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct HalfTiles {
    /// Formats into which the activations are split before, each by a launch; none if no weight is multiplied so.
    pub splits: Vec<DType>,
    /// Ranges of the columns, each of which has tiles of its own; if there are several, a launch after joins their sums.
    pub ranges: u64,
}

impl HalfTiles {
    /// Launches beside that of the tiles.
    pub fn launches(&self) -> u64 {
        self.splits.len() as u64 + u64::from(self.ranges > 1)
    }
}

impl Target {
    /// Whether matrix units multiply such numbers, as `kernels/device.h` has it.
    fn multiplies_halves(&self) -> bool {
        let amd = ["gfx908", "gfx90a", "gfx94", "gfx950", "gfx11", "gfx12"];
        match self.kind {
            TargetKind::Cpu => false,
            TargetKind::HipNvidia => true,
            TargetKind::HipAmd => amd.iter().any(|arch| self.arch.starts_with(arch)),
        }
    }

    /// Whether they multiply a weight of this format and so many columns: tiles have whole steps of those.
    pub fn tiles_halves(&self, format: DType, columns: u64) -> bool {
        matches!(format, DType::F16 | DType::BF16)
            && columns.is_multiple_of(COLUMNS)
            && self.multiplies_halves()
    }

    /// What a matmul of so many tokens takes.
    pub fn half_tiles(&self, m: &MatmulSpec, tokens: u64) -> HalfTiles {
        let in_tiles = tokens > FEW_TOKENS
            && match m.epilogue {
                Epilogue::Store => true,
                Epilogue::Swiglu { .. } => {
                    m.parts.iter().all(|part| part.format == m.parts[0].format && part.bias.is_none())
                }
                Epilogue::ArgMax { .. } => false,
            };
        let halves = || m.parts.iter().filter(|part| self.tiles_halves(part.format, m.k));
        if !in_tiles {
            return HalfTiles { splits: vec![], ranges: 1 };
        }
        let mut splits: Vec<DType> = halves().map(|part| part.format).collect();
        splits.sort_unstable();
        splits.dedup();
        let alone = halves().count() == m.parts.len() && m.epilogue == Epilogue::Store;
        let tiles = m.parts.iter().map(|part| part.rows.div_ceil(HALF_TILE)).sum::<u64>()
            * tokens.div_ceil(HALF_TILE);
        let most = if alone { (m.k / RANGE_COLUMNS).clamp(1, MOST_RANGES) } else { 1 };
        HalfTiles { splits, ranges: (ENOUGH / tiles.max(1)).clamp(1, most) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::DType::{BF16, F16, F32};
    use crate::ir::fused::MatmulPart;

    #[test]
    fn launches_beside_the_tiles_are_by_format_target_and_tokens() {
        let of = |target: &str, formats: &[DType], k: u64, tokens: u64| {
            let part = |&format| MatmulPart {
                weight: 1,
                format,
                rows: 2048,
                bias: None,
                residual: None,
                out: Some(2),
            };
            let parts = formats.iter().map(part).collect();
            let m = MatmulSpec { x: 0, k, parts, epilogue: Epilogue::Store };
            let HalfTiles { splits, ranges } = Target::named(target).unwrap().half_tiles(&m, tokens);
            (splits, ranges)
        };
        // As many ranges as keep a GPU busy, of 256 columns at the least.
        assert_eq!(of("sm_90", &[F16], 2048, 64), (vec![F16], 8));
        assert_eq!(of("sm_90", &[F16], 8192, 64), (vec![F16], 25));
        assert_eq!(of("gfx90a", &[BF16], 8192, 512), (vec![BF16], 3));
        assert_eq!(of("gfx1100", &[F16], 8192, 4096), (vec![F16], 1));
        // Each format once; what is multiplied otherwise has no ranges.
        assert_eq!(of("sm_90", &[BF16, F16, BF16], 256, 64), (vec![F16, BF16], 1));
        assert_eq!(of("sm_90", &[F16, F32], 8192, 64), (vec![F16], 1));
        // No tiles, no whole steps of columns, no matrix unit.
        for (target, k, tokens) in
            [("sm_90", 8192, FEW_TOKENS), ("sm_90", 8200, 64), ("gfx1030", 8192, 64), ("cpu", 8192, 64)]
        {
            assert_eq!(of(target, &[F16], k, tokens), (vec![], 1), "{target}, {k} columns, {tokens} tokens");
        }
    }
}
