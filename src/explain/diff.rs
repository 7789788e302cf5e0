//! What two compilations of a model have otherwise.

use super::{NOT_TRIED, names, why_anywhere};
use crate::ir::layers::{layer, rename, runs};
use crate::ir::{Outcome, Report};
use indexmap::IndexMap;
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};

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
    StepDifference {
        graph: a.graph.clone(),
        launches: [a.after.count(), b.after.count()],
        bytes: [a.after.bytes, b.after.bytes],
        us: [a.after.us, b.after.us],
        kernels: changes(a, b),
        decisions: [only_in(a, b, "A"), only_in(b, a, "B")].concat(),
    }
}

/// Kernels are compared one by one and then folded: which layers a row has differs with what is in the others.
fn changes(a: &Report, b: &Report) -> Vec<Change> {
    let mut kernels: IndexMap<(&str, String), [(u64, f64); 2]> = IndexMap::new();
    for (side, report) in [a, b].into_iter().enumerate() {
        for kernel in &report.kernels {
            let entry = kernels.entry((&kernel.kernel, names(kernel))).or_default();
            entry[side].0 += kernel.launches;
            entry[side].1 += kernel.us;
        }
    }
    kernels.retain(|_, [a, b]| a.0 != b.0 || (a.1 - b.1).abs() > 1e-9 * a.1.max(b.1));
    // Those of layers are one, where both have as many launches of each.
    type Key<'a> = (&'a str, String, [u64; 2]);
    let mut groups: IndexMap<Key<'_>, (Vec<u64>, Change)> = IndexMap::new();
    for ((kernel, of), [a, b]) in kernels {
        let key: Key<'_> = (kernel, rename(&of, |_| "*".into()), [a.0, b.0]);
        let new = || Change { kernel: kernel.into(), of: of.clone(), launches: [0; 2], us: [0.0; 2] };
        let (layers, change) = groups.entry(key).or_insert_with(|| (vec![], new()));
        layers.extend(layer(&of));
        for (side, (launches, us)) in [a, b].into_iter().enumerate() {
            change.launches[side] += launches;
            change.us[side] += us;
        }
    }
    let folded =
        |(layers, change): (Vec<u64>, Change)| Change { of: rename(&change.of, |_| runs(&layers)), ..change };
    let mut changes: Vec<Change> = groups.into_values().map(folded).collect();
    changes.sort_by(|x, y| (y.us[0] - y.us[1]).abs().total_cmp(&(x.us[0] - x.us[1]).abs()));
    changes
}

/// A fusion: its pass, its kernel, the weights that it is named by, and the nodes of the lowered graph that it is of.
struct Made<'a> {
    pass: &'a str,
    kernel: &'static str,
    at: &'a str,
    of: BTreeSet<u64>,
}

/// What passes made, and what each decision is about: nodes of the lowered graph by number.
fn traced(report: &Report) -> (Vec<Made<'_>>, Vec<BTreeSet<u64>>) {
    let mut of_node: HashMap<u64, BTreeSet<u64>> = HashMap::new();
    let (mut made, mut about) = (vec![], vec![]);
    for d in &report.decisions {
        let of: BTreeSet<u64> =
            d.takes.iter().flat_map(|n| of_node.get(n).cloned().unwrap_or(BTreeSet::from([*n]))).collect();
        match &d.outcome {
            Outcome::Fired { kernel, .. } => {
                of_node.extend(d.makes.iter().map(|n| (*n, of.clone())));
                made.push(Made { pass: &d.pass, kernel: kernel.name(), at: place(&d.at), of: of.clone() });
            }
            // What was put in is of no node that was lowered.
            Outcome::Rewritten { replaced, added } => {
                let of = |op: &String| if replaced.contains(op) { of.clone() } else { BTreeSet::new() };
                of_node.extend(d.makes.iter().zip(added).map(|(n, op)| (*n, of(op))));
            }
            Outcome::Rejected { .. } => {}
        }
        about.push(of);
    }
    (made, about)
}

/// The fusions that one made and the other did not, layers folded.
fn only_in(made: &Report, not: &Report, name: &str) -> Vec<String> {
    // Numbers of nodes are those of one graph alone.
    let same_graph = made.lowered.launches == not.lowered.launches;
    let (fusions, _) = traced(made);
    let (theirs, about) = traced(not);
    let is_of = |of: &BTreeSet<u64>, at: &str, fusion: &Made| {
        at == fusion.at || same_graph && !of.is_disjoint(&fusion.of)
    };
    // One that takes in less is another.
    let has = |other: &Made, fusion: &Made| match same_graph {
        true => other.of.is_superset(&fusion.of),
        false => other.at == fusion.at,
    };
    let mut groups: IndexMap<(String, String, String), Vec<u64>> = IndexMap::new();
    for fusion in &fusions {
        let same = |other: &&Made| (other.pass, other.kernel) == (fusion.pass, fusion.kernel);
        if theirs.iter().filter(same).any(|other| has(other, fusion)) {
            continue;
        }
        let why = not.decisions.iter().zip(&about).find_map(|(d, of)| match &d.outcome {
            Outcome::Rejected { why } if d.pass == fusion.pass && is_of(of, place(&d.at), fusion) => {
                Some(why.to_string())
            }
            _ => None,
        });
        let why = why.or_else(|| why_anywhere(not, fusion.pass)).unwrap_or(NOT_TRIED.into());
        let key =
            (fusion.kernel.to_string(), rename(fusion.at, |_| "*".into()), rename(&why, |_| "*".into()));
        let layers = groups.entry(key).or_default();
        rename(fusion.at, |layer| {
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
fn place(at: &str) -> &str {
    at.split_once(' ').map_or(at, |(_, name)| name)
}
