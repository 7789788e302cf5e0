//! `sinter bench`: how fast a model runs, measured and reported as llama-bench does.

mod kept;
mod report;

use super::args::{CompileArgs, Device, DeviceArgs, ModelArgs};
use kept::{KeepArgs, Kept};
use report::{Description, Output, Printer, Row, Setting};
use sinter::bench::run::TestResult;
use sinter::bench::{self, Bench, Test};
use sinter::compile::{Options, Purpose};
use sinter::model;
use sinter::target::TargetKind;
use std::rc::Rc;

pub use kept::Slower;

/// What is read to find the bandwidth, in bytes: much more than the caches of a processor hold.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// Of each test, unless another number is given.
const REPETITIONS: u64 = 5;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of a prompt, or several lengths; 0 for no prompts [default: 512].
    #[arg(short = 'p', long, value_delimiter = ',', value_name = "N,…")]
    n_prompt: Vec<u64>,
    /// Tokens to generate, or several lengths; 0 for no generation [default: 128].
    #[arg(short, long, value_delimiter = ',', value_name = "N,…")]
    n_gen: Vec<u64>,
    /// Tokens in the cache before, or several such depths [default: 0].
    #[arg(short = 'd', long, value_delimiter = ',', value_name = "N,…")]
    n_depth: Vec<u64>,
    /// Sequences at once, or several numbers of them; speeds are of all together [default: 1].
    #[arg(short = 'b', long, value_delimiter = ',', value_name = "N,…", value_parser = clap::value_parser!(u64).range(1..=4096))]
    n_sequences: Vec<u64>,
    /// Times to repeat each test [default: 5].
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: Option<u64>,
    /// Count the first repetition too.
    #[arg(long)]
    no_warmup: bool,
    /// Do not measure the machine's read bandwidth, for which 1 GiB of memory is taken for a moment.
    #[arg(long)]
    no_bandwidth: bool,
    /// How to print the results (see docs/json.md).
    #[arg(short, long, value_enum, default_value = "md")]
    output: Output,
    #[command(flatten)]
    compile: CompileArgs,
    /// Device to run on: cpu, hip (the first GPU that there are kernels for) or hip:NUMBER.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// On a GPU, make every launch of every step by itself: replay nothing as a graph.
    #[arg(long)]
    no_graph: bool,
    /// Threads of the CPU device, or several numbers of them [default: all cores].
    #[arg(short, long, value_delimiter = ',', value_name = "N,…")]
    threads: Vec<usize>,
    #[command(flatten, next_help_heading = "Baselines and histories")]
    keep: KeepArgs,
}

impl Args {
    /// What to run, with which numbers of threads: what is given, or else what the baseline has.
    fn tests(&self, kept: &Kept) -> (Vec<Test>, Vec<usize>) {
        let lists = [&self.n_prompt, &self.n_gen, &self.n_depth, &self.n_sequences];
        let or = |list: &[u64], default| if list.is_empty() { vec![default] } else { list.to_vec() };
        let (tests, before) = match kept.tests() {
            Some((tests, threads)) if lists.iter().all(|list| list.is_empty()) => (tests, threads),
            of_baseline => {
                let [p, n, d, b] = lists;
                let tests = bench::tests(&or(p, 512), &or(n, 128), &or(d, 0), &or(b, 1));
                (tests, of_baseline.map_or(vec![bench::cores()], |(_, threads)| threads))
            }
        };
        let mut threads: Vec<usize> = vec![];
        for &n in if self.threads.is_empty() { &before } else { &self.threads } {
            if !threads.contains(&n) {
                threads.push(n);
            }
        }
        (tests, threads)
    }
}

pub fn run(args: Args) -> super::Outcome {
    let mut kept = Kept::open(args.keep.clone())?;
    let (tests, all_threads) = args.tests(&kept);
    let Some(needs) = tests.iter().map(Test::context).max() else {
        return Err("there is nothing to measure: all lengths of -p and -n are 0".into());
    };
    let file = args.model.open()?;
    let device = |threads| DeviceArgs { device: Some(args.device), threads, no_graph: args.no_graph };
    let options = args.compile.options_of(&device(None), "measured")?;
    let context = options.context.unwrap_or(needs);
    bench::check_context(&tests, context)?;
    let sequences = tests.iter().map(|test| test.sequences).max().unwrap_or(1);
    if sequences > options.chunk {
        let most = options.chunk;
        return Err(format!(
            "{sequences} sequences are more than a step's {most} tokens; --chunk {sequences} makes it larger"
        )
        .into());
    }
    let options = Options { context: Some(context), sequences, ..options };
    let repetitions = args.repetitions.or(kept.repetitions()).unwrap_or(REPETITIONS);
    let mut out: Option<Printer> = None;
    for threads in all_threads {
        let executor = model::executor(
            &file,
            args.model.path(),
            &options,
            Purpose::Bench,
            &device(Some(threads)).options(),
        )?;
        // With a target of the CPU, that runs.
        let used = if options.target.kind == TargetKind::Cpu { Device::Cpu } else { args.device };
        kept.begin(&args, &file, &options, used, executor.isa())?;
        let bandwidth = match args.no_bandwidth || used != Device::Cpu {
            true => None,
            false => Some(bench::read_bandwidth(BANDWIDTH_BYTES, threads)?),
        };
        let setting = Rc::new(Setting {
            filename: args.model.path().map_or("embedded".into(), |p| p.to_string_lossy().into_owned()),
            model: Description::of(file.gguf()),
            cpu: bench::cpu_name(),
            isa: executor.isa().to_string(),
            backend: used.to_string().to_uppercase(),
            threads,
            chunk: options.chunk,
            cache: options.kv,
            exact: options.is_exact(),
            bandwidth,
        });
        let mut bench = Bench::new(executor)?;
        let out = match &mut out {
            Some(out) => out,
            None => out.insert(Printer::new(args.output)?),
        };
        for &test in &tests {
            let (setting, time) = (Rc::clone(&setting), jiff::Timestamp::now().to_string());
            let (measured, judgement) = kept.measure(
                || Ok(bench.measure(&test, repetitions, !args.no_warmup)?),
                |measured| TestResult::new(&test, threads, measured, bandwidth),
            )?;
            let bytes_per_step = bench.bytes_per_step(&test);
            out.row(Row { setting, test, time, measured, bytes_per_step, judgement })?;
        }
    }
    out.map_or(Ok(()), Printer::end)?;
    kept.end(args.output)
}
