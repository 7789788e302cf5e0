//! RoPE of queries and keys, and the append of keys and values to their caches. An item is a token.

use super::args::Args;
use super::binding::{self, BindError, Binding, CACHES};
use super::blocks::{self, bytes_of};
use super::isa::Isa;
use super::math::{rms_factor, sum_of_squares};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, CacheRows, Extent, HeadNorm, Implementation, RopeKvSpec};
use crate::ir::{DType, Dim, MAX_HEAD_DIM, Rope, RopeStyle};
use std::ops::Range;

/// The widest head: heads are rotated and summed on the stack.
pub(super) const MAX_HEAD: usize = MAX_HEAD_DIM as usize;

/// The frequencies of a rotary embedding.
pub(super) struct Rotation {
    style: RopeStyle,
    /// `base^(-2i/dims)`.
    frequencies: Vec<f64>,
    factors: Option<ArgId>,
}

/// `(cos, sin)` of each pair's angle at one position.
pub(super) type Turns = [(f32, f32); MAX_HEAD / 2];

impl Rotation {
    pub fn bind(
        check: &mut Binding<'_>,
        rope: Rope,
        head_dim: usize,
        factors: Option<ArgId>,
    ) -> Result<Rotation, BindError> {
        let dims = rope.dims as usize;
        if head_dim > MAX_HEAD {
            return binding::parameter(format!("heads of {head_dim} are wider than {MAX_HEAD}"));
        }
        if dims == 0 || !dims.is_multiple_of(2) || dims > head_dim {
            return binding::parameter(format!("cannot rotate {dims} dimensions of heads of {head_dim}"));
        }
        if !(rope.base.is_finite() && rope.base > 0.0) {
            return binding::parameter(format!("the base of a rope must be above zero, not {}", rope.base));
        }
        if let Some(factors) = factors {
            let shape = [Dim::n(dims as u64 / 2)];
            check.exact("the rope factors", factors, Access::Read, &[DType::F32], &shape)?;
        }
        let frequency = |i: usize| f64::from(rope.base).powf(-2.0 * i as f64 / dims as f64);
        Ok(Rotation { style: rope.style, frequencies: (0..dims / 2).map(frequency).collect(), factors })
    }

    /// Angles in double precision: at position 500 a float's would be off by 3e-5.
    #[inline(always)]
    pub fn turns(&self, args: Args<'_>, position: i32, turns: &mut Turns) {
        for (i, (turn, frequency)) in turns.iter_mut().zip(&self.frequencies).enumerate() {
            let mut factor = [1f32];
            if let Some(factors) = self.factors {
                args.load(factors, i, &mut factor);
            }
            let (sin, cos) = (f64::from(position) * frequency / f64::from(factor[0])).sin_cos();
            *turn = (cos as f32, sin as f32);
        }
    }

    /// Turns the pairs of one head.
    #[inline(always)]
    pub fn rotate(&self, head: &mut [f32], turns: &Turns) {
        let pairs = self.frequencies.len();
        let turn = |a: &mut f32, b: &mut f32, (cos, sin): (f32, f32)| {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        };
        match self.style {
            RopeStyle::Interleaved => {
                for ([a, b], t) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns).take(pairs) {
                    turn(a, b, *t);
                }
            }
            RopeStyle::NeoX => {
                let (low, high) = head.split_at_mut(pairs);
                for ((a, b), t) in low.iter_mut().zip(high).zip(turns) {
                    turn(a, b, *t);
                }
            }
        }
    }
}

pub(super) struct RopeKv {
    rotation: Rotation,
    head_dim: usize,
    positions: ArgId,
    rows: ArgId,
    /// Rows of a cache.
    cache_rows: usize,
    q: Option<Queries>,
    k: Rows,
    k_norm: Option<HeadNorm>,
    v: Option<Rows>,
}

struct Queries {
    x: ArgId,
    heads: usize,
    norm: Option<HeadNorm>,
    out: ArgId,
}

struct Rows {
    x: ArgId,
    heads: usize,
    cache: ArgId,
    cache_type: DType,
}

