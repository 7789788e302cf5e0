//! `--kernel`: of one kernel, what it stands for, and the decisions that led to it.

use super::super::units;
use super::{Error, filter};
use sinter::explain::{Row, chains, flip};
use sinter::ir::{Gain, Micros, Outcome, Report};
use sinter::passes::Place;
use sinter::target::Target;

/// The kernels that `wanted` is: the one of this number in the table, or those that read weights or states of this name.
pub fn text(report: &Report, wanted: &str, target: Option<&Target>) -> Result<String, Error> {
    let (found, place) = filter::named(report, wanted)?;
    Ok(found
        .iter()
        .map(|(i, row)| one(report, *i, row, place.as_ref(), target))
        .collect::<Vec<_>>()
        .join("\n"))
}

fn one(report: &Report, i: usize, row: &Row, place: Option<&Place>, target: Option<&Target>) -> String {
    let total = report.after.us.max(f64::MIN_POSITIVE);
    let mut text = format!(
        "{} #{}: {} {}\n  {}, {} ({:.1} % of the step), {} moved, limited by {}\n",
        report.graph,
        i + 1,
        row.kernel(),
        row.of,
        units::launches(row.launches as i64),
        Micros(row.us),
        100.0 * row.us / total,
        units::bytes(row.bytes as i64),
        row.limit()
    );
    let here = |name: &String| place.is_some_and(|place| place.is_in(name));
    let shown = row.kernels.iter().find(|k| k.reads.iter().any(here)).unwrap_or(&row.kernels[0]);
    if let Some(form) = shown.form.and_then(|form| report.forms.get(form as usize)) {
        text += &format!(
            "\n  before: {} operations, which write {} that this kernel never does\n",
            form.primitives.iter().filter(|p| !p.view).count(),
            units::bytes(form.bytes_never_written() as i64)
        );
        for primitive in &form.primitives {
            let note = match (primitive.view, primitive.returned) {
                (true, _) => "view".to_string(),
                (_, true) => "result".into(),
                (_, false) => units::bytes(primitive.bytes as i64),
            };
            text += &format!("    {note:>10}  {}\n", primitive.text);
        }
        text += &format!("  after: {}({})\n", shown.kernel, form.operands.join(", "));
    }
    let which = if row.kernels.len() > 1 { format!(" of {}", shown.at) } else { String::new() };
    text += &format!("\n  decisions{which}\n");
    let chains = chains(report);
    let chain = chains.get(&shown.number).map_or(&[][..], Vec::as_slice);
    if chain.is_empty() {
        text += "    none: it is as the model was lowered\n";
    }
    for (n, d) in chain.iter().enumerate() {
        text += &format!("    {}. {d}\n", n + 1);
        if let Outcome::Fired { gain, .. } = &d.outcome {
            text += &format!("       runner-up: unfused, {}\n", unfused(gain));
        }
        if let Some(target) = target {
            text += &format!("       would turn over with: {}\n", flip(d, target));
        }
    }
    text
}

/// What it takes where a fusion is not made, beside what it takes with it.
fn unfused(gain: &Gain) -> String {
    let Gain { fused_us, unfused_us, bytes_saved, launches_saved } = *gain;
    let (time, share) = match unfused_us >= fused_us {
        true => ("longer", share(unfused_us, fused_us)),
        false => ("shorter", share(fused_us, unfused_us)),
    };
    let bytes = units::bytes(bytes_saved.abs());
    let launches = units::launches(launches_saved.abs());
    let work = match (bytes_saved < 0, launches_saved < 0) {
        (false, false) => format!("{bytes} and {launches} more"),
        (true, true) => format!("{bytes} and {launches} less"),
        (false, true) => format!("{bytes} more and {launches} less"),
        (true, false) => format!("{bytes} less and {launches} more"),
    };
    format!("{} {time} ({share}), {work}", Micros((unfused_us - fused_us).abs()))
}

/// By how much one time is longer than another, as people compare them.
fn share(longer: f64, than: f64) -> String {
    match longer / than {
        ratio if ratio < 2.0 => format!("{:.1} %", 100.0 * (ratio - 1.0)),
        ratio => format!("{ratio:.1} times"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is less than nothing.
    #[test]
    fn what_is_not_fused_takes_more_or_less() {
        let of = |fused_us, unfused_us, bytes_saved, launches_saved| {
            unfused(&Gain { fused_us, unfused_us, bytes_saved, launches_saved })
        };
        assert_eq!(of(2.0, 3.0, 1000, 1), "1.0 µs longer (50.0 %), 1.0 kB and 1 launch more");
        assert_eq!(of(2.0, 3.0, 1000, -2), "1.0 µs longer (50.0 %), 1.0 kB more and 2 launches less");
        assert_eq!(of(3.0, 2.0, -1000, 1), "1.0 µs shorter (50.0 %), 1.0 kB less and 1 launch more");
        assert_eq!(of(3.0, 2.0, -1000, -1), "1.0 µs shorter (50.0 %), 1.0 kB and 1 launch less");
    }
}
