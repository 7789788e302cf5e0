//! Operations that nothing fused: `kernels/elementwise.h`, `kernels/primitive.h` and others.

use super::super::spec::{Alias, ArgId, Epilogue, Extent, GatedScanSpec, MatmulPart, MatmulSpec, SwigluSpec};
use super::norm::threads_of_row;
use super::{THREADS, Unit, WAIT, floats, size};
use crate::ir::{DType, Op};

impl Unit<'_> {
    pub(super) fn swiglu(&mut self, m: &SwigluSpec) -> Result<(), String> {
        let out = self.store(m.out, m.n)?;
        let columns = Extent { dim: m.n.into(), per: THREADS };
        let grid = vec![Extent::each(self.dim(m.gate, 0)?), columns];
        let body = format!(
            "{WAIT}swiglu<{}>((const float*)a{}, (const float*)a{}, block_y(), block_x() * {THREADS} + thread(), {out});\n",
            m.n, m.gate, m.up
        );
        if self.ty(m.out)?.dtype == DType::F32 {
            self.aliases = [m.gate, m.up].map(|read| Alias { write: m.out, read }).to_vec();
        }
        self.file(&["elementwise.h"], THREADS, grid, body);
        Ok(())
    }

    pub(super) fn primitive(&mut self, op: &Op) -> Result<(), String> {
        match op {
            Op::RmsNorm { eps } => self.rms_norm(*eps),
            Op::Add => self.each("((const float*)a0)[i] + ((const float*)a1)[j]", 2),
            Op::Mul => self.each("((const float*)a0)[i] * ((const float*)a1)[j]", 2),
            Op::Silu => self.each("silu(((const float*)a0)[i])", 1),
            &Op::MatMul { round } => {
                let (rows, k) = (u64::from(self.constant(1, 0)?), u64::from(self.constant(1, 1)?));
                let part = MatmulPart {
                    weight: 1,
                    format: self.ty(1)?.dtype,
                    rows,
                    round,
                    bias: None,
                    residual: None,
                    out: Some(2),
                };
                self.matmul(&MatmulSpec { x: 0, k, parts: vec![part], epilogue: Epilogue::Store })
            }
            Op::GetRows => {
                let ty = self.ty(0)?;
                let width = ty.last().as_const().ok_or("rows of symbolic size")?;
                let bytes = ty.dtype.block_bytes() as u64 * width / ty.dtype.block_len() as u64;
                let height = super::symbol(self.dim(0, 0)?)?;
                let body = if ty.dtype.is_activations() {
                    let [from, to] = [self.activations(0, width)?, self.activations(2, width)?];
                    format!(
                        "{WAIT}get_activations<{THREADS}>({from}, (const i32*)a1, {height}, {to}, block_x());\n"
                    )
                } else {
                    format!(
                        "{WAIT}get_row<{THREADS}, {bytes}>(a0, (const i32*)a1, {height}, a2, block_x());\n"
                    )
                };
                self.file(&["elementwise.h"], THREADS, vec![Extent::each(self.dim(1, 0)?)], body);
                Ok(())
            }
            Op::QuantAct => {
                let width = size(self.ty(0)?.last())?;
                let threads = threads_of_row(u64::from(width)).min(THREADS);
                let (grid, row) = self.rows_grid(0)?;
                let out = self.store(1, u64::from(width))?;
                let body =
                    format!("{WAIT}quantise_row<{threads}, {width}>((const float*)a0, {row}, {out});\n");
                self.file(&["elementwise.h"], threads, grid, body);
                Ok(())
            }
            Op::Dequant => {
                let width = u64::from(size(self.ty(0)?.last())?);
                let (grid, row) = self.rows_grid(1)?;
                let threads = threads_of_row(width).min(THREADS);
                let to = format!("(float*)a1 + (u64)({row}) * {width}");
                let body = if self.ty(0)?.dtype.is_activations() {
                    format!(
                        "{WAIT}dequantise_activations<{threads}>({}, {row}, {to});\n",
                        self.activations(0, width)?
                    )
                } else {
                    format!("{WAIT}dequantise_row<{threads}>({}, {row}, {to});\n", self.table(0, width)?)
                };
                self.file(&["elementwise.h"], threads, grid, body);
                Ok(())
            }
            Op::ArgMax => {
                let width = self.constant(0, 1)?;
                let body = format!(
                    "{WAIT}best_of_row<{THREADS}, {width}>((const float*)a0, nullptr, (i32*)a1, block_x());\n"
                );
                self.file(&["sample.h"], THREADS, vec![Extent::each(self.dim(0, 0)?)], body);
                Ok(())
            }
            Op::MatMulId => {
                let [e, n, k] = [0, 1, 2].map(|axis| self.constant(1, axis));
                let (e, n, k) = (e?, n?, k?);
                let body = format!(
                    "{WAIT}matmul_id<{THREADS}, {e}, {n}, {k}>((const float*)a0, (const float*)a1, (const i32*)a2, block_y(), block_x(), (float*)a3);\n"
                );
                let rows = Extent { dim: u64::from(n).into(), per: THREADS / self.target.wave.max(1) };
                self.file(&["primitive.h"], THREADS, vec![Extent::each(self.dim(0, 0)?), rows], body);
                Ok(())
            }
            Op::Rope(rope) => self.rope(rope),
            Op::KvAppend => {
                let (height, k) = (self.constant(0, 0)?, self.row_of_cache()?);
                let (element, cast) = self.cache(0)?;
                let body = format!(
                    "{WAIT}kv_append<{THREADS}, {k}, {height}, {cast}>((const float*)a1, (const i32*)a2, block_x(), ({element}*)a0);\n"
                );
                self.file(&["primitive.h"], THREADS, vec![Extent::each(self.dim(1, 0)?)], body);
                Ok(())
            }
            Op::KvRead { page } => {
                let (height, k) = (self.constant(0, 0)?, self.row_of_cache()?);
                let (sequences, pages) = (self.constant(1, 0)?, self.constant(1, 1)?);
                let (element, _) = self.cache(0)?;
                let body = format!(
                    "{WAIT}kv_read<{THREADS}, {k}, {height}, {page}, {pages}>((const {element}*)a0, (const i32*)a1, (const i32*)a2, block_y(), block_x(), ({element}*)a3);\n"
                );
                let positions = u64::from(pages) * u64::from(*page);
                let grid = vec![Extent::each(u64::from(sequences)), Extent::each(positions)];
                self.file(&["primitive.h"], THREADS, grid, body);
                Ok(())
            }
            Op::Scores { scale } => {
                let (heads, d) = (self.constant(0, 1)?, self.constant(0, 2)?);
                let (sequences, longest, kv) =
                    (self.constant(1, 0)?, self.constant(1, 1)?, self.constant(1, 2)?);
                let (format, tokens) = (self.numbers(1)?, self.dim(0, 0)?);
                let body = format!(
                    "{WAIT}scores<{format}, {heads}, {kv}, {d}, {sequences}, {longest}>((const float*)a0, a1, (const i32*)a2, {}, block_z(), block_y(), {}, block_x() * {THREADS} + thread(), (float*)a3);\n",
                    super::float(*scale),
                    super::symbol(tokens)?
                );
                let positions = Extent { dim: u64::from(longest).into(), per: THREADS };
                let grid = vec![Extent::each(u64::from(heads)), Extent::each(tokens), positions];
                self.file(&["primitive.h"], THREADS, grid, body);
                Ok(())
            }
            Op::CausalMask { window } => {
                let n = self.constant(0, 2)?;
                let (grid, row) = self.rows_grid(0)?;
                let body = format!(
                    "{WAIT}causal_mask<{THREADS}, {n}>((const float*)a0, load_step((const i32*)a1 + block_x()), {}, {row}, (float*)a2);\n",
                    window.unwrap_or(0)
                );
                self.aliases = vec![Alias { write: 2, read: 0 }];
                self.file(&["primitive.h"], THREADS, grid, body);
                Ok(())
            }
            Op::Softmax => {
                let n = size(self.ty(0)?.last())?;
                let (grid, row) = self.rows_grid(0)?;
                let body = format!("{WAIT}softmax<{THREADS}, {n}>((const float*)a0, {row}, (float*)a1);\n");
                self.file(&["primitive.h"], THREADS, grid, body);
                Ok(())
            }
            Op::WeightedSum => {
                let (heads, longest, d) = (self.constant(0, 0)?, self.constant(0, 2)?, self.constant(1, 3)?);
                let (sequences, kv) = (self.constant(1, 0)?, self.constant(1, 2)?);
                let (format, tokens) = (self.numbers(1)?, self.dim(0, 1)?);
                let threads = threads_of_row(8 * u64::from(d)).min(THREADS);
                let body = format!(
                    "{WAIT}weighted_sum<{threads}, {format}, {heads}, {kv}, {d}, {sequences}, {longest}>((const float*)a0, a1, (const i32*)a2, block_x(), block_y(), {}, (float*)a3);\n",
                    super::symbol(tokens)?
                );
                let grid = vec![Extent::each(tokens), Extent::each(u64::from(heads))];
                self.file(&["primitive.h"], threads, grid, body);
                Ok(())
            }
            Op::GatedScan => Err("a recurrence is read as such".into()),
            Op::Const { value } => {
                let n = size(self.ty(0)?.last())?;
                if self.ty(0)?.shape.len() > 1 {
                    return Err("a constant of several axes".into());
                }
                let body = format!(
                    "{WAIT}const i32 i = block_x() * {THREADS} + thread();\nif (i < {n}) ((float*)a0)[i] = {};\n",
                    super::float(*value)
                );
                let grid = vec![Extent { dim: u64::from(n).into(), per: THREADS }];
                self.file(&["device.h"], THREADS, grid, body);
                Ok(())
            }
            Op::Input { .. }
            | Op::Weight { .. }
            | Op::State { .. }
            | Op::Reshape
            | Op::Fused(_)
            | Op::Return => Err("it is no work of its own".into()),
        }
    }

    pub(super) fn gated_scan(&mut self, m: &GatedScanSpec) -> Result<(), String> {
        let (sequences, n) = (self.constant(m.state, 0)?, size(m.n.into())?);
        let body = format!(
            "{WAIT}gated_scan<{sequences}, {n}>((float*)a{}, (const float*)a{}, (const float*)a{}, {}, (const i32*)a{}, (const i32*)a{}, {}, block_x() * {THREADS} + thread(), (float*)a{});\n",
            m.state,
            m.decay,
            m.x,
            floats(m.gate),
            m.sequences,
            m.positions,
            super::symbol(self.dim(m.x, 0)?)?,
            m.out
        );
        self.file(&["primitive.h"], THREADS, vec![Extent { dim: m.n.into(), per: THREADS }], body);
        Ok(())
    }

    /// Elements of a row of the first argument, a cache.
    fn row_of_cache(&self) -> Result<u32, String> {
        let [heads, head_dim] = [self.constant(0, 1)?, self.constant(0, 2)?].map(u64::from);
        size((heads * head_dim).into())
    }

    /// The type of a cache's elements, and how they are stored.
    pub(super) fn cache(&self, id: ArgId) -> Result<(&'static str, &'static str), String> {
        match self.ty(id)?.dtype {
            DType::F32 => Ok(("float", "AsFloat")),
            DType::F16 => Ok(("u16", "AsHalf")),
            other => Err(format!("a cache of {other}")),
        }
    }

    /// How a kernel spells the format of numbers.
    fn numbers(&self, id: ArgId) -> Result<String, String> {
        match self.ty(id)?.dtype {
            dtype @ (DType::F32 | DType::F16 | DType::BF16) => Ok(super::format_name(dtype)),
            other => Err(format!("numbers of {other}")),
        }
    }

    /// An expression for each element `i`; `j` is that of a second operand, which may be one row for all.
    fn each(&mut self, what: &str, operands: u16) -> Result<(), String> {
        let ty = self.ty(0)?;
        let last = size(ty.last())?;
        let per_row = operands == 2 && self.ty(1)?.shape.len() < ty.shape.len();
        let j = if per_row { format!("column % {last}") } else { "i".into() };
        let (grid, row) = self.rows_grid(operands)?;
        let threads = threads_of_row(u64::from(last)).min(THREADS);
        let body = format!(
            "{WAIT}for (i32 column = thread(); column < {last}; column += {threads}) {{\n    const u64 i = (u64)({row}) * {last} + column, j = {j};\n    ((float*)a{operands})[i] = {what};\n}}\n"
        );
        let reads = if per_row { 1 } else { operands };
        self.aliases = (0..reads).map(|read| Alias { write: operands, read }).collect();
        self.file(&["elementwise.h"], threads, grid, body);
        Ok(())
    }
}
