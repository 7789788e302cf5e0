//! What the suites share: kernels as codegen makes them, arguments for them, and how long to measure. See `cargo bench --bench matmul`
//! and the like; after `--`, a part of a name selects, as in `-- q4_k`.
#![allow(dead_code, reason = "each suite uses a part")]

#[path = "../../tests/support/synthetic.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
pub mod synthetic;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use half::f16;
use sinter::codegen::backend;
use sinter::codegen::spec::{
    Access, Arg, ArgId, Computation, Epilogue, Implementation, KernelSpec, Layout, MatmulPart, MatmulSpec,
};
use sinter::ir::{DType, Dim, Syms, TensorType};
use sinter::runtime::cpu::{Features, RawArg, bind};
use sinter::target::Target;
use std::time::Duration;

/// The elements of a row.
pub const K: u64 = 4096;

/// A group of measurements that take a second each.
pub fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

pub fn arg(access: Access, dtype: DType, shape: &[Dim]) -> Arg {
    Arg::new(access, TensorType { dtype, shape: shape.to_vec() })
}

/// As codegen has it for steps of up to 512 tokens.
pub fn kernel(computes: Computation, args: Vec<Arg>) -> Implementation {
    let spec = KernelSpec { kernel: None, computes, args };
    // Weights lie as they do where nothing else reads them.
    let weights = match &spec.computes {
        Computation::Matmul(m) => m.parts.iter().map(|part| part.weight).collect(),
        _ => vec![],
    };
    let cpu = backend(Target::cpu().kind);
    let layout = |id: &ArgId| cpu.layout(&spec.args[usize::from(*id)].ty, &[(spec.clone(), *id)]);
    let layouts: Vec<_> = weights.iter().map(|id| (*id, layout(id))).collect();
    emit(spec, layouts, 512)
}

/// As codegen has it for steps of up to `most` tokens, with weights that lie so.
pub fn emit(spec: KernelSpec, layouts: Vec<(ArgId, Layout)>, most: u64) -> Implementation {
    let target = Target::cpu();
    let layouts = layouts.into_iter().filter(|(_, layout)| *layout != Layout::RowMajor).collect();
    let at = Syms { t: most, r: most };
    backend(target.kind).emit(spec, layouts, &[], &[], &at, &target).expect("the CPU has the kernel")
}

/// What rows of `x` times a matrix of so many rows are, and of what.
pub fn matmul(x: DType, format: DType, rows: u64) -> (Computation, Vec<Arg>) {
    let part = MatmulPart { weight: 1, format, rows, round: None, bias: None, residual: None, out: Some(2) };
    let m = MatmulSpec { x: 0, k: K, parts: vec![part], epilogue: Epilogue::Store };
    let args = vec![
        arg(Access::Read, x, &[Dim::T, Dim::n(K)]),
        arg(Access::Read, format, &[Dim::n(rows), Dim::n(K)]),
        arg(Access::Write, DType::F32, &[Dim::T, Dim::n(rows)]),
    ];
    (Computation::Matmul(m), args)
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
            DType::Q8Act | DType::Q16Act => {
                block[..8].copy_from_slice(&[0.01f32, 0.1].map(f32::to_le_bytes).concat())
            }
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

/// A kernel at a size, and the values of arguments that it follows.
pub struct Case<'a> {
    pub kernel: &'a Implementation,
    pub at: Syms,
    pub given: &'a [(usize, Vec<i32>)],
}

impl<'a> Case<'a> {
    /// `t` rows of a kernel that follows nothing.
    pub fn rows(kernel: &'a Implementation, t: u64) -> Case<'a> {
        Case { kernel, at: Syms { t, r: t }, given: &[] }
    }
}

/// Measures a kernel on one core, on made-up arguments but for those that are given, with each instruction set of this
/// processor.
pub fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    case: &Case<'_>,
    throughput: Throughput,
) {
    let Case { kernel, at, given } = case;
    group.throughput(throughput);
    for features in Features::available() {
        let launches = bind(kernel, &features).expect("the kernel is right");
        let mut memory: Vec<Vec<u8>> = kernel.args().map(|a| fill(a.ty.dtype, a.ty.elements(at))).collect();
        for (arg, values) in *given {
            memory[*arg] = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        }
        let args: Vec<RawArg> =
            memory.iter_mut().map(|m| RawArg { ptr: m.as_mut_ptr(), len: m.len() }).collect();
        let items = kernel.launches[0].items(at) as usize;
        group.bench_function(BenchmarkId::new(name, features.name()), |b| {
            // SAFETY: each argument has memory of its own, as large as its type says.
            b.iter(|| unsafe { launches[0].run(&args, at, &mut std::iter::once(0..items)) });
        });
    }
}
