//! What two compilations of a model have otherwise.

use super::{Row, rows};
use crate::ir::layers::{rename, runs};
use crate::ir::{Outcome, Report};
use indexmap::IndexMap;
use serde::Serialize;
use std::collections::BTreeSet;

/// The differences, step by step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    pub steps: Vec<StepDifference>,
    /// Steps of one of them alone.
    pub only_a: Vec<String>,
    pub only_b: Vec<String>,
}

/// Those of one step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepDifference {
    pub graph: String,
    pub launches: [u64; 2],
    pub bytes: [u64; 2],
    pub us: [f64; 2],
    /// What is launched by one of them alone, or takes another time.
    pub kernels: Vec<Change>,
    /// Fusions that one of them made and the other did not, and why the other did not, as far as it says.
    pub decisions: Vec<String>,
}

/// A kernel, of layers folded, in each of the two: how often it is launched, and how long that takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    pub kernel: String,
    pub of: String,
    pub launches: [u64; 2],
    pub us: [f64; 2],
}

/// Compares the steps of two compilations that have the same name.
pub fn difference(a: &[Report], b: &[Report]) -> Difference {
    let only = |these: &[Report], those: &[Report]| {
        let lacks = |report: &&Report| those.iter().all(|other| other.graph != report.graph);
        these.iter().filter(lacks).map(|report| report.graph.clone()).collect()
    };
    let both = a.iter().filter_map(|a| Some((a, b.iter().find(|b| b.graph == a.graph)?)));
    Difference { steps: both.map(|(a, b)| of_step(a, b)).collect(), only_a: only(a, b), only_b: only(b, a) }
}

fn of_step(a: &Report, b: &Report) -> StepDifference {
    let mut kernels: IndexMap<(String, String), [(u64, f64); 2]> = IndexMap::new();
    for (side, report) in [a, b].into_iter().enumerate() {
        for row in rows(report) {
            let entry = kernels.entry(key(&row)).or_default();
            entry[side].0 += row.launches;
            entry[side].1 += row.us;
        }
    }
    let change = |((kernel, of), [a, b]): ((String, String), [(u64, f64); 2])| Change {
        kernel,
        of,
        launches: [a.0, b.0],
        us: [a.1, b.1],
    };
    let mut kernels: Vec<Change> = kernels.into_iter().map(change).collect();
    kernels.retain(|k| {
        k.launches[0] != k.launches[1] || (k.us[0] - k.us[1]).abs() > 1e-9 * k.us[0].max(k.us[1])
    });
    kernels.sort_by(|x, y| (y.us[0] - y.us[1]).abs().total_cmp(&(x.us[0] - x.us[1]).abs()));
    StepDifference {
        graph: a.graph.clone(),
        launches: [a.after.count(), b.after.count()],
        bytes: [a.after.bytes, b.after.bytes],
        us: [a.after.us, b.after.us],
        kernels,
        decisions: [only_in(a, b, "A"), only_in(b, a, "B")].concat(),
    }
}

fn key(row: &Row) -> (String, String) {
    (row.kernel().to_string(), row.of.clone())
}

/// The fusions that one made and the other did not, layers folded.
fn only_in(made: &Report, not: &Report, name: &str) -> Vec<String> {
    let fired = |report: &Report| -> BTreeSet<(String, &'static str, String)> {
        let fired = report.decisions.iter().filter_map(|d| match &d.outcome {
            Outcome::Fired { kernel, .. } => Some((d.pass.clone(), kernel.name(), place(&d.at))),
            Outcome::Rewritten { .. } | Outcome::Rejected { .. } => None,
        });
        fired.collect()
    };
    let mut groups: IndexMap<(String, String, String), Vec<u64>> = IndexMap::new();
    for (pass, kernel, at) in fired(made).difference(&fired(not)) {
        let why = not.decisions.iter().find_map(|d| match &d.outcome {
            Outcome::Rejected { why } if d.pass == *pass && place(&d.at) == *at => Some(why.to_string()),
            _ => None,
        });
        let why = why.unwrap_or("no rule came near to it".into());
        let key = (kernel.to_string(), rename(at, |_| "*".into()), rename(&why, |_| "*".into()));
        let layers = groups.entry(key).or_default();
        rename(at, |layer| {
            layers.push(layer);
            String::new()
        });
    }
    let text = |((kernel, at, why), layers): ((String, String, String), Vec<u64>)| {
        let layers = runs(&layers);
        format!(
            "only {name} has {kernel} of {}; the other: {}",
            at.replace('*', &layers),
            why.replace('*', &layers)
        )
    };
    groups.into_iter().map(text).collect()
}

/// Which weights a decision is about: what operation it was found by differs with the passes before.
fn place(at: &str) -> String {
    at.split_once(' ').map_or(at, |(_, name)| name).to_string()
}
