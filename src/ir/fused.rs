//! What nodes compute, as passes, the cost model, codegen and plans know it: the one reading of fused bodies.
//!
//! A [`Computation`] names its arguments by number: the operands of the node come first, in order, then those of its results
//! that are no next version of a state. [`super::Fused::read`] has one function for each kernel that walks the body from its results to its
//! inputs. It accepts exactly what the kernel computes; anything else is an error, so a rule cannot make a kernel claim more
//! than it does.

mod read;

use super::attributes::Rope;
use super::op::Op;
use super::types::{DType, TensorType};
use serde::{Deserialize, Serialize};

/// The number of an argument: operands first, then results.
pub type ArgId = u16;

/// What a kernel computes, with everything that is known when it is compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Computation {
    Matmul(MatmulSpec),
    Norm(NormSpec),
    RopeKv(RopeKvSpec),
    Swiglu(SwigluSpec),
    Attention(AttentionSpec),
    RopeAttention(RopeAttentionSpec),
    GatedScan(GatedScanSpec),
    /// A primitive operation, which has its semantics from [`Op`].
    Op(Op),
}

impl Computation {
    /// What a node of this operation computes, with operands of types `x`.
    ///
    /// # Errors
    /// See [`super::Fused::read`]; a recurrence over a state of no constant width.
    pub fn of(op: &Op, x: &[&TensorType]) -> Result<Computation, String> {
        match op {
            Op::Fused(fused) => fused.read(),
            Op::GatedScan => {
                let n =
                    x.first().and_then(|state| state.last().as_const()).ok_or("a state of symbolic size")?;
                let [state, decay, x, sequences, positions, out] = [0, 1, 2, 3, 4, 5];
                let gate = None;
                Ok(Computation::GatedScan(GatedScanSpec {
                    state,
                    decay,
                    x,
                    gate,
                    sequences,
                    positions,
                    out,
                    n,
                }))
            }
            op => Ok(Computation::Op(op.clone())),
        }
    }
}

/// `x [T,K]` times the transposed rows of one or more weights `[N,K]`, which stay quantised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatmulSpec {
    /// The activations, f32, q8_act or q16_act.
    pub x: ArgId,
    /// Columns of every weight.
    pub k: u64,
    pub parts: Vec<MatmulPart>,
    pub epilogue: Epilogue,
}

/// One weight of a matmul.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatmulPart {
    pub weight: ArgId,
    pub format: DType,
    pub rows: u64,
    /// To what the activations may be rounded, f16 or bf16, each token's scaled by a power of two first, and what a quantised weight
    /// stands for too.
    pub round: Option<DType>,
    /// f32 `[rows]`, added to every token's result.
    pub bias: Option<ArgId>,
    /// f32 `[T,rows]`, added after the bias.
    pub residual: Option<ArgId>,
    /// f32 `[T,rows]`; absent where the epilogue consumes the result.
    pub out: Option<ArgId>,
}

/// What a matmul does with its results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Epilogue {
    /// Each part is written to its `out`.
    Store,
    /// Parts are gate and up: `silu(gate) · up` goes to `out`, f32, q8_act or q16_act `[T,rows]`.
    Swiglu { out: ArgId },
    /// One part: the index of each token's largest result goes to `out`, i32 `[T]`.
    ArgMax { out: ArgId },
}

/// RMSNorm over rows of `n`, from one of three sources, to any of three results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NormSpec {
    pub source: NormSource,
    pub n: u64,
    /// `[n]`, of any weight format.
    pub weight: ArgId,
    pub eps: f32,
    /// f32: the rows before the norm (the dequantised embedding or the sum).
    pub rows_out: Option<ArgId>,
    /// f32: the norm.
    pub norm_out: Option<ArgId>,
    /// q8_act or q16_act: the quantised norm.
    pub quant_out: Option<ArgId>,
}

