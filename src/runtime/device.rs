//! What the executor, and whoever looks at single kernels, asks of a device.

use super::cpu::{CpuDevice, Features};
use super::hip::{Gpu, HipDevice, HipError, Platform, gpu};
use super::progress::Progress;
use super::weights::WeightError;
use crate::gguf::GgufFile;
use crate::ir::{StateRole, Syms};
use crate::plan::{BufRef, LoadedPlan, kind_name};
use crate::target::TargetKind;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A device that holds one plan with its weights, states and arena.
///
/// Work is submitted, and waited for where something depends on it; the host is free meanwhile. Whatever touches memory
/// (writing, reading, copying and filling) comes after all work that was submitted before, and waits for it.
///
/// Callers check programs, calls, sizes and symbols first: what a plan does not have, a device may panic at.
pub trait Device: Send {
    fn kind(&self) -> TargetKind;

    /// The instruction set or the architecture that its kernels use, by name.
    fn isa(&self) -> &str;

    /// Begins some calls of a program, in order: each kernel's launches, but for those that would write nothing at these sizes.
    ///
    /// # Errors
    /// If the device fails.
    fn submit(&mut self, work: &Submission) -> Result<Ticket, DeviceError>;

    /// Waits until work is done. What is done already takes no time.
    ///
    /// # Errors
    /// If the device fails, or failed at the work.
    fn wait(&mut self, ticket: Ticket) -> Result<(), DeviceError>;

    /// Writes the first bytes of a buffer in the arena of a program, or of a state.
    ///
    /// # Errors
    /// If the device fails.
    fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Reads bytes of a buffer in the arena of a program, or of a state, from byte `first` on.
    ///
    /// # Errors
    /// If the device fails.
    fn read(&mut self, program: usize, from: BufRef, first: u64, bytes: &mut [u8])
    -> Result<(), DeviceError>;

    /// Waits for work, and shows bytes of a buffer in the arena of a program: in `room`, or in memory that the device copies to
    /// without another copy. What is changed there is changed nowhere else.
    ///
    /// # Errors
    /// If the device fails, or failed at the work.
    fn view<'a>(
        &'a mut self,
        work: Ticket,
        (program, from): (usize, BufRef),
        first: u64,
        len: usize,
        room: &'a mut Vec<u32>,
    ) -> Result<&'a mut [u8], DeviceError> {
        self.wait(work)?;
        let bytes = room_for(len, room);
        self.read(program, from, first, bytes)?;
        Ok(bytes)
    }

    /// Copies rows of every state of a role to other rows of it, which do not overlap them.
    ///
    /// # Errors
    /// If the device fails.
    fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError>;

    /// Fills rows of every state of a role with a byte.
    ///
    /// # Errors
    /// If the device fails.
    fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), DeviceError>;

    /// How often each kernel of the plan was launched: counted as launches end, whatever was asked for.
    fn launch_counts(&self) -> Vec<u64>;

    /// How many steps were replayed as a graph so far, of a device that has those.
    fn replays(&self) -> u64 {
        0
    }

    /// How long each launch took of the last work that was submitted as timed, in order.
    ///
    /// # Errors
    /// If the device fails.
    fn timings(&mut self) -> Result<Vec<Timing>, DeviceError>;
}

/// What a device is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    /// Index of a program of the plan.
    pub program: usize,
    /// Which of its calls; one alone, to look at a kernel.
    pub calls: Range<usize>,
    /// The sizes of the step.
    pub at: Syms,
    /// Whether each launch is timed, which may slow it down.
    pub timed: bool,
}

/// Work that was submitted, in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// The time of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Index of the call in its program.
    pub call: usize,
    /// Index of the launch in the call's kernel.
    pub launch: usize,
    pub time: Duration,
}

/// Puts a plan and the weights of its model on the device that it was compiled for. All states are zero.
///
/// # Errors
/// If there is no such device here, a kernel is missing, the model has not the weights, or memory is short.
pub fn open(
    plan: &Arc<LoadedPlan>,
    model: Arc<GgufFile>,
    options: &DeviceOptions,
) -> Result<Box<dyn Device>, DeviceError> {
    match plan.target.kind {
        TargetKind::Cpu => Ok(Box::new(CpuDevice::new(plan, model, options)?)),
        TargetKind::HipAmd | TargetKind::HipNvidia => Ok(Box::new(HipDevice::new(plan, model, options)?)),
    }
}

/// So many bytes of a room, aligned as numbers are.
pub(super) fn room_for(len: usize, room: &mut Vec<u32>) -> &mut [u8] {
    room.resize(len.div_ceil(size_of::<u32>()), 0);
    &mut bytemuck::cast_slice_mut(room)[..len]
}

/// Where a plan is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Cpu,
    /// A GPU; the CPU if there is none and a plan for it.
    Gpu,
}

