//! What the executor asks of a device.

use super::cpu::Features;
use super::weights::WeightError;
use crate::ir::{StateRole, Syms};
use crate::plan::kind_name;
use crate::target::TargetKind;

/// A device that holds one plan with its weights, states and arena.
///
/// The executor, its only caller, checks programs, inputs and results by index, sizes and symbols first.
pub trait Device: Send {
    fn kind(&self) -> TargetKind;

    /// Writes the first bytes of an input.
    ///
    /// # Errors
    /// If the device fails.
    fn write_input(&mut self, program: usize, input: usize, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Makes all launches of a program, in order, at `at`.
    ///
    /// # Errors
    /// If the device fails.
    fn run(&mut self, program: usize, at: &Syms) -> Result<(), DeviceError>;

    /// The first `bytes` of a result of the program that ran last.
    ///
    /// # Errors
    /// If the device fails.
    fn read_result(&mut self, program: usize, result: usize, bytes: usize) -> Result<&[u8], DeviceError>;

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
    fn launches(&self) -> Vec<u64>;

    /// The instruction set that its kernels use, by name.
    fn isa(&self) -> &'static str;
}

/// What a device may be told.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// CPU threads; as many as there are cores unless told.
    pub threads: Option<usize>,
    /// Instructions of the CPU; [`Features::detect`] unless told.
    pub features: Option<Features>,
}

/// Why a device cannot take a plan, or failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("there is no device of kind {} here", kind_name(*.0))]
    Absent(TargetKind),
    #[error("the {device} device has no kernel {kernel} as the plan needs it: {why}")]
    Kernel { device: &'static str, kernel: &'static str, why: String },
    #[error(
        "a context of {context} needs {} for the KV cache and {} for activations{}; use a smaller context (-c)",
        Size(*.states), Size(*.arena), available.map(|n| format!(", but {} are free", Size(n))).unwrap_or_default()
    )]
    Memory { context: u64, states: u64, arena: u64, available: Option<u64> },
    #[error(transparent)]
    Weight(#[from] WeightError),
    #[error("{0}")]
    Threads(String),
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
            states: 17_179_869_184,
            arena: 50_000_000,
            available: Some(8_000_000_000),
        };
        assert_eq!(
            error.to_string(),
            "a context of 131072 needs 17.2 GB for the KV cache and 50.0 MB for activations, but 8.0 GB are free; \
             use a smaller context (-c)"
        );
    }
}
