//! [`Isa::multiply_strip`](super::Isa::multiply_strip): products of interleaved rows, whose columns are met by activations that are
//! broadcast, four at a time.

use super::super::super::args::Q8Block;
use super::super::super::interleaved::{Interleaved, LOW, Q6K_HIGH, STRIP_ROWS, Scales, prefetch_eighth};
use super::super::super::matmul::Rows;
use std::arch::x86_64::*;

/// Columns `4j..4j + 4` of a block of activations, in every lane of a vector.
macro_rules! broadcast {
    ($set:ident, $x:expr, $j:expr) => {
        $set($x.q.as_ptr().add(4 * $j).cast::<i32>().read_unaligned())
    };
}

/// What a panel and the activations that it meets must have, so that the functions below stay within them.
#[inline(always)]
fn assert_within<F: Interleaved, const N: usize>(panel: &[u8], xs: &[Rows<'_>; N]) {
    const { assert!(F::PANEL >= LOW && (!F::SPLIT || F::PANEL >= Q6K_HIGH + 1024)) };
    assert!(panel.len() >= F::PANEL);
    assert!(xs.iter().all(|x| x.blocks.len() >= 8 && (!F::SPLIT || x.halves.len() >= 8)));
}

/// What minima are multiplied with.
///
/// # Safety
/// As [`assert_within`] says of `x`; `b < 8` and `h < 2`.
#[inline(always)]
unsafe fn sum_of<F: Interleaved>(x: &Rows<'_>, block: &Q8Block, b: usize, h: usize) -> f32 {
    // SAFETY: there are eight halves, as the caller promised.
    if F::SPLIT { unsafe { x.halves.get_unchecked(b)[h] } } else { block.s }
}

/// Vectors of 16 rows. Of up to 8 tokens, sums take 16 registers of 32.
#[inline(always)]
pub fn multiply_avx512<F: Interleaved, const N: usize>(
    panel: &[u8],
    scales: &Scales,
    xs: [Rows<'_>; N],
    next: Option<*const u8>,
    sums: &mut [[f32; STRIP_ROWS]; N],
) {
    /// Columns `8v..8v + 4` and `8v + 4..8v + 8` of 32.
    ///
    /// # Safety
    /// `panel` is a panel, `b < 8` and `v < 4`.
    #[inline(always)]
    unsafe fn quads<F: Interleaved>(panel: *const u8, b: usize, v: usize) -> [__m512i; 2] {
        // SAFETY: the processor has AVX-512; both loads are unaligned and within the panel.
        unsafe {
            let nibble = _mm512_set1_epi8(15);
            let low = _mm512_loadu_si512(panel.add(64 * (4 * b + v)).cast());
            let mut q =
                [_mm512_and_si512(low, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(low), nibble)];
            if F::SPLIT {
                let pair = _mm512_set1_epi8(0x30);
                let high = _mm512_loadu_si512(panel.add(Q6K_HIGH + 64 * (2 * b + v / 2)).cast());
                let high = if v.is_multiple_of(2) {
                    [_mm512_slli_epi16::<4>(high), _mm512_slli_epi16::<2>(high)]
                } else {
                    [high, _mm512_srli_epi16::<2>(high)]
                };
                for (q, high) in q.iter_mut().zip(high) {
                    *q = _mm512_ternarylogic_epi32::<0xf8>(*q, high, pair);
                }
            }
            q
        }
    }

    assert_within::<F, N>(panel, &xs);
    // SAFETY: the processor has AVX-512 and VNNI. Loads need no alignment; those of weights and activations are within what was
    // checked, the others within arrays.
    unsafe {
        let mut total = [_mm512_setzero_ps(); N];
        for (total, sums) in total.iter_mut().zip(sums.iter()) {
            *total = _mm512_loadu_ps(sums.as_ptr());
        }
        let d = _mm512_loadu_ps(scales.d.as_ptr());
        let dmin = _mm512_loadu_ps(scales.dmin.as_ptr());
        let steps = if F::SPLIT { 2 } else { 1 };
        for b in 0..8 {
            prefetch_eighth::<F>(next, b);
            for h in 0..steps {
                let mut dots = [_mm512_setzero_si512(); N];
                for v in 4 / steps * h..4 / steps * (h + 1) {
                    let q = quads::<F>(panel.as_ptr(), b, v);
                    for (dot, x) in dots.iter_mut().zip(&xs) {
                        let x = x.blocks.get_unchecked(b);
                        *dot = _mm512_dpbusd_epi32(*dot, q[0], broadcast!(_mm512_set1_epi32, x, 2 * v));
                        *dot = _mm512_dpbusd_epi32(*dot, q[1], broadcast!(_mm512_set1_epi32, x, 2 * v + 1));
                    }
                }
                let scale = _mm_loadu_si128(scales.scale[steps * b + h].as_ptr().cast());
                let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale));
                let min = if F::SPLIT {
                    scale
                } else {
                    let min = _mm_loadu_si128(scales.min[b].as_ptr().cast());
                    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(min))
                };
                let (scale, min) = (_mm512_mul_ps(scale, d), _mm512_mul_ps(min, dmin));
                for ((total, dot), x) in total.iter_mut().zip(dots).zip(&xs) {
                    let block = x.blocks.get_unchecked(b);
                    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
                    *total = _mm512_fmadd_ps(scaled, _mm512_set1_ps(block.d), *total);
                    *total = _mm512_fnmadd_ps(min, _mm512_set1_ps(sum_of::<F>(x, block, b, h)), *total);
                }
            }
        }
        for (total, sums) in total.iter().zip(sums) {
            _mm512_storeu_ps(sums.as_mut_ptr(), *total);
        }
    }
}

