//! What a [`Report`] answers: of each kernel why it exists, what it stands for, what it costs and what limits it.

mod diff;
mod expect;
mod flip;
mod rates;
mod remarks;

pub use diff::{Change, Difference, StepDifference, difference};
pub use expect::{Expectation, Unmet};
pub use flip::flip;
pub use rates::{rates, step};
pub use remarks::remarks;

use crate::ir::layers::{layer, rename, runs};
use crate::ir::{DType, Decision, FinalKernel, Limit, Origin, Outcome, Report, Why};
use indexmap::IndexMap;
use std::collections::BTreeSet;

/// The launches of a graph that do the same, layers folded.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// In the order of the graph, at least one.
    pub kernels: Vec<&'a FinalKernel>,
    /// What they read, layers folded.
    pub of: String,
    pub us: f64,
    pub launches: u64,
    pub bytes: u64,
    pub operations: u64,
    /// By how much less time, as estimated, than what fusions made them of.
    pub saved_us: f64,
}

impl Row<'_> {
    /// The kernel's name, or the primitive's.
    pub fn kernel(&self) -> &str {
        &self.kernels[0].kernel
    }

    pub fn limit(&self) -> Limit {
        self.kernels[0].limit
    }

    pub fn origin(&self) -> &Origin {
        &self.kernels[0].origin
    }

    /// The primitives that one of them stands for, equal ones counted: `dequant ×2, matmul`.
    pub fn replaces(&self, report: &Report) -> String {
        let form = self.kernels[0].form.and_then(|form| report.forms.get(form as usize));
        let Some(form) = form else { return String::new() };
        let mut counts: IndexMap<&str, u64> = IndexMap::new();
        for primitive in form.primitives.iter().filter(|primitive| !primitive.view) {
            *counts.entry(&primitive.op).or_default() += 1;
        }
        let counted = counts.iter().map(|(op, n)| if *n > 1 { format!("{op} ×{n}") } else { op.to_string() });
        counted.collect::<Vec<_>>().join(", ")
    }
}

impl Row<'_> {
    /// Whether it is of the tokens alone whose logits are wanted, where those are not all.
    pub fn is_of_wanted(&self, report: &Report) -> bool {
        let form = self.kernels[0].form.and_then(|form| report.forms.get(form as usize));
        let of_wanted = |ty: &String| ty.contains("[R,") || ty.contains("[R]");
        report.bounds.t != report.bounds.r && form.is_some_and(|form| form.operands.iter().any(of_wanted))
    }

    /// To what its matmuls may round activations.
    pub fn rounds_to(&self, report: &Report) -> Vec<DType> {
        let form = self.kernels[0].form.and_then(|form| report.forms.get(form as usize));
        let texts = || form.into_iter().flat_map(|form| &form.primitives).map(|primitive| &primitive.text);
        let mut formats = vec![DType::F16, DType::BF16];
        formats.retain(|format| texts().any(|text| text.contains(&format!("{{round={format}}}"))));
        formats
    }

    /// Whether it reads or makes activations in [`DType::Q16Act`], as the first layers of some targets have them.
    pub fn is_fine(&self, report: &Report) -> bool {
        let form = self.kernels[0].form.and_then(|form| report.forms.get(form as usize));
        let types = || form.into_iter().flat_map(|form| &form.operands);
        let texts = || form.into_iter().flat_map(|form| &form.primitives).map(|primitive| &primitive.text);
        types().any(|ty| ty.starts_with("q16_act")) || texts().any(|text| text.contains(": q16_act["))
    }

    /// In which formats its quantised weights and caches are.
    pub fn formats<'a>(&self, report: &'a Report) -> Vec<&'a str> {
        let form = self.kernels[0].form.and_then(|form| report.forms.get(form as usize));
        let types = form.into_iter().flat_map(|form| &form.operands);
        let mut formats: Vec<&str> = types.filter_map(|ty| ty.split('[').next()).collect();
        formats.retain(|format| !["f32", "i32", "q8_act", "q16_act"].contains(format));
        formats.sort_unstable();
        formats.dedup();
        formats
    }
}

/// The kernels of a graph, equal ones of its layers in one row, what takes longest first.
pub fn rows(report: &Report) -> Vec<Row<'_>> {
    let mut groups: IndexMap<(&str, Option<u32>, String, Limit), Vec<&FinalKernel>> = IndexMap::new();
    let alike = alike(report);
    for kernel in &report.kernels {
        let anywhere = rename(&names(kernel), |_| "*".into());
        let form = kernel.form.map(|form| alike.get(form as usize).copied().unwrap_or(form));
        groups.entry((&kernel.kernel, form, anywhere, kernel.limit)).or_default().push(kernel);
    }
    let saved = saved_us(report);
    let mut rows: Vec<Row> = groups.into_values().map(|kernels| row(kernels, &saved)).collect();
    rows.sort_by(|a, b| b.us.total_cmp(&a.us));
    rows
}

