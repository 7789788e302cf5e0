//! What each rewrite of a pipeline did, and what became of each primitive.

use super::diagram::class_of;
use crate::ir::{Graph, NodeId, Op, TensorType, Value};
use crate::passes::{NOT_FUSIONS, Observer, Ref, Rewrite};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Watches a pipeline at work.
pub(super) struct Watch {
    /// The graph before the first fusion.
    pub before: Graph,
    /// For each node of the graph as it is now, the primitives of `before` that it stands for.
    owners: BTreeMap<NodeId, Vec<NodeId>>,
    /// Where values of `before` are now.
    places: BTreeMap<Value, Vec<Value>>,
    /// Those that are nowhere and not written any more, and since which rewrite, from 1 on.
    pub gone: BTreeMap<Value, usize>,
    pub steps: Vec<Seen>,
}

/// A rewrite as it was seen.
pub(super) struct Seen {
    pub step: Step,
    /// The primitives of [`Watch::before`] that it is about.
    pub nodes: Vec<NodeId>,
    /// Nodes that came, or that others gave way to.
    left: Vec<NodeId>,
}

/// A rewrite, for the page.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub pass: &'static str,
    /// The node that the rule looked at, in words.
    pub at: String,
    /// The nodes that went.
    pub dropped: Vec<Part>,
    /// The nodes that came.
    pub added: Vec<Part>,
    /// What it is worth, of fusions: estimated microseconds before and after, bytes and launches saved.
    pub gain: Option<(f64, f64, i64, i64)>,
    /// Indices into the primitives of the view.
    pub primitives: Vec<usize>,
    /// Of the view's, what would turn it over.
    pub turn: usize,
}

/// A node in a step.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    pub name: String,
    /// Its colour.
    pub class: String,
    /// Type, bytes, and whether they are no longer written, of each result.
    pub results: Vec<(String, u64, bool)>,
}

impl Watch {
    pub fn new(lowered: &Graph) -> Watch {
        let mut watch = Watch {
            before: lowered.clone(),
            owners: BTreeMap::new(),
            places: BTreeMap::new(),
            gone: BTreeMap::new(),
            steps: vec![],
        };
        watch.start(lowered);
        watch
    }

    fn start(&mut self, g: &Graph) {
        self.before = g.clone();
        self.owners = g.ids().into_iter().map(|id| (id, vec![id])).collect();
        let values = g
            .ids()
            .into_iter()
            .flat_map(|node| (0..g.node(node).outs.len() as u32).map(move |out| Value { node, out }));
        self.places = values.map(|v| (v, vec![v])).collect();
    }

    /// The primitives that a node of the final graph stands for.
    pub fn owned_by(&self, id: NodeId) -> &[NodeId] {
        self.owners.get(&id).map_or(&[], Vec::as_slice)
    }
}

fn part(g: &Graph, id: NodeId, gone: &dyn Fn(Value) -> bool) -> Part {
    let name = match g.op(id) {
        Op::Fused(fused) => fused.kernel.name(),
        op => op.name(),
    };
    let result =
        |(out, ty): (u32, &TensorType)| (ty.to_string(), ty.bytes(&g.bounds), gone(Value { node: id, out }));
    Part {
        name: name.into(),
        class: class_of(g.op(id).kernel()),
        results: (0u32..).zip(&g.node(id).outs).map(result).collect(),
    }
}

impl Observer for Watch {
    fn before_rewrite(&mut self, rewrite: &Rewrite, g: &Graph) {
        let patch = rewrite.patch;
        let moved: BTreeSet<Value> = patch.redirect.iter().map(|(old, _)| *old).collect();
        let gone = |v: Value| !moved.contains(&v);
        let mut nodes: Vec<NodeId> = patch.drop.iter().flat_map(|id| self.owned_by(*id).to_vec()).collect();
        nodes.sort_unstable();
        self.steps.push(Seen {
            step: Step {
                pass: rewrite.pass,
                at: g.describe(rewrite.at),
                // Users are dropped before what they use.
                dropped: patch.drop.iter().rev().map(|id| part(g, *id, &gone)).collect(),
                added: vec![],
                gain: patch
                    .fused
                    .map(|(_, gain)| (gain.unfused_us, gain.fused_us, gain.bytes_saved, gain.launches_saved)),
                primitives: vec![],
                turn: 0,
            },
            nodes,
            left: vec![],
        });
    }

    fn after_rewrite(&mut self, rewrite: &Rewrite, added: &[NodeId], g: &Graph) {
        let patch = rewrite.patch;
        if let Some(seen) = self.steps.last_mut() {
            seen.step.added = added.iter().map(|id| part(g, *id, &|_| false)).collect();
            let kept = patch.redirect.iter().filter_map(|(_, new)| match new {
                Ref::Old(v) => Some(v.node),
                Ref::New { .. } => None,
            });
            seen.left = added.iter().copied().chain(kept).collect();
        }
        for (old, new) in &patch.redirect {
            let new = match *new {
                Ref::Old(v) => Some(v),
                Ref::New { index, out } => added.get(index).map(|&node| Value { node, out }),
            };
            if let (Some(values), Some(new)) = (self.places.remove(old), new) {
                self.places.entry(new).or_default().extend(values);
            }
        }
        let mut owned = vec![];
        for id in &patch.drop {
            owned.extend(self.owners.remove(id).unwrap_or_default());
            let values: Vec<Value> = self.places.keys().filter(|v| v.node == *id).copied().collect();
            for v in values {
                let gone = self.places.remove(&v).unwrap_or_default();
                self.gone.extend(gone.into_iter().map(|v| (v, self.steps.len())));
            }
        }
        let heir = added.iter().find(|id| g.op(**id).kernel().is_some()).or(added.first());
        if let Some(heir) = heir {
            self.owners.entry(*heir).or_default().extend(owned);
        }
    }

    fn after_pass(&mut self, pass: &'static str, g: &Graph) {
        if NOT_FUSIONS.contains(&pass) {
            self.start(g);
            self.gone.clear();
            // What was rewritten before there are fusions is where what it left is, as far as that is there yet.
            let there: BTreeSet<NodeId> = g.ids().into_iter().collect();
            for seen in &mut self.steps {
                seen.nodes = seen.left.iter().copied().filter(|id| there.contains(id)).collect();
            }
        }
    }
}
