//! What the tests of the passes share.
#![allow(dead_code)] // each test binary uses its own part

pub mod graphs;

use sinter::ir::{Decision, Graph, Outcome, Why, verify};
use sinter::passes::{Pipeline, Report};
use sinter::target::Target;

/// The graph in `tests/snapshots/inputs/{name}.sir`, verified.
pub fn input(name: &str) -> Graph {
    let path = format!("{}/tests/snapshots/inputs/{name}.sir", env!("CARGO_MANIFEST_DIR"));
    parse(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}")))
}

/// A graph in text form, verified.
pub fn parse(text: &str) -> Graph {
    let graph = Graph::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    verify(graph).unwrap_or_else(|e| panic!("{e}")).into_graph()
}

/// Runs the passes of these names, verifying after every patch.
pub fn fuse(graph: &mut Graph, passes: &[&str], target: &Target) -> Report {
    let mut pipeline = Pipeline::standard(false).select(passes).unwrap();
    pipeline.verify_each = true;
    pipeline.run(graph, target).unwrap_or_else(|e| panic!("{e}"))
}

/// Why the rule of the pass rejected something, first of all.
pub fn rejections<'a>(report: &'a Report, pass: &str) -> Vec<&'a Why> {
    let why = |d: &'a Decision| match &d.outcome {
        // What is said in the end of what is left is no rule's word.
        Outcome::Rejected { why: Why::NoPattern { .. } | Why::NoPass { .. } | Why::PassOff } => None,
        Outcome::Rejected { why } if d.pass == pass => Some(why),
        _ => None,
    };
    report.decisions.iter().filter_map(why).collect()
}

/// A decision in a line, times to the nanosecond.
pub fn line(d: &Decision) -> String {
    match &d.outcome {
        Outcome::Fired { kernel, replaced, gain } => format!(
            "{}: {} -> {} replaces {}; {:.3} us -> {:.3} us, {} bytes and {} launches saved",
            d.pass,
            d.at,
            kernel.name(),
            replaced.join(", "),
            gain.unfused_us,
            gain.fused_us,
            gain.bytes_saved,
            gain.launches_saved
        ),
        Outcome::Rewritten { .. } => d.to_string(),
        Outcome::Rejected { why } => format!("{}: {} not fused: {} ({why})", d.pass, d.at, why.name()),
    }
}
