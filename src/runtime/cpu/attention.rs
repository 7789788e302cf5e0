//! Causal attention with a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867; Dao et al., 2022,
//! arXiv:2205.14135). An item is some heads that read one cache head, for some tokens; it goes over the cache [`KEYS`]
//! rows at a time, and decodes each once for all of its queries. Elements of a few queries are lanes of vectors; of many, the
//! queries are, so that an element of the cache meets all of them at once.

use super::args::{Args, F32, Q8Block};
use super::blocks;
use super::check::{self, ACTIVATIONS, BindError, CACHES, Check};
use super::isa::{Isa, WIDE, prefetch};
use super::math::{LANES, exp, quantise};
use super::rope_kv::MAX_HEAD;
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, AttentionSpec, Extent, KernelSpec};
use crate::ir::{DType, Dim};
use std::ops::Range;

/// The most queries of a work item.
const QUERIES: usize = WIDE;
/// The most queries that are taken one by one, not as lanes.
const FEW: usize = 8;
/// Cache rows between two updates of the running maximum.
const KEYS: usize = 32;

/// Queries, results and cache rows, [`WIDE`] numbers at a time: at the widest heads 384 KiB, too much for a stack.
#[derive(Default)]
pub(super) struct Work(Vec<[f32; WIDE]>);

impl Work {
    /// Room for three buffers of these lengths. Items leave in it what they like.
    #[inline(always)]
    fn split(&mut self, a: usize, b: usize, c: usize) -> [&mut [[f32; WIDE]]; 3] {
        if self.0.len() < a + b + c {
            self.0.resize(a + b + c, [0.0; WIDE]);
        }
        let (first, rest) = self.0.split_at_mut(a);
        let (second, rest) = rest.split_at_mut(b);
        [first, second, &mut rest[..c]]
    }
}

pub(super) struct Attention {
    q: ArgId,
    k: ArgId,
    k_type: DType,
    v: ArgId,
    v_type: DType,
    out: ArgId,
    quantised: bool,
    heads: usize,
    cache_heads: usize,
    head_dim: usize,
    scale: f32,
    /// Heads and tokens of an item.
    tile: (usize, usize),
}

impl Attention {
    pub fn bind(spec: &KernelSpec, m: &AttentionSpec) -> Result<Attention, BindError> {
        let mut check = Check::new(spec)?;
        let heads = check::size("the heads", m.heads)?;
        let cache_heads = check::size("the cache heads", m.cache_heads)?;
        let head_dim = check::size("the head dimension", m.head_dim)?;
        let n = check::size("a row of queries", m.heads.saturating_mul(m.head_dim))?;
        if head_dim > MAX_HEAD {
            return check::parameter(format!("heads of {head_dim} are wider than {MAX_HEAD}"));
        }
        if heads % cache_heads != 0 {
            return check::parameter(format!("{cache_heads} cache heads do not divide {heads} heads"));
        }
        if !m.scale.is_finite() {
            return check::parameter(format!("the scale must not be {}", m.scale));
        }
        check.tokens("the queries", m.q, Access::Read, &[DType::F32], Some(Dim::T), n)?;
        let shape = [Dim::S, Dim::n(m.cache_heads), Dim::n(m.head_dim)];
        let k_type = check.exact("the keys", m.k, Access::Read, CACHES, &shape)?;
        let v_type = check.exact("the values", m.v, Access::Read, CACHES, &shape)?;
        let (out, _) = check.tokens("the result", m.out, Access::Write, ACTIVATIONS, Some(Dim::T), n)?;
        let quantised = out == DType::Q8Act;
        if quantised && head_dim % 32 != 0 {
            return check::parameter(format!("heads of {head_dim} are not whole blocks of 32"));
        }
        check.may_alias(m.out, m.q);
        let per = |axis: usize| spec.grid.get(axis).map_or(1, |e| e.per);
        let tile = (per(0) as usize, per(1) as usize);
        let queries = tile.0.saturating_mul(tile.1);
        if tile.0 == 0 || (heads / cache_heads) % tile.0 != 0 || !(1..=QUERIES).contains(&queries) {
            return check::parameter(format!(
                "an item must be at most {QUERIES} queries of heads that share a cache head, not {} heads of {} tokens",
                tile.0, tile.1
            ));
        }
        check.done(&[Extent { dim: Dim::n(m.heads), per: per(0) }, Extent { dim: Dim::T, per: per(1) }])?;
        let AttentionSpec { q, k, v, out, scale, .. } = *m;
        Ok(Attention { q, k, k_type, v, v_type, out, quantised, heads, cache_heads, head_dim, scale, tile })
    }

