//! Matmuls: of up to eight tokens `kernels/matvec.h`, or on matrix units (`units.rs`), of more in tiles (`tiles.rs`).

use super::super::in_place::residuals;
use super::super::spec::{ArgId, Epilogue, Extent, Layout, MatmulPart, MatmulSpec};
use super::{THREADS, Unit, WAIT, floats, format_name, layout_name, size, symbol};
use crate::ir::{DType, Dim, TensorType};
use crate::target::{FEW_ROWS, FEW_TOKENS, STORING};

/// The most blocks among which the best of all rows is sought.
const BEST_OF: u64 = 1024;

impl Unit<'_> {
    pub(super) fn matmul(&mut self, m: &MatmulSpec) -> Result<(), String> {
        size(Dim::n(m.k))?;
        for part in &m.parts {
            size(Dim::n(part.rows))?;
        }
        let tokens = self.dim(m.x, 0)?;
        if tokens.eval(self.bounds) > FEW_TOKENS && self.tiles(m, tokens)? {
            return Ok(());
        }
        if self.on_units(m, tokens)? {
            return Ok(());
        }
        // Activations in two bytes take twice the registers: half of the tokens at once, and of more than two a single row.
        let twice = self.ty(m.x)?.dtype == DType::Q16Act;
        let most = tokens.eval(self.bounds).min(FEW_TOKENS / if twice { 2 } else { 1 }).next_power_of_two();
        let count = symbol(tokens)?;
        let x = self.activations(m.x, m.k)?;
        let wave = self.target.wave;
        let groups =
            |part: &MatmulPart, threads: u32| u64::from(threads / lanes_of_row(m.k, part.format, wave));
        let target = self.target;
        let at_once = |format: DType| if twice && most > 2 { 1 } else { target.shape(format).rows };
        let mut body = self.waits_unless_given(m.parts.iter().map(|part| part.weight)).to_string();
        body += &format!("const auto x = {x};\n");
        let token_tiles = Extent { dim: tokens, per: most as u32 };
        match m.epilogue {
            Epilogue::Store => {
                let mut blocks = 0;
                for (i, part) in m.parts.iter().enumerate() {
                    let weight = self.weight(part.weight, part.format, part.rows, m.k)?;
                    let warps = self.warps_of_row(m, part.format, most);
                    let own = part.rows.div_ceil(groups(part, STORING) / warps * at_once(part.format));
                    let out = part.out.ok_or("a part without a result")?;
                    if i + 1 < m.parts.len() {
                        body += &format!("if (block_x() < {}) ", blocks + own);
                    }
                    body += &format!(
                        "return matvec<{STORING}, {warps}, {}, {most}>({weight}, x, block_x() - {blocks}, {count}, {}, {}, (float*)a{out});\n",
                        at_once(part.format),
                        floats(part.bias),
                        floats(part.residual),
                    );
                    blocks += own;
                }
                self.aliases = residuals(m);
                self.file(&["matvec.h"], STORING, vec![token_tiles, Extent::each(blocks)], body);
            }
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                let to = self.store(out, gate.rows)?;
                let [g, u] = [gate, up].map(|part| self.weight(part.weight, part.format, part.rows, m.k));
                if self.ty(out)?.dtype.is_activations() && !gate.rows.is_multiple_of(32) {
                    return Err(format!("{} rows are no whole blocks", gate.rows));
                }
                let shape = self.target.shape(gate.format);
                let at_once = if most == 1 { shape.pairs } else { at_once(gate.format) };
                body += &format!(
                    "matvec_swiglu<{THREADS}, {at_once}, {most}>({}, {}, {}, {}, x, block_x(), {count}, {to});\n",
                    g?,
                    u?,
                    floats(gate.bias),
                    floats(up.bias)
                );
                let blocks = gate.rows.div_ceil(32);
                self.file(&["matvec.h"], THREADS, vec![token_tiles, Extent::each(blocks)], body);
            }
            Epilogue::ArgMax { out } => {
                let [part] = &m.parts[..] else { return Err("one part".into()) };
                let weight = self.weight(part.weight, part.format, part.rows, m.k)?;
                let each = part.rows.div_ceil(groups(part, STORING) * at_once(part.format)).div_ceil(BEST_OF);
                let blocks = part.rows.div_ceil(groups(part, STORING) * at_once(part.format) * each);
                let [values, indices] = [DType::F32, DType::I32]
                    .map(|dtype| self.scratch(TensorType::new(dtype, [tokens, Dim::n(blocks)])));
                body += &format!(
                    "matvec_best<{STORING}, {}, {most}, {blocks}, {each}>({weight}, x, block_x(), {count}, {}, (float*)a{values}, (i32*)a{indices});\n",
                    at_once(part.format),
                    floats(part.bias),
                );
                self.file(&["matvec.h"], STORING, vec![token_tiles, Extent::each(blocks)], body);
                let body = format!(
                    "{WAIT}best_of_row<{THREADS}, {blocks}>((const float*)a{values}, (const i32*)a{indices}, (i32*)a{out}, block_x());\n"
                );
                self.file(&["sample.h"], THREADS, vec![Extent::each(tokens)], body);
            }
        }
        Ok(())
    }

    /// Warps that share a row of a format whose sum is stored: as many as the target has it, if each lane of them has a chunk, of one token
    /// and few rows.
    fn warps_of_row(&self, m: &MatmulSpec, format: DType, tokens: u64) -> u64 {
        let wave = u64::from(self.target.wave);
        let mut warps = self.target.shape(format).warps;
        let rows: u64 = m.parts.iter().map(|part| part.rows).sum();
        let alone = tokens > 1 || rows >= FEW_ROWS;
        while warps > 1 && (alone || warps * wave > m.k / span(format)) {
            warps /= 2;
        }
        warps
    }

    /// An expression for a weight `[rows, k]`.
    pub(super) fn weight(&self, id: ArgId, format: DType, rows: u64, k: u64) -> Result<String, String> {
        let name = format_name(format);
        let layout = self.layout(id);
        match format {
            DType::F32 | DType::F16 | DType::BF16 if layout == Layout::RowMajor => {
                Ok(format!("Numbers<{name}, {rows}, {k}>{{a{id}}}"))
            }
            _ if format.is_quantised() => {
                Ok(format!("Matrix<{name}, {}, {rows}, {k}>{{a{id}}}", layout_name(layout)?))
            }
            _ => Err(format!("a weight cannot be {format}")),
        }
    }
}

/// Columns of a chunk, as `kernels/quant.h` has them.
fn span(format: DType) -> u64 {
    match format {
        DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K => 64,
        _ => 32,
    }
}

/// Lanes that share a row of `k` columns, as `lanes_of_row` of `kernels/matvec.h` has it.
fn lanes_of_row(k: u64, format: DType, wave: u32) -> u32 {
    let mut lanes = wave;
    while lanes > 1 && u64::from(lanes) > k / span(format) {
        lanes /= 2;
    }
    lanes
}
