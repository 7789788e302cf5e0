//! Whose the rates are by which costs are estimated.

use crate::target::{Measured, Target};

/// In a line, of a target; none where there is nothing to say of them.
pub fn rates(target: &Target) -> Option<String> {
    match target {
        Target { measured: Some(Measured { device, model, losing, .. }), .. } => {
            let losing = match losing.len() {
                0 => String::new(),
                n => format!("; {n} fusions lose there and are not used"),
            };
            Some(format!("rates were measured on {device}, with {}{losing}", model.escape_debug()))
        }
        target if target.is_unmeasured() => {
            let (name, whose) = (&target.name, target.whose_rates());
            Some(format!("nobody measured {name}: rates are {whose}, kernels as they are portable"))
        }
        target if target.name == "cpu" => Some(
            "rates are those of two cores of a server with AVX2, not of this machine (sinter tune measures it)"
                .into(),
        ),
        _ => None,
    }
}
