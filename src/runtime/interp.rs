//! The reference interpreter: slow and obvious, the oracle of every kernel.
//!
//! Sums accumulate in f64 and every result is rounded to f32 once. A fused node is its body.

use crate::gguf::dequant::{DequantError, dequantise, quantise_q8_act, quantise_q16_act};
use crate::ir::{
    DType, Graph, NodeId, Op, Rope, RopeStyle, Slice, Syms, TensorType, Value, VerifyErrors,
    verify_unfinished,
};
use half::f16;
use indexmap::IndexMap;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A tensor in memory: row-major, little-endian. Clones share what they hold.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    dims: Vec<usize>,
    /// In the storage of `held`.
    data: Arc<Vec<u8>>,
    /// The element type, or what it was dequantised of: whoever reads it dequantises then, so that no float copy of a matrix is held.
    held: DType,
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        (self.dtype, &self.dims) == (other.dtype, &other.dims) && self.bytes() == other.bytes()
    }
}

/// Why a graph has no value.
#[derive(Debug, thiserror::Error)]
pub enum InterpError {
    #[error(transparent)]
    Invalid(#[from] VerifyErrors),
    #[error("the graph {graph:?} takes {expected} inputs, not {given}")]
    Inputs { graph: String, expected: usize, given: usize },
    #[error("a step needs 1 <= T and R <= T within the bounds, but T is {} and R is {}", .0.t, .0.r)]
    Step(Syms),
    #[error("{what} must be {expected}, not {given}")]
    Type { what: String, expected: TensorType, given: TensorType },
    #[error("{ty} does not take {given} bytes")]
    Length { ty: TensorType, given: usize },
    #[error("{ty} is too large for the memory")]
    TooLarge { ty: TensorType },
    #[error("{what} {index} is not below {below}")]
    Index { what: &'static str, index: i32, below: usize },
    #[error("row {row} is written twice")]
    Repeated { row: usize },
    #[error("weight {name:?} cannot be read: {why}")]
    Weight { name: String, why: String },
    #[error("weight {name:?} must be {ty} from row {} on of {}, which {given} has not", rows.first, rows.of)]
    Slice { name: String, rows: Slice, ty: TensorType, given: TensorType },
    #[error("state {name:?} is not given")]
    MissingState { name: String },
    #[error("{op} cannot be evaluated by itself")]
    NotANode { op: &'static str },
    #[error(transparent)]
    Dequant(#[from] DequantError),
}

type Result<T> = std::result::Result<T, InterpError>;

impl Tensor {
    /// A tensor of these bytes.
    ///
    /// # Errors
    /// If `dims` take another number of bytes, or their last is no whole number of blocks.
    pub fn new(dtype: DType, dims: Vec<usize>, data: Vec<u8>) -> Result<Tensor> {
        let ty = constant_type(dtype, &dims);
        let fits = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_some_and(|elements| {
            elements.is_multiple_of(dtype.block_len())
                && (elements / dtype.block_len()).checked_mul(dtype.block_bytes()) == Some(data.len())
        });
        if !fits || !ty.is_blocked() {
            return Err(InterpError::Length { ty, given: data.len() });
        }
        Ok(Tensor { dtype, dims, data: Arc::new(data), held: dtype })
    }

    /// An `f32` tensor.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn from_f32(dims: &[usize], values: &[f32]) -> Result<Tensor> {
        Tensor::new(DType::F32, dims.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// An `i32` tensor.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn from_i32(dims: &[usize], values: &[i32]) -> Result<Tensor> {
        Tensor::new(DType::I32, dims.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// Zeros of a type at `syms`, such as the caches before the first step.
    ///
    /// # Errors
    /// If they do not fit the memory.
    pub fn zeros(ty: &TensorType, syms: &Syms) -> Result<Tensor> {
        let too_large = || InterpError::TooLarge { ty: ty.clone() };
        let bytes = usize::try_from(ty.bytes(syms)).map_err(|_| too_large())?;
        let mut data = vec![];
        data.try_reserve_exact(bytes).map_err(|_| too_large())?;
        data.resize(bytes, 0);
        Tensor::new(ty.dtype, dims(ty, syms), data)
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// In the storage of its element type.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self.held == self.dtype {
            true => Cow::Borrowed(&self.data[..]),
            // What is held was dequantisable when it became so.
            false => Cow::Owned(self.to_f32().map_or(vec![], |values| stored(self.dtype, &values))),
        }
    }

    /// The same as floats, which are dequantised where they are read.
    fn dequantised(&self) -> Result<Tensor> {
        dequantise(self.held, &[], &mut [])?;
        Ok(Tensor { dtype: DType::F32, ..self.clone() })
    }

    /// The rows of this tensor, called `name`, that are a weight of type `ty`.
    ///
    /// # Errors
    /// If the tensor has another number of rows, or not these.
    pub fn slice(&self, name: &str, rows: &Slice, ty: &TensorType) -> Result<Tensor> {
        let fits = self.dims.first().is_some_and(|&all| all as u64 == rows.of) && rows.fits(ty).is_ok();
        let all = self.bytes();
        let row = all.len() as u64 / rows.of.max(1);
        let n = ty.first().as_const().unwrap_or(0);
        let bytes = rows.first.saturating_mul(row) as usize
            ..(rows.first.saturating_add(n)).saturating_mul(row) as usize;
        match all.get(bytes).filter(|_| fits) {
            Some(data) => {
                let dims = [&[n as usize], &self.dims[1..]].concat();
                Tensor::new(self.dtype, dims, data.to_vec())
            }
            None => {
                Err(InterpError::Slice { name: name.into(), rows: *rows, ty: ty.clone(), given: self.ty() })
            }
        }
    }

    /// The type, with constant dimensions.
    pub fn ty(&self) -> TensorType {
        constant_type(self.dtype, &self.dims)
    }

    /// The values, dequantised where needed.
    ///
    /// # Errors
    /// If the elements are integers.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut values = floats(&self.ty(), self.dims.iter().product())?;
        dequantise(self.held, &self.data, &mut values)?;
        Ok(values)
    }

    /// Calls `with` with runs of some of its rows of `k` elements as floats, and the number of the first of each.
    fn in_rows(&self, k: usize, mut with: impl FnMut(usize, &[f32])) -> Result<()> {
        let rows = self.dims.iter().product::<usize>() / k.max(1);
        let bytes = self.data.len() / rows.max(1);
        // A megabyte or so.
        let some = (1 << 18) / k.max(1) + 1;
        let mut values = vec![];
        for first in (0..rows).step_by(some) {
            let n = some.min(rows - first);
            values.resize(n * k, 0.0);
            dequantise(self.held, &self.data[first * bytes..][..n * bytes], &mut values)?;
            with(first, &values);
        }
        Ok(())
    }

    /// The values of an `i32` tensor.
    ///
    /// # Errors
    /// If it is none.
    pub fn to_i32(&self) -> Result<Vec<i32>> {
        if self.dtype != DType::I32 {
            let (expected, given) = (self.ty().with_dtype(DType::I32), self.ty());
            return Err(InterpError::Type { what: "the tensor".into(), expected, given });
        }
        let (words, _) = self.data.as_chunks();
        Ok(words.iter().map(|b| i32::from_le_bytes(*b)).collect())
    }
}

/// The results of a graph, its states included, in the order of its return.
///
/// `weights` gives a tensor by its name; it is asked once for each weight, of which several may be rows of one tensor, when
/// it is first used, and what it gives is dropped after the last use. `states` holds the first versions by name.
///
/// # Errors
/// If the graph does not pass [`verify_unfinished`], something that it needs is missing or of another type, an index
/// is out of range, or the memory does not suffice.
pub fn eval(
    graph: &Graph,
    syms: &Syms,
    inputs: &[Tensor],
    weights: &dyn Fn(&str) -> Result<Tensor>,
    mut states: IndexMap<String, Tensor>,
) -> Result<Vec<Tensor>> {
    verify_unfinished(graph)?;
    if syms.t > graph.bounds.t || syms.r > graph.bounds.r {
        return Err(InterpError::Step(*syms));
    }
    run(graph, syms, inputs, &mut |op, ty| match op {
        Op::Weight { name, rows } => {
            let tensor = weights(name)?;
            match rows {
                Some(rows) => tensor.slice(name, rows, ty),
                None => Ok(tensor),
            }
        }
        Op::State { name, .. } => {
            states.swap_remove(name).ok_or_else(|| InterpError::MissingState { name: name.clone() })
        }
        other => Err(InterpError::NotANode { op: other.name() }),
    })
}

/// The results of node `id` for `operands`, of which there must be as many and of such types as the
/// graph says. Constants and fused nodes have a value too; other leaves and the return have none.
///
/// # Errors
/// If an operand has another type, an index is out of range, or the memory does not suffice.
pub fn eval_node(graph: &Graph, id: NodeId, operands: &[&Tensor], syms: &Syms) -> Result<Vec<Tensor>> {
    check_step(syms)?;
    let Some(node) = graph.get(id) else { return Err(InterpError::NotANode { op: "a removed node" }) };
    let values = graph.operands(id);
    if values.len() != operands.len() {
        let (expected, given) = (values.len(), operands.len());
        return Err(InterpError::Inputs { graph: node.op.name().into(), expected, given });
    }
    for (slot, (v, x)) in values.iter().zip(operands).enumerate() {
        expect(x, graph.ty(*v), syms, || format!("operand {slot} of {}", node.op.name()))?;
    }
    if let Op::Fused(fused) = &node.op {
        let inputs: Vec<Tensor> = operands.iter().map(|&x| x.clone()).collect();
        return run(&fused.body, syms, &inputs, &mut |op, _| Err(InterpError::NotANode { op: op.name() }));
    }
    primitive(&node.op, &node.outs, operands, syms)
}

/// Evaluates all nodes in order; `leaf` gives weights and states.
fn run(
    graph: &Graph,
    syms: &Syms,
    inputs: &[Tensor],
    leaf: &mut dyn FnMut(&Op, &TensorType) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    check_step(syms)?;
    if inputs.len() != graph.inputs().len() {
        let (expected, given) = (graph.inputs().len(), inputs.len());
        return Err(InterpError::Inputs { graph: graph.name.clone(), expected, given });
    }
    let mut live = HashMap::<Value, Tensor>::new();
    for (&id, x) in graph.inputs().iter().zip(inputs) {
        let Op::Input { name, .. } = graph.op(id) else { continue };
        expect(x, graph.ty(id.into()), syms, || format!("input {name:?}"))?;
        live.insert(id.into(), x.clone());
    }
    let mut uses_left = HashMap::<Value, usize>::new();
    for id in graph.ids() {
        for v in graph.operands(id) {
            *uses_left.entry(v).or_default() += 1;
        }
    }
    let mut results = vec![];
    for id in graph.order() {
        let operands = graph.operands(id);
        let values: Vec<&Tensor> = operands.iter().filter_map(|v| live.get(v)).collect();
        let outs = match graph.op(id) {
            Op::Input { .. } => continue,
            Op::Return => {
                results = values.into_iter().cloned().collect();
                vec![]
            }
            op @ (Op::Weight { name, .. } | Op::State { name, .. }) => {
                let x = leaf(op, graph.ty(id.into()))?;
                expect(&x, graph.ty(id.into()), syms, || format!("{} {name:?}", op.name()))?;
                vec![x]
            }
            _ => eval_node(graph, id, &values, syms)?,
        };
        for (out, x) in (0..).zip(outs) {
            let v = Value { node: id, out };
            if uses_left.contains_key(&v) {
                live.insert(v, x);
            }
        }
        for v in operands {
            if let Some(left) = uses_left.get_mut(&v) {
                *left -= 1;
                if *left == 0 {
                    live.remove(&v);
                }
            }
        }
    }
    Ok(results)
}

/// The results, of types `outs`, of an operation that is not fused. The types of the operands are checked.
fn primitive(op: &Op, outs: &[TensorType], x: &[&Tensor], syms: &Syms) -> Result<Vec<Tensor>> {
    let Some(ty) = outs.first() else { return Err(InterpError::NotANode { op: op.name() }) };
    let shape = dims(ty, syms);
    let last = shape.last().copied().unwrap_or(1).max(1);
    let float = |i: usize| x[i].to_f32();
    match op {
        Op::Dequant => return Ok(vec![x[0].dequantised()?]),
        Op::Reshape => return Ok(vec![Tensor { dims: shape, ..x[0].clone() }]),
        _ => {}
    }
    let mut y = Tensor::zeros(ty, syms)?;
    let values: Vec<f32> = match op {
        Op::Const { value } => vec![*value; shape.iter().product()],
        Op::Add => per_row(&float(0)?, &float(1)?, |a, b| a + b),
        Op::Mul => per_row(&float(0)?, &float(1)?, |a, b| a * b),
        Op::Silu => {
            float(0)?.into_iter().map(|x| (f64::from(x) / (1.0 + (-f64::from(x)).exp())) as f32).collect()
        }
        Op::RmsNorm { eps } => rms_norm(&float(0)?, &float(1)?, *eps),
        Op::Softmax => float(0)?.chunks(last).flat_map(softmax).collect(),
        Op::MatMul { .. } => {
            let (rows, k) = (float(0)?, x[0].dims[1]);
            let mut values = floats(ty, shape.iter().product())?;
            x[1].in_rows(k, |first, w| {
                for (y, x) in values.chunks_mut(last).zip(rows.chunks(k.max(1))) {
                    let products = matmul(x, w, k);
                    y[first..][..products.len()].copy_from_slice(&products);
                }
            })?;
            values
        }
        Op::Rope(rope) => {
            let factors = x.get(2).map(|f| f.to_f32()).transpose()?;
            rotate(rope, float(0)?, &shape, &x[1].to_i32()?, factors.as_deref())
        }
        Op::Scores { scale } => {
            let sequences = indices(x[2], "sequence", x[1].dims[0])?;
            scores(&float(0)?, &float(1)?, x[0].dims(), x[1].dims(), &sequences, *scale)
        }
        Op::CausalMask { window } => causal_mask(float(0)?, &shape, &x[1].to_i32()?, *window),
        Op::MatMulId => {
            let ids = indices(x[2], "id", x[1].dims[0])?;
            let (rows, w, k) = (float(0)?, float(1)?, x[0].dims[1]);
            let each = x[1].dims[1] * k;
            let row = |(x, id): (&[f32], usize)| matmul(x, &w[id * each..][..each], k);
            rows.chunks(k.max(1)).zip(ids).flat_map(row).collect()
        }
        Op::WeightedSum => {
            let sequences = indices(x[2], "sequence", x[1].dims[0])?;
            weighted_sum(&float(0)?, &float(1)?, x[0].dims(), x[1].dims(), &sequences)
        }
        Op::QuantAct => {
            let quantise = if y.dtype == DType::Q16Act { quantise_q16_act } else { quantise_q8_act };
            quantise(&float(0)?, Arc::make_mut(&mut y.data).as_mut_slice())?;
            return Ok(vec![y]);
        }
        Op::GetRows => {
            let (table, bytes) = (x[0].bytes(), row_bytes(x[0]));
            let ids = indices(x[1], "id", x[0].dims[0])?;
            for (id, row) in ids.into_iter().zip(Arc::make_mut(&mut y.data).chunks_mut(bytes.max(1))) {
                row.copy_from_slice(&table[id * bytes..][..bytes]);
            }
            return Ok(vec![y]);
        }
        Op::KvAppend => {
            let (new, bytes) = (stored(ty.dtype, &float(1)?), row_bytes(x[0]));
            let mut written = HashSet::new();
            let mut rows = x[0].bytes().into_owned();
            for (row, new) in indices(x[2], "row", shape[0])?.into_iter().zip(new.chunks(bytes.max(1))) {
                if !written.insert(row) {
                    return Err(InterpError::Repeated { row });
                }
                rows[row * bytes..][..bytes].copy_from_slice(new);
            }
            return Ok(vec![Tensor::new(ty.dtype, shape, rows)?]);
        }
        Op::KvRead { page } => {
            kv_read(&mut y, *page as usize, x[0], x[1], x[2])?;
            return Ok(vec![y]);
        }
        Op::GatedScan => {
            let sequences = indices(x[3], "sequence", x[0].dims[0])?;
            let mut state = float(0)?;
            let y = gated_scan(&mut state, &float(1)?, &float(2)?, last, &sequences, &x[4].to_i32()?);
            return Ok(vec![Tensor::from_f32(&shape, &y)?, Tensor::from_f32(x[0].dims(), &state)?]);
        }
        Op::ArgMax => {
            let ids: Vec<i32> = float(0)?.chunks(x[0].dims[1].max(1)).map(argmax).collect();
            return Ok(vec![Tensor::from_i32(&shape, &ids)?]);
        }
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Dequant
        | Op::Reshape
        | Op::Fused(_)
        | Op::Return => {
            return Err(InterpError::NotANode { op: op.name() });
        }
    };
    y.data = Arc::new(stored(DType::F32, &values));
    Ok(vec![y])
}

/// What `x` counts from 0: each value must be below `below`.
fn indices(x: &Tensor, what: &'static str, below: usize) -> Result<Vec<usize>> {
    x.to_i32()?.into_iter().map(|index| checked(index, what, below)).collect()
}

fn checked(index: i32, what: &'static str, below: usize) -> Result<usize> {
    let value = usize::try_from(index).ok().filter(|&value| value < below);
    value.ok_or(InterpError::Index { what, index, below })
}

/// Bytes of all that one index of the first dimension leads to.
fn row_bytes(x: &Tensor) -> usize {
    let elements = x.dims.iter().skip(1).product::<usize>();
    elements / x.dtype.block_len() * x.dtype.block_bytes()
}

/// `w` is as long as `x`, or as its rows.
fn per_row(x: &[f32], w: &[f32], f: fn(f32, f32) -> f32) -> Vec<f32> {
    x.iter().zip(w.iter().cycle()).map(|(&x, &w)| f(x, w)).collect()
}

/// Eight partial sums: a single one would wait for every addition.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(a) * f64::from(b);
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| f64::from(a) * f64::from(b));
    sums.into_iter().chain(rest).sum()
}

fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let norm = |row: &[f32]| {
        let scale = (dot(row, row) / row.len() as f64 + f64::from(eps)).sqrt().recip();
        row.iter().zip(w).map(|(&x, &w)| (f64::from(x) * scale * f64::from(w)) as f32).collect::<Vec<_>>()
    };
    x.chunks(w.len().max(1)).flat_map(norm).collect()
}

fn softmax(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = row.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| (e / sum) as f32).collect()
}

