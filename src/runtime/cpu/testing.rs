//! What the tests of the kernels share: random tensors, memory with guards around each argument, and references.

use super::formats::{Q4K, Q6K};
use super::interleaved::{self, Repack, with_interleaved};
use super::isa::{Baseline, Isa};
use super::{Features, RawArg, bind};
use crate::codegen::spec::{
    Access, Arg, ArgId, Code, Computation, CpuCode, Extent, Implementation, Index, IndexSource, KernelSpec,
    LaunchSpec, Layout,
};
use crate::ir::{DType, Dim, Syms, TensorType};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes around each argument that must stay as they are. Odd, so that arguments are misaligned.
const GUARD: usize = 67;
const MARK: u8 = 0xA5;

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

pub fn syms(t: u64, r: u64) -> Syms {
    Syms { t, r }
}

/// Random floats of about unit size.
pub fn floats(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-2.0f32..2.0)).collect()
}

pub fn f32_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn i32_bytes(x: &[i32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn to_f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

pub fn to_i32s(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
}

/// `n` random elements of `dtype`: every bit of a block is used, with sensible scales.
pub fn random(rng: &mut ChaCha8Rng, dtype: DType, n: usize) -> Vec<u8> {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    match dtype {
        DType::F32 => f32_bytes(&floats(rng, n)),
        DType::I32 => (0..n).flat_map(|_| rng.random_range(0..100i32).to_le_bytes()).collect(),
        DType::F16 => floats(rng, n).into_iter().flat_map(half).collect(),
        DType::BF16 => floats(rng, n).iter().flat_map(|x| [x.to_le_bytes()[2], x.to_le_bytes()[3]]).collect(),
        DType::Q8Act => {
            let mut bytes = vec![0; n / 32 * 40];
            crate::gguf::dequant::quantise_q8_act(&floats(rng, n), &mut bytes).unwrap();
            bytes
        }
        _ => {
            let mut bytes: Vec<u8> =
                (0..n / dtype.block_len() * dtype.block_bytes()).map(|_| rng.random()).collect();
            for block in bytes.chunks_mut(dtype.block_bytes()) {
                let scale = rng.random_range(0.001f32..0.02);
                let mut put = |at: usize, x: f32| block[at..at + 2].copy_from_slice(&half(x));
                match dtype {
                    DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => {
                        put(0, scale);
                        put(2, scale * 2.0);
                    }
                    DType::Q2_K => {
                        put(80, scale);
                        put(82, scale * 2.0);
                    }
                    DType::Q3_K => put(108, scale * 0.1),
                    DType::Q6_K => put(208, scale * 0.1),
                    DType::MXFP4 => block[0] = rng.random_range(115..125),
                    _ => put(0, scale),
                }
            }
            bytes
        }
    }
}

/// The values of `bytes`, by the reference dequantiser.
pub fn values(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let mut out = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
    crate::gguf::dequant::dequantise(dtype, bytes, &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

pub fn arg<D: Into<Dim>>(access: Access, dtype: DType, shape: impl IntoIterator<Item = D>) -> Arg {
    Arg::new(access, TensorType::new(dtype, shape))
}

/// Inputs of the step that a kernel reads by.
pub fn index<D: Into<Dim>>(shape: impl IntoIterator<Item = D>, below: impl Into<Dim>) -> Arg {
    let index = Index { below: below.into(), distinct: false, source: IndexSource::Input };
    Arg { index: Some(index), ..arg(Access::Read, DType::I32, shape) }
}

/// Inputs of the step that a kernel writes by.
pub fn written_by<D: Into<Dim>>(shape: impl IntoIterator<Item = D>, below: impl Into<Dim>) -> Arg {
    let index = Index { below: below.into(), distinct: true, source: IndexSource::Input };
    Arg { index: Some(index), ..arg(Access::Read, DType::I32, shape) }
}

/// Ways in which what an argument is held to may be said wrongly.
pub fn wrong_indices(right: Index) -> impl Iterator<Item = Option<Index>> {
    let below = right.below.checked_add(n(1)).unwrap();
    let computed = (right.distinct).then_some(Index { source: IndexSource::Device, ..right });
    let others = [Index { below, ..right }, Index { distinct: !right.distinct, ..right }];
    [None].into_iter().chain(others.into_iter().chain(computed).map(Some))
}

pub fn kernel(computes: Computation, args: Vec<Arg>, grid: Vec<Extent>) -> Implementation {
    Implementation {
        spec: KernelSpec { kernel: None, computes, args },
        layouts: vec![],
        workspace: vec![],
        precision: DType::F32,
        may_alias: vec![],
        launches: vec![LaunchSpec { code: Code::Cpu(CpuCode::Whole), grid }],
    }
}

/// The same kernel with all weights interleaved that can be.
pub fn with_interleaved_weights(mut kernel: Implementation, weights: &[ArgId]) -> Implementation {
    for &id in weights {
        assert!(Layout::Interleaved16.fits(&kernel.arg(id).unwrap().ty), "argument {id}");
        kernel.layouts.push((id, Layout::Interleaved16));
    }
    kernel
}

/// Rows of weights as strips.
pub fn repacked(ty: &TensorType, bytes: &[u8]) -> Vec<u8> {
    let mut strips = vec![MARK; bytes.len()];
    let strip = interleaved::STRIP_ROWS * bytes.len() / ty.first().c as usize;
    for (rows, strip) in bytes.chunks(strip).zip(strips.chunks_mut(strip)) {
        macro_rules! go {
            ($format:ty) => {
                Baseline::outline(Repack::<$format> { rows, strip, format: PhantomData })
            };
        }
        with_interleaved!(ty.dtype, go, panic!("{ty} cannot be interleaved"));
    }
    strips
}

pub fn n(c: u64) -> Dim {
    Dim::n(c)
}

/// Runs a launch on memory of its own, with each argument as given (weights row after row, wherever the kernel wants them), or where `on` says on top of another. Returns the arguments afterwards.
///
/// The items are done one by one from the last to the first, as nothing may depend on their order, and then again all together, as
/// nothing may depend on what a thread keeps from one to the next. Checks that only what is written has changed.
pub fn launch(
    kernel: &Implementation,
    features: &Features,
    syms: &Syms,
    inputs: &[Option<Vec<u8>>],
    on: Option<(ArgId, ArgId)>,
) -> Vec<Vec<u8>> {
    let launches = bind(kernel, features).unwrap();
    assert_eq!((inputs.len(), launches.len()), (kernel.args().count(), kernel.launches.len()));
    let (mut places, mut len) = (vec![], GUARD);
    for arg in kernel.args() {
        let bytes = arg.ty.bytes(syms) as usize;
        places.push(len..len + bytes);
        len += bytes + GUARD;
    }
    let mut memory = vec![MARK; len];
    for (i, (place, input)) in places.iter().zip(inputs).enumerate() {
        if let Some(input) = input {
            let repacked = match kernel.layout(i as ArgId) {
                Layout::RowMajor => input,
                Layout::Interleaved16 => &repacked(&kernel.arg(i as ArgId).unwrap().ty, input),
                Layout::Planes => unreachable!("the CPU has no kernel for it"),
            };
            memory[place.clone()].copy_from_slice(repacked);
        }
    }
    if let Some((write, read)) = on {
        places[usize::from(write)] = places[usize::from(read)].clone();
    }
    let before = memory;
    // Every launch, one after another, in the ranges that `split` gives for its number of items.
    let done = |split: &(dyn Fn(usize) -> Vec<Range<usize>> + Sync)| {
        let mut memory = before.clone();
        let base = memory.as_mut_ptr();
        let args: Vec<RawArg> =
            places.iter().map(|p| RawArg { ptr: base.wrapping_add(p.start), len: p.len() }).collect();
        on_stack(&kernel.spec.computes, || {
            for (launch, spec) in launches.iter().zip(&kernel.launches) {
                for range in split(spec.items(syms) as usize) {
                    // SAFETY: `args` lie in `memory`, apart but for the pair that the kernel allows, and nobody else uses it.
                    unsafe { launch.run(&args, syms, &mut std::iter::once(range)) };
                }
            }
        });
        memory
    };
    let memory = done(&|items| (0..items).rev().map(|item| item..item + 1).collect());
    let together = done(&|items| std::iter::once(0..items).collect());
    assert!(together == memory, "items that are done together differ");
    for (i, (new, old)) in memory.iter().zip(&before).enumerate() {
        let may = kernel.args().zip(&places).any(|(a, p)| a.access != Access::Read && p.contains(&i));
        assert!(may || new == old, "byte {i} of {len} was written; the arguments are {places:?}");
    }
    places.into_iter().map(|p| memory[p].to_vec()).collect()
}

/// In the environment, the bytes of stack on which [`launch`] runs kernels.
pub const STACK_VAR: &str = "SINTER_TEST_STACK";

/// Calls `run`, if the environment says so on a thread with so much stack and the kernel's name.
fn on_stack(computes: &Computation, run: impl FnOnce() + Send) {
    let Ok(bytes) = std::env::var(STACK_VAR) else { return run() };
    let name: String = format!("{computes:?}").chars().take(60).collect();
    let thread = std::thread::Builder::new().name(name).stack_size(bytes.parse().unwrap());
    std::thread::scope(|s| {
        let end = thread.spawn_scoped(s, run).unwrap().join();
        end.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Asserts that `have` is within `tolerance` of `want`, relative to the largest of `want`.
#[track_caller]
pub fn assert_close(have: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(have.len(), want.len());
    let size = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (h, w)) in have.iter().zip(want).enumerate() {
        assert!((f64::from(*h) - w).abs() <= tolerance * size, "element {i}: {h} not {w} (largest {size})");
    }
}

/// Runs a launch with every instruction set, checks that they agree on argument `out`, and returns it.
#[track_caller]
pub fn launch_all(kernel: &Implementation, syms: &Syms, inputs: &[Option<Vec<u8>>], out: ArgId) -> Vec<u8> {
    let mut results = Features::available()
        .into_iter()
        .map(|f| launch(kernel, &f, syms, inputs, None).swap_remove(out.into()));
    let first = results.next().unwrap();
    for other in results {
        match kernel.arg(out).unwrap().ty.dtype {
            DType::F32 => {
                let want: Vec<f64> = to_f32s(&first).into_iter().map(f64::from).collect();
                assert_close(&to_f32s(&other), &want, 2e-6);
            }
            DType::F16 | DType::Q8Act => {
                let dtype = kernel.arg(out).unwrap().ty.dtype;
                let have: Vec<f32> = values(dtype, &other).into_iter().map(|x| x as f32).collect();
                assert_close(&have, &values(dtype, &first), 1e-2);
            }
            _ => assert_eq!(first, other),
        }
    }
    first
}
