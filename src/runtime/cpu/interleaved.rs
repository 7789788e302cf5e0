//! [`Layout::Interleaved16`](crate::codegen::spec::Layout): sixteen rows of weights lie together, so that a vector holds the same
//! few columns of all of them, and a row of results grows in its lanes without ever being summed across.
//!
//! Sixteen rows are a strip: a panel for each 256 columns, one after another. A panel is a permutation of the bits of the sixteen
//! blocks that it is made of:
//!
//! | bytes | of |
//! |---|---|
//! | 2048 | low nibbles: 64 for each 8 columns, of which byte `4r + c` has column `c` of row `r` below, column `c + 4` above |
//! | 1024, [`Q6K`] | pairs of high bits: 64 for each 16 columns, byte `4r + c` with columns `c`, `c + 4`, `c + 8`, `c + 12` from below |
//! | 256, [`Q6K`] | scales: 16 for each 16 columns, byte `r` that of row `r` |
//! | 128, [`Q4K`] | for each 32 columns 16 bytes, byte `r` with the low nibbles of scale and minimum of row `r` |
//! | 64, [`Q4K`] | byte `16b + r` with the high pairs of scale and minimum of columns `32b..`, then of `32(b + 4)..` |
//! | 32 | `d` of each row; then, of [`Q4K`], as many of `dmin` |

use super::blocks::{Format, Group, dequantise_group};
use super::formats::{Q4K, Q6K};
use super::isa::{Isa, Job, prefetch, prefetch_distance};
use super::matmul::{Rows, TOKENS};
use crate::ir::DType;
use std::marker::PhantomData;

/// Rows of a strip.
pub(super) const STRIP_ROWS: usize = 16;
/// Columns of a panel: those of a block.
pub(super) const COLUMNS: usize = 256;
/// Bytes of low nibbles, with which a panel begins.
pub(super) const LOW: usize = STRIP_ROWS * COLUMNS / 2;

/// Scales and minima of a panel as integers.
#[repr(C, align(64))]
pub(super) struct Scales {
    /// `scale[s][r]` is that of row `r` and of the `s`th 16 columns, or 32 where the format does not split them.
    pub scale: [[i8; STRIP_ROWS]; 16],
    /// Of [`Q4K`], for each 32 columns.
    pub min: [[u8; STRIP_ROWS]; 8],
    /// What scales are multiplied with, of each row.
    pub d: [f32; STRIP_ROWS],
    /// What minima are multiplied with. A format that [splits](Format::SPLIT) has the scales for minima.
    pub dmin: [f32; STRIP_ROWS],
}

impl Scales {
    pub const ZERO: Scales = Scales {
        scale: [[0; STRIP_ROWS]; 16],
        min: [[0; STRIP_ROWS]; 8],
        d: [0.0; STRIP_ROWS],
        dmin: [0.0; STRIP_ROWS],
    };

    /// Scale and minimum of each row in 32 columns from `32b` on, or where the format splits them in the `h`th half of those.
    #[inline(always)]
    pub fn of<F: Format>(&self, b: usize, h: usize) -> ([f32; STRIP_ROWS], [f32; STRIP_ROWS]) {
        let (mut scale, mut min) = ([0.0; STRIP_ROWS], [0.0; STRIP_ROWS]);
        let factors = &self.scale[if F::SPLIT { 2 * b + h } else { b }];
        for r in 0..STRIP_ROWS {
            let factor = f32::from(factors[r]);
            scale[r] = self.d[r] * factor;
            min[r] = self.dmin[r] * if F::SPLIT { factor } else { f32::from(self.min[b][r]) };
        }
        (scale, min)
    }
}

/// A format whose rows can be interleaved.
pub(super) trait Interleaved: Format {
    /// Bytes of a panel.
    const PANEL: usize = STRIP_ROWS * Self::DTYPE.block_bytes();

    /// Writes scales and minima of the block of row `r` to a panel.
    fn store_scales(block: &[u8], r: usize, panel: &mut [u8]);

    /// Scales and minima of a panel.
    fn scales<I: Isa>(panel: &[u8], scales: &mut Scales);
}

