//! Options that several commands share.

use super::targets;
use clap::{Args, ValueEnum};
use sinter::compile::{self, DEFAULT_CHUNK, Options};
use sinter::gguf::GgufFile;
use sinter::ir::{DType, KvTypes};
use sinter::lower::{Config, Step};
use sinter::model;
use sinter::passes::{Pipeline, UserRule};
use sinter::plan::LoadedPlan;
use sinter::runtime::hip::{HipError, gpu};
use sinter::runtime::{DeviceOptions, On};
use sinter::target::{Target, TargetKind};
use sinter::tune;
use std::path::{Path, PathBuf};
use std::sync::Arc;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// What `--target` takes where it may be several.
pub const SEVERAL_TARGETS: &str = "Targets by name (cpu, gfx1100, sm_90, …; hip or hip:NUMBER for a GPU here) or JSON files that describe \
                                   them, any number between commas [default: cpu]";
/// What stands for a model where a plan may too.
pub const MODEL_OR_PLAN: &str = "Model file (GGUF) or compiled plan; the embedded rustdoc-13m if absent";

/// The model to work on.
#[derive(Args)]
pub struct ModelArgs {
    /// Model file (GGUF); the embedded rustdoc-13m if absent.
    #[arg(value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// The same, as other engines have it.
    #[arg(short = 'm', long = "model", value_name = "MODEL", conflicts_with = "model")]
    pub model_flag: Option<PathBuf>,
}

impl ModelArgs {
    /// The path that was given, if one was.
    pub fn path(&self) -> Option<&Path> {
        self.model.as_deref().or(self.model_flag.as_deref())
    }

    /// Opens the file, or the embedded model.
    pub fn open(&self) -> Result<Arc<GgufFile>, Error> {
        Ok(Arc::new(model::open(self.path())?))
    }
}

/// A model, or a plan of one.
#[derive(Args)]
pub struct SourceArgs {
    /// Model file (GGUF) or compiled plan; the embedded rustdoc-13m if absent.
    #[arg(value_name = "MODEL|PLAN")]
    source: Option<PathBuf>,
    /// Model file; with a plan, where its weights are now.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
}

/// What was given.
pub enum Source {
    /// A plan, and where its weights are, if that was said.
    Plan {
        path: PathBuf,
        model: Option<PathBuf>,
    },
    Model(ModelArgs),
}

impl SourceArgs {
    /// Which of them it is. A plan is refused along with options by which models are compiled, but for one that may be allowed.
    pub fn find(&self, compile: &CompileArgs, allowed: Option<&str>) -> Result<Source, Error> {
        // A plan may stand where a model does.
        let (source, model) = match (&self.source, &self.model) {
            (None, Some(plan)) if model::is_plan(plan) => (Some(plan), None),
            (source, model) => (source.as_ref(), model.clone()),
        };
        if let Some(path) = source.filter(|path| model::is_plan(path)) {
            if let Some(flag) = compile.first_given_but(allowed) {
                return Err(format!("{} is compiled already: {flag} does not apply", path.display()).into());
            }
            return Ok(Source::Plan { path: path.clone(), model });
        }
        if source.is_some() && model.is_some() {
            return Err("the model is given twice".into());
        }
        Ok(Source::Model(ModelArgs { model: source.cloned(), model_flag: model }))
    }
}