/// For each form the first that is the same in this step: where the logits of all its tokens are wanted, R is T.
fn alike(report: &Report) -> Vec<u32> {
    let mut known: IndexMap<String, u32> = IndexMap::new();
    let one = |(i, form): (usize, &crate::ir::Form)| {
        let mut key = form.operands.join(" ");
        for primitive in &form.primitives {
            key += &format!("\n{} {}", primitive.text, primitive.returned);
        }
        if report.bounds.t == report.bounds.r {
            key = rows_as_tokens(&key);
        }
        *known.entry(key).or_insert(i as u32)
    };
    report.forms.iter().enumerate().map(one).collect()
}

/// Shapes with T for R.
fn rows_as_tokens(text: &str) -> String {
    let mut parts = text.split('[');
    let mut same = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let (shape, rest) = part.split_once(']').map_or((part, ""), |(shape, rest)| (shape, rest));
        let dims = shape.split(',').map(|dim| if dim == "R" { "T" } else { dim });
        same += &format!("[{}]{rest}", dims.collect::<Vec<_>>().join(","));
    }
    same
}

fn row<'a>(kernels: Vec<&'a FinalKernel>, saved: &IndexMap<u64, f64>) -> Row<'a> {
    let layers: Vec<u64> = kernels.iter().filter_map(|kernel| layer(&names(kernel))).collect();
    Row {
        of: rename(&names(kernels[0]), |_| runs(&layers)),
        us: kernels.iter().map(|k| k.us).sum(),
        launches: kernels.iter().map(|k| k.launches).sum(),
        bytes: kernels.iter().map(|k| k.bytes).sum(),
        operations: kernels.iter().map(|k| k.operations).sum(),
        saved_us: kernels.iter().filter_map(|k| saved.get(&k.number)).sum(),
        kernels,
    }
}

/// What the fusions behind each final kernel gained, by the kernel's number.
fn saved_us(report: &Report) -> IndexMap<u64, f64> {
    let mut gained: IndexMap<u64, f64> = IndexMap::new();
    for d in &report.decisions {
        let gain = match &d.outcome {
            Outcome::Fired { gain, .. } => gain.unfused_us - gain.fused_us,
            Outcome::Rewritten { .. } => 0.0,
            Outcome::Rejected { .. } => continue,
        };
        let before: f64 = d.takes.iter().filter_map(|n| gained.get(n)).sum();
        if let Some(first) = d.makes.first() {
            gained.insert(*first, before + gain);
        }
    }
    gained
}

/// The weights and states that a kernel reads: of those of one layer, it says once which.
fn names(kernel: &FinalKernel) -> String {
    let Some(first) = kernel.reads.first() else {
        // It reads neither, so by what it comes after.
        return kernel.at.split_once(' ').map_or(String::new(), |(_, name)| format!("after {name}"));
    };
    let prefix = |name: &str| {
        let mut segments = name.split('.');
        (segments.next() == Some("blk")).then(|| segments.next().map(|n| format!("blk.{n}."))).flatten()
    };
    let shared = prefix(first).filter(|p| kernel.reads.iter().all(|name| name.starts_with(p)));
    let rest = kernel.reads[1..].iter().map(|name| match &shared {
        Some(prefix) => &name[prefix.len()..],
        None => name,
    });
    let mut text = std::iter::once(first.as_str()).chain(rest).collect::<Vec<_>>().join(", ");
    // What all layers share, such as the frequencies of RoPE, does not tell of which it is.
    if kernel.reads.iter().all(|name| layer(name).is_none())
        && let Some((_, name)) = kernel.at.split_once(' ').filter(|(_, name)| layer(name).is_some())
    {
        text += &format!(", after {name}");
    }
    text
}

/// The launches that passes put in before any fusion, which the model was not lowered to: `34 that quantise_acts put in: 17 dequant and 17
/// quant_act`. None where there are none.
pub fn put_in(report: &Report) -> Option<String> {
    let puts_in = |d: &&Decision| match &d.outcome {
        Outcome::Rewritten { replaced, added } => added.iter().any(|op| !replaced.contains(op)),
        Outcome::Fired { .. } | Outcome::Rejected { .. } => false,
    };
    let passes: BTreeSet<&str> = report.decisions.iter().filter(puts_in).map(|d| d.pass.as_str()).collect();
    // Equal ones that several matmuls share are launched once.
    let more = report.before.launches.iter().filter_map(|(op, n)| {
        let more = n.checked_sub(report.lowered.launches.get(op).copied().unwrap_or(0))?;
        (more > 0).then_some((op, more))
    });
    let more: Vec<_> = more.collect();
    if passes.is_empty() || more.is_empty() {
        return None;
    }
    let count: u64 = more.iter().map(|(_, n)| n).sum();
    let passes = passes.into_iter().collect::<Vec<_>>().join(" and ");
    let ops = more.iter().map(|(op, n)| format!("{n} {op}")).collect::<Vec<_>>().join(" and ");
    Some(format!("{count} that {passes} put in: {ops}"))
}

