//! Each family of models at its real size: what fuses and why, how fast that is decided, and what running one takes.

mod common;
mod support;

use common::line;
use sinter::codegen::spec::Code;
use sinter::compile::{self, Options, Purpose};
use sinter::ir::{DType, Dim, Outcome, StepInput};
use sinter::lower::Config;
use sinter::passes::Report;
use sinter::plan::LoadedPlan;
use sinter::target::Target;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::synthetic::{Model, REAL, Shape, TINY, description, shape, uniform};
use support::{Reader, executor, plan_of_description};

/// The text with the numbers of layers left out.
fn any_layer(text: &str) -> String {
    let mut parts = text.split("blk.");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        out += "blk.*";
        out += part.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out
}

/// The decisions of every step on the frozen target, equal ones of all layers counted, and the launches that are left.
fn decisions(name: &str) -> String {
    let gguf = description(name);
    let config = Config::from_gguf(&gguf).unwrap();
    let mut options = Options::new(Target::test_wave32());
    options.pipeline.verify_each = true;
    let mut text = String::new();
    for step in Purpose::Generate.steps(&config, &options) {
        let (_, report) = compile::fuse(&gguf, &options, &step).unwrap();
        let mut lines = indexmap::IndexMap::<String, u64>::new();
        for decision in &report.decisions {
            *lines.entry(any_layer(&line(decision))).or_default() += 1;
        }
        let (before, after) = (report.before.count(), report.after.count());
        adds_up(&report);
        writeln!(text, "{}: {before} launches -> {after}", step.name()).unwrap();
        for (kernel, n) in &report.after.launches {
            writeln!(text, "  {n} {kernel}").unwrap();
        }
        for (line, n) in lines {
            writeln!(text, "  {n} x {line}").unwrap();
        }
    }
    text
}

/// What the decisions say they saved is what the graph has lost.
fn adds_up(report: &Report) {
    let gains = report.decisions.iter().filter_map(|d| match &d.outcome {
        Outcome::Fired { gain, .. } => Some(gain),
        Outcome::Rewritten { .. } | Outcome::Rejected { .. } => None,
    });
    let (before, after) = (&report.before, &report.after);
    let (mut launches, mut bytes, mut us) = (before.count() as i64, before.bytes as i64, before.us);
    for gain in gains {
        launches -= gain.launches_saved;
        bytes -= gain.bytes_saved;
        us -= gain.unfused_us - gain.fused_us;
    }
    assert_eq!((launches, bytes), (after.count() as i64, after.bytes as i64));
    assert!((us - after.us).abs() < 1e-6 * before.us, "{us} left, not {}", after.us);
}

fn golden(family: &str, name: &str) {
    let text = format!("{name}\n{}", decisions(name));
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(format!("decisions_{family}"), text);
    });
}

#[test]
#[cfg_attr(debug_assertions, ignore = "decisions are the same as in an optimised build")]
fn decisions_llama() {
    golden("llama", "llama-3.2-1b");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "decisions are the same as in an optimised build")]
fn decisions_qwen2() {
    golden("qwen2", "qwen2.5-0.5b");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "decisions are the same as in an optimised build")]
fn decisions_qwen3() {
    golden("qwen3", "qwen3-0.6b");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "decisions are the same as in an optimised build")]
fn decisions_phi3() {
    golden("phi3", "phi-3-mini-4k");
}

/// How fast is what `cargo bench --bench bounds` looks at.
#[test]
fn real_sizes_compile() {
    let mut options = Options::new(Target::cpu());
    // To verify all of a graph after each rewrite of 80 layers takes a minute, and the end is verified anyhow.
    options.pipeline.verify_each = false;
    for name in ["llama-3.1-8b", "llama-3.3-70b", "qwen2.5-7b"] {
        let gguf = description(name);
        let plan = plan_of_description(&gguf, &options, Purpose::Generate);
        let names: Vec<&str> = plan.programs.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["t1", "t8", "t512"]);
        assert_eq!(plan.weights.len(), gguf.tensors.len(), "{name}: every tensor has a use");
        let loaded = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
        assert!(*loaded == plan, "{name}");
    }
}

