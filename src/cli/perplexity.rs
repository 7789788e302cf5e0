//! `sinter perplexity`: how well a model predicts a text, as llama-perplexity measures it.

use super::args::{CompileArgs, DeviceArgs, ModelArgs};
use super::files;
use sinter::compile::{Options, Purpose};
use sinter::generate::{EncodeOptions, Perplexity, Tokenizer};
use sinter::model;
use std::io::Write;
use std::path::PathBuf;

/// Tokens of a window unless told.
const WINDOW: u64 = 512;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; - reads stdin.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Only the first N windows.
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    #[command(flatten)]
    compile: CompileArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> super::Outcome {
    if args.chunks == Some(0) {
        return Err("--chunks must be at least 1".into());
    }
    let file = args.model.open()?;
    let options = args.compile.options_on(&args.device, false)?;
    let window = options.context.unwrap_or(WINDOW);
    let options = Options { context: Some(window), ..options };
    let text = files::read_text(&args.file)?;
    let tokenizer = Tokenizer::from_gguf(file.gguf())?;
    let tokens = tokenizer.encode(&text, EncodeOptions::default());
    let mut session =
        model::session(&file, args.model.path(), &options, Purpose::Score, &args.device.options())?;
    let mut perplexity = Perplexity::default();
    let mut out = std::io::stdout().lock();
    let window = usize::try_from(window)?;
    if tokens.len() < window || window < 4 {
        return Err(format!(
            "{} tokens do not fill a window of {window}; a window needs 4 at least",
            tokens.len()
        )
        .into());
    }
    let windows = (tokens.len() / window).min(args.chunks.unwrap_or(usize::MAX));
    for n in 0..windows {
        perplexity.window(&mut session, &tokens[n * window..][..window], tokenizer.prefix())?;
        let comma = if n + 1 < windows { "," } else { "\n" };
        write!(out, "[{}]{:.4}{comma}", n + 1, perplexity.estimate())?;
        out.flush()?;
    }
    writeln!(out, "Final estimate: PPL = {:.4} +/- {:.5}", perplexity.estimate(), perplexity.error())?;
    Ok(())
}
