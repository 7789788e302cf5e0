//! Primitive operations as kernels of their own, for graphs that are not fused. An item is a row of the result.

use super::args::Args;
use super::binding::{self, BindError, Binding, product, rows_grid};
use super::blocks::{self, GROUP};
use super::isa::Isa;
use super::math::{LANES, dot_lanes, exp, quantise, rms_factor, seen, silu, sum, sum_of_squares};
use super::matmul::{index_of, larger};
use super::rope_kv::{MAX_HEAD, Rotation, store_cache};
use super::{Kernel, Syms};
use crate::codegen::spec::{Access, ArgId, Extent, Implementation};
use crate::ir::{DType, Op, TensorType};
use std::ops::Range;

/// Elements that elementwise kernels hold at a time.
const SPAN: usize = GROUP;

pub(super) struct PrimitiveKernel {
    op: Op,
    /// Of [`Op::Rope`].
    rotation: Option<Rotation>,
    /// Whether the second operand is one row, for all rows of the first.
    per_row: bool,
    /// Operands, by argument.
    types: Vec<TensorType>,
    out: ArgId,
    out_type: TensorType,
}

impl PrimitiveKernel {
    pub fn bind(kernel: &Implementation, op: &Op) -> Result<PrimitiveKernel, BindError> {
        let mut check = Binding::new(kernel)?;
        let writes_state = !op.writes().is_empty();
        let args = kernel.args().count();
        let Some(last) = args.checked_sub(1) else {
            return binding::parameter("a primitive has at least its result");
        };
        // What is appended to is an operand, and nothing else is written.
        let out = if writes_state { 0 } else { last as ArgId };
        let access = if writes_state { Access::Update } else { Access::Write };
        let out_type = check.arg("the result", out, access)?.clone();
        let operands = if writes_state { args } else { last };
        let types = (0..operands as ArgId).map(|i| check.ty("an operand", i).cloned());
        let types = types.collect::<Result<Vec<_>, _>>()?;
        // The typing rules of the IR are those of the kernels.
        let references: Vec<&TensorType> = types.iter().collect();
        let inferred = op.infer(&references, std::slice::from_ref(&out_type));
        let inferred = inferred.map_err(|why| BindError::Parameter(format!("{}: {why}", op.name())))?;
        if inferred[..] != [out_type.clone()] {
            let want = inferred.iter().map(TensorType::to_string).collect::<String>();
            return Err(BindError::Type { role: "the result", arg: out, want, have: out_type });
        }
        for (i, ty) in (0..).zip(&types) {
            match op.follows(i.into(), &references) {
                _ if writes_state && i == out => {}
                Some((below, distinct)) => check.index("an index", i, &ty.shape, below, distinct)?,
                None => drop(check.arg("an operand", i, Access::Read)?),
            }
        }
        if types.iter().chain([&out_type]).any(|ty| ty.dtype == DType::Q16Act) {
            return binding::parameter("the CPU has no kernels of q16_act");
        }
        let mut grid = rows_grid(&out_type.shape);
        let mut in_place: &[ArgId] = &[];
        let per_row = types.len() == 2 && types[1].shape.len() == 1 && types[0].shape.len() != 1;
        let mut rotation = None;
        match op {
            Op::Const { .. } | Op::Dequant | Op::QuantAct | Op::MatMul { .. } => {}
            Op::MatMulId => drop(binding::size("the matrices", types[1].shape[0].c)?),
            Op::GetRows => {
                binding::table_rows(types[0].first())?;
                constant_row(&out_type)?;
            }
            Op::Add | Op::Mul => in_place = if per_row { &[0] } else { &[0, 1] },
            Op::Silu | Op::CausalMask { .. } | Op::Softmax => in_place = &[0],
            Op::RmsNorm { eps } => {
                if !(eps.is_finite() && *eps >= 0.0) {
                    return binding::parameter(format!("eps must not be {eps}"));
                }
                in_place = &[0];
            }
            Op::Rope(rope) => {
                in_place = &[0];
                let head_dim = constant_row(&out_type)?;
                let factors = (types.len() == 3).then_some(2);
                rotation = Some(Rotation::bind(&mut check, *rope, head_dim, factors)?);
            }
            Op::KvAppend => {
                binding::size("the rows of a cache", out_type.shape[0].c)?;
                match product(&types[1].shape[1..]) {
                    Some(n) => binding::size("a row of a cache", n)?,
                    None => return binding::parameter("the rows of a cache must have constant dimensions"),
                };
                grid = vec![Extent::each(types[1].first())];
            }
            Op::KvRead { .. } => {
                binding::size("the rows of a cache", types[0].shape[0].c)?;
                binding::size("the positions of a sequence", out_type.shape[1].c)?;
            }
            Op::Scores { .. } => {
                constant_row(&types[0])?;
                sequences(&types[1])?;
            }
            Op::WeightedSum => {
                constant_row(&out_type)?;
                sequences(&types[1])?;
            }
            Op::ArgMax => grid = rows_grid(&types[0].shape),
            Op::Input { .. }
            | Op::Weight { .. }
            | Op::State { .. }
            | Op::Reshape
            | Op::GatedScan
            | Op::Return
            | Op::Fused(_) => return binding::parameter(format!("{} is no kernel of its own", op.name())),
        }
        in_place.iter().for_each(|&read| check.may_alias(out, read));
        check.done(&grid)?;
        Ok(PrimitiveKernel { op: op.clone(), rotation, per_row, types, out, out_type })
    }
}

