//! The kernels of a graph, each on a device, beside the interpretation of its body on the same operands.

use super::{Caches, CheckError};
use crate::codegen::spec::{Access, Implementation};
use crate::ir::fused::{Computation, MatmulSpec};
use crate::ir::{DType, Graph, NodeId, Op, Syms, TensorType, Value, Verified};
use crate::plan::memory::ALIGN;
use crate::plan::{BufRef, LoadedPlan, Plan, PlannedBuffer, PlannedCall};
use crate::runtime::device::{Device, Submission};
use crate::runtime::interp::{InterpError, Tensor, eval_node};
use crate::runtime::{Progress, Stage};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// How far a node's kernel is from the interpretation of the node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeCheck {
    /// The node in words.
    pub at: String,
    /// The name of its kernel.
    pub kernel: &'static str,
    /// `‖kernel − body‖ / ‖body‖` of the result that is furthest off for its element type, or a quarter of that of its furthest row if it is more.
    pub error: f64,
    /// What that may be at most.
    pub tolerance: f64,
}

impl NodeCheck {
    /// Whether the kernel computes what its body says. NaN never does.
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// What an input, a weight or a state holds, by its operation and type.
pub type Leaf<'a> = &'a dyn Fn(&Op, &TensorType) -> Result<Tensor, CheckError>;

/// A graph that went through, with what it gives.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Every node that has a kernel.
    pub nodes: Vec<NodeCheck>,
    /// The graph's results that are not states, in order.
    pub results: Vec<Tensor>,
    /// The last version of each state, by name.
    pub states: Caches,
}

/// Interprets a graph, and makes each node's call on a device, on the same operands, beside it.
///
/// # Errors
/// A step beyond the bounds of the graph, a graph that cannot be interpreted, or a device that fails. Divergence is no error
/// but part of the result.
pub fn check_kernels(
    graph: &Verified,
    calls: Calls<'_>,
    syms: Syms,
    leaf: Leaf<'_>,
) -> Result<Checked, CheckError> {
    Walk::new(graph, syms, leaf).beside(calls).run()
}

/// A plan on a device.
pub struct OnDevice {
    pub plan: Arc<LoadedPlan>,
    pub device: Box<dyn Device>,
}

impl OnDevice {
    /// The calls of its first program, one for each of these nodes, which codegen gave with the program that the plan was built of.
    pub fn calls_of(&mut self, nodes: &[NodeId]) -> Calls<'_> {
        let index = nodes.iter().enumerate().map(|(call, node)| (*node, call)).collect();
        Calls { plan: &self.plan, device: &mut self.device, index }
    }
}

/// What a call gave.
struct Made {
    /// The name of its kernel.
    kernel: &'static str,
    /// By how much its results may be off for what it rounds on the way.
    rounding: f64,
    results: Vec<Vec<u8>>,
}

/// The calls of a program by the nodes that they come from.
pub struct Calls<'a> {
    plan: &'a Plan,
    device: &'a mut Box<dyn Device>,
    index: HashMap<NodeId, usize>,
}

