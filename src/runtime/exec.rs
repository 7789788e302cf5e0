//! The executor: runs the programs of a plan, step by step.

#[cfg(test)]
mod tests;

use super::device::{Device, DeviceError, DeviceOptions, Submission, Ticket, Timing, open};
use super::progress::Progress;
use crate::gguf::GgufFile;
use crate::ir::{DType, StateRole, StepInput, Syms, TensorType};
use crate::plan::{BufRef, Input, LoadedPlan, Plan, PlanError, PlannedProgram, State};
use indexmap::IndexMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The inputs of a step over some sequences (see [`crate::ir::step`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepRows {
    pub tokens: Vec<i32>,
    pub positions: Vec<i32>,
    pub sequences: Vec<i32>,
    pub rows: Vec<i32>,
    pub tables: Vec<i32>,
    pub lengths: Vec<i32>,
    pub wanted: Vec<i32>,
}

impl StepRows {
    /// The sizes of the step.
    pub fn syms(&self) -> Syms {
        Syms { t: self.tokens.len() as u64, r: self.wanted.len() as u64 }
    }

    /// The values of an input.
    pub fn of(&self, input: StepInput) -> &[i32] {
        match input {
            StepInput::Tokens => &self.tokens,
            StepInput::Positions => &self.positions,
            StepInput::Sequences => &self.sequences,
            StepInput::Rows => &self.rows,
            StepInput::Tables => &self.tables,
            StepInput::Lengths => &self.lengths,
            StepInput::Wanted => &self.wanted,
        }
    }
}

/// A plan on a device, and the state of its caches.
pub struct Executor {
    plan: Arc<LoadedPlan>,
    device: Box<dyn Device>,
    /// The program that was submitted last, and at what.
    last: Option<(usize, Syms, Ticket)>,
    /// Whether launches are timed.
    timed: bool,
    /// Room for what is viewed of results.
    viewed: Vec<u32>,
    uploads: Transfer,
    progress: Progress,
}

/// Bytes that went from the host to the device or back, and how long the host was at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    pub bytes: u64,
    pub time: Duration,
}

/// Why a step cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the plan has no program {program}: there are {have}")]
    NoProgram { program: usize, have: usize },
    #[error("program {program:?} takes 1 to {} token rows a step, of which 0 to {} wanted, not {} of which {}", .bounds.t, .bounds.r, .at.t, .at.r)]
    Sizes { program: String, bounds: Syms, at: Syms },
    #[error("program {program:?} takes the inputs {}", known.join(", "))]
    Inputs { program: String, known: Vec<String> },
    #[error("input {input:?} takes {want} bytes in this step, not {have}")]
    InputSize { input: String, want: u64, have: usize },
    #[error("input {input:?} must lie in 0..{below}, not {value}")]
    Value { input: String, value: i32, below: u64 },
    #[error("program {program:?} has {have} results, so none at {result}")]
    NoResult { program: String, result: usize, have: usize },
    #[error("result {result} has {all} rows, so none at {} to {}", .rows.start, .rows.end)]
    NoResultRows { result: usize, rows: Range<u64>, all: u64 },
    #[error("result {result} is {have}, not {want}")]
    ResultType { result: usize, have: DType, want: DType },
    #[error("input {input:?} must not have {value} twice")]
    Twice { input: String, value: i32 },
    #[error("state {state:?} has no rows {first} to {}", first.saturating_add(*rows))]
    NoRows { state: String, first: u64, rows: u64 },
    #[error("{rows} rows from {from} and from {to} on overlap")]
    Overlap { from: u64, to: u64, rows: u64 },
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
        plan.require_kernels()?;
        plan.require_model(&model.identity())?;
        let plan = Arc::new(plan);
        let device = open(&plan, model, options)?;
        Ok(Executor { progress: options.progress.clone(), ..Executor::on(device, plan)? })
    }

    /// The same, on a device that holds the plan already.
    fn on(device: Box<dyn Device>, plan: Arc<LoadedPlan>) -> Result<Executor, ExecError> {
        plan.require_device(device.kind())?;
        let uploads = Transfer::default();
        let progress = Progress::default();
        Ok(Executor { plan, device, last: None, timed: false, viewed: vec![], uploads, progress })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Who is told how far things are.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Begins the program of this index on rows of sequences.
    ///
    /// # Errors
    /// As [`Executor::step`].
    pub fn forward(&mut self, program: usize, step: &StepRows) -> Result<(), ExecError> {
        let plan = Arc::clone(&self.plan);
        let have = plan.programs.len();
        let planned = plan.programs.get(program).ok_or(ExecError::NoProgram { program, have })?;
        let mut inputs: Vec<(&str, &[u8])> = vec![];
        for input in &planned.inputs {
            let known = StepInput::from_name(&input.name);
            inputs.extend(known.map(|known| (input.name.as_str(), bytemuck::cast_slice(step.of(known)))));
        }
        self.step(program, &step.syms(), &inputs)
    }

    /// Begins the program of this index. It is over when [`Executor::wait`] returns, or a result was read. `inputs` are all of the program's, by name, as little-endian bytes.
    ///
    /// # Errors
    /// If there is no such program, a symbol is out of bounds, or an input is missing, of the wrong size, or has values
    /// that kernels cannot follow. The states are as before then.
    pub fn step(&mut self, program: usize, at: &Syms, inputs: &[(&str, &[u8])]) -> Result<(), ExecError> {
        let planned = self.program(program)?;
        let _span = tracing::trace_span!("step", program = planned.name, t = at.t, r = at.r).entered();
        let bounds = planned.bounds;
        if at.t < 1 || at.t > bounds.t || at.r > bounds.r || at.r > at.t {
            return Err(ExecError::Sizes { program: planned.name.clone(), bounds, at: *at });
        }
        let slots = matching(planned, inputs, at)?;
        self.last = None;
        let before = Instant::now();
        for (input, bytes) in slots {
            self.device.write(program, input, bytes)?;
            self.uploads.bytes += bytes.len() as u64;
        }
        self.uploads.time += before.elapsed();
        let calls = 0..self.program(program)?.calls.len();
        let ticket = self.device.submit(&Submission { program, calls, at: *at, timed: self.timed })?;
        self.last = Some((program, *at, ticket));
        Ok(())
    }

    /// The inputs of all steps so far. A GPU takes them while the host goes on.
    pub fn uploads(&self) -> Transfer {
        self.uploads
    }

    /// Whether each launch of the steps from here on is timed, which may slow them down: see [`Executor::timings`].
    pub fn time_launches(&mut self, timed: bool) {
        self.timed = timed;
    }

    /// The program of the last step, at what it ran, and how long each of its launches took, in order; none if no step was timed.
    ///
    /// # Errors
    /// If the device fails.
    pub fn timings(&mut self) -> Result<Option<(usize, Syms, Vec<Timing>)>, ExecError> {
        let Some((program, at, _)) = self.last.filter(|_| self.timed) else { return Ok(None) };
        Ok(Some((program, at, self.device.timings()?)))
    }

    /// Waits until the last step is over, if there was one.
    ///
    /// # Errors
    /// If the device fails.
    pub fn wait(&mut self) -> Result<(), ExecError> {
        match self.last {
            Some((_, _, ticket)) => Ok(self.device.wait(ticket)?),
            None => Ok(()),
        }
    }

    /// Result `i` of the last step, as bytes.
    ///
    /// # Errors
    /// If there is none.
    pub fn result(&mut self, i: usize) -> Result<Vec<u8>, ExecError> {
        let (place, ty, at) = self.result_of(i, None)?;
        // Within the arena, so it fits.
        let mut bytes = vec![0; ty.bytes(&at) as usize];
        self.read(place, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Rows of result `i` of the last step, such as logits `[T,V]`, in place of what `to` holds.
    ///
    /// # Errors
    /// If there are none, or they are not f32.
    pub fn read_f32(&mut self, i: usize, rows: Range<u64>, to: &mut Vec<f32>) -> Result<(), ExecError> {
        self.read_rows(i, DType::F32, rows, to)
    }

    /// Rows of result `i` of the last step, such as logits `[T,V]`, without a copy of one's own: good until the next call. What is
    /// changed there is changed nowhere else.
    ///
    /// # Errors
    /// If there are none, or they are not f32.
    pub fn view_f32(&mut self, i: usize, rows: Range<u64>) -> Result<&mut [f32], ExecError> {
        let (place, first, elements) = self.rows_of(i, DType::F32, rows)?;
        let (_, _, ticket) = self.last.ok_or(ExecError::Nothing)?;
        let place = (place.0, BufRef::Arena(place.1));
        let len = elements * size_of::<f32>();
        Ok(bytemuck::cast_slice_mut(self.device.view(ticket, place, first, len, &mut self.viewed)?))
    }

    /// Rows of result `i` of the last step, such as the tokens chosen, in place of what `to` holds.
    ///
    /// # Errors
    /// If there are none, or they are not i32.
    pub fn read_i32(&mut self, i: usize, rows: Range<u64>, to: &mut Vec<i32>) -> Result<(), ExecError> {
        self.read_rows(i, DType::I32, rows, to)
    }

    fn read_rows<E: bytemuck::Pod>(
        &mut self,
        result: usize,
        want: DType,
        rows: Range<u64>,
        to: &mut Vec<E>,
    ) -> Result<(), ExecError> {
        let (place, first, elements) = self.rows_of(result, want, rows)?;
        to.resize(elements, E::zeroed());
        self.read(place, first, bytemuck::cast_slice_mut(to))
    }

    /// Where rows of a result lie: its buffer, the first byte in it, and how many elements there are.
    fn rows_of(
        &self,
        result: usize,
        want: DType,
        rows: Range<u64>,
    ) -> Result<((usize, u32), u64, usize), ExecError> {
        let (place, ty, at) = self.result_of(result, Some(want))?;
        let all = ty.first().eval(&at);
        if rows.start > rows.end || rows.end > all {
            return Err(ExecError::NoResultRows { result, rows, all });
        }
        let row = TensorType::new(want, ty.shape[1..].iter().copied());
        let first = rows.start * row.bytes(&at);
        Ok((place, first, ((rows.end - rows.start) * row.elements(&at)) as usize))
    }

    fn read(&mut self, (program, buffer): (usize, u32), first: u64, to: &mut [u8]) -> Result<(), ExecError> {
        self.wait()?;
        Ok(self.device.read(program, BufRef::Arena(buffer), first, to)?)
    }

    /// Where a result lies, its type, and the sizes of the step.
    fn result_of(
        &self,
        result: usize,
        want: Option<DType>,
    ) -> Result<((usize, u32), TensorType, Syms), ExecError> {
        let (index, at, _) = self.last.ok_or(ExecError::Nothing)?;
        let planned = self.program(index)?;
        let have = planned.results.len();
        let missing = || ExecError::NoResult { program: planned.name.clone(), result, have };
        let buffer = *planned.results.get(result).ok_or_else(missing)?;
        let ty = planned.buffers[buffer as usize].ty.clone();
        if let Some(want) = want.filter(|want| *want != ty.dtype) {
            return Err(ExecError::ResultType { result, have: ty.dtype, want });
        }
        Ok(((index, buffer), ty, at))
    }

    /// Copies rows of every state of a role to other rows of it.
    ///
    /// # Errors
    /// If some state has no such rows, the rows overlap, or the device fails.
    pub fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), ExecError> {
        self.check_rows(role, from, rows)?;
        self.check_rows(role, to, rows)?;
        if from.abs_diff(to) < rows {
            return Err(ExecError::Overlap { from, to, rows });
        }
        Ok(self.device.copy_rows(role, from, to, rows)?)
    }

    /// Fills rows of every state of a role with a byte, to show that nothing reads them.
    ///
    /// # Errors
    /// If some state has no such rows, or the device fails.
    pub fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), ExecError> {
        self.check_rows(role, first, rows)?;
        Ok(self.device.fill_rows(role, first, rows, byte)?)
    }

    fn check_rows(&self, role: StateRole, first: u64, rows: u64) -> Result<(), ExecError> {
        let within = |state: &State| {
            let all = state.ty.first().as_const().unwrap_or(0);
            first.checked_add(rows).is_some_and(|end| end <= all)
        };
        match self.plan.states.iter().find(|state| state.role == role && !within(state)) {
            Some(state) => Err(ExecError::NoRows { state: state.name.clone(), first, rows }),
            None => Ok(()),
        }
    }

    /// The instruction set or architecture that the device's kernels use, by name.
    pub fn isa(&self) -> &str {
        self.device.isa()
    }

    /// How many steps were replayed as a graph since the executor was made.
    pub fn replays(&self) -> u64 {
        self.device.replays()
    }

    /// How often each kernel was launched since the executor was made, by name; only those that were.
    pub fn launch_counts(&self) -> IndexMap<&'static str, u64> {
        let mut counts = IndexMap::new();
        for (kernel, n) in self.plan.kernels.iter().zip(self.device.launch_counts()).filter(|(_, n)| *n > 0) {
            *counts.entry(kernel.spec.name()).or_default() += n;
        }
        counts
    }

    fn program(&self, index: usize) -> Result<&PlannedProgram, ExecError> {
        let have = self.plan.programs.len();
        self.plan.programs.get(index).ok_or(ExecError::NoProgram { program: index, have })
    }
}

