//! Codegen: a verified, fused graph becomes kernels and launches.
//!
//! Each node becomes one launch; views and leaves become buffers. A fused node's template and parameters are read off
//! its body, so what is launched is what the body says, or codegen fails. Equal kernels are shared.

mod args;
mod body;
mod cpu;
pub mod spec;
mod text;

use crate::ir::{Graph, Kernel, NodeId, Op, TensorType, Value, Verified};
use crate::target::{Target, TargetKind};
use args::Args;
pub use text::mark;

use spec::{BufId, Buffer, KernelSpec, Launch, Place, Primitive, Program, Template};
use std::collections::HashMap;

/// A graph that cannot become kernels.
#[derive(Debug, thiserror::Error)]
pub enum CodegenError {
    #[error("the body of {kernel} is not what the kernel computes: {detail}", kernel = kernel.name())]
    Body { kernel: Kernel, detail: String },
    #[error("{op} has no kernel here: {detail}")]
    NoKernel { op: &'static str, detail: String },
    #[error("there are kernels for cpu only, not yet for target {target}")]
    Target { target: String },
}

/// Where a program's parts came from.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// The node of each launch.
    pub launches: Vec<NodeId>,
    /// The buffer of each value.
    pub buffers: HashMap<Value, BufId>,
}

/// Turns a graph into kernels and launches, in the order of [`Graph::order`].
///
/// # Errors
/// A node that no kernel computes, or a target without kernels.
pub fn generate(graph: &Verified, target: &Target) -> Result<Program, CodegenError> {
    Ok(generate_traced(graph, target)?.0)
}

/// [`generate`], and which node and value each launch and buffer belongs to.
///
/// # Errors
/// As [`generate`].
pub fn generate_traced(graph: &Verified, target: &Target) -> Result<(Program, Trace), CodegenError> {
    let span = tracing::debug_span!("codegen", graph = %graph.name, target = %target.name);
    let _guard = span.enter();
    if target.kind != TargetKind::Cpu {
        return Err(CodegenError::Target { target: target.name.clone() });
    }
    let mut out = Generator {
        g: graph,
        buffers: vec![],
        kernels: vec![],
        launches: vec![],
        inputs: vec![],
        trace: Trace::default(),
    };
    for &id in graph.inputs() {
        let Op::Input { name, .. } = graph.op(id) else { continue };
        let buf = out.buffer(graph.ty(id.into()).clone(), Place::Arena);
        out.trace.buffers.insert(id.into(), buf);
        out.inputs.push((name.clone(), buf));
    }
    for id in graph.order() {
        out.node(id)?;
    }
    let is_state = |buf: &BufId| matches!(out.buffers[*buf as usize].place, Place::State { .. });
    let results = graph.results().iter().map(|v| out.trace.buffers[v]).filter(|b| !is_state(b)).collect();
    let (name, bounds) = (graph.name.clone(), graph.bounds);
    let Generator { buffers, kernels, launches, inputs, trace, .. } = out;
    tracing::debug!(kernels = kernels.len(), launches = launches.len());
    Ok((Program { name, bounds, kernels, launches, buffers, inputs, results }, trace))
}

struct Generator<'a> {
    g: &'a Graph,
    buffers: Vec<Buffer>,
    kernels: Vec<KernelSpec>,
    launches: Vec<Launch>,
    inputs: Vec<(String, BufId)>,
    trace: Trace,
}

