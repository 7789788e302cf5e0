//! What was measured on a device, by which the cost model goes there.

use crate::ir::Kernel;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a target's rates come from, and what else was found on the way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The device, as it names itself, and the kernels that ran there.
    pub device: String,
    /// Version of sinter.
    pub engine: String,
    /// The model whose steps were timed.
    pub model: String,
    /// The share of the rates that each kernel reached. It is told, and decides nothing: nobody measured what primitives by themselves reach,
    /// and a fusion must not lose to a guess.
    pub efficiency: BTreeMap<Kernel, f64>,
    /// How long kernels took.
    pub times: Vec<MeasuredTime>,
    /// Fusions with which a step took longer than without.
    pub losing: Vec<Losing>,
}

/// How long a kernel of a step took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredTime {
    /// The name of the step's graph.
    pub step: String,
    /// Its node in words.
    pub at: String,
    pub us: f64,
}

/// A pass with which a step took longer than without.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Losing {
    pub pass: String,
    /// The name of the step's graph.
    pub step: String,
    /// Microseconds of the step.
    pub with_us: f64,
    pub without_us: f64,
}

impl Measured {
    /// What was found of a pass in a step, if it loses there.
    pub fn losing(&self, pass: &str, step: &str) -> Option<&Losing> {
        self.losing.iter().find(|l| l.pass == pass && l.step == step)
    }

    /// Checks what may come from a file.
    ///
    /// # Errors
    /// Which number makes no sense.
    pub fn validate(&self) -> Result<(), String> {
        let times = self.times.iter().map(|time| time.us);
        let steps = self.losing.iter().flat_map(|l| [l.with_us, l.without_us]);
        match times.chain(steps).find(|us| !(us.is_finite() && *us >= 0.0)) {
            Some(us) => Err(format!("measured times must not be negative, and one is {us}")),
            None => Ok(()),
        }
    }
}
