//! The reference dequantiser: slow, obvious, and what every fast kernel is tested against.
//!
//! It computes in f32, in the order of the `gguf` Python package's `quants.py`, and agrees with it
//! bit for bit (`scripts/dequant_goldens.py`).

use super::blocks::*;
use crate::ir::DType;
use bytemuck::{Pod, Zeroable};
use thiserror::Error;

/// Why nothing was dequantised or quantised.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DequantError {
    #[error("{0} does not hold floating-point values")]
    NotFloat(DType),
    #[error("{elements} elements are not a whole number of {dtype} blocks of {}", dtype.block_len())]
    PartialBlock { dtype: DType, elements: usize },
    #[error("{elements} elements of {dtype} take {expected} bytes, but {given} are given")]
    Length { dtype: DType, elements: usize, expected: usize, given: usize },
}

/// Writes the values of `bytes`, whole blocks of `dtype`, to `out`.
///
/// # Errors
/// Lengths that do not fit each other or are no whole blocks; integers.
pub fn dequantise(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), DequantError> {
    check_lengths(dtype, out.len(), bytes.len())?;
    match dtype {
        DType::F32 => each(bytes, out, |b: &F32Le, y: &mut [f32; 1]| y[0] = b.get()),
        DType::F16 => each(bytes, out, |b: &F16Le, y: &mut [f32; 1]| y[0] = b.get()),
        DType::BF16 => each(bytes, out, |b: &Bf16Le, y: &mut [f32; 1]| y[0] = b.get()),
        DType::I32 => return Err(DequantError::NotFloat(dtype)),
        DType::Q4_0 => each(bytes, out, q4_0),
        DType::Q4_1 => each(bytes, out, q4_1),
        DType::Q5_0 => each(bytes, out, q5_0),
        DType::Q5_1 => each(bytes, out, q5_1),
        DType::Q8_0 => each(bytes, out, q8_0),
        DType::Q2_K => each(bytes, out, q2_k),
        DType::Q3_K => each(bytes, out, q3_k),
        DType::Q4_K => each(bytes, out, q4_k),
        DType::Q5_K => each(bytes, out, q5_k),
        DType::Q6_K => each(bytes, out, q6_k),
        DType::MXFP4 => each(bytes, out, mxfp4),
        DType::Q8Act => each(bytes, out, q8_act),
        DType::Q16Act => each(bytes, out, q16_act),
    }
    Ok(())
}

/// Quantises activations to [`DType::Q8Act`] blocks: `d = max|x| / 127`, `q = x / d` rounded half away
/// from zero, `s = d · Σq`. A block of zeros has `d = 0`; one with a NaN or an infinity becomes all NaN.
///
/// # Errors
/// Lengths that do not fit each other or are no whole blocks.
pub fn quantise_q8_act(x: &[f32], out: &mut [u8]) -> Result<(), DequantError> {
    check_lengths(DType::Q8Act, x.len(), out.len())?;
    let (inputs, _) = x.as_chunks::<32>();
    for (x, block) in inputs.iter().zip(bytemuck::cast_slice_mut(out)) {
        *block = quantised(x);
    }
    Ok(())
}

/// Steps of what [`DType::Q8Act`] leaves in one of its own: that is half of it at most, which 127 of these are.
const FINE_STEPS: f32 = 254.0;

/// Quantises activations to [`DType::Q16Act`] blocks: as [`quantise_q8_act`] does, and what that leaves in steps of `d / 254` (which says less where
/// that is no normal number).
///
/// # Errors
/// Lengths that do not fit each other or are no whole blocks.
pub fn quantise_q16_act(x: &[f32], out: &mut [u8]) -> Result<(), DequantError> {
    check_lengths(DType::Q16Act, x.len(), out.len())?;
    let (inputs, _) = x.as_chunks::<32>();
    for (x, block) in inputs.iter().zip(bytemuck::cast_slice_mut(out)) {
        let BlockQ8Act { d, q, .. } = quantised(x);
        let step = d.get() / FINE_STEPS;
        let left = |i: usize| x[i] - d.get() * f32::from(q[i]);
        // Where a step is no number above zero, nothing is left that one could say.
        let is_step = step > 0.0 && step.is_finite();
        let r = std::array::from_fn(|i| match is_step {
            true => (left(i) / step).round().clamp(-127.0, 127.0) as i8,
            false => 0,
        });
        let total: i32 = q.iter().zip(&r).map(|(&q, &r)| 254 * i32::from(q) + i32::from(r)).sum();
        *block = BlockQ16Act { d, s: F32Le::new(step * total as f32), q, r };
    }
    Ok(())
}

fn quantised(x: &[f32; 32]) -> BlockQ8Act {
    // Not f32::max, which would drop a NaN.
    let largest = x.iter().fold(0f32, |m, v| if v.abs() > m || v.is_nan() { v.abs() } else { m });
    let d = largest / 127.0;
    let mut block = BlockQ8Act::zeroed();
    if d != 0.0 {
        // Only a subnormal d is so coarse that the quotient exceeds 127.
        block.q = x.map(|v| (v / d).round().clamp(-127.0, 127.0) as i8);
        let sum: i32 = block.q.iter().map(|&q| i32::from(q)).sum();
        block.d = F32Le::new(d);
        block.s = F32Le::new(d * sum as f32);
    }
    block
}

