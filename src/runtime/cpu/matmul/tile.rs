//! Weights decoded once for many tokens: 32 rows side by side, so that a vector of rows meets one activation.

use super::super::args::{F32, Q8Block};
use super::super::blocks::{self, Format, GROUP, Group};
use super::super::interleaved::{Interleaved, Scales, quad};
use super::super::isa::{Isa, Job};
use super::{ROWS, Results, TOKENS};
use crate::ir::DType;
use std::marker::PhantomData;

/// 32 rows of weights, 32 columns at a time.
#[derive(Default)]
pub struct Tile {
    pub blocks: Vec<TileBlock>,
}

/// 32 columns of 32 rows: weights are `scale · q − min`, `scale` and `min` of 32 or twice 16 columns.
#[derive(Clone)]
pub struct TileBlock {
    /// Byte `4r + c` of `q[j][h]` belongs to row `16h + r` and column `4j + c`.
    pub q: [[[u8; 64]; 2]; 8],
    /// `scale[s][h][r]` is that of row `16h + r`, and of columns `16s..` where the format splits.
    pub scale: [[[f32; 16]; 2]; 2],
    pub min: [[[f32; 16]; 2]; 2],
}

impl TileBlock {
    const ZERO: TileBlock =
        TileBlock { q: [[[0; 64]; 2]; 8], scale: [[[0.0; 16]; 2]; 2], min: [[[0.0; 16]; 2]; 2] };
}

/// The activations of a token.
#[derive(Clone, Copy, Default)]
pub struct Rows<'a> {
    pub blocks: &'a [Q8Block],
    /// Of each block, see [`halves`]; empty where no format splits.
    pub halves: &'a [[f32; 2]],
}

/// `d · Σq` over the first and the last 16 of each block.
#[inline(always)]
pub fn halves(blocks: &[Q8Block]) -> Vec<[f32; 2]> {
    let mut halves = Vec::with_capacity(blocks.len());
    for x in blocks {
        halves.push(half_sums(x));
    }
    halves
}

/// [`halves`] of one block.
#[inline(always)]
pub fn half_sums(x: &Q8Block) -> [f32; 2] {
    let mut sums = [0i32; 2];
    for l in 0..16 {
        sums[0] += i32::from(x.q[l]);
        sums[1] += i32::from(x.q[l + 16]);
    }
    [x.d * sums[0] as f32, x.d * sums[1] as f32]
}

impl Tile {
    /// `out[n][r]` is the product of row `r` with token `n`; `split` says that halves of 32 columns have scales of their own.
    /// Plain Rust, and the meaning of [`Isa::multiply_tile`].
    #[inline(always)]
    pub fn multiply(&self, xs: &[Rows<'_>], split: bool, out: &mut [[f32; ROWS]]) {
        let steps = if split { 2 } else { 1 };
        for (x, out) in xs.iter().zip(out) {
            *out = [0.0; ROWS];
            for (b, (w, block)) in self.blocks.iter().zip(x.blocks).enumerate() {
                for h in 0..steps {
                    let s = if split { x.halves[b][h] } else { block.s };
                    for (r, out) in out.iter_mut().enumerate() {
                        let columns = 32 / steps * h..32 / steps * (h + 1);
                        let weight = |c: usize| i32::from(w.q[c / 4][r / 16][r % 16 * 4 + c % 4]);
                        let dot: i32 = columns.map(|c| weight(c) * i32::from(block.q[c])).sum();
                        *out += dot as f32 * (w.scale[h][r / 16][r % 16] * block.d);
                        *out -= w.min[h][r / 16][r % 16] * s;
                    }
                }
            }
        }
    }
}

/// Decodes rows into a tile; rows that are missing become zero.
pub struct Fill<'a, F> {
    tile: &'a mut Tile,
    weights: &'a [u8],
    rows: usize,
    k: usize,
    format: PhantomData<F>,
}

impl<'a, F: Format> Fill<'a, F> {
    /// `weights` are `rows` rows of `k`.
    #[inline(always)]
    pub fn new(tile: &'a mut Tile, weights: &'a [u8], rows: usize, k: usize) -> Self {
        Fill { tile, weights, rows, k, format: PhantomData }
    }
}

