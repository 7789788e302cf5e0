//! gated_scan: the gate of a linear recurrence is applied where its input is read.
//!
//! ```text
//! gated_scan %h0, %decay, (mul (silu %gate), %x), ..   =>  fused gated_scan(%h0, %decay, %gate, %x, ..) -> y, h1
//! ```

use super::Pass;
use super::rule::{Cx, Fusion, Patch, Reject, sole_use};
use crate::ir::{Graph, Kernel, NodeId, Op, Value, Why};

pub const PASS: Pass = Pass {
    name: "gated_scan",
    summary: "SiLU·mul → gated linear recurrence",
    rule: try_fuse,
    absorbs: &["gated_scan"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    if !matches!(g.op(id), Op::GatedScan) {
        return Err(Reject::NoMatch);
    }
    let x = g.operand(id, 2).ok_or(Reject::NoMatch)?;
    if !matches!(g.op(x.node), Op::Mul) {
        return Err(Reject::NoMatch);
    }
    let operands = g.operands(x.node);
    let silu = operands.iter().find(|v| matches!(g.op(v.node), Op::Silu)).ok_or(Reject::NoMatch)?.node;
    if operands.iter().any(|v| g.ty(*v) != g.ty(x)) {
        let detail = "gate and input must be matrices of one shape".into();
        return Err(Reject::near(id, Why::Shape { detail }).of(&[silu, x.node]));
    }
    for v in [x, silu.into()] {
        if sole_use(g, v).is_none() {
            return Err(Reject::near(id, Why::MultiUse { value: g.describe(v.node) }).of(&[silu, x.node]));
        }
    }
    let results = vec![Value::from(id), Value { node: id, out: 1 }];
    Fusion { graph: g, kernel: Kernel::GatedScan, members: vec![silu, x.node, id], results }
        .patch(id, cx)?
        .if_it_pays(id)
}
