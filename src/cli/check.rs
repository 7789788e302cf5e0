//! `sinter check`: kernels against their bodies, the fused graph against the unfused.

use super::args::{CompileArgs, DeviceArgs, ModelArgs, StepName};
use sinter::check::{Caches, WHOLE_TOLERANCE, check_step};
use sinter::compile::Options;
use sinter::generate::{EncodeOptions, Tokenizer};
use sinter::lower::Config;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to check with; its tokens but the last are read at once, the last by itself.
    #[arg(short, long, default_value = "The borrow checker ensures that", value_name = "TEXT")]
    prompt: String,
    /// Token ids to check with instead, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "IDS", conflicts_with = "prompt")]
    tokens: Option<Vec<i32>>,
    /// Every node on a line of its own.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    compile: CompileArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> super::Outcome {
    let file = Arc::new(args.model.open()?);
    let tokens = match args.tokens {
        Some(tokens) => tokens,
        None => {
            let ids = Tokenizer::from_gguf(file.gguf())?.encode(&args.prompt, EncodeOptions::default());
            ids.into_iter().map(i32::try_from).collect::<Result<Vec<i32>, _>>()?
        }
    };
    if tokens.len() < 2 {
        return Err("check needs two tokens at least: one to read first, one to decode".into());
    }
    let options = args.compile.options_of(&args.device, "checked")?;
    let context = options.context.unwrap_or(tokens.len() as u64);
    let options = Options { context: Some(context), chunk: tokens.len() as u64, ..options };
    if (tokens.len() as u64) > context {
        return Err(format!("{} tokens do not fit a context of {context}", tokens.len()).into());
    }
    let config = Config::from_gguf(file.gguf())?;
    // Before anything is printed of those that are there.
    let vocabulary = file.gguf().tensor("token_embd.weight")?.shape.first().copied().unwrap_or(0);
    if let Some(id) = tokens.iter().find(|id| u64::try_from(**id).map_or(true, |id| id >= vocabulary)) {
        return Err(format!("input \"tokens\" must lie in 0..{vocabulary}, not {id}").into());
    }
    let (last, first) = tokens.split_last().ok_or("no tokens")?;
    let mut out = std::io::stdout().lock();
    let mut caches = Caches::new();
    for (step, tokens, cached) in
        [(StepName::Score, first, 0), (StepName::Decode, std::slice::from_ref(last), first.len() as u64)]
    {
        let step = step.step(&config, &options)?;
        let outcome =
            check_step(&file, &options, &args.device.options(), &step, tokens, cached, &mut caches)?;
        writeln!(out, "{}: {} tokens after {cached}", outcome.step, tokens.len())?;
        let mut kernels: BTreeMap<&str, (u64, f64, f64)> = BTreeMap::new();
        for n in &outcome.nodes {
            let (count, error, tolerance) = kernels.entry(n.kernel).or_default();
            *count += 1;
            *error = if n.error.is_nan() { n.error } else { error.max(n.error) };
            *tolerance = tolerance.max(n.tolerance);
            if args.all {
                writeln!(out, "  {:.1e} of {:.0e}  {}", n.error, n.tolerance, n.at)?;
            }
        }
        writeln!(out, "  {:16} {:>5} {:>14} {:>8}", "kernel", "times", "largest error", "allowed")?;
        for (kernel, (count, error, tolerance)) in kernels {
            writeln!(out, "  {kernel:16} {count:>5} {error:>14.1e} {tolerance:>8.0e}")?;
        }
        writeln!(
            out,
            "  results of the fused graph against the unfused, both interpreted: {:.1e} of {WHOLE_TOLERANCE:.0e}",
            outcome.whole
        )?;
        if let Some(n) = outcome.first_divergence() {
            return Err(format!("{} diverges first, at {}: error {:.1e}", n.kernel, n.at, n.error).into());
        }
        if !outcome.passes() {
            return Err("every kernel computes its body, but the fused graph is not the unfused one: a pass is wrong; \
                        find it with --fuel"
                .into());
        }
    }
    writeln!(out, "every kernel computes what its body says")?;
    Ok(())
}
