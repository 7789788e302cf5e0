//! RMSNorm of embedding rows, of sums or of plain rows, with any of three results. An item is a row; it goes over
//! the row twice, [`GROUP`] elements at a time.

use super::args::Args;
use super::binding::{self, BindError, Binding, WEIGHTS, rows_grid};
use super::blocks::{self, GROUP};
use super::interleaved::{self, STRIP_ROWS};
use super::isa::Isa;
use super::math::{quantise, rms_factor, sum_of_squares};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, Implementation, Layout, NormSource, NormSpec};
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
    Embedding { table: ArgId, format: DType, layout: Layout, rows: Dim, ids: ArgId },
    Sum { a: ArgId, b: ArgId },
    Rows { x: ArgId },
}

impl Norm {
    pub fn bind(kernel: &Implementation, m: &NormSpec) -> Result<Norm, BindError> {
        let mut check = Binding::new(kernel)?;
        let n = binding::size("the elements of a row", m.n)?;
        if !(m.eps.is_finite() && m.eps >= 0.0) {
            return binding::parameter(format!("eps must not be {}", m.eps));
        }
        let f32s = &[DType::F32];
        let rows_of = |shape: &[Dim]| shape.last() == Some(&Dim::n(m.n));
        let mut alias = vec![];
        let (source, shape) = match m.source {
            NormSource::Embedding { table, ids } => {
                let ty = check.ty("the table", table)?;
                let (format, rows) = (ty.dtype, ty.first());
                binding::table_rows(rows)?;
                check.exact("the table", table, Access::Read, WEIGHTS, &[rows, Dim::n(m.n)])?;
                let tokens = check.ty("the ids", ids)?.shape.first().copied().unwrap_or(Dim::ZERO);
                check.index("the ids", ids, &[tokens], rows, false)?;
                let layout = check.layout(table);
                (Source::Embedding { table, format, layout, rows, ids }, vec![tokens, Dim::n(m.n)])
            }
            NormSource::Sum { a, b } => {
                let shape = check.ty("the first summand", a)?.shape.clone();
                check.exact("the first summand", a, Access::Read, f32s, &shape)?;
                check.exact("the second summand", b, Access::Read, f32s, &shape)?;
                alias.extend([a, b]);
                (Source::Sum { a, b }, shape)
            }
            NormSource::Rows { x } => {
                let shape = check.ty("the operand", x)?.shape.clone();
                check.exact("the operand", x, Access::Read, f32s, &shape)?;
                alias.push(x);
                (Source::Rows { x }, shape)
            }
        };
        if !rows_of(&shape) {
            return binding::parameter(format!("the operand of a norm must have rows of {n}"));
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
    fn load<I: Isa>(&self, args: Args<'_>, syms: &Syms, row: usize, start: usize, to: &mut [f32]) {
        match self.source {
            Source::Embedding { table, format, layout, rows, ids } => {
                let row = args.index(ids, row, rows.eval(syms) as usize);
                match layout {
                    Layout::RowMajor => {
                        let first = row * blocks::bytes_of(format, self.n) + blocks::bytes_of(format, start);
                        let from = args.slice::<u8>(table, first, blocks::bytes_of(format, to.len()));
                        blocks::decode::<I>(format, from, to);
                    }
                    Layout::Interleaved16 => {
                        let Ok(to) = to.try_into() else { return };
                        let tile = row / STRIP_ROWS * (self.n / GROUP) + start / GROUP;
                        let bytes = STRIP_ROWS * blocks::bytes_of(format, GROUP);
                        let tile = args.slice::<u8>(table, tile * bytes, bytes);
                        interleaved::decode_row::<I>(format, tile, row % STRIP_ROWS, to);
                    }
                    Layout::Planes => {}
                }
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

impl Kernel for Norm {
    type Work = ();

    #[inline(always)]
    fn run<I: Isa>(&self, (): &mut (), args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let mut x = [0.0; GROUP];
        let mut w = [0.0; GROUP];
        let groups = |n: usize| (0..n).step_by(GROUP).map(move |start| (start, GROUP.min(n - start)));
        for row in items {
            let mut squares = 0.0;
            for (start, len) in groups(self.n) {
                let x = &mut x[..len];
                self.load::<I>(args, syms, row, start, x);
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
                    None => self.load::<I>(args, syms, row, start, x),
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

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Features, bind};
    use super::*;
    use crate::codegen::spec::{Alias, Arg, Computation, Extent};

    const T: Dim = Dim::T;
    const EPS: f32 = 1e-5;

    fn norm(source: NormSource, mut args: Vec<Arg>, width: u64, quantised: bool) -> Implementation {
        let first = args.len() as ArgId;
        args.push(arg(Access::Read, DType::F32, [width]));
        args.push(arg(Access::Write, DType::F32, [T, n(width)]));
        args.push(arg(Access::Write, DType::F32, [T, n(width)]));
        if quantised {
            args.push(arg(Access::Write, DType::Q8Act, [T, n(width)]));
        }
        let m = NormSpec {
            source,
            n: width,
            weight: first,
            eps: EPS,
            rows_out: Some(first + 1),
            norm_out: Some(first + 2),
            quant_out: quantised.then_some(first + 3),
        };
        kernel(Computation::Norm(m), args, vec![Extent::each(T)])
    }

    fn sums(width: u64) -> Implementation {
        let row = || arg(Access::Read, DType::F32, [T, n(width)]);
        norm(NormSource::Sum { a: 0, b: 1 }, vec![row(), row()], width, width.is_multiple_of(32))
    }

    fn embedding(format: DType, rows: u64, width: u64) -> Implementation {
        let args = vec![arg(Access::Read, format, [rows, width]), index([T], rows)];
        norm(NormSource::Embedding { table: 0, ids: 1 }, args, width, false)
    }

    fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
        x.chunks(w.len())
            .flat_map(|x| {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
                x.iter().zip(w).map(move |(x, w)| x * factor * w)
            })
            .collect()
    }

    #[test]
    fn sums_and_their_norms() {
        for (t, width) in [(1, 288), (2, 32), (7, 100), (33, 1), (3, 257), (2, 4128), (1, 8192)] {
            let (kernel, at, mut rng) = (sums(width), syms(t, 0), rng(t));
            let mut fill = |k| Some(random(&mut rng, DType::F32, k as usize));
            let mut inputs = vec![fill(t * width), fill(t * width), fill(width), None, None];
            inputs.resize(kernel.spec.args.len(), None);
            let get = |i: usize| values(DType::F32, inputs[i].as_ref().unwrap());
            let sum: Vec<f64> = get(0).iter().zip(get(1)).map(|(a, b)| a + b).collect();
            let want = reference(&sum, &get(2));
            assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 3)), &sum, 1e-7);
            let normed = launch_all(&kernel, &at, &inputs, 4);
            assert_close(&to_f32s(&normed), &want, 1e-6);
            if width % 32 == 0 {
                let mut quantised = vec![0; (t * width / 32 * 40) as usize];
                crate::gguf::dequant::quantise_q8_act(&to_f32s(&normed), &mut quantised).unwrap();
                let baseline = launch(&kernel, &Features::baseline(), &at, &inputs, None);
                assert_eq!(baseline[5], quantised, "as the reference quantises it");
            }
        }
    }

    #[test]
    fn results_may_lie_on_summands() {
        let mut kernel = sums(300);
        let pairs = [(3, 0), (3, 1), (4, 0), (4, 1)];
        kernel.may_alias = pairs.map(|(write, read)| Alias { write, read }).to_vec();
        let (at, mut rng) = (syms(5, 0), rng(2));
        let mut fill = |k| Some(random(&mut rng, DType::F32, k));
        let inputs = [fill(1500), fill(1500), fill(300), None, None];
        let want = launch(&kernel, &Features::baseline(), &at, &inputs, None);
        for (write, read) in pairs {
            let have = launch(&kernel, &Features::baseline(), &at, &inputs, Some((write, read)));
            assert_eq!((&have[3], &have[4]), (&want[3], &want[4]), "{write} on {read}");
        }
    }

    #[test]
    fn embeddings_of_every_format_and_ids_beside_the_table() {
        let layouts = WEIGHTS.iter().flat_map(|format| [(*format, false), (*format, true)]);
        for (format, interleaved) in layouts {
            let (kernel, at, mut rng) = (embedding(format, 32, 512), syms(5, 0), rng(3));
            let table = random(&mut rng, format, 32 * 512);
            let w = random(&mut rng, DType::F32, 512);
            let ids = i32_bytes(&[3, 0, 17, 9999, -5]);
            let rows = values(format, &table);
            let kernel = match format {
                DType::Q4_K | DType::Q6_K if interleaved => with_interleaved_weights(kernel, &[0]),
                _ => kernel,
            };
            let x: Vec<f64> =
                [3, 0, 17, 31, 0].iter().flat_map(|i| rows[i * 512..(i + 1) * 512].to_vec()).collect();
            let want = reference(&x, &values(DType::F32, &w));
            let inputs = [Some(table), Some(ids), Some(w), None, None];
            assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 3)), &x, 1e-7);
            assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 4)), &want, 1e-6);
        }
    }

    #[test]
    fn the_rows_may_be_those_that_are_wanted() {
        let mut kernel = sums(100);
        kernel
            .spec
            .args
            .iter_mut()
            .for_each(|a| a.ty.shape.iter_mut().for_each(|d| d.r = std::mem::take(&mut d.t)));
        kernel.launches[0].grid = vec![Extent::each(Dim::R)];
        let mut rng = rng(4);
        for r in [0, 1, 3] {
            let mut fill = |k| Some(random(&mut rng, DType::F32, k));
            let inputs = [fill(r * 100), fill(r * 100), fill(100), None, None];
            let get = |i: usize| values(DType::F32, inputs[i].as_ref().unwrap());
            let sum: Vec<f64> = get(0).iter().zip(get(1)).map(|(a, b)| a + b).collect();
            let have = launch_all(&kernel, &syms(5, r as u64), &inputs, 4);
            assert_close(&to_f32s(&have), &reference(&sum, &get(2)), 1e-6);
        }
    }

    #[test]
    fn a_table_may_be_of_tokens() {
        let mut kernel = embedding(DType::F32, 9, 100);
        kernel.spec.args.iter_mut().skip(3).for_each(|a| a.ty.shape[0] = Dim::R);
        kernel.spec.args[0].ty.shape[0] = T;
        kernel.spec.args[1] = index([Dim::R], T);
        kernel.launches[0].grid = vec![Extent::each(Dim::R)];
        for (t, ids) in [(1u64, &[][..]), (1, &[0]), (5, &[4, 1]), (3, &[0, 2, 2, -1, 3, i32::MAX])] {
            let mut rng = rng(5);
            let mut fill = |k| Some(random(&mut rng, DType::F32, k));
            let inputs = [fill(t as usize * 100), Some(i32_bytes(ids)), fill(100), None, None];
            let get = |i: usize| values(DType::F32, inputs[i].as_ref().unwrap());
            let x = get(0);
            let row = |id: &i32| x[(*id).clamp(0, t as i32 - 1) as usize * 100..][..100].to_vec();
            let want = reference(&ids.iter().flat_map(row).collect::<Vec<_>>(), &get(2));
            let have = launch_all(&kernel, &syms(t, ids.len() as u64), &inputs, 4);
            assert_close(&to_f32s(&have), &want, 1e-6);
        }
    }

    #[test]
    fn heads_are_rows_and_weights_may_be_quantised() {
        let rows = |access| arg(access, DType::F32, [T, n(3), n(64)]);
        let args = vec![rows(Access::Read), arg(Access::Read, DType::Q8_0, [64]), rows(Access::Write)];
        let m = NormSpec {
            source: NormSource::Rows { x: 0 },
            n: 64,
            weight: 1,
            eps: EPS,
            rows_out: None,
            norm_out: Some(2),
            quant_out: None,
        };
        let mut kernel = kernel(Computation::Norm(m), args, vec![Extent::each(T), Extent::each(3)]);
        kernel.may_alias.push(Alias { write: 2, read: 0 });
        let (at, mut rng) = (syms(4, 0), rng(8));
        let inputs = [Some(random(&mut rng, DType::F32, 768)), Some(random(&mut rng, DType::Q8_0, 64)), None];
        let want = reference(
            &values(DType::F32, inputs[0].as_ref().unwrap()),
            &values(DType::Q8_0, inputs[1].as_ref().unwrap()),
        );
        assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 2)), &want, 1e-6);
        let below = launch(&kernel, &Features::baseline(), &at, &inputs, Some((2, 0)));
        assert_close(&to_f32s(&below[2]), &want, 1e-6);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let refuse =
            |name: &str, mut kernel: Implementation, change: &dyn Fn(&mut Implementation, &mut NormSpec)| {
                assert!(bind(&kernel, &Features::baseline()).is_ok(), "{name}");
                let Computation::Norm(mut m) = kernel.spec.computes.clone() else { unreachable!() };
                change(&mut kernel, &mut m);
                kernel.spec.computes = Computation::Norm(m);
                assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
            };
        refuse("width", sums(64), &|_, m| m.n = 32);
        refuse("summands that differ", sums(64), &|s, _| s.spec.args[1].ty.shape[0] = n(1));
        refuse("weight", sums(64), &|s, _| s.spec.args[2].ty.shape = vec![n(32)]);
        refuse("activations as weight", sums(64), &|s, _| s.spec.args[2].ty.dtype = DType::Q8Act);
        refuse("rows", sums(64), &|s, _| s.spec.args[3].ty.shape[0] = n(1));
        refuse("norm", sums(64), &|s, _| s.spec.args[4].ty.dtype = DType::F16);
        refuse("quantised", sums(64), &|s, _| s.spec.args[5].ty.dtype = DType::F32);
        refuse("one result under two names", sums(64), &|s, m| {
            m.norm_out = m.rows_out;
            s.spec.args.remove(4);
            m.quant_out = Some(4);
        });
        refuse("eps", sums(64), &|_, m| m.eps = f32::NAN);
        refuse("grid", sums(64), &|s, _| s.launches[0].grid = vec![Extent::each(Dim::R)]);
        refuse("quantised on a summand", sums(64), &|s, _| s.may_alias.push(Alias { write: 5, read: 0 }));
        refuse("a result on the weight", sums(64), &|s, _| s.may_alias.push(Alias { write: 3, read: 2 }));
        let table = || embedding(DType::Q4_K, 9, 256);
        refuse("ids", table(), &|s, _| s.spec.args[1].ty.dtype = DType::F32);
        for wrong in wrong_indices(table().spec.args[1].index.unwrap()) {
            refuse("what ids are held to", table(), &|s, _| s.spec.args[1].index = wrong);
        }
        refuse("summands that are followed", sums(64), &|s, _| {
            s.spec.args[0].index = table().spec.args[1].index
        });
        refuse("no rows", table(), &|s, _| s.spec.args[0].ty.shape[0] = n(0));
        refuse("rows of tokens", table(), &|s, _| s.spec.args[0].ty.shape[0] = T);
        refuse("a table that may be empty", table(), &|s, _| {
            s.spec.args[0].ty.shape[0] = Dim::R;
            s.spec.args[1] = index([T], Dim::R);
        });
        refuse("columns", table(), &|s, _| s.spec.args[0].ty.shape[1] = n(512));
        refuse("a table of integers", table(), &|s, _| s.spec.args[0].ty.dtype = DType::I32);
        refuse("a result on the table", table(), &|s, _| s.may_alias.push(Alias { write: 3, read: 0 }));
    }
}
