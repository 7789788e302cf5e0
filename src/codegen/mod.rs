//! Codegen: a verified, fused graph becomes kernels and calls of them.
//!
//! Each node becomes one call; views and leaves become buffers. *What* a kernel computes is read off its node
//! ([`crate::ir::fused`]), so what is launched is what the body says, or codegen fails. *How* is up to the [`Backend`] of
//! the target. Equal kernels are shared.

mod cpu;
mod hip;
mod in_place;
mod layouts;
pub mod spec;
mod text;

use crate::ir::fused::Computation;
use crate::ir::{Graph, Kernel, NodeId, Op, TensorType, Value, Verified};
use crate::target::{Target, TargetKind};
use spec::{
    Access, Arg, ArgId, BufId, Buffer, Call, Implementation, Index, IndexSource, KernelSpec, Layout, Place,
    Program,
};
use std::collections::HashMap;

pub use layouts::Layouts;
pub use text::mark;

/// A graph that cannot become kernels.
#[derive(Debug, thiserror::Error)]
pub enum CodegenError {
    #[error("the body of {kernel} is not what the kernel computes: {detail}", kernel = kernel.name())]
    Body { kernel: Kernel, detail: String },
    #[error("{op} has no kernel here: {detail}")]
    NoKernel { op: &'static str, detail: String },
}

/// A family of devices: what decides how kernels are launched there.
pub trait Backend: Sync {
    /// How a weight that all `uses` read, each as the argument of a kernel, is to lie in memory.
    fn layout(&self, weight: &TensorType, uses: &[(KernelSpec, ArgId)]) -> Layout;

    /// How a kernel is implemented for steps within `bounds`, where weights lie as `layouts` say: one or several launches, with
    /// their grids, workspace and permitted aliases. What `given` lists, weights and inputs, no call of the program writes.
    /// `body` is a fused node's in text, for people who read what is emitted.
    ///
    /// # Errors
    /// Why there is no such kernel.
    fn emit(
        &self,
        spec: KernelSpec,
        layouts: Vec<(ArgId, Layout)>,
        given: &[ArgId],
        body: &[String],
        bounds: &crate::ir::Syms,
        target: &Target,
    ) -> Result<Implementation, String>;
}

/// The back end of a kind of targets.
pub fn backend(kind: TargetKind) -> &'static dyn Backend {
    match kind {
        TargetKind::Cpu => &cpu::Cpu,
        TargetKind::HipAmd | TargetKind::HipNvidia => &hip::Hip,
    }
}

/// Turns a graph into kernels and calls, in the order of [`Graph::order`]. Weights lie as `layouts` say, which are those of all
/// graphs that share them.
///
/// # Errors
/// A node that no kernel computes.
pub fn generate(graph: &Verified, target: &Target, layouts: &Layouts) -> Result<Program, CodegenError> {
    Ok(generate_traced(graph, target, layouts)?.0)
}

/// [`generate`], and the node of each call. The arguments of a call are those of its [`KernelSpec`], then the workspace.
///
/// # Errors
/// As [`generate`].
pub fn generate_traced(
    graph: &Verified,
    target: &Target,
    layouts: &Layouts,
) -> Result<(Program, Vec<NodeId>), CodegenError> {
    let span = tracing::debug_span!("codegen", graph = %graph.name, target = %target.name);
    let _guard = span.enter();
    let mut out = Generator {
        g: graph,
        backend: backend(target.kind),
        target,
        layouts,
        buffers: vec![],
        kernels: vec![],
        calls: vec![],
        inputs: vec![],
        nodes: vec![],
        values: HashMap::new(),
    };
    for &id in graph.inputs() {
        let Op::Input { name, .. } = graph.op(id) else { continue };
        let buf = out.buffer(graph.ty(id.into()).clone(), Place::Arena);
        out.values.insert(id.into(), buf);
        out.inputs.push((name.clone(), buf));
    }
    for id in graph.order() {
        out.node(id)?;
    }
    let is_state = |buf: &BufId| matches!(out.buffers[*buf as usize].place, Place::State { .. });
    let results = graph.results().iter().map(|v| out.values[v]).filter(|b| !is_state(b)).collect();
    let (name, bounds) = (graph.name.clone(), graph.bounds);
    let Generator { buffers, kernels, calls, inputs, nodes, .. } = out;
    tracing::debug!(kernels = kernels.len(), calls = calls.len());
    Ok((Program { name, bounds, kernels, calls, buffers, inputs, results }, nodes))
}

struct Generator<'a> {
    g: &'a Graph,
    backend: &'a dyn Backend,
    target: &'a Target,
    layouts: &'a Layouts,
    buffers: Vec<Buffer>,
    kernels: Vec<Implementation>,
    calls: Vec<Call>,
    inputs: Vec<(String, BufId)>,
    /// The node of each call.
    nodes: Vec<NodeId>,
    /// The buffer of each value.
    values: HashMap<Value, BufId>,
}