/// The constant length of a row that lies on the stack.
fn constant_row(ty: &TensorType) -> Result<usize, BindError> {
    binding::size("the last dimension", ty.last().as_const().unwrap_or(0))
}

/// The constant number of sequences whose keys or values `[B,C,G,D]` are given.
fn sequences(ty: &TensorType) -> Result<usize, BindError> {
    binding::size("the sequences", ty.shape[0].as_const().unwrap_or(0))
}

/// The last dimension of each tensor as the kernels need it, at one step.
#[inline(always)]
fn width(ty: &TensorType, syms: &Syms) -> usize {
    ty.last().eval(syms) as usize
}

/// Calls `f` with the start and length of each span of a row.
#[inline(always)]
fn spans(n: usize, mut f: impl FnMut(usize, usize)) {
    for start in (0..n).step_by(SPAN) {
        f(start, SPAN.min(n - start));
    }
}

impl PrimitiveKernel {
    /// Maps each element of a row, given where it lies in the row.
    #[inline(always)]
    fn map(&self, args: Args<'_>, row: usize, n: usize, mut f: impl FnMut(usize, f32) -> f32) {
        let mut x = [0.0; SPAN];
        spans(n, |start, len| {
            let x = &mut x[..len];
            args.load(0, row * n + start, x);
            for (i, x) in x.iter_mut().enumerate() {
                *x = f(start + i, *x);
            }
            args.store(self.out, row * n + start, x);
        });
    }

    #[inline(always)]
    fn zip(&self, args: Args<'_>, row: usize, n: usize, per_row: bool, f: impl Fn(f32, f32) -> f32) {
        let (mut x, mut y) = ([0.0; SPAN], [0.0; SPAN]);
        spans(n, |start, len| {
            let (x, y) = (&mut x[..len], &mut y[..len]);
            args.load(0, row * n + start, x);
            args.load(1, if per_row { start } else { row * n + start }, y);
            x.iter_mut().zip(y).for_each(|(x, y)| *x = f(*x, *y));
            args.store(self.out, row * n + start, x);
        });
    }

    /// `Σ a·b` over `n` elements of two arguments.
    #[inline(always)]
    fn dot<I: Isa>(args: Args<'_>, n: usize, a: (ArgId, usize), b: (ArgId, usize)) -> f32 {
        let (mut x, mut y) = ([0.0; SPAN], [0.0; SPAN]);
        let mut lanes = [0.0; LANES];
        spans(n, |start, len| {
            args.load(a.0, a.1 + start, &mut x[..len]);
            args.load(b.0, b.1 + start, &mut y[..len]);
            dot_lanes::<I>(&mut lanes, &x[..len], &y[..len]);
        });
        sum(lanes)
    }

    #[inline(always)]
    fn softmax<I: Isa>(&self, args: Args<'_>, row: usize, n: usize) {
        let (mut x, mut max) = ([0.0; SPAN], f32::NEG_INFINITY);
        spans(n, |start, len| {
            args.load(0, row * n + start, &mut x[..len]);
            max = x[..len].iter().fold(max, |m, x| if *x > m { *x } else { m });
        });
        let mut total = 0f64;
        spans(n, |start, len| {
            args.load(0, row * n + start, &mut x[..len]);
            total += x[..len].iter().map(|x| f64::from(exp::<I>(*x - max))).sum::<f64>();
        });
        let factor = (1.0 / total) as f32;
        self.map(args, row, n, |_, x| exp::<I>(x - max) * factor);
    }

