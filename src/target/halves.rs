//! How the matrix units of a GPU go over weights in 16 bits, F16 or BF16, for many tokens (`kernels/matmul_halves.h`), and over quantised ones that are
//! unpacked to F16 (`kernels/matmul_unpacked.h`).

use super::{FEW_TOKENS, Target, TargetKind};
use crate::ir::DType;
use crate::ir::fused::{Epilogue, MatmulPart, MatmulSpec};

/// A tile: its rows, its tokens and the threads of its block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HalfTile {
    pub rows: u64,
    pub tokens: u64,
    pub threads: u32,
    /// Blocks that share a multiprocessor at least.
    pub at_once: u32,
}

/// What reads least of each weight and activation, of so many tokens or more, and where there are so many tiles. (An H200, prompts of 512 tokens:
/// an 8B runs 1.20 times as fast so as where matmuls of up to 192 large tiles take small ones, a 1B, whose have 64 and 96, 1.05 times; with one block
/// at once for two 0.87 times.)
const LARGE: HalfTile = HalfTile { rows: 128, tokens: 128, threads: 256, at_once: 2 };
const LARGE_TOKENS: u64 = 257;
const LARGE_TILES: u64 = 50;
/// What there are more of; the tiles of other formats have as many tokens and threads, and may be of the same launch. (Of bytes two blocks at once
/// leave half of a multiprocessor waiting, 0.97 of the speed on an H200, and four spill, 0.52.)
const SMALL: HalfTile = HalfTile { rows: 64, tokens: 64, threads: 128, at_once: 3 };

/// Columns that a tile has at once of weights in 16 bits, and of those that are unpacked.
const COLUMNS: u64 = 32;
const UNPACKED_COLUMNS: u64 = 64;
/// Tiles that keep a GPU busy: of fewer, each is of a range of the columns. (An H200, a 1B: with 800 small ones prompts of 128 and 256 tokens run 1.17
/// and 1.13 times as fast as with 512, and of 64 tokens 0.97 times; with 1200 1.21, 1.20 and 0.95 times. An 8B, 512 tokens: with 128 large ones 0.81
/// and with 400 0.98 times as fast as with 256.)
const ENOUGH_LARGE: u64 = 256;
const ENOUGH_SMALL: u64 = 800;
/// Columns of a range, at least, and ranges, at most.
const RANGE_COLUMNS: u64 = 256;
const MOST_RANGES: u64 = 32;

/// How a matmul of many tokens is cut, where its weights are in 16 bits or unpacked to those.
#[derive(Clone, Debug, PartialEq)]
pub struct HalfTiles {
    pub tile: HalfTile,
    /// Formats to which the activations are rounded before, each by a launch; none if no weight is multiplied so.
    pub rounds: Vec<DType>,
    /// Ranges of the columns, each of which has tiles of its own; if there are several, a launch after joins their sums.
    pub ranges: u64,
}

impl HalfTiles {
    /// Launches beside that of the tiles.
    pub fn launches(&self) -> u64 {
        self.rounds.len() as u64 + u64::from(self.ranges > 1)
    }
}

/// Whether an AMD GPU has matrix units of numbers in 16 bits, as `kernels/device.h` has it.
pub(super) fn has_units(arch: &str) -> bool {
    ["gfx908", "gfx90a", "gfx94", "gfx950", "gfx11", "gfx12"].iter().any(|start| arch.starts_with(start))
}

/// The units of these lose small halves, so that floats are multiplied in place of them, which is no faster than what they do of bytes.
fn is_slow(arch: &str) -> bool {
    ["gfx908", "gfx90a"].iter().any(|start| arch.starts_with(start))
}

/// To what the activations of prompts are rounded that meet quantised weights, where nobody said: [`Target::prompt_activations`].
///
/// Of bytes each sum of some columns becomes a float and is scaled, for every token; what is unpacked to F16 is so once for all tokens of a tile. On an
/// H200 prompts of an 8B run 1.5 to 2.2 times as fast so. Of AMD's cards nobody measured it: compiled, a tile takes 0.4 times the vector instructions
/// on gfx1100, half of them on gfx1201 and 0.4 to 0.8 times on gfx942. NVIDIA's cards for graphics multiply F16 at a quarter of the rate of bytes.
pub(super) fn prompt_activations(arch: &str) -> DType {
    let at_full_rate = ["sm_80", "sm_90", "sm_100", "sm_103"].contains(&arch);
    if at_full_rate || has_units(arch) && !is_slow(arch) { DType::F16 } else { DType::Q8Act }
}

impl Target {
    /// To what activations are rounded that matrix units multiply by a weight of this format and so many columns, where they do: tiles have whole
    /// steps of those.
    pub fn rounds_to(&self, format: DType, columns: u64) -> Option<DType> {
        let has_units = match self.kind {
            TargetKind::Cpu => false,
            TargetKind::HipNvidia => true,
            TargetKind::HipAmd => has_units(&self.arch),
        };
        match format {
            DType::F16 | DType::BF16 => (has_units && columns.is_multiple_of(COLUMNS)).then_some(format),
            _ if !format.is_quantised() || is_slow(&self.arch) => None,
            _ => (has_units && columns.is_multiple_of(UNPACKED_COLUMNS)).then_some(DType::F16),
        }
    }

