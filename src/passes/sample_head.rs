//! sample_head: the head's matmul and the choice of the best token in one kernel; the logits are never stored.
//!
//! ```text
//! argmax (fused dequant_matmul(%x, %head))   =>  fused sample_head(%x, %head)
//! ```
//!
//! Greedy decoding only: whoever returns the logits needs them ([`Why::NeedsLogits`]).

use super::Pass;
use super::dequant_matmul::has_residual;
use super::rule::{Cx, Fusion, Patch, Reject};
use crate::ir::{Graph, Kernel, NodeId, Op, Value, Why};

pub const PASS: Pass = Pass {
    name: "sample_head",
    summary: "last matmul → argmax (greedy only)",
    rule: try_fuse,
    absorbs: &["argmax"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    if g.op(id).kernel() != Some(Kernel::DequantMatmul) || has_residual(g.op(id)) {
        return Err(Reject::NoMatch);
    }
    let uses = g.uses(Value::from(id));
    if uses.iter().any(|(user, _)| *user == g.ret()) {
        let others: Vec<NodeId> =
            uses.iter().map(|(user, _)| *user).filter(|user| *user != g.ret()).collect();
        return Err(Reject::near(id, Why::NeedsLogits).of(&others));
    }
    let argmax = match uses[..] {
        [(user, _)] if matches!(g.op(user), Op::ArgMax) => user,
        _ => return Err(Reject::NoMatch),
    };
    Fusion { graph: g, kernel: Kernel::SampleHead, members: vec![id, argmax], results: vec![argmax.into()] }
        .patch(id, cx)?
        .if_it_pays(id)
}
