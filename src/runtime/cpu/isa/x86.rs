//! Instruction sets of x86-64.

mod strips;

use super::super::args::F32;
use super::super::blocks::{Format, Group, Order, XGroup};
use super::super::interleaved::{self, Interleaved, Scales};
use super::super::math::LANES;
use super::super::matmul::{Rows, Tile};
use super::{Isa, Job, WIDE};
use std::arch::x86_64::*;

/// [`Isa::lane_products`] with vectors of `$width` lanes, `$vectors` to 32, and as many sums of 32 lanes at a time in registers as
/// there are still of the numbers `$some`.
macro_rules! lane_products {
    ($width:literal, $vectors:literal, [$($some:literal),*], $load:ident, $store:ident, $mul_add:ident, $set:ident) => {
        #[inline(always)]
        fn lane_products(
            a: &[[f32; WIDE]],
            b: &[F32],
            step_n: usize,
            step_i: usize,
            out: &mut [[f32; WIDE]],
        ) {
            let (mut at, mut rest) = (0, out);
            $(
                let (whole, left) = rest.as_chunks_mut::<$some>();
                for out in whole {
                    some(a, &b[at * step_n..], step_n, step_i, out);
                    at += $some;
                }
                rest = left;
            )*
            debug_assert!(rest.is_empty());

            #[inline(always)]
            fn some<const N: usize>(
                a: &[[f32; WIDE]],
                b: &[F32],
                step_n: usize,
                step_i: usize,
                out: &mut [[f32; WIDE]; N],
            ) {
                let last = (N - 1) * step_n + a.len().saturating_sub(1) * step_i;
                assert!(last < b.len());
                // SAFETY: the processor has these instructions. Loads and stores are unaligned; those of `a` and `out` are within
                // arrays of `$width · $vectors` lanes, those of `b` at `last` at most.
                unsafe {
                    let mut sums = [[$set(0.0); $vectors]; N];
                    for (sums, out) in sums.iter_mut().zip(out.iter()) {
                        for (v, sum) in sums.iter_mut().enumerate() {
                            *sum = $load(out.as_ptr().add($width * v));
                        }
                    }
                    for (i, a) in a.iter().enumerate() {
                        let mut lanes = [$set(0.0); $vectors];
                        for (v, lanes) in lanes.iter_mut().enumerate() {
                            *lanes = $load(a.as_ptr().add($width * v));
                        }
                        for (n, sums) in sums.iter_mut().enumerate() {
                            let b = $set(b.get_unchecked(n * step_n + i * step_i).0);
                            for (sum, lanes) in sums.iter_mut().zip(lanes) {
                                *sum = $mul_add(lanes, b, *sum);
                            }
                        }
                    }
                    for (sums, out) in sums.iter().zip(out) {
                        for (v, sum) in sums.iter().enumerate() {
                            $store(out.as_mut_ptr().add($width * v), *sum);
                        }
                    }
                }
            }
        }
    };
}

/// AVX2 with FMA and F16C: x86-64 since 2013.
pub(in super::super) struct Avx2;

impl Isa for Avx2 {
    const STRIP_TOKENS: usize = 4;

    #[inline(always)]
    fn outline<J: Job>(job: J) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn go<J: Job>(job: J) {
            job.run::<Avx2>();
        }
        // SAFETY: the processor has these.
        unsafe { go(job) }
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn mul_add_lanes(a: &[f32; LANES], b: &[F32; LANES], sums: &mut [f32; LANES]) {
        // SAFETY: the processor has AVX and FMA; loads and stores are unaligned and within the arrays.
        unsafe {
            for at in [0, 8] {
                let (a, b) =
                    (_mm256_loadu_ps(a.as_ptr().add(at)), _mm256_loadu_ps(b.as_ptr().add(at).cast()));
                let sums = sums.as_mut_ptr().add(at);
                _mm256_storeu_ps(sums, _mm256_fmadd_ps(a, b, _mm256_loadu_ps(sums)));
            }
        }
    }

    lane_products!(8, 4, [2, 1], _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps, _mm256_set1_ps);

    #[inline(always)]
    fn from_f16_one(h: [u8; 2]) -> f32 {
        // SAFETY: the processor has F16C.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(h))))) }
    }

    #[inline(always)]
    fn from_f16(h: &[u8; 32], x: &mut [f32; 16]) {
        // SAFETY: the processor has F16C; loads and stores are unaligned and within the arrays.
        unsafe {
            for at in [0, 8] {
                let h = _mm_loadu_si128(h.as_ptr().add(2 * at).cast());
                _mm256_storeu_ps(x.as_mut_ptr().add(at), _mm256_cvtph_ps(h));
            }
        }
    }