/// Sizes are of the step's rows alone: whatever a launch is given, of how full a cache is it is not told but in memory.
#[test]
fn nothing_that_a_launch_is_given_depends_on_how_full_a_cache_is() {
    let one_of = |dim: &Dim, symbols: &[Dim]| dim.as_const().is_some() || symbols.contains(dim);
    let mut plans = 0;
    let shapes = TINY.into_iter().chain(REAL.map(|real| Shape { layers: 2, ..real }));
    for shape in shapes {
        let gguf = Model::new(&shape, uniform(DType::F16)).description();
        for exact in [false, true] {
            let options = Options { sequences: 3, context: Some(200), ..Options::new(Target::cpu()) };
            let options = if exact { options.exact() } else { options };
            let unfused = Options { pipeline: options.pipeline.clone().without_fusions(), ..options.clone() };
            for options in [options, unfused] {
                for purpose in [Purpose::Generate, Purpose::Score, Purpose::Bench] {
                    let plan = plan_of_description(&gguf, &options, purpose);
                    let symbols = [Dim::T, Dim::R];
                    for kernel in &plan.kernels {
                        let mut extents = kernel.launches.iter().flat_map(|launch| &launch.grid);
                        assert!(extents.all(|extent| one_of(&extent.dim, &symbols)), "{kernel}");
                        let shapes = kernel.args().flat_map(|arg| &arg.ty.shape);
                        assert!(shapes.into_iter().all(|dim| one_of(dim, &symbols)), "{kernel}");
                    }
                    let states = plan.states.iter().flat_map(|state| &state.ty.shape);
                    assert!(states.into_iter().all(|dim| one_of(dim, &[])), "{}", shape.name);
                    let inputs: BTreeSet<&str> =
                        plan.programs.iter().flat_map(|p| &p.inputs).map(|i| i.name.as_str()).collect();
                    assert_eq!(inputs, StepInput::ALL.map(StepInput::name).into(), "{}", shape.name);
                    plans += 1;
                }
            }
        }
    }
    assert_eq!(plans, 13 * 2 * 2 * 3);

    // Nor does what is launched.
    for shape in TINY {
        let file = Model::new(&shape, uniform(DType::F16)).file();
        let options = Options { context: Some(200), ..Options::new(Target::cpu()) };
        for options in [options.clone(), Options { pipeline: options.pipeline.without_fusions(), ..options }]
        {
            let mut reader = Reader::new(executor(&file, &options, Purpose::Generate));
            let mut before = reader.sequences.executor().launch_counts();
            let mut counts = vec![];
            for depth in 0..140usize {
                reader.last(&[depth as u32 % 61]);
                let after = reader.sequences.executor().launch_counts();
                let made = after.iter().map(|(kernel, n)| (*kernel, n - before.get(kernel).unwrap_or(&0)));
                counts.push(made.collect::<BTreeSet<_>>());
                before = after;
            }
            assert!(counts.iter().all(|made| *made == counts[0]), "{}", shape.name);
        }
    }
}

