//! `--pass`, `--layer`, `--reason`, `--kernel`: which decisions, and which kernels came of them.

use super::Error;
use sinter::explain::{Row, chains, rows};
use sinter::ir::{Decision, Outcome, Report, Why};
use sinter::passes::{Place, names};
use std::collections::BTreeSet;

/// Which decisions are asked for.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pass: Option<String>,
    place: Option<Place>,
    reason: Option<String>,
}

impl Filter {
    /// # Errors
    /// If there is no such pass or reason.
    pub fn new(pass: Option<String>, place: Option<Place>, reason: Option<String>) -> Result<Filter, Error> {
        if let Some(pass) = pass.as_deref().filter(|pass| !names().contains(pass)) {
            return Err(format!("there is no pass {pass:?}; the passes are {}", names().join(", ")).into());
        }
        if let Some(reason) = reason.as_deref().filter(|reason| !Why::NAMES.contains(reason)) {
            let reasons = Why::NAMES.join(", ");
            return Err(format!("there is no reason {reason:?}; there are {reasons}").into());
        }
        Ok(Filter { pass, place, reason })
    }

    /// # Errors
    /// If none of the steps has anything where it looks, as then a name is misspelt.
    pub fn looks_somewhere(&self, steps: &[Report]) -> Result<(), Error> {
        let Some(place) = &self.place else { return Ok(()) };
        let reads = || steps.iter().flat_map(|step| &step.kernels).flat_map(|kernel| &kernel.reads);
        let decided = || steps.iter().flat_map(|step| &step.decisions).any(|d| is_at(d, place));
        if reads().any(|name| place.is_in(name)) || decided() {
            return Ok(());
        }
        let one = reads().next().map_or("blk.0", String::as_str);
        Err(format!("there is no weight or state whose name begins with {place}; one is {one}").into())
    }

    /// Whether it lets everything through.
    pub fn is_empty(&self) -> bool {
        self.pass.is_none() && self.place.is_none() && self.reason.is_none()
    }

    /// Whether a decision is asked for.
    pub fn takes(&self, d: &Decision) -> bool {
        let why = match &d.outcome {
            Outcome::Rejected { why } => Some(why.name()),
            Outcome::Fired { .. } | Outcome::Rewritten { .. } => None,
        };
        self.pass.as_ref().is_none_or(|pass| d.pass == *pass)
            && self.place.as_ref().is_none_or(|place| is_at(d, place))
            && self.reason.as_deref().is_none_or(|reason| why == Some(reason))
    }

    /// The rows of the table that such a decision is behind, with their numbers; of a place also those that read what is there.
    pub fn rows<'a>(&self, report: &'a Report) -> Vec<(usize, Row<'a>)> {
        let numbered = rows(report).into_iter().enumerate();
        if self.is_empty() {
            return numbered.collect();
        }
        let chains = chains(report);
        let of_place = self.place.as_ref().filter(|_| self.pass.is_none() && self.reason.is_none());
        let fits = |row: &Row| {
            row.kernels.iter().any(|kernel| {
                let decided =
                    chains.get(&kernel.number).is_some_and(|chain| chain.iter().any(|d| self.takes(d)));
                decided || of_place.is_some_and(|place| kernel.reads.iter().any(|name| place.is_in(name)))
            })
        };
        numbered.filter(|(_, row)| fits(row)).collect()
    }
}

/// Whether a decision is about what has a name there.
fn is_at(d: &Decision, place: &Place) -> bool {
    d.at.split_once(' ').is_some_and(|(_, name)| place.is_in(name))
}

/// Rows of the table with their numbers, and the place by which they were found, if by one.
type Named<'a> = (Vec<(usize, Row<'a>)>, Option<Place>);

/// The rows of the table that `wanted` names, with their numbers: the one of this number, those of this kernel or primitive, or those that
/// read weights or states of this name.
///
/// # Errors
/// If there is none.
pub fn named<'a>(report: &'a Report, wanted: &str) -> Result<Named<'a>, Error> {
    let all: Vec<(usize, Row)> = rows(report).into_iter().enumerate().collect();
    let kernels: BTreeSet<&str> = all.iter().map(|(_, row)| row.kernel()).collect();
    let none = || {
        format!(
            "{} has no kernel {wanted}: there are 1 to {}, those of a name ({}), and those that read a weight or state, such as {}",
            report.graph,
            all.len(),
            kernels.iter().copied().collect::<Vec<_>>().join(", "),
            all.iter().find_map(|(_, row)| row.kernels[0].reads.first()).map_or("blk.0", String::as_str)
        )
    };
    if let Ok(number) = wanted.parse::<usize>() {
        let found: Vec<_> = all.iter().filter(|(i, _)| i + 1 == number).cloned().collect();
        return if found.is_empty() { Err(none().into()) } else { Ok((found, None)) };
    }
    let found: Vec<_> = all.iter().filter(|(_, row)| row.kernel() == wanted).cloned().collect();
    if !found.is_empty() {
        return Ok((found, None));
    }
    // A weight may be named without its layer.
    for name in [wanted.to_string(), format!("blk.*.{wanted}")] {
        let place: Place = name.parse()?;
        let reads = |row: &Row| row.kernels.iter().any(|k| k.reads.iter().any(|name| place.is_in(name)));
        let found: Vec<_> = all.iter().filter(|(_, row)| reads(row)).cloned().collect();
        if !found.is_empty() {
            return Ok((found, Some(place)));
        }
    }
    Err(none().into())
}

/// What of a report is asked for: the kernels of these rows, and the decisions behind them or those that the filter takes.
pub fn narrowed(report: &Report, rows: &[(usize, Row)], filter: &Filter) -> Report {
    let numbers: BTreeSet<u64> = rows.iter().flat_map(|(_, row)| &row.kernels).map(|k| k.number).collect();
    let chains = chains(report);
    // A decision is what it is where it lies.
    let behind: BTreeSet<*const Decision> =
        numbers.iter().filter_map(|n| chains.get(n)).flatten().map(|d| std::ptr::from_ref(*d)).collect();
    let asked = |d: &Decision| match filter.is_empty() {
        true => behind.contains(&std::ptr::from_ref(d)),
        false => filter.takes(d),
    };
    let kernels = report.kernels.iter().filter(|k| numbers.contains(&k.number)).cloned().collect();
    let decisions = report.decisions.iter().filter(|d| asked(d)).cloned().collect();
    Report { decisions, kernels, ..report.clone() }
}