    /// The rows of one head of a cache.
    #[inline(always)]
    fn stored<'a>(&self, args: Args<'a>, cache: ArgId, dtype: DType, head: usize, rows: usize) -> Stored<'a> {
        let width = blocks::bytes_of(dtype, self.head_dim);
        let stride = self.cache_heads * width;
        let bytes = args.slice(cache, head * width, rows.saturating_sub(1) * stride + width);
        Stored { dtype, bytes, stride, width }
    }

    #[inline(always)]
    fn item<'a>(&self, args: Args<'a>, heads: Range<usize>, tokens: Range<usize>, past: usize) -> Item<'a> {
        let cache_head = heads.start / (self.heads / self.cache_heads);
        let (first, last) = (past + tokens.start, past + tokens.end);
        let k = self.stored(args, self.k, self.k_type, cache_head, last);
        let v = self.stored(args, self.v, self.v_type, cache_head, last);
        Item { n: heads.len() * tokens.len(), heads, tokens, first, last, k, v }
    }

    /// Where a query's row begins in the queries and in the result.
    #[inline(always)]
    fn place(&self, token: usize, head: usize) -> usize {
        (token * self.heads + head) * self.head_dim
    }

    /// Stores a query's result.
    #[inline(always)]
    fn store(&self, args: Args<'_>, token: usize, head: usize, y: &[f32]) {
        let place = self.place(token, head);
        if self.quantised {
            for (i, y) in y.as_chunks::<32>().0.iter().enumerate() {
                args.store::<Q8Block>(self.out, place / 32 + i, &[quantise(y)]);
            }
        } else {
            args.store(self.out, place, y);
        }
    }

    /// At most [`FEW`] queries of at most `C` times [`WIDE`] elements. Each row of the cache is decoded once for all of them.
    #[inline(always)]
    fn few<I: Isa, const C: usize>(&self, work: &mut Work, args: Args<'_>, item: &Item<'_>) {
        let d = self.head_dim;
        let Item { n, first, last, k, v, .. } = *item;
        let chunks = d.div_ceil(WIDE);
        let [queries, out, values] = work.split(FEW * C, FEW * C, KEYS * C);
        let queries = &mut queries.as_chunks_mut::<C>().0[..n];
        for (i, to) in queries.iter_mut().enumerate() {
            let (token, head) = item.query(i);
            let (to, beyond) = to.as_flattened_mut().split_at_mut(d);
            args.load(self.q, self.place(token, head), to);
            beyond.fill(0.0);
        }
        // Columns of results, [`WIDE`] at a time, by query; and of values.
        let out = &mut out.as_chunks_mut::<FEW>().0[..chunks];
        out.iter_mut().for_each(|out| out[..n].fill([0.0; WIDE]));
        let values = &mut values.as_chunks_mut::<KEYS>().0[..chunks];
        let mut row = [[0.0; WIDE]; C];
        let (mut max, mut total) = ([f32::NEG_INFINITY; FEW], [0.0; FEW]);
        for start in (0..last).step_by(KEYS) {
            let keys = start..last.min(start + KEYS);
            // What is beyond the last row, or not seen, weighs nothing.
            let mut weights = [[f32::NEG_INFINITY; KEYS]; FEW];
            for (j, key) in keys.clone().enumerate() {
                v.ask(key);
                k.decode_wide::<I, C>(key, d, &mut row);
                for (i, query) in queries.iter().enumerate() {
                    if key <= item.seen(i) {
                        weights[i][j] = wide_dot::<I, C>(query, &row) * self.scale;
                    }
                }
            }
            for (i, weights) in weights[..n].iter_mut().enumerate() {
                let new = max[i].max(largest(weights));
                let shrink = exp::<I>(max[i] - new);
                max[i] = new;
                weights.iter_mut().for_each(|s| *s = exp::<I>(*s - new));
                total[i] = total[i] * shrink + I::sum(&folded(weights));
                for out in out.iter_mut() {
                    out[i].iter_mut().for_each(|y| *y *= shrink);
                }
            }
            for (j, key) in keys.clone().enumerate() {
                k.ask(key + KEYS);
                v.decode_wide::<I, C>(key, d, &mut row);
                let masked = key > first && !row.as_flattened().iter().all(|v| v.is_finite());
                for ((values, row), out) in values.iter_mut().zip(&mut row).zip(out.iter_mut()) {
                    if masked {
                        for (out, weights) in out.iter_mut().zip(&weights).filter(|(_, w)| w[j] != 0.0) {
                            out.iter_mut().zip(row.iter()).for_each(|(y, v)| *y += weights[j] * v);
                        }
                        row.fill(0.0);
                    }
                    values[j] = *row;
                }
            }
            let weights = bytemuck::cast_slice(weights.as_flattened());
            for (values, out) in values.iter().zip(out.iter_mut()) {
                I::lane_products(&values[..keys.len()], weights, KEYS, 1, &mut out[..n]);
            }
        }
        for i in 0..n {
            for (row, out) in row.iter_mut().zip(out.iter()) {
                row.iter_mut().zip(&out[i]).for_each(|(to, y)| *to = y / total[i]);
            }
            let (token, head) = item.query(i);
            self.store(args, token, head, &row.as_flattened()[..d]);
        }
    }

    /// All queries of an item, of at most `D` elements: query `i` is lane `i`.
    #[inline(always)]
    fn many<I: Isa, const D: usize>(&self, work: &mut Work, args: Args<'_>, item: &Item<'_>) {
        let d = self.head_dim;
        let Item { n, first, last, k, v, .. } = *item;
        let [queries, out, rows] = work.split(d, d, KEYS * D / WIDE);
        let rows = rows.as_flattened_mut().as_chunks_mut::<D>().0;
        out.fill([0.0; WIDE]);
        let mut row = [0.0; D];
        // Lanes without a query see all, of nothing; nobody looks at their results.
        if n < WIDE {
            queries.fill([0.0; WIDE]);
        }
        let mut seen = [last as i32; WIDE];
        for i in 0..n {
            let (token, head) = item.query(i);
            args.load(self.q, self.place(token, head), &mut row[..d]);
            for (lanes, x) in queries.iter_mut().zip(&row) {
                lanes[i] = *x * self.scale;
            }
            seen[i] = (item.seen(i) + 1) as i32;
        }
        let (mut max, mut total) = ([f32::NEG_INFINITY; WIDE], [0.0; WIDE]);
        for start in (0..last).step_by(KEYS) {
            let keys = start..last.min(start + KEYS);
            for (key, row) in keys.clone().zip(rows.iter_mut()) {
                k.decode::<I>(key, &mut row[..d]);
            }
            let mut weights = [[0.0; WIDE]; KEYS];
            let weights = &mut weights[..keys.len()];
            I::lane_products(queries, bytemuck::cast_slice(rows.as_flattened()), D, 1, weights);
            let mut new = max;
            for (key, weights) in keys.clone().zip(weights.iter_mut()) {
                for l in 0..WIDE {
                    weights[l] = if (key as i32) < seen[l] { weights[l] } else { f32::NEG_INFINITY };
                    new[l] = if weights[l] > new[l] { weights[l] } else { new[l] };
                }
            }
            let mut shrink = [0.0; WIDE];
            for l in 0..WIDE {
                shrink[l] = exp::<I>(max[l] - new[l]);
                total[l] *= shrink[l];
            }
            max = new;
            for weights in weights.iter_mut() {
                for l in 0..WIDE {
                    weights[l] = exp::<I>(weights[l] - max[l]);
                    total[l] += weights[l];
                }
            }
            for out in out.iter_mut() {
                for l in 0..WIDE {
                    out[l] *= shrink[l];
                }
            }
            for ((key, row), weights) in keys.zip(rows.iter_mut()).zip(weights.iter()) {
                let row = &mut row[..d];
                v.decode::<I>(key, row);
                if key > first && !row.iter().all(|v| v.is_finite()) {
                    add_seen(weights, row, out);
                    row.fill(0.0);
                }
            }
            I::lane_products(weights, bytemuck::cast_slice(rows.as_flattened()), 1, D, out);
        }
        for i in 0..n {
            for (y, lanes) in row.iter_mut().zip(out.iter()) {
                *y = lanes[i] / total[i];
            }
            let (token, head) = item.query(i);
            self.store(args, token, head, &row[..d]);
        }
    }
}

