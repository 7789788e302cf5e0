//! `sinter profile`: where the time of a step goes, kernel by kernel.

mod commands;
mod ready;
mod report;
mod roofline;
mod svg;
mod table;
mod trace;
mod verdict;

use super::args::{CompileArgs, DeviceArgs, Source, SourceArgs};
use super::{files, say};
use ready::{Ready, ms};
use report::{Arithmetic, FirstToken, Load, Memory, Report, Step};
use sinter::bench::recorded::{Matched, Recorded, match_steps};
use sinter::bench::{self, Bench, Profile, Test};
use sinter::plan::Plan;
use sinter::runtime::hip::gpu;
use sinter::target::{Target, TargetKind};
use std::io::Write;
use std::path::{Path, PathBuf};
use verdict::{Rate, Roofs};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Bytes that are read to find the bandwidth of the CPU: more than caches hold.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// Tokens of a prompt that nobody gave.
const DEFAULT_PROMPT: u64 = 512;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Tokens of a prompt to profile, random ones; of its steps the first is timed. 0 for none [default: 512, or what fits].
    #[arg(short = 'p', long, value_name = "N")]
    n_prompt: Option<u64>,
    /// The prompt as text, which is tokenised then.
    #[arg(long, value_name = "TEXT", conflicts_with = "n_prompt", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Tokens that each sequence has before.
    #[arg(short = 'd', long, default_value_t = 0, value_name = "N")]
    n_depth: u64,
    /// Sequences that each get their next token in one step.
    #[arg(short = 'b', long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    n_sequences: u64,
    /// Steps that are timed.
    #[arg(short = 'r', long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    repetitions: u64,
    #[command(flatten)]
    compile: CompileArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// List every call of a step in order, not the kernels with layers folded.
    #[arg(long)]
    nodes: bool,
    /// As JSON, kernels and nodes both (see docs/json.md).
    #[arg(long)]
    json: bool,
    /// Write a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: loading, and each launch of a step; - for stdout.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write a roofline as SVG: what each kernel reaches of what memory and arithmetic allow; - for stdout.
    #[arg(long, value_name = "FILE")]
    roofline: Option<PathBuf>,
    /// Print how to run this under rocprofv3, rocprof or ncu, and how to read what they write; runs nothing.
    #[arg(long, conflicts_with = "import")]
    commands: bool,
    /// Take the times from the CSV that rocprofv3, rocprof or ncu wrote of the same plan (see --commands); runs nothing.
    #[arg(long, value_name = "FILE.csv")]
    import: Option<PathBuf>,
}

pub fn run(args: Args) -> super::Outcome {
    let [trace, roofline] =
        [&args.trace, &args.roofline].map(|path| path.as_deref().is_some_and(files::is_stdout));
    files::one_on_stdout(&[("--trace -", trace), ("--roofline -", roofline), ("--json", args.json)])?;
    let elsewhere = args.commands || args.import.is_some();
    let source = args.source.find(&args.compile, elsewhere.then_some("--target"))?;
    if let Some(path) = &args.import {
        return of_import(&args, &source, path);
    }
    if args.commands {
        let plans = ready::plans_elsewhere(&args, &source)?;
        let given: Vec<String> =
            std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        let mut said = vec![];
        for (plan, _) in &plans {
            let lines = commands::commands(&given, &plan.target)?;
            // Of a plan, nothing else says which of its targets these are for.
            said.push(match source {
                Source::Plan { .. } => format!("# for {}\n{lines}", plan.target.name),
                Source::Model(_) => lines,
            });
        }
        std::io::stdout().lock().write_all(said.join("\n").as_bytes())?;
        return Ok(());
    }
    measured(&args, &source)
}

