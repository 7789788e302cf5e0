//! A run of tests as it is kept: a baseline is one, a history has one on each line (docs/json.md).

use super::{Measurement, Test, Work};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// The version of what is written here.
pub const FORMAT: u64 = 1;

/// A file of more bytes than this is no history.
const MOST_BYTES: u64 = 256 << 20;

/// What was measured, when, on what and of what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// [`FORMAT`].
    pub format: u64,
    /// When it began.
    pub time: Timestamp,
    pub hardware: Hardware,
    pub software: Software,
    pub model: ModelId,
    pub options: Settings,
    pub tests: Vec<TestResult>,
}

/// What speeds depend on that no update of software changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hardware {
    /// The processor's model.
    pub cpu: String,
    /// Processors that may be used.
    pub cores: usize,
    /// Of the machine, where that is known.
    pub memory_bytes: Option<u64>,
    /// The instruction set of the kernels: a processor's, or the architecture of the GPU.
    pub isa: String,
    /// Where the kernels ran, if not on the processor.
    pub gpu: Option<GpuHardware>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuHardware {
    pub name: String,
    pub memory_bytes: u64,
}

/// Versions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Software {
    pub sinter: String,
    pub os: String,
    /// Of the GPU, as it counts its versions.
    pub driver: Option<String>,
    /// The library that compiles kernels for the GPU, where it is there.
    pub compiler: Option<String>,
}

/// Which model it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelId {
    /// As in `llama 8.0B Q4_K`.
    pub name: String,
    pub bytes: u64,
    pub parameters: u64,
    /// Hashes of the file's header and of samples of its tensors ([`crate::gguf::Identity`]).
    pub identity: String,
}

/// Options that change what is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The target's name.
    pub target: String,
    pub exact: bool,
    pub type_k: String,
    pub type_v: String,
    /// The most tokens of a step.
    pub chunk: u64,
    /// Tokens that a sequence may have. Follows from the tests unless it is given, so it is not compared.
    pub context: u64,
    /// False with `--no-fuse`.
    pub fuse: bool,
    /// `--passes`, if given.
    pub passes: Option<Vec<String>>,
    /// `--fuel`, if given.
    pub fuel: Option<u64>,
    /// `--deny`, and what stands in the file of `--rules`.
    #[serde(default)]
    pub denied: Vec<String>,
    /// False where a GPU was given each launch by itself.
    pub graph: bool,
    /// Whether a first repetition was left out.
    pub warm_up: bool,
}

/// The result of one test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestResult {
    /// Its name, which follows from the numbers.
    pub test: String,
    pub n_threads: usize,
    pub n_prompt: u64,
    pub n_gen: u64,
    pub n_depth: u64,
    pub n_sequences: u64,
    pub logits: bool,
    pub repetitions: u64,
    /// Tokens per second of the repetitions: the median, which is what is compared, mean and deviation.
    pub median_ts: f64,
    pub avg_ts: f64,
    pub stddev_ts: f64,
    /// Of a step.
    pub p50_ns: u64,
    pub p95_ns: u64,
    pub p99_ns: u64,
    /// Of as many threads, where it was measured.
    pub read_bandwidth_gbs: Option<f64>,
}

impl TestResult {
    /// The result of a test with so many threads; bandwidth in bytes per second.
    pub fn new(test: &Test, threads: usize, m: &Measurement, bandwidth: Option<f64>) -> TestResult {
        let (n_prompt, n_gen) = match test.work {
            Work::Prompt(n) => (n, 0),
            Work::Generate { tokens, .. } => (0, tokens),
        };
        TestResult {
            test: test.to_string(),
            n_threads: threads,
            n_prompt,
            n_gen,
            n_depth: test.depth,
            n_sequences: test.sequences,
            logits: test.logits(),
            repetitions: m.samples_ns().len() as u64,
            median_ts: m.median_ts(),
            avg_ts: m.avg_ts(),
            stddev_ts: m.stddev_ts(),
            p50_ns: m.percentile_ns(50),
            p95_ns: m.percentile_ns(95),
            p99_ns: m.percentile_ns(99),
            read_bandwidth_gbs: bandwidth.map(|b| b / 1e9),
        }
    }

    /// The test, if the numbers describe one.
    pub fn test(&self) -> Option<Test> {
        let work = match (self.n_prompt, self.n_gen, self.logits) {
            (n @ 1.., 0, true) => Work::Prompt(n),
            (0, tokens @ 1.., logits) => Work::Generate { tokens, logits },
            _ => return None,
        };
        let test = Test { work, depth: self.n_depth, sequences: self.n_sequences };
        ((1..=4096).contains(&self.n_sequences) && test.to_string() == self.test).then_some(test)
    }

    /// As it is called where several numbers of threads are at hand.
    pub fn name(&self) -> String {
        let threads = if self.n_threads == 1 { "thread" } else { "threads" };
        format!("{} ({} {threads})", self.test, self.n_threads)
    }

