//! `x · wᵀ` with weights streamed in their own format: a group of at most 256 weights is decoded at a time, once for up to
//! [`TOKENS`] tokens.
//!
//! Quantised weights meet `q8_act` in integer dot products of 32 (16 for Q6_K), scaled in floats; all else is decoded to
//! floats. Each pair of a row and a token is summed in the same order whatever the number of tokens.

use super::args::{Args, F32, Q8Block};
use super::blocks::{self, Format, GROUP, Group, Q4K, Q6K, Q8_0};
use super::check::{self, ACTIVATIONS, BindError, Check, WEIGHTS};
use super::isa::Isa;
use super::math::{LANES, dot_lanes, quantise, silu, sum};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, Epilogue, Extent, KernelSpec, MatmulSpec};
use crate::ir::{DType, Dim};
use bytemuck::Pod;
use std::ops::Range;

/// Tokens for which a group of weights is decoded once.
const TOKENS: usize = 16;
/// Rows whose results are held before they are stored; a block of `q8_act`.
const ROWS: usize = 32;

/// Results of up to [`ROWS`] rows for up to [`TOKENS`] tokens.
type Results = [[f32; ROWS]; TOKENS];

pub(super) struct Matmul {
    x: ArgId,
    x_type: DType,
    tokens: Dim,
    k: usize,
    parts: Vec<Part>,
    epilogue: Epilogue,
    /// Of SwiGLU's result.
    quantised: bool,
    tile: usize,
}

struct Part {
    weight: ArgId,
    format: DType,
    rows: usize,
    bias: Option<ArgId>,
    residual: Option<ArgId>,
    out: Option<ArgId>,
}

impl Matmul {
    pub fn bind(spec: &KernelSpec, m: &MatmulSpec) -> Result<Matmul, BindError> {
        let mut check = Check::new(spec)?;
        let k = check::size("the columns of a weight", m.k)?;
        let tile = check::size("the tile", m.tile.into())?;
        let (x_type, tokens) = check.tokens("the activations", m.x, Access::Read, ACTIVATIONS, None, k)?;
        let f32s = &[DType::F32];
        let mut parts = vec![];
        let mut items = 0u64;
        for p in &m.parts {
            let rows = check::size("the rows of a weight", p.rows)?;
            items += rows.div_ceil(tile) as u64;
            if !WEIGHTS.contains(&p.format) {
                return check::parameter(format!("a weight cannot be {}", p.format));
            }
            let shape = [Dim::n(p.rows), Dim::n(m.k)];
            check.exact("a weight", p.weight, Access::Read, &[p.format], &shape)?;
            if let Some(bias) = p.bias {
                check.exact("a bias", bias, Access::Read, f32s, &[Dim::n(p.rows)])?;
            }
            if let Some(residual) = p.residual {
                check.tokens("a residual", residual, Access::Read, f32s, Some(tokens), rows)?;
            }
            match (p.out, &m.epilogue) {
                (Some(out), Epilogue::Store) => {
                    check.tokens("a result", out, Access::Write, f32s, Some(tokens), rows)?;
                    if let Some(residual) = p.residual {
                        check.may_alias(out, residual);
                    }
                }
                (None, Epilogue::Store) => return check::parameter("a part lacks its result"),
                (Some(_), _) => return check::parameter("a part has a result that the epilogue consumes"),
                (None, _) => {}
            }
            let (weight, format, bias, residual, out) = (p.weight, p.format, p.bias, p.residual, p.out);
            parts.push(Part { weight, format, rows, bias, residual, out });
        }
        let mut quantised = false;
        match (&m.epilogue, &parts[..]) {
            (Epilogue::Store, [_, ..]) => {}
            (Epilogue::Swiglu { out }, [gate, up]) if gate.rows == up.rows => {
                if tile % ROWS != 0 {
                    return check::parameter(format!(
                        "the tile of a swiglu must be a multiple of {ROWS}, not {tile}"
                    ));
                }
                items = gate.rows.div_ceil(tile) as u64;
                let (dtype, _) =
                    check.tokens("the result", *out, Access::Write, ACTIVATIONS, Some(tokens), gate.rows)?;
                quantised = dtype == DType::Q8Act;
            }
            (Epilogue::ArgMax { best, index, out }, [_]) => {
                let each = [tokens, Dim::n(items)];
                check.exact("the best values", *best, Access::Scratch, f32s, &each)?;
                check.exact("their indices", *index, Access::Scratch, &[DType::I32], &each)?;
                check.exact("the result", *out, Access::Write, &[DType::I32], &[tokens])?;
            }
            _ => {
                return check::parameter(format!(
                    "{} parts do not fit the epilogue {:?}",
                    parts.len(),
                    m.epilogue
                ));
            }
        }
        check.done(&[Extent::each(items)])?;
        Ok(Matmul { x: m.x, x_type, tokens, k, parts, epilogue: m.epilogue.clone(), quantised, tile })
    }

