//! Fusions that must happen, for tests of models and compilers.

use crate::ir::{Decision, Outcome, Report};
use crate::passes::{Place, UserRuleError, rule_at};
use std::fmt;
use std::str::FromStr;

/// `RULE[@NODE]`: a fusion by the pass, or into the kernel, of this name, there or anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    rule: String,
    place: Option<Place>,
}

/// A fusion that was expected and not made, with the reasons that are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmet {
    pub expectation: String,
    /// What was there instead: `pass: node not fused: why`.
    pub because: Vec<String>,
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} did not happen", self.expectation)?;
        match &self.because[..] {
            [] => write!(f, ": {}", super::NOT_TRIED),
            because => because.iter().try_for_each(|reason| write!(f, "\n  {reason}")),
        }
    }
}

impl FromStr for Expectation {
    type Err = UserRuleError;

    fn from_str(text: &str) -> Result<Expectation, UserRuleError> {
        let (rule, place) = rule_at(text)?;
        Ok(Expectation { rule, place })
    }
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rule)?;
        self.place.as_ref().map_or(Ok(()), |place| write!(f, "@{place}"))
    }
}

impl Expectation {
    /// Whether a final kernel of the report came of such a fusion.
    ///
    /// # Errors
    /// Why not, as far as decisions say.
    pub fn check(&self, report: &Report) -> Result<(), Unmet> {
        let chains = super::chains(report);
        let mut because = vec![];
        for kernel in &report.kernels {
            let named = kernel.at.split_once(' ').map(|(_, name)| name);
            let mut names = kernel.reads.iter().map(String::as_str).chain(named);
            if !self.place.as_ref().is_none_or(|place| names.any(|name| place.is_in(name))) {
                continue;
            }
            for d in chains.get(&kernel.number).into_iter().flatten() {
                match self.speaks_of(d) {
                    Some(None) => return Ok(()),
                    Some(Some(why)) if !because.contains(&why) => because.push(why),
                    _ => {}
                }
            }
        }
        if because.is_empty() {
            because
                .extend(super::why_anywhere(report, &self.rule).map(|why| format!("{}: {why}", self.rule)));
        }
        Err(Unmet { expectation: self.to_string(), because })
    }

    /// Whether a decision is about the rule: nothing of one that was made, else why it was not.
    fn speaks_of(&self, d: &Decision) -> Option<Option<String>> {
        match &d.outcome {
            Outcome::Fired { kernel, .. } => {
                (d.pass == self.rule || kernel.name() == self.rule).then_some(None)
            }
            Outcome::Rewritten { .. } => (d.pass == self.rule).then_some(None),
            // What a pass would have made is not said of one that makes several kernels.
            Outcome::Rejected { why } => {
                let same = d.pass == self.rule || (self.rule == "matmul_swiglu" && d.pass == "swiglu");
                same.then(|| Some(format!("{}: {} not fused: {why}", d.pass, d.at)))
            }
        }
    }
}
