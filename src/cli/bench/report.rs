//! The results as they are printed: a table, or records with llama-bench's keys.

use super::kept::Judgement;
use clap::ValueEnum;
use serde::Serialize;
use sinter::bench::compare::Verdict;
use sinter::bench::{Measurement, Test, Work};
use sinter::gguf::Gguf;
use sinter::ir::KvTypes;
use std::collections::BTreeMap;
use std::io::{StdoutLock, Write};
use std::rc::Rc;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A Markdown table.
    Md,
    /// One array.
    Json,
    /// One object a line.
    Jsonl,
}

/// What all tests on so many threads have in common.
pub struct Setting {
    pub filename: String,
    pub model: Description,
    pub cpu: String,
    /// The instruction set that kernels use.
    pub isa: String,
    pub backend: String,
    pub threads: usize,
    pub chunk: u64,
    pub cache: KvTypes,
    pub exact: bool,
    /// Bytes per second.
    pub bandwidth: Option<f64>,
}

/// A model in a word, and its size.
pub struct Description {
    pub kind: String,
    pub parameters: u64,
    pub bytes: u64,
}

impl Description {
    /// As in `llama 8.0B Q4_K`: the format is the one that most bytes are in.
    pub fn of(gguf: &Gguf) -> Description {
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
pub struct Row {
    pub setting: Rc<Setting>,
    pub test: Test,
    /// When it began.
    pub time: String,
    pub measured: Measurement,
    pub bytes_per_step: Option<u64>,
    /// Beside a baseline, if there is one that has the test.
    pub judgement: Option<Judgement>,
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
            median_ts: m.median_ts(),
            samples_ns: m.samples_ns(),
            samples_ts: m.samples_ts(),
            p50_ns: m.percentile_ns(50),
            p90_ns: m.percentile_ns(90),
            p95_ns: m.percentile_ns(95),
            p99_ns: m.percentile_ns(99),
            bytes_per_step: self.bytes_per_step,
            read_bandwidth_gbs: setting.bandwidth.map(|b| b / 1e9),
            bandwidth_share: self.moved().zip(setting.bandwidth).map(|(moved, most)| moved / most),
            baseline_ts: self.judgement.map(|j| j.before_ts),
            ratio: self.judgement.map(|j| j.ratio),
            slower: self.judgement.map(|j| j.verdict == Verdict::Slower),
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
    median_ts: f64,
    samples_ns: &'a [u64],
    samples_ts: Vec<f64>,
    p50_ns: u64,
    p90_ns: u64,
    p95_ns: u64,
    p99_ns: u64,
    bytes_per_step: Option<u64>,
    read_bandwidth_gbs: Option<f64>,
    bandwidth_share: Option<f64>,
    baseline_ts: Option<f64>,
    ratio: Option<f64>,
    slower: Option<bool>,
}

/// Prints rows as they come, but for one array, which is printed whole.
pub struct Printer {
    out: StdoutLock<'static>,
    format: Output,
    rows: Vec<Row>,
}

/// The columns of the table, and whether they hold numbers.
const COLUMNS: [(&str, bool, usize); 12] = [
    ("model", false, 22),
    ("size", true, 10),
    ("params", true, 9),
    ("backend", false, 7),
    ("threads", true, 7),
    ("test", true, 22),
    ("t/s", true, 19),
    ("p50 ms", true, 9),
    ("p90 ms", true, 9),
    ("p95 ms", true, 9),
    ("p99 ms", true, 9),
    ("bandwidth", true, 16),
];

impl Printer {
    pub fn new(format: Output) -> std::io::Result<Printer> {
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

    pub fn row(&mut self, row: Row) -> std::io::Result<()> {
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
            ms(95),
            ms(99),
            moved,
        ]
    }

    pub fn end(mut self) -> super::super::Outcome {
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
