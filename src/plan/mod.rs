//! Plans: everything that running a model takes, but for the weights, as plain data.
//!
//! [`Plan::build`] places what codegen produced; [`Plan::to_bytes`] and [`LoadedPlan::from_bytes`] are the byte
//! form; [`Plan::validate`] holds a plan from anywhere to the rules below, after which running it touches no
//! memory but its own. A plan refuses models, devices and kernels that it was not compiled for.
//!
//! 1. Every index is in range; every kernel gets as many arguments as it takes.
//! 2. Every argument, at its program's bounds, fits its buffer; weights are only read, states never replaced.
//! 3. States and arena lie within the pool, aligned, and apart; [`check_placement`] holds for every program.
//! 4. Bounds are sane: `1 <= T`, `R <= T`.
//! 5. Values that a kernel follows as those of an input come from an input of the same type that nothing writes, and that is
//!    held to no less than the kernel asks for.
//! 6. Rows of a weight lie within its tensor, and can lie as the plan says; every kernel that reads it takes it so. Rows
//!    that are repacked are in no other weight.
//! 7. All kernels that go over the caches agree on the pages ([`Paging`]), and the caches have as many rows.
//! 8. There is machine code of all sources of its kernels or of none, once each, and all is for the target's architecture.
//!
//! A file of plans ([`to_bytes`]) holds one, or several of one model for different targets.

mod build;
mod bytes;
mod flow;
pub mod memory;
mod objects;
mod paging;
pub mod schedule;
#[cfg(test)]
pub(crate) mod tests;
mod text;
mod traffic;
mod validate;

use crate::codegen::spec::{ArgId, Computation, Implementation, KernelSpec, Layout, NormSource};
use crate::gguf::{Digest, Identity};
use crate::ir::{DType, Dim, KvTypes, Op, Report, Slice, StateRole, StepInput, Syms, TensorType};
use crate::target::{Target, TargetKind};
use memory::MemoryError;
use schedule::{Slot, size_of};
use serde::{Deserialize, Serialize};

pub use build::Parts;
pub use bytes::{FORMAT, LoadedPlan, to_bytes};
pub use objects::CodeObject;
pub use paging::Paging;
pub use traffic::CallWork;

#[cfg(doc)]
use memory::check_placement;

/// BLAKE3 of the sources that a plan's kernels rely on (see build.rs).
pub const KERNELS_HASH: &str = env!("SINTER_KERNELS_HASH");

/// A compiled model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of the compiler.
    pub engine: String,
    /// [`KERNELS_HASH`] of the compiler.
    pub kernels_hash: String,
    pub model: Model,
    pub target: Target,
    pub options: Options,
    pub weights: Vec<Tensor>,
    pub states: Vec<State>,
    /// Shared by all programs.
    pub kernels: Vec<Implementation>,
    /// Machine code of the kernels' sources, where they were compiled ahead of time.
    pub objects: Vec<CodeObject>,
    /// The smallest bucket of tokens first.
    pub programs: Vec<PlannedProgram>,
    /// Where the arena begins in the pool; the states lie before it.
    pub arena_offset: u64,
    /// The largest arena of any program: they never run at once.
    pub arena_bytes: u64,
}

/// The model that a plan was compiled from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The file as it was named; none for the embedded model.
    pub source: Option<String>,
    pub identity: Identity,
    /// BLAKE3 of the whole file, where the plan was compiled with it.
    pub full_hash: Option<Digest>,
    pub architecture: String,
    pub name: String,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Float32 activations and cache.
    pub exact: bool,
    /// Element types of the caches.
    pub kv: KvTypes,
    /// The most tokens of a sequence.
    pub context: u64,
    /// Sequences at once.
    pub sequences: u64,
    /// The most tokens of a step.
    pub chunk: u64,
    /// Sampling is greedy, so programs may return tokens rather than logits.
    pub greedy: bool,
}

/// A weight that programs read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Its name in the model file.
    pub name: String,
    pub ty: TensorType,
    /// Which rows of the tensor these are; none if they are all of it.
    pub rows: Option<Slice>,
    /// How they lie in the device's memory.
    pub layout: Layout,
}

