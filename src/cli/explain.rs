//! `sinter explain`: every fusion decision, and what it was worth.

use super::args::{CompileArgs, ModelArgs, StepName};
use super::units;
use serde::Serialize;
use sinter::compile;
use sinter::ir::{Gain, Micros, Outcome};
use sinter::lower::Config;
use sinter::passes::{Report, Totals};
use std::collections::BTreeMap;
use std::io::Write;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compile: CompileArgs,
    /// Steps to explain [default: prefill and decode].
    #[arg(long, value_enum, value_delimiter = ',')]
    step: Vec<StepName>,
    /// As `run --temp 0` compiles it: the best token instead of the logits.
    #[arg(long)]
    greedy: bool,
    /// Every decision on a line of its own.
    #[arg(long)]
    all: bool,
    /// As JSON (see docs/json.md).
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Explanation {
    model: String,
    target: String,
    steps: Vec<Report>,
}

pub fn run(args: Args) -> super::Outcome {
    let file = args.model.open()?;
    let gguf = file.gguf();
    let options = args.compile.options(args.greedy)?;
    let config = Config::from_gguf(gguf)?;
    let steps = if args.step.is_empty() { vec![StepName::Prefill, StepName::Decode] } else { args.step };
    let mut explanation = Explanation {
        model: gguf.str_opt("general.name")?.unwrap_or("unnamed").to_string(),
        target: options.target.name.clone(),
        steps: vec![],
    };
    for step in steps {
        let (_, report) = compile::fuse(gguf, &options, &step.step(&config, &options)?)?;
        explanation.steps.push(report);
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &explanation)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{} on {}", explanation.model.escape_debug(), explanation.target)?;
    if options.target.is_unmeasured() {
        writeln!(
            out,
            "nobody measured {}: rates are of its generation, kernels as they are portable",
            explanation.target
        )?;
    }
    for report in &explanation.steps {
        write!(out, "\n{}", table(report, args.all))?;
    }
    Ok(())
}

/// The report as text: the sums, what fired by kernel, what was rejected by reason.
fn table(report: &Report, all: bool) -> String {
    let Totals { bytes, us, .. } = &report.before;
    let after = &report.after;
    let mut text = format!(
        "{}: {} launches -> {}, {} -> {} moved, {} -> {} estimated\n\n",
        report.graph,
        report.before.count(),
        after.count(),
        units::bytes(*bytes as i64),
        units::bytes(after.bytes as i64),
        Micros(*us),
        Micros(after.us)
    );
    text += &format!(
        "  {:16} {:>5} {:>16} {:>12} {:>10}  {}\n",
        "fused into", "times", "launches saved", "bytes saved", "time saved", "replaces"
    );
    let mut fired: BTreeMap<&str, (u64, Gain, Vec<String>)> = BTreeMap::new();
    let mut rejected: BTreeMap<(&str, String), (u64, &str)> = BTreeMap::new();
    for d in &report.decisions {
        match &d.outcome {
            Outcome::Fired { kernel, replaced, gain } => {
                let (count, sum, example) = fired.entry(kernel.name()).or_default();
                *count += 1;
                sum.fused_us += gain.fused_us;
                sum.unfused_us += gain.unfused_us;
                sum.bytes_saved += gain.bytes_saved;
                sum.launches_saved += gain.launches_saved;
                if replaced.len() > example.len() {
                    example.clone_from(replaced);
                }
            }
            Outcome::Rejected { why } => {
                rejected.entry((&d.pass, why.to_string())).or_insert((0, &d.at)).0 += 1;
            }
        }
    }
    for (kernel, (count, gain, replaced)) in fired {
        text += &format!(
            "  {kernel:16} {count:>5} {:>16} {:>12} {:>10}  {}\n",
            gain.launches_saved,
            units::bytes(gain.bytes_saved),
            Micros(gain.unfused_us - gain.fused_us),
            replaced.join(", ")
        );
    }
    text += "\n  launches: ";
    text += &after.launches.iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ");
    text += "\n";
    if !rejected.is_empty() {
        text += &format!("\n  {:16} {:>5}  {}\n", "not fused by", "times", "why (first at)");
    }
    for ((pass, why), (count, at)) in rejected {
        text += &format!("  {pass:16} {count:>5}  {why} ({at})\n");
    }
    if all {
        text += "\n";
        for d in &report.decisions {
            text += &match &d.outcome {
                Outcome::Fired { kernel, replaced, gain } => format!(
                    "  {}: {} -> {} replaces {}; {} -> {}\n",
                    d.pass,
                    d.at,
                    kernel.name(),
                    replaced.join(", "),
                    Micros(gain.unfused_us),
                    Micros(gain.fused_us)
                ),
                Outcome::Rejected { why } => format!("  {}: {} not fused: {why}\n", d.pass, d.at),
            };
        }
    }
    text
}
