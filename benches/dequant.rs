//! Dequantising weights of each format on one core: `cargo bench --bench dequant [-- q4_k]`.
//!
//! Throughput is in elements, and in bytes of the weights as they lie. They fit a cache, so it is decoding that is measured. Of f32 there is
//! nothing to decode.

mod common;

use common::{Case, K, arg, group, kernel, measure};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sinter::codegen::spec::{Access, Computation};
use sinter::ir::{DType, Dim, Op, Syms};

const ROWS: u64 = 16;

fn dequants(c: &mut Criterion) {
    let mut group = group(c, "dequant");
    for format in DType::WEIGHTS.into_iter().filter(|format| *format != DType::F32) {
        let shape = [Dim::n(ROWS), Dim::n(K)];
        let args = vec![arg(Access::Read, format, &shape), arg(Access::Write, DType::F32, &shape)];
        let bytes = args[0].ty.bytes(&Syms { t: 1, r: 1 });
        let kernel = kernel(Computation::Op(Op::Dequant), args);
        let throughput = Throughput::ElementsAndBytes { elements: ROWS * K, bytes };
        measure(&mut group, format.name(), &Case::rows(&kernel, 1), throughput);
    }
}

criterion_group!(benches, dequants);
criterion_main!(benches);