    /// The part, the rows and the place in its part of an item.
    #[inline(always)]
    fn locate(&self, mut item: usize) -> Option<(&Part, Range<usize>)> {
        for part in &self.parts {
            let items = part.rows.div_ceil(self.tile);
            if item < items {
                return Some((part, item * self.tile..((item + 1) * self.tile).min(part.rows)));
            }
            item -= items;
        }
        None
    }

    /// Bias and residual added, results of `rows` for tokens from `t0` on.
    #[inline(always)]
    fn compute<I: Isa>(
        &self,
        args: Args<'_>,
        part: &Part,
        rows: Range<usize>,
        tokens: Range<usize>,
        out: &mut Results,
    ) {
        macro_rules! with {
            ($engine:ty) => {
                self.product::<I, $engine>(args, part, rows.clone(), tokens.clone(), out)
            };
        }
        match (self.x_type, part.format) {
            (DType::Q8Act, DType::Q8_0) => with!(Integers<Q8_0>),
            (DType::Q8Act, DType::Q4_K) => with!(Integers<Q4K>),
            (DType::Q8Act, DType::Q6_K) => with!(Integers<Q6K>),
            (DType::Q8Act, _) => with!(Floats<Q8Block>),
            (_, _) => with!(Floats<F32>),
        }
        if let Some(bias) = part.bias {
            let mut add = [0.0; ROWS];
            args.load(bias, rows.start, &mut add[..rows.len()]);
            for row in out.iter_mut().take(tokens.len()) {
                row.iter_mut().zip(&add).for_each(|(y, b)| *y += b);
            }
        }
        if let Some(residual) = part.residual {
            let mut add = [0.0; ROWS];
            for (t, row) in tokens.zip(out) {
                args.load(residual, t * part.rows + rows.start, &mut add[..rows.len()]);
                row.iter_mut().zip(&add).for_each(|(y, r)| *y += r);
            }
        }
    }

    #[inline(always)]
    fn product<I: Isa, E: Engine>(
        &self,
        args: Args<'_>,
        part: &Part,
        rows: Range<usize>,
        tokens: Range<usize>,
        out: &mut Results,
    ) {
        let units = self.k / E::UNIT;
        let last = tokens.len() - 1;
        let xs: [&[E::X]; TOKENS] =
            std::array::from_fn(|i| args.slice(self.x, (tokens.start + i.min(last)) * units, units));
        let xs = &xs[..tokens.len()];
        let row_bytes = blocks::bytes_of(part.format, self.k);
        let group_bytes = blocks::bytes_of(part.format, GROUP);
        for (i, row) in rows.enumerate() {
            let row = args.slice::<u8>(part.weight, row * row_bytes, row_bytes);
            let mut acc = [[0.0; LANES]; TOKENS];
            let mut engine = E::new(part.format);
            for (g, bytes) in row.chunks(group_bytes).enumerate() {
                let n = GROUP.min(self.k - g * GROUP);
                engine.decode::<I>(bytes, n);
                let span = g * GROUP / E::UNIT..(g * GROUP + n) / E::UNIT;
                let (fours, rest) = xs.as_chunks::<4>();
                let (acc_fours, acc_rest) = acc.as_chunks_mut::<4>();
                for (x, acc) in fours.iter().zip(acc_fours.iter_mut()) {
                    engine.accumulate::<I, 4>(x.map(|x| &x[span.clone()]), acc);
                }
                let acc_rest = acc_fours.get_mut(fours.len()).map_or(acc_rest, |a| &mut a[..]);
                for (x, acc) in rest.iter().zip(acc_rest) {
                    engine.accumulate::<I, 1>([&x[span.clone()]], std::array::from_mut(acc));
                }
            }
            for (out, acc) in out.iter_mut().zip(acc).take(xs.len()) {
                out[i] = sum(acc);
            }
        }
    }