fn check_lengths(dtype: DType, elements: usize, given: usize) -> Result<(), DequantError> {
    if !elements.is_multiple_of(dtype.block_len()) {
        return Err(DequantError::PartialBlock { dtype, elements });
    }
    let expected = elements / dtype.block_len() * dtype.block_bytes();
    if given != expected {
        return Err(DequantError::Length { dtype, elements, expected, given });
    }
    Ok(())
}

fn each<B: Pod, const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn(&B, &mut [f32; N])) {
    let (outputs, _) = out.as_chunks_mut::<N>();
    for (block, y) in bytemuck::cast_slice::<u8, B>(bytes).iter().zip(outputs) {
        f(block, y);
    }
}

fn q4_0(b: &BlockQ4_0, y: &mut [f32; 32]) {
    *y = std::array::from_fn(|i| b.d.get() * (f32::from(b.q(i)) - 8.0));
}

fn q4_1(b: &BlockQ4_1, y: &mut [f32; 32]) {
    *y = std::array::from_fn(|i| b.d.get() * f32::from(b.q(i)) + b.m.get());
}

fn q5_0(b: &BlockQ5_0, y: &mut [f32; 32]) {
    *y = std::array::from_fn(|i| b.d.get() * (f32::from(b.q(i)) - 16.0));
}

fn q5_1(b: &BlockQ5_1, y: &mut [f32; 32]) {
    *y = std::array::from_fn(|i| b.d.get() * f32::from(b.q(i)) + b.m.get());
}

fn q8_0(b: &BlockQ8_0, y: &mut [f32; 32]) {
    *y = b.q.map(|q| b.d.get() * f32::from(q));
}

fn q2_k(b: &BlockQ2K, y: &mut [f32; 256]) {
    *y = std::array::from_fn(|i| {
        let (scale, min) = (b.scales[i / 16] & 15, b.scales[i / 16] >> 4);
        (b.d.get() * f32::from(scale)) * f32::from(b.q(i)) - b.dmin.get() * f32::from(min)
    });
}

fn q3_k(b: &BlockQ3K, y: &mut [f32; 256]) {
    *y = std::array::from_fn(|i| (b.d.get() * f32::from(b.scale(i / 16))) * f32::from(b.q(i)));
}

fn q4_k(b: &BlockQ4K, y: &mut [f32; 256]) {
    *y = std::array::from_fn(|i| {
        let (scale, min) = scale_min(&b.scales, i / 32);
        (b.d.get() * f32::from(scale)) * f32::from(b.q(i)) - b.dmin.get() * f32::from(min)
    });
}

fn q5_k(b: &BlockQ5K, y: &mut [f32; 256]) {
    *y = std::array::from_fn(|i| {
        let (scale, min) = scale_min(&b.scales, i / 32);
        (b.d.get() * f32::from(scale)) * f32::from(b.q(i)) - b.dmin.get() * f32::from(min)
    });
}

fn q6_k(b: &BlockQ6K, y: &mut [f32; 256]) {
    *y = std::array::from_fn(|i| (b.d.get() * f32::from(b.scales[i / 16])) * f32::from(b.q(i)));
}

fn mxfp4(b: &BlockMXFP4, y: &mut [f32; 32]) {
    *y = std::array::from_fn(|i| b.half_d() * f32::from(b.q(i)));
}

fn q8_act(b: &BlockQ8Act, y: &mut [f32; 32]) {
    *y = b.q.map(|q| b.d.get() * f32::from(q));
}

