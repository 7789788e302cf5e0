//! What the heading of a view says, in the words of `explain`, and what was measured of its kernels.

use super::view::Parts;
use crate::explain;
use crate::ir::{Micros, Report};
use crate::runtime::Size;
use crate::target::Target;
use std::collections::HashMap;

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
    if before.count() != lowered.count() {
        costs += &match explain::put_in(report) {
            Some(put_in) => format!(" (and {put_in}, drawn as primitives too)"),
            None => format!(" ({} are drawn)", before.count()),
        };
    }
    let step = explain::step(report, context, sequences);
    [step, costs].into_iter().chain(explain::rates(parts.target)).collect()
}

/// What was measured of the kernels of a step at its depth, by their numbers.
pub(super) fn measured(report: &Report, target: &Target, context: u64) -> HashMap<u64, f64> {
    let by_node = target.measured.as_ref().map(|m| m.of_step(&report.graph, context)).unwrap_or_default();
    report.kernels.iter().filter_map(|k| Some((k.number, *by_node.get(k.at.as_str())?))).collect()
}
