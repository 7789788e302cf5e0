//! What there is to draw of a graph or a program.

use super::limit::{Limit, Limits};
use crate::codegen::spec::{Access, Place, Program};
use crate::ir::layers::{self, Group, Item, layer, rename};
use crate::ir::text::attributes;
use crate::ir::{Fused, Graph, Kernel, NodeId, Op, Syms, TensorType, Value};
use crate::passes::cost::{self, Cost};
use crate::plan::{BufRef, Plan, PlannedProgram};
use crate::target::Target;
use std::collections::HashMap;

/// Nodes, and the groups of layers that they are in.
#[derive(Clone, Debug)]
pub struct Diagram {
    pub name: String,
    pub bounds: Syms,
    /// Operands first.
    pub nodes: Vec<Node>,
    /// Head, layers, tail. Their items are indices into `nodes`.
    pub groups: Vec<Group>,
}

/// A node of a graph that is no leaf, or a call.
#[derive(Clone, Debug)]
pub struct Node {
    /// In the graph; none for a call.
    pub id: Option<NodeId>,
    /// The kernel, or the operation with its attributes.
    pub name: String,
    pub fused: bool,
    /// Weights, states, constants and inputs that it reads.
    pub reads: Vec<Read>,
    /// The primitives that a kernel stands for: how often each.
    pub replaces: Vec<(String, usize)>,
    pub operands: Vec<Operand>,
    pub results: Vec<TensorType>,
    pub cost: Cost,
    pub limit: Option<Limit>,
    /// More to say about it.
    pub notes: Vec<String>,
}

/// A leaf, as the node shows it that reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    pub name: String,
    pub ty: TensorType,
    /// Whether it is an input of the step or a constant, not a tensor of the model or a state.
    pub is_input: bool,
}

/// A value that a node takes from another.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    pub from: usize,
    pub out: u32,
    pub ty: TensorType,
    /// Whether it is a version of a state, of which rows alone are written and read.
    pub is_state: bool,
}

impl Diagram {
    /// A graph, with what its nodes cost on a target. Layers that do the same are folded unless all are to be shown.
    pub fn of_graph(g: &Graph, target: &Target, unfold: bool) -> Diagram {
        let (ids, items) = layers::items(g);
        let limits = Limits::of(target);
        let place: HashMap<NodeId, usize> = ids.iter().enumerate().map(|(at, id)| (*id, at)).collect();
        let node = |id: &NodeId| {
            let operands = g.operands(*id);
            let op = g.op(*id);
            let name = match op {
                Op::Fused(fused) => fused.kernel.name().to_string(),
                op => format!("{}{}", op.name(), attributes(op)),
            };
            let from = |v: &Value| {
                Some(Operand {
                    from: *place.get(&v.node)?,
                    out: v.out,
                    ty: g.ty(*v).clone(),
                    is_state: g.state_role(*v).is_some(),
                })
            };
            Node {
                id: Some(*id),
                name,
                fused: op.kernel().is_some(),
                reads: operands.iter().filter_map(|v| read(g, *v)).collect(),
                replaces: if let Op::Fused(fused) = op { replaces(fused) } else { vec![] },
                operands: operands.iter().filter_map(from).collect(),
                results: g.node(*id).outs.clone(),
                cost: cost::of_node(g, *id, target),
                limit: limits.of_node(g, *id),
                notes: vec![],
            }
        };
        let nodes = ids.iter().map(node).collect();
        Diagram { name: g.name.clone(), bounds: g.bounds, nodes, groups: layers::fold(&items, unfold) }
    }

    /// The calls of a program.
    pub fn of_program(program: &Program, unfold: bool) -> Diagram {
        let mut calls = Calls::default();
        for call in &program.calls {
            let Some(kernel) = program.kernels.get(call.kernel as usize) else { continue };
            let args = kernel.args().zip(&call.args).map(|(arg, buffer)| {
                let name = match program.buffers.get(*buffer as usize).map(|b| &b.place) {
                    Some(Place::Weight { name, .. } | Place::State { name, .. }) => Some(name.as_str()),
                    _ => None,
                };
                (arg.access, *buffer, arg.ty.clone(), name)
            });
            calls.push(kernel.spec.name(), &call.label, kernel.spec.kernel.is_some(), vec![], args);
        }
        calls.diagram(&program.name, program.bounds, unfold)
    }

