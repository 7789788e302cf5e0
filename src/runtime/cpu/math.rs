//! Functions of numbers that several kernels share.

use super::args::{F32, Q8Block};
use super::isa::Isa;
use std::ops::Range;

/// Lanes in which dot products are summed.
pub(super) const LANES: usize = 16;

/// Adding this to a float below 2^22 rounds it to an integer, halves to even, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x` to 2e-7 relative; 0 below -87.3 and infinite above 88.3. Branch-free, so that loops over it vectorise.
///
/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`, and `e^r` by its Taylor series, whose rest is below 1e-8.
#[inline(always)]
pub(super) fn exp<I: Isa>(x: f32) -> f32 {
    /// ln 2 in two parts, the first with few enough bits for `n · LN2_HIGH` to be exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.3;
    let shifted = I::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = I::mul_add(n, -LN2_LOW, I::mul_add(n, -LN2_HIGH, x));
    let mut sum = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = I::mul_add(sum, r, c);
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let y = sum * power;
    if x < LOWEST {
        0.0
    } else if x > HIGHEST {
        f32::INFINITY
    } else {
        y
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(super) fn silu<I: Isa>(x: f32) -> f32 {
    x / (1.0 + exp::<I>(-x))
}

/// The sum of the lanes, by halves.
#[inline(always)]
pub(super) fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}

/// Adds `Σ a·b` to the lanes; `a` and `b` are equally long.
#[inline(always)]
pub(super) fn dot_lanes<I: Isa>(acc: &mut [f32; LANES], a: &[f32], b: &[f32]) {
    let (whole_a, rest_a) = a.as_chunks::<LANES>();
    let (whole_b, rest_b) = bytemuck::cast_slice::<f32, F32>(b).as_chunks::<LANES>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        I::mul_add_lanes(a, b, acc);
    }
    for ((a, b), lane) in rest_a.iter().zip(rest_b).zip(acc) {
        *lane = I::mul_add(*a, b.0, *lane);
    }
}

/// `Σ x²` in double precision.
#[inline(always)]
pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (whole, rest) = x.as_chunks::<8>();
    for x in whole {
        for l in 0..8 {
            lanes[l] += f64::from(x[l]) * f64::from(x[l]);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
}

/// What RMSNorm multiplies with, for `n` elements whose squares sum to `squares`.
#[inline(always)]
pub(super) fn rms_factor(squares: f64, n: usize, eps: f32) -> f32 {
    (1.0 / (squares / n as f64 + f64::from(eps)).sqrt()) as f32
}

/// One block of [`crate::ir::DType::Q8Act`]: `d = max|x| / 127`, `q = x / d` rounded half away from zero, `s = d · Σq`.
/// A block of zeros has `d = 0`; one with a NaN or an infinity becomes all NaN.
#[inline(always)]
pub(super) fn quantise(x: &[f32; 32]) -> Q8Block {
    // Magnitudes are ordered as their bits are, with infinity and then NaN above all else.
    let largest = x.iter().fold(0, |m, x| m.max(x.abs().to_bits()));
    let d = f32::from_bits(largest) / 127.0;
    if d == 0.0 || !d.is_finite() {
        return Q8Block { d, s: 0.0 * d, q: [0; 32] };
    }
    let (mut q, mut total) = ([0i8; 32], 0);
    for (q, x) in q.iter_mut().zip(x) {
        // Only a subnormal d is so coarse that the quotient exceeds 127.
        let exact = (x / d).clamp(-127.0, 127.0);
        let mut whole = (exact + ROUND) - ROUND;
        // That rounds halves to even; those that went towards zero go back.
        let rest = exact - whole;
        whole += if rest == 0.5 && exact > 0.0 { 1.0 } else { 0.0 };
        whole -= if rest == -0.5 && exact < 0.0 { 1.0 } else { 0.0 };
        let rounded = (whole + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        *q = rounded as i8;
        total += rounded;
    }
    Q8Block { d, s: d * total as f32, q }
}

/// The positions that a token sees: its own and those before, of which only the last `window`. Before the first, none.
#[inline(always)]
pub(super) fn seen(position: i32, window: Option<usize>) -> Range<usize> {
    let end = usize::try_from(i64::from(position) + 1).unwrap_or(0);
    window.map_or(0, |window| end.saturating_sub(window))..end
}

#[cfg(test)]
mod tests {
    use super::super::isa::Baseline;
    use super::*;

    #[test]
    fn exp_is_accurate_and_saturates() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3 + 1e-5;
            let (have, want) = (f64::from(exp::<Baseline>(x)), f64::from(x).exp());
            assert!((have / want - 1.0).abs() < 2.5e-7, "e^{x}: {have} not {want}");
        }
        assert_eq!(exp::<Baseline>(0.0), 1.0);
        assert_eq!(exp::<Baseline>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<Baseline>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<Baseline>(f32::NAN).is_nan());
    }

    #[test]
    fn silu_has_its_limits() {
        assert_eq!(silu::<Baseline>(0.0), 0.0);
        assert_eq!(silu::<Baseline>(1000.0), 1000.0);
        assert_eq!(silu::<Baseline>(-1000.0), 0.0);
        assert!((silu::<Baseline>(1.0) - 0.731_058_6).abs() < 1e-6);
    }

    #[test]
    fn quantising_rounds_half_away_from_zero() {
        let mut x = [0f32; 32];
        (x[0], x[1], x[2], x[3]) = (127.0, 2.5, -2.5, -127.0);
        let Q8Block { d, s, q } = quantise(&x);
        assert_eq!((d, s), (1.0, 0.0));
        assert_eq!(q[..5], [127, 3, -3, -127, 0]);
    }

    #[test]
    fn quantising_bears_zeros_and_numbers_that_are_none() {
        assert_eq!({ quantise(&[0.0; 32]).d }, 0.0);
        let mut x = [1.0; 32];
        x[17] = f32::NAN;
        assert!({ quantise(&x).d }.is_nan());
        x[17] = f32::NEG_INFINITY;
        assert_eq!({ quantise(&x).d }, f32::INFINITY);
        assert!({ quantise(&x).s }.is_nan());
        assert_eq!(quantise(&[f32::from_bits(180); 32]).q, [127; 32]);
    }

    #[test]
    fn tokens_see_back_as_far_as_their_window() {
        assert_eq!((seen(5, None), seen(5, Some(2)), seen(5, Some(9))), (0..6, 4..6, 0..6));
        assert_eq!((seen(0, None), seen(0, Some(1))), (0..1, 0..1));
        assert_eq!(seen(i32::MAX, Some(1)), i32::MAX as usize..1 << 31);
        assert!(
            [-1, -2, i32::MIN].into_iter().all(|p| seen(p, None).is_empty() && seen(p, Some(3)).is_empty())
        );
    }

    #[test]
    fn dots_take_any_length() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let mut acc = [0.0; LANES];
        dot_lanes::<Baseline>(&mut acc, &a, &a);
        assert_eq!(sum(acc), (0..37).map(|i| (i * i) as f32).sum::<f32>());
        assert_eq!(sum_of_squares(&a), f64::from(sum(acc)));
    }
}
