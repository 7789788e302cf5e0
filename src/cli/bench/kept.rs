//! Baselines and histories: what is kept of a run, and a run beside one that was kept.

use super::super::args::Device;
use super::super::{files, say};
use super::Args;
use super::report::{Description, Output};
use sinter::bench::compare::{self, Threshold, Verdict, comparable};
use sinter::bench::run::{self, FORMAT, Hardware, ModelId, Run, RunError, Settings, Software, TestResult};
use sinter::bench::{Test, trend};
use sinter::compile::Options;
use sinter::gguf::GgufFile;
use sinter::runtime::hip::gpu;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A test that seems slower is measured so many times again; only if it is slower each time, it counts.
const AGAIN: usize = 2;

#[derive(Clone, clap::Args)]
pub struct KeepArgs {
    /// Keep the results in this file, as a baseline to compare with later (see docs/json.md). With --compare, of the same
    /// file, it is only replaced if no test became slower and none was left out.
    #[arg(long, value_name = "BASELINE")]
    pub save: Option<PathBuf>,
    /// Run the tests of this baseline (with its threads and repetitions, unless others are given), and print both speeds
    /// of each. Exits with 3 if one is slower by more than --threshold, and refuses a baseline of another model, other hardware
    /// or other options.
    #[arg(long, value_name = "BASELINE")]
    pub compare: Option<PathBuf>,
    /// By how much the median speed of a test may fall, in per cent.
    #[arg(long, value_name = "PER_CENT", default_value = "10", requires = "compare")]
    pub threshold: Threshold,
    /// Append the results to this file, a run a line; it is made if it is not there.
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
    /// Draw the history, with these results, as an SVG. `sinter trend` draws one without measuring.
    #[arg(long, value_name = "SVG", requires = "history")]
    pub trend: Option<PathBuf>,
}

/// Tests that are slower than they were.
#[derive(Debug, thiserror::Error)]
#[error("slower than in {baseline} by more than {threshold}: {}", tests.join(", "))]
pub struct Slower {
    baseline: String,
    threshold: Threshold,
    tests: Vec<String>,
}

/// What a run is compared with, and what is kept of it.
pub struct Kept {
    args: KeepArgs,
    baseline: Option<Run>,
    history: Vec<Run>,
    /// The run so far.
    run: Option<Run>,
    /// Of each test that was measured, how often it was found slower.
    judged: Vec<(TestResult, Judgement)>,
}

/// A test beside the same one of the baseline.
#[derive(Clone, Copy)]
pub struct Judgement {
    pub before_ts: f64,
    pub ratio: f64,
    pub verdict: Verdict,
    times: usize,
}

impl Kept {
    /// Reads what is to be compared with and added to, so that nothing is measured in vain.
    pub fn open(args: KeepArgs) -> Result<Kept, Error> {
        let baseline = args.compare.as_deref().map(Run::read).transpose()?;
        let history = match args.history.as_deref().map(run::read_history) {
            None => vec![],
            Some(Err(RunError::Read { source, .. })) if source.kind() == std::io::ErrorKind::NotFound => {
                vec![]
            }
            // An empty file is one that somebody has made for it.
            Some(Err(RunError::Empty(_))) => vec![],
            Some(history) => history?,
        };
        let on_stdout =
            [("--save -", &args.save), ("--history -", &args.history), ("--trend -", &args.trend)];
        if let Some((flag, _)) =
            on_stdout.iter().find(|(_, path)| path.as_deref().is_some_and(files::is_stdout))
        {
            return Err(format!("{flag}: the results go to stdout, and only one can: name a file").into());
        }
        for path in [&args.save, &args.history, &args.trend].into_iter().flatten() {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !folder.is_dir() {
                return Err(format!(
                    "cannot write {}: there is no folder {}",
                    path.display(),
                    folder.display()
                )
                .into());
            }
            files::check_writable(path)?;
        }
        Ok(Kept { args, baseline, history, run: None, judged: vec![] })
    }

    /// Of the baseline: its tests, and its numbers of threads.
    pub fn tests(&self) -> Option<(Vec<Test>, Vec<usize>)> {
        let results = &self.baseline.as_ref()?.tests;
        let (mut tests, mut threads) = (vec![], vec![]);
        for result in results {
            let test = result.test()?;
            if !tests.contains(&test) {
                tests.push(test);
            }
            if !threads.contains(&result.n_threads) {
                threads.push(result.n_threads);
            }
        }
        Some((tests, threads))
    }

    /// Of the baseline.
    pub fn repetitions(&self) -> Option<u64> {
        Some(self.baseline.as_ref()?.tests.first()?.repetitions)
    }

