//! `silu(gate) · up`. An item is up to [`SPAN`] elements of a row.

use super::args::Args;
use super::check::{self, ACTIVATIONS, BindError, Check, rows_grid};
use super::isa::Isa;
use super::math::{quantise, silu};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, Extent, KernelSpec, SwigluSpec};
use crate::ir::{DType, Dim};
use std::ops::Range;

/// Elements of a work item.
const SPAN: usize = 1024;

pub(super) struct Swiglu {
    gate: ArgId,
    up: ArgId,
    out: ArgId,
    quantised: bool,
    n: usize,
}

impl Swiglu {
    pub fn bind(spec: &KernelSpec, m: &SwigluSpec) -> Result<Swiglu, BindError> {
        let mut check = Check::new(spec)?;
        let n = check::size("the elements of a row", m.n)?;
        let shape = check.arg("the gate", m.gate, Access::Read)?.shape.clone();
        if shape.last() != Some(&Dim::n(m.n)) {
            return check::parameter(format!("the operands of a swiglu must have rows of {n}"));
        }
        check.exact("the gate", m.gate, Access::Read, &[DType::F32], &shape)?;
        check.exact("up", m.up, Access::Read, &[DType::F32], &shape)?;
        let out = check.exact("the result", m.out, Access::Write, ACTIVATIONS, &shape)?;
        check.may_alias(m.out, m.gate);
        check.may_alias(m.out, m.up);
        let mut grid = rows_grid(&shape);
        grid.push(Extent { dim: Dim::n(m.n), per: SPAN as u32 });
        check.done(&grid)?;
        Ok(Swiglu { gate: m.gate, up: m.up, out: m.out, quantised: out == DType::Q8Act, n })
    }
}

impl Kernel for Swiglu {
    #[inline(always)]
    fn run<I: Isa>(&self, args: Args<'_>, _: &Syms, items: Range<usize>) {
        let spans = self.n.div_ceil(SPAN);
        for item in items {
            let (row, from) = (item / spans, item % spans * SPAN);
            for start in (from..self.n.min(from + SPAN)).step_by(32) {
                let len = 32.min(self.n - start);
                let (mut gate, mut up) = ([0.0; 32], [0.0; 32]);
                args.load(self.gate, row * self.n + start, &mut gate[..len]);
                args.load(self.up, row * self.n + start, &mut up[..len]);
                for (g, u) in gate.iter_mut().zip(up) {
                    *g = silu::<I>(*g) * u;
                }
                if self.quantised {
                    args.store(self.out, (row * self.n + start) / 32, &[quantise(&gate)]);
                } else {
                    args.store(self.out, row * self.n + start, &gate[..len]);
                }
            }
        }
    }
}