/// Calls `$go!` with the [`Interleaved`] format of a dtype, or else evaluates `$rest`.
macro_rules! with_interleaved {
    ($dtype:expr, $go:ident, $rest:expr) => {
        match $dtype {
            DType::Q4_K => $go!(Q4K),
            DType::Q6_K => $go!(Q6K),
            _ => $rest,
        }
    };
}
pub(super) use with_interleaved;

/// Sixteen `f16` as floats.
#[inline(always)]
fn f16s<I: Isa>(bytes: &[u8]) -> [f32; STRIP_ROWS] {
    let mut floats = [0.0; STRIP_ROWS];
    if let Some(bytes) = bytes.first_chunk() {
        I::from_f16(bytes, &mut floats);
    }
    floats
}

/// Byte offsets within a panel of [`Q4K`].
const Q4K_SCALES: usize = LOW;
const Q4K_HIGH: usize = Q4K_SCALES + 128;
const Q4K_D: usize = Q4K_HIGH + 64;

impl Interleaved for Q4K {
    fn store_scales(block: &[u8], r: usize, panel: &mut [u8]) {
        let packed = &block[4..16];
        for b in 0..8 {
            // The 6-bit scales and minima of sub-blocks 0..4 are the low bits of bytes 0..4 and 4..8; of those of 4..8, bytes 8..12
            // hold the low nibbles and the top bits of bytes 0..8 the rest.
            let (scale, min) = match b {
                0..4 => (packed[b] & 63, packed[b + 4] & 63),
                _ => (packed[b + 4] & 15 | packed[b - 4] >> 6 << 4, packed[b + 4] >> 4 | packed[b] >> 6 << 4),
            };
            panel[Q4K_SCALES + STRIP_ROWS * b + r] = scale & 15 | min << 4;
            let high = &mut panel[Q4K_HIGH + STRIP_ROWS * (b % 4) + r];
            let pairs = scale >> 4 | min >> 4 << 2;
            *high = if b < 4 { pairs } else { *high | pairs << 4 };
        }
        panel[Q4K_D + 2 * r..][..2].copy_from_slice(&block[..2]);
        panel[Q4K_D + 32 + 2 * r..][..2].copy_from_slice(&block[2..4]);
    }

    #[inline(always)]
    fn scales<I: Isa>(panel: &[u8], scales: &mut Scales) {
        let (low, high) = (&panel[Q4K_SCALES..][..128], &panel[Q4K_HIGH..][..64]);
        let (scale, min) = (scales.scale.as_flattened_mut(), scales.min.as_flattened_mut());
        for (i, high) in high.iter().enumerate() {
            let (first, second) = (low[i], low[i + 64]);
            scale[i] = (first & 15 | (high << 4) & 0x30) as i8;
            min[i] = first >> 4 | (high << 2) & 0x30;
            scale[i + 64] = (second & 15 | high & 0x30) as i8;
            min[i + 64] = second >> 4 | (high >> 2) & 0x30;
        }
        scales.d = f16s::<I>(&panel[Q4K_D..]);
        scales.dmin = f16s::<I>(&panel[Q4K_D + 32..]);
    }
}

/// Byte offsets within a panel of [`Q6K`].
pub(super) const Q6K_HIGH: usize = LOW;
const Q6K_SCALES: usize = Q6K_HIGH + 1024;
const Q6K_D: usize = Q6K_SCALES + 256;

impl Interleaved for Q6K {
    fn store_scales(block: &[u8], r: usize, panel: &mut [u8]) {
        for (s, scale) in block[192..208].iter().enumerate() {
            panel[Q6K_SCALES + STRIP_ROWS * s + r] = *scale;
        }
        panel[Q6K_D + 2 * r..][..2].copy_from_slice(&block[208..]);
    }

    #[inline(always)]
    fn scales<I: Isa>(panel: &[u8], scales: &mut Scales) {
        let from = &panel[Q6K_SCALES..][..256];
        for (scale, from) in scales.scale.as_flattened_mut().iter_mut().zip(from) {
            *scale = *from as i8;
        }
        scales.d = f16s::<I>(&panel[Q6K_D..]);
        // Elements are `d · scale · (q − 32)`.
        scales.dmin = scales.d.map(|d| 32.0 * d);
    }
}

