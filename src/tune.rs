//! Rates of a device, measured: the cost model of a target fitted to what kernels take there, and fusions that lose.
//!
//! A step of a prompt and one of generation are timed launch by launch. Bandwidth is what memory gives (on the CPU) or the best
//! that a kernel reached; the rates of arithmetic are those of the prompt's matmuls and attention. A launch costs on the CPU what the
//! smallest kernels take; on a GPU, where a step is one graph, what the step of generation takes beyond its bytes and operations, shared
//! among its launches. Steps are timed with caches filled to what they are predicted for. What a kind of kernel takes beyond that is its efficiency ([`Measured::efficiency`]). Then each fusion pass is left out
//! once: with which a step takes longer than without, by more than the noise, loses here. Shapes of a GPU's matvecs are tried
//! format by format: other rows and pairs, then other warps with the best of those; the fastest that wins is the target's. To what its prompts round
//! activations is tried before all else (`turns.rs`).

mod turns;

use crate::bench::{self, Arithmetic, Bench, BenchError, Profile, Test, Work};
use crate::compile::{self, CompileError, Options, Purpose};
use crate::gguf::GgufFile;
use crate::ir::{DType, Graph, Kernel, Report};
use crate::lower::Config;
use crate::model::{self, ModelError};
use crate::passes::cost;
use crate::runtime::DeviceOptions;
use crate::target::{Losing, MatvecShape, Measured, MeasuredTime, Target, TargetKind};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A device that cannot be tuned for.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Bench(#[from] BenchError),
    #[error(transparent)]
    Bandwidth(#[from] bench::BandwidthError),
    #[error("program {0} is of no step that the model is compiled for")]
    Program(String),
    #[error("the fitted target makes no sense: {0}")]
    Fit(String),
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct TuneOptions {
    /// Tokens of the prompt's step.
    pub prompt: u64,
    /// Steps that are timed of each kind.
    pub steps: u64,
    /// Whether fusions are left out one by one.
    pub fusions: bool,
    /// By which share a step must be faster without a fusion for that to count.
    pub margin: f64,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// The target, with the rates that were measured.
    pub target: Target,
    pub steps: Vec<TunedStep>,
    pub fusions: Vec<TunedFusion>,
    pub shapes: Vec<TunedShape>,
    /// None where there was no other.
    pub activations: Option<TunedActivations>,
}

/// A step, as predicted by the fitted target and as measured.
#[derive(Clone, Debug)]
pub struct TunedStep {
    pub graph: String,
    pub tokens: u64,
    /// By the target as it was before.
    pub before_us: f64,
    pub predicted_us: f64,
    /// The whole step as it is outside of a profile.
    pub measured_us: f64,
    /// Spearman's rank correlation between predicted and measured times of its nodes.
    pub rank_correlation: f64,
}

/// A fusion pass, with and without.
#[derive(Clone, Debug)]
pub struct TunedFusion {
    pub pass: String,
    pub graph: String,
    pub with_us: f64,
    pub without_us: f64,
    pub loses: bool,
}

/// A GPU's matvecs over a format in another shape than the target has.
#[derive(Clone, Debug)]
pub struct TunedShape {
    pub format: DType,
    pub shape: MatvecShape,
    /// Of a step of one token.
    pub us: f64,
    /// As the target had it.
    pub before_us: f64,
    /// Whether it is what the target has from now on.
    pub taken: bool,
}

/// A GPU's prompts with activations rounded to other numbers than the target has.
#[derive(Clone, Debug)]
pub struct TunedActivations {
    pub activations: DType,
    /// Of a step of the prompt.
    pub us: f64,
    /// As the target had it.
    pub before_us: f64,
    /// Whether it is what the target has from now on.
    pub taken: bool,
}

/// A step that is timed.
struct Step {
    test: Test,
    graph: Graph,
    report: Report,
    profile: Profile,
    /// Microseconds of each node, by its words, and of what its operations are.
    times: BTreeMap<String, (f64, Arithmetic)>,
}

/// Measures the device on a model. `name` is what the device is called.
///
/// # Errors
/// A model that cannot be compiled or run there.
pub fn tune(
    file: &Arc<GgufFile>,
    path: Option<&Path>,
    options: &Options,
    device: &DeviceOptions,
    name: &str,
    how: &TuneOptions,
) -> Result<Tuning, TuneError> {
    let config = Config::from_gguf(file.gguf()).map_err(CompileError::from)?;
    let prompt = how.prompt.min(options.chunk_of(&config)).min(options.context_of(&config) / 2).max(1);
    let context = (2 * prompt).max(64);
    let mut options = Options { context: Some(context), chunk: prompt, greedy: false, ..options.clone() };
    let tests = [(Work::Prompt(prompt), prompt), (Work::Generate { tokens: 1, logits: true }, 1)];
    // To the end of the caches, as the cost model has it.
    let tests = tests.map(|(work, tokens)| Test { work, depth: context - tokens, sequences: 1 });

    let on_gpu = options.target.kind != TargetKind::Cpu;
    let mut bench = Bench::new(model::executor(file, path, &options, Purpose::Generate, device)?)?;
    let activations = match how.fusions && on_gpu {
        true => turns::other_activations(&mut bench, file, path, &options, device, &tests[0], how)?,
        false => None,
    };
    if let Some(tried) = activations.as_ref().filter(|tried| tried.taken) {
        options.target.prompt_activations = tried.activations;
        bench = Bench::new(model::executor(file, path, &options, Purpose::Generate, device)?)?;
    }
    let steps = tests.map(|test| measured(&mut bench, file, &options, &config, test, how.steps));
    let steps: Vec<Step> = steps.into_iter().collect::<Result<_, _>>()?;
    let bandwidth = match options.target.kind {
        TargetKind::Cpu => {
            bench::read_bandwidth(BANDWIDTH_BYTES, device.threads.unwrap_or_else(bench::cores))?
        }
        _ => {
            // What moves less says more of launches than of memory.
            let large = |k: &&bench::KernelTime| k.work.bytes >= LARGE * k.launches.max(1);
            let kernels = steps.iter().flat_map(|step| &step.profile.kernels).filter(large);
            let reached = kernels.map(bench::KernelTime::bandwidth).max_by(f64::total_cmp);
            reached.unwrap_or(1e9 * options.target.bandwidth_gbs)
        }
    };
    let fitted = fitted(&options.target, bandwidth / 1e9, &steps);
    let mut target = Target { efficiency: options.target.efficiency.clone(), ..fitted.clone() };
    let told = steps.iter().map(|step| told(step, &options.target, &target)).collect();
    let fusions = match how.fusions {
        true => turns::without_each(&mut bench, file, path, &options, device, &steps, how)?,
        false => vec![],
    };
    let shapes = match how.fusions && on_gpu {
        true => turns::other_shapes(&mut bench, file, path, &options, device, &steps[1], how)?,
        false => vec![],
    };
    for tried in shapes.iter().filter(|tried| tried.taken) {
        target.shapes.insert(tried.format, tried.shape);
    }
    let losing = fusions.iter().filter(|f| f.loses).map(|f| Losing {
        pass: f.pass.clone(),
        step: f.graph.clone(),
        with_us: f.with_us,
        without_us: f.without_us,
    });
    let times = steps.iter().flat_map(|step| {
        let of = |(at, (us, _)): (&String, &(f64, Arithmetic))| MeasuredTime {
            step: step.report.graph.clone(),
            at: at.clone(),
            us: *us,
        };
        step.times.iter().map(of).collect::<Vec<_>>()
    });
    target.measured = Some(Measured {
        device: name.into(),
        engine: env!("CARGO_PKG_VERSION").into(),
        model: file.gguf().str_opt("general.name").ok().flatten().unwrap_or("unnamed").into(),
        context,
        efficiency: fitted.efficiency,
        times: times.collect(),
        losing: losing.collect(),
    });
    target.validate().map_err(TuneError::Fit)?;
    Ok(Tuning { target, steps: told, fusions, shapes, activations })
}

/// More than caches hold.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// Bytes of a launch by which the bandwidth of a GPU is told.
const LARGE: u64 = 16 << 20;

fn measured(
    bench: &mut Bench,
    file: &GgufFile,
    options: &Options,
    config: &Config,
    test: Test,
    steps: u64,
) -> Result<Step, TuneError> {
    let profile = bench.profile(&test, steps)?;
    let none = || TuneError::Program(profile.program.clone());
    let programs = &bench.executor().plan().programs;
    let program = programs.iter().find(|program| program.name == profile.program).ok_or_else(none)?;
    let mut times = BTreeMap::new();
    for node in &profile.nodes {
        let label = program.calls[node.call].label.clone();
        times.entry(label).or_insert((0.0, node.arithmetic)).0 += node.ns as f64 / 1e3;
    }
    // A program is called what its step is.
    let mut compiled = Purpose::Generate.steps(config, options).into_iter();
    let compiled = compiled.find(|step| step.name() == program.name).ok_or_else(none)?;
    let (graph, report) = compile::fuse(file.gguf(), options, &compiled)?;
    Ok(Step { test, graph, report, profile, times })
}

/// What nodes of a step cost by a target, and took: each by its words, with its kernel.
fn nodes<'a>(step: &'a Step, target: &Target) -> Vec<(Option<Kernel>, cost::Cost, f64, Arithmetic)> {
    let g: &'a Graph = &step.graph;
    let mut nodes: BTreeMap<String, (Option<Kernel>, cost::Cost)> = BTreeMap::new();
    for id in g.order() {
        let cost = cost::of_node(g, id, target);
        if cost.launches == 0 {
            continue;
        }
        let entry = nodes.entry(g.describe(id)).or_insert((g.op(id).kernel(), cost::Cost::default()));
        entry.1 = [entry.1, cost].into_iter().sum();
    }
    let of = |(at, (kernel, cost)): (String, (Option<Kernel>, cost::Cost))| {
        let (us, arithmetic) = *step.times.get(&at)?;
        Some((kernel, cost, us, arithmetic))
    };
    nodes.into_iter().filter_map(of).collect()
}

/// The target with rates at which its cost model says what was measured.
fn fitted(target: &Target, bandwidth_gbs: f64, steps: &[Step]) -> Target {
    let mut fitted =
        Target { bandwidth_gbs, efficiency: BTreeMap::new(), residual_epilogue: 1.0, ..target.clone() };
    let every: Vec<_> = steps.iter().map(|step| nodes(step, target)).collect();
    // What a launch adds to the time that a kernel is seen to take.
    let mut seen_us = target.launch_us;
    let mut smallest: Vec<f64> = every
        .iter()
        .flatten()
        .filter(|(_, cost, ..)| cost.bytes < 64 << 10)
        .map(|(_, cost, us, _)| us / cost.launches as f64)
        .collect();
    smallest.sort_by(f64::total_cmp);
    if let Some(us) = smallest.get(smallest.len() / 4) {
        (seen_us, fitted.launch_us) = (*us, *us);
    }
    let own_us = |cost: &cost::Cost, us: f64| (us - cost.launches as f64 * seen_us).max(0.05 * us);
    let rate = |by: Arithmetic, kernels: &[Kernel]| {
        let of =
            every.first().into_iter().flatten().filter(|(kernel, _, _, of)| {
                *of == by && kernel.is_some_and(|kernel| kernels.contains(&kernel))
            });
        let (operations, us) = of
            .fold((0.0, 0.0), |(n, t), (_, cost, us, _)| (n + cost.operations as f64, t + own_us(cost, *us)));
        (us > 0.0 && operations > 0.0).then(|| operations / us / 1e3)
    };
    const MATMULS: [Kernel; 3] = [Kernel::DequantMatmul, Kernel::Merge, Kernel::MatmulSwiglu];
    if target.dot4_gops.is_some() {
        fitted.dot4_gops = rate(Arithmetic::Integer, &MATMULS).or(target.dot4_gops);
    }
    fitted.f16_gflops = rate(Arithmetic::Half, &MATMULS).or(target.f16_gflops);
    let float = rate(Arithmetic::Float, &MATMULS).or_else(|| rate(Arithmetic::Float, &[Kernel::Attention]));
    fitted.f32_gflops = float.unwrap_or(target.f32_gflops);

    // A GPU's step is one graph: what it takes beyond its bytes and operations is shared among its launches.
    if target.kind != TargetKind::Cpu
        && let Some(step) = steps.last()
        && let Some(whole) = step.profile.step_ns
    {
        let of_step = nodes(step, &fitted);
        let work: f64 = of_step.iter().map(|(_, cost, ..)| cost.transfer_us.max(cost.arithmetic_us)).sum();
        let launches: u64 = of_step.iter().map(|(_, cost, ..)| cost.launches).sum();
        fitted.launch_us = ((whole as f64 / 1e3 - work) / launches.max(1) as f64).clamp(0.0, seen_us);
    }

    // What is left is each kernel's own: the mean, of logarithms, over the steps, each of which counts by the share that the kernel has in it.
    let mut ratios: BTreeMap<Kernel, Vec<(f64, f64)>> = BTreeMap::new();
    for step in steps {
        let mut sums: BTreeMap<Kernel, (f64, f64)> = BTreeMap::new();
        for (kernel, cost, us, _) in nodes(step, &fitted) {
            let Some(kernel) = kernel else { continue };
            let (work, took) = sums.entry(kernel).or_default();
            *work += cost.transfer_us.max(cost.arithmetic_us);
            *took += own_us(&cost, us);
        }
        let whole: f64 = sums.values().map(|(_, took)| took).sum();
        for (kernel, (work, took)) in sums {
            if work > 0.0 && took > 0.0 {
                ratios.entry(kernel).or_default().push(((work / took).ln(), took / whole));
            }
        }
    }
    let mean = |logs: Vec<(f64, f64)>| {
        let (sum, weight) = logs.iter().fold((0.0, 0.0), |(s, w), (log, share)| (s + log * share, w + share));
        (sum / weight).exp().clamp(0.001, 1000.0)
    };
    fitted.efficiency = ratios.into_iter().map(|(kernel, logs)| (kernel, mean(logs))).collect();
    fitted
}

fn told(step: &Step, before: &Target, fitted: &Target) -> TunedStep {
    let whole = |target: &Target| cost::of_graph(&step.graph, target).us;
    let (mut predicted, mut took) = (vec![], vec![]);
    for (_, cost, us, _) in nodes(step, fitted) {
        predicted.push(cost.us);
        took.push(us);
    }
    TunedStep {
        graph: step.report.graph.clone(),
        tokens: step.test.tokens(),
        before_us: whole(before),
        predicted_us: whole(fitted),
        measured_us: step.profile.step_ns.map_or_else(|| took.iter().sum(), |ns| ns as f64 / 1e3),
        rank_correlation: rank_correlation(&predicted, &took),
    }
}

/// Spearman's: Pearson's of ranks, equal values sharing theirs. 0 where one of them has one rank alone.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |x: &[f64]| -> Vec<f64> {
        let below = |v: f64| x.iter().filter(|o| **o < v).count() as f64;
        let equal = |v: f64| x.iter().filter(|o| **o == v).count() as f64;
        x.iter().map(|v| below(*v) + (equal(*v) - 1.0) / 2.0).collect()
    };
    let (a, b) = (ranks(a), ranks(b));
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
    let (ma, mb) = (mean(&a), mean(&b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(&b).map(|(x, y)| f(x - ma, y - mb)).sum::<f64>();
    let norm = (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt();
    if norm > 0.0 { sum(&|x, y| x * y) / norm } else { 0.0 }
}

/// Where the measured target of a device is kept: `SINTER_TUNED`, else `sinter/tuned` among the caches of the user. None where that
/// variable is `off`, or nothing says where caches are.
pub fn path_of(device: &str) -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let folder = match variable("SINTER_TUNED") {
        Some(value) if value == "off" => return None,
        Some(folder) => PathBuf::from(folder),
        None => variable("XDG_CACHE_HOME")
            .or_else(|| variable("LOCALAPPDATA"))
            .map(PathBuf::from)
            .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")))?
            .join("sinter")
            .join("tuned"),
    };
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = device.chars().map(plain).collect();
    Some(folder.join(name.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-") + ".json"))
}

/// What the CPU is called, with so many threads.
pub fn cpu(threads: usize) -> String {
    format!("{}, {threads} threads", bench::cpu_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_correlate() {
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(close(rank_correlation(&[1.0, 2.0, 3.0], &[10.0, 400.0, 500.0]), 1.0));
        assert!(close(rank_correlation(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), -1.0));
        // By hand: ranks 0.5 0.5 2 against 0 1 2.
        assert!(close(rank_correlation(&[1.0, 1.0, 2.0], &[1.0, 2.0, 3.0]), 1.5 / (1.5f64 * 2.0).sqrt()));
        assert_eq!(rank_correlation(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
        assert_eq!(rank_correlation(&[], &[]), 0.0);
    }
}
