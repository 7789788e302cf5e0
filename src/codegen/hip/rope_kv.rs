//! RoPE and appending to caches: `kernels/rope_kv.h`.

use super::super::spec::{CacheRows, Extent, HeadNorm, RopeKvSpec};
use super::{Unit, WAIT, float, floats, size};
use crate::ir::{Dim, Rope, RopeStyle};
use std::f64::consts::TAU;

impl Unit<'_> {
    pub(super) fn rope_kv(&mut self, m: &RopeKvSpec) -> Result<(), String> {
        let d = size(Dim::n(m.head_dim))?;
        let threads = threads_of_head(m.head_dim);
        let mut body =
            self.waits_unless_given([m.positions, m.rows].into_iter().chain(m.factors)).to_string();
        body += &format!(
            "const i32 t = block_y();\nconst i32 position = load_step((const i32*)a{} + t);\n",
            m.positions
        );
        let rows = self.constant(m.k.rows.cache, 0)?;
        body += &format!("const u64 row = load_index((const i32*)a{} + t, {rows});\n", m.rows);
        let mut heads = 0;
        let mut part = |count: u64,
                        norm: &Option<HeadNorm>,
                        dims: u32,
                        input: u16,
                        to: String,
                        cast: &str| {
            let norm = head_norm(norm.as_ref());
            let interleaved = m.rope.style == RopeStyle::Interleaved;
            let text = format!(
                "if (block_x() < {}) {{\n    const i32 head = block_x() - {heads};\n    return rope_head<{threads}, {d}, {dims}, {interleaved}, {cast}>((const float*)a{input} + ((u64)t * {count} + head) * {d}, {norm}, TURNS, {}, position, {to});\n}}\n",
                heads + count,
                floats(m.factors),
            );
            heads += count;
            text
        };
        let cache = |c: &CacheRows| -> Result<(String, &str), String> {
            let (element, cast) = self.cache(c.cache)?;
            Ok((format!("({element}*)a{} + (row * {} + head) * {d}", c.cache, c.heads), cast))
        };
        if let Some(q) = &m.q {
            let to = format!("(float*)a{} + ((u64)t * {} + head) * {d}", q.out, q.heads);
            body += &part(q.heads, &q.norm, m.rope.dims, q.x, to, "AsFloat");
        }
        let (to, cast) = cache(&m.k.rows)?;
        body += &part(m.k.rows.heads, &m.k.norm, m.rope.dims, m.k.rows.x, to, cast);
        if let Some(v) = &m.v {
            let (to, cast) = cache(v)?;
            body += &part(v.heads, &None, 0, v.x, to, cast);
        }
        let grid = vec![Extent::each(self.dim(m.positions, 0)?), Extent::each(heads)];
        self.file(&["rope_kv.h"], threads, grid, body);
        self.constants(turns(&m.rope));
        Ok(())
    }

    /// RoPE as an operation of its own: `x`, positions, perhaps factors, the result.
    pub(super) fn rope(&mut self, rope: &Rope) -> Result<(), String> {
        let (heads, d) = (self.constant(0, 1)?, self.constant(0, 2)?);
        let threads = threads_of_head(u64::from(d));
        let factors = (self.spec.args.len() == 4).then_some(2);
        let body = format!(
            "{WAIT}const u64 at = ((u64)block_y() * {heads} + block_x()) * {d};\nrope_head<{threads}, {d}, {}, {}, AsFloat>((const float*)a0 + at, {}, TURNS, {}, load_step((const i32*)a1 + block_y()), (float*)a{} + at);\n",
            rope.dims,
            rope.style == RopeStyle::Interleaved,
            head_norm(None),
            floats(factors),
            self.spec.args.len() - 1
        );
        let grid = vec![Extent::each(self.dim(0, 0)?), Extent::each(u64::from(heads))];
        self.file(&["rope_kv.h"], threads, grid, body);
        self.constants(turns(rope));
        Ok(())
    }

    /// What stands before the last kernel.
    pub(super) fn constants(&mut self, text: String) {
        if let Some(file) = self.files.last_mut() {
            file.constants = text;
        }
    }
}

/// An expression for how heads are normed.
pub(super) fn head_norm(norm: Option<&HeadNorm>) -> String {
    let eps = norm.map_or(0.0, |norm| norm.eps);
    format!("HeadNorm{{{}, {}}}", floats(norm.map(|norm| norm.weight)), float(eps))
}

/// Threads that turn a head.
fn threads_of_head(d: u64) -> u32 {
    (d / 2).next_multiple_of(64).clamp(64, 256) as u32
}

/// How far each pair turns from one position to the next, in whole turns.
pub(super) fn turns(rope: &Rope) -> String {
    let dims = f64::from(rope.dims);
    let one = |pair: u32| format!("{:e}", f64::from(rope.base).powf(-2.0 * f64::from(pair) / dims) / TAU);
    let all: Vec<String> = (0..rope.dims / 2).map(one).collect();
    format!("static __device__ const double TURNS[] = {{{}}};\n", all.join(", "))
}
