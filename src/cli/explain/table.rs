//! The report as text: the kernels that there are, and what was not fused.

use super::super::units;
use super::filter::Filter;
use sinter::explain::{Left, Row, left, put_in};
use sinter::ir::{DType, Kernel, Micros, Origin, Report};
use sinter::target::{Measured, Target};
use sinter::tune::rank_correlation;
use std::collections::BTreeMap;

/// One step: sums, a row for each kernel, then what is left.
pub fn text(
    report: &Report,
    context: u64,
    sequences: u64,
    target: Option<&Target>,
    filter: &Filter,
) -> String {
    let of_device = target.and_then(|target| target.measured.as_ref());
    let measured = of_device.and_then(|m| measured(report, m, context));
    let (lowered, after) = (&report.lowered, &report.after);
    let mut text = format!(
        "{}: {}\n\
         {} launches -> {}, {} -> {} moved, {} -> {} estimated\n{}\n\n",
        report.graph,
        sinter::explain::step(report, context, sequences),
        lowered.count(),
        after.count(),
        units::bytes(lowered.bytes as i64),
        units::bytes(after.bytes as i64),
        Micros(lowered.us),
        Micros(after.us),
        origins(report),
    );
    text += &format!(
        "  {:>3} {:>10} {}{:>6} {:10} {:>8} {:>10} {:>10}  {:10} {:16} {}\n",
        "#",
        "time",
        if measured.is_some() { format!("{:>10} ", "measured") } else { String::new() },
        "share",
        "",
        "launches",
        "moves",
        "saved",
        "limit",
        "kernel",
        "of"
    );
    let total: f64 = report.kernels.iter().map(|k| k.us).sum();
    for (i, row) in &filter.rows(report) {
        let share = if total > 0.0 { row.us / total } else { 0.0 };
        text += &format!(
            "  {:>3} {:>10} {}{:>5.1}% {:10} {:>8} {:>10} {:>10}  {:10} {:16} {}\n",
            i + 1,
            Micros(row.us),
            measured.as_ref().map_or(String::new(), |of| format!("{:>10} ", of.of(row))),
            100.0 * share,
            "█".repeat((10.0 * share).round() as usize),
            row.launches,
            units::bytes(row.bytes as i64),
            if row.saved_us > 0.0 { Micros(row.saved_us).to_string() } else { String::new() },
            row.limit(),
            row.kernel(),
            row.of,
        );
        let replaces = row.replaces(report);
        if !replaces.is_empty() {
            let formats = row.formats(report).join(", ");
            let of = if formats.is_empty() { String::new() } else { format!("; of {formats}") };
            let rounds = row.rounds_to(report).iter().map(DType::to_string).collect::<Vec<_>>().join(" and ");
            let rounds =
                if rounds.is_empty() { rounds } else { format!("; may round activations to {rounds}") };
            let fine = if row.is_fine(report) { "; activations in q16_act" } else { "" };
            let tokens = if row.is_of_wanted(report) { "; R tokens" } else { "" };
            text += &format!("       {:10} replaces {replaces}{of}{rounds}{fine}{tokens}\n", "");
        }
    }
    match (&measured, of_device) {
        (Some(measured), _) => text += &measured.summary(),
        (None, Some(of_device)) => text += &elsewhere(of_device),
        (None, None) => {}
    }
    text += norms(report);
    text += &rules(report);
    if !filter.is_empty() {
        return text;
    }
    let (unfused, no_further) = left(report);
    text += &match unfused.is_empty() {
        true => "\n  left unfused: nothing\n".into(),
        false => format!("\n  left unfused\n{}", lines(&unfused)),
    };
    if !no_further.is_empty() {
        text += &format!("\n  fused, and no further\n{}", lines(&no_further));
    }
    text
}

/// What a kernel's name would not say: that of norms has an add where no matmul took it.
fn norms(report: &Report) -> &'static str {
    let no_add = |form: u32| {
        let form = report.forms.get(form as usize);
        form.is_some_and(|form| form.primitives.iter().all(|primitive| primitive.op != "add"))
    };
    let norm = Kernel::AddRmsnorm.name();
    match report.kernels.iter().any(|kernel| kernel.kernel == norm && kernel.form.is_some_and(no_add)) {
        true => {
            "\n  add_rmsnorm is the kernel of norms; where it replaces no add, there is none beside it, or a matmul has it\n"
        }
        false => "",
    }
}