/// Moves the bits of rows of weights, as the model file has them, to where a strip has them.
pub(super) struct Repack<'a, F> {
    /// Sixteen rows.
    pub rows: &'a [u8],
    /// As many bytes.
    pub strip: &'a mut [u8],
    pub format: PhantomData<F>,
}

impl<F: Interleaved> Job for Repack<'_, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let (row_bytes, block_bytes) = (self.rows.len() / STRIP_ROWS, F::DTYPE.block_bytes());
        let mut group = Group::ZERO;
        for (t, panel) in self.strip.chunks_exact_mut(F::PANEL).enumerate() {
            for r in 0..STRIP_ROWS {
                let block = &self.rows[r * row_bytes + t * block_bytes..][..block_bytes];
                F::decode::<I>(block, &mut group);
                F::store_scales(block, r, panel);
                store_quants::<F>(&group, r, panel);
            }
        }
    }
}

/// Writes the integers of a block to row `r` of a panel.
#[inline(always)]
fn store_quants<F: Interleaved>(group: &Group, r: usize, panel: &mut [u8]) {
    let (low, high) = panel.split_at_mut(LOW);
    for (q, b) in group.q.as_flattened().as_chunks::<32>().0.iter().zip(F::ORDER) {
        let mut quads = [0u32; 8];
        for (quad, q) in quads.iter_mut().zip(q.as_chunks::<4>().0) {
            *quad = u32::from_le_bytes(*q);
        }
        let put = |bytes: &mut [u8], at: usize, word: u32| {
            bytes[64 * at + 4 * r..][..4].copy_from_slice(&word.to_le_bytes());
        };
        for v in 0..4 {
            let word = quads[2 * v] & 0x0f0f_0f0f | (quads[2 * v + 1] & 0x0f0f_0f0f) << 4;
            put(low, 4 * b + v, word);
        }
        if F::SPLIT {
            for (u, four) in quads.as_chunks::<4>().0.iter().enumerate() {
                let pairs = four.map(|quad| quad >> 4 & 0x0303_0303);
                put(high, 2 * b + u, pairs[0] | pairs[1] << 2 | pairs[2] << 4 | pairs[3] << 6);
            }
        }
    }
}

/// Four columns, `4j..`, of each row of 32 columns from `32b` on: byte `4r + c` is of row `r`. Plain Rust.
#[inline(always)]
pub(super) fn quad<F: Interleaved>(panel: &[u8], b: usize, j: usize) -> [u8; 64] {
    let mut q = [0; 64];
    let low = &panel[64 * (4 * b + j / 2)..][..64];
    for (q, low) in q.iter_mut().zip(low) {
        *q = low >> (4 * (j % 2)) & 15;
    }
    if F::SPLIT {
        let high = &panel[Q6K_HIGH + 64 * (2 * b + j / 4)..][..64];
        for (q, high) in q.iter_mut().zip(high) {
            *q |= (high >> (2 * (j % 4)) & 3) << 4;
        }
    }
    q
}

/// The values of row `r` of a panel, as [`super::blocks::decode`] gives them of a block.
#[inline(always)]
pub(super) fn decode_row<I: Isa>(dtype: DType, panel: &[u8], r: usize, out: &mut [f32; COLUMNS]) {
    macro_rules! go {
        ($format:ty) => {
            decode::<I, $format>(panel, r, out)
        };
    }
    with_interleaved!(dtype, go, ());
}

#[inline(always)]
fn decode<I: Isa, F: Interleaved>(panel: &[u8], r: usize, out: &mut [f32; COLUMNS]) {
    let (mut scales, mut group) = (Scales::ZERO, Group::ZERO);
    F::scales::<I>(panel, &mut scales);
    for (q, b) in group.q.as_flattened_mut().as_chunks_mut::<32>().0.iter_mut().zip(F::ORDER) {
        for (j, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            q.copy_from_slice(&quad::<F>(panel, b, j)[4 * r..][..4]);
        }
    }
    let steps = if F::SPLIT { 2 } else { 1 };
    for b in 0..8 {
        for h in 0..steps {
            let (scale, min) = scales.of::<F>(b, h);
            (group.scale[h][b], group.min[h][b]) = (scale[r], min[r]);
        }
    }
    dequantise_group::<F>(&group, out);
}

