//! [`Layout::Planes`](crate::codegen::spec::Layout): each field of a weight's blocks in a plane of its own, as `kernels/quant.h` has
//! them; and activations in 8 bits, which GPUs keep in two planes.

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
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::Q8Act => &[],
    }
}

/// Moves one field of some blocks of the file together.
pub fn gather(blocks: &[u8], block_bytes: usize, (first, bytes): Field, to: &mut [u8]) {
    for (to, block) in to.chunks_exact_mut(bytes).zip(blocks.chunks_exact(block_bytes)) {
        to.copy_from_slice(&block[first..first + bytes]);
    }
}

/// Bytes of a block of activations.
const ACTIVATIONS: usize = DType::Q8Act.block_bytes();

/// Activations as graphs have them, blocks of d, s and 32 bytes, from those of a GPU: `rows` rows of bytes, of which the first
/// `out.len()` bytes' worth are wanted, then d and s of each block.
pub fn activations_from_planes(planes: &[u8], out: &mut [u8]) {
    let blocks = planes.len() / ACTIVATIONS;
    for (i, block) in out.chunks_exact_mut(ACTIVATIONS).enumerate() {
        let scales = &planes[32 * blocks + 8 * i..][..8];
        block[..8].copy_from_slice(scales);
        block[8..].copy_from_slice(&planes[32 * i..][..32]);
    }
}

/// The inverse of [`activations_from_planes`]: leaves what it is not given.
pub fn activations_to_planes(given: &[u8], planes: &mut [u8]) {
    let blocks = planes.len() / ACTIVATIONS;
    for (i, block) in given.chunks_exact(ACTIVATIONS).enumerate() {
        planes[32 * i..][..32].copy_from_slice(&block[8..]);
        planes[32 * blocks + 8 * i..][..8].copy_from_slice(&block[..8]);
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
        let given: Vec<u8> = (0..3 * ACTIVATIONS).map(|i| (i * 37 % 64) as u8).collect();
        let mut planes = vec![0xff; 4 * ACTIVATIONS];
        activations_to_planes(&given, &mut planes);
        assert_eq!(planes[..32], given[8..40]);
        let mut back = vec![0; given.len()];
        activations_from_planes(&planes, &mut back);
        assert_eq!(back, given);
    }
}
