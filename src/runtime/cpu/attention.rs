//! Causal attention with a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867; Dao et al., 2022,
//! arXiv:2205.14135), over caches in pages (Kwon et al., 2023, arXiv:2309.06180). An item is some heads that read one KV head, for
//! some tokens, which are taken in runs of one sequence. A run goes over what its queries see [`KEYS`] rows at a time, and decodes
//! each once for all of them. Elements of a few queries are lanes of vectors; of many, the queries are, so that an element of
//! the cache meets all of them at once.

use super::args::{Args, F32, Q8Block};
use super::binding::{self, ACTIVATIONS, BindError, Binding, CACHES};
use super::blocks;
use super::isa::{Isa, WIDE, prefetch};
use super::math::{LANES, exp, quantise, seen};
use super::rope_kv::MAX_HEAD;
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, AttentionSpec, Extent, Implementation};
use crate::ir::{DType, Dim};
use std::ops::Range;

/// The most queries of a work item.
const QUERIES: usize = WIDE;
/// The most queries that are taken one by one, not as lanes.
const SHARED_QUERIES: usize = 8;
/// Keys between two updates of the running maximum. Pages are multiples of as many rows, so that they lie one after another.
const KEYS: usize = 32;

/// Where running maxima begin. It is finite: from -∞, that of a query from which the first keys are hidden, -∞ less that would be
/// NaN.
const LOWEST: f32 = f32::MIN;

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
    tables: ArgId,
    lengths: ArgId,
    sequences: ArgId,
    positions: ArgId,
    out: ArgId,
    quantised: bool,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    window: Option<usize>,
    paging: Paging,
    /// Heads and tokens of an item.
    tile: (usize, usize),
}

/// How the rows of sequences lie in the caches.
#[derive(Clone, Copy)]
struct Paging {
    /// Rows of a page.
    page: usize,
    /// Pages of a cache.
    pages: usize,
    sequences: usize,
    /// Pages that a sequence may have.
    each: usize,
}

impl Paging {
    fn bind(check: &mut Binding<'_>, m: &AttentionSpec) -> Result<Paging, BindError> {
        let shape = |role, arg: ArgId, axis: usize| {
            let dim = check.ty(role, arg)?.shape.get(axis).and_then(|d| d.as_const());
            Ok::<u64, BindError>(dim.unwrap_or(0))
        };
        let rows = shape("the keys", m.k, 0)?;
        let (sequences, each) =
            (shape("the block tables", m.tables, 0)?, shape("the block tables", m.tables, 1)?);
        let page = u64::from(m.page);
        if page == 0 || page % KEYS as u64 != 0 || rows % page != 0 {
            return binding::parameter(format!(
                "{rows} rows in pages of {page} are not whole blocks of {KEYS}"
            ));
        }
        binding::size("the rows of a cache", rows)?;
        let longest = binding::size("the positions of a sequence", each.saturating_mul(page))? as u64;
        check.index(
            "the block tables",
            m.tables,
            &[sequences, each].map(Dim::n),
            Dim::n(rows / page),
            false,
        )?;
        check.index("the lengths", m.lengths, &[Dim::n(sequences)], Dim::n(longest + 1), false)?;
        check.index("the sequences", m.sequences, &[Dim::T], Dim::n(sequences), false)?;
        Ok(Paging {
            page: page as usize,
            pages: (rows / page) as usize,
            sequences: binding::size("the sequences", sequences)?,
            each: each as usize,
        })
    }
}