/// How to compile.
#[derive(Args)]
pub struct CompileArgs {
    /// Target by name (cpu, gfx1100, sm_90, …; hip or hip:NUMBER for a GPU here) or a JSON file that describes one [default: cpu].
    #[arg(long)]
    pub target: Option<String>,
    /// Float32 activations and, unless --kv says otherwise, caches.
    #[arg(long)]
    pub exact: bool,
    /// Element type of the KV cache, or one for keys and one for values [default: f16; f32 under --exact].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TYPE[,TYPE]")]
    pub kv: Vec<Kv>,
    /// Keep every operation a launch of its own.
    #[arg(long, conflicts_with = "passes")]
    pub no_fuse: bool,
    /// Passes to run, separated by commas; -NAME takes one out of all.
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true, value_name = "LIST")]
    pub passes: Option<Vec<String>>,
    /// Stop after this many rewrites.
    #[arg(long, value_name = "N")]
    pub fuel: Option<u64>,
    /// Make no fusion by this pass or into this kernel (merge, matmul_swiglu@blk.2), or of these two operations (add+rms_norm); any number
    /// of times.
    #[arg(long, value_name = "RULE[@NODE]")]
    pub deny: Vec<UserRule>,
    /// A file of such rules, one a line: deny RULE[@NODE].
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,
    /// Tokens that a sequence may have [default, and for 0: what the model was trained for, at most 4096].
    #[arg(short = 'c', long = "ctx-size", value_name = "N")]
    pub context: Option<u64>,
    /// Most tokens of a prompt in one step.
    #[arg(long, default_value_t = DEFAULT_CHUNK, value_name = "N")]
    pub chunk: u64,
}

/// Element types of a cache.
#[derive(Clone, Copy, ValueEnum)]
pub enum Kv {
    F16,
    F32,
}

impl Kv {
    fn dtype(self) -> DType {
        match self {
            Kv::F16 => DType::F16,
            Kv::F32 => DType::F32,
        }
    }
}

impl CompileArgs {
    fn target(&self) -> &str {
        self.target.as_deref().unwrap_or("cpu")
    }

    /// How many targets are named.
    pub fn targets(&self) -> usize {
        self.target().split(',').count()
    }

