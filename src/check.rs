//! Checks a compiled model node by node: each kernel, on the device, against the interpretation of its body on the same
//! inputs; and the fused graph as a whole against the unfused.

use crate::codegen::spec::{Access, Program};
use crate::codegen::{self, Layouts};
use crate::compile::{CompileError, Options};
use crate::gguf::{GgufError, GgufFile};
use crate::ir::{DType, Graph, NodeId, Op, StepInput, Syms, TensorType, Value, Verified, verify};
use crate::lower::{self, Config, Step};
use crate::model;
use crate::plan::{BufRef, LoadedPlan, Plan, PlanError};
use crate::runtime::StepRows;
use crate::runtime::device::{Device, DeviceError, DeviceOptions, Submission, open};
use crate::runtime::interp::{InterpError, Tensor, eval_node};
use indexmap::IndexMap;
use std::collections::HashMap;
use std::sync::Arc;

/// A model that cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Interp(#[from] InterpError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("a step of {} token rows, {} of them wanted, is more than {} and {}", .at.t, .at.r, .bounds.t, .bounds.r)]
    Step { at: Syms, bounds: Syms },
    #[error("{at}: its kernel has no result")]
    NoResult { at: String },
    #[error(transparent)]
    Weight(#[from] GgufError),
}

/// How far a node's kernel is from the interpretation of the node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeCheck {
    /// The node in words.
    pub at: String,
    /// The name of its kernel.
    pub kernel: &'static str,
    /// `‖kernel − body‖ / ‖body‖` of the result that is furthest off for its element type.
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

/// The outcome for one step.
#[derive(Clone, Debug)]
pub struct StepCheck {
    pub step: String,
    pub nodes: Vec<NodeCheck>,
    /// The largest relative error between the results of the fused and of the unfused graph, both interpreted.
    pub whole: f64,
}

/// What the whole may differ by: both graphs do the same arithmetic in the same precision.
pub const WHOLE_TOLERANCE: f64 = 1e-5;

impl StepCheck {
    /// The first node that diverges, in execution order.
    pub fn first_divergence(&self) -> Option<&NodeCheck> {
        self.nodes.iter().find(|n| !n.passes())
    }

    /// Whether every node and the whole agree.
    pub fn passes(&self) -> bool {
        self.first_divergence().is_none() && self.whole <= WHOLE_TOLERANCE
    }
}

/// The caches of a model between steps, by name.
pub type Caches = IndexMap<String, Tensor>;

/// Runs one step on `tokens` on a device, which follow `cached` others in `caches`, and leaves the caches as the interpretation of
/// the fused graph does.
///
/// # Errors
/// A model that cannot be compiled or interpreted. Divergence is no error but part of the result.
pub fn check_step(
    file: &Arc<GgufFile>,
    options: &Options,
    device: &DeviceOptions,
    step: &Step,
    tokens: &[i32],
    cached: u64,
    caches: &mut Caches,
) -> Result<StepCheck, CheckError> {
    let open: Open<'_> = &|plan, file| open(plan, file, device);
    check_step_on(open, file, options, step, tokens, cached, caches)
}

/// How a plan is put on a device.
pub type Open<'a> = &'a dyn Fn(&Arc<LoadedPlan>, Arc<GgufFile>) -> Result<Box<dyn Device>, DeviceError>;

