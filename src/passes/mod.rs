//! The passes: rules that rewrite a graph, and the pipeline that runs them.
//!
//! Each fusion has a file of its own that opens with the rewrite it makes. A rule never mutates: it returns a
//! [`Patch`] or says why not ([`Reject`]), and what it decides is recorded in the [`Report`].

mod add_rmsnorm;
mod attention;
pub mod bisect;
mod cleanup;
pub mod cost;
mod dequant_matmul;
mod dequant_rmsnorm;
mod gated_scan;
mod merge;
mod quantise_acts;
mod report;
mod rope_attention;
mod rope_kv;
mod rule;
mod sample_head;
mod swiglu;
mod user_rule;

pub use crate::ir::{Report, Totals};
pub use dequant_matmul::{activations, has_residual};
pub use report::{reads, totals};
pub use rule::{Cx, Fusion, NewNode, Patch, Ref, Reject, Rule, is_free, sole_use};
pub use user_rule::{Place, UserRule, UserRuleError, rule_at};

use crate::ir::{Decision, Graph, NodeId, Origin, Outcome, Why};
use crate::target::Target;
use std::collections::BTreeSet;

/// A named rule and when it runs.
#[derive(Clone, Copy)]
pub struct Pass {
    /// What options and reports call it: letters, digits and underscores.
    pub name: &'static str,
    /// What it rewrites, in a line.
    pub summary: &'static str,
    pub rule: Rule,
    /// The operations, and kernels of passes before, that it takes in, by name: what is left of them has a reason.
    pub absorbs: &'static [&'static str],
    /// Runs until nothing changes; otherwise each node is visited once.
    pub repeat: bool,
}

/// Every pass in the order it runs. `cleanup` runs first and once more after `quantise_acts`.
pub const PASSES: [Pass; 12] = [
    cleanup::PASS,
    quantise_acts::PASS,
    dequant_matmul::PASS,
    dequant_rmsnorm::PASS,
    rope_kv::PASS,
    merge::PASS,
    add_rmsnorm::PASS,
    gated_scan::PASS,
    swiglu::PASS,
    attention::PASS,
    rope_attention::PASS,
    sample_head::PASS,
];

/// The passes that are no fusions; `--no-fuse` keeps them.
pub const NOT_FUSIONS: [&str; 2] = ["cleanup", "quantise_acts"];

/// A list of passes and how to run them.
#[derive(Clone)]
pub struct Pipeline {
    /// Those that can be selected, and of them those that run; both in order.
    known: Vec<Pass>,
    passes: Vec<Pass>,
    /// Stop after this many rewrites.
    pub fuel: Option<u64>,
    /// Check the graph after every patch.
    pub verify_each: bool,
    /// Fusions that the user forbids.
    pub denied: Vec<UserRule>,
}

/// One rewrite of a pipeline.
#[derive(Clone, Copy, Debug)]
pub struct Rewrite<'a> {
    /// Which of the pipeline's rewrites it is, from 1 on: with a [`Pipeline::fuel`] of one less, it is the first that is not made.
    pub number: u64,
    /// The name of the pass.
    pub pass: &'static str,
    /// The node that the rule looked at; it may be gone afterwards.
    pub at: NodeId,
    pub patch: &'a Patch,
}

