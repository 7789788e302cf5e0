//! `x · wᵀ` with weights streamed in their own format: 32 rows at a time, for up to [`TOKENS`] tokens at a time.
//!
//! Quantised weights meet `q8_act` in integer dot products of 32 (16 where a format has as many scales), scaled in floats; all
//! else is decoded to floats. For few tokens, rows are decoded one by one (`rows`), or sixteen together where they lie interleaved
//! ([`interleaved`]); for many, where the instruction set has a kernel for it, 32 rows become a [`Tile`] that all tokens share.

mod rows;
mod tile;

pub(super) use tile::{Rows, Tile};

use super::args::{Args, F32, Q8Block};
use super::binding::{self, ACTIVATIONS, BindError, Binding, WEIGHTS};
use super::blocks::{self, with_format};
use super::formats::*;
use super::interleaved::{self, MultiplyStrip, with_interleaved};
use super::isa::Isa;
use super::math::{quantise, silu};
use super::{Kernel, Syms};
use crate::codegen::spec::{
    Access, ArgId, Code, CpuCode, Epilogue, Extent, Implementation, LaunchSpec, Layout, MatmulSpec,
};
use crate::ir::{DType, Dim};
use rows::{Floats, Integers, Prepared, RowByRow};
use std::marker::PhantomData;
use std::ops::Range;
use tile::{Fill, FillLanes, FillStrips, Lanes, Multiply, MultiplyLanes, halves};

/// Tokens from which float weights become lanes that all tokens share.
const LANE_TOKENS: usize = 8;
/// Tokens whose results are held before they are stored.
pub(super) const TOKENS: usize = 24;
/// Rows whose results are held before they are stored; a block of `q8_act`.
const ROWS: usize = 32;

/// Results of up to [`ROWS`] rows for up to [`TOKENS`] tokens.
type Results = [[f32; ROWS]; TOKENS];
/// Results of a strip for as many.
type Sums = [[f32; interleaved::STRIP_ROWS]; TOKENS];

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
    /// With [`Epilogue::ArgMax`].
    best: Option<BestOfItems>,
}

struct Part {
    weight: ArgId,
    format: DType,
    layout: Layout,
    rows: usize,
    bias: Option<ArgId>,
    residual: Option<ArgId>,
    out: Option<ArgId>,
}

/// Tokens from which a tile of weights pays, if it ever does.
#[inline(always)]
fn tile_tokens<I: Isa>(layout: Layout) -> Option<usize> {
    // What multiplies tiles is compiled where rows make them.
    const { assert!(I::STRIPS_TILE_TOKENS.is_none() || I::TILE_TOKENS.is_some()) };
    match layout {
        Layout::RowMajor => I::TILE_TOKENS,
        Layout::Interleaved16 => I::STRIPS_TILE_TOKENS,
        // Refused by the binding.
        Layout::Planes => None,
    }
}

