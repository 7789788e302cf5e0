//! The tensor IR: types, operations, the graph, its text form and its verifier.
//!
//! This room imports none of its siblings.

#[doc(hidden)]
pub mod arbitrary;
mod attributes;
mod decision;
mod export;
pub mod fused;
mod graph;
mod kernel;
pub mod layers;
mod op;
mod report;
pub mod step;
pub mod text;
mod types;
pub mod verify;

pub use attributes::{Rope, RopeStyle, Slice, StateRole};
pub use decision::{Decision, Gain, Micros, Outcome, Why};
pub use graph::{Graph, Node, NodeId, Value};
pub use kernel::{Fused, Kernel};
pub use op::{MAX_HEAD_DIM, Op};
pub use report::{FinalKernel, Form, Limit, Origin, Primitive, Report, Totals};
pub use step::{KvTypes, MAX_SEQUENCES, PAGE, StepInput};
pub use text::{At, ParseError};
pub use types::{DType, Dim, Syms, TensorType};
pub use verify::{Verified, VerifyError, VerifyErrors, Violation, verify, verify_unfinished};
