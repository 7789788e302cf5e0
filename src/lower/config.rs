//! What the metadata of a model file says about its shape, validated.

use super::{Architecture, LowerError};
use crate::gguf::Gguf;
use crate::ir::{MAX_HEAD_DIM, Rope};

/// The hyperparameters of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    pub layers: u64,
    /// Width of the residual stream.
    pub width: u64,
    /// Width of the feed-forward layer.
    pub ffn: u64,
    pub heads: u64,
    /// Heads of the key and value caches; each serves `heads / kv_heads` query heads.
    pub kv_heads: u64,
    pub head_dim: u64,
    /// Epsilon of every RMSNorm.
    pub eps: f32,
    pub rope: Rope,
    /// The context length that the model was trained for.
    pub trained_context: u64,
}

impl Config {
    /// Reads and validates the metadata.
    ///
    /// # Errors
    /// A missing, mistyped or impossible key by name; an unknown architecture with the list of known ones; a key that
    /// asks for mathematics that is not implemented.
    pub fn from_gguf(gguf: &Gguf) -> Result<Config, LowerError> {
        let architecture = Architecture::of(gguf)?;
        let key = |name: &str| format!("{}.{name}", architecture.name);
        architecture.refuse_unimplemented(gguf)?;
        let positive = |name: &str, x: u64, max: u64| {
            if (1..=max).contains(&x) {
                Ok(x)
            } else {
                Err(LowerError::Key { key: key(name), detail: format!("{x} is not in 1..={max}") })
            }
        };
        let count = |name: &str, max: u64| positive(name, gguf.u64(&key(name))?, max);
        let layers = count("block_count", 1 << 10)?;
        let width = count("embedding_length", 1 << 20)?;
        let heads = count("attention.head_count", 1 << 14)?;
        let optional = |name: &str, default: u64, max: u64| {
            positive(name, gguf.u64_opt(&key(name))?.unwrap_or(default), max)
        };
        let kv_heads = optional("attention.head_count_kv", heads, 1 << 14)?;
        if heads % kv_heads != 0 {
            let detail = format!("{kv_heads} KV heads do not divide {heads} heads");
            return Err(LowerError::Key { key: key("attention.head_count_kv"), detail });
        }
        let head_dim = optional("attention.key_length", width / heads, MAX_HEAD_DIM)?;
        let value_dim = optional("attention.value_length", head_dim, MAX_HEAD_DIM)?;
        if value_dim != head_dim {
            let detail = format!("values of {value_dim} beside keys of {head_dim} are not supported");
            return Err(LowerError::Key { key: key("attention.value_length"), detail });
        }
        let dims = optional("rope.dimension_count", head_dim, MAX_HEAD_DIM)?;
        if dims % 2 != 0 || dims > head_dim {
            // Where a key is absent, it is what it follows from that is wrong.
            let given = ["rope.dimension_count", "attention.key_length"];
            let given = given.into_iter().find(|name| gguf.metadata.contains_key(&key(name)));
            let detail = format!("cannot rotate {dims} dimensions of heads of {head_dim}");
            return Err(LowerError::Key { key: key(given.unwrap_or("attention.head_count")), detail });
        }
        let float = |name: &str, default: Option<f32>| {
            let x = match default {
                Some(default) => gguf.f32_opt(&key(name))?.unwrap_or(default),
                None => gguf.f32(&key(name))?,
            };
            if x.is_finite() && x > 0.0 {
                Ok(x)
            } else {
                Err(LowerError::Key {
                    key: key(name),
                    detail: format!("{x} is not a finite number above zero"),
                })
            }
        };
        Ok(Config {
            layers,
            width,
            ffn: count("feed_forward_length", 1 << 20)?,
            heads,
            kv_heads,
            head_dim,
            eps: float("attention.layer_norm_rms_epsilon", None)?,
            rope: Rope {
                base: float("rope.freq_base", Some(10000.0))?,
                dims: u32::try_from(dims).unwrap_or(u32::MAX),
                style: architecture.rope,
            },
            trained_context: optional("context_length", 2048, 1 << 24)?,
            architecture,
        })
    }

    /// Bytes that `rows` of all key and value caches take with elements of `element_bytes`.
    pub fn cache_bytes(&self, rows: u64, element_bytes: u64) -> u64 {
        [2, self.layers, self.kv_heads, self.head_dim, element_bytes]
            .into_iter()
            .fold(rows, |n, x| n.saturating_mul(x))
    }
}
