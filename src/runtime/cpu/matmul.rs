//! `x · wᵀ` with weights streamed in their own format: a group of at most 256 weights is decoded at a time, once for up to
//! [`TOKENS`] tokens.
//!
//! Quantised weights meet `q8_act` in integer dot products of 32 (16 where a format has as many scales), scaled in floats; all else is decoded to
//! floats. Each pair of a row and a token is summed in the same order whatever the number of tokens.

use super::args::{Args, F32, Q8Block};
use super::blocks::{self, Format, GROUP, Group, with_format};
use super::check::{self, ACTIVATIONS, BindError, Check, WEIGHTS};
use super::formats::*;
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

    /// The part that an item belongs to, and its rows.
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

    /// The results of `rows` for `tokens`, with bias and residual.
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
        macro_rules! integers {
            ($format:ty) => {
                with!(Integers<$format>)
            };
        }
        if self.x_type == DType::Q8Act {
            with_format!(part.format, integers, with!(Floats<Q8Block>));
        } else {
            with!(Floats<F32>);
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
            let mut acc = [E::ZERO; TOKENS];
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
                out[i] = E::total(acc);
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
    /// The partial sums of one row and token.
    type Acc: Copy;
    const ZERO: Self::Acc;

    fn new(format: DType) -> Self;

    /// Decodes a group of `n` weights.
    fn decode<I: Isa>(&mut self, bytes: &[u8], n: usize);

    /// Adds the products of the group with its part of each of `N` tokens.
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[Self::X]; N], acc: &mut [Self::Acc; N]);

    /// The sum of the partial sums.
    fn total(acc: Self::Acc) -> f32;
}

/// Integer dot products. Sums are those of even and of odd sub-blocks, which are independent, and of the minima.
struct Integers<F> {
    group: Group,
    blocks: usize,
    format: std::marker::PhantomData<F>,
}

impl<F: Format> Engine for Integers<F> {
    type X = Q8Block;
    const UNIT: usize = 32;
    type Acc = [[f32; 8]; 3];
    const ZERO: Self::Acc = [[0.0; 8]; 3];

    #[inline(always)]
    fn new(_: DType) -> Self {
        Integers { group: Group::ZERO, blocks: 0, format: std::marker::PhantomData }
    }

    #[inline(always)]
    fn decode<I: Isa>(&mut self, bytes: &[u8], n: usize) {
        F::decode::<I>(bytes, &mut self.group);
        self.blocks = n / 32;
    }

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[Q8Block]; N], acc: &mut [Self::Acc; N]) {
        let group = &self.group;
        let blocks = if F::BLOCK == GROUP { GROUP / 32 } else { self.blocks };
        for (x, acc) in xs.into_iter().zip(acc) {
            let x = &x[..blocks];
            let mut sums = *acc;
            for (b, x) in x.iter().enumerate().take(GROUP / 32) {
                let low = group.scale[0][b] * x.d;
                let high = if F::SPLIT { group.scale[1][b] * x.d } else { low };
                sums[b % 2] = I::dot(F::UNSIGNED, sums[b % 2], &group.q[b], &x.q, low, high);
            }
            if F::MINIMA && F::SPLIT {
                for (b, x) in x.iter().enumerate().take(GROUP / 32) {
                    let (low, high) = (-group.min[0][b] * x.d, -group.min[1][b] * x.d);
                    sums[b % 2] = I::dot(true, sums[b % 2], &[1; 32], &x.q, low, high);
                }
            } else if F::MINIMA {
                let mut s = [0.0; 8];
                s.iter_mut().zip(x).for_each(|(s, x)| *s = x.s);
                for b in 0..8 {
                    sums[2][b] = I::mul_add(-group.min[0][b], s[b], sums[2][b]);
                }
            }
            *acc = sums;
        }
    }

    #[inline(always)]
    fn total(acc: Self::Acc) -> f32 {
        sum(std::array::from_fn(|l| if l < 8 { acc[0][l] + acc[2][l] } else { acc[1][l - 8] }))
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
    type Acc = [f32; LANES];
    const ZERO: Self::Acc = [0.0; LANES];

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

    #[inline(always)]
    fn total(acc: Self::Acc) -> f32 {
        sum(acc)
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
mod tests;