impl Calls<'_> {
    /// What the call of a node gives; none if the node has no call.
    fn results(
        &mut self,
        graph: &Graph,
        id: NodeId,
        operands: &[&Tensor],
        syms: &Syms,
    ) -> Result<Option<Made>, CheckError> {
        let Some(&index) = self.index.get(&id) else { return Ok(None) };
        let call = &self.plan.programs[0].calls[index];
        let kernel = &self.plan.kernels[call.kernel as usize];
        let args = || kernel.args().zip(&call.args).enumerate();
        // All ones is NaN in every float format, so what is left unwritten shows, and what is written beyond the rows of this step.
        // Operands come after, as a result may lie where one lies.
        let beside = self.beside(call, syms);
        for (place, _, end) in &beside {
            self.device.write(0, *place, &vec![0xff; *end as usize])?;
        }
        for (slot, (arg, place)) in args() {
            // Weights are on the device already, as it keeps them.
            let is_operand = matches!(arg.access, Access::Read | Access::Update);
            if let (true, false) = (is_operand, matches!(place, BufRef::Weight(_))) {
                self.device.write(0, *place, &operands[slot].bytes())?;
            }
        }
        let work = Submission { program: 0, calls: index..index + 1, at: *syms, timed: false };
        let ticket = self.device.submit(&work)?;
        self.device.wait(ticket)?;
        // Next versions of states lie where the states lie, and other results follow the operands.
        let (writes, mut fresh) = (graph.op(id).writes(), operands.len()..);
        let mut results = vec![];
        for (out, ty) in (0u32..).zip(&graph.node(id).outs) {
            let written = writes.iter().find(|(_, result)| *result == out);
            let Some(arg) = written.map(|(state, _)| *state as usize).or_else(|| fresh.next()) else {
                continue;
            };
            let mut bytes = vec![0; usize::try_from(ty.bytes(syms)).unwrap_or(usize::MAX)];
            self.device.read(0, call.args[arg], 0, &mut bytes)?;
            results.push(bytes);
        }
        let strays = || CheckError::Strays { at: graph.describe(id), kernel: kernel.spec.name() };
        for (place, first, end) in beside {
            let mut bytes = vec![0; (end - first) as usize];
            self.device.read(0, place, first, &mut bytes)?;
            if bytes.iter().any(|byte| *byte != 0xff) {
                return Err(strays());
            }
        }
        for (slot, place) in self.kept(call) {
            let given = operands[slot].bytes();
            let some = given.len().min(BESIDE as usize);
            for first in [0, given.len() - some] {
                let mut bytes = vec![0; some];
                self.device.read(0, place, first as u64, &mut bytes)?;
                if given[first..first + some] != bytes {
                    return Err(strays());
                }
            }
        }
        Ok(Some(Made { kernel: kernel.spec.name(), rounding: rounding_of(kernel), results }))
    }
}

/// Bytes before and behind a result that are looked at: whole blocks of whatever type lies there.
pub(super) const BESIDE: u64 = 2 * (DType::Q8Act.block_bytes() * DType::Q16Act.block_bytes()) as u64;

