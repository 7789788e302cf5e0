//! Attention. Of a few tokens: `kernels/attention.h`, split over the positions of a sequence, and the join of the parts; with RoPE
//! and the append before it `kernels/rope_attention.h`. Of more: `kernels/prefill_attention.h`, if the cache is of halves; else one part has all positions.

use super::super::spec::{ArgId, AttentionSpec, Extent, RopeAttentionSpec, RopeKvSpec};
use super::rope_kv::{head_norm, turns};
use super::{THREADS, Unit, float, floats, size, symbol};
use crate::ir::{DType, Dim, RopeStyle, TensorType};
use crate::target::{ATTENDING, FEW_TOKENS, attends_at_once, heads_at_once};

/// Blocks that share a multiprocessor, of heads so narrow that none spills.
const ATTENDING_AT_ONCE: u32 = 2;
const NARROW: u64 = 128;
/// Blocks that keep a GPU busy: more parts take longer to join.
const BLOCKS: u64 = 256;
/// Positions that a part has at least, as `seen_by` of `kernels/attention.h` has it.
const PART: u64 = 64;
/// Queries of a block, heads of a group that share it, its threads, and the widest heads that fit, of prefill.
const QUERIES: u64 = 64;
const PREFILL_HEADS: u64 = 8;
const PREFILL_THREADS: u32 = 128;
const PREFILL_DIM: u64 = 128;
/// Blocks of prefill that share a multiprocessor: of three, each spills (an H200: 0.7 of the speed after 4096 tokens).
const PREFILL_AT_ONCE: u32 = 2;

