//! What the heading of a view says, in the words of `explain`, and what was measured of its kernels.

use super::view::Parts;
use crate::explain;
use crate::ir::{Micros, Outcome, Report};
use crate::runtime::Size;
use crate::target::Target;
use std::collections::{BTreeSet, HashMap};

/// The step, what it costs, and whose the rates are.
pub(super) fn about(parts: &Parts, report: &Report) -> Vec<String> {
    let Parts { context, sequences, .. } = *parts;
    let (lowered, before, after) = (&report.lowered, &report.before, &report.after);
    let mut costs = format!(
        "{} launches → {}, {} → {} moved, {} → {} estimated",
        lowered.count(),
        after.count(),
        Size(lowered.bytes),
        Size(after.bytes),
        Micros(lowered.us),
        Micros(after.us)
    );
    // What is drawn is not always what was lowered.
    let passes: BTreeSet<&str> =
        report.decisions.iter().filter(|d| puts_in(&d.outcome)).map(|d| d.pass.as_str()).collect();
    match before.count().checked_sub(lowered.count()) {
        Some(0) => {}
        Some(more) if !passes.is_empty() => {
            let passes = passes.into_iter().collect::<Vec<_>>().join(" and ");
            costs += &format!(" (and {more} that {passes} put in, which are drawn as primitives too)");
        }
        _ => costs += &format!(" ({} are drawn)", before.count()),
    }
    let step = explain::step(report, context, sequences);
    [step, costs].into_iter().chain(explain::rates(parts.target)).collect()
}

/// Whether a pass put something in that was not there.
fn puts_in(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Rewritten { replaced, added } => added.iter().any(|op| !replaced.contains(op)),
        Outcome::Fired { .. } | Outcome::Rejected { .. } => false,
    }
}

/// What was measured of the kernels of a step at its depth, by their numbers.
pub(super) fn measured(report: &Report, target: &Target, context: u64) -> HashMap<u64, f64> {
    let by_node = target.measured.as_ref().map(|m| m.of_step(&report.graph, context)).unwrap_or_default();
    report.kernels.iter().filter_map(|k| Some((k.number, *by_node.get(k.at.as_str())?))).collect()
}