/// What the rules of the user did here.
fn rules(report: &Report) -> String {
    let forbade = report.forbade();
    if forbade.is_empty() {
        return String::new();
    }
    let times = |(rule, n): (&&str, &u64)| match n {
        0 => format!("{rule} met nothing"),
        1 => format!("{rule} forbade one fusion"),
        n => format!("{rule} forbade {n} fusions"),
    };
    format!("\n  your rules: {}\n", forbade.iter().map(times).collect::<Vec<_>>().join("; "))
}

/// What was measured of the kernels of a step.
struct MeasuredStep<'a> {
    by_node: BTreeMap<&'a str, f64>,
    predicted: Vec<f64>,
    measured: Vec<f64>,
}

/// At what steps were timed, where this is none of them.
fn elsewhere(measured: &Measured) -> String {
    let steps = measured.steps();
    let largest = steps.iter().filter_map(|step| step.strip_prefix('t')?.parse::<u64>().ok()).max();
    let chunk = largest.map_or(String::new(), |t| format!(" --chunk {t}"));
    format!(
        "\n  measured were {} with caches filled to {}: -c {}{chunk} sets what was predicted beside it\n",
        steps.join(" and "),
        measured.context,
        measured.context
    )
}

/// None if nothing was measured of these kernels at such a depth.
fn measured<'a>(report: &Report, measured: &'a Measured, context: u64) -> Option<MeasuredStep<'a>> {
    let by_node = measured.of_step(&report.graph, context);
    let both = report.kernels.iter().filter_map(|k| Some((k.us, *by_node.get(k.at.as_str())?)));
    let (predicted, measured): (Vec<f64>, Vec<f64>) = both.unzip();
    (!measured.is_empty()).then_some(MeasuredStep { by_node, predicted, measured })
}

impl MeasuredStep<'_> {
    /// The time of a row, if all of it was measured.
    fn of(&self, row: &Row) -> String {
        let times: Option<Vec<f64>> =
            row.kernels.iter().map(|k| self.by_node.get(k.at.as_str()).copied()).collect();
        times.map_or("-".into(), |times| Micros(times.iter().sum()).to_string())
    }

    fn summary(&self) -> String {
        format!(
            "\n  of {} kernels that were measured: {} predicted, {} measured, rank correlation {:.2}\n",
            self.measured.len(),
            Micros(self.predicted.iter().sum()),
            Micros(self.measured.iter().sum()),
            rank_correlation(&self.predicted, &self.measured)
        )
    }
}

/// What the launches came from: what was lowered, what passes put in, what is left of both.
fn origins(report: &Report) -> String {
    let lowered = report.lowered.count();
    let mut parts = vec![match put_in(report) {
        Some(put_in) => format!(
            "lowered: {lowered} launches, and {put_in}; all unfused {}, from which what is saved counts",
            Micros(report.before.us)
        ),
        None => format!("lowered: {lowered} launches"),
    }];
    let launches = |of: &dyn Fn(&Origin) -> bool| -> u64 {
        report.kernels.iter().filter(|k| of(&k.origin)).map(|k| k.launches).sum()
    };
    let remain = [
        (launches(&|origin| *origin == Origin::Fused), "of fused kernels"),
        (launches(&|origin| *origin == Origin::Lowered), "of the model's operations as they are"),
        (launches(&|origin| matches!(origin, Origin::Inserted { .. })), "of what was put in"),
    ];
    let remain = remain.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
    parts.push(format!("remain: {}", remain.collect::<Vec<_>>().join(", ")));
    parts.join("; ")
}

fn lines(left: &[Left]) -> String {
    let mut text = String::new();
    for l in left {
        text += &format!("  {:>14} {:>4} × {:16} {}\n", Micros(l.us), l.times, l.kernel, l.of);
        for (pass, why) in &l.reasons {
            text += &format!("{:24}{pass}: {why}\n", "");
        }
    }
    text
}

/// Every decision that the filter lets through, a line each.
pub fn decisions(report: &Report, filter: &Filter) -> String {
    let lines: String =
        report.decisions.iter().filter(|d| filter.takes(d)).map(|d| format!("  {d}\n")).collect();
    if lines.is_empty() { format!("  {}: no such decision\n", report.graph) } else { lines }
}
