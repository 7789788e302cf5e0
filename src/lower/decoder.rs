//! The decoder that `llama`, `qwen2` and `qwen3` share: pre-norm blocks of grouped-query attention with RoPE and a SwiGLU
//! feed-forward. They differ in [`super::Architecture`] and in the biases that their files have.

use super::builder::Builder;
use super::{Config, LowerError, Step};
use crate::ir::{DType, Dim, Op, PAGE, StateRole, StepInput, TensorType, Value};

/// Builds the step and returns its results; the caches' last versions are noted in the builder.
pub fn build(b: &mut Builder, c: &Config, step: &Step) -> Result<Vec<Value>, LowerError> {
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
        true => Some(b.float("rope_freqs.weight", &[u64::from(c.rope.dims) / 2])?),
        false => None,
    };

    let table = b.weight("token_embd.weight", &[vocab, c.width])?;
    let rows = b.op(Op::GetRows, &[table, tokens])?;
    let mut x = b.dequant(rows)?;
    for layer in 0..c.layers {
        let a = norm(b, c, x, &format!("blk.{layer}.attn_norm"))?;
        let mut mixed = attention(b, c, step, layer, a, &at, factors)?;
        // Nothing after the last attention looks at other tokens, so the rest is computed for the wanted rows only. Where
        // they may be all, one fetch after the sum takes fewer launches than two before it.
        let last = layer + 1 == c.layers;
        let early = last && step.wanted < step.tokens;
        if early {
            mixed = b.op(Op::GetRows, &[mixed, wanted])?;
            x = b.op(Op::GetRows, &[x, wanted])?;
        }
        let y = b.linear(mixed, &format!("blk.{layer}.attn_output"), c.width, c.heads * c.head_dim)?;
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
    let logits = b.linear(x, head, vocab, c.width)?;
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

fn attention(
    b: &mut Builder,
    c: &Config,
    step: &Step,
    layer: u64,
    x: Value,
    at: &Places,
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
    let k = heads("k", c.kv_heads)?;
    let v = heads("v", c.kv_heads)?;
    let mut turn = |x| {
        let operands: Vec<Value> = [x, at.positions].into_iter().chain(factors).collect();
        b.op(Op::Rope(c.rope), &operands)
    };
    let (q, k) = (turn(q)?, turn(k)?);
    let mut append = |name: &str, dtype: DType, rows: Value| {
        let ty = TensorType::new(dtype, [step.rows(), c.kv_heads, c.head_dim]);
        let cache = b.state(format!("blk.{layer}.{name}"), StateRole::Appended, ty)?;
        let cache = b.op(Op::KvAppend, &[cache, rows, at.rows])?;
        b.last_version(cache);
        let filled = b.op(Op::KvRead { page: PAGE }, &[cache, at.tables, at.lengths])?;
        b.dequant(filled)
    };
    let (k, v) = (append("k", step.kv.k, k)?, append("v", step.kv.v, v)?);
    let scale = (1.0 / (c.head_dim as f64).sqrt()) as f32;
    let scores = b.op(Op::Scores { scale }, &[q, k, at.sequences])?;
    let scores = b.op(Op::CausalMask { window: None }, &[scores, at.positions])?;
    let p = b.op(Op::Softmax, &[scores])?;
    let mixed = b.op(Op::WeightedSum, &[p, v, at.sequences])?;
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
