//! What a rule sees and returns: patches, rejections, and the builder that most fusions share.

use super::{UserRule, cost};
use crate::ir::{Fused, Gain, Graph, Kernel, NodeId, Op, TensorType, Value, Why};
use crate::target::Target;
use std::collections::{BTreeMap, BTreeSet};

/// What a rule may know beside the graph.
#[derive(Clone, Copy, Debug)]
pub struct Cx<'a> {
    pub target: &'a Target,
    /// The names of the passes that run.
    pub enabled: &'a [&'static str],
    /// Rules of the user that keep two operations apart, once one of them forbade what a rule offered: it may offer less.
    pub apart: &'a [UserRule],
}

impl Cx<'_> {
    /// Whether the pass of this name runs.
    pub fn runs(&self, pass: &str) -> bool {
        self.enabled.contains(&pass)
    }

    /// Whether a fusion of `members` into a kernel may take `extra` in too, which it can do without.
    pub fn may_take(&self, g: &Graph, kernel: Kernel, members: &[NodeId], extra: NodeId) -> bool {
        !self.apart.iter().any(|rule| rule.separates(g, kernel, members, extra))
    }
}

/// A rule: looks at one node and proposes a rewrite around it, or says why not. It never mutates.
pub type Rule = fn(&Graph, NodeId, &Cx) -> Result<Patch, Reject>;

/// Why a rule does not rewrite.
#[derive(Clone, Debug, PartialEq)]
pub enum Reject {
    /// The node is not what the rule is about. Not worth a word.
    NoMatch,
    /// The anchor matched, something else did not: worth telling the user. `others` would have been taken in beside it.
    Near { at: NodeId, why: Why, others: Vec<NodeId> },
}

impl Reject {
    /// A near-miss at `at`.
    pub fn near(at: NodeId, why: Why) -> Reject {
        Reject::Near { at, why, others: vec![] }
    }

    /// The same, of a fusion that would have taken these in.
    #[must_use]
    pub fn of(self, members: &[NodeId]) -> Reject {
        match self {
            Reject::NoMatch => Reject::NoMatch,
            Reject::Near { at, why, .. } => Reject::Near { at, why, others: members.to_vec() },
        }
    }
}

/// A value that exists already, or result `out` of the `index`-th node that a patch adds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ref {
    Old(Value),
    New { index: usize, out: u32 },
}

/// A node to add.
#[derive(Clone, Debug, PartialEq)]
pub struct NewNode {
    pub op: Op,
    pub operands: Vec<Ref>,
    /// Declared result types; empty where they follow from the operands.
    pub types: Vec<TensorType>,
}

/// A rewrite as a value: nodes to add, uses to move, nodes to drop. It is type-checked as it is applied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Patch {
    pub add: Vec<NewNode>,
    /// Every use of the value moves to the reference.
    pub redirect: Vec<(Value, Ref)>,
    /// Nodes that are unused afterwards, users before what they use.
    pub drop: Vec<NodeId>,
    /// The kernel a fusion makes, and what it is worth.
    pub fused: Option<(Kernel, Gain)>,
}

impl Patch {
    /// Applies the patch and returns the ids of the added nodes.
    ///
    /// # Errors
    /// The typing rule it breaks, or that it drops what is used: a defect of the rule. The graph is unspecified then. What else a
    /// patch may break, such as the order of effects, the verifier finds.
    pub fn apply(&self, g: &mut Graph) -> Result<Vec<NodeId>, String> {
        let mut ids = Vec::with_capacity(self.add.len());
        let resolve = |r: &Ref, ids: &[NodeId]| match *r {
            Ref::Old(v) => Ok(v),
            Ref::New { index, out } => {
                let node = *ids.get(index).ok_or("a patch refers to a node that it has not added yet")?;
                Ok::<_, String>(Value { node, out })
            }
        };
        // Operands are resolved before any use moves, so a new node may consume what it replaces.
        for node in &self.add {
            let operands = node.operands.iter().map(|r| resolve(r, &ids)).collect::<Result<Vec<_>, _>>()?;
            ids.push(g.add_typed(node.op.clone(), &operands, &node.types)?);
        }
        for (old, new) in &self.redirect {
            let new = resolve(new, &ids)?;
            for (user, slot) in g.uses(*old) {
                if !ids.contains(&user) {
                    g.set_operand(user, slot, new)?;
                }
            }
        }
        for &id in &self.drop {
            g.remove(id)?;
        }
        Ok(ids)
    }

