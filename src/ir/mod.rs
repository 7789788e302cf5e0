//! The tensor IR: types, operations, the graph, its text form and its verifier.
//!
//! This room imports none of its siblings.

mod decision;
mod graph;
mod op;
mod text;
mod types;
mod verify;

pub use decision::{Decision, Gain, Outcome, Why};
pub use graph::{Graph, Node, NodeId, Value};
pub use op::{Fused, Kernel, Op, Rope, RopeStyle};
pub use text::ParseError;
pub use types::{DType, Dim, Syms, TensorType};
pub use verify::{Verified, VerifyError, check, verify};