/// Memory that is kept from step to step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub name: String,
    pub ty: TensorType,
    pub role: StateRole,
    /// In the pool.
    pub offset: u64,
}

/// One program, placed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedProgram {
    /// For people.
    pub name: String,
    pub bounds: Syms,
    pub calls: Vec<PlannedCall>,
    pub buffers: Vec<PlannedBuffer>,
    pub inputs: Vec<Input>,
    /// Indices into `buffers`.
    pub results: Vec<u32>,
    /// The most bytes that live at once.
    pub lower_bound: u64,
    pub arena_bytes: u64,
    /// What the passes decided on the way here.
    pub report: Report,
}

/// What a program returns of each row that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Its logits.
    Logits,
    /// The best token alone.
    Token,
}

impl PlannedProgram {
    /// What the first result is; none if there is no result, or one of another type.
    pub fn output(&self) -> Option<Output> {
        match self.buffers.get(*self.results.first()? as usize)?.ty.dtype {
            DType::F32 => Some(Output::Logits),
            DType::I32 => Some(Output::Token),
            _ => None,
        }
    }
}

/// A buffer in the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedBuffer {
    pub ty: TensorType,
    /// From the start of the arena.
    pub offset: u64,
}

/// What is written before each step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    pub name: String,
    /// Index into the program's buffers.
    pub buffer: u32,
    /// Each value must be in `0..below`, where kernels follow them.
    pub below: Option<Dim>,
    /// No two values may be equal: kernels write by them.
    pub distinct: bool,
}

/// One call, placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedCall {
    /// Index into [`Plan::kernels`].
    pub kernel: u32,
    pub args: Vec<BufRef>,
    pub slot: Slot,
    /// The node it came from, in words.
    pub label: String,
}

/// What an argument of a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BufRef {
    /// Index into [`PlannedProgram::buffers`].
    Arena(u32),
    /// Index into [`Plan::states`].
    State(u32),
    /// Index into [`Plan::weights`].
    Weight(u32),
}

