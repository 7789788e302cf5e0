//! [`Layout::Planes`](crate::codegen::spec::Layout): each field of a weight's blocks in a plane of its own, as `kernels/quant.h` has
//! them; and activations in bytes, which GPUs keep apart from their scales.

use crate::ir::DType;

/// A field of a block of the file: where it begins there, and how many bytes it is.
pub type Field = (usize, usize);

/// The fields of a format, in the order of their planes: so that each plane is aligned to what is loaded of it at once.
pub const fn fields(dtype: DType) -> &'static [Field] {
    match dtype {
        DType::Q4_0 => &[(2, 16), (0, 2)],
        DType::Q4_1 => &[(4, 16), (0, 4)],
        DType::Q5_0 => &[(6, 16), (2, 4), (0, 2)],
        DType::Q5_1 => &[(8, 16), (4, 4), (0, 4)],
        DType::Q8_0 => &[(2, 32), (0, 2)],
        DType::MXFP4 => &[(1, 16), (0, 1)],
        DType::Q2_K => &[(16, 64), (0, 16), (80, 4)],
        DType::Q3_K => &[(32, 64), (0, 32), (96, 12), (108, 2)],
        DType::Q4_K => &[(16, 128), (0, 16)],
        DType::Q5_K => &[(48, 128), (16, 32), (0, 16)],
        DType::Q6_K => &[(0, 128), (128, 64), (192, 16), (208, 2)],
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::Q8Act | DType::Q16Act => &[],
    }
}

/// Moves one field of some blocks of the file together.
pub fn gather(blocks: &[u8], block_bytes: usize, (first, bytes): Field, to: &mut [u8]) {
    for (to, block) in to.chunks_exact_mut(bytes).zip(blocks.chunks_exact(block_bytes)) {
        to.copy_from_slice(&block[first..first + bytes]);
    }
}

/// Activations as graphs have them, in blocks of d, s and bytes, from those of a GPU: the first bytes of all, then any second ones, then d and s of
/// each block. The first `out.len()` bytes' worth are wanted.
pub fn activations_from_planes(planes: &[u8], dtype: DType, out: &mut [u8]) {
    let size = dtype.block_bytes();
    let plane = planes.len() / size * 32;
    for (i, block) in out.chunks_exact_mut(size).enumerate() {
        let (scales, bytes) = block.split_at_mut(8);
        scales.copy_from_slice(&planes[plane * (bytes.len() / 32) + 8 * i..][..8]);
        for (bytes, plane) in bytes.chunks_exact_mut(32).zip(planes.chunks_exact(plane)) {
            bytes.copy_from_slice(&plane[32 * i..][..32]);
        }
    }
}

/// The inverse of [`activations_from_planes`]: leaves what it is not given.
pub fn activations_to_planes(given: &[u8], dtype: DType, planes: &mut [u8]) {
    let size = dtype.block_bytes();
    let plane = planes.len() / size * 32;
    for (i, block) in given.chunks_exact(size).enumerate() {
        let (scales, bytes) = block.split_at(8);
        planes[plane * (bytes.len() / 32) + 8 * i..][..8].copy_from_slice(scales);
        for (bytes, plane) in bytes.chunks_exact(32).zip(planes.chunks_exact_mut(plane)) {
            plane[32 * i..][..32].copy_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plane has every byte of a block once, and begins where what is loaded of it is aligned.
    #[test]
    fn fields_are_the_block() {
        for dtype in DType::WEIGHTS.into_iter().filter(|d| d.is_quantised()) {
            let fields = fields(dtype);
            let mut all: Vec<usize> =
                fields.iter().flat_map(|&(first, bytes)| first..first + bytes).collect();
            all.sort_unstable();
            assert_eq!(all, (0..dtype.block_bytes()).collect::<Vec<_>>(), "{dtype}");
            let mut before = 0;
            for &(_, bytes) in fields {
                let aligned = 1 << bytes.trailing_zeros().min(4);
                assert_eq!(before % aligned, 0, "{dtype}: a plane of {bytes} bytes after {before}");
                before += bytes;
            }
        }
    }

    #[test]
    fn activations_go_and_come_back() {
        for (dtype, bytes) in [(DType::Q8Act, 1), (DType::Q16Act, 2)] {
            let size = dtype.block_bytes();
            let given: Vec<u8> = (0..3 * size).map(|i| (i * 37 % 251) as u8).collect();
            // A fourth block is there and not given.
            let mut planes = vec![0xff; 4 * size];
            activations_to_planes(&given, dtype, &mut planes);
            for byte in 0..bytes {
                let plane = &planes[byte * 4 * 32..][..4 * 32];
                assert_eq!(plane[32..64], given[size + 8 + 32 * byte..][..32], "{dtype}");
                assert_eq!(plane[96..], [0xff; 32], "{dtype}");
            }
            let scales = &planes[bytes * 4 * 32..];
            assert_eq!(scales[8..16], given[size..][..8], "{dtype}");
            assert_eq!(scales[24..], [0xff; 8], "{dtype}");
            let mut back = vec![0; given.len()];
            activations_from_planes(&planes, dtype, &mut back);
            assert_eq!(back, given, "{dtype}");
        }
    }
}