impl Attention {
    pub fn bind(kernel: &Implementation, m: &AttentionSpec) -> Result<Attention, BindError> {
        let mut check = Binding::new(kernel)?;
        let heads = binding::size("the heads", m.heads)?;
        let kv_heads = binding::size("the KV heads", m.kv_heads)?;
        let head_dim = binding::size("the head dimension", m.head_dim)?;
        let n = binding::size("a row of queries", m.heads.saturating_mul(m.head_dim))?;
        if head_dim > MAX_HEAD {
            return binding::parameter(format!("heads of {head_dim} are wider than {MAX_HEAD}"));
        }
        if heads % kv_heads != 0 {
            return binding::parameter(format!("{kv_heads} KV heads do not divide {heads} heads"));
        }
        if !m.scale.is_finite() {
            return binding::parameter(format!("the scale must not be {}", m.scale));
        }
        if m.window == Some(0) {
            return binding::parameter("a window of 0 sees nothing");
        }
        check.tokens("the queries", m.q, Access::Read, &[DType::F32], Some(Dim::T), n)?;
        let paging = Paging::bind(&mut check, m)?;
        check.per_token("the positions", m.positions, Dim::T)?;
        let shape = [(paging.page * paging.pages) as u64, m.kv_heads, m.head_dim].map(Dim::n);
        let k_type = check.exact("the keys", m.k, Access::Read, CACHES, &shape)?;
        let v_type = check.exact("the values", m.v, Access::Read, CACHES, &shape)?;
        let (out, _) = check.tokens("the result", m.out, Access::Write, ACTIVATIONS, Some(Dim::T), n)?;
        let quantised = out == DType::Q8Act;
        if quantised && head_dim % 32 != 0 {
            return binding::parameter(format!("heads of {head_dim} are not whole blocks of 32"));
        }
        check.may_alias(m.out, m.q);
        let grid = kernel.launches.first().map_or(&[][..], |launch| &launch.grid);
        let per = |axis: usize| grid.get(axis).map_or(1, |e| e.per);
        let tile = (per(0) as usize, per(1) as usize);
        let queries = tile.0.saturating_mul(tile.1);
        if tile.0 == 0 || (heads / kv_heads) % tile.0 != 0 || !(1..=QUERIES).contains(&queries) {
            return binding::parameter(format!(
                "an item must be at most {QUERIES} queries of heads that share a KV head, not {} heads of {} tokens",
                tile.0, tile.1
            ));
        }
        check.done(&[Extent { dim: Dim::n(m.heads), per: per(0) }, Extent { dim: Dim::T, per: per(1) }])?;
        let AttentionSpec { q, k, v, tables, lengths, sequences, positions, out, scale, .. } = *m;
        Ok(Attention {
            q,
            k,
            k_type,
            v,
            v_type,
            tables,
            lengths,
            sequences,
            positions,
            out,
            quantised,
            heads,
            kv_heads,
            head_dim,
            scale,
            window: m.window.map(|window| window as usize),
            paging,
            tile,
        })
    }

    /// The row of the caches where a key of a sequence lies; those of the rest of its block follow.
    #[inline(always)]
    fn row(&self, args: Args<'_>, sequence: usize, key: usize) -> usize {
        let Paging { page, pages, each, .. } = self.paging;
        args.index(self.tables, sequence * each + key / page, pages) * page + key % page
    }

