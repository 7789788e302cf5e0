//! From a model or a plan to what can be profiled, each part of it timed.

use super::report::Load;
use super::{Args, DEFAULT_PROMPT, Error};
use crate::cli::args::{ModelArgs, Source};
use crate::cli::progress;
use sinter::bench::{self, Test, Timer, Work};
use sinter::compile::{Options, Purpose};
use sinter::generate::{EncodeOptions, Tokenizer};
use sinter::gguf::GgufFile;
use sinter::lower::Config;
use sinter::model;
use sinter::plan::{LoadedPlan, Output, Plan};
use sinter::runtime::{Executor, Progress, Stage};
use sinter::target::TargetKind;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A model on a device.
pub struct Ready {
    pub executor: Executor,
    pub load: Load,
    pub name: String,
    pub work: WorkToDo,
    pub tokenise: Option<Duration>,
}

/// What is to be profiled.
pub struct WorkToDo {
    /// Tests of a step each: the prompt's, if there is one, then one of generation.
    pub tests: Vec<Test>,
    /// Tokens of the prompt.
    pub prompt: u64,
    /// The tokens themselves, of a text.
    pub tokens: Option<Vec<u32>>,
}

impl WorkToDo {
    /// A prompt that nobody gave is no longer than fits.
    fn new(args: &Args, tokens: Option<Vec<u32>>, chunk: u64, context: Option<u64>) -> WorkToDo {
        let (depth, sequences) = (args.n_depth, args.n_sequences);
        let fitting = || DEFAULT_PROMPT.min(context.unwrap_or(u64::MAX).saturating_sub(depth));
        let prompt = match &tokens {
            Some(tokens) => tokens.len() as u64,
            None => args.n_prompt.unwrap_or_else(fitting),
        };
        let mut tests = vec![Test { work: Work::Generate { tokens: 1, logits: true }, depth, sequences }];
        if prompt > 0 {
            // One step reads no more.
            tests.insert(0, Test { work: Work::Prompt(prompt.min(chunk)), depth, sequences: 1 });
        }
        WorkToDo { tests, prompt, tokens }
    }

    /// Tokens that a sequence must have room for.
    fn needs(&self) -> u64 {
        self.tests.iter().map(Test::context).max().unwrap_or(1).max(self.prompt)
    }

    /// Makes sure that a context suffices.
    fn check(&self, context: u64) -> Result<(), Error> {
        bench::check_context(&self.tests, context)?;
        let whole = Test { work: Work::Prompt(self.prompt), depth: 0, sequences: 1 };
        Ok(bench::check_context(&[whole], context)?)
    }
}

/// The tokens of the prompt that was given.
fn tokens(args: &Args, file: &GgufFile, timer: &Timer) -> Result<Option<Vec<u32>>, Error> {
    let Some(text) = &args.prompt else { return Ok(None) };
    let _tokenise = timer.scope("tokenise");
    let tokens = Tokenizer::from_gguf(file.gguf())?.encode(text, EncodeOptions::default());
    if tokens.is_empty() {
        return Err("the prompt has no tokens, and the model has no start token".into());
    }
    Ok(Some(tokens))
}

impl Ready {
    pub fn new(args: &Args, source: &Source) -> Result<Ready, Error> {
        let (timer, start) = (Timer::default(), Instant::now());
        let (file, plan, work) = match source {
            Source::Plan { path, model } => of_plan(args, path, model.as_deref(), &timer)?,
            Source::Model(source) => of_model(args, source, &timer)?,
        };
        let stages = Stages::default();
        let mut device = args.device.options();
        device.progress = stages.progress();
        let executor = Executor::new(plan, Arc::clone(&file), &device)?;
        let part = |name| ms(timer.of(name));
        let tokenise = args.prompt.as_ref().map(|_| timer.of("tokenise"));
        let mut load = Load {
            open_ms: part("open"),
            identify_ms: part("identify"),
            compile_ms: matches!(source, Source::Model(_)).then(|| part("compile")),
            plan_ms: part("plan"),
            kernels_ms: ms(stages.time(Stage::Kernels)),
            weights_ms: ms(stages.time(Stage::Weights)),
            ..Load::default()
        };
        let sum = |load: &Load| load.parts().iter().map(|(_, ms, _)| ms).sum::<f64>();
        load.rest_ms = (ms(start.elapsed()) - tokenise.map_or(0.0, ms) - sum(&load)).max(0.0);
        load.all_ms = sum(&load);
        let name = file.gguf().str_opt("general.name")?.unwrap_or("unnamed").to_string();
        Ok(Ready { executor, load, name, work, tokenise })
    }
}

type Parts = (Arc<GgufFile>, LoadedPlan, WorkToDo);

