//! `sinter compile`: a plan, ahead of time.

use super::args::{CompileArgs, ModelArgs, SEVERAL_TARGETS};
use super::{files, progress, say};
use sinter::compile::Purpose;
use sinter::model;
use sinter::plan::{self, Plan};
use sinter::runtime::Size;
use sinter::runtime::hip::{Compiler, HipError, compile_ahead};
use sinter::target::TargetKind;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(mut_arg("target", |arg| arg.help(SEVERAL_TARGETS)))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Where to write the plan; - for stdout.
    #[arg(short, long, value_name = "PLAN")]
    out: PathBuf,
    /// The best token instead of the logits: for run --temp 0 only.
    #[arg(long)]
    greedy: bool,
    /// Put the hash of the whole model file into the plan, for run --verify; reads all of it.
    #[arg(long)]
    verify: bool,
    /// For GPUs, put the source of the kernels into the plan and no machine code: they are compiled where the plan runs.
    #[arg(long)]
    source_only: bool,
    #[command(flatten)]
    compile: CompileArgs,
}

pub fn run(args: Args) -> super::Outcome {
    let file = args.model.open()?;
    let full_hash = args.verify.then(|| file.full_hash());
    let mut plans = vec![];
    for options in args.compile.options_of_all(args.greedy)? {
        let mut plan = model::plan(&file, args.model.path(), &options, Purpose::Generate)?;
        plan.model.full_hash = full_hash;
        plans.push(plan);
    }
    // What does not go into one file need not be compiled.
    plan::to_bytes(&plans)?;
    let mut said = vec![];
    if args.source_only {
        let of_gpus = plans.iter().filter(|plan| plan.target.kind != TargetKind::Cpu);
        said.extend(
            of_gpus.map(|p| {
                format!("{}: {} kernels as source{}", p.target.name, p.sources().len(), of_kernels(p))
            }),
        );
    } else {
        // All compilers are found before the first works.
        let compilers = plans.iter().map(Compiler::for_plan).collect::<Result<Vec<_>, _>>()?;
        for (plan, compiler) in plans.iter_mut().zip(compilers) {
            said.extend(compiler.map(|compiler| machine_code(plan, &compiler)).transpose()?);
        }
    }
    let bytes = plan::to_bytes(&plans)?;
    files::write_whole(&args.out, |out| out.write_all(&bytes))?;
    let mb = |n: u64| format!("{:.1} MB", n as f64 / 1e6);
    let path = args.out.display();
    for line in said {
        say!("{path}: {line}");
    }
    let size = format!("{} bytes", bytes.len());
    let single = plans.len() == 1;
    for plan in &plans {
        let kernels = format!("{} kernels", plan.kernels.len());
        let what =
            if single { format!("{kernels}, {size}") } else { format!("{}: {kernels}", plan.target.name) };
        say!(
            "{path}: {what}; needs {} of weights, {} of cache for {} tokens, {} of buffers",
            mb(plan.weight_bytes()),
            mb(plan.state_bytes()),
            plan.options.context,
            mb(plan.arena_bytes),
        );
    }
    if !single {
        say!("{path}: {size}");
    }
    Ok(())
}

/// Of how many kernels of the plan the sources are, where that is another number.
fn of_kernels(plan: &Plan) -> String {
    let (kernels, sources) = (plan.kernels.len(), plan.sources().len());
    if kernels == sources {
        return String::new();
    }
    format!(" for the launches of the plan's {kernels} kernels, equal ones once")
}

/// Compiles the kernels of a plan into it: in words, what was compiled.
fn machine_code(plan: &mut Plan, compiler: &Compiler) -> Result<String, HipError> {
    let target = plan.target.name.clone();
    let objects = compile_ahead(plan, compiler, &progress::bars())?;
    let compiler = compiler.name();
    let bytes = objects.iter().map(|object| object.code.len() as u64).sum();
    let said = format!(
        "{target}: {} kernels compiled, {} of code{}, by {compiler}",
        objects.len(),
        Size(bytes),
        of_kernels(plan)
    );
    plan.objects = objects;
    Ok(said)
}
