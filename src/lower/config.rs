//! What the metadata of a model file says about its shape, validated.

use super::keys::Keys;
use super::{Architecture, LowerError};
use crate::gguf::Gguf;
use crate::ir::{MAX_HEAD_DIM, Rope, RopeStyle};

/// The hyperparameters of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub width: u64,
    pub layers: Vec<Layer>,
    /// Epsilon of every RMSNorm.
    pub eps: f32,
    /// The context length that the model was trained for.
    pub trained_context: u64,
}

/// What one layer is like: layers may differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Width of the feed-forward layer.
    pub ffn: u64,
    pub heads: u64,
    /// Heads of the key and value caches; each serves `heads / kv_heads` query heads.
    pub kv_heads: u64,
    pub head_dim: u64,
    pub rope: Rope,
    /// Positions that a token sees, itself included, if not all before it.
    pub window: Option<u32>,
}

impl Config {
    /// Reads and validates the metadata.
    ///
    /// # Errors
    /// A missing, mistyped or impossible key by name; an unknown architecture with the list of known ones; a key that
    /// asks for mathematics that is not implemented, or that is not known.
    pub fn from_gguf(gguf: &Gguf) -> Result<Config, LowerError> {
        let architecture = Architecture::of(gguf)?;
        let keys = Keys::new(gguf, architecture)?;
        let window = window(&keys, architecture)?;
        let width = keys.count("embedding_length", 1 << 20)?;
        let layers = keys.count("block_count", 1 << 10)? as usize;
        let missing = |name: &str| keys.count(name, 1).map(|n| vec![n; layers]);
        let or_missing = |name: &str, max| keys.counts(name, layers, max)?.map_or_else(|| missing(name), Ok);
        let heads = or_missing("attention.head_count", 1 << 14)?;
        let ffn = or_missing("feed_forward_length", 1 << 20)?;
        let kv_heads = keys.counts("attention.head_count_kv", layers, 1 << 14)?;
        // Where heads differ but the key is absent, llama.cpp takes those of the first layer.
        let of_width = width / heads.first().copied().unwrap_or(1);
        let head_dim = keys.count_or("attention.key_length", of_width, MAX_HEAD_DIM)?;
        let base = keys.float("rope.freq_base", Some(10000.0))?;
        let mut all = vec![];
        for (i, (heads, ffn)) in heads.iter().copied().zip(ffn).enumerate() {
            let kv_heads = kv_heads.as_ref().map_or(heads, |of_layer| of_layer[i]);
            if heads % kv_heads != 0 {
                let detail = format!("{kv_heads} KV heads do not divide {heads} heads");
                return Err(keys.wrong("attention.head_count_kv", detail));
            }
            let value_dim = keys.count_or("attention.value_length", head_dim, MAX_HEAD_DIM)?;
            if value_dim != head_dim {
                let detail = format!("values of {value_dim} beside keys of {head_dim} are not supported");
                return Err(keys.wrong("attention.value_length", detail));
            }
            let rope = rope(&keys, base, head_dim, architecture.rope_style())?;
            all.push(Layer { ffn, heads, kv_heads, head_dim, rope, window });
        }
        let eps = keys.float("attention.layer_norm_rms_epsilon", None)?;
        let trained_context = keys.count_or("context_length", 2048, 1 << 24)?;
        // In which order the rows of queries and keys lie, and with them the pairs that RoPE turns.
        let order = match architecture.rope_style() {
            RopeStyle::Interleaved => "Meta AI original pth",
            RopeStyle::NeoX => "reference",
        };
        keys.refuse_unless("tensor_data_layout", |value| value.as_str() == Some(order))?;
        keys.finish()?;
        Ok(Config { architecture, width, layers: all, eps, trained_context })
    }

    /// Bytes that `rows` of all key and value caches take with elements of `element_bytes`.
    pub fn cache_bytes(&self, rows: u64, element_bytes: u64) -> u64 {
        let of_layer = |layer: &Layer| layer.kv_heads.saturating_mul(layer.head_dim).saturating_mul(2);
        let elements = self.layers.iter().map(of_layer).fold(0, u64::saturating_add);
        elements.saturating_mul(rows).saturating_mul(element_bytes)
    }
}

/// The window of all layers, where the architecture has one.
fn window(keys: &Keys, architecture: Architecture) -> Result<Option<u32>, LowerError> {
    match architecture {
        Architecture::Phi3 => {
            let name = "attention.sliding_window";
            let window = keys.number_or_none(name)?.map(u32::try_from).transpose();
            let window = window.map_err(|_| keys.wrong(name, "more than any context".into()))?;
            if window.is_some() {
                // All layers have it, or none.
                keys.refuse_unless("attention.sliding_window_pattern", |_| false)?;
            }
            Ok(window)
        }
        Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => Ok(None),
    }
}

fn rope(keys: &Keys, base: f32, head_dim: u64, style: RopeStyle) -> Result<Rope, LowerError> {
    let dims = keys.count_or("rope.dimension_count", head_dim, MAX_HEAD_DIM)?;
    if dims % 2 != 0 || dims > head_dim {
        // Where a key is absent, it is what it follows from that is wrong.
        let given = ["rope.dimension_count", "attention.key_length"].into_iter().find(|name| keys.has(name));
        let detail = format!("cannot rotate {dims} dimensions of heads of {head_dim}");
        return Err(keys.wrong(given.unwrap_or("attention.head_count"), detail));
    }
    Ok(Rope { base, dims: u32::try_from(dims).unwrap_or(u32::MAX), style })
}
