//! What the passes decided, as data: it is printed, tested, and stored in plans.

use super::kernel::Kernel;
use serde::{Deserialize, Serialize};
use std::fmt;

/// One decision of one pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The pass that decided.
    pub pass: String,
    /// The node it was about, in words: the operation and the weight or state that tells it apart.
    pub at: String,
    pub outcome: Outcome,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The rewrite was applied.
    Fired {
        kernel: Kernel,
        /// The operations that became one launch, by name.
        replaced: Vec<String>,
        gain: Gain,
    },
    /// The anchor matched, but the rewrite was not applied.
    Rejected { why: Why },
}

/// What a rewrite is worth on the target, by the cost model, at the bounds of the graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gain {
    /// Estimated time of the fused kernel in microseconds.
    pub fused_us: f64,
    /// Estimated time of what it replaces in microseconds.
    pub unfused_us: f64,
    /// Memory traffic saved in bytes (negative: added).
    pub bytes_saved: i64,
    /// Launches saved.
    pub launches_saved: i64,
}

/// Why a near-miss was not fused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// An intermediate result has other users.
    MultiUse { value: String },
    /// No kernel takes this element type.
    Dtype { dtype: String },
    /// The shape does not fit the kernel.
    Shape { detail: String },
    /// A cache is written between the parts.
    EffectBetween { state: String },
    /// One part depends on another through a node outside.
    Dependent { detail: String },
    /// The target cannot do what the kernel needs.
    TargetLacks { what: String },
    /// The cost model expects the fused kernel to be slower.
    CostLoses { fused_us: f64, unfused_us: f64 },
    /// The logits themselves are asked for.
    NeedsLogits,
    /// The limit on rewrites was reached.
    FuelExhausted,
}

impl Why {
    /// The reason's name, as in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Why::MultiUse { .. } => "multi_use",
            Why::Dtype { .. } => "dtype",
            Why::Shape { .. } => "shape",
            Why::EffectBetween { .. } => "effect_between",
            Why::Dependent { .. } => "dependent",
            Why::TargetLacks { .. } => "target_lacks",
            Why::CostLoses { .. } => "cost_loses",
            Why::NeedsLogits => "needs_logits",
            Why::FuelExhausted => "fuel_exhausted",
        }
    }
}

/// A time in microseconds, for people.
#[derive(Clone, Copy, Debug)]
pub struct Micros(pub f64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0;
        // Padded as a whole, so that tables can align it.
        f.pad(&match us.abs() {
            n if n < 1e3 => format!("{us:.1} µs"),
            n if n < 1e6 => format!("{:.2} ms", us / 1e3),
            _ => format!("{:.2} s", us / 1e6),
        })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::MultiUse { value } => write!(f, "{value} has other users"),
            Why::Dtype { dtype } => write!(f, "no kernel takes {dtype} here"),
            Why::Shape { detail } => write!(f, "{detail}"),
            Why::EffectBetween { state } => write!(f, "{state} is read or written in between"),
            Why::Dependent { detail } => write!(f, "{detail}"),
            Why::TargetLacks { what } => write!(f, "the target lacks {what}"),
            Why::CostLoses { fused_us, unfused_us } => {
                let longer = 100.0 * (fused_us / unfused_us - 1.0);
                write!(f, "fused would take {}, {longer:.1} % longer than unfused", Micros(*fused_us))
            }
            Why::NeedsLogits => write!(f, "the logits themselves are returned"),
            Why::FuelExhausted => write!(f, "the limit on rewrites is reached"),
        }
    }
}