/// The plan of a file that runs on the device.
fn of_plan(args: &Args, path: &Path, model: Option<&Path>, timer: &Timer) -> Result<Parts, Error> {
    args.device.must_be_here("measured")?;
    let plan = timer.time("plan", || model::read_plan(path, args.device.on(), &args.device.options()))?;
    // Opening takes samples of the file already.
    let file = timer.time("open", || model::open_weights(&plan, path, model))?;
    let tokens = tokens(args, &file, timer)?;
    let work = work_of_plan(args, &plan, tokens)?;
    Ok((Arc::new(file), plan, work))
}

/// What can be profiled of a plan: what it has programs, sequences and room for.
pub fn work_of_plan(args: &Args, plan: &Plan, tokens: Option<Vec<u32>>) -> Result<WorkToDo, Error> {
    let (chunk, context) = (plan.largest(Output::Logits).t, plan.options.context);
    let work = WorkToDo::new(args, tokens, chunk.max(1), Some(context));
    work.tests.iter().try_for_each(|test| bench::step_of(plan, test).map(|_| ()))?;
    work.check(context)?;
    Ok(work)
}

/// A model that is compiled now.
fn of_model(args: &Args, source: &ModelArgs, timer: &Timer) -> Result<Parts, Error> {
    let file = timer.time("open", || source.open())?;
    timer.time("identify", || file.identity());
    let tokens = tokens(args, &file, timer)?;
    let options = args.compile.options_of(&args.device, "measured")?;
    let (work, plan) = compiled(args, &file, source.path(), options, tokens, timer)?;
    let plan = timer.time("plan", || plan.to_bytes().and_then(|bytes| LoadedPlan::from_bytes(&bytes)))?;
    Ok((file, plan, work))
}

/// The plan of a model for what is to be profiled.
pub fn compiled(
    args: &Args,
    file: &GgufFile,
    path: Option<&Path>,
    options: Options,
    tokens: Option<Vec<u32>>,
    timer: &Timer,
) -> Result<(WorkToDo, Plan), Error> {
    // A file without a model in it is told so before anything else.
    let trained = Config::from_gguf(file.gguf())?.trained_context;
    let work = WorkToDo::new(args, tokens, options.chunk, Some(options.context.unwrap_or(trained)));
    let needs = work.needs();
    if options.context.is_none() && needs > trained {
        return Err(format!(
            "this needs a context of {needs}, and the model was trained for {trained}; ask for less (-p, -d), or give a context (-c)"
        )
        .into());
    }
    let context = options.context.unwrap_or(needs);
    work.check(context)?;
    let options = Options { context: Some(context), sequences: args.n_sequences, ..options };
    let plan = timer.time("compile", || model::plan(file, path, &options, Purpose::Bench))?;
    Ok((work, plan))
}

/// The plans to which a profiler's records may belong, of a file of several the one for --target or all for GPUs: no device is asked, as
/// those may be of another machine.
pub fn plans_elsewhere(args: &Args, source: &Source) -> Result<Vec<(Plan, WorkToDo)>, Error> {
    match source {
        Source::Plan { path, .. } => {
            let plans = model::read_plans(path)?;
            let targets = plans.iter().map(|plan| plan.target.name.as_str()).collect::<Vec<_>>().join(", ");
            let wanted = |plan: &&LoadedPlan| match args.compile.target.as_deref() {
                Some(target) => plan.target.name == target,
                None => plan.target.kind != TargetKind::Cpu,
            };
            let found: Vec<&LoadedPlan> = plans.iter().filter(wanted).collect();
            if found.is_empty() {
                return Err(format!("{}: the plan is for {targets}", path.display()).into());
            }
            if args.prompt.is_some() {
                return Err("--prompt needs the model; say how many tokens it has (-p)".into());
            }
            found.into_iter().map(|plan| Ok(((**plan).clone(), work_of_plan(args, plan, None)?))).collect()
        }
        Source::Model(source) => {
            let file = source.open()?;
            let options = match args.device.device {
                Some(_) => args.compile.options_on(&args.device, false)?,
                None => args.compile.options(false)?,
            };
            let timer = Timer::default();
            let tokens = tokens(args, &file, &timer)?;
            let (work, plan) = compiled(args, &file, source.path(), options, tokens, &timer)?;
            Ok(vec![(plan, work)])
        }
    }
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// When each stage of loading began, and when it was over.
#[derive(Clone, Default)]
struct Stages(Arc<Mutex<Vec<(Stage, Instant, Instant)>>>);

impl Stages {
    /// Notes them, beside the bars that a user sees.
    fn progress(&self) -> Progress {
        let (stages, bars) = (self.clone(), progress::bars());
        Progress::to(move |stage, done, all| {
            let now = Instant::now();
            let mut stages = stages.0.lock().unwrap_or_else(PoisonError::into_inner);
            match stages.iter_mut().find(|(of, ..)| *of == stage) {
                Some((.., end)) => *end = now,
                None => stages.push((stage, now, now)),
            }
            bars.tell(stage, done, all);
        })
    }

    fn time(&self, stage: Stage) -> Duration {
        let stages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stages.iter().find(|(of, ..)| *of == stage);
        found.map_or(Duration::ZERO, |(_, start, end)| *end - *start)
    }
}
