//! The seam between kernels and instruction sets.

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

use super::args::F32;
use super::blocks::{Format, Group, XGroup};
use super::interleaved::{self, Interleaved, Scales};
use super::math::{self, LANES};
use super::matmul::{Rows, Tile};

/// Lanes of [`Isa::lane_products`].
pub(super) const WIDE: usize = 32;

/// Which instructions the kernels may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    level: Level,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Features {
    /// The best that this processor has, or the one that `SINTER_CPU` in the environment names, if it has that.
    pub fn detect() -> Features {
        Features::named(std::env::var("SINTER_CPU").ok().as_deref())
    }

    /// The set of that name; the best if there is none of it, or no name.
    fn named(name: Option<&str>) -> Features {
        let mut all = Features::available();
        let named = all.iter().find(|f| Some(f.name()) == name).copied();
        if let (Some(name), None) = (name, named) {
            let there: Vec<_> = all.iter().map(Features::name).collect();
            tracing::warn!("SINTER_CPU={name} is none of {}, so it is not heeded", there.join(", "));
        }
        named.or_else(|| all.pop()).unwrap_or_else(Features::baseline)
    }

    /// What every processor of this architecture has.
    pub fn baseline() -> Features {
        Features { level: Level::Baseline }
    }

    /// Every set that this processor can run, the best last.
    pub fn available() -> Vec<Features> {
        #[allow(unused_mut)]
        let mut all = vec![Features::baseline()];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            all.push(Features { level: Level::Avx2 });
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(Features { level: Level::Avx512 });
            }
        }
        all
    }

    /// The name for reports.
    pub fn name(&self) -> &'static str {
        match self.level {
            Level::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    pub(super) fn level(&self) -> Level {
        self.level
    }
}

/// How far ahead weights are prefetched. Of 1 to 8 KiB, 4 were fastest on a server with two cores.
const AHEAD: usize = 4096;

/// How many bytes ahead to prefetch in weights of so many, which lie one after another: none of few, which come from a cache.
#[inline(always)]
pub(super) fn prefetch_distance(bytes: usize) -> usize {
    if bytes >= 4 * AHEAD { AHEAD } else { 0 }
}

