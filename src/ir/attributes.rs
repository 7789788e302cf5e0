//! What operations carry beside their operands.

use super::types::{Dim, TensorType};
use serde::{Deserialize, Serialize};

/// Rows of a tensor: from row `first` on, of `of` in all, as many as the type of what has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slice {
    pub first: u64,
    pub of: u64,
}

impl Slice {
    /// Checks that rows of type `ty` lie within the tensor and are whole blocks.
    ///
    /// # Errors
    /// What they are instead.
    pub fn fits(&self, ty: &TensorType) -> Result<(), String> {
        let rows = ty.shape.first().and_then(|rows| rows.as_const());
        let within = rows.and_then(|rows| self.first.checked_add(rows)).is_some_and(|end| end <= self.of);
        if !within {
            return Err(format!("{ty} from row {} on is more than {} rows", self.first, self.of));
        }
        if ty.shape.len() == 1 && ty.dtype.block_len() > 1 {
            return Err(format!(
                "single elements of {} are no whole blocks, so no rows to be a weight",
                ty.dtype
            ));
        }
        Ok(())
    }

    /// The type of the whole tensor, of which rows of type `ty` are a part.
    pub fn whole(&self, ty: &TensorType) -> TensorType {
        let mut whole = ty.clone();
        if let Some(rows) = whole.shape.first_mut() {
            *rows = Dim::n(self.of);
        }
        whole
    }
}

/// Rotary position embedding over the first `dims` of each head: pair `i` turns by
/// `pos · base^(-2i/dims) / factors[i]` (Su et al., 2021, arXiv:2104.09864).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    pub base: f32,
    pub dims: u32,
    pub style: RopeStyle,
}

/// Which elements form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RopeStyle {
    /// `(2i, 2i+1)`, as `llama` files have it.
    Interleaved,
    /// `(i, i + dims/2)`, the style of GPT-NeoX, as `qwen2` files have it.
    NeoX,
}

/// How a state changes from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateRole {
    /// `[S,..]`: a step adds rows, in pages that block tables find, and leaves the others.
    Appended,
    /// `[B,..]`: a step replaces the row of each of its sequences.
    Replaced,
}

impl StateRole {
    /// The name used in the text form.
    pub const fn name(self) -> &'static str {
        match self {
            StateRole::Appended => "appended",
            StateRole::Replaced => "replaced",
        }
    }

    /// The inverse of [`StateRole::name`].
    pub fn from_name(name: &str) -> Option<StateRole> {
        [StateRole::Appended, StateRole::Replaced].into_iter().find(|role| role.name() == name)
    }
}
