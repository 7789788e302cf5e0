//! The graph: nodes, values, and the few ways to change them.

use super::attributes::StateRole;
use super::op::Op;
use super::types::{Syms, TensorType};
use petgraph::Direction::{Incoming, Outgoing};
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::{EdgeRef, IntoEdgeReferences};
use std::collections::HashSet;

/// A node of a graph. Stays valid while other nodes come and go.
pub type NodeId = NodeIndex<u32>;

/// Result `out` of `node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    pub node: NodeId,
    pub out: u32,
}

impl From<NodeId> for Value {
    /// The first result.
    fn from(node: NodeId) -> Value {
        Value { node, out: 0 }
    }
}

/// An operation and the types of its results.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub op: Op,
    pub outs: Vec<TensorType>,
}

/// An edge: result `out` of its source is operand `slot` of its target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub(super) out: u32,
    pub(super) slot: u32,
}

/// A data-flow graph that ends in one [`Op::Return`].
///
/// Effects are data flow too: a cache is a state value, and writing it yields its next version.
#[derive(Clone, Debug)]
pub struct Graph {
    pub name: String,
    /// Upper bounds of the symbols.
    pub bounds: Syms,
    g: StableDiGraph<Node, Use>,
    /// By index, when each node was added: indices are used again after a removal, so they do not tell.
    added: Vec<u64>,
    additions: u64,
    inputs: Vec<NodeId>,
    ret: NodeId,
}

/// Graphs are equal if they print alike.
impl PartialEq for Graph {
    fn eq(&self, other: &Graph) -> bool {
        self.to_string() == other.to_string()
    }
}

impl Graph {
    /// An empty graph that returns nothing.
    pub fn new(name: impl Into<String>, bounds: Syms) -> Graph {
        let mut g = StableDiGraph::new();
        let ret = g.add_node(Node { op: Op::Return, outs: vec![] });
        Graph { name: name.into(), bounds, g, added: vec![0], additions: 1, inputs: vec![], ret }
    }

    /// Adds a node of which the result types follow from its operands.
    ///
    /// # Errors
    /// The typing rule that the operands break (see [`Op::infer`]).
    pub fn add(&mut self, op: Op, operands: &[Value]) -> Result<NodeId, String> {
        self.add_typed(op, operands, &[])
    }

    /// Adds a node with declared result types; leaves and `reshape` need them.
    ///
    /// # Errors
    /// The typing rule that the operands break, or that the declared types differ from the inferred.
    pub fn add_typed(&mut self, op: Op, operands: &[Value], types: &[TensorType]) -> Result<NodeId, String> {
        let name = op.name();
        if matches!(op, Op::Return) {
            return Err("a graph has one return".into());
        }
        let mut xs = Vec::with_capacity(operands.len());
        for v in operands {
            xs.push(self.try_ty(*v).ok_or_else(|| format!("{name}: an operand does not exist"))?);
        }
        let outs = op.infer(&xs, types).map_err(|e| format!("{name}: {e}"))?;
        if !types.is_empty() && outs != types {
            let list = |ts: &[TensorType]| ts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(format!("{name}: declared {}, but its operands give {}", list(types), list(&outs)));
        }
        let is_input = matches!(op, Op::Input { .. });
        let id = self.g.add_node(Node { op, outs });
        self.added.resize(self.added.len().max(id.index() + 1), 0);
        self.added[id.index()] = self.additions;
        self.additions += 1;
        for (slot, v) in operands.iter().enumerate() {
            self.g.add_edge(v.node, id, Use { out: v.out, slot: slot as u32 });
        }
        if is_input {
            self.inputs.push(id);
        }
        Ok(id)
    }

    /// Adds a leaf (input, weight, state or constant) of type `ty`.
    ///
    /// # Errors
    /// The typing rule that `ty` breaks.
    pub fn leaf(&mut self, op: Op, ty: TensorType) -> Result<Value, String> {
        self.add_typed(op, &[], &[ty]).map(Value::from)
    }

    /// Sets what the graph returns: its results, then the last version of each state.
    pub fn set_return(&mut self, values: &[Value]) {
        let old: Vec<_> = self.g.edges_directed(self.ret, Incoming).map(|e| e.id()).collect();
        for e in old {
            self.g.remove_edge(e);
        }
        for (slot, v) in values.iter().enumerate() {
            self.g.add_edge(v.node, self.ret, Use { out: v.out, slot: slot as u32 });
        }
    }

