//! What the passes did and did not do: for each kernel which rewrites made it and which fusions of it were not made, as
//! `explain --kernel` tells it.

use crate::explain::{chains, flip};
use crate::ir::layers::{layer, rename, runs};
use crate::ir::{Decision, Outcome, Report};
use crate::target::Target;
use indexmap::{IndexMap, IndexSet};
use serde::Serialize;
use std::collections::HashMap;

/// Fusions that were not made for one reason, layers folded.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rejected {
    pub pass: String,
    pub at: String,
    pub why: String,
    /// What would have to be otherwise.
    pub turns: String,
    pub times: u64,
}

/// The decisions of a report, as the page has them.
pub(super) struct Tried<'a> {
    pub rejected: Vec<Rejected>,
    /// In words, what would turn a rewrite over, each once; and which of them it is of each rewrite.
    pub turns: Vec<String>,
    pub turn_of: Vec<usize>,
    chains: IndexMap<u64, Vec<&'a Decision>>,
    /// Places in `rejected`, and the numbers of rewrites.
    folded: HashMap<*const Decision, usize>,
    rewrites: HashMap<*const Decision, usize>,
}

impl<'a> Tried<'a> {
    pub fn new(report: &'a Report, target: &Target) -> Tried<'a> {
        let mut reasons: IndexMap<[String; 4], (Vec<u64>, u64)> = IndexMap::new();
        let (mut folded, mut rewrites) = (HashMap::new(), HashMap::new());
        let (mut turns, mut turn_of) = (IndexSet::new(), vec![]);
        for decision in &report.decisions {
            let turn = flip(decision, target);
            let Outcome::Rejected { why } = &decision.outcome else {
                rewrites.insert(std::ptr::from_ref(decision), rewrites.len() + 1);
                turn_of.push(turns.insert_full(turn).0);
                continue;
            };
            let star = |text: &str| rename(text, |_| "*".into());
            let key = [decision.pass.clone(), star(&decision.at), star(&why.to_string()), star(&turn)];
            let entry = reasons.entry(key);
            folded.insert(std::ptr::from_ref(decision), entry.index());
            let (layers, times) = entry.or_default();
            layers.extend(layer(&decision.at));
            *times += 1;
        }
        let named = |text: &str, layers: &[u64]| text.replace("blk.*", &format!("blk.{}", runs(layers)));
        let one = |([pass, at, why, turns], (layers, times)): ([String; 4], (Vec<u64>, u64))| Rejected {
            pass,
            at: named(&at, &layers),
            why: named(&why, &layers),
            turns: named(&turns, &layers),
            times,
        };
        Tried {
            rejected: reasons.into_iter().map(one).collect(),
            turns: turns.into_iter().collect(),
            turn_of,
            chains: chains(report),
            folded,
            rewrites,
        }
    }

    /// Of the kernel of this number, the rewrites that made it, from 1 on, and the places of what was not made of it.
    pub fn of(&self, number: u64) -> (Vec<usize>, Vec<usize>) {
        let chain = self.chains.get(&number).map_or(&[][..], Vec::as_slice);
        let places = |of: &HashMap<*const Decision, usize>| {
            let places: IndexSet<usize> =
                chain.iter().filter_map(|decision| of.get(&std::ptr::from_ref(*decision)).copied()).collect();
            places.into_iter().collect()
        };
        (places(&self.rewrites), places(&self.folded))
    }
}
