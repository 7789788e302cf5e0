//! A gated linear recurrence over the tokens of each sequence. An item is up to [`SPAN`] columns, for all tokens in order.

use super::args::Args;
use super::binding::{self, BindError, Binding};
use super::blocks::GROUP;
use super::isa::Isa;
use super::math::silu;
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, Extent, GatedScanSpec, Implementation};
use crate::ir::{DType, Dim};
use std::ops::Range;

/// Columns of a work item.
const SPAN: usize = GROUP;

pub(super) struct GatedScan {
    state: ArgId,
    decay: ArgId,
    x: ArgId,
    gate: Option<ArgId>,
    sequences: ArgId,
    positions: ArgId,
    out: ArgId,
    tokens: Dim,
    /// Rows of the state.
    rows: usize,
    n: usize,
}

impl GatedScan {
    pub fn bind(kernel: &Implementation, m: &GatedScanSpec) -> Result<GatedScan, BindError> {
        let mut check = Binding::new(kernel)?;
        let n = binding::size("the columns of a state", m.n)?;
        let f32s = &[DType::F32];
        let rows = check.ty("the state", m.state)?.shape.first().and_then(|d| d.as_const()).unwrap_or(0);
        check.exact("the state", m.state, Access::Update, f32s, &[Dim::n(rows), Dim::n(m.n)])?;
        let (_, tokens) = check.tokens("the operand", m.x, Access::Read, f32s, None, n)?;
        check.tokens("the decay", m.decay, Access::Read, f32s, Some(tokens), n)?;
        check.tokens("the result", m.out, Access::Write, f32s, Some(tokens), n)?;
        if let Some(gate) = m.gate {
            check.tokens("the gate", gate, Access::Read, f32s, Some(tokens), n)?;
            check.may_alias(m.out, gate);
        }
        check.may_alias(m.out, m.decay);
        check.may_alias(m.out, m.x);
        check.index("the sequences", m.sequences, &[tokens], Dim::n(rows), false)?;
        check.per_token("the positions", m.positions, tokens)?;
        check.done(&[Extent { dim: Dim::n(m.n), per: SPAN as u32 }])?;
        let rows = binding::size("the rows of a state", rows)?;
        let GatedScanSpec { state, decay, x, gate, sequences, positions, out, .. } = *m;
        Ok(GatedScan { state, decay, x, gate, sequences, positions, out, tokens, rows, n })
    }
}

impl Kernel for GatedScan {
    type Work = ();