/// Kernels that no fusion took, or took no further, equal ones of all layers, and all reasons that are known.
#[derive(Clone, Debug)]
pub struct Left<'a> {
    pub kernel: &'a str,
    pub of: String,
    pub times: u64,
    /// Estimated time of all of them.
    pub us: f64,
    /// The pass that did not, and why.
    pub reasons: Vec<(&'a str, &'a Why)>,
}

/// What is left as primitives, and then the fused kernels that a pass came near to taking further; what takes longest first.
pub fn left(report: &Report) -> (Vec<Left<'_>>, Vec<Left<'_>>) {
    let chains = chains(report);
    let mut groups: IndexMap<(&str, String, String), Vec<&FinalKernel>> = IndexMap::new();
    for kernel in &report.kernels {
        let reasons = reasons(&chains, kernel);
        let said: Vec<String> = reasons.iter().map(|(pass, why)| format!("{pass}: {why}")).collect();
        let anywhere = rename(&names(kernel), |_| "*".into());
        let key = (kernel.kernel.as_str(), anywhere, rename(&said.join("; "), |_| "*".into()));
        if kernel.origin != Origin::Fused || !reasons.is_empty() {
            groups.entry(key).or_default().push(kernel);
        }
    }
    let (mut unfused, mut no_further) = (vec![], vec![]);
    for kernels in groups.into_values() {
        let layers: Vec<u64> = kernels.iter().filter_map(|k| layer(&names(k))).collect();
        let left = Left {
            kernel: &kernels[0].kernel,
            of: rename(&names(kernels[0]), |_| runs(&layers)),
            times: kernels.len() as u64,
            us: kernels.iter().map(|k| k.us).sum(),
            reasons: reasons(&chains, kernels[0]),
        };
        let list = if kernels[0].origin == Origin::Fused { &mut no_further } else { &mut unfused };
        list.push(left);
    }
    for list in [&mut unfused, &mut no_further] {
        list.sort_by(|a, b| b.us.total_cmp(&a.us));
    }
    (unfused, no_further)
}

/// What was not done with a kernel or what became it, and why, each once.
fn reasons<'a>(chains: &IndexMap<u64, Vec<&'a Decision>>, kernel: &FinalKernel) -> Vec<(&'a str, &'a Why)> {
    let mut reasons: Vec<(&str, &Why)> = vec![];
    for d in chains.get(&kernel.number).into_iter().flatten() {
        if let Outcome::Rejected { why } = &d.outcome
            && !reasons.contains(&(d.pass.as_str(), why))
        {
            reasons.push((&d.pass, why));
        }
    }
    reasons
}

/// Of a place that no decision is about.
const NOT_TRIED: &str = "no rule was tried there";

/// Why a pass made nothing of what it was not tried on, where it says so of anything else.
fn why_anywhere(report: &Report, pass: &str) -> Option<String> {
    let of_all = |d: &Decision| match &d.outcome {
        Outcome::Rejected { why: why @ (Why::PassOff | Why::TargetLacks { .. } | Why::FuelExhausted) } => {
            (d.pass == pass).then(|| why.to_string())
        }
        _ => None,
    };
    report.decisions.iter().find_map(of_all)
}

/// [`Report::chain`] of every final kernel, by its number.
pub fn chains(report: &Report) -> IndexMap<u64, Vec<&Decision>> {
    // Which final kernel each node became, looking from the end.
    let mut became: IndexMap<u64, Vec<u64>> =
        report.kernels.iter().map(|kernel| (kernel.number, vec![kernel.number])).collect();
    let mut chains: IndexMap<u64, Vec<&Decision>> = IndexMap::new();
    for d in report.decisions.iter().rev() {
        let rejected = matches!(d.outcome, Outcome::Rejected { .. });
        let about = if rejected { &d.takes } else { &d.makes };
        let mut ends: Vec<u64> = about.iter().filter_map(|n| became.get(n)).flatten().copied().collect();
        ends.sort_unstable();
        ends.dedup();
        for end in &ends {
            chains.entry(*end).or_default().push(d);
        }
        if !rejected && !ends.is_empty() {
            for n in &d.takes {
                became.entry(*n).or_default().extend(&ends);
            }
        }
    }
    chains.values_mut().for_each(|chain| chain.reverse());
    chains
}
