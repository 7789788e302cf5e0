//! Operations that nothing fused: `kernels/elementwise.h` and others.

use super::super::spec::{Alias, Epilogue, Extent, MatmulPart, MatmulSpec, SwigluSpec};
use super::norm::threads_of_row;
use super::{THREADS, Unit, WAIT, size};
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
            Op::MatMul => {
                let (rows, k) = (u64::from(self.constant(1, 0)?), u64::from(self.constant(1, 1)?));
                let part = MatmulPart {
                    weight: 1,
                    format: self.ty(1)?.dtype,
                    rows,
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
                if ty.dtype == DType::Q8Act {
                    return Err("rows of activations in 8 bits".into());
                }
                let height = super::symbol(self.dim(0, 0)?)?;
                let body = format!(
                    "{WAIT}get_row<{THREADS}, {bytes}>(a0, (const i32*)a1, {height}, a2, block_x());\n"
                );
                self.file(&["embed.h"], THREADS, vec![Extent::each(self.dim(1, 0)?)], body);
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
                let body = if self.ty(0)?.dtype == DType::Q8Act {
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
            Op::MatMulId
            | Op::Rope(_)
            | Op::KvAppend
            | Op::KvRead { .. }
            | Op::Scores { .. }
            | Op::CausalMask { .. }
            | Op::Softmax
            | Op::WeightedSum
            | Op::GatedScan => Err("GPUs have no kernel for it yet".into()),
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
