//! What a run of the pipeline decided, and what it was worth.

use super::cost::{self, Cost};
use crate::ir::{Decision, Graph, Kernel, Op, Outcome};
use crate::target::Target;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// Every decision of a pipeline on one graph, with the estimated cost before and after.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The graph's name.
    pub graph: String,
    pub decisions: Vec<Decision>,
    /// Rewrites applied by pass, clean-ups included.
    pub rewrites: IndexMap<String, u64>,
    /// The unfused graph: after quantise_acts and the first clean-up, before any fusion.
    pub before: Totals,
    pub after: Totals,
}

/// What one run of a graph costs by the cost model, at its bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Launches by kernel or primitive.
    pub launches: IndexMap<String, u64>,
    pub bytes: u64,
    pub operations: u64,
    pub us: f64,
}

impl Totals {
    /// Sums up a graph.
    pub fn of(g: &Graph, target: &Target) -> Totals {
        let mut launches = IndexMap::new();
        let mut total = Cost::default();
        for id in g.order() {
            let cost = cost::of_node(g, id, target);
            if cost.launches > 0 {
                *launches.entry(label(g.op(id)).to_string()).or_insert(0) += cost.launches;
            }
            total = [total, cost].into_iter().sum();
        }
        launches.sort_keys();
        Totals { launches, bytes: total.bytes, operations: total.operations, us: total.us }
    }

    /// All launches together.
    pub fn count(&self) -> u64 {
        self.launches.values().sum()
    }
}

impl Report {
    /// How many fusions made each kernel.
    pub fn fired(&self) -> IndexMap<Kernel, u64> {
        let mut counts = IndexMap::new();
        for d in &self.decisions {
            if let Outcome::Fired { kernel, .. } = d.outcome {
                *counts.entry(kernel).or_insert(0) += 1;
            }
        }
        counts
    }
}

/// The name under which a node's launches are counted: that of [`crate::codegen::spec::KernelSpec::name`].
fn label(op: &Op) -> &'static str {
    match op {
        Op::Fused(f) => f.kernel.name(),
        op => op.name(),
    }
}
