//! The commands: one file each. Generated text and reports go to stdout, all else to stderr.

mod args;
mod bench;
mod bisect;
mod check;
mod compile;
mod devices;
mod dump;
mod explain;
mod files;
mod inspect;
mod logits;
mod opt;
mod perplexity;
mod profile;
mod progress;
mod run;
mod targets;
mod tokenize;
mod trend;
mod tune;
mod units;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// What a command ends with: nothing, or an error whose causes are reported in order.
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A line on stderr. If nobody can read it, that is no reason to stop.
macro_rules! say {
    ($($text:tt)*) => {
        _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($text)*)))
    };
}
use say;

/// Runs GGUF language models through fused kernels, and says what was fused, what was not, and why.
#[derive(Parser)]
#[command(name = "sinter", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log to stderr: error, warn, info, debug, trace, or per module as in `sinter::passes=debug`.
    #[arg(long, global = true, value_name = "FILTER", env = "SINTER_LOG", default_value = "warn")]
    log: String,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text.
    Run(run::Args),
    /// Compile a model into a plan, ahead of time.
    Compile(compile::Args),
    /// Print a graph, the kernels or the plan at any stage.
    Dump(dump::Args),
    /// Run passes on a graph in text form.
    Opt(opt::Args),
    /// Tell every fusion decision: what fired, what was rejected and why, and what it was worth.
    Explain(explain::Args),
    /// Compare every kernel with the primitives it stands for, and the fused graph with the unfused.
    Check(check::Args),
    /// Tell what is in a model file.
    Inspect(inspect::Args),
    /// Tell what can run here.
    Devices,
    /// Turn text into token ids.
    Tokenize(tokenize::Args),
    /// Write the logits of every token as a NumPy file.
    Logits(logits::Args),
    /// Measure how well a model predicts a text.
    Perplexity(perplexity::Args),
    /// Measure how fast a model reads prompts and generates.
    Bench(bench::Args),
    /// Draw the history of bench's runs as an SVG.
    Trend(trend::Args),
    /// Measure a device for the cost model: its rates, and which fusions lose there.
    Tune(tune::Args),
    /// Tell where the time of a step goes, kernel by kernel, and what limits each.
    Profile(profile::Args),
}

/// A number below zero is a value, which the option refuses by its name, and no unknown option.
fn below_zero(arg: clap::Arg) -> clap::Arg {
    let takes = arg.get_action().takes_values();
    if takes { arg.allow_negative_numbers(true) } else { arg }
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let mut command = Cli::command();
    for subcommand in command.get_subcommands_mut() {
        *subcommand = std::mem::take(subcommand).mut_args(below_zero);
    }
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|e| e.exit());
    let filter = match log_filter(&cli.log) {
        Ok(filter) => filter,
        Err(e) => return fail(&*Box::<dyn std::error::Error>::from(format!("--log {}: {e}", cli.log))),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .init();
    if let Err(e) = sinter::gguf::exit_when_a_file_shrinks() {
        return fail(&e);
    }
    let outcome = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Compile(args) => compile::run(args),
        Command::Dump(args) => dump::run(args),
        Command::Opt(args) => opt::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Check(args) => check::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Devices => devices::run(),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Trend(args) => trend::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Profile(args) => profile::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, as in `sinter dump | head`, is no error.
        Err(e) if is_broken_pipe(&*e) => ExitCode::SUCCESS,
        Err(e) => fail(&*e),
    }
}

/// What to log: directives as in `warn,sinter::passes=debug`. A word alone is a level; it would else be taken for a module that
/// nobody has.
fn log_filter(directives: &str) -> Result<EnvFilter, String> {
    for word in directives.split(',').map(str::trim).filter(|d| !d.contains(['=', '['])) {
        let is_module = word.split("::").next() == Some("sinter");
        if !is_module && word.parse::<LevelFilter>().is_err() {
            return Err(format!("{word:?} is no level; there are off, error, warn, info, debug, trace"));
        }
    }
    EnvFilter::try_new(directives).map_err(|e| e.to_string())
}

fn is_broken_pipe(e: &(dyn std::error::Error + 'static)) -> bool {
    let io = e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    let json = || e.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
    io.or_else(json) == Some(ErrorKind::BrokenPipe)
}

fn fail(e: &(dyn std::error::Error + 'static)) -> ExitCode {
    let mut message = format!("error: {e}");
    let mut said = e.to_string();
    let mut source = e.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Transparent errors repeat their source word for word.
        if !said.contains(&text) {
            message.push_str(&format!("\n  because: {text}"));
        }
        said = text;
        source = cause.source();
    }
    say!("{message}");
    // Slower is not the same as not to be measured.
    if e.is::<bench::Slower>() { ExitCode::from(3) } else { ExitCode::FAILURE }
}