/// Vectors of 8 rows, two of them side by side for what they share.
#[inline(always)]
pub fn multiply_avx2<F: Interleaved, const N: usize>(
    panel: &[u8],
    scales: &Scales,
    xs: [Rows<'_>; N],
    next: Option<*const u8>,
    sums: &mut [[f32; STRIP_ROWS]; N],
) {
    /// Columns `8v..8v + 4` and `8v + 4..8v + 8` of 32, of rows `8w..8w + 8`.
    ///
    /// # Safety
    /// `panel` is a panel, `b < 8`, `v < 4` and `w < 2`.
    #[inline(always)]
    unsafe fn quads<F: Interleaved>(panel: *const u8, b: usize, v: usize, w: usize) -> [__m256i; 2] {
        // SAFETY: the processor has AVX2; both loads are unaligned and within the panel.
        unsafe {
            let nibble = _mm256_set1_epi8(15);
            let low = _mm256_loadu_si256(panel.add(64 * (4 * b + v) + 32 * w).cast());
            let mut q =
                [_mm256_and_si256(low, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(low), nibble)];
            if F::SPLIT {
                let pair = _mm256_set1_epi8(0x30);
                let high = _mm256_loadu_si256(panel.add(Q6K_HIGH + 64 * (2 * b + v / 2) + 32 * w).cast());
                let high = if v.is_multiple_of(2) {
                    [_mm256_slli_epi16::<4>(high), _mm256_slli_epi16::<2>(high)]
                } else {
                    [high, _mm256_srli_epi16::<2>(high)]
                };
                for (q, high) in q.iter_mut().zip(high) {
                    *q = _mm256_or_si256(*q, _mm256_and_si256(high, pair));
                }
            }
            q
        }
    }

    assert_within::<F, N>(panel, &xs);
    // SAFETY: the processor has AVX2 and FMA. Loads need no alignment; those of weights and activations are within what was checked,
    // the others within arrays.
    unsafe {
        let steps = if F::SPLIT { 2 } else { 1 };
        // A scale in both 16-bit halves of the lane of its row: each byte comes to the upper half and is shifted down with its sign.
        let spread = _mm256_setr_epi8(
            -1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6,
            -1, 7, -1, 7,
        );
        let mut total = [[_mm256_setzero_ps(); 2]; N];
        let mut least = [[_mm256_setzero_ps(); 2]; N];
        for b in 0..8 {
            prefetch_eighth::<F>(next, b);
            for h in 0..steps {
                let s = steps * b + h;
                let mut scale = [_mm256_setzero_si256(); 2];
                for (w, scale) in scale.iter_mut().enumerate() {
                    let eight = scales.scale[s].as_ptr().add(8 * w).cast::<i64>().read_unaligned();
                    let eight = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), spread);
                    *scale = _mm256_srai_epi16::<8>(eight);
                }
                // Of 32 columns with weights below 16, or of 8 with weights below 64, 16 bits hold the sums of products.
                let mut pairs = [[_mm256_setzero_si256(); 2]; N];
                let mut dots = [[_mm256_setzero_si256(); 2]; N];
                for v in 4 / steps * h..4 / steps * (h + 1) {
                    let q = [quads::<F>(panel.as_ptr(), b, v, 0), quads::<F>(panel.as_ptr(), b, v, 1)];
                    for (n, x) in xs.iter().enumerate() {
                        let x = x.blocks.get_unchecked(b);
                        let x = [
                            broadcast!(_mm256_set1_epi32, x, 2 * v),
                            broadcast!(_mm256_set1_epi32, x, 2 * v + 1),
                        ];
                        for w in 0..2 {
                            let sum = _mm256_add_epi16(
                                _mm256_maddubs_epi16(q[w][0], x[0]),
                                _mm256_maddubs_epi16(q[w][1], x[1]),
                            );
                            if F::SPLIT {
                                dots[n][w] = _mm256_add_epi32(dots[n][w], _mm256_madd_epi16(sum, scale[w]));
                            } else {
                                pairs[n][w] = _mm256_add_epi16(pairs[n][w], sum);
                            }
                        }
                    }
                }
                let mut min = [_mm256_setzero_ps(); 2];
                for (w, min) in min.iter_mut().enumerate() {
                    let eight = if F::SPLIT {
                        _mm256_cvtepi8_epi32(_mm_loadl_epi64(scales.scale[s].as_ptr().add(8 * w).cast()))
                    } else {
                        _mm256_cvtepu8_epi32(_mm_loadl_epi64(scales.min[b].as_ptr().add(8 * w).cast()))
                    };
                    *min = _mm256_cvtepi32_ps(eight);
                }
                for (n, x) in xs.iter().enumerate() {
                    let block = x.blocks.get_unchecked(b);
                    let d = _mm256_set1_ps(block.d);
                    let sum = _mm256_set1_ps(sum_of::<F>(x, block, b, h));
                    for w in 0..2 {
                        let dot =
                            if F::SPLIT { dots[n][w] } else { _mm256_madd_epi16(pairs[n][w], scale[w]) };
                        total[n][w] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), d, total[n][w]);
                        least[n][w] = _mm256_fmadd_ps(min[w], sum, least[n][w]);
                    }
                }
            }
        }
        for n in 0..N {
            for w in 0..2 {
                let at = sums[n].as_mut_ptr().add(8 * w);
                let d = _mm256_loadu_ps(scales.d.as_ptr().add(8 * w));
                let dmin = _mm256_loadu_ps(scales.dmin.as_ptr().add(8 * w));
                let sum = _mm256_fmadd_ps(total[n][w], d, _mm256_loadu_ps(at));
                _mm256_storeu_ps(at, _mm256_fnmadd_ps(least[n][w], dmin, sum));
            }
        }
    }
}
