//! Sinter: a compute-graph compiler with operator fusion for GGUF language models.

pub mod gguf;
pub mod generate;
pub mod ir;