/// Of the plans of a file, the one that runs here: on the device that is named, else on the CPU if one is for it, else on the GPU.
///
/// # Errors
/// If none does: what they are for, and what is here.
pub fn choose(
    mut plans: Vec<LoadedPlan>,
    on: Option<On>,
    options: &DeviceOptions,
) -> Result<LoadedPlan, DeviceError> {
    let targets = plans.iter().map(|plan| plan.target.name.clone()).collect::<Vec<_>>().join(", ");
    let none = |device| DeviceError::NoPlan { targets: targets.clone(), device };
    let on_cpu = plans.iter().position(|plan| plan.target.kind == TargetKind::Cpu);
    let fits = |gpu: &Gpu, plan: &LoadedPlan| {
        let kind = match gpu.platform {
            Platform::Amd => TargetKind::HipAmd,
            Platform::Nvidia => TargetKind::HipNvidia,
        };
        plan.target.kind == kind && plan.target.arch == gpu.arch
    };
    let chosen = match (on, on_cpu) {
        (Some(On::Cpu) | None, Some(i)) => i,
        (Some(On::Cpu), None) => return Err(none("the device is the CPU".into())),
        (Some(On::Gpu) | None, _) => match gpu(options.gpu) {
            Ok(gpu) => {
                let fitting = plans.iter().position(|plan| fits(&gpu, plan));
                fitting.ok_or_else(|| none(format!("this GPU is {} ({})", gpu.arch, gpu.name)))?
            }
            Err(why @ (HipError::Library { .. } | HipError::NoDevice { count: 0, .. })) => match on_cpu {
                Some(i) => {
                    tracing::warn!("no GPU is used, but the CPU: {why}");
                    i
                }
                None => return Err(none(format!("there is no GPU here: {why}"))),
            },
            Err(other) => return Err(other.into()),
        },
    };
    Ok(plans.swap_remove(chosen))
}

/// What a device may be told.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// CPU threads; as many as there are cores unless told.
    pub threads: Option<usize>,
    /// Instructions of the CPU; [`Features::detect`] unless told.
    pub features: Option<Features>,
    /// The number of the GPU; the first that there are kernels for unless told.
    pub gpu: Option<usize>,
    /// Whether a GPU is given each launch of each step, rather than graphs of steps that it saw before.
    pub eager: bool,
    /// Who is told how far loading is, and the reading of long prompts.
    pub progress: Progress,
}

/// Why a device cannot take a plan, or failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the plan is for {targets}, and {device}")]
    NoPlan { targets: String, device: String },
    #[error("there is no device of kind {} here: {why}", kind_name(*.kind))]
    Absent { kind: TargetKind, why: HipError },
    #[error("the {device} device has no kernel {kernel} as the plan needs it: {why}")]
    Kernel { device: &'static str, kernel: &'static str, why: String },
    #[error(
        "a context of {context} needs {} for the KV cache and {} for activations{}{}; use a smaller {}",
        Size(*.states),
        Size(*.arena),
        if *.weights > 0 { format!(" beside {} of weights", Size(*.weights)) } else { String::new() },
        available.map(|n| free(n, [*.weights, *.states, *.arena])).unwrap_or_default(),
        if available.is_some_and(|n| *.weights > n) { "model" } else { "context (-c)" }
    )]
    Memory { context: u64, weights: u64, states: u64, arena: u64, available: Option<u64> },
    #[error("there is no memory for {} of weights", Size(*.bytes))]
    Weights { bytes: u64 },
    #[error(transparent)]
    Weight(#[from] WeightError),
    #[error("{0}")]
    Threads(String),
    #[error(transparent)]
    Hip(#[from] HipError),
}

/// What is free, which may be enough and yet refused.
fn free(free: u64, needs: [u64; 3]) -> String {
    match needs.into_iter().fold(0, u64::saturating_add) <= free {
        true => format!(", which the driver refuses though {} are free", Size(free)),
        false => format!(", but {} are free", Size(free)),
    }
}

/// A number of bytes for people, in powers of ten.
#[derive(Clone, Copy, Debug)]
pub struct Size(pub u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let x = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} bytes", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", x / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", x / 1e6),
            _ => write!(f, "{:.1} GB", x / 1e9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_memory_read_well() {
        let shown: Vec<String> =
            [0, 999, 1000, 340_000_000, 17_179_869_184].map(|n| Size(n).to_string()).into();
        assert_eq!(shown, ["0 bytes", "999 bytes", "1.0 kB", "340.0 MB", "17.2 GB"]);
        let error = DeviceError::Memory {
            context: 131_072,
            weights: 0,
            states: 17_179_869_184,
            arena: 50_000_000,
            available: Some(8_000_000_000),
        };
        assert_eq!(
            error.to_string(),
            "a context of 131072 needs 17.2 GB for the KV cache and 50.0 MB for activations, but 8.0 GB are free; \
             use a smaller context (-c)"
        );
        let error =
            DeviceError::Memory { context: 8, weights: 800_000_000, states: 0, arena: 1, available: None };
        assert_eq!(
            error.to_string(),
            "a context of 8 needs 0 bytes for the KV cache and 1 bytes for activations beside 800.0 MB of weights; use a \
             smaller context (-c)"
        );
        let error =
            DeviceError::Memory { context: 8, weights: 800_000_000, states: 0, arena: 1, available: Some(9) };
        assert!(error.to_string().ends_with(", but 9 bytes are free; use a smaller model"), "{error}");
    }
}