/// The same, on whatever device `open` gives.
///
/// # Errors
/// As [`check_step`].
pub fn check_step_on(
    open: Open<'_>,
    file: &Arc<GgufFile>,
    options: &Options,
    step: &Step,
    tokens: &[i32],
    cached: u64,
    caches: &mut Caches,
) -> Result<StepCheck, CheckError> {
    let config = Config::from_gguf(file.gguf()).map_err(CompileError::from)?;
    let lowered = lower::lower(file.gguf(), &config, step).map_err(CompileError::from)?;
    let rows = step_rows(step, tokens, cached);
    let syms = rows.syms();
    let run = |graph: &mut Graph, pipeline: &crate::passes::Pipeline| {
        pipeline.run(graph, &options.target).map_err(CompileError::from)
    };

    let before = std::mem::take(caches);
    let leaf = |op: &Op, ty: &TensorType| leaf_of_model(file, &before, &rows, op, ty);

    let mut unfused = lowered.clone();
    run(&mut unfused, &options.pipeline.clone().without_fusions())?;
    let expected = Walk::new(&unfused, syms, &leaf).run()?;

    let mut fused = lowered;
    run(&mut fused, &options.pipeline)?;
    let invalid =
        |e: crate::ir::VerifyErrors| CompileError::Verify { stage: "fused", message: e.to_string() };
    let fused = verify(fused).map_err(invalid)?;
    let layouts = Layouts::choose([&fused], &options.target).map_err(CompileError::from)?;
    let generated = codegen::generate_traced(&fused, &options.target, &layouts);
    let (program, nodes) = generated.map_err(CompileError::from)?;
    let mut device = on_device(open, file, options, program)?;
    let found = check_kernels(&fused, device.calls_of(&nodes), syms, &leaf)?;

    let whole = largest_distance(&found.results, &expected.results)?;
    *caches = found.states;
    Ok(StepCheck { step: step.name(), nodes: found.nodes, whole })
}

/// Puts one program of a model on a device, by way of the bytes of a plan.
fn on_device(
    open: Open<'_>,
    file: &Arc<GgufFile>,
    options: &Options,
    program: Program,
) -> Result<OnDevice, CheckError> {
    let plan = Plan::build(model::parts(file, None, options, vec![(program, vec![])])?)?;
    let plan = Arc::new(LoadedPlan::from_bytes(&plan.to_bytes()?)?);
    Ok(OnDevice { device: open(&plan, Arc::clone(file))?, plan })
}

/// The inputs of a step on tokens of one sequence, whose pages lie in order.
fn step_rows(step: &Step, tokens: &[i32], cached: u64) -> StepRows {
    let first = i32::try_from(cached).unwrap_or(i32::MAX);
    let n = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
    let positions: Vec<i32> = (0..n).map(|t| first.saturating_add(t)).collect();
    let count = |n: u64| i32::try_from(n).unwrap_or(i32::MAX);
    let (sequences, pages) = (count(step.sequences), count(step.table_pages()));
    let mut lengths = vec![0; sequences as usize];
    lengths[..1].fill(first.saturating_add(n));
    StepRows {
        tokens: tokens.to_vec(),
        sequences: vec![0; tokens.len()],
        rows: positions.clone(),
        positions,
        // Of the other sequences, which are empty, any pages will do.
        tables: (0..sequences).flat_map(|_| 0..pages).collect(),
        lengths,
        wanted: (n - count(step.wanted).min(n)..n).collect(),
    }
}