/// Where the rows come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormSource {
    /// Row `ids[t]` of `table [V,n]`, of any weight format.
    Embedding { table: ArgId, ids: ArgId },
    /// `a + b`, both f32.
    Sum { a: ArgId, b: ArgId },
    /// f32.
    Rows { x: ArgId },
}

/// RoPE of queries and keys, and the append of keys and values to their caches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeKvSpec {
    pub rope: Rope,
    pub head_dim: u64,
    /// i32 `[T]`.
    pub positions: ArgId,
    /// i32 `[T]`, distinct: the row of the caches that each token's keys and values go to.
    pub rows: ArgId,
    /// f32 `[dims/2]`.
    pub factors: Option<ArgId>,
    /// Queries: f32 `[T,heads·head_dim]` (or with heads apart) to f32 `out`.
    pub q: Option<RopeQ>,
    /// Keys to their cache.
    pub k: RopeK,
    /// Values to their cache, unrotated.
    pub v: Option<CacheRows>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeQ {
    pub x: ArgId,
    pub heads: u64,
    pub norm: Option<HeadNorm>,
    pub out: ArgId,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeK {
    pub rows: CacheRows,
    pub norm: Option<HeadNorm>,
}

/// f32 `[T,heads·head_dim]`, of which row `t` goes to row `rows[t]` of an f32 or f16 cache `[S,heads,head_dim]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheRows {
    pub x: ArgId,
    pub heads: u64,
    pub cache: ArgId,
}

/// RMSNorm of each head (QK-norm) before RoPE; weight f32 `[head_dim]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadNorm {
    pub weight: ArgId,
    pub eps: f32,
}

/// `silu(gate) · up`, f32 `[T,n]` each, to f32, q8_act or q16_act `out`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwigluSpec {
    pub gate: ArgId,
    pub up: ArgId,
    pub out: ArgId,
    pub n: u64,
}

/// Causal attention over two caches in pages, with a running softmax.
///
/// A query at position `p` of its sequence sees positions `0..=p`, of which only the last `window` where there is one,
/// and none that the sequence has not filled; head `h` reads KV head `h·kv_heads/heads`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// f32 `[T,heads,head_dim]`.
    pub q: ArgId,
    /// f32 or f16 `[S,kv_heads,head_dim]`.
    pub k: ArgId,
    pub v: ArgId,
    /// i32 `[B,M]`: the pages of each sequence.
    pub tables: ArgId,
    /// i32 `[B]`: the filled positions of each sequence.
    pub lengths: ArgId,
    /// i32 `[T]`: the sequence of each query.
    pub sequences: ArgId,
    /// i32 `[T]`: the position of each query.
    pub positions: ArgId,
    /// f32, q8_act or q16_act `[T,heads·head_dim]` (or with heads apart).
    pub out: ArgId,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    pub scale: f32,
    /// Rows of a page.
    pub page: u32,
    pub window: Option<u32>,
}

/// What `rope_kv` and then `attention` compute, in one: queries that are turned are stored nowhere.
///
/// `rope_kv` has queries and values; its caches are those of the attention, which reads them as they are after the append. The
/// queries' `out` is the attention's, and `attention.q` is what they are turned from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeAttentionSpec {
    pub rope_kv: RopeKvSpec,
    pub attention: AttentionSpec,
}

/// A gated linear recurrence over the tokens of each sequence: `h = decay·h + silu(gate)·x`, or `+ x` without a gate. See
/// [`Op::GatedScan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatedScanSpec {
    /// f32 `[B,n]`, updated.
    pub state: ArgId,
    /// f32 `[T,n]`, as `x`, `gate` and `out`.
    pub decay: ArgId,
    pub x: ArgId,
    pub gate: Option<ArgId>,
    /// i32 `[T]`.
    pub sequences: ArgId,
    /// i32 `[T]`.
    pub positions: ArgId,
    pub out: ArgId,
    pub n: u64,
}
