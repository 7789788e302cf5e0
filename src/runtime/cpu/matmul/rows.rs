//! Weights decoded a group of a row at a time, for one token or a handful.

use super::super::args::{Args, F32, Q8Block};
use super::super::blocks::{self, Format, GROUP, Group, Order, XGroup};
use super::super::isa::{Isa, Job, prefetch, prefetch_distance};
use super::super::math::{LANES, dot_lanes};
use super::tile::half_sums;
use super::{ROWS, Results, TOKENS};
use crate::codegen::spec::ArgId;
use crate::ir::DType;
use std::marker::PhantomData;
use std::ops::Range;

/// The products of rows of weights with up to `M` tokens, `xs`.
pub struct RowByRow<'a, E: Engine, const M: usize> {
    pub format: DType,
    pub k: usize,
    /// Whole rows of `k` weights.
    pub weights: &'a [u8],
    pub xs: &'a [&'a [E::X]],
    pub out: &'a mut Results,
}

impl<E: Engine, const M: usize> Job for RowByRow<'_, E, M> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let RowByRow { format, k, weights, xs, out } = self;
        let mut engine = E::new(format);
        let ahead = prefetch_distance(weights.len());
        let rows = weights.chunks_exact(blocks::bytes_of(format, k)).take(ROWS);
        if let ([x], 1) = (xs, M) {
            // Lanes are summed when all rows are done: by then, none has to be waited for.
            let mut sums = [[0.0; LANES]; ROWS];
            for (row, sums) in rows.zip(&mut sums) {
                products::<I, E, 1>(&mut engine, k, ahead, row, &[x], std::array::from_mut(sums));
            }
            for (out, sums) in out[0].iter_mut().zip(&sums) {
                *out = I::sum(sums);
            }
            return;
        }
        for (i, row) in rows.enumerate() {
            let mut sums = [[0.0; LANES]; M];
            products::<I, E, M>(&mut engine, k, ahead, row, xs, &mut sums);
            for (out, sums) in out.iter_mut().zip(&sums).take(xs.len()) {
                out[i] = I::sum(sums);
            }
        }
    }
}

/// Adds the products of a row with each of up to `M` tokens to lanes, and prefetches what lies `ahead` bytes on.
#[inline(always)]
fn products<I: Isa, E: Engine, const M: usize>(
    engine: &mut E,
    k: usize,
    ahead: usize,
    row: &[u8],
    xs: &[&[E::X]],
    sums: &mut [[f32; LANES]; M],
) {
    let bytes = engine.group_bytes();
    let whole = row.len() / bytes;
    let (groups, rest) = row.split_at(whole * bytes);
    for (g, group) in groups.chunks_exact(bytes).enumerate() {
        if ahead > 0 {
            for line in (0..bytes).step_by(64) {
                prefetch(group.as_ptr().wrapping_add(ahead + line));
            }
        }
        engine.decode::<I>(group, GROUP);
        accumulate::<I, E, M>(engine, xs, g, GROUP, sums);
    }
    if !rest.is_empty() {
        engine.decode::<I>(rest, k % GROUP);
        accumulate::<I, E, M>(engine, xs, whole, k % GROUP, sums);
    }
}

/// Adds the products of the decoded group `g`, of `n` weights.
#[inline(always)]
fn accumulate<I: Isa, E: Engine, const M: usize>(
    engine: &E,
    xs: &[&[E::X]],
    g: usize,
    n: usize,
    sums: &mut [[f32; LANES]; M],
) {
    let start = g * (GROUP / E::UNIT);
    let span = start..start + n.div_ceil(E::UNIT);
    let (fours, rest) = xs.as_chunks::<4>();
    let (fours_sums, rest_sums) = sums.split_at_mut(4 * fours.len());
    for (x, sums) in fours.iter().zip(fours_sums.as_chunks_mut::<4>().0) {
        let [a, b, c, d] = *x;
        let part = [&a[span.clone()], &b[span.clone()], &c[span.clone()], &d[span.clone()]];
        engine.accumulate::<I, 4>(part, sums);
    }
    for (x, sums) in rest.iter().zip(rest_sums) {
        engine.accumulate::<I, 1>([&x[span.clone()]], std::array::from_mut(sums));
    }
}

/// How a format of weights meets one of activations.
pub trait Engine {
    /// What activations are stored in, [`Engine::UNIT`] at a time.
    type X;
    const UNIT: usize;
    fn new(format: DType) -> Self;

    /// Bytes of a whole group.
    fn group_bytes(&self) -> usize;

    /// Decodes a group of `n` weights.
    fn decode<I: Isa>(&mut self, bytes: &[u8], n: usize);

    /// Adds the products of the group with its part of each of `N` tokens to lanes.
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[Self::X]; N], sums: &mut [[f32; LANES]; N]);
}

/// Quantised activations of some tokens, as [`Integers`] wants them.
#[derive(Default)]
pub struct Prepared {
    tokens: Range<usize>,
    order: Order,
    groups: Vec<XGroup>,
    /// Groups of one token.
    width: usize,
}

