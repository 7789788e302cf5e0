//! The CPU as a device.

use super::{CpuKernel, Features, Pool, RawArg, bind};
use crate::codegen::spec::{Access, KernelSpec};
use crate::gguf::GgufFile;
use crate::ir::{StateRole, Syms, TensorType};
use crate::plan::{BufRef, LoadedPlan, Plan, PlannedLaunch, PlannedProgram, State};
use crate::runtime::device::{Device, DeviceError, DeviceOptions};
use crate::runtime::weights::find_weights;
use crate::target::TargetKind;
use memmap2::{MmapMut, MmapRaw};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs a plan on the threads of this machine. Weights are read where the model file is mapped; states and arena
/// are one allocation, of which the system provides what is touched.
pub struct CpuDevice {
    plan: Arc<LoadedPlan>,
    kernels: Vec<Box<dyn CpuKernel>>,
    programs: Vec<Vec<Launch>>,
    memory: MmapRaw,
    threads: Pool,
    features: Features,
    /// Counted by the thread that ends a launch.
    launches: Vec<AtomicU64>,
    /// The arguments and items of the step's launches; kept to keep its memory.
    args: Vec<RawArg>,
    items: Vec<Option<usize>>,
    /// The launches point into its bytes.
    _model: Arc<GgufFile>,
}

/// A launch with its arguments found.
struct Launch {
    kernel: usize,
    args: Vec<(RawArg, TensorType)>,
}

