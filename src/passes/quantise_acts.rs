//! quantise_acts: inserts `quant_act` before matmuls with a quantised weight, or lets a matmul round its activations to 16 bits. Not a fusion: it
//! changes numbers.
//!
//! ```text
//! matmul %x, (dequant %w)  =>  matmul (dequant (quant_act %x)), (dequant %w)     %w: quantised
//! matmul %x, (dequant %w)  =>  matmul {round=f16} %x, (dequant %w)               %w: f16, or quantised; {round=bf16} of bf16
//! ```
//!
//! Of a GPU's steps of few tokens the first layers' activations are in q16_act instead, twice as many bytes
//! ([`Target::fine_layers`](crate::target::Target::fine_layers)): what is rounded there is in every layer after.
//!
//! The first fires where the target's 8-bit integer dot products are faster than its float arithmetic; where `sinter tune` measured, where
//! steps are no slower with it. (Rates that were fitted to a small model say more of its launches than of arithmetic.) The second fires
//! where there are more than a few tokens and the target has matrix units of such numbers, and again where steps are no slower with it; of quantised
//! weights where prompts are faster so ([`Target::prompt_activations`](crate::target::Target::prompt_activations)).

use super::Pass;
use super::rule::{Cx, NewNode, Patch, Ref, Reject};
use crate::ir::{DType, Graph, NodeId, Op, Value, Why, layers};
use crate::target::{FEW_TOKENS, TargetKind};

pub const PASS: Pass = Pass {
    name: "quantise_acts",
    summary: "activations to 8 bits, or 16 for matrix units and of first layers, in matmuls (changes numbers; off under --exact)",
    rule: try_rewrite,
    absorbs: &[],
    repeat: false,
};

fn try_rewrite(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let (&Op::MatMul { round: now }, Some(x), Some(w)) = (g.op(id), g.operand(id, 0), g.operand(id, 1))
    else {
        return Err(Reject::NoMatch);
    };
    let format = match g.op(w.node) {
        Op::Dequant => g.operand(w.node, 0).map(|w| g.ty(w).dtype),
        _ => None,
    };
    let format = format.ok_or(Reject::NoMatch)?;
    let rounded = || round(g, id, cx, format, [x, w]);
    if !format.is_quantised() {
        return rounded();
    }
    // There are no tiles that find the best of all rows.
    let is_head = || g.uses(id.into()).iter().any(|(user, _)| matches!(g.op(*user), Op::ArgMax));
    let is_prompt = g.ty(x).first().eval(&g.bounds) > FEW_TOKENS;
    let may_round = is_prompt && cx.target.prompt_activations == DType::F16 && !is_head();
    if matches!(g.op(x.node), Op::Dequant) || may_round && now.is_some() {
        return Err(Reject::NoMatch);
    }
    if may_round && let Ok(patch) = rounded() {
        return Ok(patch);
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
    let to = if !is_prompt && is_fine(g, w, cx) { DType::Q16Act } else { DType::Q8Act };
    if !ty.with_dtype(to).is_blocked() {
        return Err(Reject::near(
            id,
            Why::Shape { detail: format!("rows of {} are not whole blocks of 32", ty.last()) },
        ));
    }
    let y = g.ty(id.into()).clone();
    Ok(Patch {
        add: vec![
            NewNode { op: Op::QuantAct, operands: vec![Ref::Old(x)], types: vec![ty.with_dtype(to)] },
            NewNode { op: Op::Dequant, operands: vec![Ref::New { index: 0, out: 0 }], types: vec![] },
            NewNode {
                op: Op::MatMul { round: None },
                operands: vec![Ref::New { index: 1, out: 0 }, Ref::Old(w)],
                types: vec![y],
            },
        ],
        redirect: vec![(id.into(), Ref::New { index: 2, out: 0 })],
        drop: vec![id],
        fused: None,
    })
}

/// Whether the weight is of a layer whose activations are in two bytes each.
fn is_fine(g: &Graph, w: Value, cx: &Cx) -> bool {
    let layer = g.operand(w.node, 0).and_then(|w| layers::layer(&g.describe(w.node)));
    cx.target.kind != TargetKind::Cpu && layer.is_some_and(|layer| layer < cx.target.fine_layers)
}

/// The matmul, which may round.
fn round(g: &Graph, id: NodeId, cx: &Cx, format: DType, operands: [Value; 2]) -> Result<Patch, Reject> {
    let columns = g.ty(operands[0]).last().as_const().ok_or(Reject::NoMatch)?;
    let tokens = g.ty(operands[0]).first().eval(&g.bounds);
    let rounds = matches!(g.op(id), Op::MatMul { round: Some(_) });
    if rounds || tokens <= FEW_TOKENS || cx.target.kind == TargetKind::Cpu {
        return Err(Reject::NoMatch);
    }
    let lacks = || match cx.target.rounds_to(format, 0) {
        None => Why::TargetLacks { what: format!("matrix units of {format}") },
        Some(_) => {
            Why::Shape { detail: format!("rows of {columns} are not whole steps of tiles of {format}") }
        }
    };
    let to = cx.target.rounds_to(format, columns).ok_or_else(|| Reject::near(id, lacks()))?;
    Ok(Patch {
        add: vec![NewNode {
            op: Op::MatMul { round: Some(to) },
            operands: operands.map(Ref::Old).to_vec(),
            types: vec![g.ty(id.into()).clone()],
        }],
        redirect: vec![(id.into(), Ref::New { index: 0, out: 0 })],
        drop: vec![id],
        fused: None,
    })
}
