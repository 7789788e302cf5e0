//! Finding the one rewrite that breaks something, by halving the number of rewrites that are made.

use super::{Observer, PassError, Pipeline, Rewrite};
use crate::ir::{Graph, Op, text};
use crate::target::Target;

/// The rewrite that breaks it.
#[derive(Debug)]
pub struct Culprit {
    /// Which of the pipeline's rewrites it is, from 1 on: with [`Pipeline::fuel`] one less than that, all is good.
    pub number: u64,
    /// How many rewrites there are; those after one that breaks the graph itself are not counted.
    pub of: u64,
    /// The pass that made it.
    pub pass: &'static str,
    /// The node that the rule looked at, in words.
    pub at: String,
    /// The operations that it took out and put in, in order.
    pub dropped: Vec<String>,
    pub added: Vec<String>,
    /// The lines that differ, as [`text::diff`] has them; empty if the patch could not be applied.
    pub diff: Vec<String>,
    /// How it breaks the graph itself, if it does.
    pub broken: Option<PassError>,
}

/// Why there is nothing to find.
#[derive(Debug, thiserror::Error)]
pub enum BisectError {
    #[error("no rewrite is made, so none can break anything")]
    NoRewrites,
    #[error("the graph before any rewrite is bad already; it must be good")]
    BadBefore,
    #[error("the graph after all {rewrites} rewrites is good; it must be bad")]
    GoodAfter { rewrites: u64 },
    /// What the judge could not do.
    #[error("{0}")]
    Judge(String),
    /// A rule that does not do the same each time.
    #[error("with the same graph, the passes do something else each time")]
    Unsteady,
}

/// Finds a rewrite of `graph` before which `judge` finds the graph good, and after which bad. The judge is given the number of rewrites and
/// what they made of the graph, and is asked for at most `3 + log2(rewrites)` graphs. A graph that breaks a rule of the IR is bad without asking;
/// where [`Pipeline::fuel`] is given, those are all rewrites that there are.
///
/// # Errors
/// If the graph is bad before any rewrite or good after all, and whatever error the judge returns.
pub fn bisect(
    graph: &Graph,
    pipeline: &Pipeline,
    target: &Target,
    judge: &mut dyn FnMut(u64, &Graph) -> Result<bool, String>,
) -> Result<Culprit, BisectError> {
    let all = Trial::run(graph, pipeline, pipeline.fuel, target);
    let rewrites = all.made;
    if rewrites == 0 {
        return Err(BisectError::NoRewrites);
    }
    let mut ask = |fuel: u64, graph: &Graph| judge(fuel, graph).map_err(BisectError::Judge);
    if !ask(0, graph)? {
        return Err(BisectError::BadBefore);
    }
    // With `good` rewrites it is good, with `bad` of them it is not.
    let (mut good, mut bad) = (0, rewrites);
    let mut next = rewrites - 1;
    if all.broken.is_none() {
        if ask(rewrites, &all.graph)? {
            return Err(BisectError::GoodAfter { rewrites });
        }
        next = rewrites / 2;
    }
    // The one before a graph that is broken comes first: most likely the command has nothing against it.
    while bad - good > 1 {
        let trial = Trial::run(graph, pipeline, Some(next), target);
        if trial.broken.is_some() || trial.made != next {
            return Err(BisectError::Unsteady);
        }
        *(if ask(next, &trial.graph)? { &mut good } else { &mut bad }) = next;
        next = good + (bad - good) / 2;
    }
    let trial = Trial::run(graph, pipeline, Some(bad), target);
    let last = trial.last.filter(|last| last.number == bad).ok_or(BisectError::Unsteady)?;
    let applied = !matches!(trial.broken, Some(PassError::Patch { .. }));
    let is_new = |id: &_| applied && last.before.get(*id).is_none();
    Ok(Culprit {
        number: bad,
        of: rewrites,
        pass: last.pass,
        at: last.at,
        dropped: last.dropped,
        added: trial.graph.order().into_iter().filter(is_new).map(|id| name(trial.graph.op(id))).collect(),
        diff: if applied { text::diff(&last.before, &trial.graph) } else { vec![] },
        broken: trial.broken,
    })
}

fn name(op: &Op) -> String {
    op.kernel().map_or_else(|| op.name().into(), |kernel| format!("fused {}", kernel.name()))
}

/// A run of the pipeline with some fuel.
struct Trial {
    graph: Graph,
    /// The rewrites that were made, one that broke the graph included.
    made: u64,
    /// The rewrite that the fuel was just enough for.
    last: Option<Last>,
    broken: Option<PassError>,
}

struct Last {
    number: u64,
    pass: &'static str,
    at: String,
    dropped: Vec<String>,
    before: Graph,
}

impl Trial {
    fn run(graph: &Graph, pipeline: &Pipeline, fuel: Option<u64>, target: &Target) -> Trial {
        // No rule is shown a broken graph, on which it might go round in circles.
        let pipeline = Pipeline { fuel, verify_each: true, ..pipeline.clone() };
        let mut graph = graph.clone();
        let mut watch = Watch { fuel, made: 0, last: None };
        let broken = pipeline.run_observed(&mut graph, target, &mut watch).err();
        Trial { graph, made: watch.made, last: watch.last, broken }
    }
}

struct Watch {
    fuel: Option<u64>,
    made: u64,
    last: Option<Last>,
}

impl Observer for Watch {
    fn before_rewrite(&mut self, rewrite: &Rewrite, g: &Graph) {
        self.made = rewrite.number;
        if self.fuel == Some(rewrite.number) {
            let dropped = rewrite.patch.drop.iter().rev().filter(|id| g.get(**id).is_some());
            self.last = Some(Last {
                number: rewrite.number,
                pass: rewrite.pass,
                at: g.describe(rewrite.at),
                dropped: dropped.map(|&id| name(g.op(id))).collect(),
                before: g.clone(),
            });
        }
    }
}
