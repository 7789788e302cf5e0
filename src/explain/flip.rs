//! What would have to be otherwise for a decision to fall the other way.

use crate::ir::{DType, Decision, Gain, Micros, Outcome, Why};
use crate::target::Target;

/// In words, what would turn a decision over.
pub fn flip(decision: &Decision, target: &Target) -> String {
    match &decision.outcome {
        Outcome::Fired { gain, .. } => of_fired(&decision.pass, gain, target),
        Outcome::Rewritten { added, .. } if decision.pass == "quantise_acts" => {
            let lacks = match added.iter().any(|op| op == "quant_act") {
                true => "whose integer dot products are no faster than floats",
                false if target.prompt_activations == DType::F16 => {
                    "whose matrix units do not take 16 bits, or, of quantised weights, whose prompt_activations are Q8Act"
                }
                false => "whose matrix units do not take 16 bits",
            };
            format!("--exact, or a target {lacks}")
        }
        Outcome::Rewritten { .. } => format!("--passes -{}", decision.pass),
        Outcome::Rejected { why } => of_rejected(why, target),
    }
}

/// What one can change: the cost of a launch below which it would not pay, if there is one, and a rule.
fn of_fired(pass: &str, gain: &Gain, target: &Target) -> String {
    let Gain { fused_us, unfused_us, launches_saved, .. } = *gain;
    let deny = format!("--deny {pass}");
    if launches_saved <= 0 {
        let many = if launches_saved < 0 { "more" } else { "as many" };
        return format!("{deny}; no cost of a launch, as it takes {many}");
    }
    // By how much longer the work alone takes when it is fused.
    let longer_us = launches_saved as f64 * target.launch_us - (unfused_us - fused_us);
    match longer_us > 0.0 {
        true => {
            let launch_us = Micros(longer_us / launches_saved as f64);
            format!("{deny}; a launch that takes less than {launch_us}, not {}", Micros(target.launch_us))
        }
        false => format!("{deny}; no cost of a launch, as it saves time without"),
    }
}

fn of_rejected(why: &Why, target: &Target) -> String {
    match why {
        Why::CostLoses { fused_us, unfused_us, launches_saved } => {
            let faster = format!(
                "a kernel that takes {} less than its {}",
                Micros(*fused_us - *unfused_us),
                Micros(*fused_us)
            );
            if *launches_saved <= 0 {
                return faster;
            }
            let launch_us = target.launch_us + (fused_us - unfused_us) / *launches_saved as f64;
            format!(
                "a launch that takes {} or more, not {}; {faster}",
                Micros(launch_us),
                Micros(target.launch_us)
            )
        }
        Why::MultiUse { value } => format!("no other user of {value}"),
        Why::Dtype { dtype } => format!("a kernel that takes {dtype}"),
        Why::Shape { .. } => "another shape".into(),
        Why::EffectBetween { state } => format!("no access to {state} in between"),
        Why::Dependent { .. } => "a graph in which the parts do not depend on each other".into(),
        Why::TargetLacks { what } => format!("a target that has {what}"),
        Why::Alone { .. } | Why::NoPattern { .. } => "another graph around it".into(),
        Why::NoPass { op } => format!("a pass that takes {op} in (docs/writing-a-pass.md)"),
        Why::PassOff => "to let the pass run (--passes, --no-fuse, --exact)".into(),
        Why::Denied { rule } => format!("to leave out the rule {rule}"),
        Why::LosesHere { .. } => {
            "another device, or kernels that are faster (sinter tune measures them)".into()
        }
        Why::NeedsLogits => "to ask for the best token alone (--greedy, run --temp 0)".into(),
        Why::FuelExhausted => "more --fuel".into(),
    }
}