    #[inline(always)]
    fn swiglu<I: Isa>(
        &self,
        args: Args<'_>,
        out: ArgId,
        rows: Range<usize>,
        tokens: Range<usize>,
        gate: &mut Results,
    ) {
        let mut up = [[0.0; ROWS]; TOKENS];
        let width = self.parts[0].rows;
        self.compute::<I>(args, &self.parts[0], rows.clone(), tokens.clone(), gate);
        self.compute::<I>(args, &self.parts[1], rows.clone(), tokens.clone(), &mut up);
        for ((t, gate), up) in tokens.zip(gate).zip(&up) {
            for (g, u) in gate.iter_mut().zip(up) {
                *g = silu::<I>(*g) * u;
            }
            if self.quantised {
                args.store(out, (t * width + rows.start) / 32, &[quantise(gate)]);
            } else {
                args.store(out, t * width + rows.start, &gate[..rows.len()]);
            }
        }
    }
}

impl Kernel for Matmul {
    #[inline(always)]
    fn run<I: Isa>(&self, args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let n = self.tokens.eval(syms) as usize;
        let mut results = [[0.0; ROWS]; TOKENS];
        for item in items {
            let Some((part, rows)) = self.locate(item) else { return };
            for t in (0..n).step_by(TOKENS) {
                let tokens = t..(t + TOKENS).min(n);
                let mut best = [(0, f32::NEG_INFINITY); TOKENS];
                best.fill((rows.start, f32::NEG_INFINITY));
                for start in rows.clone().step_by(ROWS) {
                    let rows = start..(start + ROWS).min(rows.end);
                    if let Epilogue::Swiglu { out } = self.epilogue {
                        self.swiglu::<I>(args, out, rows, tokens.clone(), &mut results);
                        continue;
                    }
                    self.compute::<I>(args, part, rows.clone(), tokens.clone(), &mut results);
                    for ((t, y), best) in tokens.clone().zip(&results).zip(&mut best) {
                        let y = &y[..rows.len()];
                        match part.out {
                            Some(out) => args.store(out, t * part.rows + start, y),
                            None => *best = larger(*best, (start..).zip(y.iter().copied())),
                        }
                    }
                }
                if let Epilogue::ArgMax { best: values, index, .. } = self.epilogue {
                    let width = part.rows.div_ceil(self.tile);
                    for (t, (row, value)) in tokens.zip(best) {
                        args.store(values, t * width + item, &[value]);
                        args.store(index, t * width + item, &[row as i32]);
                    }
                }
            }
        }
    }

    fn finish(&self, args: Args<'_>, syms: &Syms) {
        let Epilogue::ArgMax { best, index, out } = self.epilogue else { return };
        let width = self.parts[0].rows.div_ceil(self.tile);
        for t in 0..self.tokens.eval(syms) as usize {
            let values = args.slice::<F32>(best, t * width, width).iter().map(|v| v.0);
            let (item, _) = larger((0, f32::NEG_INFINITY), values.enumerate());
            let mut row = [0i32];
            args.load(index, t * width + item, &mut row);
            args.store(out, t, &row);
        }
    }
}

