//! The CPU as a device.

use super::weights::Weights;
use super::{CpuKernel, Features, RawArg, Threads, bind};
use crate::codegen::spec::{Access, Implementation};
use crate::gguf::GgufFile;
use crate::ir::{StateRole, Syms, TensorType};
use crate::plan::{BufRef, LoadedPlan, Plan, PlannedCall, PlannedProgram, State};
use crate::runtime::device::{Device, DeviceError, DeviceOptions, Submission, Ticket, Timing};
use crate::target::TargetKind;
use memmap2::{MmapMut, MmapRaw};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Runs a plan on the threads of this machine. Weights are read where the model file is mapped, but for those that the plan has
/// repacked; states and arena are one allocation, of which the system provides what is touched.
pub struct CpuDevice {
    plan: Arc<LoadedPlan>,
    /// The launches of each kernel.
    kernels: Vec<Vec<Box<dyn CpuKernel>>>,
    programs: Vec<Vec<PlacedCall>>,
    memory: MmapRaw,
    threads: Threads,
    features: Features,
    /// Counted by the thread that ends a launch.
    launches: Vec<AtomicU64>,
    /// The arguments and items of the step's launches; kept to keep its memory.
    args: Vec<RawArg>,
    items: Vec<Option<usize>>,
    submitted: u64,
    timings: Vec<Timing>,
    /// The calls point into them.
    _weights: Weights,
}

/// A call with its arguments found.
struct PlacedCall {
    kernel: usize,
    args: Vec<(RawArg, TensorType)>,
}

impl CpuDevice {
    /// Binds the kernels, reserves the memory, loads the weights.
    ///
    /// # Errors
    /// If a kernel is missing, memory is short, or the model's tensors are not those of the plan.
    pub fn new(
        plan: &Arc<LoadedPlan>,
        model: Arc<GgufFile>,
        options: &DeviceOptions,
    ) -> Result<CpuDevice, DeviceError> {
        let features = options.features.unwrap_or_else(Features::detect);
        let missing = |kernel: &Implementation, why| DeviceError::Kernel {
            device: "cpu",
            kernel: kernel.spec.name(),
            why,
        };
        let bound = |kernel| bind(kernel, &features).map_err(|e| missing(kernel, e.to_string()));
        let kernels = plan.kernels.iter().map(bound).collect::<Result<_, _>>()?;
        let memory = reserve(plan)?;
        let threads = Threads::new(options.threads).map_err(|e| DeviceError::Threads(e.to_string()))?;
        let weights = Weights::load(plan, model, &threads, &features, &options.progress)?;
        let base = |arg: &BufRef, program: &PlannedProgram| match *arg {
            BufRef::Arena(i) => pool_at(&memory, plan.arena_offset + program.buffers[i as usize].offset),
            BufRef::State(i) => pool_at(&memory, plan.states[i as usize].offset),
            BufRef::Weight(i) => weights.at(i).cast_mut(),
        };
        let placed = |program: &PlannedProgram| {
            let one = |call: &PlannedCall| {
                let kernel = call.kernel as usize;
                let types = plan.kernels[kernel].args().map(|arg| arg.ty.clone());
                let at = call.args.iter().map(|arg| RawArg { ptr: base(arg, program), len: 0 });
                PlacedCall { kernel, args: at.zip(types).collect() }
            };
            program.calls.iter().map(one).collect()
        };
        let programs = plan.programs.iter().map(placed).collect();
        tracing::debug!(threads = threads.threads(), features = features.name(), "cpu device");
        Ok(CpuDevice {
            launches: plan.kernels.iter().map(|_| AtomicU64::new(0)).collect(),
            plan: plan.clone(),
            kernels,
            programs,
            memory,
            threads,
            features,
            args: vec![],
            items: vec![],
            submitted: 0,
            timings: vec![],
            _weights: weights,
        })
    }

