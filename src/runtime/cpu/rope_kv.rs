//! RoPE of queries and keys, and the append of keys and values to their caches. An item is a token.

use super::args::Args;
use super::blocks::{self, bytes_of};
use super::check::{self, BindError, CACHES, Check};
use super::isa::Isa;
use super::math::{rms_factor, sum_of_squares};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, CacheRows, Extent, HeadNorm, KernelSpec, RopeKvSpec};
use crate::ir::{DType, Dim, Rope, RopeStyle};
use std::ops::Range;

/// The widest head: heads are rotated and summed on the stack.
pub(super) const MAX_HEAD: usize = 1024;

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
        check: &mut Check<'_>,
        rope: Rope,
        head_dim: usize,
        factors: Option<ArgId>,
    ) -> Result<Rotation, BindError> {
        let dims = rope.dims as usize;
        if head_dim > MAX_HEAD {
            return check::parameter(format!("heads of {head_dim} are wider than {MAX_HEAD}"));
        }
        if dims == 0 || dims % 2 != 0 || dims > head_dim {
            return check::parameter(format!("cannot rotate {dims} dimensions of heads of {head_dim}"));
        }
        if !(rope.base.is_finite() && rope.base > 0.0) {
            return check::parameter(format!("the base of a rope must be above zero, not {}", rope.base));
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
            RopeStyle::Halves => {
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
    pos: ArgId,
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
    pub fn bind(spec: &KernelSpec, m: &RopeKvSpec) -> Result<RopeKv, BindError> {
        let mut check = Check::new(spec)?;
        let head_dim = check::size("the head dimension", m.head_dim)?;
        let rotation = Rotation::bind(&mut check, m.rope, head_dim, m.factors)?;
        check.exact("the positions", m.pos, Access::Read, &[DType::I32], &[Dim::T])?;
        let f32s = &[DType::F32];
        let norm = |check: &mut Check<'_>, norm: &Option<HeadNorm>| {
            let Some(norm) = norm else { return Ok(()) };
            if !(norm.eps.is_finite() && norm.eps >= 0.0) {
                return check::parameter(format!("eps must not be {}", norm.eps));
            }
            check.exact("a head norm", norm.weight, Access::Read, f32s, &[Dim::n(m.head_dim)]).map(|_| ())
        };
        let q = match &m.q {
            None => None,
            Some(q) => {
                let heads = check::size("the heads", q.heads)?;
                let n = check::size("a row of queries", q.heads.saturating_mul(m.head_dim))?;
                check.tokens("the queries", q.x, Access::Read, f32s, Some(Dim::T), n)?;
                check.tokens("the turned queries", q.out, Access::Write, f32s, Some(Dim::T), n)?;
                check.may_alias(q.out, q.x);
                norm(&mut check, &q.norm)?;
                Some(Queries { x: q.x, heads, norm: q.norm.clone(), out: q.out })
            }
        };
        norm(&mut check, &m.k.norm)?;
        let k = append(&mut check, &m.k.rows, m.head_dim)?;
        let v = m.v.as_ref().map(|v| append(&mut check, v, m.head_dim)).transpose()?;
        check.done(&[Extent::each(Dim::T)])?;
        Ok(RopeKv { rotation, head_dim, pos: m.pos, q, k, k_norm: m.k.norm.clone(), v })
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

fn append(check: &mut Check<'_>, rows: &CacheRows, head_dim: u64) -> Result<Rows, BindError> {
    let heads = check::size("the cache heads", rows.heads)?;
    let n = check::size("a row of a cache", rows.heads.saturating_mul(head_dim))?;
    check.tokens("the rows for a cache", rows.x, Access::Read, &[DType::F32], Some(Dim::T), n)?;
    let shape = [Dim::S, Dim::n(rows.heads), Dim::n(head_dim)];
    let cache_type = check.exact("a cache", rows.cache, Access::Update, CACHES, &shape)?;
    Ok(Rows { x: rows.x, heads, cache: rows.cache, cache_type })
}

/// Writes elements from `start` on of an f32 or f16 cache; at most [`MAX_HEAD`].
#[inline(always)]
pub(super) fn store_cache<I: Isa>(args: Args<'_>, cache: ArgId, dtype: DType, start: usize, x: &[f32]) {
    if dtype == DType::F32 {
        return args.store(cache, start, x);
    }
    let mut halves = [0u8; 2 * MAX_HEAD];
    let halves = &mut halves[..2 * x.len()];
    blocks::encode_halves::<I>(x, halves);
    args.store(cache, bytes_of(dtype, start), halves);
}

impl Kernel for RopeKv {
    #[inline(always)]
    fn run<I: Isa>(&self, args: Args<'_>, syms: &Syms, items: Range<usize>) {
        let mut turns = [(0.0, 0.0); MAX_HEAD / 2];
        let mut head = [0.0; MAX_HEAD];
        let head = &mut head[..self.head_dim];
        for t in items {
            let mut position = [0i32];
            args.load(self.pos, t, &mut position);
            self.rotation.turns(args, position[0], &mut turns);
            if let Some(q) = &self.q {
                for h in t * q.heads..(t + 1) * q.heads {
                    self.load_head(args, q.x, h, &q.norm, head);
                    self.rotation.rotate(head, &turns);
                    args.store(q.out, h * self.head_dim, head);
                }
            }
            let row = syms.p as usize + t;
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