/// What an input, a weight or a state of a model holds.
fn leaf_of_model(
    file: &GgufFile,
    caches: &Caches,
    rows: &StepRows,
    op: &Op,
    ty: &TensorType,
) -> Result<Tensor, CheckError> {
    let syms = rows.syms();
    let dims = || ty.dims(&syms).into_iter().map(|d| d as usize).collect::<Vec<_>>();
    Ok(match op {
        Op::Input { name, .. } => {
            let input = StepInput::from_name(name);
            Tensor::from_i32(&dims(), input.map_or(&[], |input| rows.of(input)))?
        }
        Op::Weight { name, rows } => {
            let info = file.gguf().tensor(name)?;
            let shape = info.shape.iter().map(|d| *d as usize).collect();
            let tensor = Tensor::new(ty.dtype, shape, file.tensor_bytes(info).to_vec())?;
            match rows {
                Some(rows) => tensor.slice(name, rows, ty)?,
                None => tensor,
            }
        }
        Op::State { name, .. } => match caches.get(name) {
            Some(cache) => cache.clone(),
            None => Tensor::zeros(ty, &syms)?,
        },
        other => return Err(InterpError::NotANode { op: other.name() }.into()),
    })
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
    let bounds = graph.bounds;
    if syms.t < 1 || syms.t > bounds.t || syms.r > bounds.r.min(syms.t) {
        return Err(CheckError::Step { at: syms, bounds });
    }
    Walk { calls: Some(calls), ..Walk::new(graph, syms, leaf) }.run()
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
    /// What it rounds to on the way.
    precision: DType,
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
        // All ones is NaN in every float format, so what is left unwritten shows. Operands come after, as a result may lie
        // where one lies.
        for (_, (arg, place)) in args().filter(|(_, (arg, _))| arg.access == Access::Write) {
            let bytes = usize::try_from(arg.ty.bytes(syms)).unwrap_or(usize::MAX);
            self.device.write(0, *place, &vec![0xff; bytes])?;
        }
        for (slot, (arg, place)) in args() {
            // Weights are on the device already, as it keeps them.
            let is_operand = matches!(arg.access, Access::Read | Access::Update);
            if let (true, false) = (is_operand, matches!(place, BufRef::Weight(_))) {
                self.device.write(0, *place, operands[slot].bytes())?;
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
        Ok(Some(Made { kernel: kernel.spec.name(), precision: kernel.precision, results }))
    }
}

/// An interpretation of a graph that also makes each node's call, if there are any.
struct Walk<'a> {
    graph: &'a Graph,
    syms: Syms,
    leaf: Leaf<'a>,
    calls: Option<Calls<'a>>,
    nodes: Vec<NodeCheck>,
}

impl<'a> Walk<'a> {
    fn new(graph: &'a Graph, syms: Syms, leaf: Leaf<'a>) -> Walk<'a> {
        Walk { graph, syms, leaf, calls: None, nodes: vec![] }
    }

    fn run(mut self) -> Result<Checked, CheckError> {
        let g = self.graph;
        let mut values: HashMap<Value, Tensor> = HashMap::new();
        let mut uses: HashMap<NodeId, usize> = g.ids().into_iter().map(|id| (id, g.use_count(id))).collect();
        let mut state_of: HashMap<Value, String> = HashMap::new();
        for id in g.order() {
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
        let Some(Made { kernel, precision, results }) =
            calls.results(self.graph, id, operands, &self.syms)?
        else {
            return Ok(());
        };
        let at = self.graph.describe(id);
        let mut pairs = vec![];
        for (bytes, wanted) in results.into_iter().zip(expected) {
            pairs.push((Tensor::new(wanted.dtype(), wanted.dims().to_vec(), bytes)?, wanted));
        }
        // Without a result, a kernel would always agree.
        let Some((error, tolerance)) = furthest(&pairs, precision)? else {
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
        DType::F16 => 5e-4,
        DType::I32 => 0.0,
        _ => 1e-5,
    }
}

/// Error and tolerance of the result, beside what it should be, that is furthest off for its element type, of a kernel that rounds to
/// `precision` on the way.
fn furthest(results: &[(Tensor, &Tensor)], precision: DType) -> Result<Option<(f64, f64)>, InterpError> {
    let mut worst: Option<(f64, f64)> = None;
    for (found, wanted) in results {
        let rounding = if wanted.dtype() == DType::I32 { 0.0 } else { tolerance_of(precision) };
        let (error, tolerance) = (distance(found, wanted)?, tolerance_of(wanted.dtype()).max(rounding));
        // Multiplied, as a tolerance may be zero; false if an error is not a number.
        let less = |(e, t): (f64, f64)| e.is_nan() || error * t <= e * tolerance && error <= e;
        if !worst.is_some_and(less) {
            worst = Some((error, tolerance));
        }
    }
    Ok(worst)
}

/// The largest [`distance`] of results from what they should be; NaN if one is.
fn largest_distance(results: &[Tensor], wanted: &[Tensor]) -> Result<f64, InterpError> {
    let mut largest = 0.0f64;
    for (a, b) in results.iter().zip(wanted) {
        let far = distance(a, b)?;
        largest = if far.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(far) };
    }
    Ok(largest)
}

