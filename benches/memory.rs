//! What memory bounds, and how it is planned: `cargo bench --bench memory`.

mod common;

use common::{Case, K, arg, group, kernel, measure, synthetic};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sinter::bench::{cores, read_bandwidth};
use sinter::codegen::spec::{Access, Computation, Implementation, NormSource, NormSpec};
use sinter::compile::{self, Options, Purpose};
use sinter::gguf::{Digest, Identity};
use sinter::ir::{DType, Dim};
use sinter::lower::Config;
use sinter::plan::{self, LoadedPlan, Parts, Plan};
use sinter::target::Target;
use std::time::Duration;

/// Reading memory, with one thread and with all: the best of five passes, as `sinter bench` has it.
fn reading(c: &mut Criterion) {
    const BYTES: usize = 256 << 20;
    let mut group = group(c, "read");
    group.throughput(Throughput::Bytes(BYTES as u64));
    let all = cores();
    for threads in if all > 1 { vec![1, all] } else { vec![1] } {
        group.bench_function(BenchmarkId::new("threads", threads), |b| {
            b.iter_custom(|iterations| {
                let speeds =
                    (0..iterations).map(|_| read_bandwidth(BYTES, threads).expect("256 MiB of memory"));
                speeds.map(|speed| Duration::from_secs_f64(BYTES as f64 / speed)).sum()
            });
        });
    }
}

/// The sum of two rows, its norm, and that quantised.
fn norm() -> Implementation {
    let m = NormSpec {
        source: NormSource::Sum { a: 0, b: 1 },
        n: K,
        weight: 2,
        eps: 1e-5,
        rows_out: Some(3),
        norm_out: None,
        quant_out: Some(4),
    };
    let rows = |access, dtype| arg(access, dtype, &[Dim::T, Dim::n(K)]);
    let args = vec![
        rows(Access::Read, DType::F32),
        rows(Access::Read, DType::F32),
        arg(Access::Read, DType::F32, &[Dim::n(K)]),
        rows(Access::Write, DType::F32),
        rows(Access::Write, DType::Q8Act),
    ];
    kernel(Computation::Norm(m), args)
}

/// Rows that are read and written once.
fn norms(c: &mut Criterion) {
    let mut group = group(c, "norm");
    let kernel = norm();
    for t in [1, 32] {
        measure(&mut group, &format!("T={t}"), &Case::rows(&kernel, t), Throughput::Bytes(t * K * 8));
    }
}

/// What the planner gets of a model.
fn parts(name: &str) -> Parts {
    let options = Options::new(Target::cpu());
    let gguf = synthetic::description(name);
    let config = Config::from_gguf(&gguf).expect("a known model");
    let compiled = compile::compile(&gguf, &options, Purpose::Generate).expect("a known model");
    Parts {
        model: plan::Model {
            source: None,
            identity: Identity { len: 0, header: Digest([0; 32]), samples: Digest([0; 32]) },
            full_hash: None,
            architecture: config.architecture.name().into(),
            name: name.into(),
        },
        target: options.target.clone(),
        options: plan::Options {
            exact: options.is_exact(),
            kv: options.kv,
            context: options.context_of(&config),
            sequences: options.sequences,
            chunk: options.chunk_of(&config),
            greedy: options.greedy,
        },
        programs: compiled.into_iter().map(|c| (c.program, c.report)).collect(),
    }
}

/// Ordering calls and placing buffers, of all programs of a model; and reading the plan's bytes, which checks it all again.
/// Elements are calls.
fn planning(c: &mut Criterion) {
    for name in ["llama-3.2-1b", "llama-3.1-8b", "llama-3.3-70b"] {
        let parts = parts(name);
        let calls = parts.programs.iter().map(|(program, _)| program.calls.len() as u64).sum();
        let mut group = group(c, "plan");
        group.throughput(Throughput::Elements(calls));
        group.bench_function(BenchmarkId::new("build", name), |b| {
            let build = |parts| Plan::build(parts).expect("programs that go together");
            b.iter_batched(|| parts.clone(), build, BatchSize::LargeInput);
        });
        let bytes = Plan::build(parts.clone()).and_then(|plan| plan.to_bytes()).expect("a plan");
        group.bench_function(BenchmarkId::new("load", name), |b| {
            b.iter(|| LoadedPlan::from_bytes(&bytes).expect("a plan"));
        });
    }
}

criterion_group!(benches, reading, norms, planning);
criterion_main!(benches);
