//! What each family of models computes, over blocks that they share.

use super::builder::{Builder, Matrix};
use super::config::Layer;
use super::{Architecture, Config, LowerError, Step};
use crate::ir::{DType, Dim, Op, PAGE, StateRole, StepInput, TensorType, Value};

type Built<T> = Result<T, LowerError>;

/// Builds the step and returns its results; the caches' last versions are noted in the builder.
pub fn build(b: &mut Builder, c: &Config, step: &Step) -> Built<Vec<Value>> {
    match c.architecture {
        Architecture::Llama => llama(b, c, step),
        Architecture::Phi3 => phi3(b, c, step),
        Architecture::Qwen2 => qwen2(b, c, step),
        Architecture::Qwen3 => qwen3(b, c, step),
    }
}

/// LLaMA (Touvron et al., 2023, arXiv:2302.13971) and all that is like it.
fn llama(b: &mut Builder, c: &Config, step: &Step) -> Built<Vec<Value>> {
    decoder(b, c, step, projections, swiglu)
}

/// As LLaMA; its biases of queries, keys and values are where the file has them.
fn qwen2(b: &mut Builder, c: &Config, step: &Step) -> Built<Vec<Value>> {
    decoder(b, c, step, projections, swiglu)
}

/// Queries and keys go through an RMSNorm per head before RoPE.
fn qwen3(b: &mut Builder, c: &Config, step: &Step) -> Built<Vec<Value>> {
    decoder(b, c, step, normed_projections, swiglu)
}

/// One tensor holds the rows of queries, keys and values, another those of gate and up; there may be a window.
fn phi3(b: &mut Builder, c: &Config, step: &Step) -> Built<Vec<Value>> {
    decoder(b, c, step, projections, swiglu_of_one)
}

/// Queries, keys and values of a layer, with heads apart.
type Projections = fn(&mut Builder, &Config, usize, Value) -> Built<[Value; 3]>;
/// The feed-forward block of a layer.
type FeedForward = fn(&mut Builder, &Config, usize, Value) -> Built<Value>;

/// Pre-norm blocks of grouped-query attention with RoPE, and of a feed-forward block.
fn decoder(
    b: &mut Builder,
    c: &Config,
    step: &Step,
    projections: Projections,
    feed_forward: FeedForward,
) -> Built<Vec<Value>> {
    let tokens = b.step_input(StepInput::Tokens, &[Dim::T])?;
    let (sequences, pages) = (Dim::n(step.sequences), Dim::n(step.table_pages()));
    let at = Places {
        positions: b.step_input(StepInput::Positions, &[Dim::T])?,
        sequences: b.step_input(StepInput::Sequences, &[Dim::T])?,
        rows: b.step_input(StepInput::Rows, &[Dim::T])?,
        tables: b.step_input(StepInput::Tables, &[sequences, pages])?,
        lengths: b.step_input(StepInput::Lengths, &[sequences])?,
    };
    let wanted = b.step_input(StepInput::Wanted, &[Dim::R])?;
    let vocab = b.rows("token_embd.weight")?;
    let factors = match b.has("rope_freqs.weight") {
        true => {
            let dims = c.layers.first().map_or(0, |layer| layer.rope.dims);
            Some(b.float("rope_freqs.weight", &[u64::from(dims) / 2])?)
        }
        false => None,
    };

    let table = b.weight("token_embd.weight", &[vocab, c.width])?;
    let rows = b.op(Op::GetRows, &[table, tokens])?;
    let mut x = b.dequant(rows)?;
    for (layer, of) in c.layers.iter().enumerate() {
        let a = norm(b, c, x, &format!("blk.{layer}.attn_norm"))?;
        let heads = projections(b, c, layer, a)?;
        let mut mixed = attention(b, of, step, layer, heads, &at, factors)?;
        // Nothing after the last attention looks at other tokens, so the rest is computed for the wanted rows only. Where
        // they may be all, one fetch after the sum takes fewer launches than two before it.
        let last = layer + 1 == c.layers.len();
        let early = last && step.wanted < step.tokens;
        if early {
            mixed = b.op(Op::GetRows, &[mixed, wanted])?;
            x = b.op(Op::GetRows, &[x, wanted])?;
        }
        let output = Matrix::whole(format!("blk.{layer}.attn_output"), c.width, of.heads * of.head_dim);
        let y = b.linear(mixed, &output)?;
        x = b.op(Op::Add, &[x, y])?;
        if last && !early {
            x = b.op(Op::GetRows, &[x, wanted])?;
        }
        let f = norm(b, c, x, &format!("blk.{layer}.ffn_norm"))?;
        let y = feed_forward(b, c, layer, f)?;
        x = b.op(Op::Add, &[x, y])?;
    }
    let x = norm(b, c, x, "output_norm")?;
    let head = if b.has("output.weight") { "output" } else { "token_embd" };
    let logits = b.linear(x, &Matrix::whole(head, vocab, c.width))?;
    Ok(vec![if step.greedy { b.op(Op::ArgMax, &[logits])? } else { logits }])
}