impl RopeKv {
    pub fn bind(kernel: &Implementation, m: &RopeKvSpec) -> Result<RopeKv, BindError> {
        let mut check = Binding::new(kernel)?;
        let head_dim = binding::size("the head dimension", m.head_dim)?;
        let rotation = Rotation::bind(&mut check, m.rope, head_dim, m.factors)?;
        check.per_token("the positions", m.positions, Dim::T)?;
        let cache = check.ty("a cache", m.k.rows.cache)?;
        let cache_rows = cache.shape.first().and_then(|d| d.as_const()).unwrap_or(0);
        check.index("the rows", m.rows, &[Dim::T], Dim::n(cache_rows), true)?;
        let f32s = &[DType::F32];
        let norm = |check: &mut Binding<'_>, norm: &Option<HeadNorm>| {
            let Some(norm) = norm else { return Ok(()) };
            if !(norm.eps.is_finite() && norm.eps >= 0.0) {
                return binding::parameter(format!("eps must not be {}", norm.eps));
            }
            check.exact("a head norm", norm.weight, Access::Read, f32s, &[Dim::n(m.head_dim)]).map(|_| ())
        };
        let q = match &m.q {
            None => None,
            Some(q) => {
                let heads = binding::size("the heads", q.heads)?;
                let n = binding::size("a row of queries", q.heads.saturating_mul(m.head_dim))?;
                check.tokens("the queries", q.x, Access::Read, f32s, Some(Dim::T), n)?;
                check.tokens("the turned queries", q.out, Access::Write, f32s, Some(Dim::T), n)?;
                check.may_alias(q.out, q.x);
                norm(&mut check, &q.norm)?;
                Some(Queries { x: q.x, heads, norm: q.norm.clone(), out: q.out })
            }
        };
        norm(&mut check, &m.k.norm)?;
        let k = append(&mut check, &m.k.rows, cache_rows, m.head_dim)?;
        let v = m.v.as_ref().map(|v| append(&mut check, v, cache_rows, m.head_dim)).transpose()?;
        check.done(&[Extent::each(Dim::T)])?;
        let cache_rows = binding::size("the rows of a cache", cache_rows)?;
        let (positions, rows, k_norm) = (m.positions, m.rows, m.k.norm.clone());
        Ok(RopeKv { rotation, head_dim, positions, rows, cache_rows, q, k, k_norm, v })
    }

    #[inline(always)]
    fn load_head(&self, args: Args<'_>, x: ArgId, head: usize, norm: &Option<HeadNorm>, to: &mut [f32]) {
        args.load(x, head * self.head_dim, to);
        if let Some(norm) = norm {
            let factor = rms_factor(sum_of_squares(to), self.head_dim, norm.eps);
            let mut w = [0.0; MAX_HEAD];
            let w = &mut w[..self.head_dim];
            args.load(norm.weight, 0, w);
            to.iter_mut().zip(w).for_each(|(x, w)| *x = *x * factor * *w);
        }
    }
}

fn append(
    check: &mut Binding<'_>,
    rows: &CacheRows,
    cache_rows: u64,
    head_dim: u64,
) -> Result<Rows, BindError> {
    let heads = binding::size("the KV heads", rows.heads)?;
    let n = binding::size("a row of a cache", rows.heads.saturating_mul(head_dim))?;
    check.tokens("the rows for a cache", rows.x, Access::Read, &[DType::F32], Some(Dim::T), n)?;
    let shape = [cache_rows, rows.heads, head_dim].map(Dim::n);
    let cache_type = check.exact("a cache", rows.cache, Access::Update, CACHES, &shape)?;
    Ok(Rows { x: rows.x, heads, cache: rows.cache, cache_type })
}

/// Writes elements from `start` on of an f32 or f16 cache; at most [`MAX_HEAD`].
#[inline(always)]
pub(super) fn store_cache<I: Isa>(args: Args<'_>, cache: ArgId, dtype: DType, start: usize, x: &[f32]) {
    if dtype == DType::F32 {
        return args.store(cache, start, x);
    }
    let mut bytes = [0u8; 2 * MAX_HEAD];
    let bytes = &mut bytes[..2 * x.len()];
    blocks::encode_f16::<I>(x, bytes);
    args.store(cache, bytes_of(dtype, start), bytes);
}

impl Kernel for RopeKv {
    type Work = ();

