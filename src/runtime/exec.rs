//! The executor: runs the programs of a plan, step by step.

#[cfg(test)]
mod tests;

use super::cpu::CpuDevice;
use super::device::{Device, DeviceError, DeviceOptions};
use super::plan::{LoadedPlan, Plan, PlanError, PlannedProgram};
use crate::gguf::GgufFile;
use crate::ir::{DType, Syms};
use crate::target::TargetKind;
use indexmap::IndexMap;
use std::sync::Arc;

/// The input that [`Executor::forward`] writes the tokens' positions to, where a program has it.
pub const POSITIONS: &str = "pos";

/// A plan on a device, and the state of its caches.
pub struct Executor {
    plan: Arc<LoadedPlan>,
    device: Box<dyn Device>,
    /// The program that ran last, and at what.
    last: Option<(usize, Syms)>,
}

/// Why a step cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the plan has no program {name:?}, only {}", known.join(", "))]
    NoProgram { name: String, known: Vec<String> },
    #[error("program {program:?} takes 1 to {most} tokens a step, not {tokens}")]
    Tokens { program: String, tokens: u64, most: u64 },
    #[error(
        "{cached} cached tokens and {tokens} new ones exceed the context of {context}; use a larger one (-c)"
    )]
    Context { cached: u64, tokens: u64, context: u64 },
    #[error("program {program:?} takes the inputs {}", known.join(", "))]
    Inputs { program: String, known: Vec<String> },
    #[error("input {input:?} takes {want} bytes in this step, not {have}")]
    InputSize { input: String, want: u64, have: usize },
    #[error("input {input:?} must lie in 0..{below}, not {value}")]
    Value { input: String, value: i32, below: u64 },
    #[error("program {program:?} has {have} results, so none at {result}")]
    NoResult { program: String, result: usize, have: usize },
    #[error("result {result} is {have}, not {want}")]
    ResultType { result: usize, have: DType, want: DType },
    #[error("nothing has run yet, so there are no results")]
    Nothing,
}

impl Executor {
    /// Puts a plan and the weights of its model on the device that it was compiled for. All states are zero.
    ///
    /// # Errors
    /// If the plan was compiled for another model, other kernels or a device that is not here; if a kernel is
    /// missing; if there is not enough memory.
    pub fn new(
        plan: LoadedPlan,
        model: Arc<GgufFile>,
        options: &DeviceOptions,
    ) -> Result<Executor, ExecError> {
        plan.check_kernels()?;
        plan.check_model(&model.identity())?;
        let plan = Arc::new(plan);
        let device: Box<dyn Device> = match plan.target.kind {
            TargetKind::Cpu => Box::new(CpuDevice::new(&plan, model, options)?),
            kind @ (TargetKind::HipAmd | TargetKind::HipNvidia) => {
                return Err(DeviceError::Absent(kind).into());
            }
        };
        plan.check_device(device.kind())?;
        Ok(Executor { plan, device, last: None })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Runs `program` on `tokens`, with `cached` tokens before them. The tokens go to the input that is looked up
    /// in tables, their positions to [`POSITIONS`].
    ///
    /// # Errors
    /// As [`Executor::step`].
    pub fn forward(&mut self, program: &str, tokens: &[i32], cached: u64) -> Result<(), ExecError> {
        let (_, planned) = self.program(program)?;
        let ids = planned.inputs.iter().find(|i| i.below.is_some()).map(|i| i.name.clone());
        // A context fits i32; beyond it, `step` refuses before anything is written.
        let first = i32::try_from(cached).unwrap_or(i32::MAX);
        let positions: Vec<i32> = (0..tokens.len() as i32).map(|t| first.saturating_add(t)).collect();
        let mut inputs: Vec<(&str, &[u8])> = vec![];
        if let Some(ids) = &ids {
            inputs.push((ids, bytemuck::cast_slice(tokens)));
        }
        if planned.inputs.iter().any(|i| i.name == POSITIONS) {
            inputs.push((POSITIONS, bytemuck::cast_slice(&positions)));
        }
        self.step(program, tokens.len() as u64, cached, &inputs)
    }

    /// Runs `program` once on `tokens` tokens, with `cached` before them in the cache. `inputs` are all of the
    /// program's, by name, as little-endian bytes.
    ///
    /// # Errors
    /// If there is no such program, a symbol is out of bounds, or an input is missing, of the wrong size, or
    /// beyond the table that it is looked up in. The states are as before then.
    pub fn step(
        &mut self,
        program: &str,
        tokens: u64,
        cached: u64,
        inputs: &[(&str, &[u8])],
    ) -> Result<(), ExecError> {
        let _span = tracing::trace_span!("step", program, tokens, cached).entered();
        let (index, planned) = self.program(program)?;
        let bounds = planned.bounds;
        if tokens < 1 || tokens > bounds.t {
            return Err(ExecError::Tokens { program: program.into(), tokens, most: bounds.t });
        }
        if cached > bounds.p || cached.saturating_add(tokens) > bounds.s {
            return Err(ExecError::Context { cached, tokens, context: bounds.s });
        }
        let at = Syms { t: tokens, p: cached, s: bounds.s };
        let slots = matching(program, planned, inputs, &at)?;
        self.last = None;
        for (input, bytes) in slots {
            self.device.write_input(index, input, bytes)?;
        }
        self.device.run(index, &at)?;
        self.last = Some((index, at));
        Ok(())
    }

    /// Result `i` of the last step, as bytes.
    ///
    /// # Errors
    /// If there is none.
    pub fn result(&mut self, i: usize) -> Result<&[u8], ExecError> {
        self.typed_result(i, None)
    }

    /// Result `i` of the last step, such as logits `[T,V]`.
    ///
    /// # Errors
    /// If there is none, or it is not f32.
    pub fn result_f32(&mut self, i: usize) -> Result<&[f32], ExecError> {
        Ok(bytemuck::cast_slice(self.typed_result(i, Some(DType::F32))?))
    }

    /// Result `i` of the last step, such as the tokens chosen.
    ///
    /// # Errors
    /// If there is none, or it is not i32.
    pub fn result_i32(&mut self, i: usize) -> Result<&[i32], ExecError> {
        Ok(bytemuck::cast_slice(self.typed_result(i, Some(DType::I32))?))
    }

    /// The bytes of a result, at [`super::pool::ALIGN`].
    fn typed_result(&mut self, result: usize, want: Option<DType>) -> Result<&[u8], ExecError> {
        let (index, at) = self.last.ok_or(ExecError::Nothing)?;
        let (name, planned) = self.plan.programs.get_index(index).ok_or(ExecError::Nothing)?;
        let have = planned.results.len();
        let missing = || ExecError::NoResult { program: name.clone(), result, have };
        let ty = &planned.buffers[*planned.results.get(result).ok_or_else(missing)? as usize].ty;
        if let Some(want) = want.filter(|want| *want != ty.dtype) {
            return Err(ExecError::ResultType { result, have: ty.dtype, want });
        }
        // Within the arena, so it fits.
        let bytes = ty.bytes(&at) as usize;
        Ok(self.device.read_result(index, result, bytes)?)
    }

    /// Forgets everything: fills the states with zeros.
    ///
    /// # Errors
    /// If the device fails.
    pub fn reset(&mut self) -> Result<(), ExecError> {
        Ok(self.device.reset()?)
    }

    /// The symbols of the last step.
    #[cfg(test)]
    pub(crate) fn last(&self) -> Option<Syms> {
        self.last.map(|(_, at)| at)
    }

    /// The instruction set that the device's kernels use, by name.
    pub fn isa(&self) -> &'static str {
        self.device.isa()
    }

