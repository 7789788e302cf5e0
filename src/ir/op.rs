//! The operations of the IR, closed and exhaustively matched, and the types they produce.

use super::attributes::{Rope, Slice, StateRole};
use super::kernel::{Fused, Kernel};
use super::types::{DType, Dim, TensorType};
use serde::{Deserialize, Serialize};

/// What a node computes. Shapes are row-major; `H` heads, `G` KV heads, `D` head dimension, `S` rows of a cache, `B`
/// sequences, `C` positions of the longest sequence. The index operands are inputs of the step ([`super::step`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A parameter of the graph, or of a fused body. In a body, one that stands for a state has the state's role.
    Input { name: String, role: Option<StateRole> },
    /// A tensor of the model file, by name, or some of its rows.
    Weight { name: String, rows: Option<Slice> },
    /// The first version of a state that outlives the step, such as a cache `[S,G,D]` of keys.
    State { name: String, role: StateRole },
    /// Every element is `value`.
    Const { value: f32 },
    /// `(table [V,N], ids i32 [T]) -> [T,N]`: rows of the table, in the table's format. The table may be activations.
    GetRows,
    /// `x -> f32`: the exact values of a quantised or half-precision tensor.
    Dequant,
    /// `f32 [..,N] -> q8_act [..,N]`, or q16_act: see [`DType::Q8Act`] and [`DType::Q16Act`].
    QuantAct,
    /// `(x f32 [T,K], w f32 [N,K]) -> f32 [T,N]`: `x · wᵀ`. With `round`, f16 or bf16, a kernel may round `x` to that, each token's
    /// scaled by a power of two first, and, where `w` is quantised, what it stands for too.
    MatMul { round: Option<DType> },
    /// `(x f32 [T,K], w f32 [E,N,K], ids i32 [T]) -> f32 [T,N]`: each row of `x` times the transposed matrix `ids[t]` of `w`, such
    /// as the expert that was chosen for it.
    MatMulId,
    /// Elementwise sum; the second operand may be `[N]`, added to every row.
    Add,
    /// Elementwise product; the second operand may be `[N]`, multiplied with every row.
    Mul,
    /// `x / (1 + e^-x)`.
    Silu,
    /// `(x [..,N], w [N])`: `x / √(mean(x²) + eps) · w` over the last dimension.
    RmsNorm { eps: f32 },
    /// `(x [T,H,D], pos i32 [T], factors? [dims/2])`: rotary position embedding.
    Rope(Rope),
    /// The same elements in another shape.
    Reshape,
    /// `(cache [S,G,D], x f32 [T,G,D], rows i32 [T]) -> [S,G,D]`: the next version, with `x[t]` in row `rows[t]`. No two of
    /// `rows` are equal.
    KvAppend,
    /// `(cache [S,G,D], tables i32 [B,M], lengths i32 [B]) -> [B,M·page,G,D]`: the rows of each sequence in order of their
    /// positions. Position `l` of sequence `b` is row `l mod page` of page `tables[b][l / page]`; from `lengths[b]` on
    /// there are zeros.
    KvRead { page: u32 },
    /// `(q [T,H,D], k [B,C,G,D], sequences i32 [T]) -> [H,T,C]`: `scale · q·k`, of the keys of the token's sequence; head `h`
    /// reads KV head `h·G/H`.
    Scores { scale: f32 },
    /// `(scores [H,T,C], positions i32 [T])`: a token sees its own position and those before, of which only the last `window`
    /// where there is a window; the rest becomes -∞. A position is below the length of its sequence: what lies beyond that
    /// no kernel has to show.
    CausalMask { window: Option<u32> },
    /// `e^(x - max) / Σ` over the last dimension.
    Softmax,
    /// `(p [H,T,C], v [B,C,G,D], sequences i32 [T]) -> [T,H,D]`: `Σ_l p·v`, of the values of the token's sequence. What is
    /// masked does not count, even if it is not finite.
    WeightedSum,
    /// `(state f32 [B,N], decay f32 [T,N], x f32 [T,N], sequences i32 [T], positions i32 [T]) -> (y [T,N], next [B,N])`: a
    /// gated linear recurrence (Martin and Cundy, 2018, arXiv:1709.04057). Token by token, `h = decay·h + x` for the row
    /// `h` of the token's sequence, which begins at zero at position 0; `y` is `h` after each token.
    GatedScan,
    /// `f32 [T,N] -> i32 [T]`: the index of the largest element, the lowest of equals; -1 if one is NaN.
    ArgMax,
    /// The end of a graph: its results, then the last version of each state.
    Return,
    /// One kernel in place of the nodes of its body. A plan holds what the body was read as, not the body; last, as what is
    /// skipped must not move the numbers of others.
    #[serde(skip)]
    Fused(Box<Fused>),
}

