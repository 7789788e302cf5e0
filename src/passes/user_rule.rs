//! What the user forbids: a rule everywhere or at some nodes, or that two operations become one kernel.

use super::report::reads;
use super::rule::{Patch, Ref};
use super::{PASSES, Pass};
use crate::ir::{Graph, Kernel, NodeId, Op};
use std::fmt;
use std::str::FromStr;

/// A fusion that the user forbids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserRule {
    /// `RULE[@NODE]`: no pass, or no fusion into a kernel, of this name.
    Deny { rule: String, place: Option<Place> },
    /// `A+B[@NODE]`: nothing that takes both operations in, or makes the kernel of one name of what has the other.
    Apart { a: String, b: String, place: Option<Place> },
}

/// Some nodes, by the names of weights and states that they read: `blk.7`, `blk.7.ffn_down` or, of any layer, `blk.*.ffn_down`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(String);

/// A rule that forbids nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserRuleError {
    #[error("there is no rule {0:?}: rules are passes ({passes}) and kernels ({kernels})", passes = fusions().join(", "), kernels = kernels().join(", "))]
    NoRule(String),
    #[error("there is no operation or kernel {0:?}, to keep apart from another")]
    NoOp(String),
    #[error(
        "{0:?} is no name of a weight or state (after the @ of a rule), nor the beginning of one, such as blk.7 or blk.*.ffn_down"
    )]
    NoPlace(String),
}

fn fusions() -> Vec<&'static str> {
    PASSES.iter().map(|pass| pass.name).filter(|name| *name != "cleanup").collect()
}

fn kernels() -> Vec<&'static str> {
    Kernel::ALL.iter().map(|kernel| kernel.name()).collect()
}

impl Place {
    /// Whether a name is, or begins with, this one: segment by segment, of which `*` is any.
    pub fn is_in(&self, name: &str) -> bool {
        let mut segments = name.split(['.', '[']);
        self.0.split('.').all(|wanted| segments.next().is_some_and(|s| wanted == "*" || wanted == s))
    }
}

impl FromStr for Place {
    type Err = UserRuleError;

    fn from_str(text: &str) -> Result<Place, UserRuleError> {
        let text = text.trim();
        if text.is_empty() || text.split('.').any(str::is_empty) || text.contains(char::is_whitespace) {
            return Err(UserRuleError::NoPlace(text.into()));
        }
        Ok(Place(text.into()))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `RULE[@NODE]` as its two parts.
///
/// # Errors
/// If the first is no pass or kernel, or the second no place.
pub fn rule_at(text: &str) -> Result<(String, Option<Place>), UserRuleError> {
    let (rule, place) = halves(text)?;
    if !fusions().contains(&rule) && !kernels().contains(&rule) {
        return Err(UserRuleError::NoRule(rule.into()));
    }
    Ok((rule.into(), place))
}

fn halves(text: &str) -> Result<(&str, Option<Place>), UserRuleError> {
    match text.split_once('@') {
        Some((what, place)) => Ok((what.trim(), Some(place.parse()?))),
        None => Ok((text.trim(), None)),
    }
}

impl FromStr for UserRule {
    type Err = UserRuleError;

    fn from_str(text: &str) -> Result<UserRule, UserRuleError> {
        let (what, place) = halves(text)?;
        let Some((a, b)) = what.split_once('+') else {
            let (rule, place) = rule_at(text)?;
            return Ok(UserRule::Deny { rule, place });
        };
        let [a, b] = [a, b].map(str::trim);
        for op in [a, b] {
            if !Op::NAMES.contains(&op) && !kernels().contains(&op) {
                return Err(UserRuleError::NoOp(op.into()));
            }
        }
        Ok(UserRule::Apart { a: a.into(), b: b.into(), place })
    }
}

impl fmt::Display for UserRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self {
            UserRule::Deny { rule, place } => {
                write!(f, "{rule}")?;
                place
            }
            UserRule::Apart { a, b, place } => {
                write!(f, "{a}+{b}")?;
                place
            }
        };
        place.as_ref().map_or(Ok(()), |place| write!(f, "@{place}"))
    }
}

