//! dequant_rmsnorm: embedding rows are fetched, dequantised and normed in one pass over the row.
//!
//! ```text
//! rms_norm (dequant (get_rows %table, %ids)), %w   =>  fused dequant_rmsnorm(%table, %ids, %w) -> rows, norm
//! rms_norm (get_rows %x, %wanted), %w              =>  fused dequant_rmsnorm(%x, %wanted, %w) -> rows, norm
//! rms_norm %x, (dequant %w)                        =>  fused dequant_rmsnorm(%x, %w) -> norm
//! quant_act (rms_norm ..)                          =>  taken in
//! ```

use super::Pass;
use super::add_rmsnorm::NormGroup;
use super::rule::{Cx, Fusion, Patch, Reject};
use crate::ir::{DType, Graph, Kernel, NodeId, Op, Value, Why};

pub const PASS: Pass = Pass {
    name: "dequant_rmsnorm",
    summary: "dequantised embedding rows (or a quantised norm weight) → RMSNorm (→ quant_act)",
    rule: try_fuse,
    absorbs: &["get_rows", "dequant"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let group = NormGroup::of(g, id, Kernel::DequantRmsnorm, cx).ok_or(Reject::NoMatch)?;
    let rows = group.source(g).ok_or(Reject::NoMatch)?;
    let source = embedding(g, rows);
    if source.is_empty() && !group.dequantises_weight() {
        return Err(Reject::NoMatch);
    }
    if let Some(&fetch) = source.last()
        && !DType::WEIGHTS.contains(&g.ty(fetch.into()).dtype)
    {
        return Err(Reject::near(id, Why::Dtype { dtype: g.ty(fetch.into()).dtype.to_string() }));
    }
    // A residual add is the next pass's business, with the norm's weight.
    if source.is_empty() && matches!(g.op(rows.node), Op::Add) {
        return Err(Reject::NoMatch);
    }
    group.fits(g, !source.is_empty(), cx)?;
    let (members, results) = group.with_rows(g, source.clone(), (!source.is_empty()).then_some(rows));
    Fusion { graph: g, kernel: Kernel::DequantRmsnorm, members, results }.patch(id, cx)?.if_it_pays(id)
}

/// The nodes that fetch `rows` from a table: dequant (unless the table is f32), then get_rows. Empty if it is no fetch.
fn embedding(g: &Graph, rows: Value) -> Vec<NodeId> {
    match g.op(rows.node) {
        Op::GetRows => vec![rows.node],
        Op::Dequant => match g.operand(rows.node, 0) {
            Some(q) if matches!(g.op(q.node), Op::GetRows) => vec![rows.node, q.node],
            _ => vec![],
        },
        _ => vec![],
    }
}

/// Whether a node is the dequantisation of a stored norm weight.
pub fn is_dequantised_norm_weight(g: &Graph, id: NodeId) -> bool {
    let is_weight =
        |w: Value| matches!(g.op(w.node), Op::Weight { .. }) && DType::WEIGHTS.contains(&g.ty(w).dtype);
    matches!(g.op(id), Op::Dequant) && g.operand(id, 0).is_some_and(is_weight)
}
