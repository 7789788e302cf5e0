//! The kernels of the CPU device: Rust functions for each [`Computation`], and the threads.
//!
//! [`bind`] turns an [`Implementation`] into a [`CpuKernel`] for each launch. It may come from a plan file, so everything it says
//! is checked there; and whatever it says, a kernel touches memory only through `args::Args`, which checks
//! every range against its argument. Each kernel is written once, generic over `isa::Isa`, and compiled once
//! for each instruction set; [`Features`] picks one.
//!
//! The grids that `bind` accepts (extents of one item may be left out; the last extent runs fastest):
//!
//! | kernel | items |
//! |---|---|
//! | matmul | `Σ ⌈rows/tile⌉` over the parts, part after part; with SwiGLU `⌈rows/tile⌉`, tile a multiple of 32; of 16 where weights are interleaved; with argmax, a launch of `T` follows |
//! | norm | the rows: every dimension but the last |
//! | rope_kv, kv_append | `T` |
//! | swiglu | the rows, then `⌈n/1024⌉` |
//! | attention | `⌈heads/a⌉`, then `⌈T/b⌉`, of at most 32 queries `a·b`, where `a` divides the heads that share a KV head |
//! | gated_scan | `⌈n/256⌉` |
//! | argmax | the rows of the operand |
//! | other primitives | the rows of the result: every dimension but the last |
//!
//! A kernel uses less than [`STACK`] bytes of stack, whatever its spec says, so that any thread can call it. What needs more is
//! in its `Work`, on the heap.
//!
//! What a kernel follows, as token ids, pages and sequences, it clamps into what is there, whoever computed it, so that no value
//! leads it astray; the executor refuses inputs that would be clamped, before a step. It also refuses rows to write that are
//! not distinct, which a kernel cannot see: see [`CpuKernel::run`].

mod args;
mod attention;
mod binding;
mod blocks;
mod device;
mod formats;
mod gated_scan;
mod interleaved;
mod isa;
mod math;
mod matmul;
mod norm;
mod primitive;
mod rope_kv;
mod swiglu;
#[cfg(test)]
mod testing;
mod threads;
mod weights;

pub use args::RawArg;
pub use binding::BindError;
pub use device::CpuDevice;
#[cfg(test)]
pub(super) use device::reserve;
pub use isa::{Features, prefetch};
pub use threads::{Threads, ThreadsError, Worker};
pub use weights::Weights;

use crate::codegen::spec::{Computation, Extent, Implementation, LaunchSpec};
use crate::ir::Syms;
use args::Args;
use isa::{Baseline, Isa, Job, Level};
use std::ops::Range;

#[cfg(target_endian = "big")]
compile_error!("weights are read in place, which needs a little-endian machine");

/// The most stack that a kernel uses, in bytes. Where nothing is optimised, buffers that are never needed at the same time lie
/// side by side.
pub const STACK: usize = if cfg!(debug_assertions) { 512 << 10 } else { 64 << 10 };

/// A kernel that is ready to run.
pub trait CpuKernel: Send + Sync {
    /// Does work items, of [`LaunchSpec::items`], as long as `items` yields some. Disjoint ranges may run at the same time.
    ///
    /// # Safety
    /// `args` has one entry for each argument of the implementation, and each is valid for its `len`, which is
    /// `ty.bytes(syms)`, at any alignment: for reads, and unless its access is `Read` for writes. During the launch nobody else
    /// writes to any of them or reads what the kernel writes, and an argument that is not only read overlaps no other, but for
    /// the pairs of `may_alias`, which lie exactly on each other. Where the spec says that the values of an argument are distinct,
    /// they are that and lie below their bound: work items write by them, and would write to the same memory.
    ///
    /// # Panics
    /// If an argument is shorter than its type says, or `items` leaves the grid. No value of an argument makes a kernel panic.
    unsafe fn run(&self, args: &[RawArg], syms: &Syms, items: &mut dyn Iterator<Item = Range<usize>>);
}