    /// Dimension `i` of operand `arg`.
    #[inline(always)]
    fn dim(&self, syms: &Syms, arg: usize, i: usize) -> usize {
        self.types[arg].shape[i].eval(syms) as usize
    }

    /// Row `(b, l, g)` of what is read: bytes of the cache, or zeros beyond what the sequence has filled.
    #[inline(always)]
    fn kv_read(&self, args: Args<'_>, syms: &Syms, row: usize, page: usize) {
        let (kv_heads, longest) = (self.dim(syms, 0, 1), self.out_type.shape[1].eval(syms) as usize);
        let (b, l, g) = (row / kv_heads / longest, row / kv_heads % longest, row % kv_heads);
        let bytes = blocks::bytes_of(self.out_type.dtype, width(&self.out_type, syms));
        if l >= args.index(2, b, longest + 1) {
            return spans(bytes, |start, len| args.store(self.out, row * bytes + start, &[0u8; SPAN][..len]));
        }
        let pages = rows_of(&self.types[0]) / page;
        let from = args.index(1, b * (longest / page) + l / page, pages) * page + l % page;
        args.store(self.out, row * bytes, args.slice::<u8>(0, (from * kv_heads + g) * bytes, bytes));
    }

    /// Row `(h, t)` of the scores.
    #[inline(always)]
    fn scores<I: Isa>(&self, args: Args<'_>, syms: &Syms, row: usize, scale: f32) {
        let (tokens, heads, d) = (self.dim(syms, 0, 0), self.dim(syms, 0, 1), self.dim(syms, 0, 2));
        let (len, kv_heads) = (self.dim(syms, 1, 1), self.dim(syms, 1, 2));
        let (h, t) = (row / tokens, row % tokens);
        let first = args.index(2, t, rows_of(&self.types[1])) * len;
        let g = h / (heads / kv_heads);
        for l in 0..len {
            let k = ((first + l) * kv_heads + g) * d;
            let s = Self::dot::<I>(args, d, (0, (t * heads + h) * d), (1, k));
            args.store(self.out, row * len + l, &[s * scale]);
        }
    }

    /// Row `(t, h)` of the sums.
    #[inline(always)]
    fn weighted_sum<I: Isa>(&self, args: Args<'_>, syms: &Syms, row: usize) {
        let (heads, tokens, len) = (self.dim(syms, 0, 0), self.dim(syms, 0, 1), self.dim(syms, 0, 2));
        let (kv_heads, d) = (self.dim(syms, 1, 2), self.dim(syms, 1, 3));
        let (t, h) = (row / heads, row % heads);
        let first = args.index(2, t, rows_of(&self.types[1])) * len;
        let g = h / (heads / kv_heads);
        let (mut v, mut y) = ([0.0; SPAN], [0.0; SPAN]);
        spans(d, |start, n| {
            let (v, y) = (&mut v[..n], &mut y[..n]);
            y.fill(0.0);
            for l in 0..len {
                let mut p = [0f32];
                args.load(0, (h * tokens + t) * len + l, &mut p);
                if p[0] == 0.0 {
                    continue;
                }
                args.load(1, ((first + l) * kv_heads + g) * d + start, v);
                y.iter_mut().zip(v.iter()).for_each(|(y, v)| *y = I::mul_add(p[0], *v, *y));
            }
            args.store(self.out, row * d + start, y);
        });
    }

    #[inline(always)]
    fn argmax(&self, args: Args<'_>, row: usize, n: usize) {
        let mut x = [0.0; SPAN];
        let mut best = (0, f32::NEG_INFINITY);
        spans(n, |start, len| {
            args.load(0, row * n + start, &mut x[..len]);
            best = larger(best, (start..).zip(x[..len].iter().copied()));
        });
        args.store(self.out, row, &[index_of(best)]);
    }