impl CpuDevice {
    /// Binds the kernels, reserves the memory, finds the weights.
    ///
    /// # Errors
    /// If a kernel is missing, memory is short, or the model's tensors are not those of the plan.
    pub fn new(
        plan: &Arc<LoadedPlan>,
        model: Arc<GgufFile>,
        options: &DeviceOptions,
    ) -> Result<CpuDevice, DeviceError> {
        let features = options.features.unwrap_or_else(Features::detect);
        let missing =
            |spec: &KernelSpec, why: String| DeviceError::Kernel { device: "cpu", kernel: spec.name(), why };
        let bound = |spec| bind(spec, &features).map_err(|e| missing(spec, e.to_string()));
        let kernels = plan.kernels.iter().map(bound).collect::<Result<_, _>>()?;
        let memory = reserve(plan)?;
        let weights = find_weights(plan, &model)?;
        let base = |arg: &BufRef, program: &PlannedProgram| match *arg {
            BufRef::Arena(i) => pool_at(&memory, plan.arena_offset + program.buffers[i as usize].offset),
            BufRef::State(i) => pool_at(&memory, plan.states[i as usize].offset),
            BufRef::Weight(i) => weights[i as usize].as_ptr().cast_mut(),
        };
        let placed = |program: &PlannedProgram| {
            let one = |launch: &PlannedLaunch| {
                let kernel = launch.kernel as usize;
                let types = plan.kernels[kernel].args.iter().map(|arg| arg.ty.clone());
                let at = launch.args.iter().map(|arg| RawArg { ptr: base(arg, program), len: 0 });
                Launch { kernel, args: at.zip(types).collect() }
            };
            program.launches.iter().map(one).collect()
        };
        let programs = plan.programs.iter().map(placed).collect();
        let threads = Pool::new(options.threads).map_err(|e| DeviceError::Threads(e.to_string()))?;
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
            _model: model,
        })
    }

    /// Where a buffer of a program lies.
    fn buffer(&self, program: usize, buffer: u32) -> *mut u8 {
        let offset = self.plan.programs[program].buffers[buffer as usize].offset;
        pool_at(&self.memory, self.plan.arena_offset + offset)
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

/// Memory for states and arena, all zero, without touching it.
pub(in crate::runtime) fn reserve(plan: &Plan) -> Result<MmapRaw, DeviceError> {
    let (states, arena) = (plan.state_bytes(), plan.arena_bytes);
    let available = available_memory();
    let short = || DeviceError::Memory { context: plan.options.context, states, arena, available };
    let bytes = plan.pool_bytes();
    if available.is_some_and(|most| bytes > most) {
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

    fn write_input(&mut self, program: usize, input: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let planned = &self.plan.programs[program];
        let buffer = planned.inputs[input].buffer;
        let room = planned.buffers[buffer as usize].ty.bytes(&planned.bounds);
        assert!(bytes.len() as u64 <= room, "input {input} has {room} bytes, not {}", bytes.len());
        // SAFETY: the plan is validated, so the buffer's `room` bytes lie within the pool; they are as many as
        // asserted. No launch runs, as that takes `&mut self` too.
        unsafe { self.buffer(program, buffer).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn run(&mut self, program: usize, at: &Syms) -> Result<(), DeviceError> {
        let bounds = self.plan.programs[program].bounds;
        let inside = 1 <= at.t && at.t <= bounds.t && at.r <= bounds.r && at.r <= at.t;
        assert!(inside, "{at:?} is out of {bounds:?}");
        let launches = &self.programs[program];
        self.args.clear();
        self.items.clear();
        for launch in launches {
            let kernel = &self.plan.kernels[launch.kernel];
            let sized = |(raw, ty): &(RawArg, TensorType)| RawArg { len: ty.bytes(at) as usize, ..*raw };
            let first = self.args.len();
            self.args.extend(launch.args.iter().map(sized));
            // Where no rows are wanted, nothing that only they need is launched.
            let written =
                kernel.args.iter().zip(&self.args[first..]).filter(|(arg, _)| arg.access != Access::Read);
            let empty = written.into_iter().all(|(_, raw)| raw.len == 0);
            self.items.push((!empty).then(|| kernel.items(at) as usize));
        }
        let (kernels, counts, args, items) = (&self.kernels, &self.launches, &self.args, &self.items);
        self.threads.run(&|worker| {
            let mut args = &args[..];
            for (launch, items) in launches.iter().zip(items) {
                let (own, rest) = args.split_at(launch.args.len());
                args = rest;
                let kernel = &kernels[launch.kernel];
                let Some(items) = items else { continue };
                // SAFETY: the plan is validated: within the bounds, as asserted, every argument fits its buffer,
                // which lies in the pool or is a weight of this size; only the pool is written. Buffers overlap
                // none that the launch writes, but by `may_alias`. Launches are apart, as `share` ends in a
                // barrier, and items are shared out once.
                let run = |items: &mut dyn Iterator<Item = _>| unsafe { kernel.run(own, at, items) };
                let finish = || {
                    // SAFETY: as above; all items are done.
                    unsafe { kernel.finish(own, at) };
                    counts[launch.kernel].fetch_add(1, Ordering::Relaxed);
                };
                worker.share(*items, run, finish);
            }
        });
        Ok(())
    }

    fn read_result(&mut self, program: usize, result: usize, bytes: usize) -> Result<&[u8], DeviceError> {
        let planned = &self.plan.programs[program];
        let buffer = planned.results[result];
        let room = planned.buffers[buffer as usize].ty.bytes(&planned.bounds);
        assert!(bytes as u64 <= room, "result {result} has {room} bytes, not {bytes}");
        // SAFETY: as in `write_input`; the pool was zero before anything wrote it, so all bytes are initialised.
        Ok(unsafe { std::slice::from_raw_parts(self.buffer(program, buffer), bytes) })
    }

    fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError> {
        for state in self.plan.states.iter().filter(|s| s.role == role) {
            let apart = from.saturating_add(rows) <= to || to.saturating_add(rows) <= from;
            assert!(apart, "rows {from}.. and {to}.. overlap");
            let (source, len) = self.rows(state, from, rows);
            let (target, _) = self.rows(state, to, rows);
            // SAFETY: both lie within the state, and apart, as asserted; no launch runs, as that takes `&mut self` too.
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

    fn launches(&self) -> Vec<u64> {
        self.launches.iter().map(|n| n.load(Ordering::Relaxed)).collect()
    }

    fn isa(&self) -> &'static str {
        self.features.name()
    }
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
