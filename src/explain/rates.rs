//! At what costs are estimated, and whose the rates are by which they are.

use crate::ir::Report;
use crate::target::{Measured, Target};

/// At what costs of a step are estimated, in words.
pub fn step(report: &Report, context: u64, sequences: u64) -> String {
    let of = if sequences == 1 { "one sequence".into() } else { format!("each of {sequences} sequences") };
    let (t, r) = (report.bounds.t, report.bounds.r);
    format!("a step of T={t} tokens, logits of R={r}, caches filled to {context} positions of {of}")
}

/// In a line, of a target; none where there is nothing to say of them.
pub fn rates(target: &Target) -> Option<String> {
    match target {
        Target { measured: Some(Measured { device, model, losing, .. }), .. } => {
            let losing = match losing.len() {
                0 => String::new(),
                1 => "; one pass loses there in a step, and is not used in it".into(),
                n => format!("; passes lose there in {n} cases, and are not used in them"),
            };
            Some(format!("rates were measured on {device}, with {}{losing}", model.escape_debug()))
        }
        target if target.is_unmeasured() => {
            let (name, whose) = (&target.name, target.whose_rates());
            Some(format!("nobody measured {name}: rates are {whose}, shapes of matvecs portable ones, and tiles those of an H200"))
        }
        target if target.name == "cpu" => Some(
            "rates are those of two cores of a server with AVX2, not of this machine (sinter tune measures it)"
                .into(),
        ),
        _ => None,
    }
}