    /// Where bytes of a buffer of a program, or of a state, lie.
    ///
    /// # Panics
    /// If the buffer has no such bytes, or is a weight: those are never written, and lie elsewhere.
    fn place(&self, program: usize, buffer: BufRef, first: u64, bytes: usize) -> *mut u8 {
        let planned = &self.plan.programs[program];
        let (offset, ty) = match buffer {
            BufRef::Arena(i) => {
                let buffer = &planned.buffers[i as usize];
                (self.plan.arena_offset + buffer.offset, &buffer.ty)
            }
            BufRef::State(i) => (self.plan.states[i as usize].offset, &self.plan.states[i as usize].ty),
            BufRef::Weight(i) => panic!("weight {i} is no memory of the pool"),
        };
        let room = ty.bytes(&planned.bounds);
        let fits = first.checked_add(bytes as u64).is_some_and(|end| end <= room);
        assert!(fits, "{buffer:?} has {room} bytes, so none at {first}..+{bytes}");
        pool_at(&self.memory, offset + first)
    }
}

impl CpuDevice {
    /// Where some rows of a state lie, and how many bytes they are.
    fn rows(&self, state: &State, first: u64, rows: u64) -> (*mut u8, usize) {
        let all = state.ty.first().as_const().unwrap_or(0);
        assert!(first.checked_add(rows).is_some_and(|end| end <= all), "rows {first}..+{rows} of {all}");
        let row = state.ty.bytes(&Syms { t: 0, r: 0 }) / all.max(1);
        (pool_at(&self.memory, state.offset + first * row), (rows * row) as usize)
    }
}

/// Memory for states and arena, all zero, without touching it, if there is as much beside the weights that are repacked.
pub(in crate::runtime) fn reserve(plan: &Plan) -> Result<MmapRaw, DeviceError> {
    let (weights, states, arena) = (plan.repacked_bytes(), plan.state_bytes(), plan.arena_bytes);
    let available = available_memory();
    let short = || DeviceError::Memory { context: plan.options.context, weights, states, arena, available };
    let bytes = plan.pool_bytes();
    if available.is_some_and(|most| bytes.saturating_add(weights) > most) {
        return Err(short());
    }
    let bytes = usize::try_from(bytes).map_err(|_| short())?;
    // Pages are aligned far beyond `ALIGN`; a map has at least one byte.
    Ok(MmapMut::map_anon(bytes.max(1)).map_err(|_| short())?.into())
}