/// `x [T,K]`, `w [N,K]`.
fn matmul(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let k = k.max(1);
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w) as f32)).collect()
}

fn rotate(
    rope: &Rope,
    mut x: Vec<f32>,
    shape: &[usize],
    positions: &[i32],
    factors: Option<&[f32]>,
) -> Vec<f32> {
    let (heads, head_dim, dims) = (shape[1].max(1), shape[2].max(1), rope.dims as usize);
    for (i, head) in x.chunks_mut(head_dim).enumerate() {
        for pair in 0..dims / 2 {
            let factor = factors.map_or(1.0, |f| f64::from(f[pair]));
            let frequency = f64::from(rope.base).powf(-2.0 * pair as f64 / dims as f64);
            let (sin, cos) = (f64::from(positions[i / heads]) * frequency / factor).sin_cos();
            let (a, b) = match rope.style {
                RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
                RopeStyle::NeoX => (pair, pair + dims / 2),
            };
            let (x, y) = (f64::from(head[a]), f64::from(head[b]));
            head[a] = (x * cos - y * sin) as f32;
            head[b] = (x * sin + y * cos) as f32;
        }
    }
    x
}

/// Rows by their positions, into zeros `y [B,C,G,D]`. Pages beyond a sequence's length are not looked at.
fn kv_read(y: &mut Tensor, page: usize, cache: &Tensor, tables: &Tensor, lengths: &Tensor) -> Result<()> {
    let (bytes, pages) = (row_bytes(cache), cache.dims[0] / page);
    let (cache, longest, each) = (cache.bytes(), y.dims[1], tables.dims[1]);
    let (lengths, tables) = (indices(lengths, "length", longest + 1)?, tables.to_i32()?);
    let data = Arc::make_mut(&mut y.data);
    let sequences = data.chunks_mut((longest * bytes).max(1)).zip(tables.chunks(each.max(1))).zip(lengths);
    for ((y, table), length) in sequences {
        for (l, y) in y.chunks_mut(bytes.max(1)).take(length).enumerate() {
            let row = checked(table[l / page], "page", pages)? * page + l % page;
            y.copy_from_slice(&cache[row * bytes..][..bytes]);
        }
    }
    Ok(())
}

