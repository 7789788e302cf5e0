//! What must stay fast, with bounds: `cargo bench --bench bounds`. Exits with 1 if one is exceeded. Not part of the tests, as
//! whatever else the machine does is measured too; a bound that is exceeded once is worth a second run, and twice a look.

mod common;

use common::synthetic;
use sinter::codegen::spec::{Implementation, KernelSpec, Layout};
use sinter::compile::{self, Options, Purpose};
use sinter::ir::arbitrary::random_bytes;
use sinter::ir::{DType, Syms};
use sinter::lower::{self, Config};
use sinter::runtime::cpu::{Features, RawArg, bind};
use sinter::target::Target;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The shortest of so many runs, as others share the machine.
fn shortest(runs: usize, mut work: impl FnMut()) -> Duration {
    let once = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    (0..runs).map(|_| once(&mut work)).min().unwrap_or_default()
}

/// Prints what was found, and tells whether it keeps its bound.
fn keeps(what: &str, found: f64, most: f64, unit: &str) -> bool {
    let keeps = found <= most;
    println!("{what:48} {found:8.2} {unit} of {most}{}", if keeps { "" } else { "  EXCEEDED" });
    keeps
}

/// Compiling depends on the number of launches alone, so models of any size start at once.
fn compilation() -> bool {
    let options = Options::new(Target::cpu());
    let mut all = true;
    for (name, ms) in [("llama-3.1-8b", 50.0), ("qwen2.5-7b", 50.0), ("llama-3.3-70b", 200.0)] {
        let gguf = synthetic::description(name);
        let config = Config::from_gguf(&gguf).expect("a known model");
        for step in Purpose::Generate.steps(&config, &options) {
            let graph = lower::lower(&gguf, &config, &step).expect("a known model");
            let passes = shortest(5, || {
                let mut graph = graph.clone();
                black_box(options.pipeline.run(&mut graph, &options.target)).expect("sound rules");
            });
            all &=
                keeps(&format!("{name} {}: all passes", step.name()), passes.as_secs_f64() * 1e3, ms, "ms");
        }
        let compiled = shortest(5, || {
            black_box(compile::compile(&gguf, &options, Purpose::Generate)).expect("a known model");
        });
        all &= keeps(&format!("{name}: all programs"), compiled.as_secs_f64() * 1e3, 1000.0, "ms");
    }
    all
}

/// A lone token times a matrix of some rows, none of which need memory: what decoding a format takes.
fn matvec(format: DType, layout: Layout) -> Implementation {
    let (computes, args) = common::matmul(DType::Q8Act, format, 32);
    common::emit(KernelSpec { kernel: None, computes, args }, vec![(1, layout)], 1)
}

/// Formats take up to 2.5 times as long as Q8_0; one that the compiler does not turn into vectors, ten times.
fn formats() -> bool {
    let at = Syms { t: 1, r: 1 };
    let mut all = true;
    for features in Features::available() {
        let time = |format: DType, layout| {
            let kernel = matvec(format, layout);
            let launches = bind(&kernel, &features).expect("the kernel is right");
            let mut memory: Vec<Vec<u8>> = kernel.args().map(|arg| random_bytes(&arg.ty, &at, 1)).collect();
            let args: Vec<RawArg> =
                memory.iter_mut().map(|m| RawArg { ptr: m.as_mut_ptr(), len: m.len() }).collect();
            // SAFETY: each argument has memory of its own, as large as its type says.
            let run = || unsafe { launches[0].run(&args, &at, &mut std::iter::once(0..1)) };
            shortest(500, run).as_secs_f64()
        };
        let q8_0 = time(DType::Q8_0, Layout::RowMajor);
        for format in DType::WEIGHTS.into_iter().filter(|format| format.is_quantised()) {
            all &= keeps(
                &format!("{} {format}, against q8_0", features.name()),
                time(format, Layout::RowMajor) / q8_0,
                4.0,
                "times",
            );
        }
        // What repacking is for.
        for format in [DType::Q4_K, DType::Q6_K] {
            let ratio = time(format, Layout::Interleaved16) / time(format, Layout::RowMajor);
            all &= keeps(
                &format!("{} {format} interleaved, against row by row", features.name()),
                ratio,
                1.0,
                "times",
            );
        }
    }
    all
}

fn main() -> ExitCode {
    // Every part, whatever the others find.
    let all = [compilation(), formats()];
    if all.contains(&false) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
