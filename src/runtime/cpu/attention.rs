//! Causal attention with a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867; Dao et al., 2022,
//! arXiv:2205.14135). An item is one head and up to [`QUERIES`] tokens; it goes over the cache [`KEYS`] rows at a time.
//! Where those begin does not depend on the step, so neither do a token's sums.

use super::args::{Args, Q8Block};
use super::blocks;
use super::check::{self, ACTIVATIONS, BindError, CACHES, Check};
use super::isa::Isa;
use super::math::{LANES, dot_lanes, exp, quantise, sum};
use super::rope_kv::MAX_HEAD;
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, AttentionSpec, Extent, KernelSpec};
use crate::ir::{DType, Dim};
use std::ops::Range;

/// Queries of a work item.
const QUERIES: usize = 8;
/// Cache rows between two updates of the running maximum.
const KEYS: usize = 32;

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
        check.done(&[Extent::each(m.heads), Extent { dim: Dim::T, per: QUERIES as u32 }])?;
        let AttentionSpec { q, k, v, out, scale, .. } = *m;
        Ok(Attention { q, k, k_type, v, v_type, out, quantised, heads, cache_heads, head_dim, scale })
    }

    /// One head of one row of a cache, in floats.
    #[inline(always)]
    fn cache_row<I: Isa>(
        &self,
        args: Args<'_>,
        cache: ArgId,
        dtype: DType,
        row: usize,
        head: usize,
        to: &mut [f32],
    ) {
        let start = blocks::bytes_of(dtype, (row * self.cache_heads + head) * self.head_dim);
        let bytes = blocks::bytes_of(dtype, self.head_dim);
        blocks::decode_plain::<I>(dtype, args.slice(cache, start, bytes), to);
    }

    /// Up to `Q` queries of a head of at most `D` elements, `tokens` of this step after `past` others.
    #[inline(always)]
    fn attend<I: Isa, const D: usize, const Q: usize>(
        &self,
        args: Args<'_>,
        head: usize,
        tokens: Range<usize>,
        past: usize,
    ) {
        let (d, n) = (self.head_dim, tokens.len());
        let cache_head = head / (self.heads / self.cache_heads);
        let place = |t: usize| (t * self.heads + head) * d;
        let (mut queries, mut sums, mut row) = ([[0.0; D]; Q], [[0.0; D]; Q], [0.0; D]);
        let (mut max, mut total) = ([f32::NEG_INFINITY; Q], [0.0; Q]);
        for (t, q) in tokens.clone().zip(&mut queries) {
            args.load(self.q, place(t), &mut q[..d]);
        }
        let row = &mut row[..d];
        let seen = |i: usize| past + tokens.start + i + 1;
        for start in (0..seen(n - 1)).step_by(KEYS) {
            let visible = |i: usize| seen(i).saturating_sub(start).min(KEYS);
            let mut weights = [[0.0; KEYS]; Q];
            for j in 0..visible(n - 1) {
                self.cache_row::<I>(args, self.k, self.k_type, start + j, cache_head, row);
                for (q, weights) in queries.iter().zip(&mut weights).take(n) {
                    let mut lanes = [0.0; LANES];
                    dot_lanes::<I>(&mut lanes, &q[..d], row);
                    weights[j] = sum(lanes) * self.scale;
                }
            }
            for i in 0..n {
                let (seen, hidden) = weights[i].split_at_mut(visible(i));
                if seen.is_empty() {
                    continue;
                }
                let new = seen.iter().fold(max[i], |m, s| if *s > m { *s } else { m });
                let shrink = exp::<I>(max[i] - new);
                max[i] = new;
                seen.iter_mut().for_each(|s| *s = exp::<I>(*s - new));
                hidden.fill(0.0);
                total[i] = total[i] * shrink + seen.iter().sum::<f32>();
                sums[i][..d].iter_mut().for_each(|y| *y *= shrink);
            }
            for j in 0..visible(n - 1) {
                self.cache_row::<I>(args, self.v, self.v_type, start + j, cache_head, row);
                for i in (0..n).filter(|i| j < visible(*i)) {
                    let weight = weights[i][j];
                    for (y, v) in sums[i][..d].iter_mut().zip(row.iter()) {
                        *y = I::mul_add(weight, *v, *y);
                    }
                }
            }
        }
        for ((t, y), total) in tokens.zip(&mut sums).zip(total) {
            let y = &mut y[..d];
            y.iter_mut().for_each(|y| *y /= total);
            if self.quantised {
                for (i, y) in y.as_chunks::<32>().0.iter().enumerate() {
                    args.store::<Q8Block>(self.out, place(t) / 32 + i, &[quantise(y)]);
                }
            } else {
                args.store(self.out, place(t), y);
            }
        }
    }
}

impl Kernel for Attention {
    #[inline(always)]
    fn run<I: Isa>(&self, args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let (n, past) = (syms.t as usize, syms.p as usize);
        let tiles = n.div_ceil(QUERIES);
        for item in items {
            let (head, t) = (item / tiles, item % tiles * QUERIES);
            let tokens = t..(t + QUERIES).min(n);
            // Small heads and lone queries get small buffers, as clearing large ones would take longer than the work.
            match (self.head_dim <= 128, tokens.len() == 1) {
                (true, true) => self.attend::<I, 128, 1>(args, head, tokens, past),
                (true, false) => self.attend::<I, 128, QUERIES>(args, head, tokens, past),
                (false, true) => self.attend::<I, MAX_HEAD, 1>(args, head, tokens, past),
                (false, false) => self.attend::<I, MAX_HEAD, QUERIES>(args, head, tokens, past),
            }
        }
    }
}