/// Runs, and times what runs.
fn measured(args: &Args, source: &Source) -> super::Outcome {
    let Ready { executor, load, name, work, tokenise } = Ready::new(args, source)?;
    let target = executor.plan().target.clone();
    let isa = executor.isa().to_string();
    let mut memory = Memory::of(executor.plan());
    let mut bench = Bench::new(executor)?;
    let tokens = work.tokens.unwrap_or_else(|| bench.random(work.prompt));
    // Before anything else runs, as it is where somebody waits for it.
    let first = match tokens.is_empty() {
        true => None,
        false => Some((tokens.len(), bench.first_token(&tokens)?)),
    };
    let first_token = first.map(|(prompt_tokens, first)| {
        let parts = [first.upload.time, first.prefill, first.download.time, first.choose].map(ms);
        FirstToken {
            prompt_tokens: prompt_tokens as u64,
            prompt_steps: first.steps,
            tokenise_ms: tokenise.map(ms),
            upload_ms: parts[0],
            prefill_ms: parts[1],
            download_ms: parts[2],
            choose_ms: parts[3],
            upload_bytes: first.upload.bytes,
            download_bytes: first.download.bytes,
            all_ms: load.all_ms + tokenise.map_or(0.0, ms) + parts.iter().sum::<f64>(),
        }
    });
    let mut steps = vec![];
    for test in &work.tests {
        steps.push((*test, bench.profile(test, args.repetitions)?));
    }
    // Before memory is read for its speed, which takes some.
    memory.peak = report::peak();
    let mut ran_on = None;
    if target.kind != TargetKind::Cpu {
        let gpu = gpu(args.device.options().gpu)?;
        let (free, all) = gpu.memory()?;
        ran_on = Some(gpu.name);
        (memory.device_used, memory.device_all) = (Some(all.saturating_sub(free)), Some(all));
    }
    let (bandwidth, bandwidth_is) = match target.kind {
        TargetKind::Cpu => {
            let all = || std::thread::available_parallelism().map_or(1, |n| n.get());
            let threads = args.device.threads.unwrap_or_else(all);
            (bench::read_bandwidth(BANDWIDTH_BYTES, threads)?, "measured")
        }
        _ => bandwidth_of(&target, ran_on.as_deref()),
    };
    let of = Measured { name, isa, memory, load: Some(load), first_token, recorded_by: None };
    tell(args, bench.executor().plan(), of, roofs(&target, bandwidth, bandwidth_is), &steps)
}

/// Reads what a profiler recorded, and tells what it says of a plan.
fn of_import(args: &Args, source: &Source, path: &Path) -> super::Outcome {
    let plans = ready::plans_elsewhere(args, source)?;
    if let [(plan, _)] = &plans[..]
        && plan.target.kind == TargetKind::Cpu
    {
        return Err(commands::not_a_gpu(&plan.target.name));
    }
    let text = files::read_text(path)?;
    let in_file = |e| format!("{}: {e}", path.display());
    let recorded = Recorded::from_csv(&text).map_err(in_file)?;
    // Of the plans for several GPUs, the first that the profiler can have seen.
    let several = plans.len() > 1;
    let seen = plans.iter().position(|(plan, _)| recorded.tool.sees(plan.target.kind)).unwrap_or(0);
    let (plan, work) = plans.into_iter().nth(seen).ok_or("there is no plan")?;
    if several {
        say!("of the plans, this is taken for the one for {} (--target names another)", plan.target.name);
    }
    let Matched { profiles, missing, others, foreign } =
        match_steps(&plan, &work.tests, &recorded).map_err(in_file)?;
    let name = path.display();
    for test in missing {
        say!("{name}: there is no whole step of {test}");
    }
    if others > 0 {
        say!("{name}: {others} launches of the plan's kernels are of no whole step of these, and left out");
    }
    for (kernel, count) in foreign {
        say!("{name}: no such step launches {}, of which there are {count}", kernel.escape_debug());
    }
    let (bandwidth, bandwidth_is) = bandwidth_of(&plan.target, None);
    let roofs = roofs(&plan.target, bandwidth, bandwidth_is);
    let of = Measured {
        name: plan.model.name.clone(),
        isa: plan.target.arch.clone(),
        memory: Memory::of(&plan),
        load: None,
        first_token: None,
        recorded_by: Some(recorded.tool.to_string()),
    };
    tell(args, &plan, of, roofs, &profiles)
}

/// What is known beside the steps.
struct Measured {
    name: String,
    isa: String,
    memory: Memory,
    load: Option<Load>,
    first_token: Option<FirstToken>,
    recorded_by: Option<String>,
}

