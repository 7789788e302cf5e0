//! The inputs of a step by which its sequences are told apart. A step takes `T` token rows of any mix of up to `B` sequences;
//! everything that differs from one step to the next is in these tensors, and nothing else is.

use super::types::DType;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Rows of a page of the caches: what the kernels of every device go over at a time, or a multiple of it.
pub const PAGE: u32 = 32;

/// Sequences that there may be at once: each takes some memory of the host, whoever asks for it.
pub const MAX_SEQUENCES: u64 = 1 << 12;

/// Element types of the caches of keys and of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvTypes {
    pub k: DType,
    pub v: DType,
}

impl KvTypes {
    /// One type for both.
    pub const fn both(dtype: DType) -> KvTypes {
        KvTypes { k: dtype, v: dtype }
    }
}

impl fmt::Display for KvTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.k == self.v { write!(f, "{}", self.k) } else { write!(f, "{},{}", self.k, self.v) }
    }
}

/// An input that every lowered graph may have, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StepInput {
    /// i32 `[T]`: the tokens.
    Tokens,
    /// i32 `[T]`: the position of each token in its sequence, below the length of that.
    Positions,
    /// i32 `[T]`: the sequence of each token, below `B`.
    Sequences,
    /// i32 `[T]`: the row of the caches that each token's keys and values go to.
    Rows,
    /// i32 `[B,M]`: the pages of each sequence, in order of their positions.
    Tables,
    /// i32 `[B]`: how many positions of each sequence are filled after this step.
    Lengths,
    /// i32 `[R]`: the token rows whose logits are wanted.
    Wanted,
}

impl StepInput {
    pub const ALL: [StepInput; 7] = [
        StepInput::Tokens,
        StepInput::Positions,
        StepInput::Sequences,
        StepInput::Rows,
        StepInput::Tables,
        StepInput::Lengths,
        StepInput::Wanted,
    ];

    /// What the input is called in graphs and plans.
    pub const fn name(self) -> &'static str {
        match self {
            StepInput::Tokens => "tokens",
            StepInput::Positions => "positions",
            StepInput::Sequences => "sequences",
            StepInput::Rows => "rows",
            StepInput::Tables => "tables",
            StepInput::Lengths => "lengths",
            StepInput::Wanted => "wanted",
        }
    }

    /// The inverse of [`StepInput::name`].
    pub fn from_name(name: &str) -> Option<StepInput> {
        StepInput::ALL.into_iter().find(|input| input.name() == name)
    }
}
