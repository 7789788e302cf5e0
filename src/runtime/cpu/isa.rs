//! The seam between kernels and instruction sets.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

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
}

impl Features {
    /// The best that this processor has; `SINTER_CPU=baseline` in the environment forces the baseline.
    pub fn detect() -> Features {
        if std::env::var_os("SINTER_CPU").is_some_and(|v| v == "baseline") {
            return Features::baseline();
        }
        Features::available().pop().unwrap_or_else(Features::baseline)
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
        }
        all
    }

    /// The name for reports.
    pub fn name(&self) -> &'static str {
        match self.level {
            Level::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
        }
    }

    pub(super) fn level(&self) -> Level {
        self.level
    }
}

/// What differs between instruction sets. The integer parts agree bit for bit, floats but for the rounding of `mul_add`.
///
/// Called only from code that runs on a processor that has the set, inside a function compiled for it.
pub(super) trait Isa: 'static {
    /// `a · b + c`, rounded once or twice.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// Eight little-endian halves as floats.
    fn from_halves(h: &[u8; 16]) -> [f32; 8];

    /// Eight floats as little-endian halves, rounded to nearest even.
    fn to_halves(x: &[f32; 8]) -> [u8; 16];

    /// `table[i]` for each `i`, which are below 16.
    fn look_up(table: &[i8; 16], i: &[u8; 32]) -> [i8; 32];

    /// Lane `l` of `acc` plus `Σ w·x` over elements `4l..4l+4` times `low` (`l < 4`) or `high`.
    /// `unsigned` promises that no weight is negative; `x` lies in -127..=127.
    fn dot(unsigned: bool, acc: [f32; 8], w: &[i8; 32], x: &[i8; 32], low: f32, high: f32) -> [f32; 8];
}

/// Plain Rust.
pub(super) struct Baseline;

impl Isa for Baseline {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    fn from_halves(h: &[u8; 16]) -> [f32; 8] {
        std::array::from_fn(|i| half_to_f32(u16::from_le_bytes([h[2 * i], h[2 * i + 1]])))
    }

    #[inline(always)]
    fn to_halves(x: &[f32; 8]) -> [u8; 16] {
        let mut h = [0; 16];
        for (h, x) in h.chunks_exact_mut(2).zip(x) {
            h.copy_from_slice(&half::f16::from_f32(*x).to_le_bytes());
        }
        h
    }

    #[inline(always)]
    fn look_up(table: &[i8; 16], i: &[u8; 32]) -> [i8; 32] {
        i.map(|i| table[usize::from(i & 15)])
    }

    #[inline(always)]
    fn dot(_: bool, mut acc: [f32; 8], w: &[i8; 32], x: &[i8; 32], low: f32, high: f32) -> [f32; 8] {
        for (l, acc) in acc.iter_mut().enumerate() {
            let sum: i32 = (4 * l..4 * l + 4).map(|j| i32::from(w[j]) * i32::from(x[j])).sum();
            *acc += sum as f32 * if l < 4 { low } else { high };
        }
        acc
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

/// AVX2 with FMA and F16C: x86-64 since 2013.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx2 {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn from_halves(h: &[u8; 16]) -> [f32; 8] {
        // SAFETY: the processor has F16C; both types are plain bytes.
        unsafe { std::mem::transmute(_mm256_cvtph_ps(_mm_loadu_si128(h.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn to_halves(x: &[f32; 8]) -> [u8; 16] {
        // SAFETY: the processor has F16C; both types are plain bytes.
        unsafe {
            let x = _mm256_loadu_ps(x.as_ptr());
            std::mem::transmute(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
    }

    #[inline(always)]
    fn look_up(table: &[i8; 16], i: &[u8; 32]) -> [i8; 32] {
        // SAFETY: the processor has AVX2; loads are unaligned and within the arrays.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            std::mem::transmute(_mm256_shuffle_epi8(table, _mm256_loadu_si256(i.as_ptr().cast())))
        }
    }

    /// Multiplies magnitudes of weights, which fit `u8`, with activations of the product's sign: pairs sum to at most
    /// `2 · 128 · 127`, which fits `i16`.
    #[inline(always)]
    fn dot(unsigned: bool, acc: [f32; 8], w: &[i8; 32], x: &[i8; 32], low: f32, high: f32) -> [f32; 8] {
        // SAFETY: the processor has AVX2 and FMA; loads are unaligned and within the arrays.
        unsafe {
            let w = _mm256_loadu_si256(w.as_ptr().cast());
            let x = _mm256_loadu_si256(x.as_ptr().cast());
            let pairs = if unsigned {
                _mm256_maddubs_epi16(w, x)
            } else {
                _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
            };
            let sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            let scales = _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
            std::mem::transmute(_mm256_fmadd_ps(sums, scales, std::mem::transmute::<[f32; 8], __m256>(acc)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_exact() {
        for h in 0..=u16::MAX {
            let want = half::f16::from_bits(h).to_f32();
            let have = half_to_f32(h);
            assert!(have.to_bits() == want.to_bits() || have.is_nan() && want.is_nan(), "{h:#x}");
        }
    }

    #[test]
    fn the_baseline_can_be_forced_and_is_always_there() {
        assert_eq!(Features::available()[0], Features::baseline());
        assert_eq!(Features::baseline().name(), "baseline");
    }
}
