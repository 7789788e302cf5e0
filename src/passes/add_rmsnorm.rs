//! add_rmsnorm: the residual add, RMSNorm and the quantisation of its result in one pass over the row.
//!
//! ```text
//! rms_norm (add %a, %b), %w           =>  fused add_rmsnorm(%a, %b, %w) -> sum, norm
//! quant_act (rms_norm ..)             =>  taken in; results are those of sum, norm and quant that are used
//! ```
//!
//! Without an add (a matmul's epilogue may have taken it) norm and quantisation alone are worth a kernel too.

use super::cost::{self, Cost};
use super::rule::{Cx, Fusion, Patch, Ref, Reject};
use super::{Pass, dequant_rmsnorm};
use crate::ir::{Graph, Kernel, NodeId, Op, TensorType, Value, Why};

pub const PASS: Pass = Pass {
    name: "add_rmsnorm",
    summary: "residual add → RMSNorm (→ quant_act)",
    rule: try_fuse,
    absorbs: &["add", "rms_norm", "quant_act"],
    repeat: false,
};

fn try_fuse(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    fuse(g, id, true, cx)?.if_it_pays(id)
}

fn fuse(g: &Graph, norm: NodeId, with_add: bool, cx: &Cx) -> Result<Patch, Reject> {
    let group = NormGroup::of(g, norm, Kernel::AddRmsnorm, cx).ok_or(Reject::NoMatch)?;
    let add = group.source(g).filter(|v| {
        with_add && is_residual_add(g, *v) && cx.may_take(g, Kernel::AddRmsnorm, &[norm], v.node)
    });
    let (members, results) = group.with_rows(g, add.into_iter().map(|v| v.node).collect(), add);
    if members.len() < 2 {
        let detail = "no residual sum before it and no quantisation after it are left to take in: it is one launch as it is";
        return Err(Reject::near(norm, Why::Alone { detail: detail.into() }));
    }
    group.fits(g, false, cx)?;
    Fusion { graph: g, kernel: Kernel::AddRmsnorm, members, results }.patch(norm, cx)
}

/// The cost of the norm of a sum, with the add in its kernel or before it.
///
/// # Errors
/// As the rule itself.
pub fn estimate(g: &Graph, norm: NodeId, with_add: bool, cx: &Cx) -> Result<Cost, Reject> {
    let of_patch = |patch: &Patch| {
        let fused = &patch.add[0];
        let old = fused.operands.iter().filter_map(|r| match r {
            Ref::Old(v) => Some(g.ty(*v)),
            Ref::New { .. } => None,
        });
        let operands: Vec<&TensorType> = old.collect();
        cost::of_op(&fused.op, &operands, &fused.types, &g.bounds, cx.target)
    };
    match fuse(g, norm, with_add, cx) {
        Ok(patch) => Ok(of_patch(&patch)),
        // Neither add nor quantisation: the norm stays a primitive.
        Err(Reject::NoMatch | Reject::Near { why: Why::Alone { .. }, .. }) => {
            Ok(cost::of_node(g, norm, cx.target))
        }
        Err(near) => Err(near),
    }
}

/// The norm that would take the sum of `add` in, if this pass runs.
pub fn norm_of_sum(g: &Graph, add: NodeId, cx: &Cx) -> Option<NodeId> {
    let uses = g.uses(add.into());
    let norm = uses.iter().find(|(user, slot)| *slot == 0 && matches!(g.op(*user), Op::RmsNorm { .. }))?.0;
    (cx.runs(PASS.name) && NormGroup::of(g, norm, Kernel::AddRmsnorm, cx).is_some()).then_some(norm)
}

fn is_residual_add(g: &Graph, v: Value) -> bool {
    matches!(g.op(v.node), Op::Add) && g.operands(v.node).iter().all(|x| g.ty(*x).shape.len() == 2)
}

/// RMSNorm over the rows of a matrix, with what it takes in on the way: the dequantisation of its weight, and that of
/// its result to bytes.
pub struct NormGroup {
    norm: NodeId,
    weight: Option<NodeId>,
    quant: Option<NodeId>,
}

impl NormGroup {
    /// The group around `norm` for a kernel, if that is an RMSNorm of a matrix.
    pub fn of(g: &Graph, norm: NodeId, kernel: Kernel, cx: &Cx) -> Option<NormGroup> {
        if !matches!(g.op(norm), Op::RmsNorm { .. }) || g.ty(norm.into()).shape.len() != 2 {
            return None;
        }
        let weight = g.operand(norm, 1)?.node;
        let weight = dequant_rmsnorm::is_dequantised_norm_weight(g, weight).then_some(weight);
        let uses = g.uses(norm.into());
        let quant = uses.iter().map(|(user, _)| *user).find(|u| matches!(g.op(*u), Op::QuantAct));
        let quant = quant.filter(|quant| cx.may_take(g, kernel, &[norm], *quant));
        Some(NormGroup { norm, weight, quant })
    }

    /// The rows that are normed.
    pub fn source(&self, g: &Graph) -> Option<Value> {
        g.operand(self.norm, 0)
    }

    /// Whether the norm's weight is dequantised on the way.
    pub fn dequantises_weight(&self) -> bool {
        self.weight.is_some()
    }

    /// Whether what a kernel dequantises, the weight and a row of a table, fits where its threads share it.
    ///
    /// # Errors
    /// [`Why::TargetLacks`] at the norm.
    pub fn fits(&self, g: &Graph, from_table: bool, cx: &Cx) -> Result<(), Reject> {
        let rows = u64::from(from_table) + u64::from(self.weight.is_some());
        let width = g.ty(self.norm.into()).last().eval(&g.bounds);
        if cx.target.stages_rows(rows, width) {
            return Ok(());
        }
        let what = format!("shared memory for {rows} of a norm's rows of {width}");
        Err(Reject::near(self.norm, Why::TargetLacks { what }))
    }

    /// Members and results of a fusion that also absorbs `source`, the nodes that compute `rows`.
    pub fn with_rows(
        &self,
        g: &Graph,
        source: Vec<NodeId>,
        rows: Option<Value>,
    ) -> (Vec<NodeId>, Vec<Value>) {
        let mut members = source;
        members.push(self.norm);
        members.extend(self.weight);
        members.extend(self.quant);
        let outside = |v: &Value| g.uses(*v).iter().any(|(user, _)| !members.contains(user));
        let mut results: Vec<Value> = rows.into_iter().filter(outside).collect();
        results.extend(Some(Value::from(self.norm)).filter(outside));
        results.extend(self.quant.map(Value::from));
        (members, results)
    }
}