/// `q [T,H,D]`, `k [B,C,G,D]` to `[H,T,C]`.
fn scores(
    q: &[f32],
    k: &[f32],
    q_dims: &[usize],
    k_dims: &[usize],
    sequences: &[usize],
    scale: f32,
) -> Vec<f32> {
    let (&[tokens, heads, d], &[_, length, groups, _]) = (q_dims, k_dims) else { return vec![] };
    let mut y = Vec::with_capacity(heads * tokens * length);
    for h in 0..heads {
        let g = h * groups / heads;
        for (t, b) in sequences.iter().enumerate() {
            let q = &q[(t * heads + h) * d..][..d];
            for l in 0..length {
                let k = &k[((b * length + l) * groups + g) * d..][..d];
                y.push((f64::from(scale) * dot(q, k)) as f32);
            }
        }
    }
    y
}

/// Keeps the positions up to the token's own, and of those the last `window`.
fn causal_mask(mut x: Vec<f32>, shape: &[usize], positions: &[i32], window: Option<u32>) -> Vec<f32> {
    let (tokens, length) = (shape[1].max(1), shape[2].max(1));
    for (i, row) in x.chunks_mut(length).enumerate() {
        let position = i64::from(positions[i % tokens]);
        for (l, x) in (0..).zip(row) {
            if l > position || window.is_some_and(|window| l <= position - i64::from(window)) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    x
}

/// `p [H,T,C]`, `v [B,C,G,D]` to `[T,H,D]`. What weighs nothing, as all that is masked, does not count.
fn weighted_sum(p: &[f32], v: &[f32], p_dims: &[usize], v_dims: &[usize], sequences: &[usize]) -> Vec<f32> {
    let (&[heads, tokens, length], &[_, _, groups, d]) = (p_dims, v_dims) else { return vec![] };
    let mut y = Vec::with_capacity(tokens * heads * d);
    for (t, b) in sequences.iter().enumerate() {
        for h in 0..heads {
            let g = h * groups / heads;
            let p = &p[(h * tokens + t) * length..][..length];
            for i in 0..d {
                let seen = p.iter().enumerate().filter(|(_, p)| **p != 0.0);
                let value = |l: usize| f64::from(v[((b * length + l) * groups + g) * d + i]);
                y.push(seen.map(|(l, &p)| f64::from(p) * value(l)).sum::<f64>() as f32);
            }
        }
    }
    y
}

/// `state [B,n]` after each token, `[T,n]`. It is rounded there, so that steps of any size give the same bits.
fn gated_scan(
    state: &mut [f32],
    decay: &[f32],
    x: &[f32],
    n: usize,
    sequences: &[usize],
    positions: &[i32],
) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for (t, (&b, &position)) in sequences.iter().zip(positions).enumerate() {
        let h = &mut state[b * n..][..n];
        if position == 0 {
            h.fill(0.0);
        }
        for (h, (&decay, &x)) in h.iter_mut().zip(decay[t * n..].iter().zip(&x[t * n..])) {
            *h = (f64::from(decay) * f64::from(*h) + f64::from(x)) as f32;
        }
        y.extend_from_slice(h);
    }
    y
}

/// The lowest index of the largest; -1 if there is a NaN.
fn argmax(row: &[f32]) -> i32 {
    if row.iter().any(|x| x.is_nan()) {
        return -1;
    }
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &x) in row.iter().enumerate() {
        if x > best.1 {
            best = (i, x);
        }
    }
    best.0 as i32
}