fn q16_act(b: &BlockQ16Act, y: &mut [f32; 32]) {
    let step = b.d.get() / FINE_STEPS;
    *y = std::array::from_fn(|i| step * (FINE_STEPS * f32::from(b.q[i]) + f32::from(b.r[i])));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
        dequantise(dtype, bytes, &mut out).unwrap();
        out
    }

    /// Equal bits; for NaN, whose sign and payload depend on the machine, being NaN.
    fn assert_same(dtype: DType, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{dtype}");
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            let same = f.to_bits() == e.to_bits() || f.is_nan() && e.is_nan();
            assert!(same, "{dtype} element {i}: {f:e} instead of {e:e}");
        }
    }

    #[test]
    fn agrees_with_the_gguf_package() {
        macro_rules! golden {
            ($dtype:expr, $name:literal) => {{
                let input = include_bytes!(concat!("../../tests/data/dequant/", $name, ".in.bin"));
                let output = include_bytes!(concat!("../../tests/data/dequant/", $name, ".out.bin"));
                let found = values($dtype, input);
                assert!(found.iter().any(|v| v.is_infinite()) && found.iter().any(|v| v.is_finite()));
                assert_same($dtype, &found, &values(DType::F32, output));
            }};
        }
        golden!(DType::F16, "f16");
        golden!(DType::BF16, "bf16");
        golden!(DType::Q4_0, "q4_0");
        golden!(DType::Q4_1, "q4_1");
        golden!(DType::Q5_0, "q5_0");
        golden!(DType::Q5_1, "q5_1");
        golden!(DType::Q8_0, "q8_0");
        golden!(DType::Q2_K, "q2_k");
        golden!(DType::Q3_K, "q3_k");
        golden!(DType::Q4_K, "q4_k");
        golden!(DType::Q5_K, "q5_k");
        golden!(DType::Q6_K, "q6_k");
        golden!(DType::MXFP4, "mxfp4");
    }

    #[test]
    fn activations_keep_extremes_and_round_half_away_from_zero() {
        let mut x = [0f32; 64];
        x[..6].copy_from_slice(&[127.0, -127.0, 0.5, -0.5, 2.5, 0.49]);
        let mut bytes = [0xAA; 80];
        quantise_q8_act(&x, &mut bytes).unwrap();
        let blocks: &[BlockQ8Act] = bytemuck::cast_slice(&bytes);
        assert_eq!(blocks[0].q[..6], [127, -127, 1, -1, 3, 0]);
        assert_eq!((blocks[0].d.get(), blocks[0].s.get()), (1.0, 3.0));
        assert_eq!(bytes[40..], [0; 40], "a zero block is all zeros");
        assert_eq!(values(DType::Q8Act, &bytes)[..6], [127.0, -127.0, 1.0, -1.0, 3.0, 0.0]);
    }

    #[test]
    fn activations_are_within_half_a_step() {
        let x: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
        let mut bytes = vec![0; 120];
        quantise_q8_act(&x, &mut bytes).unwrap();
        let found = values(DType::Q8Act, &bytes);
        for (block, (x, y)) in x.chunks(32).zip(found.chunks(32)).enumerate() {
            let step = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
            assert!(x.iter().zip(y).all(|(a, b)| (a - b).abs() <= step * 0.501), "block {block}");
        }
    }

    /// What a byte leaves is half of one of its 127 steps at most, and of that another leaves as little.
    #[test]
    fn activations_in_two_bytes_are_within_half_a_step_of_the_second() {
        let x: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013 * (i / 32) as f32).collect();
        let mut bytes = vec![0xAA; 216];
        quantise_q16_act(&x, &mut bytes).unwrap();
        assert_eq!(bytes[..72], [0; 72], "a zero block is all zeros");
        for (x, y) in x.chunks(32).zip(values(DType::Q16Act, &bytes).chunks(32)).skip(1) {
            let step = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0 / 254.0;
            assert!(x.iter().zip(y).all(|(a, b)| (a - b).abs() <= step * 0.51), "{x:?} are {y:?}");
        }
        // The sums are of both, and the first bytes what there is otherwise.
        let mut coarse = vec![0; 120];
        quantise_q8_act(&x, &mut coarse).unwrap();
        for (block, coarse) in bytes.chunks(72).zip(coarse.chunks(40)) {
            let (block, coarse): (&BlockQ16Act, &BlockQ8Act) =
                (bytemuck::from_bytes(block), bytemuck::from_bytes(coarse));
            assert_eq!((block.d.get(), block.q), (coarse.d.get(), coarse.q));
            let sum: f32 = values(DType::Q16Act, bytemuck::bytes_of(block)).iter().sum();
            assert!((block.s.get() - sum).abs() <= 1e-5, "{} is not {sum}", block.s.get());
        }
        let mut bytes = [0; 72];
        for bad in [f32::NAN, f32::INFINITY] {
            quantise_q16_act(&[bad; 32], &mut bytes).unwrap();
            assert!(values(DType::Q16Act, &bytes).iter().all(|v| v.is_nan()), "{bad}");
        }
    }

    #[test]
    fn activations_that_are_not_finite_stay_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1, 31] {
                let mut x = [1f32; 32];
                x[at] = bad;
                let mut bytes = [0; 40];
                quantise_q8_act(&x, &mut bytes).unwrap();
                assert!(values(DType::Q8Act, &bytes).iter().all(|v| v.is_nan()), "{bad} at {at}");
            }
        }
        let mut bytes = [0; 40];
        quantise_q8_act(&[-3e-43; 32], &mut bytes).unwrap();
        assert!(
            values(DType::Q8Act, &bytes).iter().all(|v| *v < 0.0),
            "subnormal activations keep their sign"
        );
    }

    #[test]
    fn wrong_lengths_and_types_are_refused() {
        let mut out = [0f32; 32];
        assert_eq!(
            dequantise(DType::Q8_0, &[0; 33], &mut out).unwrap_err().to_string(),
            "32 elements of q8_0 take 34 bytes, but 33 are given"
        );
        assert_eq!(
            dequantise(DType::Q4_K, &[0; 18], &mut out).unwrap_err().to_string(),
            "32 elements are not a whole number of q4_k blocks of 256"
        );
        assert_eq!(dequantise(DType::I32, &[0; 128], &mut out), Err(DequantError::NotFloat(DType::I32)));
        assert!(quantise_q8_act(&out[..31], &mut [0; 40]).is_err());
        assert!(quantise_q8_act(&out, &mut [0; 39]).is_err());
    }
}