/// Checks a kernel's implementation and picks the function of each of its launches.
///
/// # Errors
/// Whatever the kernel does not expect: see [`BindError`].
pub fn bind(kernel: &Implementation, features: &Features) -> Result<Vec<Box<dyn CpuKernel>>, BindError> {
    let level = features.level();
    let whole = |bound| vec![bound];
    let launches = &kernel.launches;
    Ok(match &kernel.spec.computes {
        Computation::Matmul(m) => {
            let (matmul, best) = matmul::bind(kernel, m)?;
            let best = best.map(|best| boxed(best, &launches[1..], level));
            [boxed(matmul, launches, level)].into_iter().chain(best).collect()
        }
        Computation::Norm(m) => whole(boxed(norm::Norm::bind(kernel, m)?, launches, level)),
        Computation::RopeKv(m) => whole(boxed(rope_kv::RopeKv::bind(kernel, m)?, launches, level)),
        Computation::Swiglu(m) => whole(boxed(swiglu::Swiglu::bind(kernel, m)?, launches, level)),
        Computation::Attention(m) => whole(boxed(attention::Attention::bind(kernel, m)?, launches, level)),
        Computation::RopeAttention(_) => return binding::parameter("the CPU turns before it attends"),
        Computation::GatedScan(m) => whole(boxed(gated_scan::GatedScan::bind(kernel, m)?, launches, level)),
        Computation::Op(op) => whole(boxed(primitive::PrimitiveKernel::bind(kernel, op)?, launches, level)),
    })
}

/// A kernel for the first of these launches.
fn boxed<K: Kernel + 'static>(kernel: K, launches: &[LaunchSpec], level: Level) -> Box<dyn CpuKernel> {
    let grid = launches.first().map(|launch| launch.grid.clone()).unwrap_or_default();
    Box::new(Bound { kernel, grid, level })
}

/// A kernel in safe Rust over checked arguments. `run` and all it calls must be `#[inline(always)]`, so that they
/// are compiled with the instructions of `I`.
trait Kernel: Send + Sync {
    /// What a thread keeps from one range of items of a launch to the next, and what is too large for the stack.
    type Work: Default;

    fn run<I: Isa>(&self, work: &mut Self::Work, args: Args<'_>, syms: &Syms, items: Range<usize>);
}

/// A kernel, its grid and the instruction set it runs with.
struct Bound<K> {
    kernel: K,
    grid: Vec<Extent>,
    level: Level,
}

impl<K: Kernel> CpuKernel for Bound<K> {
    unsafe fn run(&self, args: &[RawArg], syms: &Syms, items: &mut dyn Iterator<Item = Range<usize>>) {
        let all = self.grid.iter().fold(1, |n: u64, e| n.saturating_mul(e.eval(syms)));
        // SAFETY: the caller's promise is the one that `Args` asks for.
        let args = unsafe { Args::new(args) };
        outline(self.level, Launch { kernel: &self.kernel, args, syms, items, all });
    }
}

/// Runs `job` with the instructions of a level.
fn outline<J: Job>(level: Level, job: J) {
    // `Features` holds a level only where the processor has it.
    match level {
        Level::Baseline => Baseline::outline(job),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => isa::Avx2::outline(job),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => isa::Avx512::outline(job),
    }
}

/// Some items of a launch.
struct Launch<'a, K> {
    kernel: &'a K,
    args: Args<'a>,
    syms: &'a Syms,
    items: &'a mut dyn Iterator<Item = Range<usize>>,
    /// Items of the whole launch.
    all: u64,
}

impl<K: Kernel> Job for Launch<'_, K> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut work = K::Work::default();
        for items in self.items {
            assert!(items.end as u64 <= self.all, "items {items:?} of a launch of {}", self.all);
            self.kernel.run::<I>(&mut work, self.args, self.syms, items);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Does the tests of the kernels again, in another process, as one that overflows its stack is aborted.
    #[test]
    fn no_kernel_uses_more_stack_than_is_said() {
        let rooms = ["attention", "gated_scan", "matmul::tests", "norm", "primitive", "rope_kv", "swiglu"];
        let mut tests = Command::new(std::env::current_exe().unwrap());
        tests.args(rooms.map(|room| format!("runtime::cpu::{room}")));
        // To say where a panic came from takes more stack than any kernel.
        tests.env(testing::STACK_VAR, STACK.to_string()).env("RUST_BACKTRACE", "0");
        let out = tests.output().unwrap();
        let (said, why) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{said}\n{why}");
        for room in rooms {
            assert!(said.contains(&format!("test runtime::cpu::{room}::")), "{room} has no tests:\n{said}");
        }
    }
}