impl<F: Format> Job for Fill<'_, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Fill { tile, weights, rows, k, .. } = self;
        tile.blocks.resize(k / 32, TileBlock::ZERO);
        if rows < ROWS {
            tile.blocks.fill(TileBlock::ZERO);
        }
        let row_bytes = weights.len() / rows.max(1);
        let group_bytes = row_bytes / (k / F::BLOCK) * (GROUP / F::BLOCK);
        let mut group = Group::ZERO;
        // Some columns of all rows, then the next: what is written lies in the innermost cache, where all of a tile would not.
        for (g, blocks) in tile.blocks.chunks_mut(GROUP / 32).enumerate() {
            for (r, row) in weights.chunks_exact(row_bytes).enumerate().take(ROWS) {
                let (h, l) = (r / 16, r % 16);
                let Some(bytes) = row.chunks(group_bytes).nth(g) else { continue };
                F::decode::<I>(bytes, &mut group);
                for (q, b) in group.q.as_flattened().as_chunks::<32>().0.iter().zip(F::ORDER) {
                    let Some(block) = blocks.get_mut(b) else { continue };
                    for (j, q) in q.as_chunks::<4>().0.iter().enumerate() {
                        let raise = if F::SIGNED { 0x8080_8080 } else { 0 };
                        let raised = u32::from_le_bytes(*q) ^ raise;
                        block.q[j][h][4 * l..4 * l + 4].copy_from_slice(&raised.to_le_bytes());
                    }
                    for s in 0..if F::SPLIT { 2 } else { 1 } {
                        let scale = group.scale[s][b];
                        block.scale[s][h][l] = scale;
                        block.min[s][h][l] = if F::SIGNED { 128.0 * scale } else { group.min[s][b] };
                    }
                }
            }
        }
    }
}

/// Decodes one or two strips of interleaved rows into a tile; rows that are missing become zero.
pub struct FillStrips<'a, F> {
    pub tile: &'a mut Tile,
    pub strips: &'a [u8],
    pub k: usize,
    pub format: PhantomData<F>,
}

impl<F: Interleaved> Job for FillStrips<'_, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let FillStrips { tile, strips, k, .. } = self;
        let strip_bytes = k / GROUP * F::PANEL;
        tile.blocks.resize(k / 32, TileBlock::ZERO);
        if strips.len() <= strip_bytes {
            tile.blocks.fill(TileBlock::ZERO);
        }
        let mut scales = Scales::ZERO;
        for (h, strip) in strips.chunks_exact(strip_bytes).enumerate().take(2) {
            for (from, blocks) in strip.chunks_exact(F::PANEL).zip(tile.blocks.as_chunks_mut::<8>().0) {
                F::scales::<I>(from, &mut scales);
                for (b, block) in blocks.iter_mut().enumerate() {
                    for (j, q) in block.q.iter_mut().enumerate() {
                        q[h] = quad::<F>(from, b, j);
                    }
                    for s in 0..if F::SPLIT { 2 } else { 1 } {
                        (block.scale[s][h], block.min[s][h]) = scales.of::<F>(b, s);
                    }
                }
            }
        }
    }
}

/// The products of a tile with tokens, `xs`.
pub struct Multiply<'a> {
    pub tile: &'a Tile,
    pub xs: &'a [Rows<'a>],
    pub split: bool,
    pub out: &'a mut Results,
}

impl Job for Multiply<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        if self.split { self.with::<I, true>() } else { self.with::<I, false>() }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn with<I: Isa, const SPLIT: bool>(self) {
        let (sixes, rest) = self.xs.as_chunks::<6>();
        let mut out = &mut self.out[..self.xs.len()];
        for xs in sixes {
            let (now, later) = out.split_at_mut(6);
            out = later;
            if let Some(now) = now.as_mut_array() {
                I::multiply_tile::<6, SPLIT>(self.tile, *xs, now);
            }
        }
        macro_rules! rest {
            ($($n:literal)*) => {
                match rest.len() {
                    $($n => {
                        if let (Ok(xs), Some(out)) = (rest.try_into(), out.as_mut_array()) {
                            I::multiply_tile::<$n, SPLIT>(self.tile, xs, out);
                        }
                    })*
                    _ => {}
                }
            };
        }
        rest!(1 2 3 4 5);
    }
}

/// Weights in floats, for activations in floats: lane `r` of element `k` is that of row `r` and column `k`.
pub type Lanes = Vec<[f32; ROWS]>;

/// Columns whose products are summed before they are added to the rest, which keeps rounding small.
const COLUMNS: usize = 128;