    #[inline(always)]
    fn from_f16x8(h: [u16; 8]) -> [f32; 8] {
        // SAFETY: the processor has F16C; all types are plain bytes.
        unsafe { std::mem::transmute(_mm256_cvtph_ps(std::mem::transmute::<[u16; 8], __m128i>(h))) }
    }

    #[inline(always)]
    fn spread(bits: [u8; 4]) -> [u8; 32] {
        // SAFETY: the processor has AVX2; both types are plain bytes.
        unsafe {
            // Byte `l` gets byte `l / 8` of the bits, of which it keeps bit `l % 8`.
            let places =
                _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(bits)), places);
            let mask = _mm256_set1_epi64x(0x8040_2010_0804_0201u64.cast_signed());
            std::mem::transmute(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask))
        }
    }

    #[inline(always)]
    fn to_f16(x: &[f32; 8]) -> [u8; 16] {
        // SAFETY: the processor has F16C; both types are plain bytes.
        unsafe {
            let x = _mm256_loadu_ps(x.as_ptr());
            std::mem::transmute(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
    }

    #[inline(always)]
    fn look_up(table: &[u8; 16], i: &[u8; 32]) -> [u8; 32] {
        // SAFETY: the processor has AVX2; loads are unaligned and within the arrays.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            std::mem::transmute(_mm256_shuffle_epi8(table, _mm256_loadu_si256(i.as_ptr().cast())))
        }
    }

    #[inline(always)]
    fn multiply_strip<F: Interleaved, const N: usize>(
        panel: &[u8],
        scales: &Scales,
        xs: [Rows<'_>; N],
        next: Option<*const u8>,
        sums: &mut [[f32; interleaved::STRIP_ROWS]; N],
    ) {
        strips::multiply_avx2::<F, N>(panel, scales, xs, next, sums);
    }

    /// Pairs sum to at most `2 · 63 · 127` (or `2 · 128 · 127`), which fits `i16`. Signed weights give their signs to the
    /// activations first, as one factor must be unsigned.
    #[inline(always)]
    fn dot<F: Format>(w: &Group, x: &XGroup, acc: &mut [f32; 16]) {
        // SAFETY: the processor has AVX2 and FMA; loads and stores are unaligned and within the arrays, of which those of bytes
        // are of 8 · 32.
        unsafe {
            let d = _mm256_loadu_ps(x.d.as_ptr());
            let low = _mm256_mul_ps(_mm256_loadu_ps(w.scale[0].as_ptr()), d);
            let high = _mm256_mul_ps(_mm256_loadu_ps(w.scale[1].as_ptr()), d);
            let at = acc.as_mut_ptr();
            let mut sums = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
            for (i, b) in F::ORDER.into_iter().enumerate() {
                let q = _mm256_loadu_si256(w.q.as_ptr().cast::<__m256i>().add(i));
                let x = _mm256_loadu_si256(x.q.as_ptr().cast::<__m256i>().add(i));
                let pairs = if F::SIGNED {
                    _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q))
                } else {
                    _mm256_maddubs_epi16(q, x)
                };
                let fours = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                let lane = _mm256_set1_epi32(b as i32);
                let mut scale = _mm256_permutevar8x32_ps(low, lane);
                if F::SPLIT {
                    scale = _mm256_blend_ps::<0xf0>(scale, _mm256_permutevar8x32_ps(high, lane));
                }
                sums[i % 2] = _mm256_fmadd_ps(fours, scale, sums[i % 2]);
            }
            if !F::SIGNED {
                let min = [_mm256_loadu_ps(w.min[0].as_ptr()), _mm256_loadu_ps(w.min[1].as_ptr())];
                let s = [_mm256_loadu_ps(x.s[0].as_ptr()), _mm256_loadu_ps(x.s[1].as_ptr())];
                if F::SPLIT {
                    sums[0] = _mm256_fnmadd_ps(min[0], s[0], sums[0]);
                    sums[1] = _mm256_fnmadd_ps(min[1], s[1], sums[1]);
                } else {
                    sums[0] = _mm256_fnmadd_ps(min[0], _mm256_add_ps(s[0], s[1]), sums[0]);
                }
            }
            _mm256_storeu_ps(at, sums[0]);
            _mm256_storeu_ps(at.add(8), sums[1]);
        }
    }
}