    #[inline(always)]
    fn run<I: Isa>(&self, (): &mut (), args: Args<'_>, _: &Syms, items: Range<usize>) {
        let mut turns = [(0.0, 0.0); MAX_HEAD / 2];
        let mut head = [0.0; MAX_HEAD];
        let head = &mut head[..self.head_dim];
        for t in items {
            let row = args.index(self.rows, t, self.cache_rows);
            self.rotation.turns(args, args.integer(self.positions, t), &mut turns);
            if let Some(q) = &self.q {
                for h in t * q.heads..(t + 1) * q.heads {
                    self.load_head(args, q.x, h, &q.norm, head);
                    self.rotation.rotate(head, &turns);
                    args.store(q.out, h * self.head_dim, head);
                }
            }
            for h in 0..self.k.heads {
                self.load_head(args, self.k.x, t * self.k.heads + h, &self.k_norm, head);
                self.rotation.rotate(head, &turns);
                let to = (row * self.k.heads + h) * self.head_dim;
                store_cache::<I>(args, self.k.cache, self.k.cache_type, to, head);
            }
            if let Some(v) = &self.v {
                for h in 0..v.heads {
                    self.load_head(args, v.x, t * v.heads + h, &None, head);
                    let to = (row * v.heads + h) * self.head_dim;
                    store_cache::<I>(args, v.cache, v.cache_type, to, head);
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
    use crate::codegen::spec::{Alias, Computation, RopeK, RopeQ};

    const EPS: f32 = 1e-6;

    /// Rows of the caches.
    const ROWS: u64 = 40;

    /// Arguments: positions, factors, queries, their norm, result, keys, their norm, cache, values, cache, rows.
    fn rope_kv(rope: Rope, head_dim: u64, heads: u64, kv_heads: u64, cache: DType) -> Implementation {
        let rows = |access, heads: u64| arg(access, DType::F32, [Dim::T, n(heads * head_dim)]);
        let cache = || arg(Access::Update, cache, [ROWS, kv_heads, head_dim]);
        let weight = || arg(Access::Read, DType::F32, [head_dim]);
        let args = vec![
            arg(Access::Read, DType::I32, [Dim::T]),
            arg(Access::Read, DType::F32, [u64::from(rope.dims) / 2]),
            rows(Access::Read, heads),
            weight(),
            rows(Access::Write, heads),
            rows(Access::Read, kv_heads),
            weight(),
            cache(),
            rows(Access::Read, kv_heads),
            cache(),
            written_by([Dim::T], ROWS),
        ];
        let norm = |weight| Some(HeadNorm { weight, eps: EPS });
        let m = RopeKvSpec {
            rope,
            head_dim,
            positions: 0,
            rows: 10,
            factors: Some(1),
            q: Some(RopeQ { x: 2, heads, norm: norm(3), out: 4 }),
            k: RopeK { rows: CacheRows { x: 5, heads: kv_heads, cache: 7 }, norm: norm(6) },
            v: Some(CacheRows { x: 8, heads: kv_heads, cache: 9 }),
        };
        kernel(Computation::RopeKv(m), args, vec![Extent::each(Dim::T)])
    }

    /// One head, normed and turned in double precision.
    fn turned(x: &[f64], w: &[f64], rope: Rope, position: i32, factors: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let mut y: Vec<f64> = x.iter().zip(w).map(|(x, w)| x / (mean + f64::from(EPS)).sqrt() * w).collect();
        let dims = rope.dims as usize;
        for (i, factor) in factors.iter().enumerate() {
            let angle =
                f64::from(position) * f64::from(rope.base).powf(-2.0 * i as f64 / dims as f64) / factor;
            let (a, b) = match rope.style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::NeoX => (i, i + dims / 2),
            };
            (y[a], y[b]) = (y[a] * angle.cos() - y[b] * angle.sin(), y[a] * angle.sin() + y[b] * angle.cos());
        }
        y
    }

    #[test]
    fn queries_keys_and_values_go_where_they_belong() {
        for (style, cache, dims, d, t, (h, g), tolerance) in [
            (RopeStyle::Interleaved, DType::F32, 64, 64, 7, (6u64, 2u64), 1e-6),
            (RopeStyle::NeoX, DType::F16, 64, 64, 1, (6, 2), 1e-3),
            (RopeStyle::NeoX, DType::F32, 10, 13, 2, (71, 34), 1e-6),
            (RopeStyle::Interleaved, DType::F16, 6, 13, 33, (6, 2), 1e-3),
            (RopeStyle::NeoX, DType::F16, 1024, 1024, 2, (6, 2), 1e-3),
        ] {
            let rope = Rope { base: 10_000.0, dims, style };
            let d = d as u64;
            let (mut kernel, at, mut rng) = (rope_kv(rope, d, h, g, cache), syms(t, 0), rng(t));
            // Scattered: 27 and the number of rows have no common divisor.
            let rows: Vec<i32> = (0..t as i32).map(|t| (t * 27 + 5) % ROWS as i32).collect();
            // Far ones too: a float32 angle of 3000 radians is off by 1e-4, and turns come from the exact one.
            let positions: Vec<i32> =
                (0..t as i32).map(|t| if t % 2 == 0 { 511 - t } else { 3000 + t }).collect();
            let factors: Vec<f32> = (0..dims / 2).map(|i| 1.0 + i as f32 * 0.25).collect();
            let mut fill = |dtype, k: u64| Some(random(&mut rng, dtype, k as usize));
            let inputs = [
                Some(i32_bytes(&positions)),
                Some(f32_bytes(&factors)),
                fill(DType::F32, t * h * d),
                fill(DType::F32, d),
                None,
                fill(DType::F32, t * g * d),
                fill(DType::F32, d),
                fill(cache, ROWS * g * d),
                fill(DType::F32, t * g * d),
                fill(cache, ROWS * g * d),
                Some(i32_bytes(&rows)),
            ];
            let get = |i: usize| values(kernel.spec.args[i].ty.dtype, inputs[i].as_ref().unwrap());
            let (factors, d) = (get(1), d as usize);
            let turn = |x: usize, w: usize, heads: u64| -> Vec<f64> {
                let w = get(w);
                let each =
                    |(i, x): (usize, &[f64])| turned(x, &w, rope, positions[i / heads as usize], &factors);
                get(x).chunks(d).enumerate().flat_map(each).collect()
            };
            let filled = |cache: usize, new: Vec<f64>| {
                let (mut all, n) = (get(cache), g as usize * d);
                for (row, new) in rows.iter().zip(new.chunks(n)) {
                    all[*row as usize * n..][..n].copy_from_slice(new);
                }
                all
            };
            let floats =
                |dtype, bytes: &[u8]| values(dtype, bytes).iter().map(|x| *x as f32).collect::<Vec<_>>();
            let queries = turn(2, 3, h);
            assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 4)), &queries, 1e-6);
            let keys = filled(7, turn(5, 6, g));
            assert_close(&floats(cache, &launch_all(&kernel, &at, &inputs, 7)), &keys, tolerance);
            let new = filled(9, get(8));
            assert_close(&floats(cache, &launch_all(&kernel, &at, &inputs, 9)), &new, tolerance);
            kernel.may_alias.push(Alias { write: 4, read: 2 });
            let below = launch(&kernel, &Features::baseline(), &at, &inputs, Some((4, 2)));
            assert_close(&to_f32s(&below[4]), &queries, 1e-6);
        }
    }