/// Prefetches the cache line at an address, which may lie anywhere.
#[inline(always)]
pub fn prefetch(at: *const u8) {
    // SAFETY: a prefetch is a hint, and no address makes it fault; every x86-64 has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast())
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// What differs between instruction sets. The integer parts agree bit for bit, floats but for the rounding of `mul_add`.
///
/// Called only from code that runs on a processor that has the set, inside a function compiled for it.
pub(super) trait Isa: Sized + 'static {
    /// Tokens from which a [`Tile`] of weights that lie row after row pays, if it ever does.
    const TILE_TOKENS: Option<usize> = None;
    /// The same, of interleaved rows, which are met by a token at once where they lie.
    const STRIPS_TILE_TOKENS: Option<usize> = None;
    /// Tokens at most that [`Isa::multiply_strip`] takes at once: as many as registers allow.
    const STRIP_TOKENS: usize;

    /// Runs `job` in a function of its own that is compiled for this set, so that it is compiled once.
    fn outline<J: Job>(job: J);

    /// `a · b + c`, rounded once or twice.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// [`Isa::mul_add`] lane by lane, as vectors: left to itself, the compiler takes such sums apart.
    fn mul_add_lanes(a: &[f32; LANES], b: &[F32; LANES], sums: &mut [f32; LANES]);

    /// The sum of the lanes, by halves.
    #[inline(always)]
    fn sum(lanes: &[f32; LANES]) -> f32 {
        math::sum(*lanes)
    }

    /// `out[n][l] += Σ a[i][l] · b[n·step_n + i·step_i]`: lanes of `a` meet single elements of `b`.
    fn lane_products(a: &[[f32; WIDE]], b: &[F32], step_n: usize, step_i: usize, out: &mut [[f32; WIDE]]);

    /// A little-endian half as a float.
    fn from_f16_one(h: [u8; 2]) -> f32;

    /// Little-endian f16 as floats.
    fn from_f16(h: &[u8; 32], x: &mut [f32; 16]);

    /// Halves as floats.
    fn from_f16x8(h: [u16; 8]) -> [f32; 8];

    /// A byte of ones for each bit that is set, of zeros for each that is not.
    fn spread(bits: [u8; 4]) -> [u8; 32];

    /// Eight floats as little-endian f16, rounded to nearest even.
    fn to_f16(x: &[f32; 8]) -> [u8; 16];

    /// `table[i]` for each `i`, which are below 16.
    fn look_up(table: &[u8; 16], i: &[u8; 32]) -> [u8; 32];

    /// The products of a tile of weights with `N` tokens, as [`Tile::multiply`] computes them.
    #[inline(always)]
    fn multiply_tile<const N: usize, const SPLIT: bool>(
        tile: &Tile,
        xs: [Rows<'_>; N],
        out: &mut [[f32; 32]; N],
    ) {
        tile.multiply(&xs, SPLIT, out);
    }

    /// Adds the products of a panel of interleaved rows with `N` tokens to their sums, and prefetches the panel
    /// `next`, as [`interleaved::multiply`] does.
    fn multiply_strip<F: Interleaved, const N: usize>(
        panel: &[u8],
        scales: &Scales,
        xs: [Rows<'_>; N],
        next: Option<*const u8>,
        sums: &mut [[f32; interleaved::STRIP_ROWS]; N],
    );

    /// Adds the products of a group of weights with one of activations to 16 partial sums, and takes those of the minima
    /// with the sums of activations from them. Of each 32 bytes, lanes sum products of 4 (or 8) elements.
    fn dot<F: Format>(w: &Group, x: &XGroup, acc: &mut [f32; 16]);
}

/// Work that is worth a function of its own. `run` must be `#[inline(always)]`.
pub(super) trait Job {
    fn run<I: Isa>(self);
}

/// Plain Rust.
pub(super) struct Baseline;

impl Isa for Baseline {
    const STRIP_TOKENS: usize = 1;

    #[inline(never)]
    fn outline<J: Job>(job: J) {
        job.run::<Baseline>();
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    fn mul_add_lanes(a: &[f32; LANES], b: &[F32; LANES], sums: &mut [f32; LANES]) {
        for ((a, b), sum) in a.iter().zip(b).zip(sums) {
            *sum += a * b.0;
        }
    }

    #[inline(always)]
    fn lane_products(a: &[[f32; WIDE]], b: &[F32], step_n: usize, step_i: usize, out: &mut [[f32; WIDE]]) {
        for (n, out) in out.iter_mut().enumerate() {
            for (i, a) in a.iter().enumerate() {
                let b = b[n * step_n + i * step_i].0;
                for (out, a) in out.iter_mut().zip(a) {
                    *out += a * b;
                }
            }
        }
    }

    #[inline(always)]
    fn from_f16_one(h: [u8; 2]) -> f32 {
        half_to_f32(u16::from_le_bytes(h))
    }

    #[inline(always)]
    fn from_f16(h: &[u8; 32], x: &mut [f32; 16]) {
        for (x, h) in x.iter_mut().zip(h.as_chunks().0) {
            *x = Baseline::from_f16_one(*h);
        }
    }

    #[inline(always)]
    fn from_f16x8(h: [u16; 8]) -> [f32; 8] {
        h.map(half_to_f32)
    }

    #[inline(always)]
    fn spread(bits: [u8; 4]) -> [u8; 32] {
        let mut spread = [0; 32];
        for (l, spread) in spread.iter_mut().enumerate() {
            *spread = (bits[l / 8] >> (l % 8) & 1).wrapping_neg();
        }
        spread
    }

    #[inline(always)]
    fn to_f16(x: &[f32; 8]) -> [u8; 16] {
        let mut h = [0; 16];
        for (h, x) in h.chunks_exact_mut(2).zip(x) {
            h.copy_from_slice(&half::f16::from_f32(*x).to_le_bytes());
        }
        h
    }

    #[inline(always)]
    fn look_up(table: &[u8; 16], i: &[u8; 32]) -> [u8; 32] {
        let mut found = [0; 32];
        for (found, i) in found.iter_mut().zip(i) {
            *found = table[usize::from(i & 15)];
        }
        found
    }

    #[inline(always)]
    fn multiply_strip<F: Interleaved, const N: usize>(
        panel: &[u8],
        scales: &Scales,
        xs: [Rows<'_>; N],
        next: Option<*const u8>,
        sums: &mut [[f32; interleaved::STRIP_ROWS]; N],
    ) {
        interleaved::multiply::<F, N>(panel, scales, xs, next, sums);
    }

    #[inline(always)]
    fn dot<F: Format>(w: &Group, x: &XGroup, acc: &mut [f32; 16]) {
        let (w_q, x_q) = (w.q.as_flattened().as_chunks::<32>().0, x.q.as_flattened().as_chunks::<32>().0);
        for (i, b) in F::ORDER.into_iter().enumerate() {
            let at = i % 2 * 8;
            for (l, acc) in acc[at..at + 8].iter_mut().enumerate() {
                let h = if F::SPLIT { l / 4 } else { 0 };
                let mut sum = 0;
                for j in 4 * l..4 * l + 4 {
                    let q = w_q[i][j];
                    sum += if F::SIGNED { i32::from(q as i8) } else { i32::from(q) } * i32::from(x_q[i][j]);
                }
                *acc += sum as f32 * (w.scale[h][b] * x.d[b]);
            }
        }
        if !F::SIGNED {
            for b in 0..8 {
                if F::SPLIT {
                    acc[b] -= w.min[0][b] * x.s[0][b];
                    acc[b + 8] -= w.min[1][b] * x.s[1][b];
                } else {
                    acc[b] -= w.min[0][b] * (x.s[0][b] + x.s[1][b]);
                }
            }
        }
    }
}

/// A half as a float, without branches: the exponent is rebiased by a multiplication, which is exact for subnormals too.
#[inline(always)]
pub(super) fn half_to_f32(h: u16) -> f32 {
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let h = u32::from(h);
    let magnitude = (h & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * REBIAS).to_bits();
    let bits = if h & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(bits | (h & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16s_are_exact() {
        for h in 0..=u16::MAX {
            let want = half::f16::from_bits(h).to_f32();
            let have = half_to_f32(h);
            assert!(have.to_bits() == want.to_bits() || have.is_nan() && want.is_nan(), "{h:#x}");
        }
    }

    #[test]
    fn any_set_that_is_there_can_be_named() {
        let all = Features::available();
        assert_eq!(all[0], Features::baseline());
        assert_eq!(Features::baseline().name(), "baseline");
        for features in &all {
            assert_eq!(Features::named(Some(features.name())), *features);
        }
        for name in [None, Some(""), Some("AVX2"), Some("neon")] {
            assert_eq!(Features::named(name), *all.last().unwrap(), "{name:?}");
        }
    }

    /// Halves as every set makes them: rounded to nearest even, of any size.
    #[test]
    fn f16s_are_rounded_alike() {
        fn check<I: Isa>() {
            // Every eighth float pattern of those around f16, a step beside each tie, and the ends of the range.
            let bits = (0x3300_0000u32..0x4780_1000).step_by(4093).flat_map(|b| [b, b ^ 0x8000_0000]);
            let ties = (0..2000u32).flat_map(|i| [0x3f80_0000 + (i << 12), 0x3f80_0000 + (i << 12) + 1]);
            let ends = [0, 1, 0x3280_0000, 0x477f_efff, 0x477f_f000, 0x7f80_0000, 0xff80_0000];
            let all: Vec<f32> = bits.chain(ties).chain(ends).map(f32::from_bits).collect();
            for x in all.chunks(8) {
                let mut eight = [0.0; 8];
                eight[..x.len()].copy_from_slice(x);
                let want: Vec<u8> =
                    eight.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
                assert_eq!(I::to_f16(&eight)[..], want[..], "{eight:?}");
            }
        }
        check::<Baseline>();
        #[cfg(target_arch = "x86_64")]
        for features in Features::available() {
            match features.name() {
                "avx2" => check::<Avx2>(),
                "avx512" => check::<Avx512>(),
                _ => {}
            }
        }
    }

    /// The best set is the best that the processor says it has.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn no_set_that_is_there_is_left_out() {
        let names: Vec<_> = Features::available().iter().map(Features::name).collect();
        assert!(["baseline", "avx2", "avx512"].starts_with(&names), "{names:?}");
        let has = |flags: &[&str]| {
            let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
            let line = info.lines().find(|line| line.starts_with("flags"))?.to_string();
            Some(flags.iter().all(|flag| line.split_whitespace().any(|f| f == *flag)))
        };
        // Where the system says nothing, nothing can be compared.
        if let Some(avx2) = has(&["avx2", "fma", "f16c"]) {
            assert_eq!(names.contains(&"avx2"), avx2);
        }
        if let Some(avx512) =
            has(&["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"])
        {
            assert_eq!(names.contains(&"avx512"), avx512);
        }
    }
}