/// AVX-512 with byte instructions, 256-bit forms and VNNI: servers since 2019.
pub(in super::super) struct Avx512;

impl Isa for Avx512 {
    const TILE_TOKENS: Option<usize> = Some(16);
    const STRIPS_TILE_TOKENS: Option<usize> = Some(24);
    const STRIP_TOKENS: usize = 8;

    #[inline(always)]
    fn outline<J: Job>(job: J) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn go<J: Job>(job: J) {
            job.run::<Avx512>();
        }
        // SAFETY: the processor has these.
        unsafe { go(job) }
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn mul_add_lanes(a: &[f32; LANES], b: &[F32; LANES], sums: &mut [f32; LANES]) {
        // SAFETY: the processor has AVX-512; loads and stores are unaligned and within the arrays.
        unsafe {
            let (a, b) = (_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr().cast()));
            let sum = _mm512_fmadd_ps(a, b, _mm512_loadu_ps(sums.as_ptr()));
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }

    #[inline(always)]
    fn sum(lanes: &[f32; LANES]) -> f32 {
        // SAFETY: the processor has AVX-512; the load is unaligned and within the array.
        unsafe {
            let x = _mm512_loadu_ps(lanes.as_ptr());
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    lane_products!(16, 2, [8, 4, 2, 1], _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps, _mm512_set1_ps);

    #[inline(always)]
    fn from_f16_one(h: [u8; 2]) -> f32 {
        Avx2::from_f16_one(h)
    }

    #[inline(always)]
    fn from_f16(h: &[u8; 32], x: &mut [f32; 16]) {
        // SAFETY: the processor has AVX-512; load and store are unaligned and within the arrays.
        unsafe {
            let h = _mm256_loadu_si256(h.as_ptr().cast());
            _mm512_storeu_ps(x.as_mut_ptr(), _mm512_cvtph_ps(h));
        }
    }

    #[inline(always)]
    fn from_f16x8(h: [u16; 8]) -> [f32; 8] {
        Avx2::from_f16x8(h)
    }

    #[inline(always)]
    fn spread(bits: [u8; 4]) -> [u8; 32] {
        // SAFETY: the processor has AVX-512 with byte instructions; both types are plain bytes.
        unsafe { std::mem::transmute(_mm256_movm_epi8(u32::from_le_bytes(bits))) }
    }

    #[inline(always)]
    fn to_f16(x: &[f32; 8]) -> [u8; 16] {
        Avx2::to_f16(x)
    }

    #[inline(always)]
    fn look_up(table: &[u8; 16], i: &[u8; 32]) -> [u8; 32] {
        Avx2::look_up(table, i)
    }

    #[inline(always)]
    fn multiply_strip<F: Interleaved, const N: usize>(
        panel: &[u8],
        scales: &Scales,
        xs: [Rows<'_>; N],
        next: Option<*const u8>,
        sums: &mut [[f32; interleaved::STRIP_ROWS]; N],
    ) {
        strips::multiply_avx512::<F, N>(panel, scales, xs, next, sums);
    }

    /// Two sub-blocks at a time. Signed weights are raised by 128, which their minima make up for.
    #[inline(always)]
    fn dot<F: Format>(w: &Group, x: &XGroup, acc: &mut [f32; 16]) {
        /// Which products of scales the lanes of two sub-blocks want: low ones are in 0..8, high ones in 8..16.
        const fn lanes(order: Order, split: bool) -> [[i32; 16]; 4] {
            let mut lanes = [[0; 16]; 4];
            let mut l = 0;
            while l < 64 {
                let high = if split && l % 8 >= 4 { 8 } else { 0 };
                lanes[l / 16][l % 16] = order[l / 8] as i32 + high;
                l += 1;
            }
            lanes
        }
        // SAFETY: the processor has AVX-512 and VNNI; loads and stores are unaligned and within the arrays, of which those of
        // scales and sums are of 2 · 8.
        unsafe {
            let d = _mm256_loadu_ps(x.d.as_ptr());
            let scale = [_mm256_loadu_ps(w.scale[0].as_ptr()), _mm256_loadu_ps(w.scale[1].as_ptr())];
            let low = _mm256_mul_ps(scale[0], d);
            let scales = if F::SPLIT {
                _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), _mm256_mul_ps(scale[1], d))
            } else {
                _mm512_castps256_ps512(low)
            };
            let lanes = const { lanes(F::ORDER, F::SPLIT) };
            let mut sums = [_mm512_setzero_ps(); 2];
            for i in 0..4 {
                let mut q = _mm512_loadu_si512(w.q[i].as_ptr().cast());
                if F::SIGNED {
                    q = _mm512_xor_si512(q, _mm512_set1_epi8(-128));
                }
                let x = _mm512_loadu_si512(x.q[i].as_ptr().cast());
                let fours = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x));
                let lanes = _mm512_loadu_si512(lanes[i].as_ptr().cast());
                let scale = _mm512_permutexvar_ps(lanes, scales);
                sums[i % 2] = if i < 2 {
                    _mm512_mul_ps(fours, scale)
                } else {
                    _mm512_fmadd_ps(fours, scale, sums[i % 2])
                };
            }
            let s = [_mm256_loadu_ps(x.s[0].as_ptr()), _mm256_loadu_ps(x.s[1].as_ptr())];
            let (min, s) = if F::SPLIT {
                let min = _mm512_loadu_ps(w.min.as_ptr().cast());
                (min, _mm512_insertf32x8::<1>(_mm512_castps256_ps512(s[0]), s[1]))
            } else {
                let min = if F::SIGNED {
                    _mm256_mul_ps(scale[0], _mm256_set1_ps(128.0))
                } else {
                    _mm256_loadu_ps(w.min[0].as_ptr())
                };
                (_mm512_zextps256_ps512(min), _mm512_zextps256_ps512(_mm256_add_ps(s[0], s[1])))
            };
            // Groups of a row wait for each other in the last addition alone.
            sums[0] = _mm512_add_ps(_mm512_fnmadd_ps(min, s, sums[0]), sums[1]);
            _mm512_storeu_ps(acc.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(acc.as_ptr()), sums[0]));
        }
    }

    /// A register holds four columns of 16 rows; four activations are broadcast to meet them. For six tokens, sums
    /// take 24 registers of 32.
    #[inline(always)]
    fn multiply_tile<const N: usize, const SPLIT: bool>(
        tile: &Tile,
        xs: [Rows<'_>; N],
        out: &mut [[f32; 32]; N],
    ) {
        #[inline(always)]
        fn load(bytes: &[u8; 64]) -> __m512i {
            // SAFETY: as below.
            unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
        }
        #[inline(always)]
        fn floats(floats: &[f32; 16]) -> __m512 {
            // SAFETY: as below.
            unsafe { _mm512_loadu_ps(floats.as_ptr()) }
        }
        let blocks = tile.blocks.len();
        assert!(xs.iter().all(|x| x.blocks.len() >= blocks && (!SPLIT || x.halves.len() >= blocks)));
        // SAFETY: the processor has AVX-512 and VNNI. Loads need no alignment; those of activations are within their `blocks`
        // blocks, as asserted, the others within arrays.
        unsafe {
            let mut total = [[_mm512_setzero_ps(); 2]; N];
            for (b, block) in tile.blocks.iter().enumerate() {
                let steps = if SPLIT { 2 } else { 1 };
                for h in 0..steps {
                    let mut sums = [[_mm512_setzero_si512(); 2]; N];
                    for j in h * 4..if SPLIT { h * 4 + 4 } else { 8 } {
                        let w = [load(&block.q[j][0]), load(&block.q[j][1])];
                        for n in 0..N {
                            let q = xs[n].blocks.get_unchecked(b).q.as_ptr().add(4 * j);
                            let x = _mm512_set1_epi32(q.cast::<i32>().read_unaligned());
                            for r in 0..2 {
                                sums[n][r] = _mm512_dpbusd_epi32(sums[n][r], w[r], x);
                            }
                        }
                    }
                    let scale = [floats(&block.scale[h][0]), floats(&block.scale[h][1])];
                    let min = [floats(&block.min[h][0]), floats(&block.min[h][1])];
                    for n in 0..N {
                        let x = xs[n].blocks.get_unchecked(b);
                        let (d, s) =
                            (_mm512_set1_ps(x.d), if SPLIT { xs[n].halves.get_unchecked(b)[h] } else { x.s });
                        let s = _mm512_set1_ps(s);
                        for r in 0..2 {
                            let sum = _mm512_cvtepi32_ps(sums[n][r]);
                            total[n][r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale[r], d), total[n][r]);
                            total[n][r] = _mm512_fnmadd_ps(min[r], s, total[n][r]);
                        }
                    }
                }
            }
            for n in 0..N {
                _mm512_storeu_ps(out[n].as_mut_ptr(), total[n][0]);
                _mm512_storeu_ps(out[n].as_mut_ptr().add(16), total[n][1]);
            }
        }
    }
}
