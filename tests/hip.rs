//! The kernels of GPUs. Without a GPU: a plan has them compiled, where clang is there. With one: what they compute is what the interpreter
//! says; where there is none, those tests say so and pass.

#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use sinter::check::{Caches, check_step};
use sinter::compile::{Options, Purpose};
use sinter::gguf::GgufFile;
use sinter::ir::DType;
use sinter::lower::Config;
use sinter::plan::LoadedPlan;
use sinter::runtime::DeviceOptions;
use sinter::runtime::hip::gpu;
use sinter::target::Target;
use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use synthetic::{Model, Shape, shape, uniform};

/// Says that a test skips, and why; tests that pass keep what they print to themselves, but not this.
fn say(why: &str) {
    _ = writeln!(std::io::stderr(), "skipped: {why}");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn a_plan_for_two_gpus_is_compiled_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let compile = |name: &str| {
        let plan = dir.path().join(name);
        let output = Command::new(env!("CARGO_BIN_EXE_sinter"))
            .args(["compile", "--target", "gfx1100,gfx942", "--chunk", "1", "-c", "64", "-o"])
            .arg(&plan)
            .env("SINTER_KERNEL_CACHE", dir.path().join("cache"))
            .output()
            .unwrap();
        (String::from_utf8_lossy(&output.stderr).into_owned(), std::fs::read(plan).ok())
    };
    let (said, Some(bytes)) = compile("a.plan") else {
        let (said, _) = compile("a.plan");
        assert!(said.contains("nothing here compiles kernels for gfx1100"), "{said}");
        return say(&said);
    };
    assert_eq!(said.matches(" kernels compiled, ").count(), 2, "{said}");
    let plans = LoadedPlan::all_from_bytes(&bytes).unwrap();
    // What the ELF header says of the processor (EF_AMDGPU_MACH).
    for (plan, (arch, mach)) in plans.iter().zip([("gfx1100", 0x41), ("gfx942", 0x4c)]) {
        assert_eq!(plan.target.arch, arch);
        assert!(plan.sources().len() > 10);
        assert_eq!(plan.objects_by_source().len(), plan.sources().len());
        for object in &plan.objects {
            assert_eq!((&object.code[..4], object.code[18], object.code[48]), (&b"\x7fELF"[..], 224, mach));
        }
    }
    // From the cache it is the same.
    assert!(compile("b.plan").1 == Some(bytes));
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
