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
            // What a query does not see weighs nothing.
            let mut weights = [[f32::NEG_INFINITY; KEYS]; Q];
            let tile = start..start + visible(n - 1);
            for (j, key) in tile.clone().enumerate() {
                self.cache_row::<I>(args, self.k, self.k_type, key, cache_head, row);
                for i in (0..n).filter(|i| j < visible(*i)) {
                    weights[i][j] = dot::<I>(&queries[i][..d], row) * self.scale;
                }
            }
            for i in (0..n).filter(|i| visible(*i) > 0) {
                let weights = &mut weights[i];
                let new = max[i].max(largest(weights));
                let shrink = exp::<I>(max[i] - new);
                max[i] = new;
                weights.iter_mut().for_each(|s| *s = exp::<I>(*s - new));
                total[i] = total[i] * shrink + dot::<I>(weights, &[1.0; KEYS]);
                sums[i][..d].iter_mut().for_each(|y| *y *= shrink);
            }
            for (j, value) in tile.enumerate() {
                self.cache_row::<I>(args, self.v, self.v_type, value, cache_head, row);
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

/// `Σ a·b` of equally many.
#[inline(always)]
fn dot<I: Isa>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    dot_lanes::<I>(&mut lanes, a, b);
    sum(lanes)
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
        let grid = vec![Extent::each(heads), Extent { dim: Dim::T, per: 8 }];
        spec(Template::Attention(m), args, grid)
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
            (1, 500, 64, 4, 2, DType::F16, DType::F32, 1e-6),
            (7, 31, 32, 6, 2, DType::F16, DType::Q8Act, 5e-3),
            (33, 40, 128, 2, 1, DType::F32, DType::F32, 1e-6),
            (33, 0, 13, 3, 3, DType::F16, DType::F32, 1e-6),
            (2, 70, 256, 2, 1, DType::F16, DType::F32, 1e-6),
            (1, 3, 1024, 1, 1, DType::F32, DType::F32, 1e-6),
        ] {
            let spec = attention(heads, cache_heads, d, cache, out);
            let at = syms(t, past, past + t + 3);
            let inputs = inputs(&spec, &at, t);
            let have = values(out, &launch_all(&spec, &at, &inputs, 3));
            let have: Vec<f32> = have.iter().map(|x| *x as f32).collect();
            assert_close(&have, &reference(&spec, &at, &inputs), tolerance);
        }
    }

    #[test]
    fn chunks_change_nothing_and_the_result_may_lie_on_the_queries() {
        let mut spec = attention(4, 2, 64, DType::F16, DType::F32);
        spec.may_alias.push(Alias { write: 3, read: 0 });
        let at = syms(41, 0, 50);
        let whole = inputs(&spec, &at, 5);
        for features in Features::available() {
            let want = launch(&spec, &features, &at, &whole, None).swap_remove(3);
            for chunk in [1, 7, 32] {
                let mut have = vec![];
                for (i, q) in whole[0].as_ref().unwrap().chunks(chunk * 1024).enumerate() {
                    let part = [Some(q.to_vec()), whole[1].clone(), whole[2].clone(), None];
                    let at = syms(q.len() as u64 / 1024, (i * chunk) as u64, 50);
                    have.extend(launch(&spec, &features, &at, &part, Some((3, 0))).swap_remove(3));
                }
                assert!(have == want, "chunks of {chunk}");
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
        let odd = attention(8, 8, 20, DType::F16, DType::Q8Act);
        assert!(bind(&odd, &Features::baseline()).is_err(), "blocks across heads");
    }
}
