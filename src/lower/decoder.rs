//! The decoder that `llama`, `qwen2` and `qwen3` share: pre-norm blocks of grouped-query attention with RoPE and a SwiGLU
//! feed-forward. They differ in [`super::Architecture`] and in the biases that their files have.

use super::builder::Builder;
use super::{Config, Head, LowerError, Step};
use crate::ir::{DType, Dim, Op, TensorType, Value};

/// Builds the step and returns its results; the caches' last versions are noted in the builder.
pub fn build(b: &mut Builder, c: &Config, step: &Step) -> Result<Vec<Value>, LowerError> {
    let ids = TensorType::new(DType::I32, [Dim::T]);
    let tokens = b.input("tokens", ids.clone())?;
    let pos = b.input("pos", ids)?;
    let vocab = b.rows("token_embd.weight")?;
    let factors = match b.has("rope_freqs.weight") {
        true => Some(b.float("rope_freqs.weight", &[u64::from(c.rope.dims) / 2])?),
        false => None,
    };

    let table = b.weight("token_embd.weight", &[vocab, c.width])?;
    let rows = b.op(Op::GetRows, &[table, tokens])?;
    let mut x = b.dequant(rows)?;
    for layer in 0..c.layers {
        let a = norm(b, c, x, &format!("blk.{layer}.attn_norm"))?;
        let mut mixed = attention(b, c, step, layer, a, pos, factors)?;
        if layer + 1 == c.layers && step.head == Head::LastRow {
            // Nothing after this looks at other tokens, so the rest is computed for the last one only.
            mixed = b.op(Op::LastRow, &[mixed])?;
            x = b.op(Op::LastRow, &[x])?;
        }
        let y = b.linear(mixed, &format!("blk.{layer}.attn_output"), c.width, c.heads * c.head_dim)?;
        x = b.op(Op::Add, &[x, y])?;
        let f = norm(b, c, x, &format!("blk.{layer}.ffn_norm"))?;
        let y = feed_forward(b, c, layer, f)?;
        x = b.op(Op::Add, &[x, y])?;
    }
    let x = norm(b, c, x, "output_norm")?;
    let head = if b.has("output.weight") { "output" } else { "token_embd" };
    let logits = b.linear(x, head, vocab, c.width)?;
    Ok(match (step.head, step.greedy) {
        (Head::None, _) => vec![],
        (_, false) => vec![logits],
        (_, true) => vec![b.op(Op::ArgMax, &[logits])?],
    })
}

fn norm(b: &mut Builder, c: &Config, x: Value, name: &str) -> Result<Value, LowerError> {
    let w = b.float(&format!("{name}.weight"), &[c.width])?;
    b.op(Op::RmsNorm { eps: c.eps }, &[x, w])
}

fn attention(
    b: &mut Builder,
    c: &Config,
    step: &Step,
    layer: u64,
    x: Value,
    pos: Value,
    factors: Option<Value>,
) -> Result<Value, LowerError> {
    let mut heads = |name: &str, n: u64| {
        let y = b.linear(x, &format!("blk.{layer}.attn_{name}"), n * c.head_dim, c.width)?;
        let y = b.reshape(y, &[Dim::T, Dim::n(n), Dim::n(c.head_dim)])?;
        if !c.architecture.qk_norm || name == "v" {
            return Ok(y);
        }
        let w = b.float(&format!("blk.{layer}.attn_{name}_norm.weight"), &[c.head_dim])?;
        b.op(Op::RmsNorm { eps: c.eps }, &[y, w])
    };
    let q = heads("q", c.heads)?;
    let k = heads("k", c.cache_heads)?;
    let v = heads("v", c.cache_heads)?;
    let mut turn = |x| {
        let operands: Vec<Value> = [x, pos].into_iter().chain(factors).collect();
        b.op(Op::Rope(c.rope), &operands)
    };
    let (q, k) = (turn(q)?, turn(k)?);
    let mut append = |name: &str, rows: Value| {
        let shape = [Dim::S, Dim::n(c.cache_heads), Dim::n(c.head_dim)];
        let cache = b.state(format!("blk.{layer}.{name}"), TensorType::new(step.kv, shape))?;
        let cache = b.op(Op::KvAppend, &[cache, rows])?;
        b.last_version(cache);
        let filled = b.op(Op::KvRead, &[cache])?;
        b.dequant(filled)
    };
    let (k, v) = (append("k", k)?, append("v", v)?);
    let scale = (1.0 / (c.head_dim as f64).sqrt()) as f32;
    let scores = b.op(Op::Scores { scale }, &[q, k])?;
    let scores = b.op(Op::CausalMask, &[scores])?;
    let p = b.op(Op::Softmax, &[scores])?;
    let mixed = b.op(Op::WeightedSum, &[p, v])?;
    b.reshape(mixed, &[Dim::T, Dim::n(c.heads * c.head_dim)])
}

/// `(silu(x·gateᵀ) · x·upᵀ) · downᵀ`.
fn feed_forward(b: &mut Builder, c: &Config, layer: u64, x: Value) -> Result<Value, LowerError> {
    let gate = b.linear(x, &format!("blk.{layer}.ffn_gate"), c.ffn, c.width)?;
    let up = b.linear(x, &format!("blk.{layer}.ffn_up"), c.ffn, c.width)?;
    let gate = b.op(Op::Silu, &[gate])?;
    let y = b.op(Op::Mul, &[gate, up])?;
    b.linear(y, &format!("blk.{layer}.ffn_down"), c.width, c.ffn)
}