/// Adds a cache row to the lanes in which it weighs anything: where a later token has a value that is not finite, 0 times
/// that would be NaN in those that do not see it.
#[cold]
fn add_seen(weights: &[f32; WIDE], row: &[f32], out: &mut [[f32; WIDE]]) {
    for (out, v) in out.iter_mut().zip(row) {
        for (out, weight) in out.iter_mut().zip(weights) {
            if *weight != 0.0 {
                *out += weight * v;
            }
        }
    }
}

/// The largest of the numbers.
#[inline(always)]
fn largest(x: &[f32; KEYS]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

/// `Σ a·b`.
#[inline(always)]
fn wide_dot<I: Isa, const C: usize>(a: &[[f32; WIDE]; C], b: &[[f32; WIDE]; C]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        let b: &[F32; WIDE] = bytemuck::cast_ref(b);
        for (a, b) in a.as_chunks().0.iter().zip(b.as_chunks().0) {
            I::mul_add_lanes(a, b, &mut lanes);
        }
    }
    I::sum(&lanes)
}

/// The sums of the numbers that fall on the same lane.
#[inline(always)]
fn folded(x: &[f32; KEYS]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += x;
        }
    }
    lanes
}

/// Some heads that read one cache head, for some tokens.
struct Item<'a> {
    heads: Range<usize>,
    tokens: Range<usize>,
    /// How many queries that are.
    n: usize,
    /// The last cache row that all of them see, and the end of those that any sees.
    first: usize,
    last: usize,
    k: Stored<'a>,
    v: Stored<'a>,
}

