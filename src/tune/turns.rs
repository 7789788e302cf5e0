//! Steps as a target has them and as they would be otherwise, timed in turns: without a fusion, with other shapes of matvecs, with activations of
//! prompts rounded to other numbers.

use super::{Step, TuneError, TuneOptions, TunedActivations, TunedFusion, TunedShape};
use crate::bench::measurement::median;
use crate::bench::{Bench, Profile, Test};
use crate::compile::{self, CompileError, Options, Purpose};
use crate::gguf::GgufFile;
use crate::ir::{DType, Kernel, Outcome, Report};
use crate::lower::Config;
use crate::model;
use crate::passes::NOT_FUSIONS;
use crate::runtime::{DeviceOptions, Stage};
use crate::target::MatvecShape;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// A prompt's step with activations of 16 bits where the target has 8, or the other way round; none if that is the same step.
pub(super) fn other_activations(
    bench: &mut Bench,
    file: &Arc<GgufFile>,
    path: Option<&Path>,
    options: &Options,
    device: &DeviceOptions,
    test: &Test,
    how: &TuneOptions,
) -> Result<Option<TunedActivations>, TuneError> {
    let activations = match options.target.prompt_activations {
        DType::F16 => DType::Q8Act,
        _ => DType::F16,
    };
    let mut other = options.clone();
    other.target.prompt_activations = activations;
    let config = Config::from_gguf(file.gguf()).map_err(CompileError::from)?;
    let steps = Purpose::Generate.steps(&config, options);
    let graphs = |options: &Options| -> Result<Vec<String>, CompileError> {
        steps.iter().map(|step| Ok(compile::fuse(file.gguf(), options, step)?.0.to_string())).collect()
    };
    if graphs(options)? == graphs(&other)? {
        return Ok(None);
    }
    let mut other = Bench::new(model::executor(file, path, &other, Purpose::Generate, device)?)?;
    let turns = Turns::of(bench, &mut other, test, how)?;
    Ok(Some(TunedActivations {
        activations,
        us: turns.other_us,
        before_us: turns.us,
        taken: turns.other_wins,
    }))
}

/// Each fusion pass that made something, left out: how long the steps take then, in turns with how long they take with all.
pub(super) fn without_each(
    bench: &mut Bench,
    file: &Arc<GgufFile>,
    path: Option<&Path>,
    options: &Options,
    device: &DeviceOptions,
    steps: &[Step],
    how: &TuneOptions,
) -> Result<Vec<TunedFusion>, TuneError> {
    let fired = |report: &Report, pass: &str| {
        report.decisions.iter().any(|d| d.pass == pass && !matches!(d.outcome, Outcome::Rejected { .. }))
    };
    // Without the core of the matmuls there would be float copies of weights. What is no fusion is left in but for the choice between
    // float products and those of what is rounded.
    let stays =
        |pass: &str| pass == "dequant_matmul" || NOT_FUSIONS.contains(&pass) && pass != "quantise_acts";
    let mut passes = options.pipeline.enabled();
    passes.retain(|pass| !stays(pass) && steps.iter().any(|step| fired(&step.report, pass)));
    let mut found = vec![];
    for (done, pass) in passes.iter().copied().enumerate() {
        device.progress.tell(Stage::LeftOut, done as u64, passes.len() as u64);
        let pipeline = options.pipeline.clone().select(&[format!("-{pass}")]).map_err(CompileError::from)?;
        let without = Options { pipeline, ..options.clone() };
        let mut other = Bench::new(model::executor(file, path, &without, Purpose::Generate, device)?)?;
        for step in steps.iter().filter(|step| fired(&step.report, pass)) {
            let turns = Turns::of(bench, &mut other, &step.test, how)?;
            found.push(TunedFusion {
                pass: pass.into(),
                graph: step.report.graph.clone(),
                with_us: turns.us,
                without_us: turns.other_us,
                loses: turns.other_wins,
            });
        }
    }
    device.progress.tell(Stage::LeftOut, passes.len() as u64, passes.len() as u64);
    Ok(found)
}