/// Why there is no such plan, or why it will not run here.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("this is not a plan: it does not begin with SINTERPL")]
    Foreign,
    #[error("the plan has format {found}, this sinter reads format {FORMAT}; compile it again")]
    Format { found: u32 },
    #[error("the plan is truncated: {have} bytes of {want}")]
    Truncated { have: u64, want: u64 },
    #[error("{extra} bytes follow the end of the plan")]
    Trailing { extra: u64 },
    #[error("the plan is damaged: its checksum does not match")]
    Checksum,
    #[error("the plan is damaged: {0}")]
    Decode(postcard::Error),
    #[error("the plan cannot be written: {0}")]
    Encode(postcard::Error),
    #[error("program {program:?}: {source}")]
    Program { program: String, source: MemoryError },
    #[error("{0}")]
    Pool(#[from] MemoryError),
    #[error("{0}")]
    Target(String),
    #[error("{what} {index} does not exist: there are {len}")]
    Index { what: &'static str, index: u64, len: usize },
    #[error("there are two {what} called {name:?}")]
    Duplicate { what: &'static str, name: String },
    #[error("{what} {name:?} is {a} in one program and {b} in another")]
    Types { what: &'static str, name: String, a: String, b: String },
    #[error("input {input:?} would have to be below {a} and below {b}, of which neither is always less")]
    Limits { input: String, a: Dim, b: Dim },
    #[error("{what} {name:?} cannot be {ty}: its size must be the same in every step")]
    Varies { what: &'static str, name: String, ty: TensorType },
    #[error("weight {name:?}: {why}")]
    Rows { name: String, why: String },
    #[error("program {program:?}: call {call:?} does not take its argument {arg} as it lies in memory")]
    Layout { program: String, call: String, arg: ArgId },
    #[error("program {program:?}: bounds need 1 <= T and R <= T, but are {bounds:?}")]
    Bounds { program: String, bounds: Syms },
    #[error(
        "{sequences} sequences of {context} tokens with chunks of {chunk} and caches of {kv} make no sense"
    )]
    Options { context: u64, sequences: u64, chunk: u64, kv: KvTypes },
    #[error("the plan's kernels do not agree on the pages of the caches: {0}")]
    Paging(String),
    #[error("program {program:?}: the {what} {name:?} must be planned in the arena")]
    Home { program: String, what: &'static str, name: String },
    #[error("program {program:?}: call {call:?} follows values that are not checked inputs")]
    Unchecked { program: String, call: String },
    #[error("program {program:?}: input {input:?} allows values that call {call:?} cannot follow")]
    Below { program: String, input: String, call: String },
    #[error("program {program:?} needs {needs} bytes of arena, the plan has {have}")]
    Arena { program: String, needs: u64, have: u64 },
    #[error("program {program:?} claims {claimed} bytes of arena, but {lower_bound} live at once")]
    LowerBound { program: String, claimed: u64, lower_bound: u64 },
    #[error("{kernel}: there is no machine code of its source, but of others'")]
    NoObject { kernel: String },
    #[error("there is machine code of the source {source_hash}, which no kernel has")]
    ForeignObject { source_hash: Digest },
    #[error("there is machine code for {has:?}, and the plan is for {wants:?}")]
    ObjectArch { has: String, wants: String },
    #[error("the file holds no plan")]
    NoPlan,
    #[error("the file holds plans for {}, and one is wanted", targets.join(", "))]
    Several { targets: Vec<String> },
    #[error("the file holds two plans for {target}")]
    SameTarget { target: String },
    #[error("the file holds plans of different models, {a} and {b}")]
    Models { a: Box<Identity>, b: Box<Identity> },
    #[error("the plan was compiled for another model file: it needs {wants}, this one has {has}")]
    OtherModel { wants: Box<Identity>, has: Box<Identity> },
    #[error("the plan holds no hash of the whole model file; compile it again with --verify")]
    NoFullHash,
    #[error("the model file has changed since the plan was compiled: its hash is {has}, not {wants}")]
    FullHash { wants: Digest, has: Digest },
    #[error("the plan was compiled for {target} ({wants}), which cannot run on the device {has}")]
    OtherDevice { target: String, wants: &'static str, has: &'static str },
    #[error("the kernels have changed since sinter {engine} compiled the plan; compile it again")]
    OtherKernels { engine: String },
}

impl Plan {
    /// The size of all states in bytes.
    pub fn state_bytes(&self) -> u64 {
        self.states.iter().fold(0, |sum, s| sum.saturating_add(s.ty.bytes(&CONSTANT)))
    }

    /// The size in bytes of the weights that do not lie as in the model file, so are copied from it.
    pub fn repacked_bytes(&self) -> u64 {
        let repacked = self.weights.iter().filter(|w| w.layout != Layout::RowMajor);
        repacked.fold(0, |sum, w| sum.saturating_add(w.ty.bytes(&CONSTANT)))
    }

    /// The size of all weights in bytes.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.iter().fold(0, |sum, w| sum.saturating_add(w.ty.bytes(&CONSTANT)))
    }

    /// The program with the smallest bucket that takes `tokens` rows, `wanted` of them with this output.
    pub fn program_for(&self, tokens: u64, wanted: u64, output: Output) -> Option<usize> {
        let fits =
            |p: &PlannedProgram| tokens <= p.bounds.t && wanted <= p.bounds.r && p.output() == Some(output);
        let fitting = (0..self.programs.len()).filter(|&i| fits(&self.programs[i]));
        fitting.min_by_key(|&i| (self.programs[i].bounds.t, self.programs[i].bounds.r))
    }

    /// What the plan returns of a row where text is generated.
    pub fn output(&self) -> Output {
        if self.options.greedy { Output::Token } else { Output::Logits }
    }

    /// The number of tokens that every program takes: ids are below. None if no program takes any.
    pub fn vocabulary(&self) -> Option<u64> {
        let inputs = self.programs.iter().flat_map(|program| &program.inputs);
        let tokens = inputs.filter(|input| input.name == StepInput::Tokens.name());
        tokens.filter_map(|input| input.below?.as_const()).min()
    }

    /// The most token rows of a step, and the most that may be wanted of one, with this output.
    pub fn largest(&self, output: Output) -> Syms {
        let fitting = self.programs.iter().filter(|p| p.output() == Some(output)).map(|p| p.bounds);
        fitting.fold(Syms { t: 0, r: 0 }, |a, b| Syms { t: a.t.max(b.t), r: a.r.max(b.r) })
    }

    /// The memory that a device must reserve in bytes: states and arena.
    pub fn pool_bytes(&self) -> u64 {
        self.arena_offset.saturating_add(self.arena_bytes)
    }

    /// # Errors
    /// If the plan holds no hash of the whole file, or another than this.
    pub fn require_full_hash(&self, has: Digest) -> Result<(), PlanError> {
        match self.model.full_hash {
            None => Err(PlanError::NoFullHash),
            Some(wants) if wants != has => Err(PlanError::FullHash { wants, has }),
            Some(_) => Ok(()),
        }
    }

    /// # Errors
    /// If the plan was compiled from another file.
    pub fn require_model(&self, has: &Identity) -> Result<(), PlanError> {
        let wants = self.model.identity;
        if wants == *has {
            return Ok(());
        }
        Err(PlanError::OtherModel { wants: wants.into(), has: (*has).into() })
    }

    /// # Errors
    /// If the plan was compiled for another kind of device.
    pub fn require_device(&self, has: TargetKind) -> Result<(), PlanError> {
        if self.target.kind == has {
            return Ok(());
        }
        let target = self.target.name.clone();
        Err(PlanError::OtherDevice { target, wants: kind_name(self.target.kind), has: kind_name(has) })
    }

    /// # Errors
    /// If the plan was compiled for other kernels than this program has.
    pub fn require_kernels(&self) -> Result<(), PlanError> {
        if self.kernels_hash == KERNELS_HASH {
            return Ok(());
        }
        Err(PlanError::OtherKernels { engine: self.engine.clone() })
    }
}

/// The arguments `(table, ids)` by which a kernel looks up rows of a table.
fn lookups(kernel: &KernelSpec) -> Option<(ArgId, ArgId)> {
    match &kernel.computes {
        Computation::Op(Op::GetRows) => Some((0, 1)),
        Computation::Norm(norm) => match norm.source {
            NormSource::Embedding { table, ids } => Some((table, ids)),
            NormSource::Sum { .. } | NormSource::Rows { .. } => None,
        },
        Computation::Op(
            Op::Input { .. }
            | Op::Weight { .. }
            | Op::State { .. }
            | Op::Const { .. }
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
            | Op::Scores { .. }
            | Op::Softmax
            | Op::WeightedSum
            | Op::GatedScan
            | Op::ArgMax
            | Op::Fused(_)
            | Op::Return
            | Op::KvRead { .. }
            | Op::CausalMask { .. },
        )
        | Computation::Matmul(_)
        | Computation::RopeKv(_)
        | Computation::Swiglu(_)
        | Computation::Attention(_)
        | Computation::RopeAttention(_)
        | Computation::GatedScan(_) => None,
    }
}

/// For sizes in which no symbol occurs.
const CONSTANT: Syms = Syms { t: 0, r: 0 };

fn state_bytes(name: &str, ty: &TensorType) -> Result<u64, PlanError> {
    if ty.shape.iter().any(|d| d.as_const().is_none()) {
        return Err(PlanError::Varies { what: "state", name: name.to_owned(), ty: ty.clone() });
    }
    Ok(size_of(&format!("state {name:?}"), ty, &CONSTANT).map_err(MemoryError::from)?)
}

/// The name of a kind of device.
pub fn kind_name(kind: TargetKind) -> &'static str {
    match kind {
        TargetKind::Cpu => "cpu",
        TargetKind::HipAmd => "hip-amd",
        TargetKind::HipNvidia => "hip-nvidia",
    }
}