    /// The node with this id.
    ///
    /// # Panics
    /// If the node was removed.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.g[id]
    }

    /// The node with this id, if it (still) exists.
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.g.node_weight(id)
    }

    /// The operation of a node.
    pub fn op(&self, id: NodeId) -> &Op {
        &self.g[id].op
    }

    /// The type of a value.
    pub fn ty(&self, v: Value) -> &TensorType {
        &self.g[v.node].outs[v.out as usize]
    }

    fn try_ty(&self, v: Value) -> Option<&TensorType> {
        self.get(v.node)?.outs.get(v.out as usize)
    }

    /// The return node.
    pub fn ret(&self) -> NodeId {
        self.ret
    }

    /// The parameters in order.
    pub fn inputs(&self) -> &[NodeId] {
        &self.inputs
    }

    /// What the graph returns, in order.
    pub fn results(&self) -> Vec<Value> {
        self.operands(self.ret)
    }

    /// The operands of a node, in order.
    pub fn operands(&self, id: NodeId) -> Vec<Value> {
        self.slots(id).into_iter().map(|(_, v)| v).collect()
    }

    /// The operand slots of a node as they are stored, in order, for the verifier.
    pub(super) fn slots(&self, id: NodeId) -> Vec<(u32, Value)> {
        let mut slots: Vec<_> = self
            .g
            .edges_directed(id, Incoming)
            .map(|e| (e.weight().slot, Value { node: e.source(), out: e.weight().out }))
            .collect();
        slots.sort_unstable();
        slots
    }

    /// The storage, for tests that need a broken graph.
    #[cfg(test)]
    pub(super) fn raw_mut(&mut self) -> &mut StableDiGraph<Node, Use> {
        &mut self.g
    }

    /// Operand `slot` of a node, if it has that many.
    pub fn operand(&self, id: NodeId, slot: u32) -> Option<Value> {
        self.g
            .edges_directed(id, Incoming)
            .find(|e| e.weight().slot == slot)
            .map(|e| Value { node: e.source(), out: e.weight().out })
    }

    /// Who uses a value, with the operand slot: the node that was added first, first.
    pub fn uses(&self, v: Value) -> Vec<(NodeId, u32)> {
        let mut uses: Vec<_> = self
            .g
            .edges_directed(v.node, Outgoing)
            .filter(|e| e.weight().out == v.out)
            .map(|e| (e.target(), e.weight().slot))
            .collect();
        uses.sort_unstable_by_key(|&(node, slot)| (self.number(node), slot));
        uses
    }

    /// The how-manieth node that was added this is: a name that, unlike its id, no other node gets after it is gone.
    pub fn number(&self, id: NodeId) -> u64 {
        self.added.get(id.index()).copied().unwrap_or(u64::MAX)
    }

    /// How many operands use any result of a node.
    pub fn use_count(&self, id: NodeId) -> usize {
        self.g.edges_directed(id, Outgoing).count()
    }

    /// All node ids in order of creation, the return included.
    pub fn ids(&self) -> Vec<NodeId> {
        self.g.node_indices().collect()
    }

    /// The number of nodes, the return included.
    pub fn len(&self) -> usize {
        self.g.node_count()
    }

    /// Whether there is nothing but the return.
    pub fn is_empty(&self) -> bool {
        self.len() == 1
    }

    /// All nodes so that operands come first: depth first from the return, then what nothing uses, the
    /// return last. It depends on structure alone, so printing renumbers alike after any rewriting.
    ///
    /// In a cyclic graph (which [`super::verify()`] refuses) some operand comes later.
    pub fn order(&self) -> Vec<NodeId> {
        let mut sinks: Vec<NodeId> =
            self.g.node_indices().filter(|&n| n != self.ret && self.use_count(n) == 0).collect();
        sinks.sort_by_key(|&n| self.number(n));
        let mut roots = self.results().into_iter().map(|v| v.node).collect::<Vec<_>>();
        roots.extend(sinks);
        roots.extend(self.g.node_indices().filter(|&n| n != self.ret));
        let mut order = Vec::with_capacity(self.len());
        let mut seen = HashSet::with_capacity(self.len());
        let mut stack = vec![];
        for root in roots {
            if seen.insert(root) {
                stack.push((root, self.operands(root).into_iter()));
            }
            while let Some((node, rest)) = stack.last_mut() {
                let node = *node;
                match rest.next() {
                    Some(v) if seen.insert(v.node) => stack.push((v.node, self.operands(v.node).into_iter())),
                    Some(_) => {}
                    None => {
                        order.push(node);
                        stack.pop();
                    }
                }
            }
        }
        order.push(self.ret);
        order
    }

    /// A node in words: its operation, and the nearest weight or state up its operands, which tells it from its likes: none that many
    /// share, such as the factors of RoPE, if there is another.
    pub fn describe(&self, id: NodeId) -> String {
        let op = match self.op(id) {
            Op::Fused(f) => f.kernel.name(),
            op => op.name(),
        };
        let name = |n: NodeId| match self.op(n) {
            Op::Weight { name, rows: Some(rows) } => Some(format!("{name}[{}..]", rows.first)),
            Op::Weight { name, rows: None } | Op::State { name, .. } => Some(name.clone()),
            _ => None,
        };
        // Nodes, and which of their results are taken.
        let (mut level, mut shared): (Vec<(NodeId, Option<u32>)>, _) = (vec![(id, None)], None);
        for _ in 0..8 {
            let named = || level.iter().filter_map(|&(n, _)| Some((n, name(n)?)));
            // An embedding that is the head too has two users.
            if let Some((_, name)) = named().find(|(n, _)| self.use_count(*n) <= 2) {
                return format!("{op} {name}");
            }
            shared = shared.or(named().next().map(|(_, name)| name));
            // Each node once: a node may have many operands, and each of those again.
            let mut seen = HashSet::new();
            let above = level.iter().flat_map(|&(n, out)| {
                let mut operands = self.operands(n);
                if let (Op::Fused(fused), Some(out)) = (self.op(n), out) {
                    let takes = fused.operands_of(out);
                    operands =
                        operands.into_iter().zip(takes).filter(|(_, takes)| *takes).map(|(v, _)| v).collect();
                }
                // A matmul is that of its weight; a block adds its output to the residual stream, which has the name of the one before.
                if matches!(self.op(n), Op::Add | Op::MatMul { .. }) {
                    operands.reverse();
                }
                operands
            });
            // Of merged matmuls each result is of its own weight. Of many, none is looked at alone: a file may have any number.
            let apart = |v: &Value| matches!(self.op(v.node), Op::Fused(f) if f.body.results().len() <= 8);
            let above = above.map(|v| (v.node, apart(&v).then_some(v.out)));
            level = above.filter(|v| seen.insert(*v)).collect();
        }
        shared.map_or(op.to_string(), |name| format!("{op} {name}"))
    }

    /// The role of the state that a value is a version of; none if it is no version of any.
    pub fn state_role(&self, mut v: Value) -> Option<StateRole> {
        // A cycle, which the verifier refuses, would go on for ever.
        for _ in 0..self.len() {
            match self.op(v.node) {
                Op::State { role, .. } => return Some(*role),
                Op::Input { role, .. } => return *role,
                _ => v = self.previous_version(v)?,
            }
        }
        None
    }

    /// The version of a state that was overwritten to make this one.
    pub fn previous_version(&self, v: Value) -> Option<Value> {
        let (slot, _) = self.op(v.node).writes().into_iter().find(|&(_, out)| out == v.out)?;
        self.operand(v.node, slot)
    }

    /// Whether data flows from `from` to `to` (a node reaches itself).
    pub fn reaches(&self, from: NodeId, to: NodeId) -> bool {
        petgraph::algo::has_path_connecting(&self.g, from, to, None)
    }

    /// Whether data flows in a circle. (Petgraph's own test recurses as deep as the graph is long.)
    pub fn is_cyclic(&self) -> bool {
        petgraph::algo::toposort(&self.g, None).is_err()
    }

    /// Points every use of `old` at `new`.
    ///
    /// # Errors
    /// If the types differ or one of the values does not exist.
    pub fn replace_uses(&mut self, old: Value, new: Value) -> Result<(), String> {
        let (Some(a), Some(b)) = (self.try_ty(old), self.try_ty(new)) else {
            return Err("a replaced value does not exist".into());
        };
        if a != b {
            return Err(format!("a value of type {a} cannot be replaced by one of type {b}"));
        }
        let edges: Vec<_> = self
            .g
            .edges_directed(old.node, Outgoing)
            .filter(|e| e.weight().out == old.out)
            .map(|e| (e.id(), e.target(), e.weight().slot))
            .collect();
        for (edge, target, slot) in edges {
            self.g.remove_edge(edge);
            self.g.add_edge(new.node, target, Use { out: new.out, slot });
        }
        Ok(())
    }

    /// Points operand `slot` of `user` at `new`.
    ///
    /// # Errors
    /// If there is no such operand or the types differ.
    pub fn set_operand(&mut self, user: NodeId, slot: u32, new: Value) -> Result<(), String> {
        let old = self.operand(user, slot).ok_or("no such operand")?;
        if self.try_ty(old) != self.try_ty(new) {
            return Err("an operand cannot change its type".into());
        }
        let edge = self.g.edges_directed(user, Incoming).find(|e| e.weight().slot == slot).map(|e| e.id());
        if let Some(edge) = edge {
            self.g.remove_edge(edge);
        }
        self.g.add_edge(new.node, user, Use { out: new.out, slot });
        Ok(())
    }

    /// Removes a node that nothing uses.
    ///
    /// # Errors
    /// If it is used, or is the return.
    pub fn remove(&mut self, id: NodeId) -> Result<(), String> {
        if id == self.ret || self.use_count(id) > 0 {
            let name = self.get(id).map_or("missing node", |n| n.op.name());
            return Err(format!("{name} is still used"));
        }
        self.g.remove_node(id);
        self.inputs.retain(|&i| i != id);
        Ok(())
    }

    /// The number of operand edges, for statistics.
    pub fn edge_count(&self) -> usize {
        self.g.edge_references().count()
    }
}