impl Unit<'_> {
    pub(super) fn attention(&mut self, m: &AttentionSpec) -> Result<(), String> {
        self.attends(m, None)
    }

    pub(super) fn rope_attention(&mut self, m: &RopeAttentionSpec) -> Result<(), String> {
        self.attends(&m.attention, Some(&m.rope_kv))
    }

    /// Attention, of queries that are turned as `turned` says where they are not yet.
    fn attends(&mut self, m: &AttentionSpec, turned: Option<&RopeKvSpec>) -> Result<(), String> {
        let [heads, kv, d] = [m.heads, m.kv_heads, m.head_dim].map(|n| size(Dim::n(n)));
        let (heads, kv, d) = (heads?, kv?, d?);
        let tokens = self.dim(m.q, 0)?;
        let (rows, sequences, pages) =
            (self.constant(m.k, 0)?, self.constant(m.tables, 0)?, self.constant(m.tables, 1)?);
        let group = m.heads / m.kv_heads.max(1);
        let most = |most: u64| (1..=group.min(most)).rev().find(|n| group.is_multiple_of(*n)).unwrap_or(1);
        let bytes = |cache: ArgId| Ok::<_, String>(if self.ty(cache)?.dtype == DType::F16 { 2 } else { 4 });
        let new = if turned.is_some() { tokens.eval(self.bounds) } else { 0 };
        let room = (new, bytes(m.k)?.max(bytes(m.v)?));
        let shared = heads_at_once(self.target.wave, group, m.head_dim, room)
            .ok_or_else(|| format!("heads of {d} do not fit the memory that a block shares"))?;
        let blocks = tokens.eval(self.bounds) * m.heads / shared;
        let longest = u64::from(pages) * u64::from(m.page);
        let quantised = self.ty(m.out)?.dtype.is_activations();
        let at_once = attends_at_once(tokens.eval(self.bounds), m.head_dim, quantised);
        let parts = (BLOCKS / blocks.max(1)).clamp(1, longest.div_ceil(PART).max(1));
        let parts = if at_once { 1 } else { parts };
        let shape = format!(
            "Shape<{heads}, {kv}, {d}, {rows}, {}, {sequences}, {pages}, {}, {parts}>",
            m.page,
            m.window.unwrap_or(0)
        );
        let halves = [m.k, m.v].iter().all(|cache| self.ty(*cache).is_ok_and(|ty| ty.dtype == DType::F16));
        if turned.is_some() && tokens.eval(self.bounds) > FEW_TOKENS {
            return Err("many tokens are turned in a kernel of their own".into());
        }
        if at_once && halves && turned.is_none() && m.head_dim.is_multiple_of(16) && m.head_dim <= PREFILL_DIM
        {
            return self.prefill_attention(m, &shape, most(PREFILL_HEADS), tokens);
        }
        let room = TensorType::new(DType::F32, [tokens, Dim::n(m.heads * parts * (m.head_dim + 2))]);
        let room = self.scratch(room);
        let cache = |id: ArgId| match self.ty(id)?.dtype {
            DType::F16 => Ok("HalfCache"),
            DType::F32 => Ok("FloatCache"),
            other => Err(format!("a cache of {other}")),
        };
        let (k, v) = (cache(m.k)?, cache(m.v)?);
        let step =
            format!("(const i32*)a{}, (const i32*)a{}, (const i32*)a{}", m.lengths, m.sequences, m.positions);
        let width = m.heads * m.head_dim;
        let out = self.store(m.out, width)?;
        let given = [m.lengths, m.sequences, m.positions, m.tables];
        let waits = self.waits_unless_given(given);
        let (early, queries) = match turned {
            None => (waits.to_string(), format!("Stored<{shape}>{{(const float*)a{}}}", m.q)),
            Some(turned) => {
                let waits =
                    self.waits_unless_given(given.into_iter().chain([turned.rows]).chain(turned.factors));
                (
                    waits.to_string() + &self.turning(turned, m, shared, &shape, [k, v], tokens)?,
                    "turning".into(),
                )
            }
        };
        let header = if turned.is_some() { "rope_attention.h" } else { "attention.h" };
        let body = format!(
            "{early}attend_part<{ATTENDING}, {shared}, {shape}, {k}, {v}>({queries}, (const {k}::Element*)a{}, (const {v}::Element*)a{}, (const i32*)a{}, {step}, {}, (float*)a{room}, {out});\n",
            m.k,
            m.v,
            m.tables,
            float(m.scale)
        );
        let grid = vec![Extent::each(tokens), Extent::each(m.heads / shared), Extent::each(parts)];
        self.file(&[header], ATTENDING, grid, body);
        self.constants(turned.map_or_else(String::new, |turned| turns(&turned.rope)));
        if let (Some(file), true) = (self.files.last_mut(), m.head_dim <= NARROW) {
            file.blocks = ATTENDING_AT_ONCE;
        }
        if at_once {
            return Ok(());
        }
        let body = format!(
            "{waits}join_parts<{shape}>((const float*)a{room}, {step}, block_y(), block_x() * {THREADS} + thread(), {out});\n"
        );
        let grid = vec![Extent::each(tokens), Extent { dim: Dim::n(width), per: THREADS }];
        self.file(&["attention.h"], THREADS, grid, body);
        Ok(())
    }

    /// What turns the queries of a block, and the keys of the step.
    fn turning(
        &self,
        m: &RopeKvSpec,
        attention: &AttentionSpec,
        shared: u64,
        shape: &str,
        [k, v]: [&str; 2],
        tokens: Dim,
    ) -> Result<String, String> {
        let (Some(q), Some(values)) = (&m.q, &m.v) else { return Err("no queries or no values".into()) };
        let most = tokens.eval(self.bounds);
        let interleaved = m.rope.style == RopeStyle::Interleaved;
        let ty = format!(
            "Turning<{ATTENDING}, {most}, {shared}, {}, {interleaved}, {shape}, {k}, {v}>",
            m.rope.dims
        );
        let heads = |x: ArgId, norm| format!("{{(const float*)a{x}, {}}}", head_norm(norm));
        Ok(format!(
            "typedef {ty} Turns;\n__shared__ Turns::Room room;\nTurns turning{{room, {}, {}, (const float*)a{}, TURNS, {}, (const i32*)a{}, {}, ({k}::Element*)a{}, ({v}::Element*)a{}}};\nturning.rows_from((const i32*)a{});\n",
            heads(q.x, q.norm.as_ref()),
            heads(m.k.rows.x, m.k.norm.as_ref()),
            values.x,
            floats(m.factors),
            m.positions,
            symbol(tokens)?,
            attention.k,
            attention.v,
            m.rows,
        ))
    }

    fn prefill_attention(
        &mut self,
        m: &AttentionSpec,
        shape: &str,
        shared: u64,
        tokens: Dim,
    ) -> Result<(), String> {
        let waits = self.waits_unless_given([m.lengths, m.sequences, m.positions, m.tables]);
        let body = format!(
            "{waits}__shared__ AttentionTile<{shape}> tile;\nattend<{shared}, {shape}>(tile, (const float*)a{}, (const u16*)a{}, (const u16*)a{}, (const i32*)a{}, (const i32*)a{}, (const i32*)a{}, (const i32*)a{}, {}, {}, {});\n",
            m.q,
            m.k,
            m.v,
            m.tables,
            m.lengths,
            m.sequences,
            m.positions,
            float(m.scale),
            symbol(tokens)?,
            self.store(m.out, m.heads * m.head_dim)?
        );
        let of_tokens = Extent { dim: tokens, per: (QUERIES / shared) as u32 };
        let grid = vec![of_tokens, Extent::each(m.heads / shared)];
        self.file(&["prefill_attention.h"], PREFILL_THREADS, grid, body);
        // Queries and weights, as the cache.
        self.precision = DType::F16;
        if let Some(file) = self.files.last_mut() {
            file.blocks = PREFILL_AT_ONCE;
        }
        Ok(())
    }
}