/// The source of a GPU's kernel says of which body it is, but nothing of which layer or program: as many sources are compiled as there
/// would be without that.
#[test]
fn kernels_say_what_they_compute_and_are_shared() {
    let (mut all, mut of_8b) = (BTreeSet::new(), 0);
    for shape in REAL.into_iter().filter(|shape| !shape.name.contains("70b")) {
        let gguf = description(shape.name);
        for arch in ["sm_90", "gfx1100"] {
            let options = Options::new(Target::named(arch).unwrap());
            let mut sources = BTreeSet::new();
            for compiled in compile::compile(&gguf, &options, Purpose::Generate).unwrap() {
                for kernel in &compiled.program.kernels {
                    for launch in &kernel.launches {
                        let Code::Hip(code) = &launch.code else { panic!("a kernel of another device") };
                        let body = code.source.lines().filter(|line| line.starts_with("//   "));
                        let says = body.clone().any(|line| line.starts_with("//   return %"));
                        assert_eq!(says, kernel.spec.kernel.is_some(), "{}", code.source);
                        assert!(
                            body.clone().count() != 1 && !code.source.contains("blk."),
                            "{}",
                            code.source
                        );
                        sources.insert(code.source.clone());
                    }
                }
            }
            let without = |source: &String| {
                let lines = source.lines().filter(|line| !line.starts_with("//   "));
                lines.collect::<Vec<_>>().join("\n")
            };
            let bare: BTreeSet<String> = sources.iter().map(without).collect();
            assert_eq!(sources.len(), bare.len(), "{} on {arch}", shape.name);
            if shape.name == "llama-3.1-8b" {
                of_8b = of_8b.max(sources.len());
            }
            all.extend(sources);
        }
    }
    println!("{} sources, {of_8b} of an 8B at most", all.len());
    // Of few tokens those of the first layers are others than those of all that come after.
    assert!((40..150).contains(&of_8b), "{of_8b}");
}

/// The most memory that a process had, in bytes, while it ran to its end.
#[cfg(target_os = "linux")]
fn peak_memory(command: &mut Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let path = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        // A process that has ended has no memory, so the line is missing.
        let status = std::fs::read_to_string(&path).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = line.map_or(peak, |kib| kib.trim().parse::<u64>().unwrap() << 10);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return peak;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn weights_are_there_once_and_never_expanded() {
    // Large enough for a copy of a third of the weights to exceed what is allowed. Half of them stay where they are mapped, half
    // are repacked, after which their pages of the file are not wanted any more.
    let shape = Shape { layers: 32, width: 1024, ffn: 4096, vocab: 32000, ..shape("tiny-llama3") };
    let repacked = |name: &str| name.contains("ffn_gate") || name.contains("ffn_down");
    let format = |name: &str| uniform(if repacked(name) { DType::Q4_K } else { DType::Q4_0 })(name);
    let model = Model::new(&shape, format).file();
    let large = |info: &&sinter::gguf::TensorInfo| repacked(&info.name);
    let bytes: u64 = model.gguf().tensors.values().filter(large).map(|info| info.bytes).sum();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, model.bytes()).unwrap();
    let file = model.bytes().len() as u64;

    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sinter"));
        peak_memory(command.arg("bench").arg(&path).arg("--no-bandwidth").args(arguments))
    };
    let cache = Config::from_gguf(model.gguf()).unwrap().cache_bytes(64, 2);
    let most = file * 11 / 10 + cache + (64 << 20);
    assert!(file + bytes > most && file + (file - bytes) > most, "{bytes} of {file}");
    // Every weight is read by either step; more of them take no more memory.
    let found = run(&["-p", "16", "-n", "4", "-r", "1", "--no-warmup"]);
    println!("{found} bytes at most for a file of {file}, of {most} allowed");
    assert!(found > file / 2, "the peak was missed: {found}");
    assert!(found <= most, "{found} bytes, but {most} are allowed");
    // What shows that copies would be seen: without fusions, one float matrix exists at a time.
    let unfused = run(&["-p", "2", "-n", "1", "-r", "1", "--no-warmup", "--no-fuse"]);
    assert!(unfused > most, "{unfused}");
}

#[cfg(target_os = "linux")]
#[test]
fn checking_takes_twice_the_memory_of_running_at_most() {
    let shape = Shape { layers: 6, width: 1024, ffn: 4096, vocab: 32000, ..shape("tiny-llama3") };
    let model = Model::new(&shape, uniform(DType::Q8_0));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, model.bytes()).unwrap();
    let peak = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sinter"));
        peak_memory(command.arg(arguments[0]).arg(&path).args(&arguments[1..]))
    };
    let run = peak(&["bench", "-p", "2", "-n", "1", "-r", "1", "--no-warmup", "--no-bandwidth"]);
    let check = peak(&["check", "--tokens", "1,2,3"]);
    println!("{check} bytes to check what runs in {run}");
    assert!(run > 100 << 20 && check <= 2 * run, "{check} bytes to check what runs in {run}");
}
