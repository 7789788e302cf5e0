//! What the end-to-end tests share: the models, their oracles, and ways to run them.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod command;
pub mod everywhere;
pub mod reference;
pub mod synthetic;

#[allow(unused_imports, reason = "each test file uses a part")]
pub use everywhere::{everywhere, target};
use serde::Deserialize;
use sinter::compile::{self, Options, Purpose};
use sinter::generate::Session;
use sinter::gguf::{Digest, Gguf, GgufFile, Identity};
use sinter::lower::Config;
use sinter::model;
use sinter::passes::Pipeline;
use sinter::plan::{self, LoadedPlan, Output, Parts, Plan};
use sinter::runtime::cpu::Features;
use sinter::runtime::{DeviceOptions, Executor, Part, SequenceId, Sequences, Wanted};
use sinter::target::{Target, TargetKind};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The models that have an oracle.
pub const MODELS: [&str; 2] = ["q4_k_m", "q8_0"];

/// `tests/data/oracle/oracle.json`.
#[derive(Deserialize)]
pub struct Oracle {
    pub text: String,
    pub tokens: Vec<u32>,
    pub models: BTreeMap<String, OracleModel>,
}

#[derive(Deserialize)]
pub struct OracleModel {
    pub logits: String,
    pub greedy_prompt: String,
    pub greedy_tokens: Vec<u32>,
    pub greedy_text: String,
    /// Best minus second logit at each step.
    pub margins: Vec<f64>,
}

/// A path within the repository.
pub fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

pub fn model_path(name: &str) -> PathBuf {
    path(&format!("models/rustdoc-13m-{name}.gguf"))
}

/// The model of that name; the embedded one is read from the program.
pub fn open(name: &str) -> Arc<GgufFile> {
    let file = if name == "q4_k_m" { model::embedded() } else { GgufFile::open(model_path(name)) };
    Arc::new(file.unwrap())
}

