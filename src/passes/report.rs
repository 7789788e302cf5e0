//! What is told of a graph beside the decisions: what it costs, and the kernels that it ends in.

use super::cost::{self, Cost};
use crate::ir::{
    Decision, FinalKernel, Form, Graph, NodeId, Op, Origin, Outcome, Primitive, Report, Totals, Value,
};
use crate::target::Target;
use indexmap::IndexMap;
use std::collections::HashMap;

/// Sums up a graph.
pub fn totals(g: &Graph, target: &Target) -> Totals {
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

/// The name under which a node's launches are counted: that of [`crate::codegen::spec::KernelSpec::name`].
pub fn label(op: &Op) -> &'static str {
    match op {
        Op::Fused(f) => f.kernel.name(),
        op => op.name(),
    }
}

/// Fills in the kernels that the passes ended in.
pub fn finish(report: &mut Report, g: &Graph, target: &Target) {
    let mut forms: HashMap<String, u32> = HashMap::new();
    let inserted = inserted(&report.decisions);
    for id in g.order() {
        let cost = cost::of_node(g, id, target);
        if cost.launches == 0 {
            continue;
        }
        let (form, origin) = match g.op(id) {
            Op::Fused(fused) => {
                let next = forms.len() as u32;
                let index = *forms.entry(fused.body.to_string()).or_insert_with(|| {
                    report.forms.push(form(&fused.body));
                    next
                });
                (Some(index), Origin::Fused)
            }
            op => match inserted.get(&(g.number(id), op.name())) {
                Some(pass) => (None, Origin::Inserted { pass: pass.clone() }),
                None => (None, Origin::Lowered),
            },
        };
        report.kernels.push(FinalKernel {
            number: g.number(id),
            kernel: label(g.op(id)).into(),
            at: g.describe(id),
            reads: reads(g, id),
            origin,
            form,
            launches: cost.launches,
            bytes: cost.bytes,
            operations: cost.operations,
            us: cost.us,
            limit: cost.limit(),
        });
    }
}

/// What passes put in that was not there, by the number of the node and its operation: the pass.
fn inserted(decisions: &[Decision]) -> HashMap<(u64, &str), String> {
    let mut inserted = HashMap::new();
    for d in decisions {
        if let Outcome::Rewritten { replaced, added } = &d.outcome {
            let new = d.makes.iter().zip(added).filter(|(_, op)| !replaced.contains(op));
            inserted.extend(new.map(|(number, op)| ((*number, op.as_str()), d.pass.clone())));
        }
    }
    inserted
}

/// The weights and states that a node reads, directly or through what costs nothing, each once.
pub fn reads(g: &Graph, id: NodeId) -> Vec<String> {
    let mut names: Vec<String> = vec![];
    for v in g.operands(id) {
        if let Some(name) = stored(g, v)
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    names
}

/// The name of the weight or state that a value is, or is a later version or another view of.
fn stored(g: &Graph, mut v: Value) -> Option<String> {
    // A cycle, which the verifier refuses, would go on for ever.
    for _ in 0..g.len() {
        v = match g.op(v.node) {
            Op::Weight { name, .. } | Op::State { name, .. } => return Some(name.clone()),
            Op::Dequant | Op::Reshape => g.operand(v.node, 0)?,
            _ => g.previous_version(v)?,
        };
    }
    None
}

/// What a fused body stands for.
fn form(body: &Graph) -> Form {
    let operands = body.inputs().iter().map(|&i| body.ty(i.into()).to_string()).collect();
    let nodes = body.order().into_iter().filter(|&n| !matches!(body.op(n), Op::Input { .. } | Op::Return));
    let results = body.results();
    let primitive = |(id, text): (NodeId, String)| Primitive {
        op: body.op(id).name().into(),
        text,
        bytes: body.node(id).outs.iter().map(|ty| ty.bytes(&body.bounds)).fold(0, u64::saturating_add),
        returned: results.iter().any(|v| v.node == id),
        view: body.op(id).is_view(),
    };
    Form { operands, primitives: nodes.zip(body.statements()).map(primitive).collect() }
}
