//! The runtime: plans, memory, devices.

pub mod cpu;
pub mod interp;