/// Who watches a pipeline at work. `()` does not.
pub trait Observer {
    /// Shows a rewrite and the graph that it is about to change.
    fn before_rewrite(&mut self, _rewrite: &Rewrite, _g: &Graph) {}
    /// Shows the nodes that the rewrite added, and the graph that has them.
    fn after_rewrite(&mut self, _rewrite: &Rewrite, _added: &[NodeId], _g: &Graph) {}
    /// Shows the graph after a pass.
    fn after_pass(&mut self, _pass: &'static str, _g: &Graph) {}
}

impl Observer for () {}

/// Shows the graph after each pass alone.
pub struct AfterPass<F>(pub F);

impl<F: FnMut(&'static str, &Graph)> Observer for AfterPass<F> {
    fn after_pass(&mut self, pass: &'static str, g: &Graph) {
        (self.0)(pass, g);
    }
}

/// A pipeline that cannot run, or a rule that broke the graph.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    #[error("there is no pass {name:?}; the passes are {}", known.join(", "))]
    Unknown { name: String, known: Vec<&'static str> },
    #[error("a pass cannot be called {name:?}: {message}")]
    Name { name: &'static str, message: &'static str },
    #[error("rewrite {rewrite}, by pass {pass} at {at}, cannot be made: {message}")]
    Patch { rewrite: u64, pass: &'static str, at: String, message: String },
    #[error("rewrite {rewrite}, by pass {pass} at {at}, breaks the graph:\n{message}")]
    Verify { rewrite: u64, pass: &'static str, at: String, message: String },
}

/// The names of all passes in order.
pub fn names() -> Vec<&'static str> {
    PASSES.iter().map(|p| p.name).collect()
}

impl Pipeline {
    /// All passes; without `quantise_acts` if `exact`.
    pub fn standard(exact: bool) -> Pipeline {
        let all = PASSES.to_vec();
        let pipeline = Pipeline {
            known: all.clone(),
            passes: all,
            fuel: None,
            verify_each: cfg!(debug_assertions),
            denied: vec![],
        };
        if exact { pipeline.exact() } else { pipeline }
    }

    /// Without `quantise_acts`.
    #[must_use]
    pub fn exact(mut self) -> Pipeline {
        self.passes.retain(|p| p.name != quantise_acts::PASS.name);
        self
    }

    /// With a pass that is none of [`PASSES`], as the last. It is selected and reported as they are, and counts as a fusion.
    ///
    /// # Errors
    /// If there is a pass of that name, or nobody could select it.
    pub fn with(self, pass: Pass) -> Result<Pipeline, PassError> {
        let last = self.known.len();
        self.insert(last, pass)
    }

    /// With a pass that is none of [`PASSES`], right after the one of this name, whether that runs or not.
    ///
    /// # Errors
    /// If there is no pass `name`; and as [`Pipeline::with`].
    pub fn insert_after(self, name: &str, pass: Pass) -> Result<Pipeline, PassError> {
        let Some(at) = self.known.iter().position(|p| p.name == name) else {
            return Err(self.unknown(name));
        };
        self.insert(at + 1, pass)
    }

    fn insert(mut self, at: usize, pass: Pass) -> Result<Pipeline, PassError> {
        let refuse = |message| Err(PassError::Name { name: pass.name, message });
        if pass.name.is_empty() || !pass.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return refuse("names are letters, digits and underscores");
        }
        if self.known.iter().any(|p| p.name == pass.name) {
            return refuse("there is one of that name");
        }
        let runs = |p: &&Pass| self.passes.iter().any(|q| q.name == p.name);
        let before = self.known[..at].iter().filter(runs).count();
        self.passes.insert(before, pass);
        self.known.insert(at, pass);
        Ok(self)
    }

    fn unknown(&self, name: &str) -> PassError {
        PassError::Unknown { name: name.into(), known: self.known.iter().map(|p| p.name).collect() }
    }

    /// The passes with these names, in the order of [`PASSES`] and what was inserted there, whatever the order of the names. A name
    /// with a minus in front takes a pass out; if all have one, the rest run.
    ///
    /// # Errors
    /// If there is no pass of a name.
    pub fn select<S: AsRef<str>>(mut self, list: &[S]) -> Result<Pipeline, PassError> {
        let list: Vec<&str> = list.iter().map(|s| s.as_ref().trim()).filter(|s| !s.is_empty()).collect();
        for name in &list {
            let name = name.strip_prefix('-').unwrap_or(name);
            if !self.known.iter().any(|p| p.name == name) {
                return Err(self.unknown(name));
            }
        }
        let keeps: Vec<&str> = list.iter().copied().filter(|n| !n.starts_with('-')).collect();
        let only_removes = keeps.is_empty() && !list.is_empty();
        self.passes = self
            .known
            .iter()
            .copied()
            .filter(|p| {
                only_removes && self.passes.iter().any(|q| q.name == p.name) || keeps.contains(&p.name)
            })
            .filter(|p| !list.iter().any(|n| n.strip_prefix('-') == Some(p.name)))
            .collect();
        Ok(self)
    }

    /// Only the passes that are no fusions.
    #[must_use]
    pub fn without_fusions(mut self) -> Pipeline {
        self.passes.retain(|p| NOT_FUSIONS.contains(&p.name));
        self
    }

    /// The names of the passes that run, in order.
    pub fn enabled(&self) -> Vec<&'static str> {
        self.passes.iter().map(|p| p.name).collect()
    }

