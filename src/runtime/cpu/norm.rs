//! RMSNorm of embedding rows, of sums or of plain rows, with any of three results. An item is a row; it goes over
//! the row twice, [`GROUP`] elements at a time.

use super::args::Args;
use super::blocks::{self, GROUP};
use super::check::{self, BindError, Check, WEIGHTS, rows_grid};
use super::isa::Isa;
use super::math::{quantise, rms_factor, sum_of_squares};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, KernelSpec, NormSource, NormSpec};
use crate::ir::{DType, Dim};
use std::ops::Range;

pub(super) struct Norm {
    source: Source,
    n: usize,
    weight: ArgId,
    weight_type: DType,
    eps: f32,
    rows_out: Option<ArgId>,
    norm_out: Option<ArgId>,
    quant_out: Option<ArgId>,
}

enum Source {
    Embedding { table: ArgId, format: DType, rows: usize, ids: ArgId },
    Sum { a: ArgId, b: ArgId },
    Rows { x: ArgId },
}

impl Norm {
    pub fn bind(spec: &KernelSpec, m: &NormSpec) -> Result<Norm, BindError> {
        let mut check = Check::new(spec)?;
        let n = check::size("the elements of a row", m.n)?;
        if !(m.eps.is_finite() && m.eps >= 0.0) {
            return check::parameter(format!("eps must not be {}", m.eps));
        }
        let f32s = &[DType::F32];
        let rows_of = |shape: &[Dim]| shape.last() == Some(&Dim::n(m.n));
        let mut alias = vec![];
        let (source, shape) = match m.source {
            NormSource::Embedding { table, ids } => {
                let ty = check.arg("the table", table, Access::Read)?;
                let (format, rows) = (ty.dtype, ty.shape.first().and_then(|d| d.as_const()).unwrap_or(0));
                let rows = check::size("the rows of the table", rows)?;
                check.exact(
                    "the table",
                    table,
                    Access::Read,
                    WEIGHTS,
                    &[Dim::n(rows as u64), Dim::n(m.n)],
                )?;
                let ty = check.arg("the ids", ids, Access::Read)?;
                let tokens = ty.shape.first().copied().unwrap_or(Dim::ZERO);
                check.exact("the ids", ids, Access::Read, &[DType::I32], &[tokens])?;
                (Source::Embedding { table, format, rows, ids }, vec![tokens, Dim::n(m.n)])
            }
            NormSource::Sum { a, b } => {
                let shape = check.arg("the first summand", a, Access::Read)?.shape.clone();
                check.exact("the first summand", a, Access::Read, f32s, &shape)?;
                check.exact("the second summand", b, Access::Read, f32s, &shape)?;
                alias.extend([a, b]);
                (Source::Sum { a, b }, shape)
            }
            NormSource::Rows { x } => {
                let shape = check.arg("the operand", x, Access::Read)?.shape.clone();
                check.exact("the operand", x, Access::Read, f32s, &shape)?;
                alias.push(x);
                (Source::Rows { x }, shape)
            }
        };
        if !rows_of(&shape) {
            return check::parameter(format!("the operand of a norm must have rows of {n}"));
        }
        let weight_type = check.exact("the weight", m.weight, Access::Read, WEIGHTS, &[Dim::n(m.n)])?;
        for (role, out, dtype) in [
            ("the rows", m.rows_out, DType::F32),
            ("the norm", m.norm_out, DType::F32),
            ("the quantised norm", m.quant_out, DType::Q8Act),
        ] {
            let Some(out) = out else { continue };
            check.exact(role, out, Access::Write, &[dtype], &shape)?;
            alias.iter().for_each(|&read| check.may_alias(out, read));
        }
        check.done(&rows_grid(&shape))?;
        let NormSpec { weight, eps, rows_out, norm_out, quant_out, .. } = *m;
        Ok(Norm { source, n, weight, weight_type, eps, rows_out, norm_out, quant_out })
    }

    /// Elements from `start` on of row `row`.
    #[inline(always)]
    fn load<I: Isa>(&self, args: Args<'_>, row: usize, start: usize, to: &mut [f32]) {
        match self.source {
            Source::Embedding { table, format, rows, ids } => {
                let mut id = [0i32];
                args.load(ids, row, &mut id);
                let first = clamp_id(id[0], rows) * blocks::bytes_of(format, self.n);
                let bytes = blocks::bytes_of(format, to.len());
                let from = args.slice::<u8>(table, first + blocks::bytes_of(format, start), bytes);
                blocks::decode::<I>(format, from, to);
            }
            Source::Sum { a, b } => {
                let mut add = [0.0; GROUP];
                let add = &mut add[..to.len()];
                args.load(a, row * self.n + start, to);
                args.load(b, row * self.n + start, add);
                to.iter_mut().zip(add).for_each(|(x, b)| *x += *b);
            }
            Source::Rows { x } => args.load(x, row * self.n + start, to),
        }
    }
}

/// The row of a table that an id means; ids beside the table mean its first or last row.
#[inline(always)]
pub(super) fn clamp_id(id: i32, rows: usize) -> usize {
    usize::try_from(id).unwrap_or(0).min(rows - 1)
}

impl Kernel for Norm {
    #[inline(always)]
    fn run<I: Isa>(&self, args: Args<'_>, _: &Syms, items: Range<usize>) {
        let mut x = [0.0; GROUP];
        let mut w = [0.0; GROUP];
        let groups = |n: usize| (0..n).step_by(GROUP).map(move |start| (start, GROUP.min(n - start)));
        for row in items {
            let mut squares = 0.0;
            for (start, len) in groups(self.n) {
                let x = &mut x[..len];
                self.load::<I>(args, row, start, x);
                squares += sum_of_squares(x);
                // Where this lies on a summand, the sum is not taken again: see below.
                if let Some(out) = self.rows_out {
                    args.store(out, row * self.n + start, x);
                }
            }
            let factor = rms_factor(squares, self.n, self.eps);
            for (start, len) in groups(self.n) {
                let (x, w) = (&mut x[..len], &mut w[..len]);
                match self.rows_out {
                    Some(rows) => args.load(rows, row * self.n + start, x),
                    None => self.load::<I>(args, row, start, x),
                }
                let bytes = blocks::bytes_of(self.weight_type, len);
                let from = args.slice(self.weight, blocks::bytes_of(self.weight_type, start), bytes);
                blocks::decode::<I>(self.weight_type, from, w);
                x.iter_mut().zip(w).for_each(|(x, w)| *x = *x * factor * *w);
                if let Some(out) = self.norm_out {
                    args.store(out, row * self.n + start, x);
                }
                if let Some(out) = self.quant_out {
                    for (i, x) in x.as_chunks::<32>().0.iter().enumerate() {
                        args.store(out, (row * self.n + start) / 32 + i, &[quantise(x)]);
                    }
                }
            }
        }
    }
}
