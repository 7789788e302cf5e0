//! What a run of the pipeline decided, what came of it and what it costs, as data.

use super::decision::{Decision, Outcome, Why};
use super::kernel::Kernel;
use super::types::Syms;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// Every decision of a pipeline on one graph, the kernels that it ends in, and the estimated cost on the way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The graph's name.
    pub graph: String,
    /// At what costs are estimated: as many tokens as the step takes, and caches that are full.
    pub bounds: Syms,
    /// The rules of the user, whether they forbade something or not.
    pub rules: Vec<String>,
    pub decisions: Vec<Decision>,
    /// Rewrites applied by pass, clean-ups included.
    pub rewrites: IndexMap<String, u64>,
    /// The graph as the model was lowered to it.
    pub lowered: Totals,
    /// The unfused graph: after quantise_acts and the first clean-up, before any fusion.
    pub before: Totals,
    pub after: Totals,
    /// What is launched in the end, in the order of the graph.
    pub kernels: Vec<FinalKernel>,
    /// What the fused ones of them compute, each once.
    pub forms: Vec<Form>,
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
    /// All launches together.
    pub fn count(&self) -> u64 {
        self.launches.values().sum()
    }
}

/// A node of the final graph that takes launches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinalKernel {
    /// See [`super::Graph::number`].
    pub number: u64,
    /// The kernel's name, or the primitive's.
    pub kernel: String,
    /// The node in words.
    pub at: String,
    /// The weights and states that it reads, by name.
    pub reads: Vec<String>,
    pub origin: Origin,
    /// What it computes: an index into [`Report::forms`]; none of a primitive.
    pub form: Option<u32>,
    pub launches: u64,
    pub bytes: u64,
    pub operations: u64,
    /// Estimated.
    pub us: f64,
    pub limit: Limit,
}

/// Where a launch comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A primitive that the model was lowered to.
    Lowered,
    /// A primitive that a pass put in.
    Inserted { pass: String },
    /// Fused of several.
    Fused,
}

/// What takes most of a launch's estimated time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Moving bytes.
    Memory,
    Arithmetic,
    /// That there is a launch at all.
    Launch,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Limit::Memory => "memory",
            Limit::Arithmetic => "arithmetic",
            Limit::Launch => "launch",
        })
    }
}

/// What a fused kernel stands for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Form {
    /// Types of its operands.
    pub operands: Vec<String>,
    /// The primitives that it replaces, operands first.
    pub primitives: Vec<Primitive>,
}

/// A primitive within a fused kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Primitive {
    pub op: String,
    /// It, its operands and the type of its result, as in the text form.
    pub text: String,
    /// Bytes of its results at the bounds of the graph.
    pub bytes: u64,
    /// Whether the kernel returns it. What it does not return is never written to memory.
    pub returned: bool,
    /// Whether it is only another view of its operand.
    pub view: bool,
}

impl Form {
    /// Bytes that primitives by themselves would write to memory and read again, and the kernel does not.
    pub fn bytes_never_written(&self) -> u64 {
        let inner = self.primitives.iter().filter(|p| !p.returned && !p.view);
        inner.map(|p| p.bytes).fold(0, u64::saturating_add)
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

    /// How often each rule of the user forbade something.
    pub fn forbade(&self) -> IndexMap<&str, u64> {
        let mut counts: IndexMap<&str, u64> = self.rules.iter().map(|rule| (rule.as_str(), 0)).collect();
        for d in &self.decisions {
            if let Outcome::Rejected { why: Why::Denied { rule } } = &d.outcome
                && let Some(count) = counts.get_mut(rule.as_str())
            {
                *count += 1;
            }
        }
        counts
    }

    /// The decisions that led to the node of this number, in the order they were made, and those against what would have taken
    /// it, or what became it, in.
    pub fn chain(&self, number: u64) -> Vec<&Decision> {
        let mut of = BTreeSet::from([number]);
        let mut chain = vec![];
        for d in self.decisions.iter().rev() {
            let about = match d.outcome {
                Outcome::Rejected { .. } => &d.takes,
                Outcome::Fired { .. } | Outcome::Rewritten { .. } => &d.makes,
            };
            if about.iter().any(|n| of.contains(n)) {
                chain.push(d);
                if !matches!(d.outcome, Outcome::Rejected { .. }) {
                    of.extend(&d.takes);
                }
            }
        }
        chain.reverse();
        chain
    }
}
