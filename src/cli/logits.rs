//! `sinter logits`: the logits of every token, for comparing with other engines.

use super::args::{CompileArgs, DeviceArgs, ModelArgs};
use super::files;
use npyz::WriterBuilder;
use sinter::compile::{Options, Purpose};
use sinter::model;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    tokens: Vec<u32>,
    /// Where to write float32 [tokens, vocabulary] (npy version 1); - for stdout.
    #[arg(short, long, value_name = "FILE.npy")]
    out: PathBuf,
    #[command(flatten)]
    compile: CompileArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> super::Outcome {
    let file = args.model.open()?;
    let mut options = args.compile.options_on(&args.device, false)?;
    let count = args.tokens.len() as u64;
    options = Options { context: Some(options.context.unwrap_or(count)), ..options };
    let mut session =
        model::session(&file, args.model.path(), &options, Purpose::Score, &args.device.options())?;
    let mut logits: Vec<f32> = vec![];
    session.score(&args.tokens, |_, row| logits.extend_from_slice(row))?;

    let shape = [count, logits.len() as u64 / count];
    files::write_whole(&args.out, |out| {
        let mut npy = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(out).begin_nd()?;
        npy.extend(logits)?;
        npy.finish()
    })
}
