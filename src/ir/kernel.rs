//! The kernels that fused nodes name, and what a fused node holds.

use super::graph::{Graph, NodeId, Value};
use super::types::{Dim, TensorType};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The fused kernels. Each is made by the pass in `src/passes/` that carries its name, but for
/// [`Kernel::MatmulSwiglu`], which the `swiglu` pass makes where the cost model prefers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// dequant → matmul (+ bias, + residual).
    DequantMatmul,
    /// Several matmuls of one input.
    Merge,
    /// Gate and up matmuls → SiLU·mul (→ quant_act).
    MatmulSwiglu,
    /// Embedding rows → dequant → RMSNorm (→ quant_act), or RMSNorm with a quantised norm weight.
    DequantRmsnorm,
    /// (Residual add →) RMSNorm (→ quant_act).
    AddRmsnorm,
    /// (QK-norm →) RoPE → KV append, and V append.
    RopeKv,
    /// SiLU·mul (→ quant_act).
    Swiglu,
    /// Scores → mask → softmax → weighted sum (→ quant_act).
    Attention,
    /// (QK-norm →) RoPE → KV append, and attention over it, of a few tokens.
    RopeAttention,
    /// Head matmul → argmax.
    SampleHead,
    /// SiLU·mul → gated linear recurrence.
    GatedScan,
}

impl Kernel {
    pub const ALL: [Kernel; 11] = [
        Kernel::DequantMatmul,
        Kernel::Merge,
        Kernel::MatmulSwiglu,
        Kernel::DequantRmsnorm,
        Kernel::AddRmsnorm,
        Kernel::RopeKv,
        Kernel::Swiglu,
        Kernel::Attention,
        Kernel::RopeAttention,
        Kernel::SampleHead,
        Kernel::GatedScan,
    ];

    /// The name used in the text form, in plans and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Kernel::DequantMatmul => "dequant_matmul",
            Kernel::Merge => "merge",
            Kernel::MatmulSwiglu => "matmul_swiglu",
            Kernel::DequantRmsnorm => "dequant_rmsnorm",
            Kernel::AddRmsnorm => "add_rmsnorm",
            Kernel::RopeKv => "rope_kv",
            Kernel::Swiglu => "swiglu",
            Kernel::Attention => "attention",
            Kernel::RopeAttention => "rope_attention",
            Kernel::SampleHead => "sample_head",
            Kernel::GatedScan => "gated_scan",
        }
    }

    /// The inverse of [`Kernel::name`].
    pub fn from_name(name: &str) -> Option<Kernel> {
        Kernel::ALL.into_iter().find(|k| k.name() == name)
    }
}

/// A kernel and the primitives it stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Fused {
    pub kernel: Kernel,
    /// Primitives only. Its inputs are the operands of the fused node, its results the node's.
    pub body: Graph,
}

impl Fused {
    /// Of each operand, whether result `out` depends on it.
    pub(super) fn operands_of(&self, out: u32) -> Vec<bool> {
        let body = &self.body;
        let mut seen = BTreeSet::new();
        let mut stack: Vec<NodeId> = body.results().get(out as usize).map(|v| v.node).into_iter().collect();
        while let Some(n) = stack.pop() {
            if seen.insert(n) {
                stack.extend(body.operands(n).iter().map(|v| v.node));
            }
        }
        body.inputs().iter().map(|input| seen.contains(input)).collect()
    }

    /// See [`Op::follows`]: what all uses in the body hold input `slot` to.
    pub(super) fn follows(&self, slot: u32) -> Option<(Dim, bool)> {
        let body = &self.body;
        let input = Value::from(*body.inputs().get(slot as usize)?);
        let held = body.uses(input).into_iter().filter_map(|(user, slot)| {
            let operands = body.operands(user);
            let types: Vec<&TensorType> = operands.iter().map(|v| body.ty(*v)).collect();
            body.op(user).follows(slot, &types)
        });
        held.reduce(|(a, first), (b, second)| {
            // Of sizes that differ from step to step the first counts: a kernel that asks for another is refused.
            let below = match (a.as_const(), b.as_const()) {
                (Some(a), Some(b)) => Dim::n(a.min(b)),
                _ => a,
            };
            (below, first | second)
        })
    }

    /// See [`Op::writes`]: results that come from an input by writes alone.
    pub(super) fn writes(&self) -> Vec<(u32, u32)> {
        let body = &self.body;
        let mut writes = vec![];
        for (result, last) in body.results().into_iter().enumerate() {
            let (mut v, mut left) = (last, body.len());
            while let (Some(previous), 1..) = (body.previous_version(v), left) {
                (v, left) = (previous, left - 1);
            }
            let param = body.inputs().iter().position(|&i| v == Value::from(i));
            if let (Some(param), true) = (param, v != last) {
                writes.push((param as u32, result as u32));
            }
        }
        writes
    }
}
