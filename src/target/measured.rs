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
    /// Positions to which the caches of those steps were filled, all but the step's own.
    pub context: u64,
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

/// Tokens of a step, by its name: 512 of `t512`.
fn tokens(step: &str) -> Option<f64> {
    let number = step.strip_prefix('t')?.split('_').next()?;
    number.parse().ok().filter(|n: &f64| *n >= 1.0)
}

impl Measured {
    /// The names of the steps whose kernels were timed.
    pub fn steps(&self) -> Vec<&str> {
        let mut steps: Vec<&str> = self.times.iter().map(|time| time.step.as_str()).collect();
        steps.dedup();
        steps
    }

    /// Microseconds of the kernels of a step, by their words; empty unless it was timed with its caches filled so far.
    pub fn of_step(&self, step: &str, context: u64) -> BTreeMap<&str, f64> {
        let same = |time: &&MeasuredTime| time.step == step && self.context == context;
        self.times.iter().filter(same).map(|time| (time.at.as_str(), time.us)).collect()
    }

    /// What was found of a pass in a step, or in the one of those timed that is nearest to it in size, if it loses there.
    pub fn losing(&self, pass: &str, step: &str) -> Option<&Losing> {
        let far = |other: &str| match (tokens(other), tokens(step)) {
            (Some(a), Some(b)) => (a / b).ln().abs(),
            _ => f64::INFINITY,
        };
        let timed = self.steps().into_iter().chain(self.losing.iter().map(|l| l.step.as_str()));
        let nearest = timed.min_by(|a, b| far(a).total_cmp(&far(b)))?;
        self.losing.iter().find(|l| l.pass == pass && l.step == nearest && far(nearest).is_finite())
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
