//! Matmuls of a few tokens on matrix units: `kernels/matvec_eight.h`.

use super::super::in_place::residuals;
use super::super::spec::{Epilogue, Extent, Layout, MatmulPart, MatmulSpec};
use super::{Unit, floats, symbol};
use crate::ir::{DType, Dim};
use crate::target::{FEW_TOKENS, TargetKind};

/// Rows of a tile, and columns of a slice, as `kernels/matvec_eight.h` and `kernels/quads.h` have them.
const TILE: u64 = 16;
const SLICE: u64 = 256;
/// Blocks that an H200 runs at once, a multiprocessor each, and a few more.
const BUSY: u64 = 144;
/// Tiles up to which each has a block of its own: what an H200 reads of the activations for each is less than what it loses with fewer blocks.
const ALONE: u64 = 200;
/// Warps of which the lanes have 128 registers, the most that a multiprocessor has.
const WARPS: u64 = 16;

impl Unit<'_> {
    /// The matmul on matrix units, of all tokens at once; false where those are not for it.
    pub(super) fn on_units(&mut self, m: &MatmulSpec, tokens: Dim) -> Result<bool, String> {
        let most = tokens.eval(self.bounds);
        // Two lanes load the same eight bytes of a block of 32 nibbles: that pays for more than two tokens.
        let in_nibbles = |part: &MatmulPart| {
            matches!(part.format, DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::MXFP4)
        };
        let from = self.target.units_from.unwrap_or(u64::MAX);
        let from = if m.parts.iter().any(in_nibbles) { from.max(3) } else { from };
        let activations = self.ty(m.x)?.dtype;
        let fits = |part: &MatmulPart| {
            // A plane has a byte of each weight at most, and offsets in it 32 bits. (Q2_K has minima of 16 columns, of whose activations nobody has the sums.)
            let is_addressed = m.k.saturating_mul(part.rows) < 1 << 31;
            let is_there = part.format.is_quantised() && part.format != DType::Q2_K && is_addressed;
            is_there && self.layout(part.weight) == Layout::Planes
        };
        let is_for = self.target.kind == TargetKind::HipNvidia
            && self.target.wave == 32
            && (from..=FEW_TOKENS).contains(&most)
            && activations.is_activations()
            && m.k.is_multiple_of(SLICE)
            && m.parts.iter().all(fits);
        if !is_for {
            return Ok(false);
        }
        let slices = m.k / SLICE;
        let warps = |most: u64| (0..).map(|n| most >> n).find(|n| *n <= slices).unwrap_or(1);
        let mut body = self.waits_unless_given(m.parts.iter().map(|part| part.weight)).to_string();
        body += &format!("const auto x = {};\n", self.activations(m.x, m.k)?);
        let count = symbol(tokens)?;
        let (warps, blocks) = match m.epilogue {
            Epilogue::Store => {
                let all: u64 = m.parts.iter().map(|part| part.rows.div_ceil(TILE)).sum();
                // With activations in two bytes, those of two halves do not fit the registers twice.
                let has_halves = |part: &MatmulPart| matches!(part.format, DType::Q3_K | DType::Q6_K);
                let is_large = activations == DType::Q16Act && m.parts.iter().any(has_halves);
                let tiles = if all <= ALONE || is_large { 1 } else { 2 };
                let warps = warps(if all / tiles <= BUSY { WARPS } else { WARPS / 2 });
                body += &format!("__shared__ EightRoom<{tiles}> rooms[{warps}];\n");
                let mut blocks = 0;
                for (i, part) in m.parts.iter().enumerate() {
                    let weight = self.weight(part.weight, part.format, part.rows, m.k)?;
                    let own = part.rows.div_ceil(tiles * TILE);
                    let out = part.out.ok_or("a part without a result")?;
                    if i + 1 < m.parts.len() {
                        body += &format!("if (block_x() < {}) ", blocks + own);
                    }
                    body += &format!(
                        "return matvec_eight(rooms, {weight}, x, block_x() - {blocks}, {count}, {}, {}, (float*)a{out});\n",
                        floats(part.bias),
                        floats(part.residual),
                    );
                    blocks += own;
                }
                self.aliases = residuals(m);
                (warps, blocks)
            }
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                if gate.format != up.format {
                    return Ok(false);
                }
                let to = self.store(out, gate.rows)?;
                let [g, u] = [gate, up].map(|part| self.weight(part.weight, part.format, part.rows, m.k));
                if self.ty(out)?.dtype.is_activations() && !gate.rows.is_multiple_of(32) {
                    return Err(format!("{} rows are no whole blocks", gate.rows));
                }
                let warps = warps(WARPS / 2);
                body += &format!(
                    "__shared__ EightRoom<4> rooms[{warps}];\nmatvec_eight_swiglu(rooms, {}, {}, {}, {}, x, block_x(), {count}, {to});\n",
                    g?,
                    u?,
                    floats(gate.bias),
                    floats(up.bias)
                );
                (warps, gate.rows.div_ceil(2 * TILE))
            }
            // No tile finds the best of all rows.
            Epilogue::ArgMax { .. } => return Ok(false),
        };
        // No tokens, no blocks.
        let grid = vec![Extent { dim: tokens, per: FEW_TOKENS as u32 }, Extent::each(blocks)];
        self.file(&["matvec_eight.h"], warps as u32 * self.target.wave, grid, body);
        if let Some(file) = self.files.last_mut() {
            file.blocks = (WARPS / warps) as u32;
        }
        Ok(true)
    }
}