/// Where the tokens of a step are, as inputs.
struct Places {
    positions: Value,
    sequences: Value,
    rows: Value,
    tables: Value,
    lengths: Value,
}

fn norm(b: &mut Builder, c: &Config, x: Value, name: &str) -> Result<Value, LowerError> {
    let w = b.float(&format!("{name}.weight"), &[c.width])?;
    b.op(Op::RmsNorm { eps: c.eps }, &[x, w])
}

/// The rows of queries, keys and values, in tensors of their own or below each other in one.
fn projections(b: &mut Builder, c: &Config, layer: usize, x: Value) -> Built<[Value; 3]> {
    let Layer { heads, kv_heads, head_dim, .. } = c.layers[layer];
    let (fused, mut first) = (format!("blk.{layer}.attn_qkv"), 0);
    let of = (heads + 2 * kv_heads) * head_dim;
    let in_one = b.has(&format!("{fused}.weight"));
    let mut project = |name: &str, heads: u64| {
        let rows = heads * head_dim;
        let matrix = match in_one {
            true => Matrix::rows(&fused, first, rows, of, c.width),
            false => Matrix::whole(format!("blk.{layer}.attn_{name}"), rows, c.width),
        };
        first += rows;
        let y = b.linear(x, &matrix)?;
        b.reshape(y, &[Dim::T, Dim::n(heads), Dim::n(head_dim)])
    };
    Ok([project("q", heads)?, project("k", kv_heads)?, project("v", kv_heads)?])
}

fn normed_projections(b: &mut Builder, c: &Config, layer: usize, x: Value) -> Built<[Value; 3]> {
    let [q, k, v] = projections(b, c, layer, x)?;
    let mut normed = |y: Value, name: &str| {
        let w = b.float(&format!("blk.{layer}.attn_{name}_norm.weight"), &[c.layers[layer].head_dim])?;
        b.op(Op::RmsNorm { eps: c.eps }, &[y, w])
    };
    Ok([normed(q, "q")?, normed(k, "k")?, v])
}

fn attention(
    b: &mut Builder,
    of: &Layer,
    step: &Step,
    layer: usize,
    [q, k, v]: [Value; 3],
    at: &Places,
    factors: Option<Value>,
) -> Built<Value> {
    let mut turn = |x| {
        let operands: Vec<Value> = [x, at.positions].into_iter().chain(factors).collect();
        b.op(Op::Rope(of.rope), &operands)
    };
    let (q, k) = (turn(q)?, turn(k)?);
    let mut append = |name: &str, dtype: DType, rows: Value| {
        let ty = TensorType::new(dtype, [step.rows(), of.kv_heads, of.head_dim]);
        let cache = b.state(format!("blk.{layer}.{name}"), StateRole::Appended, ty)?;
        let cache = b.op(Op::KvAppend, &[cache, rows, at.rows])?;
        b.last_version(cache);
        let filled = b.op(Op::KvRead { page: PAGE }, &[cache, at.tables, at.lengths])?;
        b.dequant(filled)
    };
    let (k, v) = (append("k", step.kv.k, k)?, append("v", step.kv.v, v)?);
    let scale = (1.0 / (of.head_dim as f64).sqrt()) as f32;
    let scores = b.op(Op::Scores { scale }, &[q, k, at.sequences])?;
    let scores = b.op(Op::CausalMask { window: of.window }, &[scores, at.positions])?;
    let p = b.op(Op::Softmax, &[scores])?;
    let mixed = b.op(Op::WeightedSum, &[p, v, at.sequences])?;
    b.reshape(mixed, &[Dim::T, Dim::n(of.heads * of.head_dim)])
}

/// `(silu(x·gateᵀ) · x·upᵀ) · downᵀ` (Shazeer, 2020, arXiv:2002.05202).
fn swiglu(b: &mut Builder, c: &Config, layer: usize, x: Value) -> Built<Value> {
    let ffn = c.layers[layer].ffn;
    let [gate, up] =
        ["gate", "up"].map(|part| Matrix::whole(format!("blk.{layer}.ffn_{part}"), ffn, c.width));
    gated(b, c, layer, x, [gate, up])
}

/// The same, where the rows of gate and up lie below each other in `ffn_up`.
fn swiglu_of_one(b: &mut Builder, c: &Config, layer: usize, x: Value) -> Built<Value> {
    let (ffn, name) = (c.layers[layer].ffn, format!("blk.{layer}.ffn_up"));
    let halves = [0, ffn].map(|first| Matrix::rows(&name, first, ffn, 2 * ffn, c.width));
    gated(b, c, layer, x, halves)
}

fn gated(b: &mut Builder, c: &Config, layer: usize, x: Value, [gate, up]: [Matrix; 2]) -> Built<Value> {
    let (gate, up) = (b.linear(x, &gate)?, b.linear(x, &up)?);
    let gate = b.op(Op::Silu, &[gate])?;
    let y = b.op(Op::Mul, &[gate, up])?;
    b.linear(y, &Matrix::whole(format!("blk.{layer}.ffn_down"), c.width, c.layers[layer].ffn))
}
