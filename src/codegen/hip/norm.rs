//! Norms: `kernels/rmsnorm.h`.

use super::super::in_place::summands;
use super::super::spec::{ArgId, Extent, Layout, NormSource, NormSpec};
use super::{Unit, float, format_name, layout_name, size};
use crate::ir::{DType, Dim};

impl Unit<'_> {
    pub(super) fn norm(&mut self, m: &NormSpec) -> Result<(), String> {
        let out = m.rows_out.or(m.norm_out).or(m.quant_out).ok_or("a norm without a result")?;
        let (n, threads) = (size(Dim::n(m.n))?, threads_of_row(m.n));
        let mut body = self.waits_unless_given([m.weight]).to_string();
        let mut staged = 0;
        let source = match m.source {
            NormSource::Rows { x } => format!("FromFloats<{n}>{{(const float*)a{x}}}"),
            NormSource::Sum { a, b } => format!("FromSum<{n}>{{(const float*)a{a}, (const float*)a{b}}}"),
            NormSource::Embedding { table, ids } => {
                body += &format!("alignas(16) __shared__ float rows[{n}];\n");
                staged += 1;
                let height = super::symbol(self.dim(table, 0)?)?;
                let table = self.table(table, m.n)?;
                format!(
                    "FromTable<{threads}, {n}, decltype({table})>{{{table}, (const i32*)a{ids}, {height}, rows}}"
                )
            }
        };
        let weight = if self.ty(m.weight)?.dtype == DType::F32 {
            format!("(const float*)a{}", m.weight)
        } else {
            body += &format!("alignas(16) __shared__ float weight[{n}];\n");
            staged += 1;
            body += &format!(
                "dequantise_row<{threads}>({}, 0, weight);\nbarrier();\n",
                self.table(m.weight, m.n)?
            );
            "weight".into()
        };
        if !self.target.stages_rows(staged, m.n) {
            return Err(format!("rows of {n} do not fit the memory that a block shares"));
        }
        let quant = match m.quant_out {
            Some(out) => self.store(out, m.n)?,
            None => "StoreNothing{}".into(),
        };
        let to = |id: Option<ArgId>| id.map_or("(float*)nullptr".into(), |id| format!("(float*)a{id}"));
        let (grid, row) = self.rows_grid(out)?;
        body += &format!(
            "rms_norm<{threads}, {n}>({source}, {weight}, {}, {row}, {}, {}, {quant});\n",
            float(m.eps),
            to(m.rows_out),
            to(m.norm_out),
        );
        self.aliases = summands(m);
        self.file(&["rmsnorm.h"], threads, grid, body);
        Ok(())
    }

    /// A block for each row of an argument, and which it is.
    pub(super) fn rows_grid(&self, id: ArgId) -> Result<(Vec<Extent>, String), String> {
        let shape = &self.ty(id)?.shape;
        match &shape[..] {
            [_] => Ok((vec![Extent::each(1)], "0".into())),
            [rows, _] => Ok((vec![Extent::each(*rows)], "block_x()".into())),
            [tokens, heads, _] => {
                let row = format!("block_y() * {} + block_x()", super::symbol(*heads)?);
                Ok((vec![Extent::each(*tokens), Extent::each(*heads)], row))
            }
            [first, rest @ .., _] => {
                // Each product is a size, so the next fits 64 bits.
                let each = rest
                    .iter()
                    .try_fold(1, |n: u32, dim| size(Dim::n(u64::from(n) * u64::from(size(*dim)?))))?;
                let row = format!("block_y() * {each} + block_x()");
                Ok((vec![Extent::each(*first), Extent::each(u64::from(each))], row))
            }
            [] => Err("rows of a scalar".into()),
        }
    }

    /// An expression for an argument as rows of `width` that can be dequantised.
    pub(super) fn table(&self, id: ArgId, width: u64) -> Result<String, String> {
        let dtype = self.ty(id)?.dtype;
        let (name, layout) = (format_name(dtype), self.layout(id));
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 if layout == Layout::RowMajor => {
                Ok(format!("NumberTable<{name}, {width}>{{a{id}}}"))
            }
            _ if dtype.is_quantised() => {
                let rows = self.rows(id, width)?;
                Ok(format!("Table<{name}, {}, {rows}, {width}>{{a{id}}}", layout_name(layout)?))
            }
            _ => Err(format!("a table of {dtype}")),
        }
    }

    /// RMSNorm as an operation of its own.
    pub(super) fn rms_norm(&mut self, eps: f32) -> Result<(), String> {
        let n = self.dim(1, 0)?.as_const().ok_or("a norm of rows of symbolic size")?;
        let spec = NormSpec {
            source: NormSource::Rows { x: 0 },
            n,
            weight: 1,
            eps,
            rows_out: None,
            norm_out: Some(2),
            quant_out: None,
        };
        self.norm(&spec)
    }
}

/// Threads that share a row, eight columns each: within what a block may have, and whole warps of any width.
pub(super) fn threads_of_row(n: u64) -> u32 {
    n.div_ceil(8).next_multiple_of(64).clamp(64, 1024) as u32
}