impl Generator<'_> {
    fn buffer(&mut self, ty: TensorType, place: Place) -> BufId {
        self.buffers.push(Buffer { ty, place });
        self.buffers.len() as BufId - 1
    }

    fn node(&mut self, id: NodeId) -> Result<(), CodegenError> {
        let node = self.g.node(id);
        let operands = self.g.operands(id);
        match &node.op {
            Op::Input { .. } | Op::Return => Ok(()),
            Op::Weight { name } => {
                let buf = self.buffer(node.outs[0].clone(), Place::Weight(name.clone()));
                self.trace.buffers.insert(id.into(), buf);
                Ok(())
            }
            Op::State { name, role } => {
                let place = Place::State { name: name.clone(), role: *role };
                let buf = self.buffer(node.outs[0].clone(), place);
                self.trace.buffers.insert(id.into(), buf);
                Ok(())
            }
            op if op.is_view() => {
                self.trace.buffers.insert(id.into(), self.trace.buffers[&operands[0]]);
                Ok(())
            }
            Op::Fused(fused) => {
                let mut args = Args::new(self.g, id, &operands);
                let (template, aliases) = body::template(fused, &mut args)
                    .map_err(|detail| CodegenError::Body { kernel: fused.kernel, detail })?;
                self.launch(id, Some(fused.kernel), template, args, aliases)
            }
            Op::GatedScan => {
                let mut args = Args::new(self.g, id, &operands);
                let (template, aliases) = body::scan(&mut args, [0, 1, 2, 3, 4], None)
                    .map_err(|detail| CodegenError::NoKernel { op: node.op.name(), detail })?;
                self.launch(id, None, template, args, aliases)
            }
            op => {
                let mut args = Args::new(self.g, id, &operands);
                let (primitive, aliases) = args::primitive(op, &mut args)
                    .map_err(|detail| CodegenError::NoKernel { op: op.name(), detail })?;
                self.launch(id, None, Template::Primitive(primitive), args, aliases)
            }
        }
    }

    fn launch(
        &mut self,
        id: NodeId,
        kernel: Option<Kernel>,
        mut template: Template,
        args: Args,
        may_alias: Vec<spec::Alias>,
    ) -> Result<(), CodegenError> {
        let mut spec_args = args.args;
        let mut places = args.places;
        let grid = cpu::shape(&mut template, &mut spec_args, &mut places, &self.g.bounds);
        let mut bufs = Vec::with_capacity(places.len());
        for (arg, place) in spec_args.iter().zip(&places) {
            let buf = match place {
                args::ArgPlace::Operand(v) => self.trace.buffers[v],
                args::ArgPlace::Result(v) => {
                    let buf = self.buffer(arg.ty.clone(), Place::Arena);
                    self.trace.buffers.insert(*v, buf);
                    buf
                }
                args::ArgPlace::Scratch => self.buffer(arg.ty.clone(), Place::Arena),
            };
            bufs.push(buf);
        }
        // A cache's next version lies where the cache lies.
        for (old, new) in args.versions {
            self.trace.buffers.insert(new, self.trace.buffers[&old]);
        }
        let spec = KernelSpec { kernel, template, args: spec_args, may_alias, grid };
        let index = self.kernels.iter().position(|k| *k == spec).unwrap_or_else(|| {
            self.kernels.push(spec);
            self.kernels.len() - 1
        });
        self.trace.launches.push(id);
        self.launches.push(Launch { kernel: index as u32, args: bufs, label: self.g.describe(id) });
        Ok(())
    }
}

/// The primitive operation as a kernel, if it is one.
fn primitive_of(op: &Op) -> Option<Primitive> {
    Some(match op {
        Op::Const { value } => Primitive::Fill { value: *value },
        Op::GetRows => Primitive::GetRows,
        Op::Dequant => Primitive::Dequant,
        Op::QuantAct => Primitive::QuantAct,
        Op::MatMul => Primitive::MatMul,
        Op::Add => Primitive::Add,
        Op::Mul => Primitive::Mul,
        Op::Silu => Primitive::Silu,
        Op::RmsNorm { eps } => Primitive::RmsNorm { eps: *eps },
        Op::Rope(rope) => Primitive::Rope(*rope),
        Op::KvAppend => Primitive::KvAppend,
        Op::KvRead { page } => Primitive::KvRead { page: *page },
        Op::Scores { scale } => Primitive::Scores { scale: *scale },
        Op::CausalMask { window } => Primitive::CausalMask { window: *window },
        Op::Softmax => Primitive::Softmax,
        Op::WeightedSum => Primitive::WeightedSum,
        Op::ArgMax => Primitive::ArgMax,
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Reshape
        | Op::GatedScan
        | Op::Fused(_)
        | Op::Return => return None,
    })
}