    /// Runs the passes on `g`.
    ///
    /// # Errors
    /// See [`Pipeline::run_observed`].
    pub fn run(&self, g: &mut Graph, target: &Target) -> Result<Report, PassError> {
        self.run_observed(g, target, &mut ())
    }

    /// Runs the passes on `g`, and shows an observer each rewrite and the graph after each pass.
    ///
    /// # Errors
    /// A rule that breaks the graph, by the name of its pass: a defect of the rule. With [`Pipeline::verify_each`] that is the first
    /// that does; without it, only what cannot be applied is noticed.
    pub fn run_observed(
        &self,
        g: &mut Graph,
        target: &Target,
        observer: &mut dyn Observer,
    ) -> Result<Report, PassError> {
        let span = tracing::debug_span!("passes", graph = %g.name, target = %target.name);
        let _guard = span.enter();
        let enabled = self.enabled();
        let mut run = Run {
            pipeline: self,
            cx: Cx { target, enabled: &enabled, apart: &[] },
            observer,
            report: Report::default(),
            spent: 0,
        };
        run.report.graph.clone_from(&g.name);
        run.report.rules = self.denied.iter().map(UserRule::to_string).collect();
        run.report.bounds = g.bounds;
        run.report.lowered = totals(g, target);
        let mut measured = false;
        for pass in &self.passes {
            if !measured && !NOT_FUSIONS.contains(&pass.name) {
                run.report.before = totals(g, target);
                measured = true;
            }
            run.pass(g, pass)?;
            if pass.name == quantise_acts::PASS.name && enabled.contains(&cleanup::PASS.name) {
                run.pass(g, &cleanup::PASS)?;
            }
            run.observer.after_pass(pass.name, g);
        }
        run.report.after = totals(g, target);
        if !measured {
            run.report.before = run.report.after.clone();
        }
        report::finish(&mut run.report, g, target);
        run.reasons(g);
        Ok(run.report)
    }
}

struct Run<'a> {
    pipeline: &'a Pipeline,
    cx: Cx<'a>,
    observer: &'a mut dyn Observer,
    report: Report,
    spent: u64,
}

