//! `sinter bench`: how fast a model runs, measured and reported as llama-bench does.

use super::args::{CompileArgs, Device, DeviceArgs, ModelArgs};
use clap::ValueEnum;
use serde::Serialize;
use sinter::bench::{self, Bench, Measurement, Test, Work};
use sinter::compile::{Options, Purpose};
use sinter::gguf::Gguf;
use sinter::ir::KvTypes;
use sinter::model;
use sinter::target::TargetKind;
use std::collections::BTreeMap;
use std::io::{StdoutLock, Write};
use std::num::NonZeroUsize;
use std::rc::Rc;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// What is read to find the bandwidth, in bytes: much more than the caches of a processor hold.
const BANDWIDTH_BYTES: usize = 1 << 30;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of a prompt, or several lengths; 0 for no prompts.
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512", value_name = "N,…")]
    n_prompt: Vec<u64>,
    /// Tokens to generate, or several lengths; 0 for no generation.
    #[arg(short, long, value_delimiter = ',', default_value = "128", value_name = "N,…")]
    n_gen: Vec<u64>,
    /// Tokens in the cache before, or several such depths.
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0", value_name = "N,…")]
    n_depth: Vec<u64>,
    /// Sequences at once, or several numbers of them; speeds are of all together.
    #[arg(short = 'b', long, value_delimiter = ',', default_value = "1", value_name = "N,…", value_parser = clap::value_parser!(u64).range(1..=4096))]
    n_sequences: Vec<u64>,
    /// Times to repeat each test.
    #[arg(short, long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
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
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A Markdown table.
    Md,
    /// One array.
    Json,
    /// One object a line.
    Jsonl,
}