    /// How often each kernel was launched since the executor was made, by name; only those that were.
    pub fn launch_counts(&self) -> IndexMap<&'static str, u64> {
        let mut counts = IndexMap::new();
        for (kernel, n) in self.plan.kernels.iter().zip(self.device.launches()).filter(|(_, n)| *n > 0) {
            *counts.entry(kernel.name()).or_default() += n;
        }
        counts
    }

    fn program(&self, name: &str) -> Result<(usize, &PlannedProgram), ExecError> {
        match self.plan.programs.get_full(name) {
            Some((index, _, program)) => Ok((index, program)),
            None => {
                let known = self.plan.programs.keys().cloned().collect();
                Err(ExecError::NoProgram { name: name.into(), known })
            }
        }
    }
}

/// The index of each given input, if these are the inputs of the program with values that it takes.
fn matching<'a>(
    program: &str,
    planned: &PlannedProgram,
    given: &[(&str, &'a [u8])],
    at: &Syms,
) -> Result<Vec<(usize, &'a [u8])>, ExecError> {
    let wrong = || {
        let known = planned.inputs.iter().map(|i| i.name.clone()).collect();
        ExecError::Inputs { program: program.into(), known }
    };
    if given.len() != planned.inputs.len() {
        return Err(wrong());
    }
    let mut found = vec![];
    for (index, input) in planned.inputs.iter().enumerate() {
        let (_, bytes) = given.iter().find(|(name, _)| *name == input.name).ok_or_else(wrong)?;
        let want = planned.buffers[input.buffer as usize].ty.bytes(at);
        if bytes.len() as u64 != want {
            return Err(ExecError::InputSize { input: input.name.clone(), want, have: bytes.len() });
        }
        if let Some(below) = input.below {
            let values = bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b));
            let fits = |value: &i32| u64::try_from(*value).is_ok_and(|v| v < below);
            if let Some(value) = values.into_iter().find(|v| !fits(v)) {
                return Err(ExecError::Value { input: input.name.clone(), value, below });
            }
        }
        found.push((index, *bytes));
    }
    Ok(found)
}
