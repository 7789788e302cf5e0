//! `sinter compile`: a plan, ahead of time.

use super::args::{CompileArgs, ModelArgs};
use super::{files, say};
use sinter::compile::Purpose;
use sinter::model;
use std::path::PathBuf;

#[derive(clap::Args)]
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
    files::write_whole(&args.out, |out| out.write_all(&bytes))?;
    let mb = |n: u64| format!("{:.1} MB", n as f64 / 1e6);
    say!(
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
