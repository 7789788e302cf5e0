//! `sinter tune`: measures a device, and keeps what the cost model is to go by there.

use super::args::{CompileArgs, DeviceArgs, ModelArgs};
use super::{files, say};
use sinter::bench;
use sinter::ir::Micros;
use sinter::runtime::hip::gpu;
use sinter::target::TargetKind;
use sinter::tune::{TuneOptions, TunedStep, Tuning, cpu, path_of, tune};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compile: CompileArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Tokens of the prompt that is timed, of one step at most.
    #[arg(short = 'p', long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    n_prompt: u64,
    /// Steps that are timed of each kind.
    #[arg(short = 'r', long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    repetitions: u64,
    /// Rates alone, in seconds: leave no pass out to see whether it pays, which takes minutes for a model of 1B.
    #[arg(long)]
    rates_only: bool,
    /// Per cent by which a step must be faster without a fusion before that counts as losing.
    #[arg(long, default_value_t = 3.0, value_name = "PER_CENT")]
    margin: f64,
    /// Write the measured target to this file, which --target takes, not to where it is found by itself; - for stdout.
    #[arg(short = 'o', long, value_name = "FILE.json")]
    output: Option<PathBuf>,
}

pub fn run(args: Args) -> super::Outcome {
    if !(0.0..100.0).contains(&args.margin) {
        return Err(format!("--margin must lie between 0 and 100, not {}", args.margin).into());
    }
    let file = Arc::new(args.model.open()?);
    let options = args.compile.untuned_options_on(&args.device)?;
    let device = args.device.options();
    let name = match options.target.kind {
        TargetKind::HipAmd | TargetKind::HipNvidia => gpu(device.gpu)?.name,
        TargetKind::Cpu => cpu(args.device.threads.unwrap_or_else(bench::cores)),
    };
    let how = TuneOptions {
        prompt: args.n_prompt,
        steps: args.repetitions,
        fusions: !args.rates_only,
        margin: args.margin / 100.0,
    };
    let tuning = tune(&file, args.model.path(), &options, &device, &name, &how)?;
    let path = match args.output {
        Some(path) => path,
        None => path_of(&name)
            .ok_or("nothing says where to keep what was measured (SINTER_TUNED, HOME); give -o FILE.json")?,
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| format!("cannot make {}: {e}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&tuning.target)? + "\n";
    files::write_whole(&path, |to| to.write_all(json.as_bytes()))?;
    if path.as_os_str() != "-" {
        std::io::stdout().lock().write_all(text(&tuning, &name, how.margin).as_bytes())?;
        say!("{} has it", path.display());
    }
    if let Some(warning) = far_off(&tuning.steps) {
        say!("{warning}");
    }
    Ok(())
}

/// By how much the fitted rates may miss what was measured, before that is warned of.
const FAR: f64 = 0.3;

/// Of steps that the rates do not explain: something is likely to have run meanwhile.
fn far_off(steps: &[TunedStep]) -> Option<String> {
    let off = |step: &TunedStep| step.predicted_us / step.measured_us - 1.0;
    let far = steps.iter().filter(|step| off(step).abs() > FAR);
    let far: Vec<String> = far
        .map(|step| {
            format!("{} by {:.1}%, ranks {:.2}", step.graph, 100.0 * off(step), step.rank_correlation)
        })
        .collect();
    let most = 100.0 * FAR;
    (!far.is_empty()).then(|| {
        format!(
            "predictions are off by more than {most:.0}% ({}), and all that is compiled here goes by them: was the machine busy? Run tune again \
             when it is quiet",
            far.join("; ")
        )
    })
}

fn text(tuning: &Tuning, name: &str, margin: f64) -> String {
    let target = &tuning.target;
    let mut text = format!(
        "{name}: reads {:.1} GB/s, {:.0} Gflop/s of floats, {} of bytes,{} {} a launch\n\n  {:6} {:>7} {:>12} {:>12} {:>12} {:>8} {:>6}\n",
        target.bandwidth_gbs,
        target.f32_gflops,
        target.dot4_gops.map_or("nothing".into(), |gops| format!("{gops:.0} Gop/s")),
        target.f16_gflops.map_or(String::new(), |gflops| format!(" {gflops:.0} Gflop/s of 16 bits,")),
        Micros(target.launch_us),
        "step",
        "tokens",
        "before",
        "predicted",
        "measured",
        "off by",
        "ranks"
    );
    for step in &tuning.steps {
        text += &format!(
            "  {:6} {:>7} {:>12} {:>12} {:>12} {:>7.1}% {:>6.2}\n",
            step.graph,
            step.tokens,
            Micros(step.before_us),
            Micros(step.predicted_us),
            Micros(step.measured_us),
            100.0 * (step.predicted_us / step.measured_us - 1.0),
            step.rank_correlation
        );
    }
    if let Some(tried) = &tuning.activations {
        text += &format!(
            "\n  prompts of quantised weights with activations in {}: {} before, {}, gains {:.1}%{}\n",
            tried.activations,
            Micros(tried.before_us),
            Micros(tried.us),
            100.0 * (tried.before_us / tried.us - 1.0),
            if tried.taken { "  taken" } else { "" }
        );
    }
    if !tuning.fusions.is_empty() {
        text += &format!("\n  {:16} {:6} {:>12} {:>12} {:>8}\n", "pass", "step", "with", "without", "gains");
    }
    for f in &tuning.fusions {
        text += &format!(
            "  {:16} {:6} {:>12} {:>12} {:>7.1}%{}\n",
            f.pass,
            f.graph,
            Micros(f.with_us),
            Micros(f.without_us),
            100.0 * (f.without_us / f.with_us - 1.0),
            match f.without_us < f.with_us * (1.0 - margin) {
                _ if f.loses => "  loses: not used here",
                true => "  slower with it, but not in every turn: still used",
                false => "",
            }
        );
    }
    if !tuning.shapes.is_empty() {
        text += &format!(
            "\n  {:16} {:>6} {:>6} {:>6} {:>12} {:>12} {:>8}\n",
            "format", "rows", "pairs", "warps", "before", "takes", "gains"
        );
    }
    for s in &tuning.shapes {
        text += &format!(
            "  {:16} {:>6} {:>6} {:>6} {:>12} {:>12} {:>7.1}%{}\n",
            s.format.to_string(),
            s.shape.rows,
            s.shape.pairs,
            s.shape.warps,
            Micros(s.before_us),
            Micros(s.us),
            100.0 * (s.before_us / s.us - 1.0),
            if s.taken { "  taken" } else { "" }
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_that_are_far_off_are_warned_of() {
        let step = |graph: &str, predicted_us| TunedStep {
            graph: graph.into(),
            tokens: 1,
            before_us: 1.0,
            predicted_us,
            measured_us: 100.0,
            rank_correlation: 0.35,
        };
        assert_eq!(far_off(&[step("t1", 129.0), step("t256", 71.0)]), None);
        let warning = far_off(&[step("t1", 100.0), step("t256", 33.3)]).unwrap();
        assert!(warning.contains("more than 30% (t256 by -66.7%, ranks 0.35)"), "{warning}");
    }
}