    /// Keys alone: positions, keys, a cache of three rows, and the rows.
    fn keys_alone() -> Implementation {
        let args = vec![
            arg(Access::Read, DType::I32, [Dim::T]),
            arg(Access::Read, DType::F32, [Dim::T, n(2), n(8)]),
            arg(Access::Update, DType::F32, [3u64, 2, 8]),
            written_by([Dim::T], 3),
        ];
        let m = RopeKvSpec {
            rope: Rope { base: 1e4, dims: 8, style: RopeStyle::NeoX },
            head_dim: 8,
            positions: 0,
            rows: 3,
            factors: None,
            q: None,
            k: RopeK { rows: CacheRows { x: 1, heads: 2, cache: 2 }, norm: None },
            v: None,
        };
        kernel(Computation::RopeKv(m), args, vec![Extent::each(Dim::T)])
    }

    #[test]
    fn queries_values_and_norms_may_be_absent() {
        let x: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let cache = Some(f32_bytes(&[9.0; 48]));
        let inputs = [Some(i32_bytes(&[0])), Some(f32_bytes(&x)), cache, Some(i32_bytes(&[2]))];
        let cache = to_f32s(&launch_all(&keys_alone(), &syms(1, 1), &inputs, 2));
        assert_eq!((&cache[..32], &cache[32..]), (&[9.0; 32][..], &x[..]), "position 0 turns nothing");
    }