    fn in_use(&self) -> bool {
        self.baseline.is_some() || self.args.save.is_some() || self.args.history.is_some()
    }

    /// Begins the run on a device with kernels for `isa`, unless it is begun.
    pub fn begin(
        &mut self,
        args: &Args,
        file: &GgufFile,
        options: &Options,
        used: Device,
        isa: &str,
    ) -> Result<(), Error> {
        if self.run.is_some() || !self.in_use() {
            return Ok(());
        }
        let gpu = match used {
            Device::Cpu => None,
            Device::Hip(number) => Some(gpu(number)?),
        };
        let model = Description::of(file.gguf());
        let identity = file.identity();
        let run = Run {
            format: FORMAT,
            time: jiff::Timestamp::now(),
            hardware: Hardware::here(isa, gpu.as_ref())?,
            software: Software::here(gpu.as_ref()),
            model: ModelId {
                name: model.kind,
                bytes: model.bytes,
                parameters: model.parameters,
                identity: format!("{:.32}-{:.32}", identity.header, identity.samples),
            },
            options: Settings {
                target: options.target.name.clone(),
                exact: options.is_exact(),
                type_k: options.kv.k.name().into(),
                type_v: options.kv.v.name().into(),
                chunk: options.chunk,
                context: options.context.unwrap_or_default(),
                fuse: !args.compile.no_fuse,
                passes: args.compile.passes.clone(),
                fuel: args.compile.fuel,
                denied: options.pipeline.denied.iter().map(ToString::to_string).collect(),
                graph: !args.no_graph,
                warm_up: !args.no_warmup,
            },
            tests: vec![],
        };
        if let Some((baseline, path)) = self.baseline.as_ref().zip(self.args.compare.as_ref()) {
            let refused = |e| format!("{} cannot be compared with: {e}", path.display());
            comparable(baseline, &run).map_err(refused)?;
        }
        self.run = Some(run);
        Ok(())
    }

    /// Takes the result of a test, which `measure` makes; again if it seems slower than it was.
    pub fn measure<T>(
        &mut self,
        mut measure: impl FnMut() -> Result<T, Error>,
        result: impl Fn(&T) -> TestResult,
    ) -> Result<(T, Option<Judgement>), Error> {
        let mut measured = measure()?;
        let Some(run) = &mut self.run else { return Ok((measured, None)) };
        let mut best = result(&measured);
        let before = self.baseline.as_ref().and_then(|b| b.result(&best.test, best.n_threads));
        let judged = before.map(|before| -> Result<Judgement, Error> {
            let threshold = self.args.threshold;
            let mut times = 1;
            while threshold.judge(before, best.median_ts) == Verdict::Slower && times <= AGAIN {
                let again = measure()?;
                let found = result(&again);
                if found.median_ts > best.median_ts {
                    (best, measured) = (found, again);
                }
                times += 1;
            }
            let (before_ts, ratio) = (before.median_ts, best.median_ts / before.median_ts);
            Ok(Judgement { before_ts, ratio, verdict: threshold.judge(before, best.median_ts), times })
        });
        let judgement = judged.transpose()?;
        self.judged.extend(judgement.map(|judgement| (best.clone(), judgement)));
        run.tests.push(best);
        Ok((measured, judgement))
    }

    /// Prints the comparison, and writes what is to be kept.
    ///
    /// # Errors
    /// [`Slower`], if a test is, after all is written.
    pub fn end(self, output: Output) -> super::super::Outcome {
        let Some(run) = &self.run else { return Ok(()) };
        let mut slower = None;
        if let Some((baseline, path)) = self.baseline.as_ref().zip(self.args.compare.as_ref()) {
            if self.judged.is_empty() {
                return Err(format!("{} has none of the tests that were run", path.display()).into());
            }
            let report = self.report(baseline, run, path);
            match output {
                Output::Md => print!("\n{report}"),
                Output::Json | Output::Jsonl => say!("{}", report.trim_end()),
            }
            let of = |(result, judgement): &(TestResult, Judgement)| {
                (judgement.verdict == Verdict::Slower)
                    .then(|| format!("{} to {:.2} of it", result.name(), judgement.ratio))
            };
            let tests: Vec<String> = self.judged.iter().filter_map(of).collect();
            let (baseline, threshold) = (path.display().to_string(), self.args.threshold);
            slower = (!tests.is_empty()).then_some(Slower { baseline, threshold, tests });
        }
        if let Some(path) = &self.args.history {
            run::append(path, run)?;
        }
        if let Some(path) = &self.args.trend {
            let all = [&self.history[..], std::slice::from_ref(run)].concat();
            files::write_whole(path, |to| to.write_all(trend(&all).as_bytes()))?;
        }
        if let Some(path) = &self.args.save {
            self.save(path, run, slower.is_some())?;
        }
        slower.map_or(Ok(()), |slower| Err(slower.into()))
    }