/// The formats of a step's weights, each with other rows and pairs, and the best of those with other warps: the fastest that wins is taken.
pub(super) fn other_shapes(
    bench: &mut Bench,
    file: &Arc<GgufFile>,
    path: Option<&Path>,
    options: &Options,
    device: &DeviceOptions,
    step: &Step,
    how: &TuneOptions,
) -> Result<Vec<TunedShape>, TuneError> {
    let g = &step.graph;
    let matmuls = g.ids().into_iter().filter(|id| {
        let matmul = [Kernel::DequantMatmul, Kernel::Merge, Kernel::MatmulSwiglu];
        g.op(*id).kernel().is_some_and(|kernel| matmul.contains(&kernel))
    });
    let read = matmuls.flat_map(|id| g.operands(id).iter().map(|v| g.ty(*v).dtype).collect::<Vec<_>>());
    let formats: BTreeSet<DType> =
        read.filter(|dtype| DType::WEIGHTS.contains(dtype) && dtype.is_quantised()).collect();
    let mut tried: Vec<TunedShape> = vec![];
    for format in formats {
        let first = tried.len();
        let mut best = options.target.shape(format);
        // Rows and pairs, then the warps of the best of them.
        for of_warps in [false, true] {
            let MatvecShape { rows, pairs, warps } = best;
            let others = match of_warps {
                false => [(1, 1, warps), (1, 2, warps), (2, 1, warps), (2, 2, warps)].to_vec(),
                true => [1, 2, 4]
                    .into_iter()
                    .filter(|warps| *warps <= options.target.most_warps())
                    .map(|warps| (rows, pairs, warps))
                    .collect(),
            };
            for (rows, pairs, warps) in others {
                let shape = MatvecShape { rows, pairs, warps };
                let known = |shape: &MatvecShape| tried[first..].iter().any(|tried| tried.shape == *shape);
                if shape == options.target.shape(format) || known(&shape) {
                    continue;
                }
                let mut other = options.clone();
                other.target.shapes.insert(format, shape);
                let mut other = Bench::new(model::executor(file, path, &other, Purpose::Generate, device)?)?;
                let turns = Turns::of(bench, &mut other, &step.test, how)?;
                let (us, before_us) = (turns.other_us, turns.us);
                tried.push(TunedShape { format, shape, us, before_us, taken: turns.other_wins });
            }
            let gain = |tried: &TunedShape| tried.us / tried.before_us;
            let won = tried[first..].iter().filter(|tried| tried.taken);
            if let Some(won) = won.min_by(|a, b| gain(a).total_cmp(&gain(b))) {
                best = won.shape;
            }
        }
        for tried in &mut tried[first..] {
            tried.taken &= tried.shape == best;
        }
    }
    Ok(tried)
}

/// A step as two programs have it, timed in turns.
struct Turns {
    /// Medians.
    us: f64,
    other_us: f64,
    /// Whether the other is faster in every turn, by the margin: what else the machine does must not decide.
    other_wins: bool,
}

impl Turns {
    fn of(bench: &mut Bench, other: &mut Bench, test: &Test, how: &TuneOptions) -> Result<Turns, TuneError> {
        let (mut these, mut those) = (vec![], vec![]);
        for _ in 0..5 {
            these.push(step_us(bench.profile(test, how.steps)?));
            those.push(step_us(other.profile(test, how.steps)?));
        }
        let (best, worst) = (least(&these), those.iter().copied().fold(0.0, f64::max));
        let other_wins = worst < best * (1.0 - how.margin);
        Ok(Turns { us: median(these), other_us: median(those), other_wins })
    }
}

fn step_us(profile: Profile) -> f64 {
    profile.step_ns.unwrap_or_else(|| profile.kernels_ns()) as f64 / 1e3
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}
