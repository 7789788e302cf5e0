//! cleanup: constant folding, common subexpressions, dead code, views.
//!
//! Each is one small rewrite around one node; the pass repeats until none applies.

use super::Pass;
use super::rule::{Cx, NewNode, Patch, Ref, Reject};
use crate::ir::{Graph, NodeId, Op, TensorType, Value};
use std::collections::BTreeSet;

pub const PASS: Pass = Pass {
    name: "cleanup",
    summary: "constant folding, common subexpressions, dead code, views",
    rule: try_rewrite,
    absorbs: &[],
    repeat: true,
};

fn try_rewrite(g: &Graph, id: NodeId, _: &Cx) -> Result<Patch, Reject> {
    dead(g, id)
        .or_else(|| view(g, id))
        .or_else(|| fold(g, id))
        .or_else(|| common(g, id))
        .ok_or(Reject::NoMatch)
}

/// A node that nothing uses goes, with all that only it used. Inputs stay: they are the graph's signature.
fn dead(g: &Graph, id: NodeId) -> Option<Patch> {
    let kept = |n: NodeId| matches!(g.op(n), Op::Return | Op::Input { .. });
    if kept(id) || g.use_count(id) > 0 {
        return None;
    }
    let mut drop = vec![id];
    let mut gone = BTreeSet::from([id]);
    let mut next = 0;
    while let Some(&n) = drop.get(next) {
        next += 1;
        for v in g.operands(n) {
            let outs = 0..g.node(v.node).outs.len() as u32;
            let mut users = outs.flat_map(|out| g.uses(Value { node: v.node, out }));
            if !kept(v.node) && users.all(|(user, _)| gone.contains(&user)) && gone.insert(v.node) {
                drop.push(v.node);
            }
        }
    }
    Some(Patch { drop, ..Patch::default() })
}

/// A reshape to the type it has already goes; a reshape of a reshape skips the first.
fn view(g: &Graph, id: NodeId) -> Option<Patch> {
    if !matches!(g.op(id), Op::Reshape) {
        return None;
    }
    let x = g.operand(id, 0)?;
    if g.ty(x) == g.ty(id.into()) {
        return Some(replace(id, x));
    }
    let inner = matches!(g.op(x.node), Op::Reshape).then(|| g.operand(x.node, 0)).flatten()?;
    Some(recompute(id, Op::Reshape, vec![inner], g.ty(id.into())))
}

/// `x + 0`, `x · 1`, and elementwise arithmetic on constants.
fn fold(g: &Graph, id: NodeId) -> Option<Patch> {
    let constant = |slot| match g.op(g.operand(id, slot)?.node) {
        Op::Const { value } => Some(*value),
        _ => None,
    };
    let value = match (g.op(id), constant(0), constant(1)) {
        (Op::Add, Some(a), Some(b)) => a + b,
        (Op::Mul, Some(a), Some(b)) => a * b,
        (Op::Silu, Some(a), _) => a / (1.0 + (-a).exp()),
        (Op::Reshape, Some(a), _) => a,
        // -0 is the neutral element of addition: 0 would turn -0 into 0.
        (Op::Add, _, Some(b)) if b.to_bits() == (-0.0f32).to_bits() => {
            return Some(replace(id, g.operand(id, 0)?));
        }
        (Op::Mul, _, Some(1.0)) => return Some(replace(id, g.operand(id, 0)?)),
        _ => return None,
    };
    value.is_finite().then(|| recompute(id, Op::Const { value }, vec![], g.ty(id.into())))
}

/// A node equal to an older user of the same operand is that node. Weights and states are equal by name.
fn common(g: &Graph, id: NodeId) -> Option<Patch> {
    let node = g.node(id);
    let alone = node.op.is_leaf() || !node.op.writes().is_empty();
    if alone || matches!(node.op, Op::Return | Op::Fused(_)) {
        return None;
    }
    let operands = g.operands(id);
    let twin = g
        .uses(*operands.first()?)
        .into_iter()
        .map(|(user, _)| user)
        .find(|&user| user < id && g.node(user) == node && g.operands(user) == operands)?;
    Some(replace(id, twin.into()))
}

fn replace(id: NodeId, by: Value) -> Patch {
    Patch { redirect: vec![(id.into(), Ref::Old(by))], drop: vec![id], ..Patch::default() }
}

fn recompute(id: NodeId, op: Op, operands: Vec<Value>, ty: &TensorType) -> Patch {
    Patch {
        add: vec![NewNode {
            op,
            operands: operands.into_iter().map(Ref::Old).collect(),
            types: vec![ty.clone()],
        }],
        redirect: vec![(id.into(), Ref::New { index: 0, out: 0 })],
        drop: vec![id],
        fused: None,
    }
}