/// The matmul, and what takes the best of its items where the epilogue asks for it.
pub(super) fn bind(
    kernel: &Implementation,
    m: &MatmulSpec,
) -> Result<(Matmul, Option<BestOfItems>), BindError> {
    let mut check = Binding::new(kernel)?;
    let k = binding::size("the columns of a weight", m.k)?;
    let tile_of = |launch: &LaunchSpec| match launch.code {
        Code::Cpu(CpuCode::Matmul { tile }) => tile,
        Code::Cpu(CpuCode::Whole | CpuCode::BestOfItems) | Code::Hip(_) => 0,
    };
    let rows_of_item = kernel.launches.first().map_or(0, tile_of);
    let tile = binding::size("the tile", rows_of_item.into())?;
    let (x_type, tokens) = check.tokens("the activations", m.x, Access::Read, ACTIVATIONS, None, k)?;
    let f32s = &[DType::F32];
    let mut parts = vec![];
    let mut items = 0u64;
    for p in &m.parts {
        let rows = binding::size("the rows of a weight", p.rows)?;
        items += rows.div_ceil(tile) as u64;
        if !WEIGHTS.contains(&p.format) {
            return binding::parameter(format!("a weight cannot be {}", p.format));
        }
        let shape = [Dim::n(p.rows), Dim::n(m.k)];
        check.exact("a weight", p.weight, Access::Read, &[p.format], &shape)?;
        let layout = check.layout(p.weight);
        if layout != Layout::RowMajor && (x_type != DType::Q8Act || tile % interleaved::STRIP_ROWS != 0) {
            return Err(BindError::Layout { arg: p.weight, layout });
        }
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
            (None, Epilogue::Store) => return binding::parameter("a part lacks its result"),
            (Some(_), _) => return binding::parameter("a part has a result that the epilogue consumes"),
            (None, _) => {}
        }
        let (weight, format, bias, residual, out) = (p.weight, p.format, p.bias, p.residual, p.out);
        parts.push(Part { weight, format, layout, rows, bias, residual, out });
    }
    let (mut quantised, mut best) = (false, None);
    match (&m.epilogue, &parts[..]) {
        (Epilogue::Store, [_, ..]) => {}
        (Epilogue::Swiglu { out }, [gate, up]) if gate.rows == up.rows => {
            if tile % ROWS != 0 {
                return binding::parameter(format!(
                    "the tile of a swiglu must be a multiple of {ROWS}, not {tile}"
                ));
            }
            items = gate.rows.div_ceil(tile) as u64;
            let (dtype, _) =
                check.tokens("the result", *out, Access::Write, ACTIVATIONS, Some(tokens), gate.rows)?;
            quantised = dtype == DType::Q8Act;
        }
        (Epilogue::ArgMax { out }, [part]) => {
            let each = [tokens, Dim::n(items)];
            let value = kernel.spec.args.len() as ArgId;
            let index = value.saturating_add(1);
            check.exact("the best values", value, Access::Scratch, f32s, &each)?;
            check.exact("their indices", index, Access::Scratch, &[DType::I32], &each)?;
            check.exact("the result", *out, Access::Write, &[DType::I32], &[tokens])?;
            best = Some(BestOfItems { value, index, out: *out, items: part.rows.div_ceil(tile) });
        }
        _ => {
            return binding::parameter(format!(
                "{} parts do not fit the epilogue {:?}",
                parts.len(),
                m.epilogue
            ));
        }
    }
    let mut launches = vec![(CpuCode::Matmul { tile: rows_of_item }, vec![Extent::each(items)])];
    if best.is_some() {
        launches.push((CpuCode::BestOfItems, vec![Extent::each(tokens)]));
    }
    check.done_by(&launches)?;
    let epilogue = m.epilogue.clone();
    Ok((Matmul { x: m.x, x_type, tokens, k, parts, epilogue, quantised, tile, best }, best))
}

impl Matmul {
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

    /// Whether weights and activations of a part meet as integers.
    #[inline(always)]
    fn is_integer(&self, part: &Part) -> bool {
        self.x_type == DType::Q8Act && part.format.is_quantised()
    }

    /// Makes what many tokens share of some rows, if `n` tokens are as many: a tile where integers meet, lanes where floats do.
    #[inline(always)]
    fn fill<I: Isa>(
        &self,
        args: Args<'_>,
        part: &Part,
        rows: &Range<usize>,
        n: usize,
        slot: usize,
        work: &mut Work,
    ) {
        let weights = self.weights(args, part, rows);
        work.shared[slot] = if self.is_integer(part) {
            tile_tokens::<I>(part.layout).is_some_and(|least| n >= least)
        } else {
            self.x_type == DType::F32 && n >= LANE_TOKENS
        };
        if !work.shared[slot] {
            return;
        }
        if self.is_integer(part) {
            // What no set of instructions calls is not compiled for it.
            if const { I::TILE_TOKENS.is_some() } {
                let (tile, k) = (&mut work.tiles[slot], self.k);
                macro_rules! fill {
                    ($format:ty) => {
                        I::outline(Fill::<$format>::new(tile, weights, rows.len(), k))
                    };
                }
                macro_rules! fill_strips {
                    ($format:ty) => {
                        I::outline(FillStrips::<$format> { tile, strips: weights, k, format: PhantomData })
                    };
                }
                match part.layout {
                    Layout::RowMajor => with_format!(part.format, fill, ()),
                    Layout::Interleaved16 => with_interleaved!(part.format, fill_strips, ()),
                    Layout::Planes => {}
                }
            }
        } else {
            let lanes = &mut work.lanes[slot];
            I::outline(FillLanes { lanes, weights, format: part.format, k: self.k });
        }
    }