/// `‖a − b‖ / ‖b‖`; for integers the share that differs.
fn distance(a: &Tensor, b: &Tensor) -> Result<f64, InterpError> {
    if b.dtype() == DType::I32 {
        let (a, b) = (a.to_i32()?, b.to_i32()?);
        let wrong = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        return Ok(wrong as f64 / b.len().max(1) as f64);
    }
    let (a, b) = (a.to_f32()?, b.to_f32()?);
    let (mut difference, mut norm) = (0.0f64, 0.0f64);
    // A masked score is -inf, and equal to another.
    for (&a, &b) in a.iter().zip(&b).filter(|(a, b)| a.is_finite() || a != b) {
        difference += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    Ok(if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::spec::{Computation, NormSource};
    use crate::compile::fuse;
    use crate::ir::StateRole;
    use crate::runtime::device::{Ticket, Timing};
    use crate::target::{Target, TargetKind};

    #[test]
    fn infinities_are_as_far_as_they_differ() {
        let tensor =
            |data: [f32; 3]| Tensor::new(DType::F32, vec![3], bytemuck::cast_slice(&data).to_vec()).unwrap();
        let of = |a, b| distance(&tensor(a), &tensor(b)).unwrap();
        let masked = [3.0, 4.0, f32::NEG_INFINITY];
        assert_eq!(of(masked, masked), 0.0);
        assert_eq!(of([3.0, 9.0, f32::NEG_INFINITY], masked), 1.0);
        assert!(of([3.0, 4.0, 5.0], masked).is_nan() && of(masked, [3.0, 4.0, 5.0]).is_infinite());
        assert!(of([f32::NAN; 3], [f32::NAN; 3]).is_nan());
    }

    /// The kernels of a step of the embedded model after `change`, each beside its body.
    fn checked(options: &Options, change: impl Fn(&mut Computation)) -> Vec<NodeCheck> {
        let file = Arc::new(model::embedded().unwrap());
        let step = Step { tokens: 2, wanted: 2, greedy: false, kv: options.kv, context: 8, sequences: 1 };
        let rows = step_rows(&step, &[0, 33], 0);
        let (graph, _) = fuse(file.gguf(), options, &step).unwrap();
        let graph = verify(graph).unwrap();
        let layouts = Layouts::choose([&graph], &options.target).unwrap();
        let (mut program, nodes) = codegen::generate_traced(&graph, &options.target, &layouts).unwrap();
        program.kernels.iter_mut().for_each(|kernel| change(&mut kernel.spec.computes));
        let here: Open<'_> = &|plan, file| open(plan, file, &DeviceOptions::default());
        let mut device = on_device(here, &file, options, program).unwrap();
        let (syms, before) = (rows.syms(), Caches::new());
        let leaf = |op: &Op, ty: &TensorType| leaf_of_model(&file, &before, &rows, op, ty);
        check_kernels(&graph, device.calls_of(&nodes), syms, &leaf).unwrap().nodes
    }

    /// A device that does nothing that it is given to do.
    struct Idle(Box<dyn Device>);

    impl Device for Idle {
        fn kind(&self) -> TargetKind {
            self.0.kind()
        }

        fn isa(&self) -> &str {
            self.0.isa()
        }

        fn submit(&mut self, _: &Submission) -> Result<Ticket, DeviceError> {
            Ok(Ticket(0))
        }

        fn wait(&mut self, _: Ticket) -> Result<(), DeviceError> {
            Ok(())
        }

        fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError> {
            self.0.write(program, to, bytes)
        }

        fn read(
            &mut self,
            program: usize,
            from: BufRef,
            first: u64,
            to: &mut [u8],
        ) -> Result<(), DeviceError> {
            self.0.read(program, from, first, to)
        }

        fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError> {
            self.0.copy_rows(role, from, to, rows)
        }

        fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), DeviceError> {
            self.0.fill_rows(role, first, rows, byte)
        }

        fn launch_counts(&self) -> Vec<u64> {
            self.0.launch_counts()
        }

        fn timings(&mut self) -> Result<Vec<Timing>, DeviceError> {
            self.0.timings()
        }
    }

    /// What a kernel leaves unwritten is not taken for its result, though the right one is there from before.
    #[test]
    fn results_that_are_not_written_are_seen() {
        let text = "graph @g(%x: f32[T,64]) sym T<=2, R<=2 { %y = quant_act %x : q8_act[T,64] return %y }";
        let graph = verify(Graph::parse(text).unwrap()).unwrap();
        let (file, options) = (Arc::new(model::embedded().unwrap()), default_path());
        let (program, nodes) =
            codegen::generate_traced(&graph, &options.target, &Layouts::default()).unwrap();
        let here: Open<'_> = &|plan, file| open(plan, file, &DeviceOptions::default());
        let mut device = on_device(here, &file, &options, program).unwrap();
        let x: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
        let leaf = |_: &Op, _: &TensorType| {
            Ok(Tensor::new(DType::F32, vec![2, 64], bytemuck::cast_slice(&x).to_vec())?)
        };
        let checked = |device: &mut OnDevice| {
            check_kernels(&graph, device.calls_of(&nodes), Syms { t: 2, r: 2 }, &leaf).unwrap()
        };
        let found = checked(&mut device);
        assert!(found.nodes[0].passes());
        let mut idle = OnDevice { plan: device.plan, device: Box::new(Idle(device.device)) };
        let result = *idle.plan.programs[0].calls[0].args.last().unwrap();
        let mut before = found.results[0].bytes().to_vec();
        before.fill(0);
        idle.device.read(0, result, 0, &mut before).unwrap();
        assert!(before.iter().any(|byte| *byte != 0 && *byte != 0xff), "the result is still there");
        assert!(!checked(&mut idle).nodes[0].passes());
    }

    fn default_path() -> Options {
        Options { context: Some(8), ..Options::new(Target::cpu()) }
    }

    #[test]
    fn a_step_beyond_its_bounds_is_an_error() {
        let file = Arc::new(model::embedded().unwrap());
        let options = default_path();
        let step = Step { tokens: 2, wanted: 1, greedy: false, kv: options.kv, context: 8, sequences: 1 };
        let checked = |tokens: &[i32]| {
            let device = DeviceOptions::default();
            check_step(&file, &options, &device, &step, tokens, 0, &mut Caches::new())
        };
        assert!(checked(&[0, 33]).unwrap().passes());
        let says = checked(&[0, 33, 280]).unwrap_err().to_string();
        assert_eq!(says, "a step of 3 token rows, 1 of them wanted, is more than 2 and 1");
    }

    #[test]
    fn a_kernel_that_is_not_its_body_is_named() {
        let nodes = checked(&default_path(), |computes| {
            if let Computation::RopeKv(rope_kv) = computes {
                rope_kv.rope.base *= 2.0;
            }
        });
        let outcome = StepCheck { step: "t2".into(), nodes, whole: 0.0 };
        assert!(!outcome.passes());
        assert_eq!(outcome.first_divergence().unwrap().kernel, "rope_kv");
        assert!(outcome.nodes.iter().all(|n| n.passes() == (n.kernel != "rope_kv")), "{:?}", outcome.nodes);
    }

    /// Every element type is held to its own bound, whatever the other results of the kernel are.
    #[test]
    fn results_of_every_type_are_seen() {
        let floats: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin() + 2.0).collect();
        let stored = |dtype, factor: f32| {
            let x: Vec<f32> = floats.iter().map(|x| x * factor).collect();
            let bytes = match dtype {
                DType::F32 => bytemuck::cast_slice(&x).to_vec(),
                DType::F16 => x.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
                DType::Q8Act => {
                    let mut bytes = vec![0; x.len() / 32 * DType::Q8Act.block_bytes()];
                    crate::gguf::dequant::quantise_q8_act(&x, &mut bytes).unwrap();
                    bytes
                }
                // One of all indices is another.
                _ => {
                    (0..256i32).flat_map(|i| (i + i32::from(i == 7 && factor != 1.0)).to_le_bytes()).collect()
                }
            };
            Tensor::new(dtype, vec![256], bytes).unwrap()
        };
        // A little within the bound, and a little beyond it.
        let dtypes = [(DType::F32, 1e-5), (DType::F16, 5e-4), (DType::Q8Act, 5e-3), (DType::I32, 0.0)];
        for (dtype, bound) in dtypes {
            let right = stored(dtype, 1.0);
            for (other, _) in dtypes {
                let same = stored(other, 1.0);
                let passes = |factor: f32| {
                    let wrong = stored(dtype, factor);
                    let found = [(wrong.clone(), &right), (same.clone(), &same)];
                    let turned = [(same.clone(), &same), (wrong, &right)];
                    let passes = [&found[..], &turned].map(|results| {
                        let (error, tolerance) = furthest(results, DType::F32).unwrap().unwrap();
                        assert!(factor == 1.0 || tolerance == bound, "{dtype} beside {other}: {tolerance}");
                        error <= tolerance
                    });
                    assert_eq!(passes[0], passes[1], "{dtype} beside {other}");
                    passes[0]
                };
                assert!(passes(1.0), "{dtype} beside {other}");
                assert!(
                    !passes(1.0 + 2.5 * bound.max(1e-3 * f64::from(bound == 0.0)) as f32),
                    "{dtype} beside {other}"
                );
            }
        }
        assert_eq!(furthest(&[], DType::F32).unwrap(), None);
    }

    /// The rows are right, and their norm, which comes second, is not.
    #[test]
    fn a_defect_of_a_later_result_is_found() {
        let nodes = checked(&default_path(), |computes| {
            if let Computation::Norm(norm) = computes
                && matches!(norm.source, NormSource::Embedding { .. })
            {
                assert!(norm.rows_out.is_some() && norm.rows_out < norm.quant_out, "the rows come first");
                norm.eps = 1e6;
            }
        });
        let (wrong, right): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|n| n.kernel == "dequant_rmsnorm");
        assert!(right.iter().all(NodeCheck::passes), "{right:?}");
        assert!(!wrong.is_empty() && wrong.iter().all(|n| !n.passes()), "{wrong:?}");
    }

    #[test]
    fn the_whole_counts_too() {
        let of = |whole| StepCheck { step: "t2".into(), nodes: vec![], whole }.passes();
        assert!(of(0.0) && of(9e-6));
        assert!(!of(3e-5) && !of(1.0) && !of(f64::NAN));

        let tensors = |rows: [f32; 2]| {
            rows.map(|x| Tensor::new(DType::F32, vec![1], x.to_le_bytes().to_vec()).unwrap())
        };
        let far = |found| largest_distance(&tensors(found), &tensors([4.0, 2.0])).unwrap();
        assert_eq!(
            [far([4.0, 2.0]), far([5.0, 2.0]), far([4.0, 3.0]), far([5.0, 3.0])],
            [0.0, 0.25, 0.5, 0.5]
        );
        assert!(far([f32::NAN, 3.0]).is_nan() && far([5.0, f32::NAN]).is_nan());
    }

    /// Of kernels with results of one type alone, those with a defect of a few tolerances fail, and no others do.
    #[test]
    fn a_small_defect_is_found() {
        let scale = |computes: &mut Computation| match computes {
            Computation::Attention(a) => a.scale *= 1.05,
            Computation::Op(Op::Scores { scale }) => *scale *= 1.0001,
            _ => {}
        };
        let exact = default_path().exact();
        let unfused = Options { pipeline: exact.pipeline.clone().without_fusions(), ..exact };
        for (kernel, options) in [("attention", default_path()), ("scores", unfused)] {
            let nodes = checked(&options, scale);
            let (wrong, right): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|n| n.kernel == kernel);
            assert!(right.iter().all(NodeCheck::passes), "{kernel}: {right:?}");
            assert_eq!(wrong.len(), 4, "{kernel}");
            for n in wrong {
                let times = n.error / n.tolerance;
                assert!(!n.passes() && times < 60.0, "{kernel}: {times} tolerances");
            }
        }
    }
}