impl Calls<'_> {
    /// Where a buffer of the arena lies.
    fn range(&self, buffer: u32) -> Range<u64> {
        let program = &self.plan.programs[0];
        let PlannedBuffer { offset, ty } = &program.buffers[buffer as usize];
        *offset..offset + ty.bytes(&program.bounds)
    }

    /// The arguments of a call that lie in the arena: how each is accessed, its number, its buffer.
    fn in_arena(&self, call: &PlannedCall) -> Vec<(Access, usize, u32)> {
        let kernel = &self.plan.kernels[call.kernel as usize];
        let args = kernel.args().zip(&call.args).enumerate();
        args.filter_map(|(slot, (arg, place))| match *place {
            BufRef::Arena(b) => Some((arg.access, slot, b)),
            BufRef::State(_) | BufRef::Weight(_) => None,
        })
        .collect()
    }

    /// Where a call writes or works, and what lies on both sides of it in the arena, and of the states that it writes to: buffers with the
    /// bytes of each, from one to another, that no kernel of this step may touch.
    fn beside(&self, call: &PlannedCall, syms: &Syms) -> Vec<(BufRef, u64, u64)> {
        let program = &self.plan.programs[0];
        let args = self.in_arena(call);
        let used: Vec<Range<u64>> = args.iter().map(|(.., b)| self.range(*b)).collect();
        let (mut beside, mut written) = (vec![], vec![]);
        for (_, _, b) in args.iter().filter(|(access, ..)| matches!(access, Access::Write | Access::Scratch))
        {
            let whole = self.range(*b);
            let room = whole.end - whole.start;
            // Not where another argument lies, which is written after.
            let alone = used.iter().filter(|other| meet(&whole, other)).count() == 1;
            let first = if alone { program.buffers[*b as usize].ty.bytes(syms) } else { room };
            beside.push((BufRef::Arena(*b), first, room));
            written.push(whole);
        }
        for b in 0..program.buffers.len() as u32 {
            let whole = self.range(b);
            if used.iter().any(|other| meet(&whole, other)) {
                continue;
            }
            beside.extend(ends_beside(BufRef::Arena(b), &whole, &written));
        }
        let states = self.in_states(call);
        let is_written =
            |(access, i): &(Access, u32)| (*access != Access::Read).then(|| self.state_range(*i));
        let updated: Vec<Range<u64>> = states.iter().filter_map(is_written).collect();
        for i in 0..self.plan.states.len() as u32 {
            if states.iter().all(|(_, used)| i != *used) {
                beside.extend(ends_beside(BufRef::State(i), &self.state_range(i), &updated));
            }
        }
        beside
    }

    /// The arguments of a call that are states: how each is accessed, its number.
    fn in_states(&self, call: &PlannedCall) -> Vec<(Access, u32)> {
        let args = self.plan.kernels[call.kernel as usize].args().zip(&call.args);
        args.filter_map(|(arg, place)| match *place {
            BufRef::State(i) => Some((arg.access, i)),
            BufRef::Arena(_) | BufRef::Weight(_) => None,
        })
        .collect()
    }

    /// Where a state lies.
    fn state_range(&self, state: u32) -> Range<u64> {
        let state = &self.plan.states[state as usize];
        state.offset..state.offset + state.ty.bytes(&self.plan.programs[0].bounds)
    }

    /// Operands that a call only reads and that no result lies on: these it leaves as they are.
    fn kept(&self, call: &PlannedCall) -> Vec<(usize, BufRef)> {
        let args = self.in_arena(call);
        let (read, written): (Vec<_>, Vec<_>) =
            args.into_iter().partition(|(access, ..)| *access == Access::Read);
        let is_kept = |b: u32| !written.iter().any(|(.., other)| meet(&self.range(b), &self.range(*other)));
        let kept = read.into_iter().filter(|(.., b)| is_kept(*b));
        kept.map(|(_, slot, b)| (slot, BufRef::Arena(b))).collect()
    }
}

/// The ends of a buffer that lie beside one of these places: bytes from one to another.
fn ends_beside(
    buffer: BufRef,
    whole: &Range<u64>,
    places: &[Range<u64>],
) -> impl Iterator<Item = (BufRef, u64, u64)> + use<> {
    let room = whole.end - whole.start;
    let behind = places.iter().any(|it| (whole.end..whole.end + ALIGN).contains(&it.start));
    let before = places.iter().any(|it| (it.end..it.end + ALIGN).contains(&whole.start));
    let behind = behind.then_some((buffer, room - room.min(BESIDE), room));
    behind.into_iter().chain(before.then_some((buffer, 0, room.min(BESIDE))))
}

fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// An interpretation of a graph that also makes each node's call, if there are any.
pub(super) struct Walk<'a> {
    graph: &'a Graph,
    syms: Syms,
    leaf: Leaf<'a>,
    calls: Option<Calls<'a>>,
    nodes: Vec<NodeCheck>,
    progress: Progress,
    stage: Stage,
}