/// The storage of floats as `f32` or, rounded to nearest even, as `f16`.
fn stored(dtype: DType, x: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F16 => x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn check_step(syms: &Syms) -> Result<()> {
    if syms.t >= 1 && syms.r <= syms.t { Ok(()) } else { Err(InterpError::Step(*syms)) }
}

fn expect(x: &Tensor, ty: &TensorType, syms: &Syms, what: impl Fn() -> String) -> Result<()> {
    if x.dtype == ty.dtype && x.dims == dims(ty, syms) {
        return Ok(());
    }
    let expected = constant_type(ty.dtype, &dims(ty, syms));
    Err(InterpError::Type { what: what(), expected, given: x.ty() })
}

fn dims(ty: &TensorType, syms: &Syms) -> Vec<usize> {
    ty.dims(syms).into_iter().map(|d| usize::try_from(d).unwrap_or(usize::MAX)).collect()
}

fn constant_type(dtype: DType, dims: &[usize]) -> TensorType {
    TensorType::new(dtype, dims.iter().map(|&d| d as u64))
}

fn floats(ty: &TensorType, n: usize) -> Result<Vec<f32>> {
    let mut values = vec![];
    values.try_reserve_exact(n).map_err(|_| InterpError::TooLarge { ty: ty.clone() })?;
    values.resize(n, 0.0);
    Ok(values)
}

#[cfg(test)]
mod tests;