    /// All rows of one head of a cache.
    #[inline(always)]
    fn stored<'a>(&self, args: Args<'a>, cache: ArgId, dtype: DType, head: usize) -> Stored<'a> {
        let width = blocks::bytes_of(dtype, self.head_dim);
        let stride = self.kv_heads * width;
        let bytes =
            args.slice(cache, head * width, (self.paging.page * self.paging.pages - 1) * stride + width);
        Stored { dtype, bytes, stride, width }
    }

    /// Some heads, for the first of `tokens` and those after it that are of the same sequence.
    #[inline(always)]
    fn item<'a>(&self, args: Args<'a>, heads: Range<usize>, tokens: Range<usize>) -> Item<'a> {
        let Paging { page, sequences, each, .. } = self.paging;
        let of = |token: usize| args.index(self.sequences, token, sequences);
        let sequence = of(tokens.start);
        let more = tokens.clone().skip(1).take_while(|&token| of(token) == sequence).count();
        let tokens = tokens.start..tokens.start + 1 + more;
        let length = args.index(self.lengths, sequence, page * each + 1);
        // Lanes without a query see all, of nothing; nobody looks at their results.
        let mut sees = [(0, i32::MAX); QUERIES];
        let (mut any, mut all) = (Range { start: usize::MAX, end: 0 }, 0..length);
        for (token, sees) in tokens.clone().zip(sees.chunks_mut(heads.len())) {
            let Range { start, end } = seen(args.integer(self.positions, token), self.window);
            let (start, end) = if start < end.min(length) { (start, end.min(length)) } else { (0, 0) };
            sees.fill((start as i32, end as i32));
            all = all.start.max(start)..all.end.min(end);
            if start < end {
                any = any.start.min(start)..any.end.max(end);
            }
        }
        any.start = any.start.min(any.end);
        let kv_head = heads.start / (self.heads / self.kv_heads);
        let k = self.stored(args, self.k, self.k_type, kv_head);
        let v = self.stored(args, self.v, self.v_type, kv_head);
        Item { n: heads.len() * tokens.len(), heads, tokens, sequence, sees, any, all, k, v }
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

    /// At most [`SHARED_QUERIES`] queries of at most `C` times [`WIDE`] elements. Each row of the cache is decoded once for all of them.
    #[inline(always)]
    fn by_elements<I: Isa, const C: usize>(&self, work: &mut Work, args: Args<'_>, item: &Item<'_>) {
        let d = self.head_dim;
        let Item { n, k, v, .. } = *item;
        let chunks = d.div_ceil(WIDE);
        let [queries, out, values] = work.split(SHARED_QUERIES * C, SHARED_QUERIES * C, KEYS * C);
        let queries = &mut queries.as_chunks_mut::<C>().0[..n];
        for (i, to) in queries.iter_mut().enumerate() {
            let (token, head) = item.query(i);
            let (to, beyond) = to.as_flattened_mut().split_at_mut(d);
            args.load(self.q, self.place(token, head), to);
            beyond.fill(0.0);
        }
        // Columns of results, [`WIDE`] at a time, by query; and of values.
        let out = &mut out.as_chunks_mut::<SHARED_QUERIES>().0[..chunks];
        out.iter_mut().for_each(|out| out[..n].fill([0.0; WIDE]));
        let values = &mut values.as_chunks_mut::<KEYS>().0[..chunks];
        let mut row = [[0.0; WIDE]; C];
        let (mut max, mut total) = ([LOWEST; SHARED_QUERIES], [0.0; SHARED_QUERIES]);
        let mut at = self.row(args, item.sequence, item.any.start);
        for keys in blocks_of(&item.any) {
            let more = keys.end < item.any.end;
            let next = if more { self.row(args, item.sequence, keys.end) } else { at };
            let whole = item.all.start <= keys.start && keys.end <= item.all.end;
            // What is beyond the last row, or not seen, weighs nothing.
            let mut weights = [[f32::NEG_INFINITY; KEYS]; SHARED_QUERIES];
            for (j, key) in keys.clone().enumerate() {
                v.prefetch(at + j);
                k.decode_wide::<I, C>(at + j, d, &mut row);
                for (i, query) in queries.iter().enumerate() {
                    if whole || item.sees(i, key) {
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
                if more {
                    k.prefetch(next + j);
                }
                v.decode_wide::<I, C>(at + j, d, &mut row);
                let masked = !item.all.contains(&key) && !row.as_flattened().iter().all(|v| v.is_finite());
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
            at = next;
        }
        for i in 0..n {
            let total = item.total(i, total[i]);
            for (row, out) in row.iter_mut().zip(out.iter()) {
                row.iter_mut().zip(&out[i]).for_each(|(to, y)| *to = y / total);
            }
            let (token, head) = item.query(i);
            self.store(args, token, head, &row.as_flattened()[..d]);
        }
    }

    /// All queries of an item, of at most `D` elements: query `i` is lane `i`.
    #[inline(always)]
    fn by_queries<I: Isa, const D: usize>(&self, work: &mut Work, args: Args<'_>, item: &Item<'_>) {
        let d = self.head_dim;
        let Item { n, k, v, .. } = *item;
        let [queries, out, rows] = work.split(d, d, KEYS * D / WIDE);
        let rows = rows.as_flattened_mut().as_chunks_mut::<D>().0;
        out.fill([0.0; WIDE]);
        let mut row = [0.0; D];
        if n < WIDE {
            queries.fill([0.0; WIDE]);
        }
        for i in 0..n {
            let (token, head) = item.query(i);
            args.load(self.q, self.place(token, head), &mut row[..d]);
            for (lanes, x) in queries.iter_mut().zip(&row) {
                lanes[i] = *x * self.scale;
            }
        }
        let (from, to) = (item.sees.map(|(from, _)| from), item.sees.map(|(_, to)| to));
        let (mut max, mut total) = ([LOWEST; WIDE], [0.0; WIDE]);
        for keys in blocks_of(&item.any) {
            let at = self.row(args, item.sequence, keys.start);
            for (j, row) in rows[..keys.len()].iter_mut().enumerate() {
                k.decode::<I>(at + j, &mut row[..d]);
            }
            let mut weights = [[0.0; WIDE]; KEYS];
            let weights = &mut weights[..keys.len()];
            I::lane_products(queries, bytemuck::cast_slice(rows.as_flattened()), D, 1, weights);
            // Where all see all, nothing need be hidden.
            if keys.start < item.all.start || keys.end > item.all.end {
                for (key, weights) in (keys.start as i32..).zip(weights.iter_mut()) {
                    for l in 0..WIDE {
                        let sees = key >= from[l] && key < to[l];
                        weights[l] = if sees { weights[l] } else { f32::NEG_INFINITY };
                    }
                }
            }
            let mut new = max;
            for weights in weights.iter() {
                for l in 0..WIDE {
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
            for ((j, key), (row, weights)) in keys.enumerate().zip(rows.iter_mut().zip(weights.iter())) {
                let row = &mut row[..d];
                v.decode::<I>(at + j, row);
                if !item.all.contains(&key) && !row.iter().all(|v| v.is_finite()) {
                    add_seen(weights, row, out);
                    row.fill(0.0);
                }
            }
            I::lane_products(weights, bytemuck::cast_slice(rows.as_flattened()), 1, D, out);
        }
        for i in 0..n {
            let total = item.total(i, total[i]);
            for (y, lanes) in row.iter_mut().zip(out.iter()) {
                *y = lanes[i] / total;
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

/// The keys in order, as many at a time as lie in one block.
#[inline(always)]
fn blocks_of(keys: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = *keys;
    (start / KEYS..end.div_ceil(KEYS)).map(move |block| start.max(block * KEYS)..end.min((block + 1) * KEYS))
}

/// Some heads that read one KV head, for some tokens of one sequence.
struct Item<'a> {
    heads: Range<usize>,
    tokens: Range<usize>,
    /// How many queries that are.
    n: usize,
    sequence: usize,
    /// From which key on and up to which each query sees.
    sees: [(i32, i32); QUERIES],
    /// From the first key that any query sees to the last.
    any: Range<usize>,
    /// The keys that all of them see.
    all: Range<usize>,
    k: Stored<'a>,
    v: Stored<'a>,
}

impl Item<'_> {
    /// The token and the head of query `i`.
    #[inline(always)]
    fn query(&self, i: usize) -> (usize, usize) {
        (self.tokens.start + i / self.heads.len(), self.heads.start + i % self.heads.len())
    }

    #[inline(always)]
    fn sees(&self, i: usize, key: usize) -> bool {
        let (from, to) = self.sees[i];
        from <= key as i32 && (key as i32) < to
    }

    /// What the sum of query `i` is divided by, to be the mean. One that sees nothing, as only values that mean nothing make it,
    /// has a sum of zeros and keeps it.
    #[inline(always)]
    fn total(&self, i: usize, weights: f32) -> f32 {
        if self.sees[i].1 == 0 { 1.0 } else { weights }
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
        let f16s = &self.bytes[row * self.stride..][..2 * C * WIDE];
        for (to, f16s) in to.iter_mut().zip(f16s.as_chunks::<{ 2 * WIDE }>().0) {
            for (to, f16s) in to.as_chunks_mut::<16>().0.iter_mut().zip(f16s.as_chunks::<32>().0) {
                I::from_f16(f16s, to);
            }
        }
    }

    /// Prefetches a row that is needed soon. Rows of one head lie so far apart that the processor does not
    /// guess the next.
    #[inline(always)]
    fn prefetch(&self, row: usize) {
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
        let n = syms.t as usize;
        let tiles = n.div_ceil(self.tile.1);
        for item in items {
            let (head, t) = (item / tiles * self.tile.0, item % tiles * self.tile.1);
            let mut tokens = t..(t + self.tile.1).min(n);
            while !tokens.is_empty() {
                let item = self.item(args, head..head + self.tile.0, tokens.clone());
                tokens.start = item.tokens.end;
                // Small heads get loops of small constant length.
                match (item.n <= SHARED_QUERIES, self.head_dim) {
                    (true, ..=64) => self.by_elements::<I, 2>(work, args, &item),
                    (true, ..=128) => self.by_elements::<I, 4>(work, args, &item),
                    (true, ..=256) => self.by_elements::<I, 8>(work, args, &item),
                    (true, _) => self.by_elements::<I, { MAX_HEAD / WIDE }>(work, args, &item),
                    (false, ..=128) => self.by_queries::<I, 128>(work, args, &item),
                    (false, _) => self.by_queries::<I, MAX_HEAD>(work, args, &item),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