/// Writes everything that was asked for.
fn tell(
    args: &Args,
    plan: &Plan,
    of: Measured,
    mut roofs: Roofs,
    steps: &[(Test, Profile)],
) -> super::Outcome {
    for (_, profile) in steps {
        roofs.raise(&profile.kernels);
    }
    if plan.target.kind != TargetKind::Cpu {
        let least = steps.iter().filter_map(|(_, profile)| profile.least_launch_us());
        roofs.launch_us = least.min_by(f64::total_cmp).unwrap_or(0.0);
    }
    let target = &plan.target.name;
    if let Some(path) = &args.trace {
        let load = of.load.as_ref().map(|load| (load, of.first_token.as_ref()));
        let trace = serde_json::to_vec(&trace::trace(&of.name, target, load, steps))?;
        files::write_whole(path, |out| out.write_all(&trace))?;
    }
    if let Some(path) = &args.roofline {
        let svg = roofline::roofline(&of.name, target, &roofs, steps);
        files::write_whole(path, |out| out.write_all(svg.as_bytes()))?;
    }
    // What went to stdout stands there alone.
    if [&args.trace, &args.roofline].into_iter().flatten().any(|path| files::is_stdout(path)) {
        return Ok(());
    }
    let report = Report {
        model: of.name,
        target: target.clone(),
        isa: of.isa,
        read_bandwidth: roofs.bandwidth,
        read_bandwidth_is: roofs.bandwidth_is,
        arithmetic: Arithmetic::of(&roofs),
        load: of.load,
        first_token: of.first_token,
        memory: of.memory,
        recorded_by: of.recorded_by,
        steps: steps.iter().map(|(test, profile)| Step::of(plan, test, profile, &roofs)).collect(),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    write!(out, "{}", table::table(&report, args.nodes))?;
    Ok(())
}

/// Bytes per second that a GPU reads, and how that is known; of the GPU that ran, by its name, if one did.
fn bandwidth_of(target: &Target, ran_on: Option<&str>) -> (f64, &'static str) {
    // As "NVIDIA H200 NVL"; a GH200 is another.
    let is_h200 = ran_on.is_some_and(|name| name.split_whitespace().any(|word| word == "H200"));
    let is = match () {
        () if target.measured.is_some() => "measured by sinter tune",
        () if target.is_unmeasured() => target.whose_rates(),
        () if Target::gpu("sm_90").as_ref() == Some(target) && is_h200 => "an H200's, measured",
        () if Target::gpu("sm_90").as_ref() == Some(target) => target.whose_rates(),
        () => "from the target's description",
    };
    (target.bandwidth_gbs * 1e9, is)
}

fn roofs(target: &Target, bandwidth: f64, bandwidth_is: &'static str) -> Roofs {
    Roofs {
        bandwidth,
        bandwidth_is,
        float: Rate::of(target, target.f32_gflops),
        integer: Rate::of(target, target.dot4_gops.unwrap_or(target.f32_gflops)),
        half: Rate::of(target, target.f16_gflops.unwrap_or(target.f32_gflops)),
        // On the CPU calls cost far less than a microsecond; on a GPU it is found among those that were timed.
        launch_us: 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_bandwidth_it_is() {
        let said = |arch: &str, ran_on| bandwidth_of(&Target::gpu(arch).unwrap(), ran_on).1;
        for name in ["NVIDIA H200", "NVIDIA H200 NVL"] {
            assert_eq!(said("sm_90", Some(name)), "an H200's, measured");
        }
        for name in [Some("NVIDIA H100 80GB HBM3"), Some("NVIDIA GH200 480GB"), None] {
            assert_eq!(said("sm_90", name), "an H200's");
        }
        assert_eq!(said("sm_120", Some("NVIDIA GeForce RTX 5090")), "an H200's");
        assert_eq!(said("gfx1100", None), "of a card of its generation");
        let of_file = Target { name: "mine".into(), ..Target::gpu("sm_90").unwrap() };
        assert_eq!(bandwidth_of(&of_file, None).1, "from the target's description");
    }
}