impl Generator<'_> {
    fn buffer(&mut self, ty: TensorType, place: Place) -> BufId {
        self.buffers.push(Buffer { ty, place });
        self.buffers.len() as BufId - 1
    }

    fn node(&mut self, id: NodeId) -> Result<(), CodegenError> {
        let node = self.g.node(id);
        let place = match &node.op {
            Op::Input { .. } | Op::Return => return Ok(()),
            Op::Weight { name, rows } => {
                let layout = self.layouts.of(name, *rows);
                Place::Weight { name: name.clone(), rows: *rows, layout }
            }
            Op::State { name, role } => Place::State { name: name.clone(), role: *role },
            op if op.is_view() => {
                let viewed = self.g.operand(id, 0).and_then(|v| self.values.get(&v).copied());
                self.values.extend(viewed.map(|buf| (Value::from(id), buf)));
                return Ok(());
            }
            _ => return self.call(id),
        };
        let buf = self.buffer(node.outs[0].clone(), place);
        self.values.insert(id.into(), buf);
        Ok(())
    }

    fn call(&mut self, id: NodeId) -> Result<(), CodegenError> {
        let op = self.g.op(id);
        let no_kernel = |detail| CodegenError::NoKernel { op: op.name(), detail };
        let mut args: Vec<BufId> = self.g.operands(id).iter().map(|v| self.values[v]).collect();
        let layout = |buf: &BufId| match self.buffers[*buf as usize].place {
            Place::Weight { layout, .. } if layout != Layout::RowMajor => Some(layout),
            _ => None,
        };
        let layouts = (0..).zip(&args).filter_map(|(arg, buf)| Some((arg, layout(buf)?))).collect();
        let is_given = |v: &Value| matches!(self.g.op(v.node), Op::Weight { .. } | Op::Input { .. });
        let operands = self.g.operands(id);
        let given: Vec<ArgId> =
            (0..).zip(&operands).filter(|(_, v)| is_given(v)).map(|(arg, _)| arg).collect();
        let body = match op {
            Op::Fused(fused) => fused.body.statements(),
            _ => vec![],
        };
        let spec = kernel_spec(self.g, id)?;
        let kernel = self.backend.emit(spec, layouts, &given, &body, &self.g.bounds, self.target);
        let kernel = kernel.map_err(no_kernel)?;
        let writes = op.writes();
        for out in 0..self.g.node(id).outs.len() as u32 {
            let v = Value { node: id, out };
            // A state's next version lies where the state lies.
            let buf = match writes.iter().find(|(_, result)| *result == out) {
                Some((state, _)) => args[*state as usize],
                None => {
                    args.push(self.buffer(self.g.ty(v).clone(), Place::Arena));
                    args[args.len() - 1]
                }
            };
            self.values.insert(v, buf);
        }
        for room in &kernel.workspace {
            args.push(self.buffer(room.ty.clone(), Place::Arena));
        }
        let index = self.kernels.iter().position(|k| *k == kernel).unwrap_or_else(|| {
            self.kernels.push(kernel);
            self.kernels.len() - 1
        });
        self.nodes.push(id);
        self.calls.push(Call { kernel: index as u32, args, label: self.g.describe(id) });
        Ok(())
    }
}

/// What a node computes, of which arguments.
fn kernel_spec(g: &Graph, id: NodeId) -> Result<KernelSpec, CodegenError> {
    let (op, operands) = (g.op(id), g.operands(id));
    let types: Vec<&TensorType> = operands.iter().map(|v| g.ty(*v)).collect();
    let computes = Computation::of(op, &types).map_err(|detail| match op {
        Op::Fused(fused) => CodegenError::Body { kernel: fused.kernel, detail },
        op => CodegenError::NoKernel { op: op.name(), detail },
    })?;
    let writes = op.writes();
    let mut args = vec![];
    for (slot, v) in (0u32..).zip(&operands) {
        let updates = writes.iter().any(|(state, _)| *state == slot);
        let mut arg = Arg::new(if updates { Access::Update } else { Access::Read }, g.ty(*v).clone());
        arg.index = op.follows(slot, &types).map(|(below, distinct)| {
            let is_input = matches!(g.op(v.node), Op::Input { .. });
            let source = if is_input { IndexSource::Input } else { IndexSource::Device };
            Index { below, distinct, source }
        });
        args.push(arg);
    }
    for (out, ty) in (0u32..).zip(&g.node(id).outs) {
        if !writes.iter().any(|(_, result)| *result == out) {
            args.push(Arg::new(Access::Write, ty.clone()));
        }
    }
    Ok(KernelSpec { kernel: op.kernel(), computes, args })
}