impl Item<'_> {
    /// The token and the head of query `i`.
    #[inline(always)]
    fn query(&self, i: usize) -> (usize, usize) {
        (self.tokens.start + i / self.heads.len(), self.heads.start + i % self.heads.len())
    }

    /// The last cache row that query `i` sees.
    #[inline(always)]
    fn seen(&self, i: usize) -> usize {
        self.first + i / self.heads.len()
    }
}

/// The rows of one head of a cache, as they are stored.
#[derive(Clone, Copy)]
struct Stored<'a> {
    dtype: DType,
    bytes: &'a [u8],
    /// From a row to the next, in bytes.
    stride: usize,
    width: usize,
}

impl Stored<'_> {
    /// A row in floats.
    #[inline(always)]
    fn decode<I: Isa>(&self, row: usize, to: &mut [f32]) {
        blocks::decode_plain::<I>(self.dtype, &self.bytes[row * self.stride..][..self.width], to);
    }

    /// The same, in front of zeros, and in loops of constant length where there are none.
    #[inline(always)]
    fn decode_wide<I: Isa, const C: usize>(&self, row: usize, d: usize, to: &mut [[f32; WIDE]; C]) {
        if self.dtype != DType::F16 || d != C * WIDE {
            return self.decode::<I>(row, &mut to.as_flattened_mut()[..d]);
        }
        let halves = &self.bytes[row * self.stride..][..2 * C * WIDE];
        for (to, halves) in to.iter_mut().zip(halves.as_chunks::<{ 2 * WIDE }>().0) {
            for (to, halves) in to.as_chunks_mut::<16>().0.iter_mut().zip(halves.as_chunks::<32>().0) {
                I::from_halves(halves, to);
            }
        }
    }

    /// Asks for a row that is needed soon, if there is one. Rows of one head lie so far apart that the processor does not
    /// guess the next.
    #[inline(always)]
    fn ask(&self, row: usize) {
        let at = self.bytes.as_ptr().wrapping_add(row * self.stride);
        for line in (0..self.width).step_by(64) {
            prefetch(at.wrapping_add(line));
        }
    }
}