impl<'a> Walk<'a> {
    pub(super) fn new(graph: &'a Graph, syms: Syms, leaf: Leaf<'a>) -> Walk<'a> {
        let (progress, stage) = (Progress::default(), Stage::Interpreted);
        Walk { graph, syms, leaf, calls: None, nodes: vec![], progress, stage }
    }

    /// Makes these calls too.
    pub(super) fn beside(self, calls: Calls<'a>) -> Walk<'a> {
        Walk { calls: Some(calls), ..self }
    }

    /// Tells how far it is.
    pub(super) fn telling(self, progress: &Progress, stage: Stage) -> Walk<'a> {
        Walk { progress: progress.clone(), stage, ..self }
    }

    pub(super) fn run(mut self) -> Result<Checked, CheckError> {
        let g = self.graph;
        let (at, bounds) = (self.syms, g.bounds);
        if at.t < 1 || at.t > bounds.t || at.r > bounds.r.min(at.t) {
            return Err(CheckError::Step { at, bounds });
        }
        let mut values: HashMap<Value, Tensor> = HashMap::new();
        let mut uses: HashMap<NodeId, usize> = g.ids().into_iter().map(|id| (id, g.use_count(id))).collect();
        let mut state_of: HashMap<Value, String> = HashMap::new();
        let order = g.order();
        for (done, &id) in order.iter().enumerate() {
            self.progress.tell(self.stage, done as u64 + 1, order.len() as u64);
            if id == g.ret() {
                break;
            }
            if let op @ (Op::Input { .. } | Op::Weight { .. } | Op::State { .. }) = g.op(id) {
                values.insert(id.into(), (self.leaf)(op, g.ty(id.into()))?);
                if let Op::State { name, .. } = op {
                    state_of.insert(id.into(), name.clone());
                }
                continue;
            }
            let operands = g.operands(id);
            let tensors: Vec<&Tensor> = operands.iter().filter_map(|v| values.get(v)).collect();
            let outs = eval_node(g, id, &tensors, &self.syms)?;
            self.compare(id, &tensors, &outs)?;
            for (out, tensor) in (0u32..).zip(outs) {
                let v = Value { node: id, out };
                if let Some(name) = g.previous_version(v).and_then(|before| state_of.get(&before)).cloned() {
                    state_of.insert(v, name);
                }
                values.insert(v, tensor);
            }
            for v in operands {
                let left = uses.entry(v.node).or_default();
                *left = left.saturating_sub(1);
                if *left == 0 {
                    values.retain(|value, _| value.node != v.node);
                }
            }
        }
        let mut checked = Checked { nodes: self.nodes, ..Checked::default() };
        for v in g.results() {
            let Some(tensor) = values.get(&v).cloned() else { continue };
            match state_of.get(&v) {
                Some(name) => drop(checked.states.insert(name.clone(), tensor)),
                None => checked.results.push(tensor),
            }
        }
        Ok(checked)
    }

    /// Makes the node's call on the same operands, and notes how far it is off.
    fn compare(&mut self, id: NodeId, operands: &[&Tensor], expected: &[Tensor]) -> Result<(), CheckError> {
        let Some(calls) = &mut self.calls else { return Ok(()) };
        let Some(Made { kernel, rounding, results }) = calls.results(self.graph, id, operands, &self.syms)?
        else {
            return Ok(());
        };
        let at = self.graph.describe(id);
        let mut pairs = vec![];
        for (bytes, wanted) in results.into_iter().zip(expected) {
            pairs.push((Tensor::new(wanted.dtype(), wanted.dims().to_vec(), bytes)?, wanted));
        }
        // Without a result, a kernel would always agree.
        let Some((error, tolerance)) = furthest(&pairs, rounding)? else {
            return Err(CheckError::NoResult { at });
        };
        self.nodes.push(NodeCheck { at, kernel, error, tolerance });
        Ok(())
    }
}

/// Rounding to fewer bits may fall to either side of a half, so such results may differ by a step here and there.
fn tolerance_of(dtype: DType) -> f64 {
    match dtype {
        DType::Q8Act => 5e-3,
        DType::Q16Act => 5e-5,
        DType::F16 => 5e-4,
        DType::I32 => 0.0,
        _ => 1e-5,
    }
}

