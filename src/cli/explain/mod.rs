//! `sinter explain`: why every kernel exists, what it replaced, what it costs, and why the rest was not fused.

mod chain;
mod diff;
mod filter;
mod table;

use super::args::{CompileArgs, MODEL_OR_PLAN, ModelArgs, StepName};
use super::files;
use clap::ValueEnum;
use filter::Filter;
use serde::{Deserialize, Serialize};
use sinter::compile;
use sinter::explain::{self, Expectation};
use sinter::ir::Report;
use sinter::lower::Config;
use sinter::model::is_plan;
use sinter::passes::Place;
use sinter::plan::{LoadedPlan, Plan};
use sinter::target::Target;
use std::io::Write;
use std::path::{Path, PathBuf};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(clap::Args)]
#[command(mut_arg("model", |arg| arg.help(MODEL_OR_PLAN).value_name("MODEL|PLAN")))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compile: CompileArgs,
    /// Steps to explain [default: prefill and decode].
    #[arg(long, value_enum, value_delimiter = ',')]
    step: Vec<StepName>,
    /// As `run --temp 0` compiles it: the best token instead of the logits.
    #[arg(long)]
    greedy: bool,
    /// Why kernels look as they do, by number in the table, by kernel, or by the weights they read: 6, attention, blk.2.ffn_down, ffn_down.
    /// Of decode, unless --step says otherwise.
    #[arg(long, value_name = "NUMBER|NAME")]
    kernel: Option<String>,
    /// Every decision on a line of its own, below the table.
    #[arg(long)]
    all: bool,
    /// Only decisions of this pass, and the kernels that came of them.
    #[arg(long, value_name = "PASS", conflicts_with = "kernel")]
    pass: Option<String>,
    /// Only decisions about weights or states whose names begin so, and their kernels: blk.2, blk.*.ffn_down.
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    layer: Option<Place>,
    /// Only what was not fused for this reason: cost_loses, multi_use (see docs/json.md).
    #[arg(long, value_name = "WHY", conflicts_with = "kernel")]
    reason: Option<String>,
    /// Fail if no step has a fusion by this pass, or into this kernel, at this weight or state: merge@blk.0.attn_q. Any number of times.
    #[arg(long, value_name = "RULE[@NODE]")]
    expect: Vec<Expectation>,
    /// Compare two: targets by name, plans, or files that --json wrote (with another version, say).
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["all", "kernel", "pass", "layer", "reason", "expect", "remarks"])]
    diff: Option<Vec<String>>,
    /// Write what was fused and what not as remarks in LLVM's YAML to this file; - for stdout, where they stand alone.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "pass", "layer", "reason"])]
    remarks: Option<PathBuf>,
    /// As JSON (see docs/json.md).
    #[arg(long)]
    json: bool,
}

/// What is explained: some steps of a model on a target.
#[derive(Clone, Serialize, Deserialize)]
pub struct Explanation {
    model: String,
    target: String,
    /// Positions of each sequence, to which caches are taken to be filled, and sequences.
    context: u64,
    sequences: u64,
    steps: Vec<Report>,
    #[serde(skip)]
    described: Option<Target>,
}

pub fn run(args: Args) -> super::Outcome {
    let remarks = args.remarks.as_deref().is_some_and(files::is_stdout);
    files::one_on_stdout(&[("--remarks -", remarks), ("--json", args.json)])?;
    if let Some(two) = &args.diff {
        refuse_options(&two[0], &two[1], &args)?;
        let [a, b] = [&two[0], &two[1]].map(|name| Explanation::named(name, &args));
        return diff::show(&a?, &b?, [&two[0], &two[1]], args.json);
    }
    let filter = Filter::new(args.pass.clone(), args.layer.clone(), args.reason.clone())?;
    let explanation = match args.model.path().filter(|path| is_plan(path)) {
        Some(path) => Explanation::of_plan(&*args.compile.plan_in(path, args.greedy)?, &args)?,
        None => Explanation::of_model(&args.model, &args, args.compile.target.as_deref())?,
    };
    filter.looks_somewhere(&explanation.steps)?;
    if let Some(path) = &args.remarks {
        let yaml = explain::remarks(&explanation.steps);
        files::write_whole(path, |to| to.write_all(yaml.as_bytes()))?;
    }
    let mut out = std::io::stdout().lock();
    if remarks {
        // They stand there alone.
    } else if args.json {
        serde_json::to_writer_pretty(&mut out, &explanation.clone().narrowed(&args, &filter)?)?;
        writeln!(out)?;
    } else {
        out.write_all(explanation.text(&args, &filter)?.as_bytes())?;
    }
    drop(out);
    expected(&explanation.steps, &args.expect)
}

