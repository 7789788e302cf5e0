//! What compiling takes: `cargo bench --bench passes [-- llama-3.1-8b]`. Elements are nodes of the graph before the passes. How
//! long it may take is in `bounds`.

mod common;

use common::{group, synthetic};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sinter::compile::{self, Options, Purpose};
use sinter::ir::verify;
use sinter::lower::{self, Config};
use sinter::target::Target;

fn passes(c: &mut Criterion) {
    let options = Options::new(Target::cpu());
    for name in ["llama-3.2-1b", "llama-3.1-8b", "llama-3.3-70b"] {
        let gguf = synthetic::description(name);
        let config = Config::from_gguf(&gguf).expect("a known model");
        let steps = Purpose::Generate.steps(&config, &options);
        let lower = |step| lower::lower(&gguf, &config, step).expect("a known model");
        for step in [&steps[0], &steps[steps.len() - 1]] {
            let graph = lower(step);
            let mut group = group(c, "step");
            group.throughput(Throughput::Elements(graph.ids().len() as u64));
            let id = |what| BenchmarkId::new(what, format!("{name} {}", step.name()));
            group.bench_function(id("lower"), |b| b.iter(|| lower(step)));
            group.bench_function(id("passes"), |b| {
                let run = |graph: &mut _| options.pipeline.run(graph, &options.target).expect("sound rules");
                b.iter_batched_ref(|| graph.clone(), run, BatchSize::LargeInput);
            });
            group.bench_function(id("verify"), |b| {
                b.iter_batched(
                    || graph.clone(),
                    |g| verify(g).expect("a sound graph"),
                    BatchSize::LargeInput,
                );
            });
        }
        // All programs, with the kernels.
        group(c, "compile").bench_function(name, |b| {
            b.iter(|| compile::compile(&gguf, &options, Purpose::Generate).expect("a known model"));
        });
    }
}

criterion_group!(benches, passes);
criterion_main!(benches);