    #[test]
    fn rows_beside_the_cache_are_clamped() {
        for (row, to) in [(3, 2), (i32::MAX, 2), (-1, 0), (i32::MIN, 0)] {
            for position in [0, -1, i32::MIN, i32::MAX] {
                let cache = Some(f32_bytes(&[9.0; 48]));
                let positions = Some(i32_bytes(&[position, 0]));
                let inputs = [positions, Some(f32_bytes(&[1.0; 32])), cache, Some(i32_bytes(&[row, 1]))];
                let cache = to_f32s(&launch_all(&keys_alone(), &syms(2, 0), &inputs, 2));
                for (i, x) in cache.iter().enumerate() {
                    assert_eq!(*x == 9.0, i / 16 != 1 && i / 16 != to, "element {i}: {x}");
                    assert!(x.is_finite());
                }
            }
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let refuse = |name: &str, change: &dyn Fn(&mut Implementation, &mut RopeKvSpec)| {
            let mut kernel =
                rope_kv(Rope { base: 1e4, dims: 8, style: RopeStyle::NeoX }, 16, 4, 2, DType::F16);
            assert!(bind(&kernel, &Features::baseline()).is_ok());
            let Computation::RopeKv(mut m) = kernel.spec.computes.clone() else { unreachable!() };
            change(&mut kernel, &mut m);
            kernel.spec.computes = Computation::RopeKv(m);
            assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
        };
        refuse("no dims", &|_, m| m.rope.dims = 0);
        refuse("odd dims", &|_, m| m.rope.dims = 7);
        refuse("dims beyond the head", &|_, m| m.rope.dims = 18);
        refuse("base", &|_, m| m.rope.base = 0.0);
        refuse("wide heads", &|_, m| m.head_dim = 2048);
        refuse("no heads", &|_, m| m.k.rows.heads = 0);
        refuse("heads", &|_, m| m.k.rows.heads = 4);
        refuse("heads without end", &|_, m| m.k.rows.heads = u64::MAX);
        refuse("positions", &|s, _| s.spec.args[0].ty.dtype = DType::F32);
        refuse("number of positions", &|s, _| s.spec.args[0].ty.shape[0] = n(1));
        refuse("factors", &|s, _| s.spec.args[1].ty.shape[0] = n(8));
        refuse("queries", &|s, _| s.spec.args[2].ty.shape[1] = n(32));
        refuse("norm", &|s, _| s.spec.args[3].ty.shape[0] = n(8));
        refuse("eps", &|_, m| m.k.norm = Some(HeadNorm { weight: 6, eps: -1.0 }));
        refuse("turned queries", &|s, _| s.spec.args[4].access = Access::Read);
        refuse("keys", &|s, _| s.spec.args[5].ty.shape[0] = n(1));
        refuse("cache of another length", &|s, _| s.spec.args[7].ty.shape[0] = n(ROWS + 1));
        refuse("cache of few rows", &|s, _| s.spec.args[7].ty.shape[0] = Dim::T);
        refuse("caches without rows", &|s, _| {
            s.spec.args[7].ty.shape[0] = n(0);
            s.spec.args[9].ty.shape[0] = n(0);
            s.spec.args[10] = written_by([Dim::T], 0);
        });
        refuse("number of rows", &|s, _| s.spec.args[10].ty.shape[0] = Dim::R);
        for wrong in wrong_indices(written_by([Dim::T], ROWS).index.unwrap()) {
            refuse("what rows are held to", &|s, _| s.spec.args[10].index = wrong);
        }
        refuse("cache that is written", &|s, _| s.spec.args[7].access = Access::Write);
        refuse("cache of integers", &|s, _| s.spec.args[9].ty.dtype = DType::I32);
        refuse("one cache for both", &|_, m| m.v.as_mut().unwrap().cache = 7);
        refuse("grid", &|s, _| s.launches[0].grid = vec![]);
        refuse("queries on keys", &|s, _| s.may_alias.push(Alias { write: 4, read: 5 }));
    }
}
