//! What codegen produces: kernels to instantiate and launches to make, as plain data.
//!
//! A [`KernelSpec`] says which template to instantiate with which parameters, and of which type and
//! access each argument is; nothing in it names a buffer, so equal kernels are shared by all layers.

use crate::ir::{DType, Dim, Kernel, Rope, StateRole, Syms, TensorType};
use serde::{Deserialize, Serialize};

/// Index into [`KernelSpec::args`].
pub type ArgId = u16;

/// How a kernel touches an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    Read,
    /// Every element is written; nothing is read.
    Write,
    /// A state changed in place: some of its rows are written.
    Update,
    /// Room that the kernel needs while it runs.
    Scratch,
}

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Arg {
    pub access: Access,
    pub ty: TensorType,
    /// What the values are held to, where the kernel follows them.
    pub index: Option<Index>,
}

impl Arg {
    /// An argument whose values the kernel does not follow.
    pub fn new(access: Access, ty: TensorType) -> Arg {
        Arg { access, ty, index: None }
    }
}

/// What values that a kernel follows, as rows, pages or sequences, are held to. Each kernel clamps what it reads by;
/// what it writes by is checked before the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Index {
    /// Each value lies in `0..below`.
    pub below: Dim,
    /// No two values are equal.
    pub distinct: bool,
    pub source: IndexSource,
}

/// Where an index comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IndexSource {
    /// An input of the step, checked before it.
    Input,
    /// Computed on the device.
    Device,
}

/// `write` may lie where `read` lies: each element is read by the work item that writes it, first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Alias {
    pub write: ArgId,
    pub read: ArgId,
}

/// `⌈dim / per⌉` work items along one axis of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    pub dim: Dim,
    pub per: u32,
}

impl Extent {
    pub fn each(dim: impl Into<Dim>) -> Extent {
        Extent { dim: dim.into(), per: 1 }
    }

    /// The number of items at `at`.
    pub fn eval(&self, at: &Syms) -> u64 {
        self.dim.eval(at).div_ceil(u64::from(self.per.max(1)))
    }
}

/// A kernel: a template, its parameters, its arguments and the shape of its launch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelSpec {
    /// The fused kernel this is; none for a primitive.
    pub kernel: Option<Kernel>,
    pub template: Template,
    pub args: Vec<Arg>,
    pub may_alias: Vec<Alias>,
    /// Work items: the product of the extents, the last running fastest.
    pub grid: Vec<Extent>,
}

impl KernelSpec {
    /// The name by which launches are counted.
    pub fn name(&self) -> &'static str {
        match (self.kernel, &self.template) {
            (Some(kernel), _) => kernel.name(),
            (None, Template::Primitive(p)) => p.name(),
            (None, Template::GatedScan(_)) => "gated_scan",
            (None, _) => "unnamed",
        }
    }

    /// Work items of one launch at `at`.
    pub fn items(&self, at: &Syms) -> u64 {
        self.grid.iter().fold(1, |n, e| n.saturating_mul(e.eval(at)))
    }
}

/// What a kernel computes, with everything that is known when it is compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    Matmul(MatmulSpec),
    Norm(NormSpec),
    RopeKv(RopeKvSpec),
    Swiglu(SwigluSpec),
    Attention(AttentionSpec),
    GatedScan(GatedScanSpec),
    Primitive(Primitive),
}

/// `x [T,K]` times the transposed rows of one or more weights `[N,K]`, which stay quantised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatmulSpec {
    /// The activations, f32 or q8_act.
    pub x: ArgId,
    /// Columns of every weight.
    pub k: u64,
    pub parts: Vec<MatmulPart>,
    pub epilogue: Epilogue,
    /// Weight rows of one part that a work item computes (its last item may have fewer), for all `T` tokens. With
    /// [`Epilogue::Swiglu`] an item computes the same rows of both parts.
    pub tile: u32,
}

/// One weight of a matmul.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatmulPart {
    pub weight: ArgId,
    pub format: DType,
    pub rows: u64,
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
    /// Parts are gate and up: `silu(gate) · up` goes to `out`, f32 or q8_act `[T,rows]`.
    Swiglu { out: ArgId },
    /// One part: the index of each token's largest result goes to `out`, i32 `[T]`. `best` f32 and `index` i32,
    /// both `[T,items]`, hold each work item's own.
    ArgMax { best: ArgId, index: ArgId, out: ArgId },
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
    /// q8_act: the quantised norm.
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

/// `silu(gate) · up`, f32 `[T,n]` each, to f32 or q8_act `out`.
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
    /// f32 or q8_act `[T,heads·head_dim]` (or with heads apart).
    pub out: ArgId,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    pub scale: f32,
    /// Rows of a page.
    pub page: u32,
    pub window: Option<u32>,
}

/// A gated linear recurrence over the tokens of each sequence: `h = decay·h + silu(gate)·x`, or `+ x` without a gate. See
/// [`crate::ir::Op::GatedScan`].
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

/// A primitive operation as a kernel of its own: its arguments are the operands (read), then the result (written).
/// `KvAppend` has no result: its first operand is updated. `GatedScan` is no primitive kernel but [`Template::GatedScan`].
/// The semantics are those of [`crate::ir::Op`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Primitive {
    Fill { value: f32 },
    GetRows,
    Dequant,
    QuantAct,
    MatMul,
    Add,
    Mul,
    Silu,
    RmsNorm { eps: f32 },
    Rope(Rope),
    KvAppend,
    KvRead { page: u32 },
    Scores { scale: f32 },
    CausalMask { window: Option<u32> },
    Softmax,
    WeightedSum,
    ArgMax,
}

impl Primitive {
    /// The name by which launches are counted.
    pub fn name(&self) -> &'static str {
        match self {
            Primitive::Fill { .. } => "fill",
            Primitive::GetRows => "get_rows",
            Primitive::Dequant => "dequant",
            Primitive::QuantAct => "quant_act",
            Primitive::MatMul => "matmul",
            Primitive::Add => "add",
            Primitive::Mul => "mul",
            Primitive::Silu => "silu",
            Primitive::RmsNorm { .. } => "rms_norm",
            Primitive::Rope(_) => "rope",
            Primitive::KvAppend => "kv_append",
            Primitive::KvRead { .. } => "kv_read",
            Primitive::Scores { .. } => "scores",
            Primitive::CausalMask { .. } => "causal_mask",
            Primitive::Softmax => "softmax",
            Primitive::WeightedSum => "weighted_sum",
            Primitive::ArgMax => "argmax",
        }
    }
}

/// Index into [`Program::buffers`].
pub type BufId = u32;

/// What one graph becomes: kernels, launches in order, and the buffers they use. Nothing is placed yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub bounds: Syms,
    pub kernels: Vec<KernelSpec>,
    pub launches: Vec<Launch>,
    pub buffers: Vec<Buffer>,
    /// The graph's parameters by name, written before each step.
    pub inputs: Vec<(String, BufId)>,
    /// The graph's results that are not states, read after each step.
    pub results: Vec<BufId>,
}

/// One launch of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// Index into [`Program::kernels`].
    pub kernel: u32,
    /// One buffer per argument of the kernel. Views share the buffer of what they view.
    pub args: Vec<BufId>,
    /// The node it came from, in words.
    pub label: String,
}

/// Memory that a launch reads or writes. Its size is that of `ty` at the program's bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    pub ty: TensorType,
    pub place: Place,
}

/// What a buffer belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Planned in the arena.
    Arena,
    /// A tensor of the model file, read only.
    Weight(String),
    /// Kept from step to step.
    State { name: String, role: StateRole },
}
