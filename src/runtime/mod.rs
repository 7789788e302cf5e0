//! The runtime: plans, memory, devices.

pub mod cpu;
pub mod device;
pub mod exec;
pub mod plan;
pub mod pool;
pub mod schedule;
pub mod weights;