    #[inline(always)]
    fn run<I: Isa>(&self, (): &mut (), args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let (mut h, mut decay, mut x, mut gate) = ([0.0; SPAN], [0.0; SPAN], [0.0; SPAN], [0.0; SPAN]);
        for item in items {
            let start = item * SPAN;
            let len = SPAN.min(self.n - start);
            let (h, decay, x, gate) = (&mut h[..len], &mut decay[..len], &mut x[..len], &mut gate[..len]);
            // The row of the state that `h` is, and that it goes back to when its sequence ends.
            let mut held = None;
            for t in 0..self.tokens.eval(syms) as usize {
                let row = args.index(self.sequences, t, self.rows);
                if held != Some(row) {
                    if let Some(held) = held.replace(row) {
                        args.store(self.state, held * self.n + start, h);
                    }
                    args.load(self.state, row * self.n + start, h);
                }
                if args.integer(self.positions, t) == 0 {
                    h.fill(0.0);
                }
                args.load(self.decay, t * self.n + start, decay);
                args.load(self.x, t * self.n + start, x);
                if let Some(id) = self.gate {
                    args.load(id, t * self.n + start, gate);
                    x.iter_mut().zip(gate.iter()).for_each(|(x, gate)| *x *= silu::<I>(*gate));
                }
                for ((h, decay), x) in h.iter_mut().zip(decay.iter()).zip(x.iter()) {
                    *h = I::mul_add(*decay, *h, *x);
                }
                args.store(self.out, t * self.n + start, h);
            }
            if let Some(held) = held {
                args.store(self.state, held * self.n + start, h);
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

    /// Rows of the state.
    const ROWS: u64 = 4;

    /// Arguments: state, decay, operand, sequences, positions, result, gate.
    fn scan(width: u64, gated: bool) -> Implementation {
        let rows = |access| arg(access, DType::F32, [Dim::T, n(width)]);
        let mut args = vec![
            arg(Access::Update, DType::F32, [ROWS, width]),
            rows(Access::Read),
            rows(Access::Read),
            index([Dim::T], ROWS),
            arg(Access::Read, DType::I32, [Dim::T]),
            rows(Access::Write),
        ];
        if gated {
            args.push(rows(Access::Read));
        }
        let gate = gated.then_some(6);
        let m =
            GatedScanSpec { state: 0, decay: 1, x: 2, gate, sequences: 3, positions: 4, out: 5, n: width };
        kernel(Computation::GatedScan(m), args, vec![Extent { dim: n(width), per: 256 }])
    }

    /// Random arguments, decays in 0..1.
    fn inputs(kernel: &Implementation, sequences: &[i32], positions: &[i32]) -> Vec<Option<Vec<u8>>> {
        let (mut rng, at) = (rng(7), syms(sequences.len() as u64, 0));
        let mut inputs: Vec<_> = kernel
            .spec
            .args
            .iter()
            .map(|a| Some(random(&mut rng, a.ty.dtype, a.ty.elements(&at) as usize)))
            .collect();
        let decay = to_f32s(inputs[1].as_ref().unwrap());
        inputs[1] = Some(f32_bytes(&decay.iter().map(|x| x.abs() / 2.0).collect::<Vec<_>>()));
        (inputs[3], inputs[4]) = (Some(i32_bytes(sequences)), Some(i32_bytes(positions)));
        inputs[5] = None;
        inputs
    }

    /// The result and the state, in double precision.
    fn reference(kernel: &Implementation, inputs: &[Option<Vec<u8>>]) -> (Vec<f64>, Vec<f64>) {
        let Computation::GatedScan(m) = &kernel.spec.computes else { unreachable!() };
        let get = |i: ArgId| values(DType::F32, inputs[usize::from(i)].as_ref().unwrap());
        let indices = |i: usize| to_i32s(inputs[i].as_ref().unwrap());
        let (mut state, decay, mut x, n) = (get(0), get(1), get(2), m.n as usize);
        if let Some(gate) = m.gate {
            x.iter_mut().zip(get(gate)).for_each(|(x, g)| *x *= g / (1.0 + (-g).exp()));
        }
        let mut out = vec![];
        for (t, (b, position)) in indices(3).into_iter().zip(indices(4)).enumerate() {
            let h = &mut state[b.clamp(0, ROWS as i32 - 1) as usize * n..][..n];
            for (c, h) in h.iter_mut().enumerate() {
                let before = if position == 0 { 0.0 } else { *h };
                *h = decay[t * n + c] * before + x[t * n + c];
            }
            out.extend_from_slice(h);
        }
        (out, state)
    }

    #[test]
    fn sequences_go_on_from_their_states_or_begin() {
        // One that goes on, one that begins, some in turns, values beside the state, and one that begins twice.
        let steps: [(&[i32], &[i32]); 6] = [
            (&[2], &[7]),
            (&[1], &[0]),
            (&[0, 0, 0, 2, 2, 2, 2, 1], &[0, 1, 2, 5, 6, 7, 8, 0]),
            (&[3, 1, 3, 1, 0, 3], &[4, 0, 5, 1, 9, 6]),
            (&[-1, 4, i32::MIN, i32::MAX, 1], &[3, 3, 4, -4, i32::MIN]),
            (&[2, 2, 2, 2], &[0, 1, 0, 1]),
        ];
        for (width, gated) in [(256, true), (256, false), (1, true), (300, true), (700, false), (13, true)] {
            let mut kernel = scan(width, gated);
            for (sequences, positions) in steps {
                kernel.may_alias.clear();
                let (at, inputs) = (syms(sequences.len() as u64, 0), inputs(&kernel, sequences, positions));
                let (want, state) = reference(&kernel, &inputs);
                assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 5)), &want, 1e-6);
                assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 0)), &state, 1e-6);
                for read in [1, 2].into_iter().chain(gated.then_some(6)) {
                    kernel.may_alias = vec![Alias { write: 5, read }];
                    let have = launch(&kernel, &Features::detect(), &at, &inputs, Some((5, read)));
                    assert_close(&to_f32s(&have[5]), &want, 1e-6);
                    assert_close(&to_f32s(&have[0]), &state, 1e-6);
                }
            }
        }
    }

    /// The same bits, as every token is rounded where its step might end.
    #[test]
    fn steps_of_any_size_do_the_same() {
        let (kernel, sequences) = (scan(300, true), [1, 1, 3, 3, 1, 0, 0]);
        let positions = [0, 1, 8, 9, 2, 0, 1];
        let whole = inputs(&kernel, &sequences, &positions);
        for features in Features::available() {
            let want = launch(&kernel, &features, &syms(7, 0), &whole, None);
            for size in [1, 2, 3] {
                let (mut state, mut have) = (whole[0].clone(), vec![]);
                for from in (0..7).step_by(size) {
                    let tokens = from..7.min(from + size);
                    let part = |i: usize, bytes: usize| {
                        let whole = whole[i].as_ref().unwrap();
                        Some(whole[tokens.start * bytes..tokens.end * bytes].to_vec())
                    };
                    let row = 300 * 4;
                    let inputs =
                        [state, part(1, row), part(2, row), part(3, 4), part(4, 4), None, part(6, row)];
                    let mut out = launch(&kernel, &features, &syms(tokens.len() as u64, 0), &inputs, None);
                    have.extend(out.swap_remove(5));
                    state = Some(out.swap_remove(0));
                }
                assert!(have == want[5] && state.as_ref() == Some(&want[0]), "steps of {size}");
            }
        }
    }

    #[test]
    fn what_a_sequence_left_does_not_reach_the_next() {
        let kernel = scan(20, false);
        let mut inputs = inputs(&kernel, &[1, 2], &[0, 3]);
        let mut state = to_f32s(inputs[0].as_ref().unwrap());
        state[20..40].fill(f32::NAN);
        inputs[0] = Some(f32_bytes(&state));
        for features in Features::available() {
            let have = launch(&kernel, &features, &syms(2, 0), &inputs, None);
            assert!([&have[0], &have[5]].into_iter().flat_map(|b| to_f32s(b)).all(f32::is_finite));
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let refuse = |name: &str, change: &dyn Fn(&mut Implementation, &mut GatedScanSpec)| {
            let mut kernel = scan(64, true);
            assert!(bind(&kernel, &Features::baseline()).is_ok());
            let Computation::GatedScan(mut m) = kernel.spec.computes.clone() else { unreachable!() };
            change(&mut kernel, &mut m);
            kernel.spec.computes = Computation::GatedScan(m);
            assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
        };
        refuse("columns", &|_, m| m.n = 32);
        refuse("a state without rows", &|s, _| {
            s.spec.args[0].ty.shape[0] = n(0);
            s.spec.args[3] = index([Dim::T], 0);
        });
        refuse("a state of tokens", &|s, _| s.spec.args[0].ty.shape[0] = Dim::T);
        refuse("a state in f16", &|s, _| s.spec.args[0].ty.dtype = DType::F16);
        refuse("a state that is written", &|s, _| s.spec.args[0].access = Access::Write);
        refuse("decay", &|s, _| s.spec.args[1].ty.shape[0] = Dim::R);
        refuse("operand", &|s, _| s.spec.args[2].ty.shape[1] = n(96));
        refuse("sequences", &|s, _| s.spec.args[3].ty.shape[0] = Dim::R);
        for wrong in wrong_indices(scan(64, true).spec.args[3].index.unwrap()) {
            refuse("what sequences are held to", &|s, _| s.spec.args[3].index = wrong);
        }
        refuse("positions", &|s, _| s.spec.args[4].ty.dtype = DType::F32);
        refuse("result", &|s, _| s.spec.args[5].ty.dtype = DType::Q8Act);
        refuse("gate", &|s, _| s.spec.args[6].access = Access::Write);
        refuse("no gate", &|_, m| m.gate = None);
        refuse("a result on the state", &|s, _| s.may_alias.push(Alias { write: 5, read: 0 }));
        refuse("grid", &|s, _| s.launches[0].grid = vec![Extent::each(Dim::T)]);
    }
}