/// The first of the largest values. NaN is larger than nothing.
#[inline(always)]
pub(super) fn larger(best: (usize, f32), values: impl Iterator<Item = (usize, f32)>) -> (usize, f32) {
    values.fold(best, |best, (i, v)| if v > best.1 { (i, v) } else { best })
}

/// How a format of weights meets one of activations.
trait Engine {
    /// What activations are stored in, [`Engine::UNIT`] at a time.
    type X: Pod;
    const UNIT: usize;

    fn new(format: DType) -> Self;

    /// Decodes a group of `n` weights.
    fn decode<I: Isa>(&mut self, bytes: &[u8], n: usize);

    /// Adds the products of the group with its part of each of `N` tokens.
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[Self::X]; N], acc: &mut [[f32; LANES]; N]);
}

/// Integer dot products. Lanes 0..8 hold the products, 8..16 the minima.
struct Integers<F> {
    group: Group,
    blocks: usize,
    format: std::marker::PhantomData<F>,
}

impl<F: Format> Engine for Integers<F> {
    type X = Q8Block;
    const UNIT: usize = 32;

    #[inline(always)]
    fn new(_: DType) -> Self {
        Integers { group: Group::ZERO, blocks: 0, format: std::marker::PhantomData }
    }

    #[inline(always)]
    fn decode<I: Isa>(&mut self, bytes: &[u8], n: usize) {
        F::decode::<I>(bytes, &mut self.group);
        self.blocks = if F::BLOCK == GROUP { GROUP / 32 } else { n / 32 };
    }

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[Q8Block]; N], acc: &mut [[f32; LANES]; N]) {
        let group = &self.group;
        let xs = xs.map(|x| &x[..self.blocks]);
        let mut lanes: [[f32; 8]; N] = std::array::from_fn(|i| std::array::from_fn(|l| acc[i][l]));
        for b in 0..self.blocks.min(8) {
            for i in 0..N {
                let x = &xs[i][b];
                let low = group.scale[2 * b] * x.d;
                let high = if F::SPLIT { group.scale[2 * b + 1] * x.d } else { low };
                lanes[i] = I::dot(F::UNSIGNED, lanes[i], &group.q[b], &x.q, low, high);
                if F::MINIMA {
                    acc[i][8 + b] = I::mul_add(-group.min[b], x.s, acc[i][8 + b]);
                }
            }
        }
        for (acc, lanes) in acc.iter_mut().zip(lanes) {
            acc[..8].copy_from_slice(&lanes);
        }
    }
}

/// Decoded weights, for plain formats and for exact activations.
struct Floats<X> {
    format: DType,
    group: [f32; GROUP],
    n: usize,
    x: std::marker::PhantomData<X>,
}

impl<X: Activation> Engine for Floats<X> {
    type X = X;
    const UNIT: usize = X::UNIT;

    #[inline(always)]
    fn new(format: DType) -> Self {
        Floats { format, group: [0.0; GROUP], n: 0, x: std::marker::PhantomData }
    }

    #[inline(always)]
    fn decode<I: Isa>(&mut self, bytes: &[u8], n: usize) {
        blocks::decode::<I>(self.format, bytes, &mut self.group[..n]);
        self.n = n;
    }

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[X]; N], acc: &mut [[f32; LANES]; N]) {
        X::accumulate::<I, N>(&self.group[..self.n], xs, acc);
    }
}

/// Activations that meet decoded weights.
trait Activation: Pod {
    const UNIT: usize;

    fn accumulate<I: Isa, const N: usize>(w: &[f32], xs: [&[Self]; N], acc: &mut [[f32; LANES]; N]);
}

