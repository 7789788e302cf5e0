//! The verifier. Codegen takes only a [`Verified`] graph.
//!
//! Rules, by number as reports print them:
//!
//! 1. Data does not flow in a circle.
//! 2. The operands of a node fill the slots `0..n`, and each is a result that its node has.
//! 3. Result types are those that [`Op::infer`] gives for the operands; rows of a weight lie within its tensor.
//! 4. Inputs, weights and states each have unique names, but for weights that are other rows of one tensor.
//! 5. Attributes make sense: epsilon is finite and not negative, the base of RoPE finite and positive,
//!    scales and constants finite; a matmul rounds to f16 or bf16.
//! 6. Sizes make sense: at most [`TensorType::MAX_RANK`] dimensions, none of which can be 0 but by `R`; fewer than
//!    2⁴⁸ elements and bytes at the bounds.
//! 7. Bounds make sense: `1 <= T` and `R <= T`.
//! 8. Rows of a quantised type are whole blocks.
//! 9. A state has constant dimensions; an appended one is `f32` or `f16`, a replaced one `f32`.
//! 10. Only a version of a state is written to, in the way of its role, and each version at most once; only a version of
//!     an appended state is read in pages.
//! 11. Whoever else reads a version that is overwritten, or a view of it, is an ancestor of the write.
//! 12. The return lists results first, then the last version of each state, once.
//! 13. A fused body holds primitives only (no fused node, weight or state), returns something, returns
//!     no view of a state, and carries the kernel's name and the bounds of the graph around it. Its inputs have the
//!     roles of the states that its operands are versions of; inputs of the graph itself have none.
//!
//! A body is checked by the same rules, but that its inputs with a role stand for the states: those it
//! writes must be returned, and no others.

use super::attributes::StateRole;
use super::graph::{Graph, NodeId, Value};
use super::kernel::Fused;
use super::op::Op;
use super::text::{At, lines};
use super::types::{DType, Syms, TensorType};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Deref;

/// Elements and bytes stay below this, so that sums of sizes fit 64 bits with room to spare.
const SIZE_LIMIT: u64 = 1 << 48;

/// A graph that obeys every rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified(Graph);

impl Verified {
    /// The graph, to change it again.
    pub fn into_graph(self) -> Graph {
        self.0
    }
}

impl Deref for Verified {
    type Target = Graph;

    fn deref(&self) -> &Graph {
        &self.0
    }
}

/// Checks every rule and vouches for the graph.
///
/// # Errors
/// Every rule that is broken; effects (rules 10 to 12) are looked at only if all else is right.
pub fn verify(graph: Graph) -> Result<Verified, VerifyErrors> {
    match violations(&graph) {
        errors if errors.is_empty() => Ok(Verified(graph)),
        errors => Err(VerifyErrors { graph: Box::new(graph), errors }),
    }
}

/// [`verify()`] for a graph that is still being rewritten.
///
/// # Errors
/// As [`verify()`], with a copy of the graph.
pub fn verify_unfinished(graph: &Graph) -> Result<(), VerifyErrors> {
    match violations(graph) {
        errors if errors.is_empty() => Ok(()),
        errors => Err(VerifyErrors { graph: Box::new(graph.clone()), errors }),
    }
}

/// A graph and what is wrong with it. Displays the errors within the text of the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyErrors {
    pub graph: Box<Graph>,
    pub errors: Vec<VerifyError>,
}

/// One rule broken at one place.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyError {
    /// Where; `None` is the graph as a whole.
    pub at: Option<At>,
    pub violation: Violation,
}