    /// Rejects the fusion unless the cost model expects it to be at least as fast as what it replaces.
    ///
    /// # Errors
    /// [`Why::CostLoses`] at `at`, with both times.
    pub fn if_it_pays(self, at: NodeId) -> Result<Patch, Reject> {
        match self.fused {
            Some((_, gain)) if loses(gain.fused_us, gain.unfused_us) => {
                let Gain { fused_us, unfused_us, launches_saved, .. } = gain;
                Err(Reject::near(at, Why::CostLoses { fused_us, unfused_us, launches_saved }).of(&self.drop))
            }
            _ => Ok(self),
        }
    }
}

/// Whether one time is longer than another by more than sums are rounded by.
pub(super) fn loses(fused_us: f64, unfused_us: f64) -> bool {
    fused_us > unfused_us * (1.0 + 1e-9)
}

/// A set of nodes about to become one fused node.
pub struct Fusion<'a> {
    pub graph: &'a Graph,
    pub kernel: Kernel,
    /// The nodes to absorb, in any order. Fused ones are inlined.
    pub members: Vec<NodeId>,
    /// The values of members that become results. Every other value of a member must have no user outside, unless
    /// recomputing it is free (a view, or dequantisation of what a kernel loads); then both sides keep their own.
    pub results: Vec<Value>,
}