/// The buffer of each given input, if these are the inputs of the program with values that it takes.
fn matching<'a>(
    planned: &PlannedProgram,
    given: &[(&str, &'a [u8])],
    at: &Syms,
) -> Result<Vec<(BufRef, &'a [u8])>, ExecError> {
    let wrong = || {
        let known = planned.inputs.iter().map(|i| i.name.clone()).collect();
        ExecError::Inputs { program: planned.name.clone(), known }
    };
    if given.len() != planned.inputs.len() {
        return Err(wrong());
    }
    let mut found = vec![];
    for input in &planned.inputs {
        let (_, bytes) = given.iter().find(|(name, _)| *name == input.name).ok_or_else(wrong)?;
        let want = planned.buffers[input.buffer as usize].ty.bytes(at);
        if bytes.len() as u64 != want {
            return Err(ExecError::InputSize { input: input.name.clone(), want, have: bytes.len() });
        }
        if let Some(below) = input.below {
            check_values(input, bytes, below.eval(at))?;
        }
        found.push((BufRef::Arena(input.buffer), *bytes));
    }
    Ok(found)
}

/// Holds the values of an input to what kernels follow.
fn check_values(input: &Input, bytes: &[u8], below: u64) -> Result<(), ExecError> {
    let values = || bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b));
    let fits = |value: &i32| u64::try_from(*value).is_ok_and(|v| v < below);
    if let Some(value) = values().find(|v| !fits(v)) {
        return Err(ExecError::Value { input: input.name.clone(), value, below });
    }
    if input.distinct && bytes.len() > size_of::<i32>() {
        let mut sorted: Vec<i32> = values().collect();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ExecError::Twice { input: input.name.clone(), value: pair[0] });
        }
    }
    Ok(())
}