    #[inline(always)]
    fn row<I: Isa>(&self, args: Args<'_>, syms: &Syms, row: usize) {
        let n = width(&self.out_type, syms);
        match &self.op {
            Op::Const { value } => {
                spans(n, |start, len| args.store(self.out, row * n + start, &[*value; SPAN][..len]));
            }
            Op::GetRows => {
                let bytes = blocks::bytes_of(self.out_type.dtype, n);
                let from = args.index(1, row, self.dim(syms, 0, 0)) * bytes;
                args.store(self.out, row * bytes, args.slice::<u8>(0, from, bytes));
            }
            Op::Dequant => {
                let (dtype, mut x) = (self.types[0].dtype, [0.0; SPAN]);
                spans(n, |start, len| {
                    let from =
                        args.slice(0, blocks::bytes_of(dtype, row * n + start), blocks::bytes_of(dtype, len));
                    blocks::decode::<I>(dtype, from, &mut x[..len]);
                    args.store(self.out, row * n + start, &x[..len]);
                });
            }
            Op::QuantAct => {
                for block in row * n / 32..(row + 1) * n / 32 {
                    let mut x = [0.0; 32];
                    args.load(0, block * 32, &mut x);
                    args.store(self.out, block, &[quantise(&x)]);
                }
            }
            Op::MatMul { .. } => {
                let k = width(&self.types[0], syms);
                for i in 0..n {
                    let y = Self::dot::<I>(args, k, (0, row * k), (1, i * k));
                    args.store(self.out, row * n + i, &[y]);
                }
            }
            Op::MatMulId => {
                let k = width(&self.types[0], syms);
                let first = args.index(2, row, rows_of(&self.types[1])) * n;
                for i in 0..n {
                    let y = Self::dot::<I>(args, k, (0, row * k), (1, (first + i) * k));
                    args.store(self.out, row * n + i, &[y]);
                }
            }
            Op::Add => self.zip(args, row, n, self.per_row, |x, y| x + y),
            Op::Mul => self.zip(args, row, n, self.per_row, |x, y| x * y),
            Op::Silu => self.map(args, row, n, |_, x| silu::<I>(x)),
            Op::RmsNorm { eps } => {
                let (mut x, mut squares) = ([0.0; SPAN], 0.0);
                spans(n, |start, len| {
                    args.load(0, row * n + start, &mut x[..len]);
                    squares += sum_of_squares(&x[..len]);
                });
                let factor = rms_factor(squares, n, *eps);
                self.zip(args, row, n, true, |x, w| x * factor * w);
            }
            Op::Rope(_) => {
                let Some(rotation) = &self.rotation else { return };
                let (mut head, mut turns) = ([0.0; MAX_HEAD], [(0.0, 0.0); MAX_HEAD / 2]);
                let head = &mut head[..n];
                rotation.turns(args, args.integer(1, row / self.dim(syms, 0, 1)), &mut turns);
                args.load(0, row * n, head);
                rotation.rotate(head, &turns);
                args.store(self.out, row * n, head);
            }
            Op::KvAppend => {
                let n = self.dim(syms, 1, 1) * self.dim(syms, 1, 2);
                let to = args.index(2, row, rows_of(&self.out_type)) * n;
                let mut x = [0.0; SPAN];
                spans(n, |start, len| {
                    args.load(1, row * n + start, &mut x[..len]);
                    store_cache::<I>(args, self.out, self.out_type.dtype, to + start, &x[..len]);
                });
            }
            Op::KvRead { page } => self.kv_read(args, syms, row, *page as usize),
            Op::Scores { scale } => self.scores::<I>(args, syms, row, *scale),
            Op::CausalMask { window } => {
                let seen = seen(args.integer(1, row % self.dim(syms, 0, 1)), window.map(|n| n as usize));
                self.map(args, row, n, |l, x| if seen.contains(&l) { x } else { f32::NEG_INFINITY });
            }
            Op::Softmax => self.softmax::<I>(args, row, n),
            Op::WeightedSum => self.weighted_sum::<I>(args, syms, row),
            Op::ArgMax => self.argmax(args, row, width(&self.types[0], syms)),
            // Refused when it is bound.
            Op::Input { .. }
            | Op::Weight { .. }
            | Op::State { .. }
            | Op::Reshape
            | Op::GatedScan
            | Op::Return
            | Op::Fused(_) => {}
        }
    }
}

/// The first dimension, constant as checked.
#[inline(always)]
fn rows_of(ty: &TensorType) -> usize {
    ty.shape[0].c as usize
}

impl Kernel for PrimitiveKernel {
    type Work = ();

    #[inline(always)]
    fn run<I: Isa>(&self, (): &mut (), args: Args<'_>, syms: &Syms, items: Range<usize>) {
        for row in items {
            self.row::<I>(args, syms, row);
        }
    }
}

#[cfg(test)]
mod tests;