/// Options by which models are compiled apply to neither of two that are compiled.
fn refuse_options(a: &str, b: &str, args: &Args) -> super::Outcome {
    let is_compiled = |name: &str| {
        let path = Path::new(name);
        let is_target =
            || files::read_text(path).is_ok_and(|text| serde_json::from_str::<Target>(&text).is_ok());
        path.is_file() && !is_target()
    };
    if is_compiled(a) && is_compiled(b) {
        let flag = args.compile.first_given_but(Some("--target")).or(args.greedy.then_some("--greedy"));
        if let Some(flag) = flag {
            return Err(format!("{a} and {b} are compiled already: {flag} does not apply").into());
        }
    }
    Ok(())
}

/// Fails unless each of the expectations is met by some step.
fn expected(steps: &[Report], expectations: &[Expectation]) -> super::Outcome {
    let mut unmet = vec![];
    for expectation in expectations {
        let mut misses = vec![];
        for step in steps {
            match expectation.check(step) {
                Ok(()) => break,
                Err(miss) => misses.push(format!("{}: {miss}", step.graph)),
            }
        }
        if misses.len() == steps.len() {
            unmet.extend(misses);
        }
    }
    match unmet.is_empty() {
        true => Ok(()),
        false => Err(unmet.join("\n").into()),
    }
}

impl Explanation {
    fn of_model(model: &ModelArgs, args: &Args, target: Option<&str>) -> Result<Explanation, Error> {
        let file = model.open()?;
        let gguf = file.gguf();
        let options = args.compile.options_for(target.unwrap_or("cpu"), args.greedy)?;
        let config = Config::from_gguf(gguf)?;
        let default = match args.kernel {
            Some(_) => vec![StepName::Decode],
            None => vec![StepName::Prefill, StepName::Decode],
        };
        let steps = if args.step.is_empty() { &default } else { &args.step };
        let mut reports = vec![];
        for step in steps {
            let (_, report) = compile::fuse(gguf, &options, &step.step(&config, &options)?)?;
            reports.push(report);
        }
        Ok(Explanation {
            model: gguf.str_opt("general.name")?.unwrap_or("unnamed").to_string(),
            target: options.target.name.clone(),
            context: options.context_of(&config),
            sequences: options.sequences,
            steps: reports,
            described: Some(options.target),
        })
    }

    fn of_plan(plan: &Plan, args: &Args) -> Result<Explanation, Error> {
        let programs = plan.programs.len();
        let default = match args.kernel {
            Some(_) => vec![StepName::Decode],
            None => vec![StepName::Prefill, StepName::Decode],
        };
        let steps = if args.step.is_empty() { &default } else { &args.step };
        let mut reports: Vec<Report> = vec![];
        for step in steps {
            let program = plan.programs.get(step.index(programs)).ok_or("the plan has no program")?;
            // A chunk of one token has one program for both.
            if reports.iter().all(|report| report.graph != program.report.graph) {
                reports.push(program.report.clone());
            }
        }
        Ok(Explanation {
            model: plan.model.name.clone(),
            target: plan.target.name.clone(),
            context: plan.options.context,
            sequences: plan.options.sequences,
            steps: reports,
            described: Some(plan.target.clone()),
        })
    }

