//! Plans: everything that running a model takes, but for the weights, as plain data.
//!
//! [`Plan::build`] places what codegen produced; [`Plan::to_bytes`] and [`LoadedPlan::from_bytes`] are the byte
//! form; [`Plan::validate`] holds a plan from anywhere to the rules below, after which running it touches no
//! memory but its own. A plan refuses models, devices and kernels that it was not compiled for.
//!
//! 1. Every index is in range; every kernel gets as many arguments as it takes.
//! 2. Every argument, at its program's bounds, fits its buffer; weights are only read, states never replaced.
//! 3. States and arena lie within the pool, aligned, and apart; [`check_placement`] holds for every program.
//! 4. Bounds are sane: `1 <= T <= S`, `P <= S`, and `S` is the context of the plan.
//! 5. Row numbers that a kernel looks up in a table come from an input that nothing writes, and that input's
//!    `below` is no more than the rows of the table.

mod bytes;
#[cfg(test)]
pub(super) mod tests;
mod text;
mod traffic;
mod validate;

use super::pool::{PoolError, align_up, place};
use super::schedule::{Flow, FlowBuffer, Home, Slot, size_of};
use crate::codegen::spec::{KernelSpec, NormSource, Place, Primitive, Program, Template};
use crate::gguf::{Digest, Identity};
use crate::ir::{DType, Decision, Syms, TensorType};
use crate::target::{Target, TargetKind};
use indexmap::IndexMap;
use indexmap::map::Entry;
use serde::{Deserialize, Serialize};

pub use bytes::{FORMAT, LoadedPlan};

#[cfg(doc)]
use super::pool::check_placement;

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
    pub kernels: Vec<KernelSpec>,
    pub programs: IndexMap<String, PlannedProgram>,
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
    /// Element type of the KV cache.
    pub kv: DType,
    /// Tokens that fit the cache: `S`.
    pub context: u64,
    /// Tokens per prefill step.
    pub chunk: u64,
    /// Sampling is greedy, so programs may return tokens rather than logits.
    pub greedy: bool,
}

/// A weight that programs read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub ty: TensorType,
}

/// Memory that is kept from step to step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub name: String,
    pub ty: TensorType,
    /// In the pool.
    pub offset: u64,
}

/// One program, placed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedProgram {
    pub bounds: Syms,
    pub launches: Vec<PlannedLaunch>,
    pub buffers: Vec<PlannedBuffer>,
    pub inputs: Vec<Input>,
    /// Indices into `buffers`.
    pub results: Vec<u32>,
    /// The most bytes that live at once.
    pub lower_bound: u64,
    pub arena_bytes: u64,
    /// What the passes decided on the way here.
    pub decisions: Vec<Decision>,
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
    /// Each value must be in `0..below`: the rows of the tables that it is looked up in.
    pub below: Option<u64>,
}

/// One launch, placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedLaunch {
    /// Index into [`Plan::kernels`].
    pub kernel: u32,
    pub args: Vec<BufRef>,
    pub slot: Slot,
    /// The node it came from, in words.
    pub label: String,
}

