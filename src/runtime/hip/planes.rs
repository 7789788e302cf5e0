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

/// Rows of bytes that a GPU has of a row of activations.
const fn bytes_of_row(dtype: DType) -> usize {
    if matches!(dtype, DType::Q16Act) { 2 } else { 1 }
}

/// Where the bytes of block `i` lie, rows of `columns`: `32` of each row that it has a part in.
fn places(i: usize, dtype: DType, columns: usize) -> impl Iterator<Item = usize> {
    let (rows, blocks) = (bytes_of_row(dtype), columns / 32);
    (0..rows).map(move |row| (i / blocks * rows + row) * columns + i % blocks * 32)
}

/// Activations as graphs have them, rows of `columns` in blocks of d, s and bytes, from those of a GPU: rows of bytes, of which the first
/// `out.len()` bytes' worth are wanted, then d and s of each block. Of [`DType::Q16Act`] a row of first bytes is followed by one of second ones.
pub fn activations_from_planes(planes: &[u8], dtype: DType, columns: usize, out: &mut [u8]) {
    let size = dtype.block_bytes();
    let scales = planes.len() / size * (size - 8);
    for (i, block) in out.chunks_exact_mut(size).enumerate() {
        block[..8].copy_from_slice(&planes[scales + 8 * i..][..8]);
        for (to, at) in block[8..].chunks_exact_mut(32).zip(places(i, dtype, columns)) {
            to.copy_from_slice(&planes[at..][..32]);
        }
    }
}

/// The inverse of [`activations_from_planes`]: leaves what it is not given.
pub fn activations_to_planes(given: &[u8], dtype: DType, columns: usize, planes: &mut [u8]) {
    let size = dtype.block_bytes();
    let scales = planes.len() / size * (size - 8);
    for (i, block) in given.chunks_exact(size).enumerate() {
        planes[scales + 8 * i..][..8].copy_from_slice(&block[..8]);
        for (from, at) in block[8..].chunks_exact(32).zip(places(i, dtype, columns)) {
            planes[at..][..32].copy_from_slice(from);
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
        for (dtype, columns) in
            [(DType::Q8Act, 32), (DType::Q8Act, 64), (DType::Q16Act, 32), (DType::Q16Act, 96)]
        {
            let row = columns / 32 * dtype.block_bytes();
            let given: Vec<u8> = (0..3 * row).map(|i| (i * 37 % 251) as u8).collect();
            // Another row is there and not given.
            let mut planes = vec![0xff; 4 * row];
            activations_to_planes(&given, dtype, columns, &mut planes);
            // The second bytes of a row come after its first ones.
            let second = if dtype == DType::Q16Act { columns } else { 32 };
            let from = if dtype == DType::Q16Act { 40 } else { 48 };
            assert_eq!(planes[..32], given[8..40], "{dtype}");
            assert_eq!(planes[second..][..32], given[from..][..32], "{dtype}");
            let mut back = vec![0; given.len()];
            activations_from_planes(&planes, dtype, columns, &mut back);
            assert_eq!(back, given, "{dtype}");
        }
    }
}
