//! Sinter: a compute-graph compiler with operator fusion for GGUF language models.

pub mod check;
pub mod codegen;
pub mod compile;
pub mod generate;
pub mod gguf;
pub mod ir;
pub mod lower;
pub mod model;
pub mod passes;
pub mod runtime;
pub mod target;
