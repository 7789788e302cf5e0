//! The kernels of GPUs. Without a GPU: what codegen emits compiles for every target, where clang is there. With one: what it
//! computes is what the interpreter says; where there is none, those tests say so and pass.

#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use sinter::check::{Caches, check_step};
use sinter::codegen::spec::{Code, HipCode};
use sinter::compile::{Options, Purpose, compile};
use sinter::gguf::{Gguf, GgufFile};
use sinter::ir::DType;
use sinter::lower::Config;
use sinter::runtime::DeviceOptions;
use sinter::runtime::hip::{HEADERS, gpu};
use sinter::target::Target;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use synthetic::{Model, Shape, shape, uniform};

/// Says that a test skips, and why; tests that pass keep what they print to themselves, but not this.
fn say(why: &str) {
    _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// AMD's architectures that are targets.
const AMD: [&str; 8] = ["gfx900", "gfx906", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201"];

/// The sources of all kernels of a model, once each.
fn sources(gguf: &Gguf, options: &Options) -> Vec<HipCode> {
    let mut sources: Vec<HipCode> = vec![];
    for compiled in compile(gguf, options, Purpose::Generate).unwrap() {
        for launch in compiled.program.kernels.iter().flat_map(|kernel| &kernel.launches) {
            let Code::Hip(code) = &launch.code else { panic!("a kernel of another device") };
            if !sources.contains(code) {
                sources.push(code.clone());
            }
        }
    }
    sources
}

/// All sources as one file, in which every kernel has a name of its own.
fn together(sources: &[HipCode]) -> String {
    let renamed = sources.iter().enumerate().map(|(i, code)| {
        let kernel = format!("KERNEL({},", code.entry);
        assert!(code.source.contains(&kernel), "{}", code.source);
        let own = code.source.replace(&kernel, &format!("KERNEL({}_{i},", code.entry));
        own.replace("TURNS", &format!("TURNS_{i}"))
    });
    renamed.collect()
}

/// Compiles a file for an architecture of AMD's, without ROCm.
fn clang(dir: &Path, file: &str, arch: &str) -> Result<(), String> {
    let out = Command::new("clang-19")
        .args([
            "-x",
            "hip",
            "--offload-device-only",
            "--no-gpu-bundle-output",
            "-nogpuinc",
            "-nogpulib",
            "-O3",
        ])
        .args(["-fdeclspec", "-std=c++17", "-Werror", "-Wall", "-Wno-unused-function", "-Wno-pass-failed"])
        .arg(format!("--offload-arch={arch}"))
        .args([file, "-o"])
        .arg(format!("{arch}.co"))
        .current_dir(dir)
        .output()
        .map_err(|e| e.to_string())?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
}

/// Compiles the kernels of the default model, all of them or those of one and two tokens and of prompts, for some architectures.
fn compiles(archs: &[&str], all: bool) {
    if Command::new("clang-19").arg("--version").output().is_err() {
        say("there is no clang-19 here");
        return;
    }
    let file = sinter::model::embedded().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in HEADERS {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    for arch in archs {
        let mut options = Options::new(Target::named(arch).unwrap());
        if !all {
            options = Options { chunk: 2, ..options };
        }
        let kinds = if all { vec![options.clone(), options.exact()] } else { vec![options] };
        let mut sources: Vec<HipCode> =
            kinds.iter().flat_map(|options| sources(file.gguf(), options)).collect();
        // Of prompts those in tiles alone: matvecs of eight tokens take a compiler minutes.
        let of_prompts = |code: &HipCode| {
            ["matmul.h", "prefill_attention.h"]
                .iter()
                .any(|header| code.source.contains(&format!("\"{header}\"")))
        };
        if !all {
            let options = Options { chunk: 16, ..Options::new(Target::named(arch).unwrap()) };
            sources.extend(self::sources(file.gguf(), &options).into_iter().filter(of_prompts));
            assert!(sources.iter().filter(|code| of_prompts(code)).count() > 4);
        }
        assert!(sources.len() > 15);
        let name = format!("{arch}.hip");
        std::fs::write(dir.path().join(&name), together(&sources)).unwrap();
        clang(dir.path(), &name, arch).unwrap_or_else(|e| panic!("{arch}: {e}"));
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn kernels_compile_for_waves_of_32_and_of_64() {
    compiles(&["gfx1100", "gfx942"], false);
}

#[test]
#[ignore = "takes a quarter of an hour"]
fn all_kernels_compile_for_all_of_amds_targets() {
    compiles(&AMD, true);
}

/// One GPU's target and options, if there is a GPU here.
fn here() -> Option<(Target, DeviceOptions)> {
    match gpu(0) {
        Ok(gpu) => Some((Target::gpu(&gpu.arch).unwrap(), DeviceOptions::default())),
        Err(e) => {
            say(&e.to_string());
            None
        }
    }
}

/// Each kernel of a model's steps on the GPU, against its body.
fn check(file: &Arc<GgufFile>, options: &Options, device: &DeviceOptions, what: &str) {
    let config = Config::from_gguf(file.gguf()).unwrap();
    let vocab = file.gguf().tensor("token_embd.weight").unwrap().shape[0] as i32;
    let tokens: Vec<i32> = (0..13).map(|i| (i * 37 + 5) % vocab).collect();
    let mut caches = Caches::new();
    let mut cached = 0;
    let options = Options { context: Some(64), chunk: 13, ..options.clone() };
    let steps = Purpose::Score.steps(&config, &options);
    for (step, tokens) in
        [(&steps[steps.len() - 1], &tokens[..]), (&steps[0], &tokens[..1]), (&steps[0], &tokens[1..2])]
    {
        let outcome = check_step(file, &options, device, step, tokens, cached, &mut caches).unwrap();
        cached += tokens.len() as u64;
        for node in &outcome.nodes {
            assert!(node.passes(), "{what}: {} of {}: {}", node.kernel, node.at, node.error);
        }
    }
}

#[test]
fn kernels_on_a_gpu_compute_what_their_bodies_say() {
    let Some((target, device)) = here() else { return };
    let shape = Shape {
        layers: 1,
        width: 256,
        ffn: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        rotated: 64,
        ..shape("tiny-llama")
    };
    let files = DType::WEIGHTS
        .into_iter()
        .map(|dtype| (dtype.name().to_string(), Model::new(&shape, uniform(dtype)).file()));
    for (name, file) in files.chain([("default".to_string(), Arc::new(sinter::model::embedded().unwrap()))]) {
        let options = Options::new(target.clone());
        check(&file, &options, &device, &name);
        check(&file, &options.clone().exact(), &device, &format!("{name} exact"));
        if name == "default" {
            let pipeline = options.pipeline.clone().without_fusions();
            check(&file, &Options { pipeline, ..options.exact() }, &device, "unfused");
        }
    }
}