    /// What `--diff` names: a plan, what `--json` wrote, or a target to compile the model for.
    fn named(name: &str, args: &Args) -> Result<Explanation, Error> {
        let path = Path::new(name);
        if is_plan(path) {
            let bytes = std::fs::read(path).map_err(|e| format!("cannot read {name}: {e}"))?;
            let plans = LoadedPlan::all_from_bytes(&bytes).map_err(|e| format!("{name}: {e}"))?;
            return match &plans[..] {
                [plan] => Explanation::of_plan(plan, args),
                plans => {
                    let wanted = args.compile.target.as_deref();
                    let plan = plans.iter().find(|plan| wanted == Some(plan.target.name.as_str()));
                    Explanation::of_plan(
                        plan.ok_or(format!("{name} holds several plans: which, says --target"))?,
                        args,
                    )
                }
            };
        }
        if path.is_file() {
            if files::is_model(path) {
                return Err(format!(
                    "{name} is a model: --diff takes targets, plans, and what explain --json wrote; the model stands before it (sinter explain \
                     {name} --diff cpu sm_90)"
                )
                .into());
            }
            let bytes = std::fs::read(path).map_err(|e| format!("cannot read {name}: {e}"))?;
            let text = String::from_utf8_lossy(&bytes);
            // A target may be a file too, and says so by its fields.
            return match serde_json::from_str::<Explanation>(&text) {
                Ok(explanation) => explanation.of_steps(name, &args.step),
                Err(e) if serde_json::from_str::<Target>(&text).is_err() => Err(format!(
                    "{name} is no plan, no target, and nothing that explain --json of this version wrote: {e}"
                )
                .into()),
                Err(_) => Explanation::of_model(&args.model, args, Some(name)),
            };
        }
        Explanation::of_model(&args.model, args, Some(name))
    }

    /// With these steps alone, if any are named, of what was saved.
    fn of_steps(mut self, name: &str, wanted: &[StepName]) -> Result<Explanation, Error> {
        let is = |step: StepName, report: &Report| {
            let (t, r) = (report.bounds.t, report.bounds.r);
            match step {
                StepName::Decode => t == 1,
                StepName::Prefill => t > 1 && r < t,
                StepName::Score => t > 1 && r == t,
            }
        };
        let are = self.steps.iter().map(|report| report.graph.as_str()).collect::<Vec<_>>().join(", ");
        for &step in wanted {
            if !self.steps.iter().any(|report| is(step, report)) {
                let words = step.to_possible_value();
                let words = words.as_ref().map_or("such", |words| words.get_name());
                return Err(format!("{name} has no {words} step: it has {are}").into());
            }
        }
        self.steps.retain(|report| wanted.is_empty() || wanted.iter().any(|step| is(*step, report)));
        Ok(self)
    }

    /// With those kernels and decisions alone that are asked for.
    fn narrowed(self, args: &Args, filter: &Filter) -> Result<Explanation, Error> {
        let one = |report: &Report| -> Result<Report, Error> {
            Ok(match &args.kernel {
                Some(kernel) => filter::narrowed(report, &filter::named(report, kernel)?.0, filter),
                None if filter.is_empty() => report.clone(),
                None => filter::narrowed(report, &filter.rows(report), filter),
            })
        };
        let steps = self.steps.iter().map(one).collect::<Result<_, _>>()?;
        Ok(Explanation { steps, ..self })
    }

    fn text(&self, args: &Args, filter: &Filter) -> Result<String, Error> {
        let rates =
            self.described.as_ref().and_then(explain::rates).map_or(String::new(), |of| format!("\n{of}"));
        let mut text = format!("{} on {}{}\n", self.model.escape_debug(), self.target, rates);
        for report in &self.steps {
            text += "\n";
            text += &match &args.kernel {
                Some(kernel) => chain::text(report, kernel, self.described.as_ref())?,
                None => table::text(report, self.context, self.sequences, self.described.as_ref(), filter),
            };
            if args.all || !filter.is_empty() {
                text += "\n";
                text += &table::decisions(report, filter);
            }
        }
        Ok(text)
    }
}
