//! The tensor IR.

mod types;

pub use types::{DType, Dim, Syms, TensorType};
