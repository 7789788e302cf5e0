//! attention: scores, mask, softmax and weighted sum in one kernel that never stores the scores.
//!
//! ```text
//! weighted_sum (softmax (causal_mask (scores %q, (kv_read %k)))), (kv_read %v)   =>  fused attention(%q, %k, %v, ..)
//! quant_act (reshape (weighted_sum ..))                                         =>  taken in
//! ```
//!
//! Caches in half precision are dequantised on the way.

use super::Pass;
use super::rule::{Cx, Fusion, Patch, Reject, sole_use};
use crate::ir::{Graph, Kernel, NodeId, Op, Value, Why};

pub const PASS: Pass = Pass {
    name: "attention",
    summary: "scores → mask → softmax → sum (→ quant_act)",
    rule: try_fuse,
    absorbs: &["kv_read", "dequant", "scores", "causal_mask", "softmax", "weighted_sum", "quant_act"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    if !matches!(g.op(id), Op::WeightedSum) {
        return Err(Reject::NoMatch);
    }
    let mut members = vec![id];
    let result = gather(g, id, cx, &mut members).map_err(|reject| reject.of(&members))?;
    Fusion { graph: g, kernel: Kernel::Attention, members, results: vec![result] }
        .patch(id, cx)?
        .if_it_pays(id)
}

/// Adds what leads to the sum `id`, and what follows it, to `members`, and tells what the result is.
fn gather(g: &Graph, id: NodeId, cx: &Cx, members: &mut Vec<NodeId>) -> Result<Value, Reject> {
    let mut pages = vec![];
    let mut v = Value::from(id);
    for (name, is_step) in [
        ("softmax", (|op| matches!(op, Op::Softmax)) as fn(&Op) -> bool),
        ("causal_mask", |op| matches!(op, Op::CausalMask { .. })),
        ("scores", |op| matches!(op, Op::Scores { .. })),
    ] {
        v = g.operand(v.node, 0).ok_or(Reject::NoMatch)?;
        if !is_step(g.op(v.node)) {
            let detail = format!("{name} expected, not {}", g.describe(v.node));
            return Err(Reject::near(id, Why::Shape { detail }));
        }
        if sole_use(g, v).is_none() {
            return Err(Reject::near(id, Why::MultiUse { value: g.describe(v.node) }));
        }
        members.push(v.node);
    }
    if g.operand(v.node, 2) != g.operand(id, 2) {
        let detail = "keys and values are of different sequences".into();
        return Err(Reject::near(id, Why::Shape { detail }));
    }
    for operand in [g.operand(v.node, 1), g.operand(id, 1)] {
        let filled = operand.ok_or(Reject::NoMatch)?;
        let rows = cache_rows(g, filled).ok_or_else(|| {
            let detail = format!("{} is not read from a cache", g.describe(filled.node));
            Reject::near(id, Why::Shape { detail })
        })?;
        pages.extend(rows.last().map(|&read| (g.op(read), g.operand(read, 1), g.operand(read, 2))));
        members.extend(rows);
    }
    if pages.first() != pages.last() {
        let detail = "keys and values lie in different pages".into();
        return Err(Reject::near(id, Why::Shape { detail }));
    }
    let mut result = Value::from(id);
    if let Some((reshape, _)) = sole_use(g, result)
        && matches!(g.op(reshape), Op::Reshape)
        && let Some((quant, _)) = sole_use(g, reshape.into())
        && matches!(g.op(quant), Op::QuantAct)
        && g.ty(result).last().as_const().is_some_and(|d| d % 32 == 0)
        && cx.may_take(g, Kernel::Attention, members, quant)
    {
        members.extend([reshape, quant]);
        result = quant.into();
    }
    Ok(result)
}

/// The nodes between a cache and its filled rows as f32.
fn cache_rows(g: &Graph, v: Value) -> Option<Vec<NodeId>> {
    match g.op(v.node) {
        Op::KvRead { .. } => Some(vec![v.node]),
        Op::Dequant => {
            let read = g.operand(v.node, 0)?.node;
            matches!(g.op(read), Op::KvRead { .. }).then(|| vec![v.node, read])
        }
        _ => None,
    }
}
