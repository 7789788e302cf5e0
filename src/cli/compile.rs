//! `sinter compile`: a plan, ahead of time.

use super::args::{CompileArgs, ModelArgs};
use sinter::compile::Purpose;
use sinter::model;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Where to write the plan.
    #[arg(short, long, value_name = "PLAN")]
    out: PathBuf,
    /// The best token instead of the logits: for run --temp 0 only.
    #[arg(long)]
    greedy: bool,
    /// Put the hash of the whole model file into the plan, for run --verify; reads all of it.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    compile: CompileArgs,
}

pub fn run(args: Args) -> super::Outcome {
    let file = args.model.open()?;
    let options = args.compile.options(args.greedy)?;
    let mut plan = model::plan(&file, args.model.path(), &options, Purpose::Generate)?;
    plan.model.full_hash = args.verify.then(|| file.full_hash());
    let bytes = plan.to_bytes()?;
    let path = args.out.display();
    if args.model.path().is_some_and(|model| same_file(model, &args.out)) {
        return Err(format!("{path} is the model itself; name another file for the plan").into());
    }
    // A plan is whole or absent: a failed write leaves the old one.
    let mut partial = args.out.clone().into_os_string();
    partial.push(".partial");
    let written = std::fs::write(&partial, &bytes).and_then(|()| std::fs::rename(&partial, &args.out));
    if let Err(e) = written {
        let _ = std::fs::remove_file(&partial);
        return Err(format!("{path}: {e}").into());
    }
    let mb = |n: u64| format!("{:.1} MB", n as f64 / 1e6);
    eprintln!(
        "{path}: {} kernels, {} bytes; needs {} of weights, {} of cache for {} tokens, {} of buffers",
        plan.kernels.len(),
        bytes.len(),
        mb(plan.weight_bytes()),
        mb(plan.state_bytes()),
        plan.options.context,
        mb(plan.arena_bytes),
    );
    Ok(())
}

/// Whether both paths lead to one file that exists.
fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