/// Decodes at most 32 rows of `k` weights into lanes.
pub struct FillLanes<'a> {
    pub lanes: &'a mut Lanes,
    pub weights: &'a [u8],
    pub format: DType,
    pub k: usize,
}

impl Job for FillLanes<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let FillLanes { lanes, weights, format, k } = self;
        lanes.resize(k, [0.0; ROWS]);
        let mut values = [0.0; GROUP];
        let rows = weights.chunks_exact(blocks::bytes_of(format, k)).take(ROWS);
        for (r, row) in rows.enumerate() {
            for (bytes, lanes) in row.chunks(blocks::bytes_of(format, GROUP)).zip(lanes.chunks_mut(GROUP)) {
                let values = &mut values[..lanes.len()];
                blocks::decode::<I>(format, bytes, values);
                for (lanes, value) in lanes.iter_mut().zip(values) {
                    lanes[r] = *value;
                }
            }
        }
    }
}

/// The products of lanes with tokens, `xs`, one after another.
pub struct MultiplyLanes<'a> {
    pub lanes: &'a Lanes,
    pub xs: &'a [F32],
    pub out: &'a mut Results,
}

impl Job for MultiplyLanes<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let MultiplyLanes { lanes, xs, out } = self;
        let (k, n) = (lanes.len(), xs.len() / lanes.len());
        let out = &mut out[..n];
        out.fill([0.0; ROWS]);
        for (i, columns) in lanes.chunks(COLUMNS).enumerate() {
            let mut sums = [[0.0; ROWS]; TOKENS];
            I::lane_products(columns, &xs[i * COLUMNS..], k, 1, &mut sums[..n]);
            for (out, sums) in out.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
                *out += sums;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::formats::{Q2K, Q4K, Q6K, Q8_0};
    use super::super::super::isa::Baseline;
    #[cfg(target_arch = "x86_64")]
    use super::super::super::isa::Features;
    use super::super::super::testing::{random, rng};
    use super::*;

    const K: usize = 512;

    /// The products of random rows and tokens by the instruction set `I`, and what they should be.
    fn products<I: Isa, F: Format>(
        format: DType,
        rows: usize,
        tokens: usize,
    ) -> (Box<Results>, Box<Results>) {
        let mut rng = rng(rows as u64);
        let weights = random(&mut rng, format, rows * K);
        let x = random(&mut rng, DType::Q8Act, tokens * K);
        let x: &[Q8Block] = bytemuck::cast_slice(&x);
        let halves = halves(x);
        let per = K / 32;
        let xs: Vec<Rows> = (0..tokens)
            .map(|t| Rows { blocks: &x[t * per..][..per], halves: &halves[t * per..][..per] })
            .collect();
        // A tile is used again and again, so it may hold anything before.
        let mut tile = Tile { blocks: vec![TileBlock { scale: [[[7.0; 16]; 2]; 2], ..TileBlock::ZERO }; 3] };
        I::outline(Fill::<F>::new(&mut tile, &weights, rows, K));
        let (mut have, mut want) = (Box::new([[0.0; ROWS]; TOKENS]), Box::new([[0.0; ROWS]; TOKENS]));
        I::outline(Multiply { tile: &tile, xs: &xs, split: F::SPLIT, out: &mut have });
        tile.multiply(&xs, F::SPLIT, &mut want[..tokens]);
        (have, want)
    }

    fn check<I: Isa>() {
        for tokens in 1..=TOKENS {
            for (have, want) in [
                products::<I, Q8_0>(DType::Q8_0, 32, tokens),
                products::<I, Q4K>(DType::Q4_K, 32, tokens),
                products::<I, Q2K>(DType::Q2_K, 19, tokens),
                products::<I, Q6K>(DType::Q6_K, 1, tokens),
            ] {
                let largest = want.as_flattened().iter().fold(0f32, |m, x| m.max(x.abs()));
                assert!(largest > 0.1, "{largest}");
                for (h, w) in have.as_flattened().iter().zip(want.as_flattened()) {
                    assert!((h - w).abs() <= 1e-5 * largest, "{tokens} tokens: {h} not {w}");
                }
            }
        }
    }

    #[test]
    fn tiles_are_multiplied_alike_by_all() {
        check::<Baseline>();
        #[cfg(target_arch = "x86_64")]
        for features in Features::available() {
            match features.name() {
                "avx2" => check::<super::super::super::isa::Avx2>(),
                "avx512" => check::<super::super::super::isa::Avx512>(),
                _ => {}
            }
        }
    }
}