    /// The first of these options that was given a value other than its default; but for one of them.
    pub fn first_given_but(&self, allowed: Option<&str>) -> Option<&'static str> {
        let given = [
            (self.target.is_some(), "--target"),
            (self.exact, "--exact"),
            (!self.kv.is_empty(), "--kv"),
            (self.no_fuse, "--no-fuse"),
            (self.passes.is_some(), "--passes"),
            (self.fuel.is_some(), "--fuel"),
            (!self.deny.is_empty(), "--deny"),
            (self.rules.is_some(), "--rules"),
            (self.context.is_some(), "--ctx-size"),
            (self.chunk != DEFAULT_CHUNK, "--chunk"),
        ];
        given.into_iter().find(|(given, flag)| *given && Some(*flag) != allowed).map(|(_, flag)| flag)
    }

    /// Of the plans in a file the one for --target, else the first. Other options by which models are compiled are refused.
    pub fn plan_in(&self, path: &Path, greedy: bool) -> Result<LoadedPlan, Error> {
        let name = path.display();
        let flag = self.first_given_but(Some("--target"));
        if let Some(flag) = flag.or(greedy.then_some("--greedy")) {
            return Err(format!("{name} is compiled already: {flag} does not apply").into());
        }
        let bytes = std::fs::read(path).map_err(|e| format!("cannot read {name}: {e}"))?;
        let plans = LoadedPlan::all_from_bytes(&bytes).map_err(|e| format!("{name}: {e}"))?;
        let targets = plans.iter().map(|plan| plan.target.name.as_str()).collect::<Vec<_>>().join(", ");
        let (several, wanted) = (plans.len() > 1, self.target.as_deref());
        let mut plans = plans.into_iter();
        let plan = plans.find(|plan| wanted.is_none_or(|target| plan.target.name == target));
        let plan = plan.ok_or_else(|| format!("{name}: the plan is for {targets}"))?;
        if several && wanted.is_none() {
            super::say!("{name}: of the plans for {targets}, this is the one for {}", plan.target.name);
        }
        Ok(plan)
    }

    /// The options they stand for where a device is to run what is compiled: its own target, unless one is given.
    pub fn options_on(&self, device: &DeviceArgs, greedy: bool) -> Result<Options, Error> {
        let mut options = self.options(greedy)?;
        match device.device.unwrap_or(Device::Cpu) {
            Device::Hip(number) if self.target() == "cpu" => match gpu(number) {
                Ok(gpu) => options.target = targets::tuned(targets::of_gpu(&gpu)?, &gpu.name)?,
                // Where there are others, one that is named is meant.
                Err(e @ (HipError::Library { .. } | HipError::NoDevice { count: 0, .. })) => {
                    super::say!("no GPU is used, but the CPU: {e}");
                }
                Err(e) => return Err(e.into()),
            },
            Device::Hip(_) => {}
            Device::Cpu if options.target.kind != TargetKind::Cpu => {
                let target = &options.target.name;
                return Err(
                    format!("kernels for {target} do not run on --device cpu; give --device hip").into()
                );
            }
            Device::Cpu => {
                if let (Some(threads), "cpu") = (device.threads, options.target.name.as_str()) {
                    options.target = targets::tuned(Target::cpu(), &tune::cpu(threads))?;
                }
            }
        }
        Ok(options)
    }

    /// The same where the device itself is measured or checked, says `done`: no CPU stands in for a GPU that is not here.
    pub fn options_of(&self, device: &DeviceArgs, done: &str) -> Result<Options, Error> {
        if self.target() == "cpu" {
            device.must_be_here(done)?;
        }
        self.options_on(device, false)
    }

    /// The options of what is to be measured on a device: by rates that nobody measured yet, whatever was kept of it.
    pub fn untuned_options_on(&self, device: &DeviceArgs) -> Result<Options, Error> {
        let (name, target) = match (self.target().parse(), device.device) {
            (Ok(Device::Hip(number)), _) | (Ok(Device::Cpu), Some(Device::Hip(number))) => {
                ("test-cpu", Some(targets::of_gpu(&gpu(number)?)?))
            }
            (Ok(Device::Cpu), _) => ("test-cpu", Some(Target::cpu())),
            (Err(_), _) => (self.target(), None),
        };
        let mut options = self.options_for(name, false)?;
        options.target = target.unwrap_or(options.target);
        Ok(options)
    }

    /// The options they stand for.
    pub fn options(&self, greedy: bool) -> Result<Options, Error> {
        self.options_for(self.target(), greedy)
    }

    /// The rules of the user.
    fn denied(&self) -> Result<Vec<UserRule>, Error> {
        let mut denied = self.deny.clone();
        if let Some(path) = &self.rules {
            denied.extend(read_rules(path)?);
        }
        Ok(denied)
    }

    /// The options they stand for, of each of several targets.
    pub fn options_of_all(&self, greedy: bool) -> Result<Vec<Options>, Error> {
        self.target().split(',').map(|target| self.options_for(target.trim(), greedy)).collect()
    }

    /// The options they stand for, of another target.
    pub fn options_for(&self, target: &str, greedy: bool) -> Result<Options, Error> {
        if self.chunk == 0 {
            return Err("--chunk must be at least 1".into());
        }
        let mut options = Options::new(targets::find(target)?);
        if self.exact {
            options = options.exact();
        }
        options.pipeline = select(options.pipeline, self.no_fuse, self.passes.as_deref(), self.fuel)?;
        options.pipeline.denied = self.denied()?;
        options.kv = match self.kv[..] {
            [] if self.exact => KvTypes::both(DType::F32),
            [] => KvTypes::both(DType::F16),
            [both] => KvTypes::both(both.dtype()),
            [k, v] => KvTypes { k: k.dtype(), v: v.dtype() },
            _ => return Err("--kv takes one type, or one for keys and one for values".into()),
        };
        Ok(Options { context: self.context.filter(|&n| n > 0), chunk: self.chunk, greedy, ..options })
    }
}

/// The rules in a file: `deny RULE[@NODE]` on each line, and what follows a `#` is for people.
fn read_rules(path: &Path) -> Result<Vec<UserRule>, Error> {
    let name = path.display();
    let text = super::files::read_text(path)?;
    let mut rules = vec![];
    for (i, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let at = |e: &dyn std::fmt::Display| format!("{name}:{}: {e}", i + 1);
        let rule = line.strip_prefix("deny").filter(|rule| rule.starts_with(char::is_whitespace));
        let rule = rule.ok_or_else(|| at(&format_args!("a rule is: deny RULE[@NODE], not {line:?}")))?;
        rules.push(rule.trim().parse().map_err(|e| at(&e))?);
    }
    Ok(rules)
}

