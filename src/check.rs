//! Checks a compiled model node by node: each kernel, on the device, against the interpretation of its body on the same
//! inputs; and the fused graph as a whole against the unfused.

mod kernels;
#[cfg(test)]
mod tests;

use crate::codegen::spec::Program;
use crate::codegen::{self, Layouts};
use crate::compile::{CompileError, Options};
use crate::gguf::{GgufError, GgufFile};
use crate::ir::{Graph, Op, Report, StepInput, Syms, TensorType, verify};
use crate::lower::{self, Config, Step};
use crate::model;
use crate::plan::{LoadedPlan, Plan, PlanError};
use crate::runtime::device::{Device, DeviceError, DeviceOptions, open};
use crate::runtime::interp::{InterpError, Tensor};
use crate::runtime::{Progress, Stage, StepRows};
use indexmap::IndexMap;
use kernels::{Walk, largest_distance};
use std::sync::Arc;

pub use kernels::{Calls, Checked, Leaf, NodeCheck, OnDevice, check_kernels};

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
    #[error("{at}: its kernel {kernel} writes beside its results")]
    Strays { at: String, kernel: &'static str },
    #[error(transparent)]
    Weight(#[from] GgufError),
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
    checked(open, &device.progress, file, options, step, tokens, cached, caches)
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
    checked(open, &Progress::default(), file, options, step, tokens, cached, caches)
}

#[expect(clippy::too_many_arguments, reason = "those of check_step_on, and whom to tell")]
fn checked(
    open: Open<'_>,
    progress: &Progress,
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
    let expected = Walk::new(&unfused, syms, &leaf).telling(progress, Stage::Interpreted).run()?;

    let mut fused = lowered;
    run(&mut fused, &options.pipeline)?;
    let invalid =
        |e: crate::ir::VerifyErrors| CompileError::Verify { stage: "fused", message: e.to_string() };
    let fused = verify(fused).map_err(invalid)?;
    let layouts = Layouts::choose([&fused], &options.target).map_err(CompileError::from)?;
    let generated = codegen::generate_traced(&fused, &options.target, &layouts);
    let (program, nodes) = generated.map_err(CompileError::from)?;
    let mut device = on_device(open, file, options, program)?;
    let walk = Walk::new(&fused, syms, &leaf).beside(device.calls_of(&nodes));
    let found = walk.telling(progress, Stage::Checked).run()?;

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
    let plan = Plan::build(model::parts(file, None, options, vec![(program, Report::default())])?)?;
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