pub fn oracle() -> Oracle {
    let text = std::fs::read_to_string(path("tests/data/oracle/oracle.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The oracle's logits, a row a token.
pub fn oracle_logits(name: &str) -> Vec<Vec<f32>> {
    read_npy(&path("tests/data/oracle").join(&oracle().models[name].logits)).1
}

/// Shape and rows of a float32 matrix.
pub fn read_npy(path: &Path) -> (Vec<u64>, Vec<Vec<f32>>) {
    let npy = npyz::NpyFile::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).unwrap();
    let shape = npy.shape().to_vec();
    let data: Vec<f32> = npy.into_vec().unwrap();
    (shape.clone(), data.chunks_exact(shape[1] as usize).map(<[f32]>::to_vec).collect())
}

/// The default options on a target that tuning does not change, for what is counted.
pub fn frozen() -> Options {
    Options { context: Some(64), ..Options::new(Target::test_cpu()) }
}

/// The default options with a small cache, so that tests need little memory.
pub fn defaults() -> Options {
    Options { context: Some(64), ..Options::new(target()) }
}

pub fn exact() -> Options {
    defaults().exact()
}

/// `options` without one pass.
pub fn without(pass: &str, options: Options) -> Options {
    Options { pipeline: options.pipeline.select(&[format!("-{pass}")]).unwrap(), ..options }
}

/// `options` with every primitive a launch of its own.
pub fn unfused(options: Options) -> Options {
    Options { pipeline: options.pipeline.without_fusions(), ..options }
}

/// Float32 activations, whatever the cache.
pub fn float_activations(options: Options) -> Options {
    Options { pipeline: Pipeline::standard(true), ..options }
}

pub fn plan(file: &GgufFile, options: &Options, purpose: Purpose) -> LoadedPlan {
    let plan = model::plan(file, None, options, purpose).unwrap();
    LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap()
}

/// A plan as `sinter compile` makes it, but for the samples of tensors by which it knows its file.
pub fn plan_of_description(gguf: &Gguf, options: &Options, purpose: Purpose) -> Plan {
    let config = Config::from_gguf(gguf).unwrap();
    let nothing = Digest([0; 32]);
    let programs = compile::compile(gguf, options, purpose).unwrap();
    let (context, chunk) = (options.context_of(&config), options.chunk_of(&config));
    let sequences = options.sequences;
    Plan::build(Parts {
        model: plan::Model {
            source: None,
            identity: Identity { len: gguf.file_len, header: nothing, samples: nothing },
            full_hash: None,
            architecture: config.architecture.name().into(),
            name: "shape".into(),
        },
        target: options.target.clone(),
        options: plan::Options { exact: false, kv: options.kv, context, sequences, chunk, greedy: false },
        programs: programs.into_iter().map(|c| (c.program, c.report)).collect(),
    })
    .unwrap()
}

pub fn executor(file: &Arc<GgufFile>, options: &Options, purpose: Purpose) -> Executor {
    executor_on(file, options, purpose, &DeviceOptions::default())
}

/// [`executor`] on a device that is told how.
pub fn executor_on(
    file: &Arc<GgufFile>,
    options: &Options,
    purpose: Purpose,
    device: &DeviceOptions,
) -> Executor {
    Executor::new(plan(file, options, purpose), Arc::clone(file), device).unwrap()
}

/// A device of each instruction set that this machine has, with its name; where arithmetic is checked, of the best alone, as
/// whole models would take minutes on the others. The kernels' own tests take all sets there too.
pub fn levels() -> Vec<(&'static str, DeviceOptions)> {
    if target().kind != TargetKind::Cpu {
        return vec![("GPU", DeviceOptions::default())];
    }
    let all = Features::available();
    let slow = if cfg!(debug_assertions) { all.len() - 1 } else { 0 };
    let device = |f: Features| (f.name(), DeviceOptions { features: Some(f), ..DeviceOptions::default() });
    all.into_iter().skip(slow).map(device).collect()
}

/// One sequence of an executor, to read tokens into.
pub struct Reader {
    pub sequences: Sequences,
    pub sequence: SequenceId,
}

impl Reader {
    pub fn new(executor: Executor) -> Reader {
        let mut sequences = Sequences::new(executor).unwrap();
        let sequence = sequences.begin().unwrap();
        Reader { sequences, sequence }
    }

    /// Reads tokens in one step, with these rows wanted.
    pub fn step(&mut self, tokens: &[u32], wanted: Wanted, output: Output) {
        let part = Part { sequence: self.sequence, tokens, wanted };
        self.sequences.step(&[part], output).unwrap();
    }

    /// Reads tokens of which no results are wanted.
    pub fn skip(&mut self, tokens: &[u32]) {
        self.step(tokens, Wanted::None, Output::Logits);
    }

    /// Reads tokens; the logits of the last.
    pub fn last(&mut self, tokens: &[u32]) -> Vec<f32> {
        self.step(tokens, Wanted::Last, Output::Logits);
        self.sequences.logits().unwrap().to_vec()
    }

    /// Forgets all but the first tokens.
    pub fn truncate(&mut self, to: u64) {
        self.sequences.truncate(self.sequence, to).unwrap();
    }
}

/// The logits of every token.
pub fn score(file: &Arc<GgufFile>, options: &Options, tokens: &[u32]) -> Vec<Vec<f32>> {
    score_on(file, options, tokens, &DeviceOptions::default())
}

/// [`score`] on a device that is told how.
pub fn score_on(
    file: &Arc<GgufFile>,
    options: &Options,
    tokens: &[u32],
    device: &DeviceOptions,
) -> Vec<Vec<f32>> {
    rows(&mut Session::new(executor_on(file, options, Purpose::Score, device)).unwrap(), tokens)
}

/// The logits of every token in a session of [`Purpose::Score`].
pub fn rows(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut rows = vec![];
    session.score(tokens, |_, row| rows.push(row.to_vec())).unwrap();
    rows
}

/// `‖a − b‖ / ‖b‖`.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    (difference / norm).sqrt()
}

/// The largest [`distance`] between rows; NaN if one is.
pub fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let rows = a.iter().zip(b).map(|(a, b)| distance(a, b));
    rows.fold(0.0, |worst, d| if d.is_nan() || d > worst { d } else { worst })
}

/// Asserts that rows agree, and names what does not.
#[track_caller]
pub fn assert_close(what: &str, a: &[Vec<f32>], b: &[Vec<f32>], tolerance: f64) {
    let worst = worst(a, b);
    println!("{what}: {worst:.1e} of {tolerance:.0e}");
    assert!(worst <= tolerance, "{what}: relative error {worst:e} exceeds {tolerance:e}");
}