    /// The stored weights of some rows.
    #[inline(always)]
    fn weights<'a>(&self, args: Args<'a>, part: &Part, rows: &Range<usize>) -> &'a [u8] {
        let row_bytes = blocks::bytes_of(part.format, self.k);
        args.slice(part.weight, rows.start * row_bytes, rows.len() * row_bytes)
    }

    /// The quantised activations of some tokens.
    #[inline(always)]
    fn blocks<'a>(
        &self,
        args: Args<'a>,
        tokens: &Range<usize>,
        halves: &'a [[f32; 2]],
    ) -> [Rows<'a>; TOKENS] {
        let (mut xs, units) = ([Rows::default(); TOKENS], self.k / 32);
        for (x, t) in xs.iter_mut().zip(tokens.clone()) {
            x.blocks = args.slice(self.x, t * units, units);
            x.halves = halves.get(t * units..(t + 1) * units).unwrap_or_default();
        }
        xs
    }

    /// The results of the rows of a part for some tokens, with bias and residual, into `slot`; by the tile in that slot, if it is
    /// a part that tiles are made of.
    #[inline(always)]
    fn compute<I: Isa>(
        &self,
        args: Args<'_>,
        part: &Part,
        Span { rows, tokens }: &Span,
        slot: usize,
        work: &mut Work,
    ) {
        let n = tokens.len();
        let out = &mut work.results[slot];
        let units = self.k / 32;
        if part.layout == Layout::Interleaved16 && !work.shared[slot] {
            let xs = self.blocks(args, tokens, &work.halves);
            let weights = self.weights(args, part, rows);
            let strips =
                weights.chunks_exact(interleaved::STRIP_ROWS * blocks::bytes_of(part.format, self.k));
            for (h, strip) in strips.enumerate() {
                let (xs, sums) = (&xs[..n], &mut work.sums);
                macro_rules! multiply {
                    ($format:ty) => {
                        I::outline(MultiplyStrip::<$format> { strip, xs, sums, format: PhantomData })
                    };
                }
                with_interleaved!(part.format, multiply, ());
                for (out, sums) in out.iter_mut().zip(&work.sums).take(n) {
                    out[interleaved::STRIP_ROWS * h..][..interleaved::STRIP_ROWS].copy_from_slice(sums);
                }
            }
        } else if self.is_integer(part) {
            if const { I::TILE_TOKENS.is_some() } && work.shared[slot] {
                let xs = self.blocks(args, tokens, &work.halves);
                let split = blocks::is_split(part.format);
                I::outline(Multiply { tile: &work.tiles[slot], xs: &xs[..n], split, out });
            } else {
                work.prepared[slot].fill(args, self.x, tokens, units, blocks::order_of(part.format));
                let xs = work.prepared[slot].tokens(n);
                macro_rules! rows {
                    ($format:ty) => {
                        self.row_by_row::<I, Integers<$format>>(args, part, rows, &xs[..n], out)
                    };
                }
                with_format!(part.format, rows, ());
            }
        } else if self.x_type == DType::Q8Act {
            let mut xs = [&[][..]; TOKENS];
            xs.iter_mut().zip(tokens.clone()).for_each(|(x, t)| *x = args.slice(self.x, t * units, units));
            self.row_by_row::<I, Floats<Q8Block>>(args, part, rows, &xs[..n], out);
        } else if work.shared[slot] {
            let xs = args.slice(self.x, tokens.start * self.k, n * self.k);
            I::outline(MultiplyLanes { lanes: &work.lanes[slot], xs, out });
        } else {
            let mut xs = [&[][..]; TOKENS];
            xs.iter_mut().zip(tokens.clone()).for_each(|(x, t)| *x = args.slice(self.x, t * self.k, self.k));
            self.row_by_row::<I, Floats<F32>>(args, part, rows, &xs[..n], out);
        }
        if let Some(bias) = part.bias {
            let mut add = [0.0; ROWS];
            args.load(bias, rows.start, &mut add[..rows.len()]);
            for row in out.iter_mut().take(n) {
                row.iter_mut().zip(&add).for_each(|(y, b)| *y += b);
            }
        }
        if let Some(residual) = part.residual {
            let mut add = [0.0; ROWS];
            for (t, row) in tokens.clone().zip(out) {
                args.load(residual, t * part.rows + rows.start, &mut add[..rows.len()]);
                row.iter_mut().zip(&add).for_each(|(y, r)| *y += r);
            }
        }
    }

    #[inline(always)]
    fn row_by_row<I: Isa, E: rows::Engine>(
        &self,
        args: Args<'_>,
        part: &Part,
        rows: &Range<usize>,
        xs: &[&[E::X]],
        out: &mut Results,
    ) {
        let (format, k, weights) = (part.format, self.k, self.weights(args, part, rows));
        match xs {
            [_] => I::outline(RowByRow::<E, 1> { format, k, weights, xs, out }),
            _ => I::outline(RowByRow::<E, TOKENS> { format, k, weights, xs, out }),
        }
    }

    /// Finishes the results of some rows of a part for some tokens, and stores them.
    #[inline(always)]
    fn store<I: Isa>(&self, args: Args<'_>, part: &Part, span: &Span, work: &mut Work) {
        let Span { rows, tokens } = span;
        self.compute::<I>(args, part, span, 0, work);
        if let Epilogue::Swiglu { out } = self.epilogue {
            self.compute::<I>(args, &self.parts[1], span, 1, work);
            let [gate, up] = &mut work.results;
            for ((t, gate), up) in tokens.clone().zip(gate).zip(up) {
                for (g, u) in gate.iter_mut().zip(up) {
                    *g = silu::<I>(*g) * *u;
                }
                if self.quantised {
                    args.store(out, (t * part.rows + rows.start) / 32, &[quantise(gate)]);
                } else {
                    args.store(out, t * part.rows + rows.start, &gate[..rows.len()]);
                }
            }
            return;
        }
        for (t, y) in tokens.clone().zip(&work.results[0]) {
            let y = &y[..rows.len()];
            match part.out {
                Some(out) => args.store(out, t * part.rows + rows.start, y),
                None => work.best[t] = larger(work.best[t], (rows.start..).zip(y.iter().copied())),
            }
        }
    }
}

