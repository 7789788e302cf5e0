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
    /// The numbers (see [`super::Graph::number`]) of the nodes that it took away, or would have.
    pub takes: Vec<u64>,
    /// Those of the nodes that it added.
    pub makes: Vec<u64>,
    pub outcome: Outcome,
}

/// In a line, as people read it.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decision { pass, at, .. } = self;
        match &self.outcome {
            Outcome::Fired { kernel, replaced, gain } => write!(
                f,
                "{pass}: {at} -> {} replaces {}; {}, {} {}",
                kernel.name(),
                replaced.join(", "),
                Micros(gain.fused_us),
                Micros((gain.unfused_us - gain.fused_us).abs()),
                if gain.unfused_us < gain.fused_us { "more" } else { "less" }
            ),
            Outcome::Rewritten { replaced, added } if added.is_empty() => match &replaced[..] {
                [_] => write!(f, "{pass}: {at} is gone"),
                all => write!(f, "{pass}: {at} is gone, of {}", all.join(", ")),
            },
            Outcome::Rewritten { replaced, added } if replaced == added => {
                write!(f, "{pass}: {at}: {} became another", added.join(", "))
            }
            Outcome::Rewritten { replaced, added } => {
                write!(f, "{pass}: {at}: {} became {}", replaced.join(", "), added.join(", "))
            }
            Outcome::Rejected { why } => write!(f, "{pass}: {at} not fused: {why}"),
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A fusion was made.
    Fired {
        kernel: Kernel,
        /// The operations that became one launch, by name.
        replaced: Vec<String>,
        gain: Gain,
    },
    /// A rewrite that is no fusion was made.
    Rewritten {
        /// The operations that went, by name.
        replaced: Vec<String>,
        /// Those that came.
        added: Vec<String>,
    },
    /// The rewrite was not made, though something here asks for it.
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

/// Why something was not fused.
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
    CostLoses { fused_us: f64, unfused_us: f64, launches_saved: i64 },
    /// What it could be fused with is not there.
    Alone { detail: String },
    /// Nothing around it is the pattern of the pass.
    NoPattern { pattern: String },
    /// No pass takes such an operation in.
    NoPass { op: String },
    /// The pass does not run.
    PassOff,
    /// A rule of the user forbids it.
    Denied { rule: String },
    /// It was measured that the step takes longer with it than without.
    LosesHere { with_us: f64, without_us: f64 },
    /// The logits themselves are asked for.
    NeedsLogits,
    /// The limit on rewrites was reached.
    FuelExhausted,
}

impl Why {
    /// All names of reasons.
    pub const NAMES: [&str; 15] = [
        "multi_use",
        "dtype",
        "shape",
        "effect_between",
        "dependent",
        "target_lacks",
        "cost_loses",
        "alone",
        "no_pattern",
        "no_pass",
        "pass_off",
        "denied",
        "loses_here",
        "needs_logits",
        "fuel_exhausted",
    ];

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
            Why::Alone { .. } => "alone",
            Why::NoPattern { .. } => "no_pattern",
            Why::NoPass { .. } => "no_pass",
            Why::PassOff => "pass_off",
            Why::Denied { .. } => "denied",
            Why::LosesHere { .. } => "loses_here",
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
            n if n > 0.0 && n < 0.1 => format!("{:.0} ns", 1e3 * us),
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
            Why::CostLoses { fused_us, unfused_us, .. } => {
                let longer = 100.0 * (fused_us / unfused_us - 1.0);
                let by = Micros(fused_us - unfused_us);
                write!(f, "fused would take {}, {by} ({longer:.1} %) longer than unfused", Micros(*fused_us))
            }
            Why::Alone { detail } => write!(f, "{detail}"),
            Why::NoPattern { pattern } => write!(f, "it is no part of: {pattern}"),
            Why::NoPass { op } => write!(f, "no pass takes {op} in"),
            Why::PassOff => write!(f, "the pass does not run"),
            Why::Denied { rule } => write!(f, "you said so: {rule}"),
            Why::LosesHere { with_us, without_us } => write!(
                f,
                "measured here: with it a step takes {}, without {}",
                Micros(*with_us),
                Micros(*without_us)
            ),
            Why::NeedsLogits => write!(f, "the logits themselves are returned"),
            Why::FuelExhausted => write!(f, "the limit on rewrites is reached"),
        }
    }
}
