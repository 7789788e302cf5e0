//! The runtime: plans, memory, devices.

pub mod cpu;
