//! The page of a model: its steps before and after fusion, on each target.

use super::super::args::StepName;
use super::super::say;
use super::Args;
use clap::ValueEnum;
use sinter::compile::{CompileError, Options};
use sinter::gguf::GgufFile;
use sinter::ir::Graph;
use sinter::lower::{self, Config};
use sinter::model::{self, ModelError};
use sinter::plan::Plan;
use sinter::show::{Page, Parts, View};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The name of a model, as its file has it.
pub fn name_of(file: &GgufFile) -> Result<String, Error> {
    Ok(file.gguf().str_opt("general.name")?.unwrap_or("unnamed").to_string())
}

/// The page as HTML.
pub fn of_model(args: &Args) -> Result<String, Error> {
    let file = args.model.open()?;
    let config = Config::from_gguf(file.gguf())?;
    let steps = args.step.map_or_else(|| vec![StepName::Decode, StepName::Prefill], |step| vec![step]);
    let mut views = vec![];
    for options in args.compile.options_of_all(args.greedy)? {
        for &step in &steps {
            let plan = plan(&file, args, &options, step)?;
            let graph = lower::lower(file.gguf(), &config, &step.step(&config, &options)?)?;
            views.push(view(&file, &config, &graph, step, &options, plan.as_ref())?);
        }
    }
    Ok(Page::new(name_of(&file)?, views).to_html()?)
}

/// A step of a model, whose memory is shown where there is a plan.
pub fn view(
    file: &GgufFile,
    config: &Config,
    lowered: &Graph,
    step: StepName,
    options: &Options,
    plan: Option<&Plan>,
) -> Result<View, Error> {
    let program = plan.and_then(|plan| Some((plan, plan.programs.get(step.index(plan.programs.len()))?)));
    let words = step.to_possible_value();
    Ok(View::new(&Parts {
        model: &name_of(file)?,
        step: words.as_ref().map_or("step", |words| words.get_name()),
        lowered,
        pipeline: &options.pipeline,
        target: &options.target,
        context: options.context_of(config),
        sequences: options.sequences,
        plan: program,
    })?)
}

/// The plan for a target; none, with a line that says so, where its back end has no kernel for what is left unfused.
pub fn plan(file: &GgufFile, args: &Args, options: &Options, step: StepName) -> Result<Option<Plan>, Error> {
    match model::plan(file, args.model.path(), options, step.purpose()) {
        Ok(plan) => Ok(Some(plan)),
        Err(ModelError::Compile(CompileError::Codegen(e))) => {
            say!("{}: no plan is shown: {e}", options.target.name);
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}
