//! Whole steps of the embedded model with all cores: `cargo bench --bench inference`.
//!
//! An iteration is a repetition of `sinter bench`, of which the steps alone are timed; elements are tokens.

mod common;

use common::group;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sinter::bench::{Bench, tests};
use sinter::compile::{Options, Purpose};
use sinter::model;
use sinter::runtime::DeviceOptions;
use sinter::target::Target;
use std::sync::Arc;
use std::time::Duration;

fn inference(c: &mut Criterion) {
    let file = Arc::new(model::embedded().expect("the model is part of the program"));
    let all = [tests(&[16, 512], &[32], &[0, 256], &[1]), tests(&[], &[32], &[0], &[8])].concat();
    for exact in [false, true] {
        let options = Options { context: Some(1024), sequences: 8, ..Options::new(Target::cpu()) };
        let options = if exact { options.exact() } else { options };
        let executor = model::executor(&file, None, &options, Purpose::Bench, &DeviceOptions::default());
        let mut bench = Bench::new(executor.expect("a CPU")).expect("kernels that agree");
        let mut group = group(c, if exact { "exact" } else { "quantised" });
        for test in &all {
            group.throughput(Throughput::Elements(test.tokens()));
            group.bench_function(test.to_string(), |b| {
                b.iter_custom(|repetitions| {
                    let measured = bench.measure(test, repetitions, false).expect("room for the test");
                    Duration::from_nanos(measured.samples_ns().iter().sum())
                });
            });
        }
    }
}

criterion_group!(benches, inference);
criterion_main!(benches);