/// Prefetches the part `b` of eight of a panel that is wanted soon. A few lines at a time: a processor waits for but some at once.
#[inline(always)]
pub(super) fn prefetch_eighth<F: Interleaved>(panel: Option<*const u8>, b: usize) {
    if let Some(panel) = panel {
        for line in (0..F::PANEL / 8).step_by(64) {
            prefetch(panel.wrapping_add(F::PANEL / 8 * b + line));
        }
    }
}

/// Adds the products of a panel with `N` tokens, each of eight blocks, to the sums of its rows, and prefetches the panel `next`. Plain
/// Rust, and the meaning of [`Isa::multiply_strip`].
#[inline(always)]
pub(super) fn multiply<F: Interleaved, const N: usize>(
    panel: &[u8],
    scales: &Scales,
    xs: [Rows<'_>; N],
    next: Option<*const u8>,
    sums: &mut [[f32; STRIP_ROWS]; N],
) {
    let steps = if F::SPLIT { 2 } else { 1 };
    for b in 0..8 {
        prefetch_eighth::<F>(next, b);
        for h in 0..steps {
            let (scale, min) = scales.of::<F>(b, h);
            // Eight products of at most 15 · 127, or four of 63 · 127, fit 16 bits.
            let mut columns = [[0i16; 64]; N];
            for j in 8 / steps * h..8 / steps * (h + 1) {
                let q = quad::<F>(panel, b, j);
                for (x, columns) in xs.iter().zip(&mut columns) {
                    let Some(&[x0, x1, x2, x3]) = x.blocks[b].q[4 * j..].first_chunk::<4>() else { continue };
                    // Eight lanes, which compilers make a vector of 16-bit products of.
                    let x = [x0, x1, x2, x3, x0, x1, x2, x3].map(i16::from);
                    for (sums, q) in columns.as_chunks_mut::<8>().0.iter_mut().zip(q.as_chunks::<8>().0) {
                        for ((sum, q), x) in sums.iter_mut().zip(q).zip(x) {
                            *sum += i16::from(*q) * x;
                        }
                    }
                }
            }
            for ((x, columns), sums) in xs.iter().zip(&columns).zip(sums.iter_mut()) {
                let (d, s) = (x.blocks[b].d, if F::SPLIT { x.halves[b][h] } else { x.blocks[b].s });
                for (r, (sum, columns)) in sums.iter_mut().zip(columns.as_chunks::<4>().0).enumerate() {
                    let dot: i32 = columns.iter().map(|c| i32::from(*c)).sum();
                    *sum += dot as f32 * (scale[r] * d) - min[r] * s;
                }
            }
        }
    }
}

/// The products of a strip with tokens, `xs`.
pub(super) struct MultiplyStrip<'a, F> {
    pub strip: &'a [u8],
    pub xs: &'a [Rows<'a>],
    /// Of each token, the results of the strip's rows.
    pub sums: &'a mut [[f32; STRIP_ROWS]; TOKENS],
    pub format: PhantomData<F>,
}