impl Fusion<'_> {
    /// Builds the patch: body, operands as the results need them, left to right, and the gain on the target.
    ///
    /// # Errors
    /// [`Why::MultiUse`] if a value that is not a result is used outside, [`Why::Dependent`] if data leaves the set
    /// and comes back, [`Why::EffectBetween`] if what comes back is a cache; all at `at`.
    pub fn patch(self, at: NodeId, cx: &Cx) -> Result<Patch, Reject> {
        let members = self.members.clone();
        self.build(at, cx).map_err(|reject| reject.of(&members))
    }

    fn build(self, at: NodeId, cx: &Cx) -> Result<Patch, Reject> {
        let g = self.graph;
        let set: BTreeSet<NodeId> = self.members.iter().copied().collect();
        let members = topological(g, &self.members, &set);
        let drop = self.dropped(&members, &set).map_err(|why| Reject::near(at, why))?;
        self.convex(&members, &set).map_err(|why| Reject::near(at, why))?;

        let mut body = Body::new(g, self.kernel);
        for v in entries(g, &self.results, &set) {
            body.input(v).map_err(|detail| Reject::near(at, Why::Shape { detail }))?;
        }
        for &m in &members {
            body.absorb(m).map_err(|detail| Reject::near(at, Why::Shape { detail }))?;
        }
        let (body, operands) =
            body.finish(&self.results).map_err(|detail| Reject::near(at, Why::Shape { detail }))?;

        let fused = Op::Fused(Box::new(Fused { kernel: self.kernel, body }));
        let types: Vec<TensorType> = self.results.iter().map(|v| g.ty(*v).clone()).collect();
        let operand_types: Vec<&TensorType> = operands.iter().map(|v| g.ty(*v)).collect();
        let after = cost::of_op(&fused, &operand_types, &types, &g.bounds, cx.target);
        let before = drop.iter().map(|&m| cost::of_node(g, m, cx.target)).sum::<cost::Cost>();
        let gain = Gain {
            fused_us: after.us,
            unfused_us: before.us,
            bytes_saved: before.bytes as i64 - after.bytes as i64,
            launches_saved: before.launches as i64 - after.launches as i64,
        };
        Ok(Patch {
            add: vec![NewNode { op: fused, operands: operands.into_iter().map(Ref::Old).collect(), types }],
            redirect: self
                .results
                .iter()
                .enumerate()
                .map(|(i, v)| (*v, Ref::New { index: 0, out: i as u32 }))
                .collect(),
            drop,
            fused: Some((self.kernel, gain)),
        })
    }

    /// The members that nothing uses afterwards, users first.
    fn dropped(&self, members: &[NodeId], set: &BTreeSet<NodeId>) -> Result<Vec<NodeId>, Why> {
        let g = self.graph;
        let mut drop = vec![];
        let mut dropped = BTreeSet::new();
        for &m in members.iter().rev() {
            let mut stays = false;
            for out in 0..g.node(m).outs.len() as u32 {
                let v = Value { node: m, out };
                if self.results.contains(&v) {
                    continue;
                }
                for (user, _) in g.uses(v) {
                    if dropped.contains(&user) {
                        continue;
                    }
                    if !set.contains(&user) && !is_free(g, m) {
                        return Err(Why::MultiUse { value: g.describe(m) });
                    }
                    stays = true;
                }
            }
            if !stays {
                dropped.insert(m);
                drop.push(m);
            }
        }
        Ok(drop)
    }

    /// No data may leave the set and come back: the fused node would depend on itself.
    fn convex(&self, members: &[NodeId], set: &BTreeSet<NodeId>) -> Result<(), Why> {
        let g = self.graph;
        let entries: BTreeSet<Value> = members
            .iter()
            .flat_map(|&m| g.operands(m))
            .filter(|v| !set.contains(&v.node) && !g.op(v.node).is_leaf())
            .collect();
        for entry in entries {
            // Members that depend on the entry within the set cannot lead to it. Only another one with a result can,
            // and most fusions have none.
            let mut after = BTreeSet::new();
            for &m in members {
                if g.operands(m).iter().any(|v| *v == entry || after.contains(&v.node)) {
                    after.insert(m);
                }
            }
            if self.results.iter().all(|r| after.contains(&r.node)) {
                continue;
            }
            let mut seen = BTreeSet::new();
            let mut stack = vec![entry.node];
            while let Some(n) = stack.pop() {
                for v in g.operands(n) {
                    if set.contains(&v.node) {
                        return Err(comes_back(g, v, n));
                    }
                    if !g.op(v.node).is_leaf() && seen.insert(v.node) {
                        stack.push(v.node);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Value `v` of a set flows to `through` outside, and from there back into the set.
fn comes_back(g: &Graph, v: Value, through: NodeId) -> Why {
    if g.state_role(v).is_some() {
        Why::EffectBetween { state: g.describe(v.node) }
    } else {
        Why::Dependent { detail: format!("{} comes in between and needs a part", g.describe(through)) }
    }
}

/// Whether a node costs nothing to compute again in another kernel: views, and what a kernel does as it loads: finding the
/// rows of a cache, and the dequantisation of weights, cache rows and quantised activations.
pub fn is_free(g: &Graph, id: NodeId) -> bool {
    match g.op(id) {
        Op::Reshape | Op::KvRead { .. } => true,
        Op::Dequant => g.operand(id, 0).is_some_and(|v| {
            matches!(
                g.op(v.node),
                Op::Weight { .. } | Op::KvRead { .. } | Op::QuantAct | Op::Fused(_) | Op::Input { .. }
            )
        }),
        _ => false,
    }
}

/// What the members of `set` take from outside, in the order that a walk up from `results` meets it.
fn entries(g: &Graph, results: &[Value], set: &BTreeSet<NodeId>) -> Vec<Value> {
    let (mut entries, mut seen) = (vec![], BTreeSet::new());
    let mut stack: Vec<Value> = results.iter().rev().copied().collect();
    while let Some(v) = stack.pop() {
        if !set.contains(&v.node) {
            if !entries.contains(&v) {
                entries.push(v);
            }
        } else if seen.insert(v.node) {
            stack.extend(g.operands(v.node).into_iter().rev());
        }
    }
    entries
}

/// The members with operands first.
fn topological(g: &Graph, members: &[NodeId], set: &BTreeSet<NodeId>) -> Vec<NodeId> {
    let mut order = Vec::with_capacity(members.len());
    let mut seen = BTreeSet::new();
    for &root in members {
        // Sets are small; a depth-first walk within the set suffices.
        let mut stack = vec![(root, false)];
        while let Some((n, done)) = stack.pop() {
            if done {
                order.push(n);
            } else if seen.insert(n) {
                stack.push((n, true));
                stack.extend(
                    g.operands(n)
                        .into_iter()
                        .rev()
                        .map(|v| v.node)
                        .filter(|n| set.contains(n))
                        .map(|n| (n, false)),
                );
            }
        }
    }
    order
}

/// The body of a fused node under construction; equal primitives are shared.
struct Body<'a> {
    outer: &'a Graph,
    body: Graph,
    operands: Vec<Value>,
    /// Outer values to body values.
    map: BTreeMap<Value, Value>,
    known: BTreeMap<String, NodeId>,
}

impl<'a> Body<'a> {
    fn new(outer: &'a Graph, kernel: Kernel) -> Body<'a> {
        let body = Graph::new(kernel.name(), outer.bounds);
        Body { outer, body, operands: vec![], map: BTreeMap::new(), known: BTreeMap::new() }
    }

    fn input(&mut self, v: Value) -> Result<Value, String> {
        if let Some(&inner) = self.map.get(&v) {
            return Ok(inner);
        }
        let name = format!("x{}", self.operands.len());
        let role = self.outer.state_role(v);
        let inner = self.body.leaf(Op::Input { name, role }, self.outer.ty(v).clone())?;
        self.operands.push(v);
        self.map.insert(v, inner);
        Ok(inner)
    }

    fn primitive(&mut self, op: &Op, operands: &[Value], types: &[TensorType]) -> Result<NodeId, String> {
        let key = format!("{op:?} {operands:?} {types:?}");
        if let Some(&id) = self.known.get(&key) {
            return Ok(id);
        }
        let id = self.body.add_typed(op.clone(), operands, types)?;
        self.known.insert(key, id);
        Ok(id)
    }

    fn absorb(&mut self, m: NodeId) -> Result<(), String> {
        let node = self.outer.node(m);
        let operands =
            self.outer.operands(m).into_iter().map(|v| self.input(v)).collect::<Result<Vec<_>, _>>()?;
        let Op::Fused(fused) = &node.op else {
            let id = self.primitive(&node.op, &operands, &node.outs)?;
            for out in 0..node.outs.len() as u32 {
                self.map.insert(Value { node: m, out }, Value { node: id, out });
            }
            return Ok(());
        };
        let inner = &fused.body;
        let mut map: BTreeMap<Value, Value> =
            inner.inputs().iter().map(|&i| Value::from(i)).zip(operands).collect();
        for id in inner.order() {
            let node = inner.node(id);
            if matches!(node.op, Op::Input { .. } | Op::Return) {
                continue;
            }
            let operands: Vec<Value> = inner.operands(id).iter().map(|v| map[v]).collect();
            let new = self.primitive(&node.op, &operands, &node.outs)?;
            for out in 0..node.outs.len() as u32 {
                map.insert(Value { node: id, out }, Value { node: new, out });
            }
        }
        for (out, v) in inner.results().into_iter().enumerate() {
            self.map.insert(Value { node: m, out: out as u32 }, map[&v]);
        }
        Ok(())
    }

    fn finish(mut self, results: &[Value]) -> Result<(Graph, Vec<Value>), String> {
        let results = results
            .iter()
            .map(|v| self.map.get(v).copied().ok_or("a result is computed outside of the fusion"))
            .collect::<Result<Vec<_>, _>>()?;
        self.body.set_return(&results);
        Ok((self.body, self.operands))
    }
}

/// The only user of a value, with the slot it uses it in.
pub fn sole_use(g: &Graph, v: Value) -> Option<(NodeId, u32)> {
    match g.uses(v)[..] {
        [only] => Some(only),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::loses;

    #[test]
    fn sums_that_differ_by_their_rounding_alone_are_a_tie() {
        let (fused_us, unfused_us) = (13.67512523364486, 13.675125233644858);
        assert!(fused_us > unfused_us && !loses(fused_us, unfused_us) && !loses(unfused_us, fused_us));
        assert!(loses(13.676, unfused_us));
    }
}