    fn save(&self, path: &Path, run: &Run, slower: bool) -> super::super::Outcome {
        let same = |other: &PathBuf| {
            path.canonicalize().ok().zip(other.canonicalize().ok()).is_some_and(|(a, b)| a == b)
        };
        let left = !self.baseline.as_ref().is_none_or(|b| missing(b, run).is_empty());
        if self.args.compare.as_ref().is_some_and(same) && (slower || left) {
            let why = if slower { "a test is slower" } else { "not all of its tests were run" };
            say!("{} stays as it was, as {why}", path.display());
            return Ok(());
        }
        files::write_whole(path, |to| {
            serde_json::to_writer_pretty(&mut *to, run)?;
            writeln!(to)
        })?;
        let unsteady = compare::unsteady(run, self.args.threshold);
        if !unsteady.is_empty() {
            let path = path.display();
            say!(
                "{path} would be better measured while nothing else runs; it varied: {}",
                unsteady.join(", ")
            );
        }
        Ok(())
    }

    /// Both speeds of each test, and what else a reader should know.
    fn report(&self, baseline: &Run, run: &Run, path: &Path) -> String {
        let mut text = format!(
            "against {} of {}, medians of the repetitions:\n\n",
            path.display(),
            baseline.time.strftime("%Y-%m-%d %H:%M UTC")
        );
        let mut line = |cells: [&str; 7]| {
            let [test, threads, before, now, ratio, p95, verdict] = cells;
            // Writing to a string does not fail, here and below.
            _ = writeln!(
                text,
                "| {test:22} | {threads:>7} | {before:>10} | {now:>10} | {ratio:>6} | {p95:>19} | {verdict:16} |"
            );
        };
        line(["test", "threads", "before t/s", "now t/s", "ratio", "p95 ms", "verdict"]);
        let rule = |n: usize| "-".repeat(n);
        let right = |n: usize| format!("{}:", rule(n - 1));
        line([&rule(22), &right(7), &right(10), &right(10), &right(6), &right(19), &rule(16)]);
        let ts = |x: f64| format!("{x:.2}");
        let ms = |ns: u64| format!("{:.3}", ns as f64 / 1e6);
        for (now, judgement) in &self.judged {
            let Some(before) = baseline.result(&now.test, now.n_threads) else { continue };
            let verdict = match judgement.verdict {
                Verdict::Slower => format!("slower, {} times", judgement.times),
                Verdict::Faster => "faster".into(),
                Verdict::Same if judgement.times > 1 => format!("same, at try {}", judgement.times),
                Verdict::Same => "same".into(),
            };
            line([
                &now.test,
                &now.n_threads.to_string(),
                &ts(before.median_ts),
                &ts(now.median_ts),
                &ts(judgement.ratio),
                &format!("{} -> {}", ms(before.p95_ns), ms(now.p95_ns)),
                &verdict,
            ]);
        }
        let notes = [
            ("not run now", missing(baseline, run)),
            ("not in the baseline", missing(run, baseline)),
            ("versions", compare::versions(baseline, run)),
            ("memory", bandwidths(baseline, run)),
        ];
        for (what, list) in notes.into_iter().filter(|(_, list)| !list.is_empty()) {
            _ = writeln!(text, "\n{what}: {}", list.join("; "));
        }
        text
    }
}

/// The tests of one that are not in the other.
fn missing(of: &Run, other: &Run) -> Vec<String> {
    let lacks = |t: &&TestResult| other.result(&t.test, t.n_threads).is_none();
    of.tests.iter().filter(lacks).map(TestResult::name).collect()
}

/// Where memory is read at another speed than it was, the machine is busy, or was: by numbers of threads.
fn bandwidths(before: &Run, now: &Run) -> Vec<String> {
    let mut said = vec![];
    let of = |run: &Run, threads| run.tests.iter().find(|t| t.n_threads == threads)?.read_bandwidth_gbs;
    for threads in now.tests.iter().map(|t| t.n_threads).collect::<BTreeSet<_>>() {
        let Some((then, now)) = of(before, threads).zip(of(now, threads)) else { continue };
        if (now / then - 1.0).abs() > 0.1 {
            said.push(format!(
                "{threads} threads read {then:.1} GB/s then and {now:.1} now; something else may run"
            ));
        }
    }
    said
}