    /// What is wrong with it.
    fn fault(&self) -> Option<String> {
        let positive = |x: f64| (1e-9..=1e18).contains(&x);
        if self.test().is_none() {
            return Some("its numbers describe no test of that name".into());
        }
        if self.n_threads == 0 || self.repetitions == 0 {
            return Some("it has no threads or no repetitions".into());
        }
        for (key, x) in [("median_ts", self.median_ts), ("avg_ts", self.avg_ts)] {
            if !positive(x) {
                return Some(format!("{key} is {x}, which is no speed"));
            }
        }
        if !(self.stddev_ts == 0.0 || positive(self.stddev_ts)) {
            return Some(format!("stddev_ts is {}, which is no deviation", self.stddev_ts));
        }
        if !(0 < self.p50_ns && self.p50_ns <= self.p95_ns && self.p95_ns <= self.p99_ns) {
            let percentiles = [self.p50_ns, self.p95_ns, self.p99_ns];
            return Some(format!("{percentiles:?} are no percentiles of times"));
        }
        let bandwidth = self.read_bandwidth_gbs.filter(|b| !positive(*b));
        bandwidth.map(|b| format!("read_bandwidth_gbs is {b}, which is no speed"))
    }
}

/// A file that is no baseline or history.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{place} is no run that sinter bench kept: {why}")]
    NoRun { place: String, why: String },
    #[error("{place} is of format {found}, and this sinter reads format {FORMAT}: measure and save anew")]
    Format { place: String, found: u64 },
    #[error("{0} has no runs")]
    Empty(PathBuf),
}

impl Run {
    /// The run that `text` holds, where `place` names it in errors.
    ///
    /// # Errors
    /// If it is of another format, or holds anything that no run has.
    pub fn parse(text: &str, place: &str) -> Result<Run, RunError> {
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let fault = |why: String| RunError::NoRun { place: place.to_string(), why };
        let Format { format } = serde_json::from_str(text).map_err(|e| fault(e.to_string()))?;
        if format != FORMAT {
            return Err(RunError::Format { place: place.to_string(), found: format });
        }
        let run: Run = serde_json::from_str(text).map_err(|e| fault(e.to_string()))?;
        if run.tests.is_empty() {
            return Err(fault("it has no tests".into()));
        }
        let mut names = BTreeSet::new();
        for test in &run.tests {
            if let Some(why) = test.fault() {
                return Err(fault(format!("test {:?}: {why}", test.test)));
            }
            if !names.insert((&test.test, test.n_threads)) {
                return Err(fault(format!("it has {} twice", test.name())));
            }
        }
        Ok(run)
    }

    /// The baseline at `path`.
    ///
    /// # Errors
    /// If there is none, or as [`Run::parse`].
    pub fn read(path: &Path) -> Result<Run, RunError> {
        Run::parse(&read(path)?, &path.display().to_string())
    }

    /// Its result of that test with as many threads.
    pub fn result(&self, test: &str, threads: usize) -> Option<&TestResult> {
        self.tests.iter().find(|t| t.test == test && t.n_threads == threads)
    }
}

/// All runs of the history at `path`.
///
/// # Errors
/// If there is none, or for the first line that is no run: its number and, as [`Run::parse`] has it, why.
pub fn read_history(path: &Path) -> Result<Vec<Run>, RunError> {
    let text = read(path)?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let runs = lines.map(|(number, line)| Run::parse(line, &format!("line {number} of {}", path.display())));
    let runs = runs.collect::<Result<Vec<_>, _>>()?;
    if runs.is_empty() { Err(RunError::Empty(path.into())) } else { Ok(runs) }
}

/// Appends a run to the history at `path`, which is made if it is not there.
///
/// # Errors
/// If it cannot be written.
pub fn append(path: &Path, run: &Run) -> Result<(), RunError> {
    let write = || -> io::Result<()> {
        let mut file = File::options().read(true).append(true).create(true).open(path)?;
        let mut line = String::new();
        // A line that an editor left without its end is ended first.
        if std::fs::read(path)?.last().is_some_and(|byte| *byte != b'\n') {
            line.push('\n');
        }
        line += &serde_json::to_string(run)?;
        line.push('\n');
        // In one piece, as others may append at the same time.
        file.write_all(line.as_bytes())
    };
    write().map_err(|source| RunError::Write { path: path.into(), source })
}

fn read(path: &Path) -> Result<String, RunError> {
    let fault = |source| RunError::Read { path: path.into(), source };
    let mut text = vec![];
    File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut text)).map_err(fault)?;
    let no_text = |_| RunError::NoRun { place: path.display().to_string(), why: "it is no text".into() };
    String::from_utf8(text).map_err(no_text)
}

impl Hardware {
    /// In a line: `AMD EPYC 9B14 (avx512), 2 cores, 16 GiB`.
    pub fn summary(&self) -> String {
        let gib = |bytes: u64| format!("{:.0} GiB", bytes as f64 / f64::from(1 << 30));
        let mut line = String::new();
        let isa = &self.isa;
        // Writing to a string does not fail.
        if let Some(gpu) = &self.gpu {
            _ = write!(line, "{} ({isa}, {}), ", gpu.name, gib(gpu.memory_bytes));
        }
        line += &self.cpu;
        if self.gpu.is_none() {
            _ = write!(line, " ({isa})");
        }
        let cores = if self.cores == 1 { "core" } else { "cores" };
        _ = write!(line, ", {} {cores}", self.cores);
        if let Some(bytes) = self.memory_bytes {
            _ = write!(line, ", {}", gib(bytes));
        }
        line
    }
}

#[cfg(test)]
pub mod tests;
