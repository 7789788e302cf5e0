//! Speed of the CPU kernels on one core: `cargo bench --bench kernels [-- matmul/q4_k]`.
//!
//! Throughput is in bytes of weights or cache, to be held against the memory bandwidth of a core.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use sinter::codegen::spec::{
    Access, Arg, AttentionSpec, Epilogue, Extent, KernelSpec, MatmulPart, MatmulSpec, NormSource, NormSpec,
    Template,
};
use sinter::ir::{DType, Dim, Syms, TensorType};
use sinter::runtime::cpu::{Features, RawArg, bind};

const K: u64 = 4096;

fn arg(access: Access, dtype: DType, shape: &[Dim]) -> Arg {
    Arg { access, ty: TensorType { dtype, shape: shape.to_vec() } }
}

fn spec(template: Template, args: Vec<Arg>, grid: Vec<Extent>) -> KernelSpec {
    KernelSpec { kernel: None, template, args, may_alias: vec![], grid }
}

/// A square matmul.
fn matmul(x: DType, format: DType) -> KernelSpec {
    let part = MatmulPart { weight: 1, format, rows: K, bias: None, residual: None, out: Some(2) };
    let m = MatmulSpec { x: 0, k: K, parts: vec![part], epilogue: Epilogue::Store, tile: 32 };
    let args = vec![
        arg(Access::Read, x, &[Dim::T, Dim::n(K)]),
        arg(Access::Read, format, &[Dim::n(K), Dim::n(K)]),
        arg(Access::Write, DType::F32, &[Dim::T, Dim::n(K)]),
    ];
    spec(Template::Matmul(m), args, vec![Extent::each(K / 32)])
}

fn norm() -> KernelSpec {
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
    spec(Template::Norm(m), args, vec![Extent::each(Dim::T)])
}

/// One layer's attention of a model with 32 heads on 8.
fn attention() -> KernelSpec {
    let m = AttentionSpec { q: 0, k: 1, v: 2, out: 3, heads: 32, kv_heads: 8, head_dim: 64, scale: 0.125 };
    let cache = || arg(Access::Read, DType::F16, &[Dim::S, Dim::n(8), Dim::n(64)]);
    let args = vec![
        arg(Access::Read, DType::F32, &[Dim::T, Dim::n(2048)]),
        cache(),
        cache(),
        arg(Access::Write, DType::Q8Act, &[Dim::T, Dim::n(2048)]),
    ];
    spec(Template::Attention(m), args, vec![Extent::each(32), Extent { dim: Dim::T, per: 8 }])
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

fn run(c: &mut Criterion, group: &str, name: &str, spec: &KernelSpec, at: Syms, read: usize) {
    let mut group = c.benchmark_group(group);
    group.sample_size(10).warm_up_time(std::time::Duration::from_millis(300));
    group.measurement_time(std::time::Duration::from_secs(1)).throughput(Throughput::Bytes(read as u64));
    for features in Features::available() {
        let kernel = bind(spec, &features).expect("the spec is right");
        let mut memory: Vec<Vec<u8>> =
            spec.args.iter().map(|a| fill(a.ty.dtype, a.ty.elements(&at))).collect();
        let args: Vec<RawArg> =
            memory.iter_mut().map(|m| RawArg { ptr: m.as_mut_ptr(), len: m.len() }).collect();
        let items = spec.items(&at) as usize;
        group.bench_function(BenchmarkId::new(name, features.name()), |b| {
            // SAFETY: each argument has memory of its own, as large as its type says.
            b.iter(|| unsafe { kernel.run(&args, &at, &mut std::iter::once(0..items)) });
        });
    }
}

fn kernels(c: &mut Criterion) {
    for t in [1, 32] {
        let at = Syms { t, p: 0, s: 512 };
        for x in [DType::Q8Act, DType::F32] {
            for format in DType::WEIGHTS.into_iter().filter(|w| x == DType::F32 || w.is_quantised()) {
                let spec = matmul(x, format);
                let bytes = spec.args[1].ty.bytes(&at) as usize;
                run(c, "matmul", &format!("{format}/{x}/T={t}"), &spec, at, bytes);
            }
        }
        run(c, "norm", &format!("T={t}"), &norm(), at, (t * K * 8) as usize);
    }
    let decode = Syms { t: 1, p: 1023, s: 1024 };
    run(c, "attention", "T=1,P=1023", &attention(), decode, 2 * 1024 * 512 * 2);
    let prefill = Syms { t: 512, p: 0, s: 1024 };
    run(c, "attention", "T=512,P=0", &attention(), prefill, 2 * 512 * 512 * 2);
}

criterion_group!(benches, kernels);
criterion_main!(benches);
