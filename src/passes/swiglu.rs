//! swiglu: SiLU·mul and the quantisation of the product in one pass; then, where it pays, in the epilogue of the gate
//! and up matmuls.
//!
//! ```text
//! mul (silu %gate), %up                        =>  fused swiglu(%gate, %up)
//! quant_act (mul (silu ..), ..)                =>  taken in
//! fused swiglu (fused merge(%x, %wg, %wu))     =>  fused matmul_swiglu(%x, %wg, %wu)
//! ```

use super::Pass;
use super::dequant_matmul::{activations, has_residual};
use super::rule::{Cx, Fusion, Patch, Reject, sole_use};
use crate::ir::fused::{Computation, MatmulPart};
use crate::ir::{Graph, Kernel, NodeId, Op, Value, Why};
use crate::target::{FEW_TOKENS, Target, TargetKind};

pub const PASS: Pass = Pass {
    name: "swiglu",
    summary: "gate, up → SiLU·mul (→ quant_act)",
    rule: try_fuse,
    absorbs: &["silu", "mul", "quant_act"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    match g.op(id) {
        Op::Mul => elementwise(g, id, cx),
        op if op.kernel() == Some(Kernel::Swiglu) => epilogue(g, id, cx),
        _ => Err(Reject::NoMatch),
    }
}

fn elementwise(g: &Graph, mul: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let operands = g.operands(mul);
    let silu = operands.iter().find(|v| matches!(g.op(v.node), Op::Silu)).ok_or(Reject::NoMatch)?.node;
    if operands.iter().any(|v| g.ty(*v).shape.len() != 2) {
        return Err(Reject::near(
            mul,
            Why::Shape { detail: "gate and up must be matrices of one shape".into() },
        )
        .of(&[silu]));
    }
    if sole_use(g, silu.into()).is_none() {
        return Err(Reject::near(mul, Why::MultiUse { value: g.describe(silu) }).of(&[silu]));
    }
    let mut members = vec![silu, mul];
    let mut result = Value::from(mul);
    if let Some((quant, _)) = sole_use(g, result)
        && matches!(g.op(quant), Op::QuantAct)
        && cx.may_take(g, Kernel::Swiglu, &members, quant)
    {
        members.push(quant);
        result = quant.into();
    }
    Fusion { graph: g, kernel: Kernel::Swiglu, members, results: vec![result] }
        .patch(mul, cx)?
        .if_it_pays(mul)
}

fn epilogue(g: &Graph, swiglu: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let operands = g.operands(swiglu);
    let mut matmuls: Vec<NodeId> = operands.iter().map(|v| v.node).collect();
    matmuls.dedup();
    let whole = match matmuls[..] {
        [merged] => g.op(merged).kernel() == Some(Kernel::Merge) && g.node(merged).outs.len() == 2,
        [gate, up] => {
            [gate, up]
                .iter()
                .all(|&n| g.op(n).kernel() == Some(Kernel::DequantMatmul) && !has_residual(g.op(n)))
                && activations(g, gate) == activations(g, up)
        }
        _ => false,
    };
    if !whole {
        let detail =
            "gate and up are not two fused matmuls of one input, merged or apart, and nothing else".into();
        return Err(Reject::near(swiglu, Why::Shape { detail }));
    }
    for v in &operands {
        if sole_use(g, *v).is_none() {
            return Err(Reject::near(swiglu, Why::MultiUse { value: g.describe(v.node) }));
        }
    }
    let result = Value::from(swiglu);
    // The kernel quantises what one work item computes: 32 rows of gate and up.
    if g.ty(result).dtype.is_activations() && g.ty(result).last().as_const().is_none_or(|n| n % 32 != 0) {
        return Err(Reject::near(swiglu, Why::Shape { detail: "rows are not whole blocks of 32".into() }));
    }
    if let Some(what) = lacks_tiles(g, &matmuls, cx.target) {
        return Err(Reject::near(swiglu, Why::TargetLacks { what: what.into() }));
    }
    let mut members = matmuls;
    members.push(swiglu);
    Fusion { graph: g, kernel: Kernel::MatmulSwiglu, members, results: vec![result] }
        .patch(swiglu, cx)?
        .if_it_pays(swiglu)
}

/// What no tile of a GPU does of gates and ups: of many tokens they would go over the weights for each few of them.
fn lacks_tiles(g: &Graph, matmuls: &[NodeId], target: &Target) -> Option<&'static str> {
    let parts: Vec<_> = matmuls.iter().flat_map(|&n| parts(g, n)).collect();
    let tokens = g.ty(Value::from(*matmuls.first()?)).first().eval(&g.bounds);
    let (first, rest) = parts.split_first()?;
    match () {
        () if target.kind == TargetKind::Cpu || tokens <= FEW_TOKENS => None,
        () if rest.iter().any(|part| part.format != first.format) => {
            Some("tiles of gates and ups of two formats")
        }
        () if parts.iter().any(|part| part.bias.is_some()) => Some("tiles of gates and ups with biases"),
        () => None,
    }
}

/// The weights of a fused matmul.
fn parts(g: &Graph, id: NodeId) -> Vec<MatmulPart> {
    let types: Vec<_> = g.operands(id).iter().map(|v| g.ty(*v)).collect();
    match Computation::of(g.op(id), &types) {
        Ok(Computation::Matmul(m)) => m.parts,
        _ => vec![],
    }
}
