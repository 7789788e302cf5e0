//! The runtime: plans, memory, devices, and the executor that runs a plan on one of them.

pub mod batch;
pub mod cpu;
pub mod device;
pub mod exec;
pub mod hip;
pub mod interp;
pub mod progress;
pub mod weights;

pub use batch::{BatchError, Part, SequenceId, Sequences, Wanted};
pub use device::{DeviceError, DeviceOptions, On, Size, choose};
pub use exec::{ExecError, Executor, StepRows, Transfer};
pub use progress::{Progress, Stage};
pub use weights::WeightError;