/// What an argument of a launch is.
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
    Program { program: String, source: PoolError },
    #[error("{0}")]
    Pool(#[from] PoolError),
    #[error("{0}")]
    Target(String),
    #[error("{what} {index} does not exist: there are {len}")]
    Index { what: &'static str, index: u64, len: usize },
    #[error("there are two {what} called {name:?}")]
    Duplicate { what: &'static str, name: String },
    #[error("{what} {name:?} is {a} in one program and {b} in another")]
    Types { what: &'static str, name: String, a: TensorType, b: TensorType },
    #[error("{what} {name:?} cannot be {ty}: its size must be the same in every step")]
    Varies { what: &'static str, name: String, ty: TensorType },
    #[error("program {program:?}: bounds {bounds:?} are not those of a context of {context}")]
    Bounds { program: String, bounds: Syms, context: u64 },
    #[error("a context of {context} tokens with chunks of {chunk} and a cache of {kv} makes no sense")]
    Options { context: u64, chunk: u64, kv: DType },
    #[error("program {program:?}: the {what} {name:?} must be planned in the arena")]
    Home { program: String, what: &'static str, name: String },
    #[error("program {program:?}: launch {launch:?} looks up rows by values that are not checked inputs")]
    Unchecked { program: String, launch: String },
    #[error("program {program:?}: input {input:?} allows values that launch {launch:?} has no row for")]
    Below { program: String, input: String, launch: String },
    #[error("program {program:?} needs {needs} bytes of arena, the plan has {have}")]
    Arena { program: String, needs: u64, have: u64 },
    #[error("program {program:?} claims {claimed} bytes of arena, but {lower_bound} live at once")]
    LowerBound { program: String, claimed: u64, lower_bound: u64 },
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

/// What [`Plan::build`] makes a plan from.
#[derive(Clone, Debug)]
pub struct Parts {
    pub model: Model,
    pub target: Target,
    pub options: Options,
    /// Each with what the passes decided for it. All share their states, weights and context size.
    pub programs: Vec<(Program, Vec<Decision>)>,
}

impl Plan {
    /// Places the programs' launches on the target's streams and their buffers in one pool.
    ///
    /// # Errors
    /// If a program breaks a rule of this module, or two do not go together.
    pub fn build(parts: Parts) -> Result<Plan, PlanError> {
        let Parts { model, target, options, programs } = parts;
        target.validate().map_err(PlanError::Target)?;
        let mut shared = Shared::default();
        let mut planned = IndexMap::new();
        for (program, decisions) in programs {
            let name = program.name.clone();
            let program = shared.take(program, decisions)?;
            if planned.insert(name.clone(), program).is_some() {
                return Err(PlanError::Duplicate { what: "programs", name });
            }
        }
        let tensors = |map: IndexMap<String, TensorType>| map.into_iter();
        let weights = tensors(shared.weights).map(|(name, ty)| Tensor { name, ty }).collect();
        let mut arena_offset = 0u64;
        let mut states = vec![];
        for (name, ty) in shared.states {
            let bytes = state_bytes(&name, &ty, options.context)?;
            states.push(State { name, ty, offset: arena_offset });
            arena_offset = arena_offset.checked_add(bytes).and_then(align_up).ok_or(PoolError::TooLarge)?;
        }
        let mut plan = Plan {
            engine: env!("CARGO_PKG_VERSION").into(),
            kernels_hash: KERNELS_HASH.into(),
            model,
            target,
            options,
            weights,
            states,
            kernels: shared.kernels.into_values().collect(),
            programs: planned,
            arena_offset,
            arena_bytes: 0,
        };
        plan.place()?;
        plan.validate()?;
        Ok(plan)
    }

    /// Gives every launch its slot and every buffer its offset.
    fn place(&mut self) -> Result<(), PlanError> {
        let streams = self.target.streams;
        for index in 0..self.programs.len() {
            let Some((name, program)) = self.programs.get_index(index) else { break };
            let of = |source: PoolError| PlanError::Program { program: name.clone(), source };
            let flow = self.flow(program).map_err(of)?;
            let slots = flow.schedule(streams);
            let placement = place(&flow, &slots, streams).map_err(of)?;
            let program = &mut self.programs[index];
            program.launches.iter_mut().zip(slots).for_each(|(launch, slot)| launch.slot = slot);
            for (buffer, offset) in program.buffers.iter_mut().zip(placement.offsets) {
                buffer.offset = offset.unwrap_or_default();
            }
            program.lower_bound = placement.lower_bound;
            program.arena_bytes = placement.arena_bytes;
            self.arena_bytes = self.arena_bytes.max(placement.arena_bytes);
        }
        Ok(())
    }

    /// What `program` does to memory: its buffers, then the states, then the weights.
    fn flow(&self, program: &PlannedProgram) -> Result<Flow, PoolError> {
        let bounds = program.bounds;
        let mut buffers = vec![];
        let mut push = |name: String, home, ty: &TensorType| -> Result<(), PoolError> {
            let bytes = size_of(&name, ty, &bounds)?;
            buffers.push(FlowBuffer { name, home, bytes, input: false, result: false });
            Ok(())
        };
        for (i, b) in program.buffers.iter().enumerate() {
            push(format!("buffer b{i} {}", b.ty), Home::Arena, &b.ty)?;
        }
        for state in &self.states {
            push(format!("state {:?}", state.name), Home::State, &state.ty)?;
        }
        for weight in &self.weights {
            push(format!("weight {:?}", weight.name), Home::Weight, &weight.ty)?;
        }
        for input in &program.inputs {
            buffers[input.buffer as usize].input = true;
        }
        for result in &program.results {
            buffers[*result as usize].result = true;
        }
        let states = program.buffers.len();
        let weights = states + self.states.len();
        let mut flow = Flow::new(buffers, bounds);
        for launch in &program.launches {
            let at = |arg: &BufRef| match *arg {
                BufRef::Arena(i) => i as usize,
                BufRef::State(i) => states + i as usize,
                BufRef::Weight(i) => weights + i as usize,
            };
            let args: Vec<usize> = launch.args.iter().map(at).collect();
            flow.launch(&launch.label, &self.kernels[launch.kernel as usize], &args)?;
        }
        Ok(flow.finish()?)
    }

    /// The size of all states in bytes.
    pub fn state_bytes(&self) -> u64 {
        let at = at_context(self.options.context);
        self.states.iter().fold(0, |sum, s| sum.saturating_add(s.ty.max_bytes(&at)))
    }

    /// The size of all weights in bytes.
    pub fn weight_bytes(&self) -> u64 {
        let at = at_context(0);
        self.weights.iter().fold(0, |sum, w| sum.saturating_add(w.ty.max_bytes(&at)))
    }

    /// The memory that a device must reserve in bytes: states and arena.
    pub fn pool_bytes(&self) -> u64 {
        self.arena_offset.saturating_add(self.arena_bytes)
    }

    /// # Errors
    /// If the plan holds no hash of the whole file, or another than this.
    pub fn check_full_hash(&self, has: Digest) -> Result<(), PlanError> {
        match self.model.full_hash {
            None => Err(PlanError::NoFullHash),
            Some(wants) if wants != has => Err(PlanError::FullHash { wants, has }),
            Some(_) => Ok(()),
        }
    }

    /// # Errors
    /// If the plan was compiled from another file.
    pub fn check_model(&self, has: &Identity) -> Result<(), PlanError> {
        let wants = self.model.identity;
        if wants == *has {
            return Ok(());
        }
        Err(PlanError::OtherModel { wants: wants.into(), has: (*has).into() })
    }

    /// # Errors
    /// If the plan was compiled for another kind of device.
    pub fn check_device(&self, has: TargetKind) -> Result<(), PlanError> {
        if self.target.kind == has {
            return Ok(());
        }
        let target = self.target.name.clone();
        Err(PlanError::OtherDevice { target, wants: kind_name(self.target.kind), has: kind_name(has) })
    }

    /// # Errors
    /// If the plan was compiled for other kernels than this program has.
    pub fn check_kernels(&self) -> Result<(), PlanError> {
        if self.kernels_hash == KERNELS_HASH {
            return Ok(());
        }
        Err(PlanError::OtherKernels { engine: self.engine.clone() })
    }
}

/// The tables of a plan while it is built.
#[derive(Default)]
struct Shared {
    weights: IndexMap<String, TensorType>,
    states: IndexMap<String, TensorType>,
    /// By their byte form, as floats have no total equality.
    kernels: IndexMap<Vec<u8>, KernelSpec>,
}

impl Shared {
    /// Moves a program's kernels, weights and states to the tables; nothing is placed yet. Buffers that
    /// nothing uses are dropped.
    fn take(&mut self, program: Program, decisions: Vec<Decision>) -> Result<PlannedProgram, PlanError> {
        let Program { name, bounds, kernels, launches, buffers, inputs, results } = program;
        let mut kernel_index = vec![];
        for kernel in kernels {
            let key = postcard::to_stdvec(&kernel).map_err(PlanError::Encode)?;
            let entry = self.kernels.entry(key);
            kernel_index.push(entry.index() as u32);
            entry.or_insert(kernel);
        }
        let mut arena: IndexMap<u32, PlannedBuffer> = IndexMap::new();
        let mut resolve = |id: u32| -> Result<BufRef, PlanError> {
            let len = buffers.len();
            let buffer = buffers.get(id as usize);
            let buffer = buffer.ok_or(PlanError::Index { what: "buffer", index: id.into(), len })?;
            Ok(match &buffer.place {
                Place::Arena => {
                    let entry = arena.entry(id);
                    let index = entry.index() as u32;
                    entry.or_insert_with(|| PlannedBuffer { ty: buffer.ty.clone(), offset: 0 });
                    BufRef::Arena(index)
                }
                Place::State(state) => BufRef::State(one_type("state", &mut self.states, state, &buffer.ty)?),
                Place::Weight(weight) => {
                    BufRef::Weight(one_type("weight", &mut self.weights, weight, &buffer.ty)?)
                }
            })
        };
        let home = |what, name: &str, program: &str| PlanError::Home {
            program: program.to_owned(),
            what,
            name: name.to_owned(),
        };
        let mut planned_inputs = vec![];
        for (input, id) in inputs {
            let BufRef::Arena(buffer) = resolve(id)? else { return Err(home("input", &input, &name)) };
            planned_inputs.push(Input { name: input, buffer, below: None });
        }
        let mut planned_launches = vec![];
        for launch in launches {
            let index = kernel_index.get(launch.kernel as usize);
            let len = kernel_index.len();
            let missing = PlanError::Index { what: "kernel", index: launch.kernel.into(), len };
            let kernel = *index.ok_or(missing)?;
            let args = launch.args.into_iter().map(&mut resolve).collect::<Result<Vec<_>, _>>()?;
            let spec = &self.kernels[kernel as usize];
            if let Some((table, ids)) = lookups(spec)
                && let Some(BufRef::Arena(buffer)) = args.get(usize::from(ids))
            {
                let rows = rows(spec, table);
                for input in planned_inputs.iter_mut().filter(|i: &&mut Input| i.buffer == *buffer) {
                    input.below = Some(input.below.map_or(rows, |below| below.min(rows)));
                }
            }
            planned_launches.push(PlannedLaunch { kernel, args, slot: Slot::default(), label: launch.label });
        }
        let mut planned_results = vec![];
        for (i, id) in results.into_iter().enumerate() {
            let BufRef::Arena(buffer) = resolve(id)? else {
                return Err(home("result", &i.to_string(), &name));
            };
            planned_results.push(buffer);
        }
        Ok(PlannedProgram {
            bounds,
            launches: planned_launches,
            buffers: arena.into_values().collect(),
            inputs: planned_inputs,
            results: planned_results,
            lower_bound: 0,
            arena_bytes: 0,
            decisions,
        })
    }
}

/// The index of `name` in `table`, which has or gets it with type `ty`.
fn one_type(
    what: &'static str,
    table: &mut IndexMap<String, TensorType>,
    name: &str,
    ty: &TensorType,
) -> Result<u32, PlanError> {
    match table.entry(name.to_owned()) {
        Entry::Vacant(entry) => {
            let index = entry.index();
            entry.insert(ty.clone());
            Ok(index as u32)
        }
        Entry::Occupied(entry) if entry.get() == ty => Ok(entry.index() as u32),
        Entry::Occupied(entry) => {
            let (a, b) = (entry.get().clone(), ty.clone());
            Err(PlanError::Types { what, name: name.to_owned(), a, b })
        }
    }
}

/// The arguments `(table, ids)` by which a kernel looks up rows of a table.
fn lookups(kernel: &KernelSpec) -> Option<(u16, u16)> {
    match &kernel.template {
        Template::Primitive(Primitive::GetRows) => Some((0, 1)),
        Template::Norm(norm) => match norm.source {
            NormSource::Embedding { table, ids } => Some((table, ids)),
            NormSource::Sum { .. } | NormSource::Rows { .. } => None,
        },
        _ => None,
    }
}

/// The rows of a table that a kernel takes; 0 if they vary.
fn rows(kernel: &KernelSpec, table: u16) -> u64 {
    let table = kernel.args.get(usize::from(table));
    table.and_then(|arg| arg.ty.shape.first()?.as_const()).unwrap_or(0)
}

/// The symbols that the size of a state may depend on: the context alone.
fn at_context(s: u64) -> Syms {
    Syms { t: 0, p: 0, s }
}

fn state_bytes(name: &str, ty: &TensorType, context: u64) -> Result<u64, PlanError> {
    if ty.shape.iter().any(|d| d.t > 0 || d.p > 0) {
        return Err(PlanError::Varies { what: "state", name: name.to_owned(), ty: ty.clone() });
    }
    Ok(size_of(&format!("state {name:?}"), ty, &at_context(context)).map_err(PoolError::from)?)
}

/// The name of a kind of device.
pub fn kind_name(kind: TargetKind) -> &'static str {
    match kind {
        TargetKind::Cpu => "cpu",
        TargetKind::HipAmd => "hip-amd",
        TargetKind::HipNvidia => "hip-nvidia",
    }
}
