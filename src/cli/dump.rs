//! `sinter dump`: a graph, the kernels or the plan at any stage.

mod all;
mod page;

use super::args::{CompileArgs, MODEL_OR_PLAN, ModelArgs, SEVERAL_TARGETS, StepName};
use clap::ValueEnum;
use sinter::compile;
use sinter::ir::Graph;
use sinter::lower::{self, Config};
use sinter::model;
use sinter::passes::AfterPass;
use sinter::plan::Plan;
use sinter::show::dot::dot;
use sinter::show::{Diagram, svg, svg_of_plan};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(mut_arg("target", |arg| arg.help(format!("{SEVERAL_TARGETS}; several for --format html alone"))))]
#[command(mut_arg("model", |arg| arg.help(MODEL_OR_PLAN).value_name("MODEL|PLAN")))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compile: CompileArgs,
    /// What to print [default: fused; of a compiled plan plan, which is all there is of one].
    #[arg(long, value_enum)]
    stage: Option<Stage>,
    /// The graph after this pass instead of after the last.
    #[arg(long, value_name = "PASS")]
    after: Option<String>,
    /// Of which step [default: decode; for html, decode and prefill].
    #[arg(long, value_enum)]
    step: Option<StepName>,
    /// As `run --temp 0` compiles it: the best token instead of the logits.
    #[arg(long)]
    greedy: bool,
    /// text: the IR, or a readable listing. dot: for Graphviz. json: see docs/json.md. svg: a picture; of the fused graph, the primitives
    /// beside it, time by kernel and the plan's memory; of the plan, its memory and streams over its calls. html: a page for a browser with
    /// everything in it, to stdout.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// In dot and svg, draw every layer, not those that do the same once.
    #[arg(long)]
    unfold: bool,
    /// Write every stage after every pass into this folder, as text, dot and svg, with an index and the page.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["stage", "after", "format"])]
    all: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Stage {
    /// The graph of primitives.
    Lowered,
    /// The graph after the passes.
    Fused,
    /// The kernels of codegen and the calls of them.
    Kernels,
    /// Calls, streams and buffers in place.
    Plan,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Text,
    Dot,
    Json,
    Svg,
    Html,
}

/// What a page is not made of.
const NO_PAGE: &str = "a page shows a model, not one of its stages";

impl Args {
    fn step(&self) -> StepName {
        self.step.unwrap_or(StepName::Decode)
    }
}

pub fn run(args: Args) -> super::Outcome {
    let stage = args.stage.unwrap_or(Stage::Fused);
    if args.after.is_some() && stage != Stage::Fused {
        return Err("--after is of the passes, whose graph is --stage fused".into());
    }
    if args.format == Format::Html && (stage != Stage::Fused || args.after.is_some()) {
        return Err("--format html shows all stages at once: it takes neither --stage nor --after".into());
    }
    if args.format != Format::Html && args.compile.targets() > 1 {
        return Err("of several targets there is a page (--format html); all else is of one".into());
    }
    if let Some(path) = args.model.path().filter(|path| model::is_plan(path)) {
        return of_plan(path, &args);
    }
    if let Some(dir) = &args.all {
        return all::run(dir, &args);
    }
    if args.format == Format::Html {
        let html = page::of_model(&args)?;
        std::io::stdout().lock().write_all(html.as_bytes())?;
        return Ok(());
    }
    let step = args.step();
    let file = args.model.open()?;
    let gguf = file.gguf();
    let options = args.compile.options(args.greedy)?;
    let config = Config::from_gguf(gguf)?;
    let lowered_step = step.step(&config, &options)?;
    let text = match stage {
        Stage::Lowered | Stage::Fused => {
            let mut graph = lower::lower(gguf, &config, &lowered_step)?;
            if args.format == Format::Svg && stage == Stage::Fused && args.after.is_none() && !args.unfold {
                let plan = page::plan(&file, &args, &options, step)?;
                let view = page::view(&file, &config, &graph, step, &options, plan.as_ref())?;
                std::io::stdout().lock().write_all(view.to_svg().as_bytes())?;
                return Ok(());
            }
            if stage == Stage::Fused {
                graph = fused(graph, &args, &options)?;
            }
            match args.format {
                Format::Text => format!("{graph}\n"),
                Format::Dot => dot(&Diagram::of_graph(&graph, &options.target, args.unfold)),
                Format::Svg => svg(&Diagram::of_graph(&graph, &options.target, args.unfold)),
                Format::Html => return Err(NO_PAGE.into()),
                Format::Json => serde_json::to_string_pretty(&graph.to_json())? + "\n",
            }
        }
        Stage::Kernels => {
            let programs = compile::compile(gguf, &options, step.purpose())?;
            let index = step.index(programs.len());
            let compiled = programs.into_iter().nth(index).ok_or("no such step")?;
            match args.format {
                Format::Text => compiled.program.to_string(),
                Format::Dot => dot(&Diagram::of_program(&compiled.program, args.unfold)),
                Format::Svg => svg(&Diagram::of_program(&compiled.program, args.unfold)),
                Format::Html => return Err(NO_PAGE.into()),
                Format::Json => serde_json::to_string_pretty(&compiled.program)? + "\n",
            }
        }
        Stage::Plan => {
            let plan = model::plan(&file, args.model.path(), &options, step.purpose())?;
            shown(&plan, &args)?
        }
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

/// A plan in the format that was asked for.
fn shown(plan: &Plan, args: &Args) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    Ok(match args.format {
        Format::Text => plan.to_string(),
        Format::Dot | Format::Svg => {
            let program = plan.programs.get(args.step().index(plan.programs.len())).ok_or("no such step")?;
            match args.format {
                Format::Svg => svg_of_plan(plan, program, args.unfold),
                _ => dot(&Diagram::of_plan(plan, program, args.unfold)),
            }
        }
        Format::Html => return Err(NO_PAGE.into()),
        Format::Json => serde_json::to_string_pretty(plan)? + "\n",
    })
}

/// A plan from a file: of several, the one for --target, else the first.
fn of_plan(path: &Path, args: &Args) -> super::Outcome {
    let name = path.display();
    let another = args.stage.is_some_and(|stage| stage != Stage::Plan) || args.after.is_some();
    if another || args.format == Format::Html || args.all.is_some() {
        return Err(format!("{name} is a compiled plan, of which there is --stage plan alone").into());
    }
    let plan = args.compile.plan_in(path, args.greedy)?;
    std::io::stdout().lock().write_all(shown(&plan, args)?.as_bytes())?;
    Ok(())
}

/// The graph after all passes, or after the one that was asked for.
fn fused(
    mut graph: Graph,
    args: &Args,
    options: &compile::Options,
) -> Result<Graph, Box<dyn std::error::Error + Send + Sync>> {
    let mut stopped = None;
    let mut keep = AfterPass(|pass, g: &Graph| {
        if args.after.as_deref() == Some(pass) {
            stopped = Some(g.clone());
        }
    });
    options.pipeline.run_observed(&mut graph, &options.target, &mut keep)?;
    match (&args.after, stopped) {
        (None, _) => Ok(graph),
        (Some(_), Some(graph)) => Ok(graph),
        (Some(pass), None) => {
            let passes = options.pipeline.enabled().join(", ");
            Err(format!("pass {pass:?} does not run here; these do: {passes}").into())
        }
    }
}