pub fn run(args: Args) -> super::Outcome {
    let tests = bench::tests(&args.n_prompt, &args.n_gen, &args.n_depth, &args.n_sequences);
    let Some(needs) = tests.iter().map(Test::context).max() else {
        return Err("there is nothing to measure: all lengths of -p and -n are 0".into());
    };
    let file = args.model.open()?;
    let device = |threads| DeviceArgs { device: Some(args.device), threads, no_graph: args.no_graph };
    let options = args.compile.options_on(&device(None), false)?;
    let context = options.context.unwrap_or(needs);
    bench::check_context(&tests, context)?;
    let sequences = args.n_sequences.iter().copied().max().unwrap_or(1);
    let options = Options { context: Some(context), sequences, ..options };
    let mut all_threads: Vec<usize> = vec![];
    for threads in args.threads {
        if !all_threads.contains(&threads) {
            all_threads.push(threads);
        }
    }
    if all_threads.is_empty() {
        all_threads.push(std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
    }
    let mut out: Option<Printer> = None;
    for threads in all_threads {
        let executor = model::executor(
            &file,
            args.model.path(),
            &options,
            Purpose::Bench,
            &device(Some(threads)).options(),
        )?;
        // The CPU stands in where there is no GPU.
        let used = if options.target.kind == TargetKind::Cpu { Device::Cpu } else { args.device };
        let bandwidth = match args.no_bandwidth || used != Device::Cpu {
            true => None,
            false => Some(bench::read_bandwidth(BANDWIDTH_BYTES, threads)?),
        };
        let setting = Rc::new(Setting {
            filename: args.model.path().map_or("embedded".into(), |p| p.to_string_lossy().into_owned()),
            model: Description::of(file.gguf()),
            cpu: cpu_name(),
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
        for test in &tests {
            let (setting, test, time) = (Rc::clone(&setting), *test, now());
            let measured = bench.measure(&test, args.repetitions, !args.no_warmup)?;
            out.row(Row { bytes_per_step: bench.bytes_per_step(&test), setting, test, time, measured })?;
        }
    }
    out.map_or(Ok(()), Printer::end)
}

/// What all tests on so many threads have in common.
struct Setting {
    filename: String,
    model: Description,
    cpu: String,
    /// The instruction set that kernels use.
    isa: String,
    backend: String,
    threads: usize,
    chunk: u64,
    cache: KvTypes,
    exact: bool,
    /// Bytes per second.
    bandwidth: Option<f64>,
}

/// A model in a word, and its size.
struct Description {
    kind: String,
    parameters: u64,
    bytes: u64,
}

impl Description {
    /// As in `llama 8.0B Q4_K`: the format is the one that most bytes are in.
    fn of(gguf: &Gguf) -> Description {
        let mut formats: BTreeMap<&str, u64> = BTreeMap::new();
        let (mut parameters, mut bytes) = (0u64, 0u64);
        for tensor in gguf.tensors.values() {
            *formats.entry(tensor.ggml_type.name()).or_default() += tensor.bytes;
            parameters += tensor.elements();
            bytes += tensor.bytes;
        }
        let architecture = gguf.str_opt("general.architecture").ok().flatten().unwrap_or("unknown");
        let format = formats.into_iter().max_by_key(|(_, bytes)| *bytes).map_or("empty", |(name, _)| name);
        let size = match parameters as f64 {
            n if n < 1e9 => format!("{:.0}M", n / 1e6),
            n => format!("{:.1}B", n / 1e9),
        };
        Description { kind: format!("{architecture} {size} {format}"), parameters, bytes }
    }
}

/// The result of one test.
struct Row {
    setting: Rc<Setting>,
    test: Test,
    /// When it began.
    time: String,
    measured: Measurement,
    bytes_per_step: Option<u64>,
}

impl Row {
    /// Bytes per second that the steps moved.
    fn moved(&self) -> Option<f64> {
        Some(self.bytes_per_step? as f64 * self.measured.avg_ts() / self.test.sequences as f64)
    }

    fn record(&self) -> Record<'_> {
        let (m, setting) = (&self.measured, &self.setting);
        let (n_prompt, n_gen) = match self.test.work {
            Work::Prompt(n) => (n, 0),
            Work::Generate { tokens, .. } => (0, tokens),
        };
        Record {
            version: env!("CARGO_PKG_VERSION"),
            cpu_info: &setting.cpu,
            isa: &setting.isa,
            backends: &setting.backend,
            model_filename: &setting.filename,
            model_type: &setting.model.kind,
            model_size: setting.model.bytes,
            model_n_params: setting.model.parameters,
            n_batch: setting.chunk,
            n_ubatch: setting.chunk,
            n_threads: setting.threads,
            type_k: setting.cache.k.name(),
            type_v: setting.cache.v.name(),
            exact: setting.exact,
            n_prompt,
            n_gen,
            n_depth: self.test.depth,
            n_sequences: self.test.sequences,
            test: self.test.to_string(),
            logits: self.test.logits(),
            test_time: &self.time,
            avg_ns: m.avg_ns().round() as u64,
            stddev_ns: m.stddev_ns().round() as u64,
            avg_ts: m.avg_ts(),
            stddev_ts: m.stddev_ts(),
            samples_ns: m.samples_ns(),
            samples_ts: m.samples_ts(),
            p50_ns: m.percentile_ns(50),
            p90_ns: m.percentile_ns(90),
            p99_ns: m.percentile_ns(99),
            bytes_per_step: self.bytes_per_step,
            read_bandwidth_gbs: setting.bandwidth.map(|b| b / 1e9),
            bandwidth_share: self.moved().zip(setting.bandwidth).map(|(moved, most)| moved / most),
        }
    }
}

/// A row for machines, with llama-bench's keys where it has them (see docs/json.md).
#[derive(Serialize)]
struct Record<'a> {
    version: &'static str,
    cpu_info: &'a str,
    isa: &'a str,
    backends: &'a str,
    model_filename: &'a str,
    model_type: &'a str,
    model_size: u64,
    model_n_params: u64,
    n_batch: u64,
    n_ubatch: u64,
    n_threads: usize,
    type_k: &'static str,
    type_v: &'static str,
    exact: bool,
    n_prompt: u64,
    n_gen: u64,
    n_depth: u64,
    n_sequences: u64,
    test: String,
    logits: bool,
    test_time: &'a str,
    avg_ns: u64,
    stddev_ns: u64,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ns: &'a [u64],
    samples_ts: Vec<f64>,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    bytes_per_step: Option<u64>,
    read_bandwidth_gbs: Option<f64>,
    bandwidth_share: Option<f64>,
}

/// Prints rows as they come, but for one array, which is printed whole.
struct Printer {
    out: StdoutLock<'static>,
    format: Output,
    rows: Vec<Row>,
}

/// The columns of the table, and whether they hold numbers.
const COLUMNS: [(&str, bool, usize); 11] = [
    ("model", false, 22),
    ("size", true, 10),
    ("params", true, 9),
    ("backend", false, 7),
    ("threads", true, 7),
    ("test", true, 22),
    ("t/s", true, 19),
    ("p50 ms", true, 9),
    ("p90 ms", true, 9),
    ("p99 ms", true, 9),
    ("bandwidth", true, 16),
];

impl Printer {
    fn new(format: Output) -> std::io::Result<Printer> {
        let mut printer = Printer { out: std::io::stdout().lock(), format, rows: vec![] };
        if format == Output::Md {
            printer.line(&COLUMNS.map(|(name, ..)| name.to_string()))?;
            let rule = |(_, number, width): (&str, bool, usize)| {
                if number { format!("{}:", "-".repeat(width - 1)) } else { "-".repeat(width) }
            };
            printer.line(&COLUMNS.map(rule))?;
        }
        Ok(printer)
    }

    fn line(&mut self, cells: &[String; COLUMNS.len()]) -> std::io::Result<()> {
        for (cell, (_, number, width)) in cells.iter().zip(COLUMNS) {
            match number {
                true => write!(self.out, "| {cell:>width$} ")?,
                false => write!(self.out, "| {cell:width$} ")?,
            }
        }
        writeln!(self.out, "|")?;
        self.out.flush()
    }

    fn row(&mut self, row: Row) -> std::io::Result<()> {
        match self.format {
            Output::Md => self.line(&Printer::cells(&row))?,
            Output::Json => {}
            Output::Jsonl => {
                serde_json::to_writer(&mut self.out, &row.record())?;
                writeln!(self.out)?;
                self.out.flush()?;
            }
        }
        self.rows.push(row);
        Ok(())
    }

    fn cells(row: &Row) -> [String; COLUMNS.len()] {
        let Setting { model, backend, threads, bandwidth, .. } = &*row.setting;
        let m = &row.measured;
        let ms = |percent| format!("{:.3}", m.percentile_ns(percent) as f64 / 1e6);
        let moved = match (row.moved(), bandwidth) {
            (None, _) => String::new(),
            (Some(moved), None) => format!("{:.2} GB/s", moved / 1e9),
            (Some(moved), Some(most)) => format!("{:.2} GB/s {:3.0} %", moved / 1e9, 100.0 * moved / most),
        };
        [
            model.kind.clone(),
            format!("{:.2} MiB", model.bytes as f64 / f64::from(1 << 20)),
            format!("{:.2} M", model.parameters as f64 / 1e6),
            backend.clone(),
            threads.to_string(),
            row.test.to_string(),
            format!("{:.2} ± {:.2}", m.avg_ts(), m.stddev_ts()),
            ms(50),
            ms(90),
            ms(99),
            moved,
        ]
    }

    fn end(mut self) -> super::Outcome {
        match self.format {
            Output::Json => {
                let records: Vec<_> = self.rows.iter().map(Row::record).collect();
                serde_json::to_writer_pretty(&mut self.out, &records)?;
                writeln!(self.out)?;
            }
            Output::Md => {
                let mut settings: Vec<&Setting> = self.rows.iter().map(|row| &*row.setting).collect();
                settings.dedup_by_key(|s| s.threads);
                if let Some(Setting { cpu, isa, .. }) = settings.first() {
                    writeln!(self.out, "\nsinter {} on {cpu} ({isa})", env!("CARGO_PKG_VERSION"))?;
                }
                for Setting { threads, bandwidth, .. } in settings {
                    let Some(bandwidth) = bandwidth else { continue };
                    let threads =
                        if *threads == 1 { "1 thread".into() } else { format!("{threads} threads") };
                    writeln!(self.out, "read bandwidth with {threads}: {:.1} GB/s", bandwidth / 1e9)?;
                }
            }
            Output::Jsonl => {}
        }
        Ok(())
    }
}

/// The processor as Linux names it, or its architecture.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string()
}

/// The time in UTC as RFC 3339 has it.
fn now() -> String {
    let mut time = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}
