//! rope_kv: one launch per layer rotates queries and keys and appends keys and values to their caches.
//!
//! ```text
//! kv_append %k0, (rope (rms_norm? (reshape %k)), %positions), %rows
//! rope (rms_norm? (reshape %q)), %positions     =>  fused rope_kv(%q, %k, %v, %k0, %v0, %positions, %rows) -> q, k1, v1
//! kv_append %v0, (reshape %v), %rows
//! ```
//!
//! Anchored at the append of the keys. Queries and values belong to it if they are matmuls of the same input.

use super::Pass;
use super::dequant_matmul::activations;
use super::rule::{Cx, Fusion, Patch, Reject, sole_use};
use crate::ir::{Graph, Kernel, NodeId, Op, Value, Why};

pub const PASS: Pass = Pass {
    name: "rope_kv",
    summary: "(QK-norm →) RoPE → KV append, and V append",
    rule: try_fuse,
    absorbs: &["rms_norm", "rope", "kv_append"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    if !matches!(g.op(id), Op::KvAppend) {
        return Err(Reject::NoMatch);
    }
    let rows = g.operand(id, 1).ok_or(Reject::NoMatch)?;
    if !matches!(g.op(rows.node), Op::Rope(_)) {
        return Err(Reject::NoMatch);
    }
    if sole_use(g, rows).is_none() {
        return Err(Reject::near(id, Why::MultiUse { value: g.describe(rows.node) }));
    }
    let key = Head::upwards(g, rows);
    let mut members = vec![id];
    members.extend(&key.nodes);
    let mut results = vec![];
    let mut value = None;
    for branch in siblings(g, key.root) {
        match g.op(branch.node) {
            Op::Rope(_) if results.is_empty() && is_query(g, branch, rows) => {
                members.extend(Head::upwards(g, branch).nodes);
                results.push(branch);
            }
            Op::KvAppend if value.is_none() && branch.node != id && same_heads(g, branch.node, id) => {
                let x = g.operand(branch.node, 1).ok_or(Reject::NoMatch)?;
                members.push(branch.node);
                members.extend(Head::upwards(g, x).nodes);
                value = Some(branch);
            }
            _ => {}
        }
    }
    results.push(id.into());
    results.extend(value);
    Fusion { graph: g, kernel: Kernel::RopeKv, members, results }.patch(id, cx)?.if_it_pays(id)
}

/// The chain from a projection to its heads.
struct Head {
    /// What the projection yields.
    root: Value,
    nodes: Vec<NodeId>,
}

impl Head {
    /// Walks from `v` up through RoPE, QK-norm and the split into heads.
    fn upwards(g: &Graph, mut v: Value) -> Head {
        let mut nodes = vec![];
        while let Op::Rope(_) | Op::RmsNorm { .. } | Op::Reshape = g.op(v.node)
            && let Some(x) = g.operand(v.node, 0)
        {
            nodes.push(v.node);
            v = x;
        }
        Head { root: v, nodes }
    }
}

/// Where the projections of the same input end: at a rope that no append follows, or at an append.
fn siblings(g: &Graph, root: Value) -> Vec<Value> {
    let Some(x) = activations(g, root.node) else { return vec![] };
    let mut ends = vec![];
    for (user, _) in g.uses(x) {
        if activations(g, user) != Some(x) {
            continue;
        }
        let mut v = Value::from(user);
        let mut end: Option<Value> = None;
        while let Some((next, slot)) = sole_use(g, v) {
            match (g.op(next), slot) {
                (Op::Reshape | Op::RmsNorm { .. }, 0) => {}
                (Op::Rope(_), 0) => end = Some(next.into()),
                (Op::KvAppend, 1) => {
                    end = Some(next.into());
                    break;
                }
                _ => break,
            }
            v = next.into();
        }
        ends.extend(end);
    }
    ends
}

/// Whether `q` is turned as `k` is, by the same positions and factors.
fn is_query(g: &Graph, q: Value, k: Value) -> bool {
    let same_turn = g.op(q.node) == g.op(k.node) && g.operands(q.node)[1..] == g.operands(k.node)[1..];
    same_turn && g.ty(q).last() == g.ty(k).last()
}

/// Whether two appends go to the same rows, of caches with heads of one number and size. Their element types may differ.
fn same_heads(g: &Graph, a: NodeId, b: NodeId) -> bool {
    g.ty(a.into()).shape == g.ty(b.into()).shape && g.operand(a, 2) == g.operand(b, 2)
}