impl<F: Interleaved> Job for MultiplyStrip<'_, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let MultiplyStrip { strip, xs, sums, .. } = self;
        let sums = &mut sums[..xs.len()];
        sums.fill([0.0; STRIP_ROWS]);
        let ahead = prefetch_distance(strip.len());
        let mut scales = Scales::ZERO;
        for (t, panel) in strip.chunks_exact(F::PANEL).enumerate() {
            let mut next = (ahead > 0).then(|| panel.as_ptr().wrapping_add(ahead));
            F::scales::<I>(panel, &mut scales);
            let (mut xs, mut sums) = (xs, &mut sums[..]);
            macro_rules! some {
                ($($n:literal)*) => {
                    $(while let (Some((now, later)), true) = (xs.split_first_chunk::<$n>(), $n <= I::STRIP_TOKENS) {
                        let Some((now_sums, later_sums)) = sums.split_first_chunk_mut::<$n>() else { return };
                        let at = 8 * t..8 * t + 8;
                        let now = now.map(|x| Rows {
                            blocks: &x.blocks[at.clone()],
                            halves: if F::SPLIT { &x.halves[at.clone()] } else { &[] },
                        });
                        I::multiply_strip::<F, $n>(panel, &scales, now, next.take(), now_sums);
                        (xs, sums) = (later, later_sums);
                    })*
                };
            }
            some!(8 4 2 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks;
    use super::super::isa::{Baseline, Features};
    use super::super::outline;
    use super::super::testing::{random, repacked, rng};
    use super::*;
    use crate::codegen::spec::Layout;
    use crate::ir::TensorType;

    /// A strip that is repacked by one instruction set, and what a row of it is.
    struct HoldsRows<F> {
        rows: Vec<u8>,
        format: PhantomData<F>,
    }

    impl<F: Interleaved> Job for HoldsRows<F> {
        #[inline(always)]
        fn run<I: Isa>(self) {
            let mut strip = vec![0xa5; self.rows.len()];
            I::outline(Repack::<F> { rows: &self.rows, strip: &mut strip, format: PhantomData });
            let (row, block) = (self.rows.len() / STRIP_ROWS, F::DTYPE.block_bytes());
            for (t, panel) in strip.chunks_exact(F::PANEL).enumerate() {
                for r in 0..STRIP_ROWS {
                    let (mut have, mut want) = ([0.0; COLUMNS], [0.0; COLUMNS]);
                    decode_row::<I>(F::DTYPE, panel, r, &mut have);
                    blocks::decode::<Baseline>(
                        F::DTYPE,
                        &self.rows[r * row + t * block..][..block],
                        &mut want,
                    );
                    assert_eq!(have.map(f32::to_bits), want.map(f32::to_bits), "row {r} of panel {t}");
                }
            }
        }
    }

    #[test]
    fn strips_hold_what_rows_hold() {
        for features in Features::available() {
            for panels in [1, 3] {
                let random = |dtype| random(&mut rng(panels as u64), dtype, STRIP_ROWS * panels * COLUMNS);
                outline(
                    features.level(),
                    HoldsRows::<Q4K> { rows: random(DType::Q4_K), format: PhantomData },
                );
                outline(
                    features.level(),
                    HoldsRows::<Q6K> { rows: random(DType::Q6_K), format: PhantomData },
                );
            }
        }
    }

    /// What can lie so, by the layout's own account, has a format here, and nothing else has.
    #[test]
    fn every_format_that_fits_is_there() {
        for dtype in DType::ALL {
            let ty = TensorType::new(dtype, [STRIP_ROWS as u64, COLUMNS as u64]);
            macro_rules! is_there {
                ($format:ty) => {
                    <$format>::DTYPE == dtype
                };
            }
            assert_eq!(Layout::Interleaved16.fits(&ty), with_interleaved!(dtype, is_there, false), "{dtype}");
        }
    }

    /// A layout moves bits and loses none.
    #[test]
    fn every_bit_has_its_place() {
        for dtype in [DType::Q4_K, DType::Q6_K] {
            let ty = TensorType::new(dtype, [STRIP_ROWS as u64, COLUMNS as u64]);
            let mut seen = vec![0u8; STRIP_ROWS * dtype.block_bytes()];
            for row in [0, 1, STRIP_ROWS - 1] {
                for bit in 0..8 * dtype.block_bytes() {
                    let mut rows = vec![0; seen.len()];
                    rows[row * dtype.block_bytes() + bit / 8] = 1 << (bit % 8);
                    let strip = repacked(&ty, &rows);
                    assert_eq!(strip.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1, "{dtype} {bit}");
                    for (seen, byte) in seen.iter_mut().zip(&strip) {
                        assert_eq!(*seen & byte, 0, "{dtype} {bit}");
                        *seen |= byte;
                    }
                }
            }
        }
    }
}
