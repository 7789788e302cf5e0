//! The cost model: what a launch takes on a target, from the bytes it moves and the arithmetic it does.
//!
//! `time = launch + max(bytes / bandwidth, operations / rate) / efficiency`, at the bounds of the graph. The rate is that of float32, of 8-bit integers,
//! or, of matmuls that may round to 16 bits, of matrix units. Views are
//! free, leaves but for constants too; a cache counts by the rows that are read or written, an embedding table by the rows that
//! are fetched.

use super::dequant_matmul::has_residual;
use crate::ir::fused::Computation;
use crate::ir::{DType, Dim, Fused, Graph, Kernel, Limit, NodeId, Op, Syms, TensorType, Value};
use crate::target::{Target, TargetKind, attends_at_once};
use std::iter::Sum;

/// What a node costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Estimated time in microseconds.
    pub us: f64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Arithmetic operations.
    pub operations: u64,
    /// Launches: 0 for views and leaves.
    pub launches: u64,
    /// Of the time, what moving the bytes would take alone.
    pub transfer_us: f64,
    /// What the arithmetic would take alone.
    pub arithmetic_us: f64,
}

impl Cost {
    /// What takes most of the time.
    pub fn limit(&self) -> Limit {
        let work_us = self.transfer_us.max(self.arithmetic_us);
        // The rest is launches.
        if work_us < self.us - work_us {
            Limit::Launch
        } else if self.transfer_us < self.arithmetic_us {
            Limit::Arithmetic
        } else {
            Limit::Memory
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(iter: I) -> Cost {
        iter.fold(Cost::default(), |a, b| Cost {
            us: a.us + b.us,
            bytes: a.bytes.saturating_add(b.bytes),
            operations: a.operations.saturating_add(b.operations),
            launches: a.launches + b.launches,
            transfer_us: a.transfer_us + b.transfer_us,
            arithmetic_us: a.arithmetic_us + b.arithmetic_us,
        })
    }
}

/// The cost of a node of `g`.
pub fn of_node(g: &Graph, id: NodeId, target: &Target) -> Cost {
    let node = g.node(id);
    let operands = g.operands(id);
    let types: Vec<&TensorType> = operands.iter().map(|v| g.ty(*v)).collect();
    of_op(&node.op, &types, &node.outs, &g.bounds, target)
}

/// The cost of a whole graph: the sum over its nodes.
pub fn of_graph(g: &Graph, target: &Target) -> Cost {
    g.ids().into_iter().map(|id| of_node(g, id, target)).sum()
}

/// The cost of an operation on operands of types `x` with results of types `y`.
pub fn of_op(op: &Op, x: &[&TensorType], y: &[TensorType], bounds: &Syms, target: &Target) -> Cost {
    // A constant is filled in by a launch of its own.
    let free = op.is_leaf() && !matches!(op, Op::Const { .. }) || op.is_view();
    if free || matches!(op, Op::Return) {
        return Cost::default();
    }
    let (bytes, work, efficiency) = match op {
        Op::Fused(fused) => {
            let residual = if has_residual(op) { target.residual_epilogue } else { 1.0 };
            let work = body_operations(fused, bounds);
            (body_bytes(&fused.body, bounds), work, target.efficiency_of(fused.kernel) * residual)
        }
        _ => {
            // Floats meet floats, which no matrix unit takes, whatever they may be rounded to.
            let work = Operations { float: operations(op, x, y, bounds), ..Default::default() };
            (op_bytes(op, x, y, bounds), work, 1.0)
        }
    };
    let transfer_us = bytes as f64 / (target.bandwidth_gbs * 1e3) / efficiency;
    let arithmetic_us = work.us(target) / efficiency;
    let launches = launches(op, x, y, bounds, target);
    Cost {
        us: launches as f64 * target.launch_us + transfer_us.max(arithmetic_us),
        transfer_us,
        arithmetic_us,
        bytes,
        operations: work.float.saturating_add(work.integer).saturating_add(work.half),
        launches,
    }
}

/// Operations by the arithmetic that does them.
#[derive(Default)]
struct Operations {
    float: u64,
    integer: u64,
    /// Of numbers that may be rounded to 16 bits.
    half: u64,
}

impl Operations {
    fn us(&self, target: &Target) -> f64 {
        let rates = [(self.float, None), (self.integer, target.dot4_gops), (self.half, target.f16_gflops)];
        rates.iter().map(|(n, rate)| *n as f64 / (rate.unwrap_or(target.f32_gflops) * 1e3)).sum()
    }
}

/// The launches that a node takes.
fn launches(op: &Op, x: &[&TensorType], y: &[TensorType], bounds: &Syms, target: &Target) -> u64 {
    match op.kernel() {
        // The best of some rows each, and the best of those.
        Some(Kernel::SampleHead) => 2,
        // On a GPU some parts of the positions each, and the join of those.
        Some(Kernel::Attention) if target.kind != TargetKind::Cpu => {
            let Ok(Computation::Attention(m)) = Computation::of(op, x) else { return 2 };
            let tokens = x.get(usize::from(m.q)).map_or(1, |q| q.first().eval(bounds));
            let quantised = y.first().is_some_and(|y| y.dtype.is_activations());
            if attends_at_once(tokens, m.head_dim, quantised) { 1 } else { 2 }
        }
        // Of so few tokens that it is split.
        Some(Kernel::RopeAttention) => 2,
        // Tiles, and what comes before and after those of halves.
        Some(Kernel::DequantMatmul | Kernel::Merge | Kernel::MatmulSwiglu) => {
            let Ok(Computation::Matmul(m)) = Computation::of(op, x) else { return 1 };
            let tokens = x.get(usize::from(m.x)).map_or(1, |x| x.first().eval(bounds));
            1 + target.half_tiles(&m, tokens).launches()
        }
        Some(
            Kernel::DequantRmsnorm
            | Kernel::AddRmsnorm
            | Kernel::RopeKv
            | Kernel::Swiglu
            | Kernel::Attention
            | Kernel::GatedScan,
        )
        | None => 1,
    }
}

/// Bytes that a primitive reads and writes as a launch of its own.
fn op_bytes(op: &Op, x: &[&TensorType], y: &[TensorType], bounds: &Syms) -> u64 {
    let all = |ts: &mut dyn Iterator<Item = u64>| ts.fold(0u64, u64::saturating_add);
    let written = all(&mut y.iter().map(|t| t.bytes(bounds)));
    match op {
        Op::GetRows => written.saturating_mul(2).saturating_add(x[1].bytes(bounds)),
        Op::KvAppend => {
            all(&mut [x[1].bytes(bounds), x[1].with_dtype(x[0].dtype).bytes(bounds), x[2].bytes(bounds)]
                .into_iter())
        }
        // One matrix for each row, and each of them at most once.
        Op::MatMulId => {
            let (t, experts) = (x[0].first().eval(bounds), x[1].first().eval(bounds));
            let each = x[1].bytes(bounds) / experts.max(1);
            let matrices = each.saturating_mul(t.min(experts));
            all(&mut [x[0].bytes(bounds), matrices, x[2].bytes(bounds), written].into_iter())
        }
        // What is filled may be everything.
        Op::KvRead { .. } => all(&mut [written, written, x[1].bytes(bounds), x[2].bytes(bounds)].into_iter()),
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
        | Op::Dequant
        | Op::QuantAct
        | Op::MatMul { .. }
        | Op::Add
        | Op::Mul
        | Op::Silu
        | Op::RmsNorm { .. }
        | Op::Rope(_)
        | Op::Reshape
        | Op::Scores { .. }
        | Op::CausalMask { .. }
        | Op::Softmax
        | Op::WeightedSum
        | Op::GatedScan
        | Op::ArgMax
        | Op::Fused(_)
        | Op::Return => all(&mut x.iter().map(|t| t.bytes(bounds))).saturating_add(written),
    }
}

/// Bytes that a fused kernel reads and writes: its operands and results, each once.
fn body_bytes(body: &Graph, bounds: &Syms) -> u64 {
    let mut bytes = 0u64;
    for &input in body.inputs() {
        let v = Value::from(input);
        let ty = body.ty(v);
        let uses = body.uses(v);
        let mut whole = false;
        for &(user, slot) in &uses {
            match body.op(user) {
                Op::KvAppend if slot == 0 => {}
                op if reads_rows(op, slot) => {
                    bytes = bytes.saturating_add(body.ty(user.into()).bytes(bounds));
                }
                _ => whole = true,
            }
        }
        if whole {
            bytes = bytes.saturating_add(ty.bytes(bounds));
        }
    }
    // Rows of caches that are appended to first.
    for id in body.ids() {
        let of_next = body.operand(id, 0).is_some_and(|v| matches!(body.op(v.node), Op::KvAppend));
        if of_next && reads_rows(body.op(id), 0) {
            bytes = bytes.saturating_add(body.ty(id.into()).bytes(bounds));
        }
    }
    for v in body.results() {
        let rows = match body.op(v.node) {
            Op::KvAppend => {
                let cache = body.ty(v).dtype;
                body.operand(v.node, 1).map(|rows| body.ty(rows).with_dtype(cache).bytes(bounds))
            }
            _ => None,
        };
        bytes = bytes.saturating_add(rows.unwrap_or_else(|| body.ty(v).bytes(bounds)));
    }
    bytes
}

/// Whether an op reads as many bytes of operand `slot` as its result has, not all of it.
fn reads_rows(op: &Op, slot: u32) -> bool {
    match op {
        Op::GetRows | Op::KvRead { .. } => slot == 0,
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
        | Op::Dequant
        | Op::QuantAct
        | Op::MatMul { .. }
        // No body has one yet.
        | Op::MatMulId
        | Op::Add
        | Op::Mul
        | Op::Silu
        | Op::RmsNorm { .. }
        | Op::Rope(_)
        | Op::Reshape
        | Op::KvAppend
        | Op::Scores { .. }
        | Op::CausalMask { .. }
        | Op::Softmax
        | Op::WeightedSum
        | Op::GatedScan
        | Op::ArgMax
        | Op::Fused(_)
        | Op::Return => false,
    }
}

/// Operations of a body. A matmul of quantised activations counts as integer.
fn body_operations(fused: &Fused, bounds: &Syms) -> Operations {
    let body = &fused.body;
    let mut work = Operations::default();
    for id in body.ids() {
        let node = body.node(id);
        if node.op.is_leaf() || node.op.is_view() || matches!(node.op, Op::Return) {
            continue;
        }
        let operands = body.operands(id);
        let types: Vec<&TensorType> = operands.iter().map(|v| body.ty(*v)).collect();
        let n = operations(&node.op, &types, &node.outs, bounds);
        let activations = (matches!(node.op, Op::MatMul { .. } | Op::MatMulId)
            && matches!(body.op(operands[0].node), Op::Dequant))
        .then(|| body.operand(operands[0].node, 0).map(|v| body.ty(v).dtype))
        .flatten()
        .filter(|dtype| dtype.is_activations());
        // What dequantises on the way to a dot product is part of that product.
        if matches!(node.op, Op::Dequant) {
            continue;
        }
        let (of, n) = match (&node.op, activations) {
            (Op::MatMul { round: Some(_) }, _) => (&mut work.half, n),
            // Each byte meets the weights.
            (_, Some(DType::Q16Act)) => (&mut work.integer, n.saturating_mul(2)),
            (_, Some(_)) => (&mut work.integer, n),
            (_, None) => (&mut work.float, n),
        };
        *of = of.saturating_add(n);
    }
    work
}

/// Arithmetic operations of a primitive: two per multiply-add, one per element otherwise.
fn operations(op: &Op, x: &[&TensorType], y: &[TensorType], bounds: &Syms) -> u64 {
    let elements = |t: &TensorType| t.elements(bounds);
    let twice = |a: u64, b: Dim| a.saturating_mul(b.eval(bounds)).saturating_mul(2);
    match op {
        Op::MatMul { .. } | Op::MatMulId | Op::Scores { .. } => twice(elements(&y[0]), x[0].last()),
        Op::WeightedSum => twice(elements(&y[0]), x[0].last()),
        Op::GatedScan => elements(&y[0]).saturating_mul(2),
        // Of a cache, the rows that are written; of a row, all that is looked at.
        Op::KvAppend => elements(x[1]),
        Op::ArgMax => elements(x[0]),
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
        | Op::GetRows
        | Op::Dequant
        | Op::QuantAct
        | Op::Add
        | Op::Mul
        | Op::Silu
        | Op::RmsNorm { .. }
        | Op::Rope(_)
        | Op::Reshape
        | Op::KvRead { .. }
        | Op::CausalMask { .. }
        | Op::Softmax
        | Op::Fused(_)
        | Op::Return => y.iter().map(elements).fold(0, u64::saturating_add),
    }
}
