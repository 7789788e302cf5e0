//! Attention over a cache on one core: `cargo bench --bench attention`.
//!
//! Throughput is in bytes of keys and values.

mod common;

use common::{Case, arg, group, kernel, measure};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sinter::codegen::spec::{Access, Arg, AttentionSpec, Computation, Implementation, Index, IndexSource};
use sinter::ir::{DType, Dim, Syms};

/// One layer's attention of a model with 32 heads on 8.
fn attention() -> Implementation {
    let m = AttentionSpec {
        q: 0,
        k: 1,
        v: 2,
        tables: 3,
        lengths: 4,
        sequences: 5,
        positions: 6,
        out: 7,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        scale: 0.125,
        page: 32,
        window: None,
    };
    let cache = || arg(Access::Read, DType::F16, &[Dim::n(1024), Dim::n(8), Dim::n(64)]);
    let index = |shape: &[Dim], below: u64| Arg {
        index: Some(Index { below: Dim::n(below), distinct: false, source: IndexSource::Input }),
        ..arg(Access::Read, DType::I32, shape)
    };
    let args = vec![
        arg(Access::Read, DType::F32, &[Dim::T, Dim::n(2048)]),
        cache(),
        cache(),
        index(&[Dim::n(1), Dim::n(32)], 32),
        index(&[Dim::n(1)], 1025),
        index(&[Dim::T], 1),
        arg(Access::Read, DType::I32, &[Dim::T]),
        arg(Access::Write, DType::Q8Act, &[Dim::T, Dim::n(2048)]),
    ];
    kernel(Computation::Attention(m), args)
}

fn attentions(c: &mut Criterion) {
    let mut group = group(c, "attention");
    let kernel = attention();
    for (t, before) in [(1, 127), (1, 1023), (8, 1016), (512, 0)] {
        let all = before + t;
        // Pages in no order.
        let tables = (0..32).map(|page| page * 13 % 32).collect();
        let given = [(3, tables), (4, vec![all]), (6, (before..all).collect())];
        let case = Case { kernel: &kernel, at: Syms { t: t as u64, r: t as u64 }, given: &given };
        let throughput = Throughput::Bytes(2 * all as u64 * 512 * 2);
        measure(&mut group, &format!("T={t} after {before}"), &case, throughput);
    }
}

criterion_group!(benches, attentions);
criterion_main!(benches);