/// How a rule is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("data flows in a circle")]
    Cycle,
    #[error("operand {expected} is missing, the next is in slot {slot}")]
    Slot { expected: u32, slot: u32 },
    #[error("operand {slot} is result {out} of a node that has {results}")]
    NoSuchResult { slot: u32, out: u32, results: usize },
    #[error("{why}")]
    Operands { why: String },
    #[error("the results are declared as {stored}, but the operands give {inferred}")]
    Types { stored: String, inferred: String },
    #[error("another {kind} is called {name:?}")]
    DuplicateName { kind: &'static str, name: String },
    #[error("{attribute} cannot be {value}")]
    Attribute { attribute: &'static str, value: String },
    #[error("{ty} has more than {} dimensions", TensorType::MAX_RANK)]
    Rank { ty: TensorType },
    #[error("{ty} can be empty")]
    Empty { ty: TensorType },
    #[error("{ty} can have 2^48 elements or bytes, or more")]
    TooLarge { ty: TensorType },
    #[error("bounds need 1 <= T and R <= T, but T is {} and R is {}", .0.t, .0.r)]
    Bounds(Syms),
    #[error("rows of {ty} are not whole blocks of {}", ty.dtype.block_len())]
    Blocks { ty: TensorType },
    #[error("{ty} is no type of a state that is {}", role.name())]
    StateType { ty: TensorType, role: StateRole },
    #[error("operand {slot} must be a version of a state that is {}", role.name())]
    NotAState { slot: u32, role: StateRole },
    #[error("this version of state {state:?} is already written by another node")]
    WrittenTwice { state: String },
    #[error("this reads state {state:?}, which may be overwritten before it runs")]
    ReadAfterWrite { state: String },
    #[error("what is returned for state {state:?} is not its last version")]
    StaleVersion { state: String },
    #[error("state {state:?} is returned twice")]
    ReturnedTwice { state: String },
    #[error("state {state:?} is not returned")]
    MissingState { state: String },
    #[error("result {slot} comes after a state")]
    ResultAfterState { slot: usize },
    #[error("a fused body holds no {op}")]
    NotPrimitive { op: &'static str },
    #[error("a fused body returns something")]
    EmptyBody,
    #[error("result {slot} of the body only shows state {state:?}, which it does not write")]
    ReturnsView { slot: usize, state: String },
    #[error("the body is called {found:?}, not {expected:?}")]
    BodyName { found: String, expected: &'static str },
    #[error("the body has other bounds than the graph around it")]
    BodyBounds,
    #[error("input {slot} has another role than what it stands for")]
    InputRole { slot: usize },
}

impl Violation {
    /// The number of the rule in the [module's list](self).
    pub fn rule(&self) -> u8 {
        match self {
            Violation::Cycle => 1,
            Violation::Slot { .. } | Violation::NoSuchResult { .. } => 2,
            Violation::Operands { .. } | Violation::Types { .. } => 3,
            Violation::DuplicateName { .. } => 4,
            Violation::Attribute { .. } => 5,
            Violation::Rank { .. } | Violation::Empty { .. } | Violation::TooLarge { .. } => 6,
            Violation::Bounds(_) => 7,
            Violation::Blocks { .. } => 8,
            Violation::StateType { .. } => 9,
            Violation::NotAState { .. } | Violation::WrittenTwice { .. } => 10,
            Violation::ReadAfterWrite { .. } => 11,
            Violation::StaleVersion { .. }
            | Violation::ReturnedTwice { .. }
            | Violation::MissingState { .. }
            | Violation::ResultAfterState { .. } => 12,
            Violation::NotPrimitive { .. }
            | Violation::EmptyBody
            | Violation::ReturnsView { .. }
            | Violation::BodyName { .. }
            | Violation::BodyBounds
            | Violation::InputRole { .. } => 13,
        }
    }
}

impl std::error::Error for VerifyErrors {}

impl fmt::Display for VerifyErrors {
    /// The lines with errors below them; of a long graph only those around.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WHOLE: usize = 40;
        const AROUND: usize = 2;
        let lines = lines(&self.graph);
        let places: HashMap<_, _> =
            lines.iter().enumerate().filter_map(|(i, line)| Some((line.at?, i))).collect();
        // Inputs have no line of their own: those of a body show at its fused node, others at the head.
        let line_of = |at: At| places.get(&at).or_else(|| places.get(&At { inner: None, ..at })).copied();
        let mut errors = vec![vec![]; lines.len()];
        for error in &self.errors {
            errors[error.at.and_then(line_of).unwrap_or(0)].push(&error.violation);
        }
        let mut skipped = false;
        for (i, line) in lines.iter().enumerate() {
            let around = i.saturating_sub(AROUND)..(i + AROUND + 1).min(lines.len());
            if lines.len() > WHOLE && errors[around].iter().all(Vec::is_empty) {
                skipped = true;
                continue;
            }
            if std::mem::take(&mut skipped) {
                writeln!(f, "  ...")?;
            }
            writeln!(f, "{}", line.text)?;
            let indent = line.text.len() - line.text.trim_start().len();
            for violation in &errors[i] {
                writeln!(f, "{:indent$}^ rule {}: {violation}", "", violation.rule())?;
            }
        }
        if skipped {
            writeln!(f, "  ...")?;
        }
        let count = self.errors.len();
        write!(f, "{count} error{} in graph {:?}", if count == 1 { "" } else { "s" }, self.graph.name)
    }
}

/// Everything that is wrong with a graph.
fn violations(graph: &Graph) -> Vec<VerifyError> {
    let mut errors = vec![];
    let Syms { t, r } = graph.bounds;
    if t < 1 || r > t {
        errors.push(VerifyError { at: None, violation: Violation::Bounds(graph.bounds) });
    }
    let mut checker = Checker { graph, outer: None, order: graph.order(), errors };
    for (slot, &id) in graph.inputs().iter().enumerate() {
        if matches!(graph.op(id), Op::Input { role: Some(_), .. }) {
            checker.report(id, Violation::InputRole { slot });
        }
    }
    checker.check();
    checker.errors
}

/// Checks one graph or one body.
struct Checker<'g> {
    graph: &'g Graph,
    /// The fused node whose body this is.
    outer: Option<NodeId>,
    order: Vec<NodeId>,
    errors: Vec<VerifyError>,
}

impl Checker<'_> {
    fn report(&mut self, id: NodeId, violation: Violation) {
        let at = self.outer.map_or(At { node: id, inner: None }, |node| At { node, inner: Some(id) });
        self.errors.push(VerifyError { at: Some(at), violation });
    }

    fn check(&mut self) {
        self.acyclic();
        self.unique_names();
        for id in self.order.clone() {
            self.operands(id);
            self.attributes(id);
            self.sizes(id);
            match self.graph.op(id) {
                Op::Fused(fused) if self.outer.is_none() => self.body(id, fused),
                // A body has parameters and constants, and no other leaf.
                op if self.outer.is_some()
                    && (op.kernel().is_some()
                        || op.is_leaf() && !matches!(op, Op::Input { .. } | Op::Const { .. })) =>
                {
                    self.report(id, Violation::NotPrimitive { op: op.name() });
                }
                _ => {}
            }
            if let Some(role) = self.first_version(id) {
                self.state_type(id, role);
            }
        }
        if self.errors.is_empty() {
            self.effects();
        }
    }

    /// Rule 1: the order of printing puts operands first unless there is a cycle.
    fn acyclic(&mut self) {
        let mut done = HashSet::with_capacity(self.order.len());
        for id in self.order.clone() {
            if self.graph.operands(id).iter().any(|v| !done.contains(&v.node)) {
                self.report(id, Violation::Cycle);
            }
            done.insert(id);
        }
    }

    /// Rule 4.
    fn unique_names(&mut self) {
        let mut seen = HashSet::new();
        for id in self.order.clone() {
            let op = self.graph.op(id);
            let (name, rows) = match op {
                Op::Weight { name, rows } => (name, *rows),
                Op::Input { name, .. } | Op::State { name, .. } => (name, None),
                _ => continue,
            };
            if !seen.insert((op.name(), name, rows)) {
                self.report(id, Violation::DuplicateName { kind: op.name(), name: name.clone() });
            }
        }
    }

    /// Rules 2 and 3.
    fn operands(&mut self, id: NodeId) {
        let graph = self.graph;
        let node = graph.node(id);
        let mut types = vec![];
        for (expected, (slot, v)) in (0..).zip(graph.slots(id)) {
            let outs = &graph.node(v.node).outs;
            if slot != expected {
                return self.report(id, Violation::Slot { expected, slot });
            }
            match outs.get(v.out as usize) {
                Some(ty) => types.push(ty),
                None => {
                    return self
                        .report(id, Violation::NoSuchResult { slot, out: v.out, results: outs.len() });
                }
            }
        }
        match node.op.infer(&types, &node.outs) {
            Err(why) => self.report(id, Violation::Operands { why }),
            Ok(inferred) if inferred != node.outs => {
                let list =
                    |ts: &[TensorType]| ts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let (stored, inferred) = (list(&node.outs), list(&inferred));
                self.report(id, Violation::Types { stored, inferred });
            }
            Ok(_) => {}
        }
    }

    /// Rule 5.
    fn attributes(&mut self, id: NodeId) {
        let (attribute, value, fits) = match *self.graph.op(id) {
            Op::RmsNorm { eps } => ("eps", eps.to_string(), eps.is_finite() && eps >= 0.0),
            Op::Rope(rope) => ("base", rope.base.to_string(), rope.base.is_finite() && rope.base > 0.0),
            Op::Scores { scale } => ("scale", scale.to_string(), scale.is_finite()),
            Op::Const { value } => ("the constant", value.to_string(), value.is_finite()),
            Op::MatMul { round: Some(dtype) } => {
                ("round", dtype.to_string(), matches!(dtype, DType::F16 | DType::BF16))
            }
            Op::Input { .. }
            | Op::Weight { .. }
            | Op::State { .. }
            | Op::Reshape
            | Op::GetRows
            | Op::Dequant
            | Op::QuantAct
            | Op::MatMul { round: None }
            | Op::MatMulId
            | Op::Add
            | Op::Mul
            | Op::Silu
            | Op::KvAppend
            | Op::KvRead { .. }
            | Op::CausalMask { .. }
            | Op::Softmax
            | Op::WeightedSum
            | Op::GatedScan
            | Op::ArgMax
            | Op::Fused(_)
            | Op::Return => return,
        };
        if !fits {
            self.report(id, Violation::Attribute { attribute, value });
        }
    }

    /// Rules 6 and 8.
    fn sizes(&mut self, id: NodeId) {
        let graph = self.graph;
        let least = Syms { t: 1, r: 1 };
        for ty in &graph.node(id).outs {
            let size = ty.elements(&graph.bounds).max(ty.bytes(&graph.bounds));
            if ty.shape.len() > TensorType::MAX_RANK {
                self.report(id, Violation::Rank { ty: ty.clone() });
            }
            if ty.shape.iter().any(|d| d.eval(&least) == 0) {
                self.report(id, Violation::Empty { ty: ty.clone() });
            }
            if size >= SIZE_LIMIT {
                self.report(id, Violation::TooLarge { ty: ty.clone() });
            }
            if !ty.is_blocked() {
                self.report(id, Violation::Blocks { ty: ty.clone() });
            }
        }
    }

    /// Rule 13 but for returned views, and all rules within the body.
    fn body(&mut self, id: NodeId, fused: &Fused) {
        let (body, kernel) = (&fused.body, fused.kernel.name());
        if body.results().is_empty() {
            self.report(id, Violation::EmptyBody);
        }
        if body.name != kernel {
            self.report(id, Violation::BodyName { found: body.name.clone(), expected: kernel });
        }
        if body.bounds != self.graph.bounds {
            self.report(id, Violation::BodyBounds);
        }
        for (slot, (&input, v)) in body.inputs().iter().zip(self.graph.operands(id)).enumerate() {
            let has_result = (v.out as usize) < self.graph.node(v.node).outs.len();
            if has_result && body.state_role(input.into()) != self.graph.state_role(v) {
                self.report(id, Violation::InputRole { slot });
            }
        }
        let mut inner = Checker { graph: body, outer: Some(id), order: body.order(), errors: vec![] };
        inner.check();
        self.errors.append(&mut inner.errors);
    }

    /// The role of a state of which a node is the first version.
    fn first_version(&self, id: NodeId) -> Option<StateRole> {
        match self.graph.op(id) {
            Op::State { role, .. } if self.outer.is_none() => Some(*role),
            Op::Input { role, .. } if self.outer.is_some() => *role,
            _ => None,
        }
    }

    /// Rule 9.
    fn state_type(&mut self, id: NodeId, role: StateRole) {
        for ty in &self.graph.node(id).outs {
            let stored = match role {
                StateRole::Appended => matches!(ty.dtype, DType::F32 | DType::F16),
                StateRole::Replaced => ty.dtype == DType::F32,
            };
            if !stored || ty.shape.is_empty() || ty.shape.iter().any(|d| d.as_const().is_none()) {
                self.report(id, Violation::StateType { ty: ty.clone(), role });
            }
        }
    }

    /// Rules 10 to 13, for a graph in which all else is right.
    fn effects(&mut self) {
        let graph = self.graph;
        // Versions and views of states by value, with the state they belong to.
        let (mut versions, mut views) = (HashMap::<Value, NodeId>::new(), HashMap::<Value, NodeId>::new());
        let mut states = vec![];
        let mut writes: Vec<(Value, Write)> = vec![];
        let mut next = HashMap::<Value, Value>::new();
        for id in self.order.clone() {
            if self.first_version(id).is_some() {
                states.push(id);
                versions.insert(id.into(), id);
            }
            let operands = graph.operands(id);
            if graph.op(id).is_view()
                && let Some(&state) = operands.first().and_then(|v| versions.get(v).or_else(|| views.get(v)))
            {
                views.insert(id.into(), state);
            }
            let role_of = |v: &Value| versions.get(v).and_then(|state| self.first_version(*state));
            if let (Some(role), Some(first)) = (touches(graph.op(id)), operands.first())
                && role_of(first) != Some(role)
            {
                self.report(id, Violation::NotAState { slot: 0, role });
                continue;
            }
            for (slot, out) in graph.op(id).writes() {
                let Some(&old) = operands.get(slot as usize) else { continue };
                // Of a fused node, rule 13 holds each input to the state that it stands for.
                let Some(&state) = versions.get(&old) else { continue };
                let new = Value { node: id, out };
                if next.insert(old, new).is_some() {
                    self.report(id, Violation::WrittenTwice { state: self.name(state) });
                } else {
                    writes.push((old, Write { node: id, slot }));
                }
                versions.insert(new, state);
            }
        }
        // After a double write, "the last version" means nothing.
        if self.errors.is_empty() {
            self.reads_before_writes(&writes, &versions, &views);
            self.returned(&states, &versions, &views, &next);
        }
    }

    /// Rule 11.
    fn reads_before_writes(
        &mut self,
        writes: &[(Value, Write)],
        versions: &HashMap<Value, NodeId>,
        views: &HashMap<Value, NodeId>,
    ) {
        let graph = self.graph;
        let mut pairs = vec![];
        for &(version, write) in writes {
            let mut shown = vec![version];
            while let Some(v) = shown.pop() {
                for (user, slot) in graph.uses(v) {
                    let is_write = user == write.node && slot == write.slot && v == version;
                    // Rule 12 speaks of versions that are returned.
                    let is_returned = user == graph.ret() && v == version;
                    if is_write || is_returned {
                        continue;
                    }
                    pairs.push((user, write.node, versions[&version]));
                    if views.contains_key(&Value::from(user)) {
                        shown.push(user.into());
                    }
                }
            }
        }
        for (reader, state) in self.not_ancestors(&pairs) {
            self.report(reader, Violation::ReadAfterWrite { state: self.name(state) });
        }
    }

    /// The `(reader, state)` of those `(reader, writer, state)` in which the reader is no proper ancestor of
    /// the writer. One sweep over the graph serves 64 writers.
    fn not_ancestors(&self, pairs: &[(NodeId, NodeId, NodeId)]) -> Vec<(NodeId, NodeId)> {
        let position: HashMap<NodeId, usize> =
            self.order.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        let mut late = vec![];
        let mut rest = pairs;
        while !rest.is_empty() {
            let mut bits = HashMap::<NodeId, u32>::new();
            let mut reached = vec![0u64; self.order.len()];
            let mut taken = 0;
            for (_, writer, _) in rest {
                let bit = bits.len() as u32;
                if bit == u64::BITS && !bits.contains_key(writer) {
                    break;
                }
                let bit = *bits.entry(*writer).or_insert(bit);
                reached[position[writer]] |= 1 << bit;
                taken += 1;
            }
            for (i, &id) in self.order.iter().enumerate().rev() {
                if reached[i] != 0 {
                    for v in self.graph.operands(id) {
                        reached[position[&v.node]] |= reached[i];
                    }
                }
            }
            for &(reader, writer, state) in &rest[..taken] {
                if reader == writer || reached[position[&reader]] & (1 << bits[&writer]) == 0 {
                    late.push((reader, state));
                }
            }
            rest = &rest[taken..];
        }
        late
    }

    /// Rule 12, and what rule 13 says of views.
    fn returned(
        &mut self,
        states: &[NodeId],
        versions: &HashMap<Value, NodeId>,
        views: &HashMap<Value, NodeId>,
        next: &HashMap<Value, Value>,
    ) {
        let (graph, in_body) = (self.graph, self.outer.is_some());
        let ret = graph.ret();
        let mut returned = HashSet::new();
        for (slot, v) in graph.results().into_iter().enumerate() {
            let Some(&state) = versions.get(&v) else {
                if !returned.is_empty() {
                    self.report(ret, Violation::ResultAfterState { slot });
                }
                if let Some(&state) = views.get(&v)
                    && in_body
                {
                    self.report(ret, Violation::ReturnsView { slot, state: self.name(state) });
                }
                continue;
            };
            let first = !returned.contains(&state);
            returned.insert(state);
            if next.contains_key(&v) {
                self.report(ret, Violation::StaleVersion { state: self.name(state) });
            } else if !first {
                self.report(ret, Violation::ReturnedTwice { state: self.name(state) });
            } else if in_body && v == state.into() {
                self.report(ret, Violation::ReturnsView { slot, state: self.name(state) });
            }
        }
        for &state in states {
            let is_written = next.contains_key(&state.into());
            if !returned.contains(&state) && (is_written || !in_body) {
                self.report(ret, Violation::MissingState { state: self.name(state) });
            }
        }
    }

    /// What a state, or the input that stands for one, is called.
    fn name(&self, state: NodeId) -> String {
        match self.graph.op(state) {
            Op::State { name, .. } | Op::Input { name, .. } => name.clone(),
            other => other.name().into(),
        }
    }
}

/// The role of the state that a primitive reads or writes by its first operand.
fn touches(op: &Op) -> Option<StateRole> {
    match op {
        Op::KvAppend | Op::KvRead { .. } => Some(StateRole::Appended),
        Op::GatedScan => Some(StateRole::Replaced),
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
        | Op::GetRows
        | Op::Dequant
        | Op::QuantAct
        | Op::MatMul { .. }
        | Op::MatMulId
        | Op::Add
        | Op::Mul
        | Op::Silu
        | Op::RmsNorm { .. }
        | Op::Rope(_)
        | Op::Reshape
        | Op::Scores { .. }
        | Op::CausalMask { .. }
        | Op::Softmax
        | Op::WeightedSum
        | Op::ArgMax
        | Op::Fused(_)
        | Op::Return => None,
    }
}

/// Operand `slot` of `node` is overwritten.
#[derive(Clone, Copy)]
struct Write {
    node: NodeId,
    slot: u32,
}

#[cfg(test)]
mod tests;
