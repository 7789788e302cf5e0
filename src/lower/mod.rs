//! Lowering: the description of a model file becomes a graph of primitives.
//!
//! Prefill and decode come from one description; they differ in the bound of `T` and in the rows that the head is
//! computed for. Only the description is read, never tensor data.

mod architecture;
mod builder;
mod config;
mod decoder;

pub use architecture::{ARCHITECTURES, Architecture};
pub use config::Config;

use crate::gguf::{Gguf, GgufError};
use crate::ir::{DType, Graph, Syms};
use builder::Builder;

/// A model file that cannot be lowered.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("architecture {architecture:?} is not supported; these are: {}", ARCHITECTURES.map(|a| a.name).join(", "))]
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
    #[error("the lowered graph is ill-typed: {0}")]
    Graph(String),
}

/// Which rows the head is computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// None: a chunk of a prompt that others follow.
    None,
    /// The last token's: the end of a prompt.
    LastRow,
    /// Every token's: decode, and scoring.
    AllRows,
}

/// A graph to lower.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub name: &'static str,
    /// The most tokens of a step.
    pub tokens: u64,
    pub head: Head,
    /// Returns the best token instead of the logits.
    pub greedy: bool,
    /// Element type of the caches, f32 or f16.
    pub kv: DType,
    /// Rows of the caches.
    pub context: u64,
}

/// Lowers one step of the model.
///
/// The graph takes `tokens` and `pos`, both i32 `[T]`, and returns logits f32 `[rows,V]` (or the best tokens i32
/// `[rows]`), then the last version of every cache.
///
/// # Errors
/// Tensors that are missing, of unsupported types or of other shapes than the metadata says, and tensors that no
/// supported model has.
pub fn lower(gguf: &Gguf, config: &Config, step: &Step) -> Result<Graph, LowerError> {
    let span = tracing::debug_span!("lower", step = step.name, architecture = config.architecture.name);
    let _guard = span.enter();
    let max = 1 << 24;
    if !(1..=max).contains(&step.context) {
        return Err(LowerError::Context { context: step.context, max });
    }
    let bounds = Syms { t: step.tokens.clamp(1, step.context), p: step.context - 1, s: step.context };
    let mut b = Builder::new(gguf, step.name, bounds);
    let results = decoder::build(&mut b, config, step)?;
    let graph = b.finish(config.architecture.name, &results)?;
    tracing::debug!(nodes = graph.len());
    Ok(graph)
}
