//! `silu(gate) · up`. An item is up to [`SPAN`] elements of a row.

use super::args::Args;
use super::binding::{self, ACTIVATIONS, BindError, Binding, rows_grid};
use super::isa::Isa;
use super::math::{quantise, silu};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, Extent, Implementation, SwigluSpec};
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
    pub fn bind(kernel: &Implementation, m: &SwigluSpec) -> Result<Swiglu, BindError> {
        let mut check = Binding::new(kernel)?;
        let n = binding::size("the elements of a row", m.n)?;
        let shape = check.ty("the gate", m.gate)?.shape.clone();
        if shape.last() != Some(&Dim::n(m.n)) {
            return binding::parameter(format!("the operands of a swiglu must have rows of {n}"));
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
    type Work = ();

    #[inline(always)]
    fn run<I: Isa>(&self, (): &mut (), args: Args<'_>, _: &Syms, items: Range<usize>) {
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

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Features, bind};
    use super::*;
    use crate::codegen::spec::{Alias, Computation};

    fn swiglu(width: u64, out: DType) -> Implementation {
        let row = |access, dtype| arg(access, dtype, [Dim::T, n(width)]);
        let args =
            vec![row(Access::Read, DType::F32), row(Access::Read, DType::F32), row(Access::Write, out)];
        let grid = vec![Extent::each(Dim::T), Extent { dim: n(width), per: 1024 }];
        kernel(Computation::Swiglu(SwigluSpec { gate: 0, up: 1, out: 2, n: width }), args, grid)
    }

    #[test]
    fn any_width_and_both_results() {
        for (t, width, out, tolerance) in [
            (1, 768, DType::F32, 1e-6),
            (7, 1500, DType::F32, 1e-6),
            (2, 2080, DType::Q8Act, 5e-3),
            (3, 1024, DType::F32, 1e-6),
            (2, 3072, DType::Q8Act, 5e-3),
            (33, 1, DType::F32, 1e-6),
        ] {
            let (mut kernel, at, mut rng) = (swiglu(width, out), syms(t, 0), rng(t));
            let mut fill = || Some(random(&mut rng, DType::F32, (t * width) as usize));
            let inputs = [fill(), fill(), None];
            let get = |i: usize| values(DType::F32, inputs[i].as_ref().unwrap());
            let want: Vec<f64> = get(0).iter().zip(get(1)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let have = values(out, &launch_all(&kernel, &at, &inputs, 2));
            assert_close(&have.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, tolerance);
            if out == DType::F32 {
                kernel.may_alias = vec![Alias { write: 2, read: 0 }, Alias { write: 2, read: 1 }];
                for read in [0, 1] {
                    let have = launch(&kernel, &Features::baseline(), &at, &inputs, Some((2, read)));
                    assert_close(&to_f32s(&have[2]), &want, tolerance);
                }
            }
        }
    }

    #[test]
    fn the_rows_may_be_those_that_are_wanted() {
        let mut kernel = swiglu(40, DType::F32);
        kernel.spec.args.iter_mut().for_each(|a| a.ty.shape[0] = Dim::R);
        kernel.launches[0].grid[0] = Extent::each(Dim::R);
        let mut rng = rng(6);
        for r in [0, 1, 3] {
            let mut fill = || Some(random(&mut rng, DType::F32, r * 40));
            let inputs = [fill(), fill(), None];
            let get = |i: usize| values(DType::F32, inputs[i].as_ref().unwrap());
            let want: Vec<f64> = get(0).iter().zip(get(1)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let have = launch_all(&kernel, &syms(4, r as u64), &inputs, 2);
            assert_close(&to_f32s(&have), &want, 1e-6);
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let refuse = |name: &str, change: &dyn Fn(&mut Implementation)| {
            let mut kernel = swiglu(64, DType::Q8Act);
            assert!(bind(&kernel, &Features::baseline()).is_ok());
            change(&mut kernel);
            assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
        };
        refuse("gate", &|s| s.spec.args[0].ty.dtype = DType::F16);
        refuse("up", &|s| s.spec.args[1].ty.shape[1] = n(96));
        refuse("out", &|s| s.spec.args[2].ty.shape[0] = n(1));
        refuse("out read", &|s| s.spec.args[2].access = Access::Read);
        refuse("quantised in place", &|s| s.may_alias.push(Alias { write: 2, read: 0 }));
        refuse("grid", &|s| s.launches[0].grid[1].per = 512);
        refuse("width", &|s| {
            s.spec.computes = Computation::Swiglu(SwigluSpec { gate: 0, up: 1, out: 2, n: 32 })
        });
    }
}