impl UserRule {
    /// Whether it keeps `extra` out of a fusion of `members` into a kernel.
    pub(super) fn separates(&self, g: &Graph, kernel: Kernel, members: &[NodeId], extra: NodeId) -> bool {
        let UserRule::Apart { a, b, place } = self else { return false };
        let is_in = |name: &str| kernel.name() == name || members.iter().any(|&n| is_or_holds(g.op(n), name));
        let is_extra = |name: &str| is_or_holds(g.op(extra), name);
        let nodes = || members.iter().chain([&extra]);
        let here = |place: &Place| {
            let described = nodes().filter_map(|&n| Some(g.describe(n).split_once(' ')?.1.to_string()));
            nodes().flat_map(|&n| reads(g, n)).chain(described).any(|name| place.is_in(&name))
        };
        (is_in(a) && is_extra(b) || is_in(b) && is_extra(a)) && place.as_ref().is_none_or(here)
    }

    /// Whether it forbids that `pass` makes this patch around `at`.
    pub(super) fn forbids(&self, pass: &Pass, patch: &Patch, at: NodeId, g: &Graph) -> bool {
        let (matches, place) = match self {
            UserRule::Deny { rule, place } => {
                let makes = patch.fused.is_some_and(|(kernel, _)| kernel.name() == rule);
                (makes || pass.name == rule, place)
            }
            UserRule::Apart { a, b, place } => {
                let takes = |name: &str| {
                    patch.drop.iter().filter_map(|&n| g.get(n)).any(|node| is_or_holds(&node.op, name))
                };
                let fits =
                    |name: &str| patch.fused.is_some_and(|(kernel, _)| kernel.name() == name) || takes(name);
                (patch.fused.is_some() && fits(a) && fits(b), place)
            }
        };
        let here = |place: &Place| {
            let read = patch.drop.iter().chain([&at]).flat_map(|&n| reads(g, n));
            let new = patch.add.iter().flat_map(|new| &new.operands).filter_map(|operand| match operand {
                Ref::Old(v) => Some(v.node).filter(|n| g.get(*n).is_some()),
                Ref::New { .. } => None,
            });
            let leaves = new.filter_map(|n| match g.op(n) {
                Op::Weight { name, .. } | Op::State { name, .. } => Some(name.clone()),
                _ => None,
            });
            let described = g.describe(at).split_once(' ').map(|(_, name)| name.to_string());
            read.chain(leaves).chain(described).any(|name| place.is_in(&name))
        };
        matches && place.as_ref().is_none_or(here)
    }
}

/// Whether an operation has this name, or is a kernel in the body of which one has.
fn is_or_holds(op: &Op, name: &str) -> bool {
    match op {
        Op::Fused(f) => {
            f.kernel.name() == name || f.body.ids().into_iter().any(|n| f.body.op(n).name() == name)
        }
        op => op.name() == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_shown() {
        for text in
            ["merge", "matmul_swiglu@blk.7", "swiglu@blk.*.ffn_gate", "silu+matmul", "add+rms_norm@blk.0"]
        {
            assert_eq!(text.parse::<UserRule>().unwrap().to_string(), text);
        }
        for (wrong, says) in [
            ("fuse", "there is no rule \"fuse\""),
            ("", "there is no rule"),
            ("cleanup", "there is no rule"),
            ("merge@", "\"\" is no name of a weight"),
            ("merge@blk..x", "\"blk..x\" is no name of a weight"),
            ("add+foo", "\"foo\""),
            ("+add", "\"\""),
        ] {
            let error = wrong.parse::<UserRule>().unwrap_err().to_string();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }

    #[test]
    fn places_are_compared_by_segments() {
        let place = |text: &str| text.parse::<Place>().unwrap();
        assert!(place("blk.1").is_in("blk.1.ffn_down.weight"));
        assert!(!place("blk.1").is_in("blk.10.ffn_down.weight"));
        assert!(place("blk.*.ffn_down").is_in("blk.10.ffn_down.weight"));
        assert!(place("output.weight").is_in("output.weight[0..]"));
        assert!(!place("output.weight.x").is_in("output.weight"));
    }
}
