//! quantise_acts: inserts `quant_act` before each matmul with a quantised weight, and lets one with a weight in 16 bits round its
//! activations to those. Not a fusion: it changes numbers.
//!
//! ```text
//! matmul %x, (dequant %w)  =>  matmul (dequant (quant_act %x)), (dequant %w)     %w: quantised
//! matmul %x, (dequant %w)  =>  matmul {round=weight} %x, (dequant %w)            %w: f16, bf16
//! ```
//!
//! The first fires where the target's 8-bit integer dot products are faster than its float arithmetic; where `sinter tune` measured, where
//! steps are no slower with it. (Rates that were fitted to a small model say more of its launches than of arithmetic.) The second fires
//! where there are more than a few tokens and the target has matrix units of such numbers, and again where steps are no slower with it.

use super::Pass;
use super::rule::{Cx, NewNode, Patch, Ref, Reject};
use crate::ir::{DType, Graph, NodeId, Op, Value, Why};
use crate::target::FEW_TOKENS;

pub const PASS: Pass = Pass {
    name: "quantise_acts",
    summary: "activations to 8 bits, or to the 16 of their weight, in matmuls (changes numbers; off under --exact)",
    rule: try_rewrite,
    absorbs: &[],
    repeat: false,
};

fn try_rewrite(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let (Op::MatMul { .. }, Some(x), Some(w)) = (g.op(id), g.operand(id, 0), g.operand(id, 1)) else {
        return Err(Reject::NoMatch);
    };
    let format = match g.op(w.node) {
        Op::Dequant => g.operand(w.node, 0).map(|w| g.ty(w).dtype),
        _ => None,
    };
    let format = format.ok_or(Reject::NoMatch)?;
    if !format.is_quantised() {
        return round(g, id, cx, format, [x, w]);
    }
    if matches!(g.op(x.node), Op::Dequant) {
        return Err(Reject::NoMatch);
    }
    let Some(rate) = cx.target.dot4_gops else {
        return Err(Reject::near(id, Why::TargetLacks { what: "8-bit integer dot products".into() }));
    };
    if cx.target.measured.is_none() && rate <= cx.target.f32_gflops {
        return Err(Reject::near(
            id,
            Why::TargetLacks { what: "integer dot products faster than float".into() },
        ));
    }
    let ty = g.ty(x);
    if !ty.with_dtype(DType::Q8Act).is_blocked() {
        return Err(Reject::near(
            id,
            Why::Shape { detail: format!("rows of {} are not whole blocks of 32", ty.last()) },
        ));
    }
    let y = g.ty(id.into()).clone();
    Ok(Patch {
        add: vec![
            NewNode { op: Op::QuantAct, operands: vec![Ref::Old(x)], types: vec![] },
            NewNode { op: Op::Dequant, operands: vec![Ref::New { index: 0, out: 0 }], types: vec![] },
            NewNode {
                op: Op::MatMul { may_round: false },
                operands: vec![Ref::New { index: 1, out: 0 }, Ref::Old(w)],
                types: vec![y],
            },
        ],
        redirect: vec![(id.into(), Ref::New { index: 2, out: 0 })],
        drop: vec![id],
        fused: None,
    })
}

/// The matmul of a weight in 16 bits, which may round.
fn round(g: &Graph, id: NodeId, cx: &Cx, format: DType, operands: [Value; 2]) -> Result<Patch, Reject> {
    let &Op::MatMul { may_round: false } = g.op(id) else { return Err(Reject::NoMatch) };
    let Some(columns) = g.ty(operands[0]).last().as_const() else { return Err(Reject::NoMatch) };
    let tokens = g.ty(operands[0]).first().eval(&g.bounds);
    if tokens <= FEW_TOKENS || !cx.target.tiles_halves(format, columns) {
        return Err(Reject::NoMatch);
    }
    Ok(Patch {
        add: vec![NewNode {
            op: Op::MatMul { may_round: true },
            operands: operands.map(Ref::Old).to_vec(),
            types: vec![g.ty(id.into()).clone()],
        }],
        redirect: vec![(id.into(), Ref::New { index: 0, out: 0 })],
        drop: vec![id],
        fused: None,
    })
}
