//! `sinter opt`: passes on a graph in text form, as `mlir-opt` runs them.

use super::args::{read_target, select};
use super::{files, say};
use sinter::ir::{Graph, verify};
use sinter::passes::{AfterPass, Pipeline};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
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
    /// Print the graph after each pass that changed it.
    #[arg(long)]
    print_after_each: bool,
    /// Tell every decision on stderr.
    #[arg(long)]
    report: bool,
}

pub fn run(args: Args) -> super::Outcome {
    let target = read_target(&args.target)?;
    let name = args.file.display();
    let text = files::read_text(&args.file)?;
    let graph = Graph::parse(&text).map_err(|e| format!("{name}:{e}"))?;
    let mut graph = verify(graph)?.into_graph();
    let mut pipeline = select(Pipeline::standard(args.exact), false, args.passes.as_deref(), args.fuel)?;
    pipeline.verify_each = true;
    let mut out = std::io::stdout().lock();
    let mut stages = vec![];
    let mut last = graph.to_string();
    let mut print = AfterPass(|pass, g: &Graph| {
        let now = g.to_string();
        if args.print_after_each && now != last {
            stages.push(format!("// after {pass}\n{now}\n"));
            last = now;
        }
    });
    let report = pipeline.run_observed(&mut graph, &target, &mut print)?;
    for stage in &stages {
        writeln!(out, "{stage}")?;
    }
    if !args.print_after_each {
        writeln!(out, "{graph}")?;
    }
    if args.report {
        for d in &report.decisions {
            say!("{d}");
        }
    }
    Ok(())
}
