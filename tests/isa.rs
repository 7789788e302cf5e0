//! What the kernels become on AMD's GPUs. What the host writes before each step must not be read through the scalar cache: copies do not
//! invalidate that, so a graph that is replayed would see the step before. Needs clang-19.

#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use sinter::codegen::spec::{Code, HipCode};
use sinter::compile::{Options, Purpose, compile};
use sinter::ir::DType;
use sinter::runtime::hip::HEADERS;
use sinter::target::Target;
use std::io::Write;
use std::process::Command;
use synthetic::{Model, shape, uniform};

/// The assembly of a kernel; none if there is no clang for it.
fn assembly(code: &HipCode, arch: &str) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in HEADERS {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    std::fs::write(dir.path().join("kernel.hip"), &code.source).unwrap();
    let out = Command::new("clang-19")
        .args(["-x", "hip", "--offload-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib"])
        .args(["-O3", "-fdeclspec", "-std=c++17", "-S", "kernel.hip", "-o", "-"])
        .arg(format!("--offload-arch={arch}"))
        .current_dir(dir.path())
        .output()
        .ok()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(String::from_utf8(out.stdout).unwrap())
}

/// Scalar loads of what arguments point to, but for the arguments themselves, and loads that go past the caches of a compute unit.
fn loads(assembly: &str, arch: &str) -> (Vec<String>, usize) {
    let lines = assembly.lines().map(str::trim);
    let mut scalar =
        lines.clone().filter(|line| line.starts_with("s_load") || line.starts_with("s_buffer_load"));
    // Arguments lie where the first load is from: as in `s_load_b64 s[4:5], s[0:1], 0x8`.
    let base = |line: &str| line.split(", ").nth(1).unwrap_or_default().to_string();
    let first = scalar.clone().next().map(base).unwrap_or_default();
    let others = scalar.by_ref().filter(|line| base(line) != first).map(String::from).collect();
    let bypass = if arch.starts_with("gfx9") { " sc1" } else { " glc" };
    let past = lines.filter(|line| line.contains("load_") && line.ends_with(bypass)).count();
    (others, past)
}

#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn step_data_is_never_a_scalar_load() {
    if Command::new("clang-19").arg("--version").output().is_err() {
        _ = writeln!(std::io::stderr(), "skipped: there is no clang-19 here");
        return;
    }
    let model = Model::new(&shape("tiny-llama"), uniform(DType::Q4_0)).description();
    for arch in ["gfx1100", "gfx942"] {
        let options = Options { chunk: 1, ..Options::new(Target::gpu(arch).unwrap()) };
        let apart = options.pipeline.clone().select(&["-rope_attention"]).unwrap();
        let apart = Options { pipeline: apart, ..options.clone() };
        let compiled = [options, apart].map(|options| compile(&model, &options, Purpose::Generate).unwrap());
        let mut seen: Vec<&str> = vec![];
        let kernels = compiled.iter().flatten().flat_map(|c| &c.program.kernels);
        for code in kernels.flat_map(|kernel| &kernel.launches) {
            let Code::Hip(code) = &code.code else { panic!("a kernel of another device") };
            // Where tokens are read, positions and rows, and lengths and tables; each as often as here at least.
            let least = match code.entry.as_str() {
                "dequant_rmsnorm" => 1,
                "rope_kv" => 2,
                "attention" => 4,
                "rope_attention" => 6,
                "attention_2" | "rope_attention_2" => 3,
                _ => continue,
            };
            if seen.contains(&code.entry.as_str()) {
                continue;
            }
            seen.push(&code.entry);
            let (others, past) = loads(&assembly(code, arch).unwrap(), arch);
            assert_eq!(others, [""; 0], "{arch}: {}", code.entry);
            assert!(past >= least, "{arch}: {} goes past the cache {past} times", code.entry);
        }
        assert_eq!(seen.len(), 6, "{seen:?}");
    }
}