impl Kernel for Attention {
    type Work = Work;

    #[inline(always)]
    fn run<I: Isa>(&self, work: &mut Work, args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let (n, past) = (syms.t as usize, syms.p as usize);
        let tiles = n.div_ceil(self.tile.1);
        for item in items {
            let (head, t) = (item / tiles * self.tile.0, item % tiles * self.tile.1);
            let tokens = t..(t + self.tile.1).min(n);
            let item = self.item(args, head..head + self.tile.0, tokens, past);
            // Small heads get loops of small constant length.
            match (item.n <= FEW, self.head_dim) {
                (true, ..=64) => self.few::<I, 2>(work, args, &item),
                (true, ..=128) => self.few::<I, 4>(work, args, &item),
                (true, ..=256) => self.few::<I, 8>(work, args, &item),
                (true, _) => self.few::<I, { MAX_HEAD / WIDE }>(work, args, &item),
                (false, ..=128) => self.many::<I, 128>(work, args, &item),
                (false, _) => self.many::<I, MAX_HEAD>(work, args, &item),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Features, bind};
    use super::*;
    use crate::codegen::spec::{Alias, Template};

    fn attention(heads: u64, cache_heads: u64, head_dim: u64, cache: DType, out: DType) -> KernelSpec {
        let rows = |access, dtype| arg(access, dtype, [Dim::T, n(heads * head_dim)]);
        let cache = || arg(Access::Read, cache, [Dim::S, n(cache_heads), n(head_dim)]);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let m = AttentionSpec { q: 0, k: 1, v: 2, out: 3, heads, cache_heads, head_dim, scale };
        let args = vec![rows(Access::Read, DType::F32), cache(), cache(), rows(Access::Write, out)];
        spec(Template::Attention(m), args, grid(heads, 1, 8))
    }

    /// Items of `a` heads and `b` tokens.
    fn grid(heads: u64, a: u32, b: u32) -> Vec<Extent> {
        vec![Extent { dim: n(heads), per: a }, Extent { dim: Dim::T, per: b }]
    }

    fn inputs(spec: &KernelSpec, at: &Syms, seed: u64) -> Vec<Option<Vec<u8>>> {
        let mut rng = rng(seed);
        let mut inputs: Vec<_> = spec
            .args
            .iter()
            .map(|a| Some(random(&mut rng, a.ty.dtype, a.ty.elements(at) as usize)))
            .collect();
        inputs[3] = None;
        inputs
    }

    fn reference(spec: &KernelSpec, at: &Syms, inputs: &[Option<Vec<u8>>]) -> Vec<f64> {
        let Template::Attention(m) = &spec.template else { unreachable!() };
        let get = |i: usize| values(spec.args[i].ty.dtype, inputs[i].as_ref().unwrap());
        let (q, k, v, d) = (get(0), get(1), get(2), m.head_dim as usize);
        let (h, g) = (m.heads as usize, m.cache_heads as usize);
        let mut out = vec![0.0; q.len()];
        for (i, q) in q.chunks(d).enumerate() {
            let (t, head) = (i / h, i % h);
            let row = |l: usize| (l * g + head * g / h) * d;
            let scores: Vec<f64> = (0..=at.p as usize + t)
                .map(|l| {
                    let dot: f64 = q.iter().zip(&k[row(l)..]).map(|(q, k)| q * k).sum();
                    dot * f64::from(m.scale)
                })
                .collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for (l, s) in scores.iter().enumerate() {
                for (y, v) in out[i * d..(i + 1) * d].iter_mut().zip(&v[row(l)..]) {
                    *y += (s - max).exp() / total * v;
                }
            }
        }
        out
    }

    #[test]
    fn agrees_with_softmax_in_double_precision() {
        for (t, past, d, heads, cache_heads, cache, out, tolerance) in [
            (1, 0, 64, 2, 2, DType::F32, DType::F32, 1e-6),
            (1, 40, 80, 8, 1, DType::F32, DType::F32, 1e-6),
            (5, 3, 2, 12, 2, DType::F16, DType::F32, 1e-6),
            (1, 500, 64, 4, 2, DType::F16, DType::F32, 1e-6),
            (7, 31, 32, 6, 2, DType::F16, DType::Q8Act, 5e-3),
            (33, 40, 128, 2, 1, DType::F32, DType::F32, 1e-6),
            (33, 0, 13, 3, 3, DType::F16, DType::F32, 1e-6),
            (2, 70, 256, 2, 1, DType::F16, DType::F32, 1e-6),
            (1, 3, 1024, 1, 1, DType::F32, DType::F32, 1e-6),
            // Many queries of wide heads, and a cache whose last block is not whole.
            (33, 5, 192, 2, 1, DType::F16, DType::F32, 1e-6),
            (10, 601, 160, 2, 2, DType::F32, DType::F32, 2e-6),
            (1, 777, 128, 4, 1, DType::F16, DType::F32, 2e-6),
            (9, 31, 1024, 2, 1, DType::F16, DType::Q8Act, 5e-3),
        ] {
            let mut spec = attention(heads, cache_heads, d, cache, out);
            let at = syms(t, past, past + t + 3);
            let inputs = inputs(&spec, &at, t);
            let want = reference(&spec, &at, &inputs);
            let group = (heads / cache_heads) as u32;
            for (a, b) in [(1, 1), (1, 32), (group, 32 / group), (group, 1)] {
                spec.grid = grid(heads, a, b);
                let have = values(out, &launch_all(&spec, &at, &inputs, 3));
                let have: Vec<f32> = have.iter().map(|x| *x as f32).collect();
                assert_close(&have, &want, tolerance);
            }
        }
    }

    #[test]
    fn chunks_change_little_and_the_result_may_lie_on_the_queries() {
        let mut spec = attention(4, 2, 64, DType::F16, DType::F32);
        spec.grid = grid(4, 2, 16);
        spec.may_alias.push(Alias { write: 3, read: 0 });
        let at = syms(41, 0, 50);
        let whole = inputs(&spec, &at, 5);
        for features in Features::available() {
            let want = to_f32s(&launch(&spec, &features, &at, &whole, None)[3]);
            let want: Vec<f64> = want.into_iter().map(f64::from).collect();
            for chunk in [1, 7, 32] {
                let mut have = vec![];
                for (i, q) in whole[0].as_ref().unwrap().chunks(chunk * 1024).enumerate() {
                    let part = [Some(q.to_vec()), whole[1].clone(), whole[2].clone(), None];
                    let at = syms(q.len() as u64 / 1024, (i * chunk) as u64, 50);
                    have.extend(launch(&spec, &features, &at, &part, Some((3, 0))).swap_remove(3));
                }
                assert_close(&to_f32s(&have), &want, 1e-6);
            }
        }
    }

    #[test]
    fn large_scores_and_numbers_that_are_none() {
        let mut spec = attention(1, 1, 32, DType::F32, DType::F32);
        let Template::Attention(m) = &mut spec.template else { unreachable!() };
        m.scale = 300.0;
        let at = syms(2, 60, 62);
        let mut inputs = inputs(&spec, &at, 6);
        let have = to_f32s(&launch_all(&spec, &at, &inputs, 3));
        assert_close(&have, &reference(&spec, &at, &inputs), 1e-2);
        inputs[1].as_mut().unwrap()[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let have = to_f32s(&launch(&spec, &Features::detect(), &at, &inputs, None)[3]);
        assert!(have.iter().all(|x| x.is_nan()), "a NaN among the keys is not lost");
    }

    #[test]
    fn what_a_token_does_not_see_does_not_reach_it() {
        for (t, past, cache) in [(40, 0, DType::F32), (9, 30, DType::F16)] {
            let mut spec = attention(2, 1, 32, cache, DType::F32);
            let at = syms(t, past, past + t);
            let mut inputs = inputs(&spec, &at, 7);
            // A value that only the last three tokens see.
            let place = (past + t - 3) as usize * 32 * cache.block_bytes();
            let infinite = if cache == DType::F32 { vec![0, 0, 0x80, 0x7f] } else { vec![0, 0x7c] };
            inputs[2].as_mut().unwrap()[place..place + infinite.len()].copy_from_slice(&infinite);
            for (features, (a, b)) in Features::available()
                .iter()
                .flat_map(|f| [(1, 1), (2, 4), (1, 8), (2, 16)].map(|grid| (f, grid)))
            {
                spec.grid = grid(2, a, b);
                let have = to_f32s(&launch(&spec, features, &at, &inputs, None)[3]);
                for (i, x) in have.iter().enumerate() {
                    let (token, column) = (i as u64 / 64, i % 32);
                    assert_eq!(x.is_finite(), token + 3 < t || column > 0, "token {token}, column {column}");
                }
            }
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let refuse = |name: &str, change: &dyn Fn(&mut KernelSpec, &mut AttentionSpec)| {
            let mut spec = attention(4, 2, 64, DType::F16, DType::F32);
            assert!(bind(&spec, &Features::baseline()).is_ok());
            let Template::Attention(mut m) = spec.template.clone() else { unreachable!() };
            change(&mut spec, &mut m);
            spec.template = Template::Attention(m);
            assert!(bind(&spec, &Features::baseline()).is_err(), "{name}");
        };
        refuse("no heads", &|_, m| m.heads = 0);
        refuse("no cache heads", &|_, m| m.cache_heads = 0);
        refuse("cache heads", &|s, m| {
            m.cache_heads = 3;
            s.args[1].ty.shape[1] = n(3);
            s.args[2].ty.shape[1] = n(3);
        });
        refuse("head dimension", &|_, m| m.head_dim = 32);
        refuse("wide heads", &|s, m| {
            m.head_dim = 2048;
            s.args.iter_mut().for_each(|a| *a.ty.shape.last_mut().unwrap() = n(2048));
        });
        refuse("scale", &|_, m| m.scale = f32::INFINITY);
        refuse("queries of one token", &|s, _| s.args[0].ty.shape[0] = n(1));
        refuse("queries of halves", &|s, _| s.args[0].ty.dtype = DType::F16);
        refuse("keys of few rows", &|s, _| s.args[1].ty.shape[0] = Dim::T);
        refuse("quantised values", &|s, _| s.args[2].ty.dtype = DType::Q8_0);
        refuse("keys written", &|s, _| s.args[1].access = Access::Update);
        refuse("result", &|s, _| s.args[3].ty.shape[1] = n(64));
        refuse("a quantised result on the queries", &|s, _| {
            s.args[3].ty.dtype = DType::Q8Act;
            s.may_alias.push(Alias { write: 3, read: 0 });
        });
        refuse("a result on the keys", &|s, _| s.may_alias.push(Alias { write: 3, read: 1 }));
        refuse("grid", &|s, _| s.grid.swap(0, 1));
        refuse("an item without heads", &|s, _| s.grid = grid(4, 0, 8));
        refuse("an item across cache heads", &|s, _| s.grid = grid(4, 4, 8));
        refuse("more queries than lanes", &|s, _| s.grid = grid(4, 2, 17));
        let odd = attention(8, 8, 20, DType::F16, DType::Q8Act);
        assert!(bind(&odd, &Features::baseline()).is_err(), "blocks across heads");
    }
}
