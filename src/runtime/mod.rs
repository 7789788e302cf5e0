//! The runtime: plans, memory, devices.

pub mod cpu;
pub mod interp;
pub mod plan;
pub mod pool;
pub mod schedule;
