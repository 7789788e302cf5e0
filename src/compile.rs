//! Compilation, from the description of a model file to programs.

use crate::codegen::{self, CodegenError, spec::Program};
use crate::gguf::Gguf;
use crate::ir::{DType, Graph, verify};
use crate::lower::{self, Config, Head, LowerError, Step};
use crate::passes::{PassError, Pipeline, Report};
use crate::target::Target;

/// What to compile for.
#[derive(Clone)]
pub struct Options {
    pub target: Target,
    pub pipeline: Pipeline,
    /// Element type of the caches, f32 or f16.
    pub kv: DType,
    /// Rows of the caches; what the model was trained for, but at most [`DEFAULT_CONTEXT`], unless told.
    pub context: Option<u64>,
    /// The most tokens of one step of a prompt.
    pub chunk: u64,
    /// Decode returns the best token instead of the logits.
    pub greedy: bool,
}

/// The largest context unless told otherwise: caches grow with it, and few prompts need more.
pub const DEFAULT_CONTEXT: u64 = 4096;
/// Tokens of a prompt in one step unless told otherwise.
pub const DEFAULT_CHUNK: u64 = 512;

impl Options {
    /// The defaults for a target: all passes, f16 caches.
    pub fn new(target: Target) -> Options {
        let pipeline = Pipeline::standard(false);
        Options { target, pipeline, kv: DType::F16, context: None, chunk: DEFAULT_CHUNK, greedy: false }
    }

    /// Float32 activations and caches.
    #[must_use]
    pub fn exact(self) -> Options {
        Options { pipeline: Pipeline::standard(true), kv: DType::F32, ..self }
    }

    /// Whether activations stay float32 and the caches too.
    pub fn is_exact(&self) -> bool {
        self.kv == DType::F32 && !self.pipeline.enabled().contains(&"quantise_acts")
    }

    /// The context for a model.
    pub fn context_of(&self, config: &Config) -> u64 {
        self.context.unwrap_or(config.trained_context.min(DEFAULT_CONTEXT))
    }
}

/// What the programs are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Generating text: `chunk` and `prefill` for the prompt, then `decode`.
    Generate,
    /// Scoring text: `score` computes the logits of every token.
    Score,
    /// Measuring: what [`Purpose::Generate`] has, and `decode_greedy`, which returns the best token alone. All share
    /// their caches.
    Bench,
}

impl Purpose {
    /// The steps of which the programs are compiled.
    pub fn steps(self, config: &Config, options: &Options) -> Vec<Step> {
        let context = options.context_of(config);
        let step =
            |name, tokens, head| Step { name, tokens, head, greedy: options.greedy, kv: options.kv, context };
        let generate = [
            step("chunk", options.chunk, Head::None),
            step("prefill", options.chunk, Head::LastRow),
            step("decode", 1, Head::AllRows),
        ];
        match self {
            Purpose::Generate => generate.into(),
            Purpose::Bench => {
                let greedy = Step { greedy: true, ..step("decode_greedy", 1, Head::AllRows) };
                generate.map(|step| Step { greedy: false, ..step }).into_iter().chain([greedy]).collect()
            }
            Purpose::Score => vec![Step { greedy: false, ..step("score", options.chunk, Head::AllRows) }],
        }
    }
}

/// A compiled step: what runs, and why it looks as it does.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub program: Program,
    pub report: Report,
}

/// A model that cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    #[error(transparent)]
    Lower(#[from] LowerError),
    #[error(transparent)]
    Pass(#[from] PassError),
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    #[error("the {stage} graph breaks a rule of the IR:\n{message}")]
    Verify { stage: &'static str, message: String },
    #[error("{0}")]
    Target(String),
}

/// Compiles every step that `purpose` needs. Reads the description of the file only, never tensor data.
///
/// # Errors
/// A model that cannot be lowered or fused, or a target without kernels.
pub fn compile(gguf: &Gguf, options: &Options, purpose: Purpose) -> Result<Vec<Compiled>, CompileError> {
    options.target.validate().map_err(CompileError::Target)?;
    let config = Config::from_gguf(gguf)?;
    let mut programs = vec![];
    for step in purpose.steps(&config, options) {
        let mut graph = lower::lower(gguf, &config, &step)?;
        let report = options.pipeline.run(&mut graph, &options.target)?;
        let graph = verified("fused", graph)?;
        let program = codegen::generate(&graph, &options.target)?;
        programs.push(Compiled { program, report });
    }
    Ok(programs)
}

/// The fused graph of one step, and what the passes decided.
///
/// # Errors
/// As [`compile`].
pub fn fuse(gguf: &Gguf, options: &Options, step: &Step) -> Result<(Graph, Report), CompileError> {
    options.target.validate().map_err(CompileError::Target)?;
    let config = Config::from_gguf(gguf)?;
    let mut graph = lower::lower(gguf, &config, step)?;
    let report = options.pipeline.run(&mut graph, &options.target)?;
    Ok((graph, report))
}

fn verified(stage: &'static str, graph: Graph) -> Result<crate::ir::Verified, CompileError> {
    verify(graph).map_err(|e| CompileError::Verify { stage, message: e.to_string() })
}