impl Run<'_> {
    fn pass(&mut self, g: &mut Graph, pass: &Pass) -> Result<(), PassError> {
        loop {
            let mut fired = 0;
            let mut work = g.order();
            work.reverse();
            while let Some(id) = work.pop() {
                if g.get(id).is_none() {
                    continue;
                }
                let denied = &self.pipeline.denied;
                let forbidden = |patch: &Patch| denied.iter().find(|rule| rule.forbids(pass, patch, id, g));
                let mut offered = (pass.rule)(g, id, &self.cx);
                if let Ok(patch) = &offered
                    && let Some(rule) = forbidden(patch)
                {
                    let why = Why::Denied { rule: rule.to_string() };
                    // It may leave out what the user wants apart.
                    let less = (pass.rule)(g, id, &Cx { apart: denied, ..self.cx });
                    let less = less.ok().filter(|less| forbidden(less).is_none());
                    self.reject(g, pass, id, &patch.drop, why);
                    let Some(less) = less else { continue };
                    offered = Ok(less);
                }
                match offered {
                    Ok(patch) => {
                        let measured =
                            self.cx.target.measured.as_ref().filter(|_| pass.name != cleanup::PASS.name);
                        if let Some(found) = measured.and_then(|m| m.losing(pass.name, &g.name)) {
                            let (with_us, without_us) = (found.with_us, found.without_us);
                            self.reject(g, pass, id, &patch.drop, Why::LosesHere { with_us, without_us });
                            continue;
                        }
                        let Some(added) = self.apply(g, pass, id, &patch)? else { return Ok(()) };
                        // What a rule adds it may extend: a matmul takes its residual, a merged pair its SwiGLU.
                        work.extend(added.into_iter().rev());
                        fired += 1;
                    }
                    Err(Reject::Near { at, why, others }) => self.reject(g, pass, at, &others, why),
                    Err(Reject::NoMatch) => {}
                }
            }
            if fired == 0 || !pass.repeat {
                return Ok(());
            }
        }
    }

    /// Applies a patch and returns the nodes it added; nothing if the fuel is spent.
    fn apply(
        &mut self,
        g: &mut Graph,
        pass: &Pass,
        id: NodeId,
        patch: &Patch,
    ) -> Result<Option<Vec<NodeId>>, PassError> {
        if self.pipeline.fuel.is_some_and(|fuel| self.spent >= fuel) {
            self.reject(g, pass, id, &patch.drop, Why::FuelExhausted);
            return Ok(None);
        }
        self.spent += 1;
        let at = g.describe(id);
        let takes = numbers(g, &patch.drop);
        let replaced = patch
            .drop
            .iter()
            .rev()
            .filter_map(|&n| g.get(n))
            .map(|node| report::label(&node.op).to_string())
            .collect();
        let outcome = match patch.fused {
            Some((kernel, gain)) => Outcome::Fired { kernel, replaced, gain },
            None => {
                let added = patch.add.iter().map(|new| report::label(&new.op).to_string()).collect();
                Outcome::Rewritten { replaced, added }
            }
        };
        *self.report.rewrites.entry(pass.name.to_string()).or_insert(0) += 1;
        let rewrite = Rewrite { number: self.spent, pass: pass.name, at: id, patch };
        self.observer.before_rewrite(&rewrite, g);
        let added = match patch.apply(g) {
            Ok(added) => added,
            Err(message) => {
                return Err(PassError::Patch { rewrite: rewrite.number, pass: rewrite.pass, at, message });
            }
        };
        if self.pipeline.verify_each
            && let Err(e) = crate::ir::verify_unfinished(g)
        {
            let message = e.to_string();
            return Err(PassError::Verify { rewrite: rewrite.number, pass: rewrite.pass, at, message });
        }
        let makes = numbers(g, &added);
        self.record(Decision { pass: pass.name.to_string(), at, takes, makes, outcome });
        self.observer.after_rewrite(&rewrite, &added, g);
        Ok(Some(added))
    }

    /// What is left of primitives, and no decision is about: why each pass that takes such in did not.
    fn reasons(&mut self, g: &Graph) {
        let left = self.report.kernels.iter().filter(|k| k.origin != Origin::Fused).map(|k| k.number);
        let rejected =
            |n: &u64| self.report.chain(*n).iter().any(|d| matches!(d.outcome, Outcome::Rejected { .. }));
        let silent: BTreeSet<u64> = left.filter(|n| !rejected(n)).collect();
        for id in g.order() {
            if !silent.contains(&g.number(id)) {
                continue;
            }
            let op = report::label(g.op(id));
            let takers =
                self.pipeline.known.iter().filter(|pass| pass.absorbs.contains(&op)).collect::<Vec<_>>();
            if takers.is_empty() {
                let why = Why::NoPass { op: op.into() };
                let (at, takes) = (g.describe(id), numbers(g, &[id]));
                let outcome = Outcome::Rejected { why };
                self.record(Decision { pass: "none".into(), at, takes, makes: vec![], outcome });
            }
            let off: Vec<_> = takers.iter().filter(|pass| !self.cx.runs(pass.name)).copied().collect();
            for pass in if off.is_empty() { &takers } else { &off } {
                let why = match off.is_empty() {
                    true => Why::NoPattern { pattern: pass.summary.into() },
                    false => Why::PassOff,
                };
                self.reject(g, pass, id, &[], why);
            }
        }
    }

    /// Records that `at`, with these others, stays as it is.
    fn reject(&mut self, g: &Graph, pass: &Pass, at: NodeId, others: &[NodeId], why: Why) {
        let mut takes = numbers(g, others);
        takes.push(g.number(at));
        takes.sort_unstable();
        takes.dedup();
        let decision = Decision {
            pass: pass.name.to_string(),
            at: g.describe(at),
            takes,
            makes: vec![],
            outcome: Outcome::Rejected { why },
        };
        // A pass that repeats says the same of the same again.
        if !pass.repeat || !self.report.decisions.contains(&decision) {
            self.record(decision);
        }
    }

    fn record(&mut self, decision: Decision) {
        let Decision { pass, at, outcome, .. } = &decision;
        tracing::debug!(pass, %at, ?outcome);
        self.report.decisions.push(decision);
    }
}

fn numbers(g: &Graph, nodes: &[NodeId]) -> Vec<u64> {
    nodes.iter().map(|&n| g.number(n)).collect()
}
