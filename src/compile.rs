//! Compilation, from the description of a model file to programs.

use crate::codegen::{self, CodegenError, Layouts, spec::Program};
use crate::gguf::Gguf;
use crate::ir::{DType, Graph, KvTypes, verify};
use crate::lower::{self, Config, LowerError, Step};
use crate::passes::{PassError, Pipeline, Report};
use crate::target::Target;

/// What to compile for.
#[derive(Clone)]
pub struct Options {
    pub target: Target,
    pub pipeline: Pipeline,
    /// Element types of the caches, f32 or f16.
    pub kv: KvTypes,
    /// The most tokens of a sequence; what the model was trained for, but at most [`DEFAULT_CONTEXT`], unless told.
    pub context: Option<u64>,
    /// Sequences at once; the caches have room for all.
    pub sequences: u64,
    /// The most tokens of one step.
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
        Options {
            target,
            pipeline,
            kv: KvTypes::both(DType::F16),
            context: None,
            sequences: 1,
            chunk: DEFAULT_CHUNK,
            greedy: false,
        }
    }

    /// Float32 activations and caches.
    #[must_use]
    pub fn exact(self) -> Options {
        Options { pipeline: self.pipeline.exact(), kv: KvTypes::both(DType::F32), ..self }
    }

    /// Whether activations stay float32 and the caches too.
    pub fn is_exact(&self) -> bool {
        self.kv == KvTypes::both(DType::F32) && !self.pipeline.enabled().contains(&"quantise_acts")
    }

    /// The context for a model.
    pub fn context_of(&self, config: &Config) -> u64 {
        self.context.unwrap_or(config.trained_context.min(DEFAULT_CONTEXT))
    }

    /// The most tokens of one step for a model: no more than all sequences have.
    pub fn chunk_of(&self, config: &Config) -> u64 {
        self.chunk.clamp(1, self.context_of(config).saturating_mul(self.sequences).max(1))
    }
}

/// What the programs are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Generating text: of each step, the logits of a few rows are wanted.
    Generate,
    /// Scoring text: the logits of every token may be wanted.
    Score,
    /// Measuring: what [`Purpose::Generate`] has, and a program that returns the best tokens alone. All share their
    /// caches.
    Bench,
}

/// Rows whose logits are wanted of one step at most where text is generated, for one sequence: a token and the drafts
/// after it.
pub const DRAFTS: u64 = 8;

impl Purpose {
    /// The steps of which the programs are compiled: buckets of `T`, the smallest first.
    pub fn steps(self, config: &Config, options: &Options) -> Vec<Step> {
        let context = options.context_of(config);
        let sequences = options.sequences;
        let few = sequences.max(DRAFTS);
        let chunk = options.chunk_of(config);
        let buckets = options.target.buckets.iter().copied().filter(|&t| t < chunk).chain([chunk]);
        let step = |tokens: u64| {
            let wanted = if self == Purpose::Score { tokens } else { few.min(tokens) };
            let greedy = options.greedy && self == Purpose::Generate;
            Step { tokens, wanted, greedy, kv: options.kv, context, sequences }
        };
        let mut steps: Vec<Step> = buckets.map(step).collect();
        if self == Purpose::Bench {
            // One token of every sequence at once.
            let most = steps.iter().map(|step| step.tokens).find(|&t| t >= sequences).unwrap_or(chunk);
            let greedy = steps.iter().filter(|step| step.tokens <= most);
            let greedy: Vec<Step> = greedy.map(|step| Step { greedy: true, ..*step }).collect();
            steps.extend(greedy);
        }
        steps
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
    let mut fused = vec![];
    for step in purpose.steps(&config, options) {
        let mut graph = lower::lower(gguf, &config, &step)?;
        let report = options.pipeline.run(&mut graph, &options.target)?;
        fused.push((verified("fused", graph)?, report));
    }
    for rule in &options.pipeline.denied {
        let rule = rule.to_string();
        let forbade = |report: &Report| report.forbade().get(rule.as_str()).is_some_and(|times| *times > 0);
        if !fused.iter().any(|(_, report)| forbade(report)) {
            tracing::warn!("the rule {rule} met nothing: no pass came to make such a fusion");
        }
    }
    let layouts = Layouts::choose(fused.iter().map(|(graph, _)| graph), &options.target)?;
    let one = |(graph, report)| {
        let program = codegen::generate(&graph, &options.target, &layouts)?;
        Ok(Compiled { program, report })
    };
    fused.into_iter().map(one).collect()
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