    /// The calls of a planned program, with their streams where there are several.
    pub fn of_plan(plan: &Plan, program: &PlannedProgram, unfold: bool) -> Diagram {
        let mut calls = Calls::default();
        for (i, call) in program.calls.iter().enumerate() {
            let Some(kernel) = plan.kernels.get(call.kernel as usize) else { continue };
            let args = kernel.args().zip(&call.args).map(|(arg, buffer)| {
                let name = match *buffer {
                    BufRef::Arena(_) => None,
                    BufRef::State(s) => plan.states.get(s as usize).map(|state| state.name.as_str()),
                    BufRef::Weight(w) => plan.weights.get(w as usize).map(|weight| weight.name.as_str()),
                };
                (arg.access, *buffer, arg.ty.clone(), name)
            });
            // Of folded layers each call has a number and places of its own.
            let mut notes = vec![format!("k{}", call.kernel)];
            if unfold {
                notes[0] += &format!(", call {i}");
                let writes = kernel.args().zip(&call.args).filter(|(arg, _)| arg.access == Access::Write);
                notes.extend(writes.filter_map(|(_, buffer)| match *buffer {
                    BufRef::Arena(b) => {
                        Some(format!("writes b{b} @{}", program.buffers.get(b as usize)?.offset))
                    }
                    BufRef::State(_) | BufRef::Weight(_) => None,
                }));
            }
            if plan.target.streams > 1 {
                notes.push(format!("stream {}", call.slot.stream));
            }
            calls.push(kernel.spec.name(), &call.label, kernel.spec.kernel.is_some(), notes, args);
        }
        calls.diagram(&program.name, program.bounds, unfold)
    }

    /// The estimated time of all nodes of a group in microseconds, all its layers together.
    pub fn us_of(&self, group: &Group) -> f64 {
        group.items.iter().flatten().map(|item| self.nodes[*item].cost.us).sum()
    }
}

/// The CSS class of a node: each kernel has a colour, primitives have none.
pub(super) fn class_of(kernel: Option<Kernel>) -> String {
    kernel.map_or("plain".into(), |kernel| format!("fused k{}", kernel as usize))
}

fn read(g: &Graph, v: Value) -> Option<Read> {
    let (name, is_input) = match g.op(v.node) {
        Op::Weight { name, rows: Some(rows) } => (format!("{name}[{}..]", rows.first), false),
        Op::Weight { name, rows: None } | Op::State { name, .. } => (name.clone(), false),
        Op::Const { value } => (value.to_string(), true),
        Op::Input { name, .. } => (format!("%{name}"), true),
        _ => return None,
    };
    Some(Read { name, ty: g.ty(v).clone(), is_input })
}

/// The primitives of a body: how often each, in the order in which they are met.
fn replaces(fused: &Fused) -> Vec<(String, usize)> {
    let mut counts: Vec<(String, usize)> = vec![];
    let body = &fused.body;
    for id in body.order().into_iter().filter(|id| !layers::is_detail(body.op(*id))) {
        let name = body.op(id).name();
        match counts.iter_mut().find(|(known, _)| known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name.into(), 1)),
        }
    }
    counts
}

/// Calls that are being put together: who wrote each buffer last is the operand of who reads it.
struct Calls<B> {
    nodes: Vec<Node>,
    items: Vec<Item>,
    writers: HashMap<B, usize>,
}

impl<B> Default for Calls<B> {
    fn default() -> Calls<B> {
        Calls { nodes: vec![], items: vec![], writers: HashMap::new() }
    }
}

impl<B: Copy + Eq + std::hash::Hash> Calls<B> {
    fn push<'a>(
        &mut self,
        kernel: &str,
        label: &str,
        fused: bool,
        notes: Vec<String>,
        args: impl Iterator<Item = (Access, B, TensorType, Option<&'a str>)>,
    ) {
        let at = self.nodes.len();
        let (mut reads, mut operands, mut results, mut written, mut named) =
            (vec![], vec![], vec![], vec![], None);
        let mut key = kernel.to_string();
        for (access, buffer, ty, name) in args {
            key += &format!(" {ty} {}", name.map_or(String::new(), |name| rename(name, |_| "*".into())));
            named = named.max(name.and_then(layer));
            if matches!(access, Access::Read | Access::Update)
                && let Some(&from) = self.writers.get(&buffer)
            {
                operands.push(Operand { from, out: 0, ty: ty.clone(), is_state: name.is_some() });
            } else if let Some(name) = name {
                reads.push(Read { name: name.into(), ty: ty.clone(), is_input: false });
            }
            if matches!(access, Access::Write | Access::Update) {
                written.push(buffer);
                results.push(ty);
            }
        }
        self.writers.extend(written.into_iter().map(|buffer| (buffer, at)));
        self.items.push(Item {
            named,
            reads_leaf: !reads.is_empty(),
            key,
            operands: operands.iter().map(|o| (o.from, o.out)).collect(),
        });
        let mut lines = vec![];
        if label != kernel {
            lines.push(label.strip_prefix(kernel).unwrap_or(label).trim_start().to_string());
        }
        lines.extend(notes);
        self.nodes.push(Node {
            id: None,
            name: kernel.into(),
            fused,
            reads,
            replaces: vec![],
            operands,
            results,
            cost: Cost::default(),
            limit: None,
            notes: lines,
        });
    }

    fn diagram(self, name: &str, bounds: Syms, unfold: bool) -> Diagram {
        Diagram { name: name.into(), bounds, nodes: self.nodes, groups: layers::fold(&self.items, unfold) }
    }
}
