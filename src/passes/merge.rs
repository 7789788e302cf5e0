//! merge: matmuls of one input become one launch; each part keeps its own weight format.
//!
//! ```text
//! fused dequant_matmul(%x, %wq)
//! fused dequant_matmul(%x, %wk)    =>  fused merge(%x, %wq, %wk, %wv) -> q, k, v
//! fused dequant_matmul(%x, %wv)
//! ```
//!
//! Anchored at the first of them. Matmuls that add a residual stay alone: theirs is not ready as early.

use super::Pass;
use super::dequant_matmul::{activations, has_residual};
use super::rule::{Cx, Fusion, Patch, Reject};
use crate::ir::{Graph, Kernel, NodeId};

pub const PASS: Pass = Pass {
    name: "merge",
    summary: "q/k/v, gate/up: matmuls of one input",
    rule: try_fuse,
    absorbs: &[],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let mergeable = |n: NodeId| g.op(n).kernel() == Some(Kernel::DequantMatmul) && !has_residual(g.op(n));
    if !mergeable(id) {
        return Err(Reject::NoMatch);
    }
    let x = activations(g, id).ok_or(Reject::NoMatch)?;
    let mut parts: Vec<NodeId> = g.uses(x).into_iter().map(|(user, _)| user).collect();
    parts.dedup();
    parts.retain(|&n| mergeable(n) && activations(g, n) == Some(x));
    if parts.len() < 2 || parts[0] != id {
        return Err(Reject::NoMatch);
    }
    let results = parts.iter().map(|&n| n.into()).collect();
    Fusion { graph: g, kernel: Kernel::Merge, members: parts, results }.patch(id, cx)?.if_it_pays(id)
}