impl Activation for F32 {
    const UNIT: usize = 1;

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(w: &[f32], xs: [&[F32]; N], acc: &mut [[f32; LANES]; N]) {
        let (whole, rest) = w.as_chunks::<LANES>();
        let xs = xs.map(|x| x[..w.len()].as_chunks::<LANES>());
        let mut lanes = *acc;
        for (c, w) in whole.iter().enumerate() {
            for i in 0..N {
                let x = &xs[i].0[c];
                for l in 0..LANES {
                    lanes[i][l] = I::mul_add(w[l], x[l].0, lanes[i][l]);
                }
            }
        }
        for i in 0..N {
            for ((w, x), lane) in rest.iter().zip(xs[i].1).zip(&mut lanes[i]) {
                *lane = I::mul_add(*w, x.0, *lane);
            }
        }
        *acc = lanes;
    }
}

impl Activation for Q8Block {
    const UNIT: usize = 32;

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(w: &[f32], xs: [&[Q8Block]; N], acc: &mut [[f32; LANES]; N]) {
        for (x, acc) in xs.into_iter().zip(acc) {
            for (w, x) in w.as_chunks::<32>().0.iter().zip(x) {
                dot_lanes::<I>(acc, w, &x.q.map(|q| x.d * f32::from(q)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::bind;
    use super::super::isa::Features;
    use super::super::testing::*;
    use super::*;
    use crate::codegen::spec::{Alias, Arg, MatmulPart, Template};

    const T: Dim = Dim::T;

    /// A matmul of weights with these formats and rows; each with a bias and a residual if `adds`.
    fn stored(x: DType, k: u64, tile: u32, weights: &[(DType, u64)], adds: bool) -> KernelSpec {
        let mut args = vec![arg(Access::Read, x, [T, n(k)])];
        let mut push = |a: Arg| {
            args.push(a);
            (args.len() - 1) as ArgId
        };
        let mut items = 0;
        let mut parts = vec![];
        for &(format, rows) in weights {
            items += rows.div_ceil(tile.into());
            parts.push(MatmulPart {
                weight: push(arg(Access::Read, format, [rows, k])),
                format,
                rows,
                bias: adds.then(|| push(arg(Access::Read, DType::F32, [rows]))),
                residual: adds.then(|| push(arg(Access::Read, DType::F32, [T, n(rows)]))),
                out: Some(push(arg(Access::Write, DType::F32, [T, n(rows)]))),
            });
        }
        let m = MatmulSpec { x: 0, k, parts, epilogue: Epilogue::Store, tile };
        spec(Template::Matmul(m), args, vec![Extent::each(items)])
    }

    fn inputs(spec: &KernelSpec, at: &Syms, seed: u64) -> Vec<Option<Vec<u8>>> {
        let mut rng = rng(seed);
        let fill = |a: &Arg| {
            (a.access == Access::Read).then(|| random(&mut rng, a.ty.dtype, a.ty.elements(at) as usize))
        };
        spec.args.iter().map(fill).collect()
    }

    /// `x · wᵀ` and what is added, in double precision.
    fn reference(
        spec: &KernelSpec,
        m: &MatmulSpec,
        part: &MatmulPart,
        inputs: &[Option<Vec<u8>>],
    ) -> Vec<f64> {
        let get = |id: ArgId| {
            let i = usize::from(id);
            values(spec.args[i].ty.dtype, inputs[i].as_ref().unwrap())
        };
        let (x, w, k) = (get(m.x), get(part.weight), m.k as usize);
        let (bias, residual) = (part.bias.map(get), part.residual.map(get));
        let mut out = vec![];
        for (t, x) in x.chunks(k).enumerate() {
            for (r, w) in w.chunks(k).enumerate() {
                let dot: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                let add = bias.as_ref().map_or(0.0, |b| b[r]);
                out.push(dot + add + residual.as_ref().map_or(0.0, |y| y[t * part.rows as usize + r]));
            }
        }
        out
    }

    fn template(spec: &KernelSpec) -> MatmulSpec {
        match &spec.template {
            Template::Matmul(m) => m.clone(),
            _ => unreachable!(),
        }
    }

    #[test]
    fn every_format_meets_every_activation() {
        for format in WEIGHTS.iter().copied() {
            for x in [DType::F32, DType::Q8Act] {
                // A whole number of blocks, but not of groups where the format allows it.
                let k = if format.block_len() == 256 { 768 } else { 608 };
                for t in [1, 2, 7, 33] {
                    let spec = stored(x, k, 32, &[(format, 45)], t == 7);
                    let at = syms(t, 0, 64);
                    let m = template(&spec);
                    let inputs = inputs(&spec, &at, t);
                    let out = m.parts[0].out.unwrap();
                    let have = to_f32s(&launch_all(&spec, &at, &inputs, out));
                    assert_close(&have, &reference(&spec, &m, &m.parts[0], &inputs), 1e-6);
                }
            }
        }
    }

    #[test]
    fn plain_formats_take_any_number_of_columns() {
        for (format, k) in [(DType::F32, 1), (DType::F32, 17), (DType::F16, 300), (DType::F16, 7)] {
            let spec = stored(DType::F32, k, 3, &[(format, 5)], false);
            let (at, m) = (syms(3, 0, 64), template(&spec));
            let inputs = inputs(&spec, &at, k);
            let have = to_f32s(&launch_all(&spec, &at, &inputs, 2));
            assert_close(&have, &reference(&spec, &m, &m.parts[0], &inputs), 1e-6);
        }
    }

    #[test]
    fn parts_differ_in_rows_and_format() {
        let spec =
            stored(DType::Q8Act, 256, 40, &[(DType::Q4_K, 64), (DType::Q6_K, 33), (DType::F16, 41)], true);
        let (at, m) = (syms(5, 0, 64), template(&spec));
        let inputs = inputs(&spec, &at, 1);
        for part in &m.parts {
            let have = to_f32s(&launch_all(&spec, &at, &inputs, part.out.unwrap()));
            assert_close(&have, &reference(&spec, &m, part, &inputs), 1e-6);
        }
    }

    #[test]
    fn a_tokens_result_does_not_depend_on_the_others() {
        for (x, format) in
            [(DType::F32, DType::Q4_K), (DType::Q8Act, DType::Q6_K), (DType::Q8Act, DType::Q8_0)]
        {
            let spec = stored(x, 512, 32, &[(format, 40)], false);
            for features in Features::available() {
                let all = inputs(&spec, &syms(21, 0, 64), 3);
                let want = launch(&spec, &features, &syms(21, 0, 64), &all, None).swap_remove(2);
                let row = blocks::bytes_of(x, 512);
                let xs = all[0].as_ref().unwrap();
                for (t, want) in want.chunks(160).enumerate() {
                    let alone = [Some(xs[t * row..(t + 1) * row].to_vec()), all[1].clone(), None];
                    assert_eq!(launch(&spec, &features, &syms(1, 0, 64), &alone, None)[2], want, "token {t}");
                }
            }
        }
    }

    #[test]
    fn a_residual_may_lie_under_the_result() {
        let mut spec = stored(DType::F32, 64, 32, &[(DType::Q8_0, 50)], true);
        spec.may_alias.push(Alias { write: 4, read: 3 });
        let (at, m) = (syms(20, 0, 64), template(&spec));
        let inputs = inputs(&spec, &at, 9);
        let want = reference(&spec, &m, &m.parts[0], &inputs);
        for features in Features::available() {
            let have = launch(&spec, &features, &at, &inputs, Some((4, 3)));
            assert_close(&to_f32s(&have[4]), &want, 1e-6);
        }
    }

    fn swiglu(x: DType, out: DType, rows: u64, tile: u32) -> KernelSpec {
        let mut spec = stored(x, 256, tile, &[(DType::Q4_K, rows), (DType::Q6_K, rows)], false);
        let Template::Matmul(m) = &mut spec.template else { unreachable!() };
        m.parts.iter_mut().for_each(|p| p.out = None);
        m.parts[1].weight = 2;
        m.epilogue = Epilogue::Swiglu { out: 3 };
        spec.args.remove(2);
        spec.args[3] = arg(Access::Write, out, [T, n(rows)]);
        spec.grid = vec![Extent::each(rows.div_ceil(tile.into()))];
        spec
    }

    #[test]
    fn gate_and_up_become_one() {
        for (rows, tile, out, tolerance) in
            [(96, 64, DType::F32, 2e-6), (96, 32, DType::Q8Act, 6e-3), (50, 32, DType::F32, 2e-6)]
        {
            let spec = swiglu(DType::F32, out, rows, tile);
            let (at, m) = (syms(19, 0, 64), template(&spec));
            let inputs = inputs(&spec, &at, 4);
            let (gate, up) =
                (reference(&spec, &m, &m.parts[0], &inputs), reference(&spec, &m, &m.parts[1], &inputs));
            let want: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let have = launch_all(&spec, &at, &inputs, 3);
            let have: Vec<f32> = values(out, &have).into_iter().map(|x| x as f32).collect();
            assert_close(&have, &want, tolerance);
        }
    }

    fn argmax(rows: u64, tile: u32) -> KernelSpec {
        let mut spec = stored(DType::F32, 64, tile, &[(DType::F32, rows)], false);
        let Template::Matmul(m) = &mut spec.template else { unreachable!() };
        m.parts[0].out = None;
        m.epilogue = Epilogue::ArgMax { best: 2, index: 3, out: 4 };
        let each = [T, n(rows.div_ceil(tile.into()))];
        spec.args[2] = arg(Access::Scratch, DType::F32, each);
        spec.args.push(arg(Access::Scratch, DType::I32, each));
        spec.args.push(arg(Access::Write, DType::I32, [T]));
        spec
    }

    #[test]
    fn the_largest_result_wins_and_the_first_of_equals() {
        let spec = argmax(101, 40);
        let (at, m) = (syms(18, 0, 64), template(&spec));
        let mut inputs = inputs(&spec, &at, 5);
        // Row 90 is as good as row 20, whatever that is.
        let w = inputs[1].as_mut().unwrap();
        w.copy_within(20 * 256..21 * 256, 90 * 256);
        let y = reference(&spec, &m, &m.parts[0], &inputs);
        let best = |y: &[f64]| y.iter().enumerate().fold(0, |b, (i, v)| if *v > y[b] { i } else { b }) as i32;
        let want: Vec<i32> = y.chunks(101).map(best).collect();
        assert_eq!(to_i32s(&launch_all(&spec, &at, &inputs, 4)), want);
        assert!(!want.contains(&90));
        let nan = vec![Some(f32_bytes(&[f32::NAN; 18 * 64])), inputs[1].clone(), None, None, None];
        assert_eq!(to_i32s(&launch_all(&spec, &at, &nan, 4)), [0; 18]);
    }

    #[test]
    fn the_last_row_alone_has_a_constant_number_of_tokens() {
        let mut spec = stored(DType::F32, 64, 32, &[(DType::F16, 32)], false);
        spec.args[0].ty.shape[0] = n(1);
        spec.args[2].ty.shape[0] = n(1);
        let (at, m) = (syms(9, 3, 64), template(&spec));
        let inputs = inputs(&spec, &at, 6);
        let have = to_f32s(&launch_all(&spec, &at, &inputs, 2));
        assert_close(&have, &reference(&spec, &m, &m.parts[0], &inputs), 1e-6);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let good = || stored(DType::F32, 256, 32, &[(DType::Q4_K, 64), (DType::Q6_K, 33)], true);
        assert!(bind(&good(), &Features::baseline()).is_ok());
        let refuse = |name: &str, change: &dyn Fn(&mut KernelSpec, &mut MatmulSpec)| {
            let mut spec = good();
            let mut m = template(&spec);
            change(&mut spec, &mut m);
            spec.template = Template::Matmul(m);
            assert!(bind(&spec, &Features::baseline()).is_err(), "{name}");
        };
        refuse("x", &|_, m| m.x = 99);
        refuse("x of other columns", &|s, _| s.args[0].ty.shape[1] = n(512));
        refuse("x of integers", &|s, _| s.args[0].ty.dtype = DType::I32);
        refuse("x written", &|s, _| s.args[0].access = Access::Update);
        refuse("columns", &|_, m| m.k = 512);
        refuse("no columns", &|_, m| m.k = 0);
        refuse("rows", &|_, m| m.parts[0].rows = 65);
        refuse("huge rows", &|_, m| m.parts[0].rows = u64::MAX);
        refuse("format", &|_, m| m.parts[0].format = DType::Q8_0);
        refuse("activations as a weight", &|s, m| {
            m.parts[0].format = DType::Q8Act;
            s.args[1].ty.dtype = DType::Q8Act;
        });
        refuse("part of a block", &|s, m| {
            m.k = 255;
            s.args.iter_mut().for_each(|a| a.ty.shape[0] = n(255));
        });
        refuse("bias", &|s, _| s.args[2].ty.shape = vec![n(63)]);
        refuse("residual", &|s, _| s.args[3].ty.shape = vec![T, n(63)]);
        refuse("tokens of a result", &|s, _| s.args[4].ty.shape = vec![n(1), n(64)]);
        refuse("a result read", &|s, _| s.args[4].access = Access::Read);
        refuse("a result of halves", &|s, _| s.args[4].ty.dtype = DType::F16);
        refuse("one result for two parts", &|s, m| {
            s.args[7] = s.args[4].clone();
            m.parts[1].out = Some(4);
        });
        refuse("no result", &|_, m| m.parts[0].out = None);
        refuse("no parts", &|s, m| {
            m.parts.clear();
            s.grid = vec![];
        });
        refuse("tile", &|_, m| m.tile = 0);
        refuse("grid", &|s, _| s.grid = vec![Extent::each(5)]);
        refuse("unused", &|s, _| s.args.push(arg(Access::Read, DType::F32, [1])));
        refuse("alias of x", &|s, _| s.may_alias.push(Alias { write: 4, read: 0 }));
        refuse("alias of another part", &|s, _| s.may_alias.push(Alias { write: 4, read: 7 }));
        let epilogues =
            |name: &str, mut spec: KernelSpec, change: &dyn Fn(&mut KernelSpec, &mut MatmulSpec)| {
                assert!(bind(&spec, &Features::baseline()).is_ok(), "{name}");
                let mut m = template(&spec);
                change(&mut spec, &mut m);
                spec.template = Template::Matmul(m);
                assert!(bind(&spec, &Features::baseline()).is_err(), "{name}");
            };
        let quantised = || swiglu(DType::F32, DType::Q8Act, 64, 32);
        epilogues("tile", quantised(), &|s, m| {
            m.tile = 48;
            s.grid = vec![Extent::each(2)];
        });
        epilogues("one part", quantised(), &|_, m| m.parts.truncate(1));
        epilogues("out", quantised(), &|s, _| s.args[3].ty.shape[1] = n(96));
        epilogues("best", argmax(64, 32), &|s, _| s.args[2].ty.shape[1] = n(1));
        epilogues("index", argmax(64, 32), &|s, _| s.args[3].ty.dtype = DType::F32);
        epilogues("out", argmax(64, 32), &|s, _| s.args[4].ty.shape[0] = n(1));
    }

    #[test]
    #[should_panic(expected = "of a launch of 2")]
    fn refuses_items_beyond_the_grid() {
        let kernel =
            bind(&stored(DType::F32, 64, 32, &[(DType::F16, 64)], false), &Features::baseline()).unwrap();
        // SAFETY: no memory is promised, and none is touched.
        unsafe { kernel.run(&[], &syms(1, 0, 1), 1..3) };
    }
}
