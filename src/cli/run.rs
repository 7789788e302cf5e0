//! `sinter run`: generate text from a model file or a plan.

use super::args::{CompileArgs, DeviceArgs, Source, SourceArgs};
use super::{files, say};
use sinter::compile::Purpose;
use sinter::generate::{EncodeOptions, Sampler, Sampling, Session, Stop, Tokenizer};
use sinter::gguf::GgufFile;
use sinter::lower::Config;
use sinter::model;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the model reads when nobody says anything.
const DEFAULT_PROMPT: &str = "The borrow checker";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Text to continue; - or a pipe reads stdin.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Reads the text to continue from a file; - from stdin.
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Text in the prompt such as <|endoftext|> becomes the token of that name.
    #[arg(long)]
    special: bool,
    /// Tokens to generate at most; -1 for as many as fit the context.
    #[arg(short = 'n', long = "n-predict", default_value = "200", value_name = "N", value_parser = count)]
    count: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// With a plan that was compiled with --verify: compare the hash of the whole model file, not of samples.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    compile: CompileArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(clap::Args)]
struct SamplingArgs {
    /// Seed of the random choices; -1 draws one, and it is told on stderr.
    #[arg(short, long, default_value = "-1", value_parser = seed)]
    seed: Seed,
    /// Temperature; 0 always takes the best token.
    #[arg(long, default_value_t = Sampling::default().temperature, value_name = "X")]
    temp: f32,
    /// Only the K best tokens; 0 for all.
    #[arg(long, default_value_t = Sampling::default().top_k, value_name = "K")]
    top_k: usize,
    /// Only the best tokens that together have probability X.
    #[arg(long, default_value_t = Sampling::default().top_p, value_name = "X")]
    top_p: f32,
    /// Only tokens with at least X times the probability of the best.
    #[arg(long, default_value_t = Sampling::default().min_p, value_name = "X")]
    min_p: f32,
    /// Divides the logits of recent tokens; 1 is off.
    #[arg(long, default_value_t = Sampling::default().repeat_penalty, value_name = "X")]
    repeat_penalty: f32,
    /// How many recent tokens that concerns; -1 for all.
    #[arg(long, default_value_t = Sampling::default().repeat_last_n, value_name = "N", value_parser = count)]
    repeat_last_n: usize,
}

/// The seed that is given, if one is.
#[derive(Clone, Copy)]
struct Seed(Option<u64>);

fn seed(text: &str) -> Result<Seed, std::num::ParseIntError> {
    if text == "-1" { Ok(Seed(None)) } else { text.parse().map(|seed| Seed(Some(seed))) }
}

/// A number, or -1 for all there are.
fn count(text: &str) -> Result<usize, String> {
    let number = || text.parse().map_err(|_| "it must be -1 for all, or a number from 0 on".to_string());
    if text == "-1" { Ok(usize::MAX) } else { number() }
}

impl SamplingArgs {
    fn sampler(&self) -> Result<Sampler, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Sampler::new(Sampling {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            seed: self.seed.0,
        })?)
    }
}

pub fn run(args: Args) -> super::Outcome {
    let mut sampler = args.sampling.sampler()?;
    let prompt = prompt(&args)?;
    let start = Instant::now();
    let (file, mut session) = load(&args, sampler.is_greedy())?;
    let tokenizer = Tokenizer::from_gguf(file.gguf())?;
    let tokens =
        tokenizer.encode(&prompt, EncodeOptions { special: args.special, ..EncodeOptions::default() });
    let loaded = start.elapsed();

    let mut out = std::io::stdout().lock();
    let mut text = tokenizer.stream();
    let (mut generated, mut first, mut broken) = (0usize, None, None);
    let start = Instant::now();
    let stop = session.generate(
        &tokens,
        args.count,
        &mut sampler,
        |id| tokenizer.is_end(id),
        |id| {
            first.get_or_insert_with(|| start.elapsed());
            generated += 1;
            match write!(out, "{}", text.push(id)).and_then(|()| out.flush()) {
                Ok(()) => ControlFlow::Continue(()),
                Err(e) => {
                    broken = Some(e);
                    ControlFlow::Break(())
                }
            }
        },
    )?;
    if let Some(e) = broken {
        return Err(e.into());
    }
    let total = start.elapsed();
    writeln!(out, "{}", text.finish())?;
    summary(tokens.len(), generated, loaded, first.unwrap_or(total), total, stop, &sampler);
    Ok(())
}

/// One line on stderr: what was read and written, and how fast.
fn summary(
    read: usize,
    generated: usize,
    loaded: Duration,
    first: Duration,
    total: Duration,
    stop: Stop,
    sampler: &Sampler,
) {
    let after_first = (total - first).as_secs_f64();
    let rate = match generated {
        0 | 1 => String::new(),
        n => format!(", {:.1} tokens/s", (n - 1) as f64 / after_first.max(1e-9)),
    };
    let tokens = if read == 1 { "token" } else { "tokens" };
    let why = match stop {
        Stop::End => "the model ended its text",
        Stop::Count => "-n reached",
        Stop::Context => "the context is full (-c)",
        Stop::Caller => "interrupted",
    };
    let seed = if sampler.is_greedy() { String::new() } else { format!(", seed {}", sampler.seed()) };
    say!(
        "[{read} {tokens} read, first after {:.1} ms; {generated} generated{rate}; ready in {:.0} ms; {why}{seed}]",
        first.as_secs_f64() * 1e3,
        loaded.as_secs_f64() * 1e3
    );
}

fn prompt(args: &Args) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    if let Some(file) = &args.file {
        return files::read_text(file);
    }
    let stdin = std::io::stdin();
    match args.prompt.as_deref() {
        Some("-") => {}
        Some(text) => return Ok(text.to_string()),
        None if stdin.is_terminal() => return Ok(DEFAULT_PROMPT.to_string()),
        None => {}
    }
    let text = files::read_text(Path::new("-"))?;
    // Without -p and with nothing piped in, as under a service manager, stdin is empty rather than a prompt.
    Ok(if text.is_empty() && args.prompt.is_none() { DEFAULT_PROMPT.to_string() } else { text })
}

/// The model and a session on it: from a plan, or compiled now.
fn load(
    args: &Args,
    greedy: bool,
) -> Result<(Arc<GgufFile>, Session), Box<dyn std::error::Error + Send + Sync>> {
    let source = match args.source.find(&args.compile, None)? {
        Source::Plan { path, model } => {
            let (on, device) = (args.device.on(), args.device.options());
            return Ok(model::load_plan(&path, model.as_deref(), args.verify, on, &device)?);
        }
        Source::Model(source) => source,
    };
    if args.verify {
        return Err("--verify compares a model file with a plan, and no plan is given".into());
    }
    let file = source.open()?;
    let options = args.compile.options_on(&args.device, greedy)?;
    let path: Option<&Path> = source.path();
    let session = model::session(&file, path, &options, Purpose::Generate, &args.device.options())?;
    let trained = Config::from_gguf(file.gguf())?.trained_context;
    if let Some(context) = options.context.filter(|&n| n > trained) {
        tracing::warn!(
            "a context of {context} is more than the {trained} tokens that the model was trained for"
        );
    }
    Ok((file, session))
}
