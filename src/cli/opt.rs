//! `sinter opt`: passes on a graph in text form, as `mlir-opt` runs them.

use super::args::select;
use super::{bisect, files, say, targets};
use sinter::ir::{Graph, verify, verify_unfinished};
use sinter::passes::{AfterPass, Pipeline, names};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Graph in text form; - reads stdin.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Passes to run, separated by commas; -NAME takes one out of all; none with "" [default: all].
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true, value_name = "LIST")]
    passes: Option<Vec<String>>,
    /// Target by name or a JSON file that describes one.
    #[arg(long, default_value = "test-wave32")]
    target: String,
    /// Without quantise_acts.
    #[arg(long)]
    exact: bool,
    /// Stop after this many rewrites.
    #[arg(long, value_name = "N")]
    fuel: Option<u64>,
    /// Check the whole graph after every rewrite, and say which one broke it. Else it is checked once, at the end.
    #[arg(long)]
    verify_each: bool,
    /// Print the graph after each pass that changed it.
    #[arg(long)]
    print_after_each: bool,
    /// Print the graph after these passes, whether they changed it or not, and not at the end; may be given several times.
    #[arg(long, value_delimiter = ',', value_name = "PASS", conflicts_with = "print_after_each")]
    print_after: Vec<String>,
    /// Find the one rewrite that breaks a command, which sh runs: it exits with 0 for a graph that is good. It gets the graph on stdin, as a
    /// file where it says {}, and the number of rewrites as SINTER_FUEL; what it prints goes to stderr.
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["print_after_each", "print_after", "report"])]
    bisect: Option<String>,
    /// Tell every decision on stderr, then how many rewrites each pass made.
    #[arg(long)]
    report: bool,
}

const EXAMPLES: &str = "\
Examples:
  sinter dump --stage lowered | sinter opt - --print-after merge
  sinter opt layer.sir --bisect '! grep -q \"fused matmul_swiglu\"'
  sinter dump --stage lowered --exact --target cpu | sinter opt - --target cpu --exact \\
    --bisect 'sinter check --exact --fuel $SINTER_FUEL'";

pub fn run(args: Args) -> super::Outcome {
    let target = targets::find(&args.target)?;
    let name = args.file.display();
    let text = files::read_text(&args.file)?;
    let graph = Graph::parse(&text).map_err(|e| format!("{name}:{e}"))?;
    let mut graph = verify(graph)?.into_graph();
    let mut pipeline = select(Pipeline::standard(args.exact), false, args.passes.as_deref(), args.fuel)?;
    pipeline.verify_each = args.verify_each;
    if let Some(command) = &args.bisect {
        return bisect::run(&graph, &pipeline, &target, command);
    }
    run_here(&args.print_after, &pipeline)?;
    let mut out = std::io::stdout().lock();
    let mut written = Ok(());
    let mut last = graph.to_string();
    let mut print = AfterPass(|pass, g: &Graph| {
        let now = g.to_string();
        let wanted = args.print_after_each && now != last || args.print_after.iter().any(|p| p == pass);
        if wanted && written.is_ok() {
            written = writeln!(out, "// after {pass}\n{now}\n");
        }
        last = now;
    });
    // What was printed before a pass breaks the graph stays printed.
    let report = pipeline.run_observed(&mut graph, &target, &mut print);
    written?;
    let report = report?;
    verify_unfinished(&graph)
        .map_err(|e| format!("the passes broke the graph; --verify-each tells which rewrite did:\n{e}"))?;
    if !args.print_after_each && args.print_after.is_empty() {
        writeln!(out, "{graph}")?;
    }
    if args.report {
        for d in &report.decisions {
            say!("{d}");
        }
        for (pass, rewrites) in &report.rewrites {
            say!("{pass}: {rewrites} rewrites");
        }
    }
    Ok(())
}

/// Whether all of these passes run.
fn run_here(passes: &[String], pipeline: &Pipeline) -> super::Outcome {
    let enabled = pipeline.enabled();
    for pass in passes {
        if !names().contains(&pass.as_str()) {
            return Err(format!("there is no pass {pass:?}; the passes are {}", names().join(", ")).into());
        }
        if !enabled.contains(&pass.as_str()) {
            let these = if enabled.is_empty() {
                "none does".into()
            } else {
                format!("these do: {}", enabled.join(", "))
            };
            return Err(format!("pass {pass:?} does not run here; {these}").into());
        }
    }
    Ok(())
}