impl Prepared {
    /// Takes in tokens of `units` blocks each from argument `x`, for weights in that order, unless they are here.
    #[inline(always)]
    pub fn fill(&mut self, args: Args<'_>, x: ArgId, tokens: &Range<usize>, units: usize, order: Order) {
        if self.tokens == *tokens && self.order == order && !self.groups.is_empty() {
            return;
        }
        (self.tokens, self.order) = (tokens.clone(), order);
        self.width = units.div_ceil(8);
        self.groups.clear();
        self.groups.resize(self.width * tokens.len(), XGroup::ZERO);
        for (t, groups) in tokens.clone().zip(self.groups.chunks_exact_mut(self.width)) {
            for (blocks, group) in args.slice::<Q8Block>(x, t * units, units).chunks(8).zip(groups) {
                for (b, block) in blocks.iter().enumerate() {
                    group.d[b] = block.d;
                    [group.s[0][b], group.s[1][b]] = half_sums(block);
                }
                for (q, b) in group.q.as_flattened_mut().as_chunks_mut::<32>().0.iter_mut().zip(order) {
                    if let Some(block) = blocks.get(b) {
                        *q = block.q;
                    }
                }
            }
        }
    }

    /// The first `n` tokens.
    #[inline(always)]
    pub fn tokens(&self, n: usize) -> [&[XGroup]; TOKENS] {
        let mut xs = [&[][..]; TOKENS];
        for (x, groups) in xs.iter_mut().zip(self.groups.chunks_exact(self.width.max(1))).take(n) {
            *x = groups;
        }
        xs
    }
}

/// Integer dot products.
pub struct Integers<F> {
    group: Group,
    format: PhantomData<F>,
}

impl<F: Format> Engine for Integers<F> {
    type X = XGroup;
    const UNIT: usize = GROUP;

    #[inline(always)]
    fn new(_: DType) -> Self {
        Integers { group: Group::ZERO, format: PhantomData }
    }

    #[inline(always)]
    fn group_bytes(&self) -> usize {
        blocks::bytes_of(F::DTYPE, GROUP)
    }

    #[inline(always)]
    fn decode<I: Isa>(&mut self, bytes: &[u8], _: usize) {
        // What the last group left beyond a shorter one meets zeros.
        F::decode::<I>(bytes, &mut self.group);
    }

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(&self, xs: [&[XGroup]; N], acc: &mut [[f32; LANES]; N]) {
        for (x, acc) in xs.into_iter().zip(acc) {
            if let [x] = x {
                I::dot::<F>(&self.group, x, acc);
            }
        }
    }
}

/// Decoded weights, for plain formats and for exact activations.
pub struct Floats<X> {
    format: DType,
    group: [f32; GROUP],
    n: usize,
    x: PhantomData<X>,
}

impl<X: Activation> Engine for Floats<X> {
    type X = X;
    const UNIT: usize = X::UNIT;

    #[inline(always)]
    fn new(format: DType) -> Self {
        Floats { format, group: [0.0; GROUP], n: 0, x: PhantomData }
    }

    #[inline(always)]
    fn group_bytes(&self) -> usize {
        blocks::bytes_of(self.format, GROUP)
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
pub trait Activation: Sized {
    const UNIT: usize;

    fn accumulate<I: Isa, const N: usize>(w: &[f32], xs: [&[Self]; N], acc: &mut [[f32; LANES]; N]);
}

impl Activation for F32 {
    const UNIT: usize = 1;

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(w: &[f32], xs: [&[F32]; N], acc: &mut [[f32; LANES]; N]) {
        let (whole, rest) = w.as_chunks::<LANES>();
        let mut sums = *acc;
        for (c, w) in whole.iter().enumerate() {
            for (x, sums) in xs.iter().zip(&mut sums) {
                if let Some(x) = x[c * LANES..].first_chunk() {
                    I::mul_add_lanes(w, x, sums);
                }
            }
        }
        for (x, sums) in xs.iter().zip(&mut sums) {
            for ((w, x), lane) in rest.iter().zip(&x[whole.len() * LANES..]).zip(sums) {
                *lane = I::mul_add(*w, x.0, *lane);
            }
        }
        *acc = sums;
    }
}

impl Activation for Q8Block {
    const UNIT: usize = 32;

    #[inline(always)]
    fn accumulate<I: Isa, const N: usize>(w: &[f32], xs: [&[Q8Block]; N], acc: &mut [[f32; LANES]; N]) {
        for (x, acc) in xs.into_iter().zip(acc) {
            for (w, x) in w.as_chunks::<32>().0.iter().zip(x) {
                let mut values = [0.0; 32];
                for (value, q) in values.iter_mut().zip(x.q) {
                    *value = x.d * f32::from(q);
                }
                dot_lanes::<I>(acc, w, &values);
            }
        }
    }
}