/// What Linux could hand out without swapping, in bytes; none where nothing says so.
fn available_memory() -> Option<u64> {
    available_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// The same, as /proc/meminfo has it.
fn available_in(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// An address in the pool. Plans are validated, so every offset lies within.
fn pool_at(memory: &MmapRaw, offset: u64) -> *mut u8 {
    memory.as_mut_ptr().wrapping_add(offset as usize)
}

impl Device for CpuDevice {
    fn kind(&self) -> TargetKind {
        TargetKind::Cpu
    }

    fn isa(&self) -> &'static str {
        self.features.name()
    }

    /// The work is done when this returns: the thread that submits it is one of those that do it.
    fn submit(&mut self, work: &Submission) -> Result<Ticket, DeviceError> {
        let Submission { program, at, .. } = work;
        let bounds = self.plan.programs[*program].bounds;
        let inside = 1 <= at.t && at.t <= bounds.t && at.r <= bounds.r && at.r <= at.t;
        assert!(inside, "{at:?} is out of {bounds:?}");
        let calls = &self.programs[*program][work.calls.clone()];
        self.args.clear();
        self.items.clear();
        for call in calls {
            let kernel = &self.plan.kernels[call.kernel];
            let sized = |(raw, ty): &(RawArg, TensorType)| RawArg { len: ty.bytes(at) as usize, ..*raw };
            let first = self.args.len();
            self.args.extend(call.args.iter().map(sized));
            // Where no rows are wanted, nothing that only they need is launched.
            let written =
                kernel.args().zip(&self.args[first..]).filter(|(arg, _)| arg.access != Access::Read);
            let empty = written.into_iter().all(|(_, raw)| raw.len == 0);
            let launches = kernel.launches.iter();
            self.items.extend(launches.map(|launch| (!empty).then(|| launch.items(at) as usize)));
        }
        let (kernels, counts, args, items) = (&self.kernels, &self.launches, &self.args, &self.items);
        let ends: Option<Mutex<Vec<Instant>>> = work.timed.then(|| Mutex::new(vec![Instant::now()]));
        self.threads.run(&|worker| {
            let (mut args, mut items) = (&args[..], items.iter());
            for call in calls {
                let (own, rest) = args.split_at(call.args.len());
                args = rest;
                for (kernel, items) in kernels[call.kernel].iter().zip(items.by_ref()) {
                    let Some(items) = items else { continue };
                    // SAFETY: the plan is validated: within the bounds, as asserted, every argument fits its buffer,
                    // which lies in the pool or is a weight of this size; only the pool is written. Buffers overlap
                    // none that the call writes, but by `may_alias`. Launches are apart, as `share` ends in a
                    // barrier, and items are shared out once.
                    let run = |items: &mut dyn Iterator<Item = _>| unsafe { kernel.run(own, at, items) };
                    worker.share(*items, run, || {
                        counts[call.kernel].fetch_add(1, Ordering::Relaxed);
                        if let Some(ends) = &ends {
                            ends.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                        }
                    });
                }
            }
        });
        if let Some(ends) = ends {
            let ends = ends.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.timings = timings(&self.plan, work, &self.items, &ends);
        }
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<(), DeviceError> {
        assert!(ticket.0 <= self.submitted, "{ticket:?} is of another device");
        Ok(())
    }

    fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError> {
        let place = self.place(program, to, 0, bytes.len());
        // SAFETY: these bytes lie within the buffer, as `place` asserted, and the plan is validated, so within the pool. No launch
        // runs, as all end before `submit` returns.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(
        &mut self,
        program: usize,
        from: BufRef,
        first: u64,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        let place = self.place(program, from, first, bytes.len());
        // SAFETY: as in `write`; the pool was zero before anything wrote it, so all bytes are initialised.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(place, bytes.len()) };
        Ok(())
    }

    fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError> {
        for state in self.plan.states.iter().filter(|s| s.role == role) {
            let apart = from.saturating_add(rows) <= to || to.saturating_add(rows) <= from;
            assert!(apart, "rows {from}.. and {to}.. overlap");
            let (source, len) = self.rows(state, from, rows);
            let (target, _) = self.rows(state, to, rows);
            // SAFETY: both lie within the state, and apart, as asserted; no launch runs, as all end before `submit` returns.
            unsafe { source.copy_to_nonoverlapping(target, len) };
        }
        Ok(())
    }

    fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), DeviceError> {
        for state in self.plan.states.iter().filter(|s| s.role == role) {
            let (start, len) = self.rows(state, first, rows);
            // SAFETY: within the state, as asserted there; no launch runs.
            unsafe { start.write_bytes(byte, len) };
        }
        Ok(())
    }

    fn launch_counts(&self) -> Vec<u64> {
        self.launches.iter().map(|n| n.load(Ordering::Relaxed)).collect()
    }

    fn timings(&mut self) -> Result<Vec<Timing>, DeviceError> {
        Ok(self.timings.clone())
    }
}

/// The time of each launch of `work`, from the moments when they ended, after the one when the first began.
fn timings(plan: &Plan, work: &Submission, items: &[Option<usize>], ends: &[Instant]) -> Vec<Timing> {
    let calls = &plan.programs[work.program].calls[work.calls.clone()];
    let launches = work.calls.clone().zip(calls).flat_map(|(call, planned)| {
        let launches = plan.kernels[planned.kernel as usize].launches.len();
        (0..launches).map(move |launch| (call, launch))
    });
    let made = launches.zip(items).filter(|(_, items)| items.is_some());
    let spans = ends.windows(2).map(|pair| pair[1] - pair[0]);
    made.zip(spans).map(|(((call, launch), _), time)| Timing { call, launch, time }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_told_in_kibibytes() {
        let info = "MemTotal:       24683624 kB\nMemFree:        18123456 kB\nMemAvailable:   23101200 kB\nBuffers: 1 kB\n";
        assert_eq!(available_in(info), Some(23_101_200 << 10));
        for none in
            ["", "MemFree: 5 kB\n", "MemAvailable: x kB\n", "MemAvailable: 5\n", "MemAvailable: -1 kB"]
        {
            assert_eq!(available_in(none), None, "{none:?}");
        }
    }
}