/// Rows of a part, at most [`ROWS`], and tokens, at most [`TOKENS`].
struct Span {
    rows: Range<usize>,
    tokens: Range<usize>,
}

/// What work items need while they run.
#[derive(Default)]
pub(super) struct Work {
    /// Whether the part at hand is computed by what all tokens share; and up beside gate, so all that come in twos.
    shared: [bool; 2],
    tiles: [Tile; 2],
    lanes: [Lanes; 2],
    results: [Results; 2],
    /// Results of a strip of interleaved rows.
    sums: Sums,
    /// Of every token, for tiles and strips of formats that split their blocks.
    halves: Vec<[f32; 2]>,
    /// The activations of the tokens at hand, for integer parts that are computed row by row.
    prepared: [Prepared; 2],
    /// For [`Epilogue::ArgMax`]: each token's largest result of the item.
    best: Vec<(usize, f32)>,
}

impl Kernel for Matmul {
    type Work = Work;

    #[inline(always)]
    fn run<I: Isa>(&self, work: &mut Work, args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let n = self.tokens.eval(syms) as usize;
        let needs_halves = |p: &Part| {
            let tile = tile_tokens::<I>(p.layout).is_some_and(|least| n >= least);
            let shared = tile || p.layout == Layout::Interleaved16;
            shared && self.is_integer(p) && blocks::is_split(p.format)
        };
        if work.halves.is_empty() && self.parts.iter().any(needs_halves) {
            work.halves = halves(args.slice(self.x, 0, n * (self.k / 32)));
        }
        for item in items {
            let Some((part, rows)) = self.locate(item) else { return };
            if self.best.is_some() {
                work.best.clear();
                work.best.resize(n, (rows.start, f32::NEG_INFINITY));
            }
            for start in rows.clone().step_by(ROWS) {
                let rows = start..(start + ROWS).min(rows.end);
                self.fill::<I>(args, part, &rows, n, 0, work);
                if let Epilogue::Swiglu { .. } = self.epilogue {
                    self.fill::<I>(args, &self.parts[1], &rows, n, 1, work);
                }
                for t in (0..n).step_by(TOKENS) {
                    let span = Span { rows: rows.clone(), tokens: t..(t + TOKENS).min(n) };
                    self.store::<I>(args, part, &span, work);
                }
            }
            if let Some(BestOfItems { value, index, items, .. }) = self.best {
                for (t, (row, best)) in work.best.iter().enumerate() {
                    args.store(value, t * items + item, &[*best]);
                    args.store(index, t * items + item, &[*row as i32]);
                }
            }
        }
    }
}

/// The best of what the items of a matmul found, for each token. An item is a token.
#[derive(Clone, Copy)]
pub(super) struct BestOfItems {
    /// f32 `[T,items]`.
    value: ArgId,
    /// i32 `[T,items]`.
    index: ArgId,
    out: ArgId,
    items: usize,
}

impl Kernel for BestOfItems {
    type Work = ();

    #[inline(always)]
    fn run<I: Isa>(&self, (): &mut (), args: Args<'_>, _: &Syms, tokens: Range<usize>) {
        for t in tokens {
            let mut best = (0, f32::NEG_INFINITY);
            for item in 0..self.items {
                let mut value = [0f32];
                args.load(self.value, t * self.items + item, &mut value);
                best = larger(best, std::iter::once((item, value[0])));
            }
            let row = args.integer(self.index, t * self.items + best.0);
            args.store(self.out, t, &[index_of((row as usize, best.1))]);
        }
    }
}

/// The first of the largest values, or a NaN if there is one.
#[inline(always)]
pub(super) fn larger(best: (usize, f32), values: impl Iterator<Item = (usize, f32)>) -> (usize, f32) {
    values.fold(best, |best, (i, v)| if v > best.1 || v.is_nan() { (i, v) } else { best })
}

/// What argmax returns for the [`larger`] of a row: -1 for a NaN.
#[inline(always)]
pub(super) fn index_of((i, value): (usize, f32)) -> i32 {
    if value.is_nan() { -1 } else { i as i32 }
}

#[cfg(test)]
mod tests;