/// The widest heads there are: kernels keep a few on the stack.
pub const MAX_HEAD_DIM: u64 = 1024;

/// What an op is to those who count or place what it makes.
#[derive(PartialEq)]
enum Sort {
    Leaf,
    View,
    Other,
}

impl Op {
    /// A parameter that stands for no state.
    pub fn input(name: impl Into<String>) -> Op {
        Op::Input { name: name.into(), role: None }
    }

    /// A whole tensor of the model file.
    pub fn weight(name: impl Into<String>) -> Op {
        Op::Weight { name: name.into(), rows: None }
    }

    /// The name of each.
    pub const NAMES: [&str; 25] = [
        "input",
        "weight",
        "state",
        "const",
        "get_rows",
        "dequant",
        "quant_act",
        "matmul",
        "matmul_id",
        "add",
        "mul",
        "silu",
        "rms_norm",
        "rope",
        "reshape",
        "kv_append",
        "kv_read",
        "scores",
        "causal_mask",
        "softmax",
        "weighted_sum",
        "gated_scan",
        "argmax",
        "fused",
        "return",
    ];

    /// The mnemonic of the text form, without attributes.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Weight { .. } => "weight",
            Op::State { .. } => "state",
            Op::Const { .. } => "const",
            Op::GetRows => "get_rows",
            Op::Dequant => "dequant",
            Op::QuantAct => "quant_act",
            Op::MatMul { .. } => "matmul",
            Op::MatMulId => "matmul_id",
            Op::Add => "add",
            Op::Mul => "mul",
            Op::Silu => "silu",
            Op::RmsNorm { .. } => "rms_norm",
            Op::Rope(_) => "rope",
            Op::Reshape => "reshape",
            Op::KvAppend => "kv_append",
            Op::KvRead { .. } => "kv_read",
            Op::Scores { .. } => "scores",
            Op::CausalMask { .. } => "causal_mask",
            Op::Softmax => "softmax",
            Op::WeightedSum => "weighted_sum",
            Op::GatedScan => "gated_scan",
            Op::ArgMax => "argmax",
            Op::Fused(_) => "fused",
            Op::Return => "return",
        }
    }

    /// Inputs, weights, states and constants: no operands, and a type of their own.
    pub fn is_leaf(&self) -> bool {
        self.sort() == Sort::Leaf
    }

    /// Ops that only rename bytes: their result lies where their operand lies.
    pub fn is_view(&self) -> bool {
        self.sort() == Sort::View
    }

    fn sort(&self) -> Sort {
        match self {
            Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Const { .. } => Sort::Leaf,
            Op::Reshape => Sort::View,
            Op::GetRows
            | Op::Dequant
            | Op::QuantAct
            | Op::MatMul { .. }
            | Op::MatMulId
            | Op::Add
            | Op::Mul
            | Op::Silu
            | Op::RmsNorm { .. }
            | Op::Rope(_)
            | Op::KvAppend
            | Op::KvRead { .. }
            | Op::Scores { .. }
            | Op::CausalMask { .. }
            | Op::Softmax
            | Op::WeightedSum
            | Op::GatedScan
            | Op::ArgMax
            | Op::Fused(_)
            | Op::Return => Sort::Other,
        }
    }

    /// The fused kernel, if this is one.
    pub fn kernel(&self) -> Option<Kernel> {
        match self {
            Op::Fused(f) => Some(f.kernel),
            _ => None,
        }
    }

    /// Which states the op writes: (the operand it overwrites, the result that is the next version).
    pub fn writes(&self) -> Vec<(u32, u32)> {
        match self {
            Op::KvAppend => vec![(0, 0)],
            Op::GatedScan => vec![(0, 1)],
            Op::Fused(f) => f.writes(),
            Op::Input { .. }
            | Op::Weight { .. }
            | Op::State { .. }
            | Op::Const { .. }
            | Op::GetRows
            | Op::Dequant
            | Op::QuantAct
            | Op::MatMul { .. }
            | Op::MatMulId
            | Op::Add
            | Op::Mul
            | Op::Silu
            | Op::RmsNorm { .. }
            | Op::Rope(_)
            | Op::Reshape
            | Op::KvRead { .. }
            | Op::Scores { .. }
            | Op::CausalMask { .. }
            | Op::Softmax
            | Op::WeightedSum
            | Op::ArgMax
            | Op::Return => vec![],
        }
    }

    /// Below what the values of operand `slot` must lie, where the op follows them as rows, pages, lengths or sequences, of operands
    /// of types `x`; and whether no two may be equal, as the op writes by them.
    pub fn follows(&self, slot: u32, x: &[&TensorType]) -> Option<(Dim, bool)> {
        let first = |operand: usize| x.get(operand).map(|t| t.first());
        let read_by = |below: Option<Dim>| below.map(|below| (below, false));
        match (self, slot) {
            (Op::GetRows, 1) => read_by(first(0)),
            (Op::KvAppend, 2) => first(0).map(|rows| (rows, true)),
            (Op::KvRead { page }, 1) => {
                read_by(first(0).map(|rows| Dim::n(rows.c / u64::from(*page).max(1))))
            }
            (Op::KvRead { page }, 2) => read_by(x.get(1).map(|tables| {
                let most = tables.last().c.saturating_mul(u64::from(*page));
                Dim::n(most.saturating_add(1))
            })),
            (Op::Scores { .. } | Op::WeightedSum, 2) => read_by(first(1)),
            (Op::GatedScan, 3) => read_by(first(0)),
            (Op::MatMulId, 2) => read_by(first(1)),
            (Op::Fused(fused), _) => fused.follows(slot),
            (
                Op::Input { .. }
                | Op::Weight { .. }
                | Op::State { .. }
                | Op::Const { .. }
                | Op::GetRows
                | Op::Dequant
                | Op::QuantAct
                | Op::MatMul { .. }
                | Op::MatMulId
                | Op::Add
                | Op::Mul
                | Op::Silu
                | Op::RmsNorm { .. }
                | Op::Rope(_)
                | Op::Reshape
                | Op::KvAppend
                | Op::KvRead { .. }
                | Op::Scores { .. }
                | Op::CausalMask { .. }
                | Op::Softmax
                | Op::WeightedSum
                | Op::GatedScan
                | Op::ArgMax
                | Op::Return,
                _,
            ) => None,
        }
    }

    /// The result types for operands of types `x`. Leaves and `reshape` produce what `declared` says, and `quant_act` takes the format of
    /// activations from it (q8_act where it says none); all others ignore it.
    ///
    /// # Errors
    /// Which rule is broken.
    pub fn infer(&self, x: &[&TensorType], declared: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let arity = |n: usize| {
            if x.len() == n { Ok(()) } else { Err(format!("takes {n} operands, not {}", x.len())) }
        };
        let one = |t: TensorType| Ok(vec![t]);
        match self {
            Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Const { .. } => {
                arity(0)?;
                let [t] = declared else { return Err("needs exactly one type".into()) };
                if matches!(self, Op::Const { .. }) {
                    f32s(t, "the constant")?;
                }
                if matches!(self, Op::Weight { .. }) && t.shape.iter().any(|d| d.as_const().is_none()) {
                    return Err(format!("a weight has constant dimensions, not {t}"));
                }
                if let Op::Weight { rows: Some(rows), .. } = self {
                    rows.fits(t)?;
                }
                one(t.clone())
            }
            Op::GetRows => {
                arity(2)?;
                let (_, cols) = matrix(x[0], "the table")?;
                one(TensorType { dtype: x[0].dtype, shape: vec![indices(x[1], "the ids")?, cols] })
            }
            Op::Dequant => {
                arity(1)?;
                if !x[0].dtype.is_dequantisable() {
                    return Err(format!("{} needs no dequant", x[0].dtype));
                }
                one(x[0].with_dtype(DType::F32))
            }
            Op::QuantAct => {
                arity(1)?;
                f32s(x[0], "the operand")?;
                let to = declared.first().map(|ty| ty.dtype).filter(|dtype| dtype.is_activations());
                let q = x[0].with_dtype(to.unwrap_or(DType::Q8Act));
                if !q.is_blocked() {
                    return Err(format!("{} elements a row are not whole blocks of 32", x[0].last()));
                }
                one(q)
            }
            Op::MatMul { .. } => {
                arity(2)?;
                f32s(x[0], "the left operand")?;
                f32s(x[1], "the right operand")?;
                let ((t, k), (n, k2)) =
                    (matrix(x[0], "the left operand")?, matrix(x[1], "the right operand")?);
                if k != k2 {
                    return Err(format!("inner dimensions differ: {k} and {k2}"));
                }
                one(TensorType { dtype: DType::F32, shape: vec![t, n] })
            }
            Op::MatMulId => {
                arity(3)?;
                f32s(x[0], "the left operand")?;
                f32s(x[1], "the matrices")?;
                let ((t, k), [e, n, k2]) = (matrix(x[0], "the left operand")?, heads(x[1], "the matrices")?);
                if k != k2 {
                    return Err(format!("inner dimensions differ: {k} and {k2}"));
                }
                if e.as_const().is_none() {
                    return Err(format!("the number of matrices must be constant, not {e}"));
                }
                per_token(x[2], t, "the ids")?;
                one(TensorType { dtype: DType::F32, shape: vec![t, n] })
            }
            Op::Add | Op::Mul => {
                arity(2)?;
                f32s(x[0], "the left operand")?;
                f32s(x[1], "the right operand")?;
                let per_row = x[1].shape.len() == 1 && x[1].last() == x[0].last();
                if x[0].shape != x[1].shape && !per_row {
                    return Err(format!("shapes {} and {} do not match", x[0], x[1]));
                }
                one(x[0].clone())
            }
            Op::Silu | Op::Softmax => {
                arity(1)?;
                f32s(x[0], "the operand")?;
                one(x[0].clone())
            }
            Op::RmsNorm { .. } => {
                arity(2)?;
                f32s(x[0], "the operand")?;
                f32s(x[1], "the weight")?;
                if vector(x[1], "the weight")? != x[0].last() {
                    return Err(format!("the weight {} does not fit rows of {}", x[1], x[0].last()));
                }
                one(x[0].clone())
            }
            Op::Rope(rope) => {
                if x.len() != 2 && x.len() != 3 {
                    return Err(format!("takes 2 or 3 operands, not {}", x.len()));
                }
                f32s(x[0], "the operand")?;
                let [t, _, d] = heads(x[0], "the operand")?;
                per_token(x[1], t, "the positions")?;
                let dims = u64::from(rope.dims);
                if dims == 0 || dims % 2 != 0 || d.as_const().is_none_or(|d| dims > d) {
                    return Err(format!("cannot rotate {dims} dimensions of heads of {d}"));
                }
                if let Some(f) = x.get(2)
                    && (f.dtype != DType::F32 || f.shape != [Dim::n(dims / 2)])
                {
                    return Err(format!("the factors must be f32[{}], not {f}", dims / 2));
                }
                one(x[0].clone())
            }
            Op::Reshape => {
                arity(1)?;
                let [t] = declared else { return Err("needs exactly one type".into()) };
                if t.dtype != x[0].dtype || flat(t).is_none() || flat(t) != flat(x[0]) || !t.is_blocked() {
                    return Err(format!("{} cannot be seen as {t}", x[0]));
                }
                one(t.clone())
            }
            Op::KvAppend => {
                arity(3)?;
                let ([s, g, d], [t, g2, d2]) = (cache(x[0])?, heads(x[1], "the rows")?);
                f32s(x[1], "the rows")?;
                s.as_const().ok_or("a cache needs a constant number of rows")?;
                if (g, d) != (g2, d2) {
                    return Err(format!("rows {} do not fit the cache {}", x[1], x[0]));
                }
                per_token(x[2], t, "the row numbers")?;
                one(x[0].clone())
            }
            Op::KvRead { page } => {
                arity(3)?;
                let [s, g, d] = cache(x[0])?;
                let (b, m) = matrix(x[1], "the block tables")?;
                let table = (b.as_const(), m.as_const());
                let (DType::I32, (Some(_), Some(m))) = (x[1].dtype, table) else {
                    return Err(format!("the block tables must be i32 and constant, not {}", x[1]));
                };
                if indices(x[2], "the lengths")? != b {
                    return Err(format!("the lengths must be i32[{b}], not {}", x[2]));
                }
                let page = u64::from(*page);
                let longest = m.checked_mul(page).filter(|_| page > 0);
                let longest = longest.ok_or_else(|| format!("pages of {page} rows make no sense"))?;
                if s.as_const().is_none_or(|s| s == 0 || s % page != 0) {
                    return Err(format!("{s} rows are not whole pages of {page}"));
                }
                one(TensorType { dtype: x[0].dtype, shape: vec![b, Dim::n(longest), g, d] })
            }
            Op::Scores { .. } => {
                arity(3)?;
                f32s(x[0], "the queries")?;
                let ([t, h, d], [_, l, g, d2]) = (heads(x[0], "the queries")?, gathered(x[1], "the keys")?);
                if d != d2 {
                    return Err(format!("head dimensions differ: {d} and {d2}"));
                }
                divides(g, h)?;
                per_token(x[2], t, "the sequences")?;
                one(TensorType { dtype: DType::F32, shape: vec![h, t, l] })
            }
            Op::CausalMask { window } => {
                arity(2)?;
                f32s(x[0], "the scores")?;
                let [_, t, _] = heads(x[0], "the scores")?;
                per_token(x[1], t, "the positions")?;
                if *window == Some(0) {
                    return Err("a window of 0 sees nothing".into());
                }
                one(x[0].clone())
            }
            Op::WeightedSum => {
                arity(3)?;
                f32s(x[0], "the probabilities")?;
                let ([h, t, l], [_, l2, g, d]) =
                    (heads(x[0], "the probabilities")?, gathered(x[1], "the values")?);
                if l != l2 {
                    return Err(format!("lengths differ: {l} and {l2}"));
                }
                divides(g, h)?;
                per_token(x[2], t, "the sequences")?;
                one(TensorType { dtype: DType::F32, shape: vec![t, h, d] })
            }
            Op::GatedScan => {
                arity(5)?;
                for (x, what) in [(x[0], "the state"), (x[1], "the decay"), (x[2], "the operand")] {
                    f32s(x, what)?;
                }
                let ((b, n), (t, n2)) = (matrix(x[0], "the state")?, matrix(x[2], "the operand")?);
                if n != n2 || x[1].shape != x[2].shape || b.as_const().is_none() || n.as_const().is_none() {
                    return Err(format!("{} and {} do not fit a state {}", x[1], x[2], x[0]));
                }
                per_token(x[3], t, "the sequences")?;
                per_token(x[4], t, "the positions")?;
                Ok(vec![x[2].clone(), x[0].clone()])
            }
            Op::ArgMax => {
                arity(1)?;
                f32s(x[0], "the operand")?;
                let (t, _) = matrix(x[0], "the operand")?;
                one(TensorType { dtype: DType::I32, shape: vec![t] })
            }
            Op::Fused(f) => {
                let params = f.body.inputs();
                arity(params.len())?;
                for (i, (id, have)) in params.iter().zip(x).enumerate() {
                    let want = &f.body.node(*id).outs[0];
                    if want != *have {
                        return Err(format!(
                            "operand {i} is {have}, the body of {} wants {want}",
                            f.kernel.name()
                        ));
                    }
                }
                Ok(f.body.results().into_iter().map(|v| f.body.ty(v).clone()).collect())
            }
            Op::Return => Ok(vec![]),
        }
    }
}

