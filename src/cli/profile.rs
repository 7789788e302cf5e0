//! `sinter profile`: where the time of a step goes, kernel by kernel.

use super::args::{CompileArgs, DeviceArgs, ModelArgs};
use super::progress;
use serde::Serialize;
use sinter::bench::{self, Bench, Profile, Test, Work};
use sinter::compile::{Options, Purpose};
use sinter::ir::{Micros, StateRole, Syms};
use sinter::model;
use sinter::plan::{LoadedPlan, Plan, State};
use sinter::runtime::{Executor, Progress, Size, Stage};
use sinter::target::TargetKind;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are read to find the bandwidth of the CPU: more than caches hold.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// A kernel that reaches this share of the bandwidth is limited by it.
const MEMORY: f64 = 0.5;
/// One that exceeds it finds its operands in caches.
const CACHES: f64 = 1.1;
/// One that takes no more than so many launches' time has little to do.
const LAUNCH: f64 = 2.0;
/// Operations for each byte from which on arithmetic is what takes the time; with fewer it is the way there and back.
const INTENSE: f64 = 8.0;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of a prompt to profile, read in one step; 0 for none.
    #[arg(short = 'p', long, default_value_t = 512, value_name = "N")]
    n_prompt: u64,
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
    /// As JSON (see docs/json.md).
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    model: String,
    target: String,
    isa: String,
    /// Bytes per second that the device reads, and how that is known.
    read_bandwidth: f64,
    read_bandwidth_is: &'static str,
    load: Load,
    memory: Memory,
    steps: Vec<Step>,
}

/// Milliseconds until a step can be made.
#[derive(Serialize)]
struct Load {
    open_ms: f64,
    compile_ms: f64,
    /// Of a GPU's kernels: compiled, or found among those that were kept.
    kernels_ms: f64,
    weights_ms: f64,
    all_ms: f64,
}

/// Bytes.
#[derive(Serialize)]
struct Memory {
    weights: u64,
    cache: u64,
    cache_per_token: u64,
    activations: u64,
}

#[derive(Serialize)]
struct Step {
    test: String,
    program: String,
    #[serde(rename = "T")]
    t: u64,
    #[serde(rename = "R")]
    r: u64,
    steps: u64,
    step_us: f64,
    kernels_us: f64,
    kernels: Vec<Kernel>,
}

#[derive(Serialize)]
struct Kernel {
    kernel: &'static str,
    node: String,
    calls: u64,
    launches: u64,
    us: f64,
    /// Of the time of all kernels.
    share: f64,
    bytes: u64,
    operations: u64,
    gbs: f64,
    bandwidth_share: f64,
    gops: f64,
    limit: &'static str,
}

