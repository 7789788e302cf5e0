//! dequant_matmul: a matmul reads its weight as it is stored. No float weights in memory.
//!
//! ```text
//! matmul %x, (dequant %w)                       =>  fused dequant_matmul(%x, %w)
//! matmul (dequant %q), (dequant %w)             =>  fused dequant_matmul(%q, %w)      %q: q8_act, q16_act
//! add (fused dequant_matmul ..), %bias          =>  taken in, [N] added to every row
//! add %residual, (fused dequant_matmul ..)      =>  taken in where the cost model prefers it to the next norm
//! ```
//!
//! The core and the bias are not gated by cost: the unfused form would hold a float copy of the weight.

use super::rule::{Cx, Fusion, Patch, Reject, loses, sole_use};
use super::{Pass, add_rmsnorm, cost};
use crate::ir::fused::{Computation, MatmulSpec};
use crate::ir::{DType, Graph, Kernel, NodeId, Op, TensorType, Value, Why};

pub const PASS: Pass = Pass {
    name: "dequant_matmul",
    summary: "dequant → matmul (+ bias, + residual)",
    rule: try_fuse,
    absorbs: &["dequant", "matmul", "add"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    match g.op(id) {
        Op::MatMul { .. } => core(g, id, cx),
        Op::Add => epilogue(g, id, cx),
        _ => Err(Reject::NoMatch),
    }
}

/// The matmul, the dequantisation of its weight and of its activations, and a bias.
fn core(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let (Some(x), Some(w)) = (g.operand(id, 0), g.operand(id, 1)) else { return Err(Reject::NoMatch) };
    let mut members = vec![id];
    let stored = match g.op(w.node) {
        Op::Weight { .. } => w,
        Op::Dequant => {
            members.push(w.node);
            g.operand(w.node, 0)
                .filter(|v| matches!(g.op(v.node), Op::Weight { .. }))
                .ok_or(Reject::NoMatch)?
        }
        _ => return Err(Reject::NoMatch),
    };
    let format = g.ty(stored).dtype;
    if !DType::WEIGHTS.contains(&format) {
        return Err(Reject::near(id, Why::Dtype { dtype: format.to_string() }));
    }
    if let (Op::Dequant, Some(q)) = (g.op(x.node), g.operand(x.node, 0)) {
        if !g.ty(q).dtype.is_activations() {
            return Err(Reject::near(id, Why::Dtype { dtype: g.ty(q).dtype.to_string() }));
        }
        // Integer dot products need integers on both sides; float weights take the activations as they come.
        if format.is_quantised() {
            members.push(x.node);
        }
    }
    let mut result = Value::from(id);
    if let Some((add, 0)) = sole_use(g, result)
        && matches!(g.op(add), Op::Add)
        && g.operand(add, 1).is_some_and(|b| is_vector(g.ty(b)))
    {
        members.push(add);
        result = add.into();
    }
    Fusion { graph: g, kernel: Kernel::DequantMatmul, members, results: vec![result] }.patch(id, cx)
}

fn is_vector(t: &TensorType) -> bool {
    t.shape.len() == 1
}

/// The residual add after a fused matmul. The alternative is that the next norm takes it.
fn epilogue(g: &Graph, add: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let is_core = |v: &Value| {
        let op = g.op(v.node);
        op.kernel() == Some(Kernel::DequantMatmul) && !has_residual(op)
    };
    // The second operand first: a block adds its output to the residual stream.
    let operands = g.operands(add);
    let matmul = operands.iter().rev().find(|v| is_core(v)).ok_or(Reject::NoMatch)?.node;
    if operands.iter().any(|v| is_vector(g.ty(*v))) {
        return Err(Reject::NoMatch);
    }
    if sole_use(g, matmul.into()).is_none() {
        return Err(Reject::near(add, Why::MultiUse { value: g.describe(matmul) }));
    }
    let fusion = Fusion {
        graph: g,
        kernel: Kernel::DequantMatmul,
        members: vec![matmul, add],
        results: vec![add.into()],
    };
    let patch = fusion.patch(add, cx)?.if_it_pays(add)?;
    let (Some(norm), Some((_, gain))) = (add_rmsnorm::norm_of_sum(g, add, cx), patch.fused) else {
        return Ok(patch);
    };
    // The two futures: (matmul + add), norm against matmul, (add + norm). What is told as gained is what the graph gains.
    let fused_us = gain.fused_us + add_rmsnorm::estimate(g, norm, false, cx)?.us;
    let unfused_us = cost::of_node(g, matmul, cx.target).us + add_rmsnorm::estimate(g, norm, true, cx)?.us;
    if !loses(fused_us, unfused_us) {
        return Ok(patch);
    }
    let why = Why::CostLoses { fused_us, unfused_us, launches_saved: gain.launches_saved };
    Err(Reject::near(add, why).of(&[matmul, add]))
}

/// Whether a fused matmul adds a residual already.
pub fn has_residual(op: &Op) -> bool {
    matmul(op).is_some_and(|m| m.parts.iter().any(|part| part.residual.is_some()))
}

/// What a fused matmul computes.
fn matmul(op: &Op) -> Option<MatmulSpec> {
    match op {
        Op::Fused(fused) => match fused.read() {
            Ok(Computation::Matmul(m)) => Some(m),
            _ => None,
        },
        _ => None,
    }
}

/// The activations that a matmul, fused or not, multiplies with its weight.
pub fn activations(g: &Graph, id: NodeId) -> Option<Value> {
    match g.op(id) {
        Op::MatMul { .. } => g.operand(id, 0),
        op if op.kernel() == Some(Kernel::DequantMatmul) => g.operand(id, matmul(op)?.x.into()),
        _ => None,
    }
}
