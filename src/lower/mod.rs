//! Lowering: the description of a model file becomes a graph of primitives.
//!
//! Prefill and decode are one graph; programs differ in the bounds of `T` and `R`. Only the description is read, never
//! tensor data.

mod architecture;
mod builder;
mod config;
mod families;
mod keys;

pub use architecture::Architecture;
pub use config::{Config, Layer};

use crate::gguf::{Gguf, GgufError};
use crate::ir::{Graph, KvTypes, MAX_SEQUENCES, PAGE, Syms};
use builder::Builder;

/// A model file that cannot be lowered.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("architecture {architecture:?} is not supported; these are: {}", Architecture::ALL.map(Architecture::name).join(", "))]
    Architecture { architecture: String },
    #[error("key {key:?}: {detail}")]
    Key { key: String, detail: String },
    #[error("key {key:?} is {value}, which changes the mathematics in a way that is not supported")]
    Unimplemented { key: String, value: String },
    #[error(
        "key {key:?} is {value}: the file is not a whole model by itself, which is all that is supported"
    )]
    NotWhole { key: String, value: String },
    #[error(
        "key {key:?} (here {value}) is not known; as it may change the mathematics, the model is refused"
    )]
    UnknownKey { key: String, value: String },
    #[error("tensor {name:?} is {found}, but the metadata asks for {wanted}")]
    Tensor { name: String, found: String, wanted: String },
    #[error("tensor {name:?} is not part of a {architecture} model that is supported")]
    Unused { name: String, architecture: String },
    #[error("the context must lie in 1..={max}, not {context}")]
    Context { context: u64, max: u64 },
    #[error("the sequences must lie in 1..={max}, not {sequences}")]
    Sequences { sequences: u64, max: u64 },
    #[error("the lowered graph is ill-typed: {0}")]
    Graph(String),
}

/// A graph to lower.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The most token rows of a step.
    pub tokens: u64,
    /// The most rows of a step whose results are wanted.
    pub wanted: u64,
    /// Returns the best token instead of the logits.
    pub greedy: bool,
    /// Element types of the caches, f32 or f16.
    pub kv: KvTypes,
    /// The most positions of a sequence.
    pub context: u64,
    /// Sequences at once, which share the caches.
    pub sequences: u64,
}

impl Step {
    /// What the graph is called, by its tokens.
    pub fn name(&self) -> String {
        let greedy = if self.greedy { "_greedy" } else { "" };
        format!("t{}{greedy}", self.tokens)
    }

    /// Pages that the longest sequence needs.
    pub fn table_pages(&self) -> u64 {
        self.context.div_ceil(u64::from(PAGE))
    }

    /// Rows of the caches: enough for every sequence.
    pub fn rows(&self) -> u64 {
        self.sequences.saturating_mul(self.table_pages()).saturating_mul(u64::from(PAGE))
    }
}

/// Lowers one step of the model.
///
/// The graph takes the inputs of [`crate::ir::step`] and returns logits f32 `[R,V]` (or the best tokens i32 `[R]`), then
/// the last version of every cache.
///
/// # Errors
/// Tensors that are missing, of unsupported types or of other shapes than the metadata says, and tensors that no
/// supported model has; a context or a number of sequences beyond what can be counted.
pub fn lower(gguf: &Gguf, config: &Config, step: &Step) -> Result<Graph, LowerError> {
    let span = tracing::debug_span!("lower", step = step.name(), architecture = config.architecture.name());
    let _guard = span.enter();
    let max = 1 << 24;
    if !(1..=max).contains(&step.context) {
        return Err(LowerError::Context { context: step.context, max });
    }
    let max = MAX_SEQUENCES;
    if !(1..=max).contains(&step.sequences) {
        return Err(LowerError::Sequences { sequences: step.sequences, max });
    }
    let t = step.tokens.max(1);
    let bounds = Syms { t, r: step.wanted.clamp(1, t) };
    let mut b = Builder::new(gguf, &step.name(), bounds);
    let results = families::build(&mut b, config, step)?;
    let graph = b.finish(config.architecture.name(), &results)?;
    tracing::debug!(nodes = graph.len());
    Ok(graph)
}