/// A pipeline with passes selected and fuel set.
pub fn select(
    pipeline: Pipeline,
    no_fuse: bool,
    passes: Option<&[String]>,
    fuel: Option<u64>,
) -> Result<Pipeline, Error> {
    let changes_numbers = "quantise_acts";
    if let Some(list) = passes
        && list.iter().any(|p| p == changes_numbers)
        && !pipeline.enabled().contains(&changes_numbers)
    {
        return Err(format!("--exact leaves activations in float32, so {changes_numbers} cannot run").into());
    }
    let mut pipeline = match passes {
        Some(list) => pipeline.select(list)?,
        None => pipeline,
    };
    if no_fuse {
        pipeline = pipeline.without_fusions();
    }
    pipeline.fuel = fuel;
    Ok(pipeline)
}

/// One of the steps that a model is compiled to.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StepName {
    /// One token.
    Decode,
    /// A chunk of a prompt: logits of a few tokens.
    Prefill,
    /// A chunk of a text: logits of every token.
    Score,
}

impl StepName {
    /// The programs among which it is found.
    pub fn purpose(self) -> compile::Purpose {
        match self {
            StepName::Score => compile::Purpose::Score,
            StepName::Decode | StepName::Prefill => compile::Purpose::Generate,
        }
    }

    /// Its place among `steps` of them.
    pub fn index(self, steps: usize) -> usize {
        match self {
            StepName::Decode => 0,
            StepName::Prefill | StepName::Score => steps.saturating_sub(1),
        }
    }

    /// What to lower for it.
    ///
    /// # Errors
    /// If there is nothing to lower.
    pub fn step(self, config: &Config, options: &Options) -> Result<Step, Error> {
        let steps = self.purpose().steps(config, options);
        Ok(*steps.get(self.index(steps.len())).ok_or("the target has no steps")?)
    }
}

/// A device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// The GPU of this number, or the first that there are kernels for.
    Hip(Option<usize>),
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Device, String> {
        let gpu = |number: &str| number.parse().ok().map(|number| Device::Hip(Some(number)));
        let found = match name {
            "cpu" => Some(Device::Cpu),
            "hip" => Some(Device::Hip(None)),
            name => name.strip_prefix("hip:").and_then(gpu),
        };
        found.ok_or_else(|| "devices are cpu, hip and hip:NUMBER".into())
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Hip(None) => f.write_str("hip"),
            Device::Hip(Some(number)) => write!(f, "hip:{number}"),
        }
    }
}

/// Where to run.
#[derive(Args)]
pub struct DeviceArgs {
    /// Device to run on: cpu, hip (the first GPU that there are kernels for) or hip:NUMBER [default: cpu; of a plan, what it is for].
    #[arg(long)]
    pub device: Option<Device>,
    /// Threads of the CPU device [default: all cores].
    #[arg(short = 't', long, value_name = "N")]
    pub threads: Option<usize>,
    /// On a GPU, make every launch of every step by itself: replay nothing as a graph.
    #[arg(long)]
    pub no_graph: bool,
}

impl DeviceArgs {
    /// Where a plan is to run, if that is said.
    pub fn on(&self) -> Option<On> {
        self.device.map(|device| match device {
            Device::Cpu => On::Cpu,
            Device::Hip(_) => On::Gpu,
        })
    }

    /// # Errors
    /// If it is a GPU that is not here. It is to be measured or checked, says `done`.
    pub fn must_be_here(&self, done: &str) -> Result<(), Error> {
        if let Some(device @ Device::Hip(number)) = self.device {
            gpu(number).map_err(|e| format!("--device {device} is what is to be {done}: {e}"))?;
        }
        Ok(())
    }

    /// What the device is told, and who is told by it: whoever looks at stderr.
    pub fn options(&self) -> DeviceOptions {
        let gpu = match self.device {
            None | Some(Device::Cpu) => None,
            Some(Device::Hip(number)) => number,
        };
        DeviceOptions {
            threads: self.threads,
            gpu,
            eager: self.no_graph,
            progress: super::progress::bars(),
            ..DeviceOptions::default()
        }
    }
}
