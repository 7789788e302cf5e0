//! The CPU as a [`Device`]: one allocation for states and arena, weights where the file is mapped, and one handoff to
//! the thread pool a step.

use super::{CpuKernel, Features, Pool, RawArg, bind};
use crate::gguf::GgufFile;
use crate::ir::{Syms, TensorType};
use crate::runtime::device::{Device, DeviceError, DeviceOptions};
use crate::runtime::plan::{BufRef, LoadedPlan, PlannedLaunch, PlannedProgram};
use crate::runtime::pool::ALIGN;
use crate::runtime::weights::find_weights;
use crate::target::TargetKind;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

/// A plan on this machine's processor.
pub struct CpuDevice {
    plan: Arc<LoadedPlan>,
    kernels: Vec<Box<dyn CpuKernel>>,
    programs: Vec<Vec<Launch>>,
    memory: Memory,
    threads: Pool,
    launches: Vec<u64>,
    /// Keeps the weights mapped: launches point into it.
    _model: Arc<GgufFile>,
}

/// A launch with the addresses of its arguments.
struct Launch {
    kernel: usize,
    args: Vec<RawArg>,
    /// Work items at the step that is being run.
    items: usize,
}

impl CpuDevice {
    /// Binds every kernel of the plan, finds its weights and allocates its pool.
    ///
    /// # Errors
    /// A kernel that is missing, by name; a weight that is not what the plan says; too little memory.
    pub fn new(
        plan: &Arc<LoadedPlan>,
        model: Arc<GgufFile>,
        options: &DeviceOptions,
    ) -> Result<CpuDevice, DeviceError> {
        let features = Features::detect();
        let kernels = plan
            .kernels
            .iter()
            .map(|spec| {
                let missing = |why: super::BindError| DeviceError::Kernel {
                    device: "cpu",
                    kernel: spec.name(),
                    why: why.to_string(),
                };
                bind(spec, &features).map_err(missing)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let weights = find_weights(plan, &model)?;
        let memory = Memory::new(plan)?;
        let threads = Pool::new(options.threads).map_err(|e| DeviceError::Threads(e.to_string()))?;
        let place = Place { plan, memory: &memory, weights: &weights };
        let programs = plan.programs.values().map(|p| place.launches(p)).collect();
        tracing::debug!(features = features.name(), threads = threads.threads(), pool = memory.len);
        let launches = vec![0; plan.kernels.len()];
        Ok(CpuDevice { plan: Arc::clone(plan), kernels, programs, memory, threads, launches, _model: model })
    }

    /// The offset of a buffer of a program within the pool.
    fn offset(&self, program: usize, buffer: u32) -> usize {
        (self.plan.arena_offset + self.plan.programs[program].buffers[buffer as usize].offset) as usize
    }
}

/// Where the arguments of launches lie.
struct Place<'a> {
    plan: &'a LoadedPlan,
    memory: &'a Memory,
    weights: &'a [&'a [u8]],
}

impl Place<'_> {
    fn launches(&self, program: &PlannedProgram) -> Vec<Launch> {
        let launch = |launch: &PlannedLaunch| {
            let args = launch.args.iter().map(|arg| self.address(program, *arg)).collect();
            Launch { kernel: launch.kernel as usize, args, items: 0 }
        };
        program.launches.iter().map(launch).collect()
    }

    /// The address, and the length where it is the same in every step. Validation has shown that each lies in its region.
    fn address(&self, program: &PlannedProgram, arg: BufRef) -> RawArg {
        match arg {
            BufRef::Weight(w) => {
                let bytes = self.weights[w as usize];
                // Kernels only read arguments bound as read, which validation holds weights to.
                RawArg { ptr: bytes.as_ptr().cast_mut(), len: bytes.len() }
            }
            BufRef::State(s) => self.memory.at(self.plan.states[s as usize].offset),
            BufRef::Arena(b) => self.memory.at(self.plan.arena_offset + program.buffers[b as usize].offset),
        }
    }
}

impl Device for CpuDevice {
    fn kind(&self) -> TargetKind {
        TargetKind::Cpu
    }

    fn write_input(&mut self, program: usize, input: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let start = self.offset(program, self.plan.programs[program].inputs[input].buffer);
        self.memory.bytes()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn run(&mut self, program: usize, at: &Syms) -> Result<(), DeviceError> {
        let specs = &self.plan.kernels;
        let launches = &mut self.programs[program];
        for launch in launches.iter_mut() {
            let spec = &specs[launch.kernel];
            for (arg, spec) in launch.args.iter_mut().zip(&spec.args) {
                arg.len = size(&spec.ty, at);
            }
            launch.items = usize::try_from(spec.items(at)).unwrap_or(usize::MAX);
            self.launches[launch.kernel] += 1;
        }
        let (launches, kernels) = (&*launches, &self.kernels);
        self.threads.run(&|worker| {
            for launch in launches {
                let kernel = &kernels[launch.kernel];
                // SAFETY: each argument lies in the pool or in a weight and is as long as its type says at `at`: the plan was
                // validated at its bounds, `at` was checked against them, and `find_weights` compared the weights. The plan's
                // placement keeps live buffers apart, launches follow one another by the barrier in `share`, which also hands
                // out disjoint items, and `&mut self` keeps everyone else out of the pool.
                let work = |items| unsafe { kernel.run(&launch.args, at, items) };
                // SAFETY: as above, and `share` calls it on one thread after all items.
                worker.share(launch.items, work, || unsafe { kernel.finish(&launch.args, at) });
            }
        });
        Ok(())
    }

    fn read_result(&mut self, program: usize, result: usize, bytes: usize) -> Result<&[u8], DeviceError> {
        let start = self.offset(program, self.plan.programs[program].results[result]);
        Ok(&self.memory.bytes()[start..start + bytes])
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let states = self.plan.arena_offset as usize;
        self.memory.bytes()[..states].fill(0);
        Ok(())
    }

    fn launches(&self) -> &[u64] {
        &self.launches
    }
}

fn size(ty: &TensorType, at: &Syms) -> usize {
    usize::try_from(ty.bytes(at)).unwrap_or(usize::MAX)
}

/// The pool: states, then the arena, zeroed by the system as pages are touched.
struct Memory {
    start: NonNull<u8>,
    len: usize,
    layout: Layout,
}

// SAFETY: it owns its memory, and gives out references by `&mut self` only.
unsafe impl Send for Memory {}

impl Memory {
    fn new(plan: &LoadedPlan) -> Result<Memory, DeviceError> {
        let error = |available| DeviceError::Memory {
            context: plan.options.context,
            states: plan.state_bytes(),
            arena: plan.arena_bytes,
            available,
        };
        if let Some(free) = available_memory().filter(|free| *free < plan.pool_bytes()) {
            return Err(error(Some(free)));
        }
        // At least one byte, as allocations of none are not allowed.
        let len = usize::try_from(plan.pool_bytes()).map_err(|_| error(None))?;
        let layout = Layout::from_size_align(len.max(1), ALIGN as usize).map_err(|_| error(None))?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| error(None))?;
        Ok(Memory { start, len, layout })
    }

    /// An argument at this offset, its length to be filled in.
    fn at(&self, offset: u64) -> RawArg {
        RawArg { ptr: self.start.as_ptr().wrapping_add(offset as usize), len: 0 }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has `len` initialised bytes, and no kernel runs while `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// Bytes that the system can give out without swapping, where it tells.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