    /// What a matmul of so many tokens takes.
    pub fn half_tiles(&self, m: &MatmulSpec, tokens: u64) -> HalfTiles {
        let in_tiles = tokens > FEW_TOKENS
            && match m.epilogue {
                Epilogue::Store => true,
                Epilogue::Swiglu { .. } => {
                    let first = (m.parts[0].format, m.parts[0].round);
                    m.parts.iter().all(|part| (part.format, part.round) == first && part.bias.is_none())
                }
                Epilogue::ArgMax { .. } => false,
            };
        let rounds =
            |part: &MatmulPart| part.round.filter(|to| self.rounds_to(part.format, m.k) == Some(*to));
        let mut formats: Vec<DType> = m.parts.iter().filter_map(rounds).collect();
        let all = formats.len() == m.parts.len();
        formats.sort_unstable();
        formats.dedup();
        if !in_tiles || formats.is_empty() {
            return HalfTiles { tile: SMALL, rounds: vec![], ranges: 1 };
        }
        let tiles = |tile: HalfTile| {
            m.parts.iter().map(|part| part.rows.div_ceil(tile.rows)).sum::<u64>()
                * tokens.div_ceil(tile.tokens)
        };
        // Results of gates and ups are no sums, and what else is in a launch has no ranges.
        let most = if all && m.epilogue == Epilogue::Store {
            (m.k / RANGE_COLUMNS).clamp(1, MOST_RANGES)
        } else {
            1
        };
        let of = |tile, enough: u64| (tile, (enough / tiles(tile).max(1)).clamp(1, most));
        let is_large = all && tokens >= LARGE_TOKENS && tiles(LARGE) >= LARGE_TILES;
        let (tile, ranges) = if is_large { of(LARGE, ENOUGH_LARGE) } else { of(SMALL, ENOUGH_SMALL) };
        HalfTiles { tile, rounds: formats, ranges }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::DType::{BF16, F16, F32, Q4_K, Q6_K, Q8_0};

    #[test]
    fn tiles_ranges_and_launches_are_by_format_target_and_tokens() {
        let of = |target: &str, formats: &[DType], k: u64, tokens: u64, round: Option<DType>| {
            let part = |&format| MatmulPart {
                weight: 1,
                format,
                rows: 2048,
                round,
                bias: None,
                residual: None,
                out: Some(2),
            };
            let parts = formats.iter().map(part).collect();
            let m = MatmulSpec { x: 0, k, parts, epilogue: Epilogue::Store };
            let HalfTiles { tile, rounds, ranges } = Target::named(target).unwrap().half_tiles(&m, tokens);
            (tile.rows, rounds, ranges)
        };
        let (half, bfloat) = (Some(F16), Some(BF16));
        // As many ranges as keep a GPU busy, of 256 columns at the least.
        assert_eq!(of("sm_90", &[F16], 2048, 64, half), (64, vec![F16], 8));
        assert_eq!(of("sm_90", &[F16], 8192, 64, half), (64, vec![F16], 25));
        assert_eq!(of("sm_90", &[F16], 8192, 256, half), (64, vec![F16], 6));
        // Many tokens, of which there are enough large tiles.
        assert_eq!(of("gfx90a", &[BF16], 8192, 512, bfloat), (128, vec![BF16], 4));
        assert_eq!(of("sm_90", &[F16, F16], 8192, 512, half), (128, vec![F16], 2));
        assert_eq!(of("gfx1100", &[F16], 8192, 4096, half), (128, vec![F16], 1));
        assert_eq!(of("sm_90", &[F16], 8192, 257, half), (64, vec![F16], 5));
        // What is quantised meets F16, all formats alike.
        assert_eq!(of("sm_90", &[Q4_K, Q6_K], 8192, 512, half), (128, vec![F16], 2));
        assert_eq!(of("gfx942", &[Q8_0], 8192, 64, half), (64, vec![F16], 25));
        // Each format once; what is multiplied otherwise has no ranges.
        assert_eq!(of("sm_90", &[F16, F32], 8192, 4096, half), (64, vec![F16], 1));
        assert_eq!(of("sm_90", &[BF16, F16, BF16], 256, 64, half), (64, vec![F16], 1));
        // Both of gate and up, or neither.
        let swiglu = |round: [Option<DType>; 2]| {
            let part = |round| MatmulPart {
                weight: 1,
                format: F16,
                rows: 8192,
                round,
                bias: None,
                residual: None,
                out: None,
            };
            let parts = round.map(part).to_vec();
            let m = MatmulSpec { x: 0, k: 2048, parts, epilogue: Epilogue::Swiglu { out: 3 } };
            let HalfTiles { tile, rounds, ranges } = Target::named("sm_90").unwrap().half_tiles(&m, 512);
            (tile.rows, rounds.len(), ranges)
        };
        assert_eq!(swiglu([half, half]), (128, 1, 1));
        assert_eq!([swiglu([half, None]), swiglu([None, half])], [(64, 0, 1); 2]);
        // No tiles, no whole steps of columns, no matrix unit; nothing that may be rounded.
        for (target, format, k, tokens, round) in [
            ("sm_90", F16, 8192, FEW_TOKENS, half),
            ("sm_90", F16, 8200, 64, half),
            ("gfx1030", F16, 8192, 64, half),
            ("cpu", F16, 8192, 64, half),
            ("sm_90", F16, 8192, 512, None),
            ("sm_90", Q8_0, 8192 + 32, 512, half),
            ("sm_90", Q8_0, 8192, 512, bfloat),
            ("gfx90a", Q8_0, 8192, 512, half),
            ("gfx1030", Q4_K, 8192, 512, half),
            ("sm_90", F32, 8192, 512, half),
        ] {
            let found = of(target, &[format], k, tokens, round);
            assert_eq!(found, (64, vec![], 1), "{target}, {format}, {k} columns, {tokens} tokens");
        }
    }
}