fn f32s(t: &TensorType, what: &str) -> Result<(), String> {
    if t.dtype == DType::F32 { Ok(()) } else { Err(format!("{what} must be f32, not {}", t.dtype)) }
}

fn vector(t: &TensorType, what: &str) -> Result<Dim, String> {
    match t.shape[..] {
        [n] => Ok(n),
        _ => Err(format!("{what} must have one dimension, not {t}")),
    }
}

fn matrix(t: &TensorType, what: &str) -> Result<(Dim, Dim), String> {
    match t.shape[..] {
        [r, c] => Ok((r, c)),
        _ => Err(format!("{what} must have two dimensions, not {t}")),
    }
}

fn heads(t: &TensorType, what: &str) -> Result<[Dim; 3], String> {
    t.shape.clone().try_into().map_err(|_| format!("{what} must have three dimensions, not {t}"))
}

/// The number of indices of a list.
fn indices(t: &TensorType, what: &str) -> Result<Dim, String> {
    if t.dtype == DType::I32 { vector(t, what) } else { Err(format!("{what} must be i32, not {}", t.dtype)) }
}

/// One index for each of `tokens` rows.
fn per_token(t: &TensorType, tokens: Dim, what: &str) -> Result<(), String> {
    match indices(t, what)? {
        n if n == tokens => Ok(()),
        _ => Err(format!("{what} must be i32[{tokens}], not {t}")),
    }
}

/// What [`Op::KvRead`] gives, as f32.
fn gathered(t: &TensorType, what: &str) -> Result<[Dim; 4], String> {
    f32s(t, what)?;
    t.shape.clone().try_into().map_err(|_| format!("{what} must have four dimensions, not {t}"))
}

fn cache(t: &TensorType) -> Result<[Dim; 3], String> {
    if !matches!(t.dtype, DType::F32 | DType::F16) {
        return Err(format!("a cache is f32 or f16, not {}", t.dtype));
    }
    heads(t, "the cache")
}

fn divides(g: Dim, h: Dim) -> Result<(), String> {
    match (g.as_const(), h.as_const()) {
        (Some(g), Some(h)) if g > 0 && h % g == 0 => Ok(()),
        _ => Err(format!("{g} KV heads do not divide {h} heads")),
    }
}

/// The number of elements as (constant factor, symbolic factors).
fn flat(t: &TensorType) -> Option<(u64, Vec<Dim>)> {
    let mut constant = 1u64;
    let mut symbolic = vec![];
    for d in &t.shape {
        match d.as_const() {
            Some(n) => constant = constant.checked_mul(n)?,
            None => symbolic.push(*d),
        }
    }
    symbolic.sort();
    Some((constant, symbolic))
}
