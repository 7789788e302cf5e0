//! Speed of the CPU kernels on one core: `cargo bench --bench kernels [-- matmul/q4_k]`.
//!
//! Throughput is in bytes of weights or cache, to be held against the memory bandwidth of a core.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use sinter::codegen::backend;
use sinter::codegen::spec::{
    Access, Arg, ArgId, AttentionSpec, Computation, Epilogue, Implementation, Index, IndexSource, KernelSpec,
    Layout, MatmulPart, MatmulSpec, NormSource, NormSpec,
};
use sinter::ir::{DType, Dim, Syms, TensorType};
use sinter::runtime::cpu::{Features, RawArg, bind};
use sinter::target::Target;

const K: u64 = 4096;

fn arg(access: Access, dtype: DType, shape: &[Dim]) -> Arg {
    Arg::new(access, TensorType { dtype, shape: shape.to_vec() })
}

/// As codegen has it for steps of up to 512 tokens.
fn kernel(computes: Computation, args: Vec<Arg>) -> Implementation {
    let target = Target::cpu();
    let cpu = backend(target.kind);
    let spec = KernelSpec { kernel: None, computes, args };
    // Weights lie as they do where nothing else reads them.
    let weights = match &spec.computes {
        Computation::Matmul(m) => m.parts.iter().map(|part| part.weight).collect(),
        _ => vec![],
    };
    let layout = |id: &ArgId| cpu.layout(&spec.args[usize::from(*id)].ty, &[(spec.clone(), *id)]);
    let layouts = weights.iter().map(|id| (*id, layout(id))).filter(|(_, l)| *l != Layout::RowMajor);
    let layouts = layouts.collect();
    cpu.emit(spec, layouts, &[], &[], &Syms { t: 512, r: 512 }, &target).expect("the CPU has the kernel")
}

/// A square matmul.
fn matmul(x: DType, format: DType) -> Implementation {
    let part = MatmulPart { weight: 1, format, rows: K, bias: None, residual: None, out: Some(2) };
    let m = MatmulSpec { x: 0, k: K, parts: vec![part], epilogue: Epilogue::Store };
    let args = vec![
        arg(Access::Read, x, &[Dim::T, Dim::n(K)]),
        arg(Access::Read, format, &[Dim::n(K), Dim::n(K)]),
        arg(Access::Write, DType::F32, &[Dim::T, Dim::n(K)]),
    ];
    kernel(Computation::Matmul(m), args)
}

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

/// Numbers of about unit size in any format.
fn fill(dtype: DType, n: u64) -> Vec<u8> {
    let n = n as usize;
    let mut bytes: Vec<u8> =
        (0..n / dtype.block_len() * dtype.block_bytes()).map(|i| (i * 151) as u8).collect();
    let small = f16::from_f32(0.01).to_le_bytes();
    for (i, block) in bytes.chunks_mut(dtype.block_bytes()).enumerate() {
        match dtype {
            DType::F32 => block.copy_from_slice(&((i % 13) as f32 * 0.1).to_le_bytes()),
            DType::F16 => block.copy_from_slice(&f16::from_f32((i % 13) as f32 * 0.1).to_le_bytes()),
            DType::Q8Act => block[..8].copy_from_slice(&[0.01f32, 0.1].map(f32::to_le_bytes).concat()),
            DType::BF16 => block.copy_from_slice(&((i % 13) as f32 * 0.1).to_le_bytes()[2..]),
            DType::Q2_K => block[80..].copy_from_slice(&[small, small].concat()),
            DType::Q3_K => block[108..].copy_from_slice(&small),
            DType::Q6_K => block[208..].copy_from_slice(&small),
            DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => {
                block[..4].copy_from_slice(&[small, small].concat())
            }
            DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => block[..2].copy_from_slice(&small),
            DType::MXFP4 => block[0] = 120,
            DType::I32 => block.fill(0),
        }
    }
    bytes
}

/// Measures a kernel on made-up arguments, but for those that are `given`.
fn run(
    c: &mut Criterion,
    group: &str,
    name: &str,
    kernel: &Implementation,
    at: Syms,
    given: &[(usize, Vec<i32>)],
    read: usize,
) {
    let mut group = c.benchmark_group(group);
    group.sample_size(10).warm_up_time(std::time::Duration::from_millis(300));
    group.measurement_time(std::time::Duration::from_secs(1)).throughput(Throughput::Bytes(read as u64));
    for features in Features::available() {
        let launches = bind(kernel, &features).expect("the kernel is right");
        let mut memory: Vec<Vec<u8>> = kernel.args().map(|a| fill(a.ty.dtype, a.ty.elements(&at))).collect();
        for (arg, values) in given {
            memory[*arg] = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        }
        let args: Vec<RawArg> =
            memory.iter_mut().map(|m| RawArg { ptr: m.as_mut_ptr(), len: m.len() }).collect();
        let items = kernel.launches[0].items(&at) as usize;
        group.bench_function(BenchmarkId::new(name, features.name()), |b| {
            // SAFETY: each argument has memory of its own, as large as its type says.
            b.iter(|| unsafe { launches[0].run(&args, &at, &mut std::iter::once(0..items)) });
        });
    }
}

fn kernels(c: &mut Criterion) {
    for t in [1, 32] {
        let at = Syms { t, r: t };
        for x in [DType::Q8Act, DType::F32] {
            for format in DType::WEIGHTS.into_iter().filter(|w| x == DType::F32 || w.is_quantised()) {
                let kernel = matmul(x, format);
                let bytes = kernel.spec.args[1].ty.bytes(&at) as usize;
                run(c, "matmul", &format!("{format}/{x}/T={t}"), &kernel, at, &[], bytes);
            }
        }
        run(c, "norm", &format!("T={t}"), &norm(), at, &[], (t * K * 8) as usize);
    }
    for (t, before) in [(1, 1023), (512, 0)] {
        let all = before + t;
        // Pages in no order.
        let tables = (0..32).map(|page| page * 13 % 32).collect();
        let given = [(3, tables), (4, vec![all]), (6, (before..all).collect())];
        let at = Syms { t: t as u64, r: t as u64 };
        let name = format!("T={t} after {before}");
        run(c, "attention", &name, &attention(), at, &given, 2 * all as usize * 512 * 2);
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