pub fn run(args: Args) -> super::Outcome {
    let start = Instant::now();
    let file = args.model.open()?;
    let open = start.elapsed();
    let options = args.compile.options_on(&args.device, false)?;
    let generate = Work::Generate { tokens: 1, logits: true };
    let (depth, sequences) = (args.n_depth, args.n_sequences);
    let mut tests = vec![Test { work: generate, depth, sequences }];
    if args.n_prompt > 0 {
        // One step reads no more.
        let tokens = args.n_prompt.min(options.chunk);
        tests.insert(0, Test { work: Work::Prompt(tokens), depth, sequences: 1 });
    }
    let needs = tests.iter().map(Test::context).max().unwrap_or(1);
    let context = options.context.unwrap_or(needs);
    bench::check_context(&tests, context)?;
    let options = Options { context: Some(context), sequences, ..options };
    let before = Instant::now();
    let bytes = model::plan(&file, args.model.path(), &options, Purpose::Bench)?.to_bytes()?;
    let plan = LoadedPlan::from_bytes(&bytes)?;
    let compile = before.elapsed();
    let stages = Stages::default();
    let mut device = args.device.options();
    device.progress = stages.progress();
    let executor = Executor::new(plan, Arc::clone(&file), &device)?;
    let all = start.elapsed();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let load = Load {
        open_ms: ms(open),
        compile_ms: ms(compile),
        kernels_ms: ms(stages.time(Stage::Kernels)),
        weights_ms: ms(stages.time(Stage::Weights)),
        all_ms: ms(all),
    };
    let on_cpu = options.target.kind == TargetKind::Cpu;
    let threads =
        args.device.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let (read_bandwidth, read_bandwidth_is) = match on_cpu {
        true => (bench::read_bandwidth(BANDWIDTH_BYTES, threads)?, "measured"),
        false if options.target.is_unmeasured() => {
            (options.target.bandwidth_gbs * 1e9, "of a card of its generation")
        }
        false => (options.target.bandwidth_gbs * 1e9, "an H200's, measured"),
    };
    let mut report = Report {
        model: file.gguf().str_opt("general.name")?.unwrap_or("unnamed").to_string(),
        target: options.target.name.clone(),
        isa: executor.isa().to_string(),
        read_bandwidth,
        read_bandwidth_is,
        load,
        memory: Memory::of(executor.plan()),
        steps: vec![],
    };
    // On the CPU calls cost far less than a microsecond.
    let launch_us = if on_cpu { 0.0 } else { options.target.launch_us };
    let mut bench = Bench::new(executor)?;
    for test in &tests {
        let profile = bench.profile(test, args.repetitions)?;
        report.steps.push(Step::of(test, &profile, read_bandwidth, launch_us));
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    write!(out, "{}", table(&report))?;
    Ok(())
}

/// When each stage of loading began, and when it was over.
#[derive(Clone, Default)]
struct Stages(Arc<Mutex<Vec<(Stage, Instant, Instant)>>>);

impl Stages {
    /// Notes them, beside the bars that a user sees.
    fn progress(&self) -> Progress {
        let (stages, bars) = (self.clone(), progress::bars());
        Progress::to(move |stage, done, all| {
            let now = Instant::now();
            let mut stages = stages.0.lock().unwrap_or_else(PoisonError::into_inner);
            match stages.iter_mut().find(|(of, ..)| *of == stage) {
                Some((.., end)) => *end = now,
                None => stages.push((stage, now, now)),
            }
            bars.tell(stage, done, all);
        })
    }

    fn time(&self, stage: Stage) -> Duration {
        let stages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stages.iter().find(|(of, ..)| *of == stage);
        found.map_or(Duration::ZERO, |(_, start, end)| *end - *start)
    }
}

impl Memory {
    fn of(plan: &Plan) -> Memory {
        let none = Syms { t: 0, r: 0 };
        let rows = |state: &State| state.ty.first().eval(&none).max(1);
        let appended = plan.states.iter().filter(|state| state.role == StateRole::Appended);
        let cache_per_token = appended.map(|state| state.ty.bytes(&none) / rows(state)).sum();
        Memory {
            weights: plan.weight_bytes(),
            cache: plan.state_bytes(),
            cache_per_token,
            activations: plan.arena_bytes,
        }
    }
}

impl Step {
    fn of(test: &Test, profile: &Profile, read_bandwidth: f64, launch_us: f64) -> Step {
        let us = |ns: u64| ns as f64 / 1e3;
        let all = profile.kernels_ns().max(1) as f64;
        let kernel = |k: &bench::KernelTime| {
            let bandwidth_share = k.bandwidth() / read_bandwidth;
            let limit = match us(k.ns) / k.launches.max(1) as f64 {
                _ if bandwidth_share > CACHES => "caches",
                _ if bandwidth_share >= MEMORY => "memory",
                each if each <= LAUNCH * launch_us => "launch",
                _ if k.operations as f64 >= INTENSE * k.bytes as f64 => "arithmetic",
                _ => "latency",
            };
            Kernel {
                kernel: k.kernel,
                node: k.node.clone(),
                calls: k.calls,
                launches: k.launches,
                us: us(k.ns),
                share: k.ns as f64 / all,
                bytes: k.bytes,
                operations: k.operations,
                gbs: k.bandwidth() / 1e9,
                bandwidth_share,
                gops: k.operations as f64 / k.ns.max(1) as f64,
                limit,
            }
        };
        Step {
            test: test.to_string(),
            program: profile.program.clone(),
            t: profile.at.t,
            r: profile.at.r,
            steps: profile.steps,
            step_us: us(profile.step_ns),
            kernels_us: us(profile.kernels_ns()),
            kernels: profile.kernels.iter().map(kernel).collect(),
        }
    }
}

fn table(report: &Report) -> String {
    let Report { model, target, isa, load, memory, .. } = report;
    let size = |bytes: u64| Size(bytes).to_string();
    let mut text = format!(
        "{} on {target} ({isa}), which reads {:.0} GB/s ({})\n\
         ready in {:.0} ms: open {:.0}, compile {:.0}, kernels {:.0}, weights {:.0}\n\
         memory: weights {}, cache {} ({} a token), activations {}\n",
        model.escape_debug(),
        report.read_bandwidth / 1e9,
        report.read_bandwidth_is,
        load.all_ms,
        load.open_ms,
        load.compile_ms,
        load.kernels_ms,
        load.weights_ms,
        size(memory.weights),
        size(memory.cache),
        size(memory.cache_per_token),
        size(memory.activations),
    );
    for step in &report.steps {
        text += &format!(
            "\n{} (program {}, T={} R={}): {} a step; its kernels, timed one by one, {} (medians of {})\n\n\
             {:>10} {:>6} {:10} {:>5} {:>8} {:>10} {:>9} {:>5} {:>9}  {:10} {:16} {}\n",
            step.test,
            step.program,
            step.t,
            step.r,
            Micros(step.step_us),
            Micros(step.kernels_us),
            step.steps,
            "time",
            "share",
            "",
            "calls",
            "launches",
            "moves",
            "GB/s",
            "of it",
            "Gop/s",
            "limit",
            "kernel",
            "of"
        );
        for k in &step.kernels {
            let bar = "█".repeat((10.0 * k.share).round() as usize);
            text += &format!(
                "{:>10} {:>5.1}% {bar:10} {:>5} {:>8} {:>10} {:>9.1} {:>4.0}% {:>9}  {:10} {:16} {}\n",
                Micros(k.us),
                100.0 * k.share,
                k.calls,
                k.launches,
                size(k.bytes),
                k.gbs,
                100.0 * k.bandwidth_share,
                if k.operations > 0 { format!("{:.0}", k.gops) } else { String::new() },
                k.limit,
                k.kernel,
                k.node
            );
        }
    }
    text
}
