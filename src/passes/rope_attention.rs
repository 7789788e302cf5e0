//! rope_attention: attention of a few tokens turns its queries, and the keys that it appends, itself.
//!
//! ```text
//! fused attention((fused rope_kv(%q, %k, %v, %k0, %v0, ..)), ..)   =>  fused rope_attention(%q, %k, %v, %k0, %v0, ..) -> y, k1, v1
//! ```
//!
//! On GPUs, for so few tokens that what each block turns again of the step is little.

use super::Pass;
use super::rule::{Cx, Fusion, Patch, Reject};
use crate::ir::fused::Computation;
use crate::ir::{DType, Graph, Kernel, NodeId, Op, TensorType, Value, Why};
use crate::target::{TURNED_TOKENS, TargetKind, heads_at_once};

pub const PASS: Pass = Pass {
    name: "rope_attention",
    summary: "(QK-norm →) RoPE → KV append → attention, of a few tokens on a GPU",
    rule: try_fuse,
    absorbs: &[],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    if g.op(id).kernel() != Some(Kernel::Attention) {
        return Err(Reject::NoMatch);
    }
    if cx.target.kind == TargetKind::Cpu {
        let what = "a kernel for it, as GPUs have".into();
        return Err(Reject::near(id, Why::TargetLacks { what }));
    }
    let operands = g.operands(id);
    let types: Vec<&TensorType> = operands.iter().map(|v| g.ty(*v)).collect();
    let Ok(Computation::Attention(m)) = Computation::of(g.op(id), &types) else {
        return Err(Reject::NoMatch);
    };
    let [q, k, v] = [m.q, m.k, m.v].map(|arg| operands[usize::from(arg)]);
    let shape = |detail: String| Reject::near(id, Why::Shape { detail });
    let is_turned = |v: &Value| g.op(v.node).kernel() == Some(Kernel::RopeKv);
    if ![q, k, v].iter().all(|v| is_turned(v) && v.node == q.node) {
        return Err(shape("queries, keys and values are not of one rope_kv".into()));
    }
    let tokens = g.ty(q).first().eval(&g.bounds);
    if tokens > TURNED_TOKENS {
        return Err(shape(format!("blocks of {tokens} tokens would each turn the keys of all")));
    }
    let caches = [m.k, m.v].map(|arg| types[usize::from(arg)].dtype);
    let element = if caches == [DType::F16; 2] { 2 } else { 4 };
    let group = m.heads / m.kv_heads.max(1);
    if heads_at_once(cx.target.wave, group, m.head_dim, (tokens, element)).is_none() {
        let what =
            format!("shared memory for keys and values of {tokens} tokens, of heads of {}", m.head_dim);
        return Err(Reject::near(id, Why::TargetLacks { what }));
    }
    let members = vec![id, q.node];
    let results = vec![id.into(), k, v];
    let patch = Fusion { graph: g, kernel: Kernel::RopeAttention, members, results }.patch(id, cx)?;
    // Keys that are attended to as values, or the other way round, no kernel computes.
    for node in &patch.add {
        if let Op::Fused(fused) = &node.op {
            fused.read().map_err(shape)?;
        }
    }
    patch.if_it_pays(id)
}
