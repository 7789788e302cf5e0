//! Codegen: a verified, fused graph becomes kernels and launches.

pub mod spec;