/// By how much results may be off for what a kernel rounds on the way.
pub(super) fn rounding_of(kernel: &Implementation) -> f64 {
    // Weights that are unpacked to F16 are rounded too, and so are their scales.
    let unpacks =
        |m: &MatmulSpec| m.parts.iter().any(|part| part.round.is_some() && part.format.is_quantised());
    match (kernel.precision, &kernel.spec.computes) {
        // Eight bits, three fewer than F16 has.
        (DType::BF16, _) => 4e-3,
        (DType::F16, Computation::Matmul(m)) if unpacks(m) => 1e-3,
        // Queries are rounded, and so are the weights that come of them.
        (DType::F16, Computation::Attention(_)) => 1e-3,
        (precision, _) => tolerance_of(precision),
    }
}

/// Error and tolerance of the result, beside what it should be, that is furthest off for its element type, where they may be off by `rounding`
/// at least. A row of one may be off by [`OF_ROWS`] times as much.
pub(super) fn furthest(
    results: &[(Tensor, &Tensor)],
    rounding: f64,
) -> Result<Option<(f64, f64)>, InterpError> {
    let mut worst: Option<(f64, f64)> = None;
    for (found, wanted) in results {
        let rounding = if wanted.dtype() == DType::I32 { 0.0 } else { rounding };
        let tolerance = tolerance_of(wanted.dtype()).max(rounding);
        let (whole, row) = apart(found, wanted)?;
        let error = if whole.is_nan() || row / OF_ROWS <= whole { whole } else { row / OF_ROWS };
        // Multiplied, as a tolerance may be zero; false if an error is not a number.
        let less = |(e, t): (f64, f64)| e.is_nan() || error * t <= e * tolerance && error <= e;
        if !worst.is_some_and(less) {
            worst = Some((error, tolerance));
        }
    }
    Ok(worst)
}

/// The largest [`distance`] of results from what they should be; NaN if one is.
pub(super) fn largest_distance(results: &[Tensor], wanted: &[Tensor]) -> Result<f64, InterpError> {
    let mut largest = 0.0f64;
    for (a, b) in results.iter().zip(wanted) {
        let far = distance(a, b)?;
        largest = if far.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(far) };
    }
    Ok(largest)
}

/// How many times the error of a whole result that of one of its rows may be: roundings differ between rows. What is wrong in one of
/// thousands is lost in the sum over all.
const OF_ROWS: f64 = 4.0;

/// `‖a − b‖ / ‖b‖`; for integers the share that differs.
pub(super) fn distance(a: &Tensor, b: &Tensor) -> Result<f64, InterpError> {
    Ok(apart(a, b)?.0)
}

/// `‖a − b‖ / ‖b‖` of two results, and that of the rows that are furthest apart, where a row counts as one of the mean length at least, as its error
/// may be that of longer ones. Of integers the share that differs, and no rows.
fn apart(a: &Tensor, b: &Tensor) -> Result<(f64, f64), InterpError> {
    if b.dtype() == DType::I32 {
        let (a, b) = (a.to_i32()?, b.to_i32()?);
        let wrong = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        return Ok((wrong as f64 / b.len().max(1) as f64, 0.0));
    }
    let width = b.dims().last().copied().unwrap_or(1).max(1);
    let (a, b) = (a.to_f32()?, b.to_f32()?);
    let squares = |(a, b): (&[f32], &[f32])| {
        let (mut difference, mut norm) = (0.0f64, 0.0f64);
        // A masked score is -inf, and equal to another.
        for (&a, &b) in a.iter().zip(b).filter(|(a, b)| a.is_finite() || a != b) {
            difference += (f64::from(a) - f64::from(b)).powi(2);
            norm += f64::from(b).powi(2);
        }
        (difference, norm)
    };
    let rows: Vec<(f64, f64)> = a.chunks(width).zip(b.chunks(width)).map(squares).collect();
    let ratio = |difference: f64, norm: f64| if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() };
    let (difference, norm) = rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
    let mean = norm / rows.len().max(1) as f64;
    let of_rows = rows.iter().map(|(difference, norm)| ratio(*difference, norm.max(mean)));
    let furthest = of_rows.fold(0.0, |most, far| if far.is_nan() || far > most { far } else { most });
    Ok((ratio(difference, norm), furthest))
}
