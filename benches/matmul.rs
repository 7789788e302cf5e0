//! Matmuls by weights of each format on one core, of one token and of 32: `cargo bench --bench matmul [-- q4_k]`.
//!
//! Throughput is in multiplications and additions, and in bytes of weights, to be held against the bandwidth of a core.

mod common;

use common::{Case, K, group, kernel, matmul, measure};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sinter::ir::DType;

fn matmuls(c: &mut Criterion) {
    let mut group = group(c, "matmul");
    for t in [1, 32] {
        for x in [DType::Q8Act, DType::F32] {
            for format in DType::WEIGHTS.into_iter().filter(|w| x == DType::F32 || w.is_quantised()) {
                let (computes, args) = matmul(x, format, K);
                let bytes = args[1].ty.bytes(&sinter::ir::Syms { t, r: t });
                let kernel = kernel(computes, args);
                let throughput = Throughput::ElementsAndBytes { elements: 2 * t * K * K, bytes };
                measure(&mut group, &format!("{format}/{x}/T={t}"), &Case::rows(&kernel, t), throughput);
            }
        }
    }
}

criterion_group!(benches, matmuls);
criterion_main!(benches);
