//! The reader of hyperparameters: it marks each key that it was asked for, and in the end refuses those that nobody read.

use super::{Architecture, LowerError};
use crate::gguf::{Gguf, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// The metadata of a model, as its architecture's reader goes over it.
pub struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: Architecture,
    consumed: RefCell<BTreeSet<String>>,
}

/// Keys, after the architecture's name, that change the mathematics in ways that are not implemented, and the value that means "not
/// used". An architecture that does implement one reads it first.
pub const UNSUPPORTED: [(&str, f64); 27] = [
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.output_scale", 1.0),
    ("attention.scale", 0.0),
    // Even one as long as the trained context counts: a longer context may be asked for.
    ("attention.sliding_window", 0.0),
    ("attention.temperature_length", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attention.value_scale", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("expert_count", 0.0),
    ("expert_feed_forward_length", 0.0),
    ("expert_group_count", 0.0),
    ("expert_group_used_count", 0.0),
    ("expert_shared_count", 0.0),
    ("expert_used_count", 0.0),
    ("final_logit_softcapping", 0.0),
    ("leading_dense_block_count", 0.0),
    ("logit_scale", 1.0),
    ("nextn_predict_layers", 0.0),
    ("residual_scale", 1.0),
    ("rope.scale_linear", 1.0),
    ("rope.scaling.alpha", 0.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.factor", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("use_parallel_residual", 0.0),
];

/// Keys, after the architecture's name, that change nothing in what is computed.
pub const HARMLESS: [&str; 8] = [
    // The epsilon of a LayerNorm, which none of these has.
    "attention.layer_norm_epsilon",
    // Which layers have a window, where there is none.
    "attention.sliding_window_pattern",
    // How an embedding is taken from the last states, which is not asked for.
    "pooling_type",
    // Parameters and history of a RoPE scaling that is refused, or is none.
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    // The embedding's rows decide.
    "vocab_size",
];

/// Keys outside of the architecture's own with but one value that a whole, plain model has.
const GENERAL: [(&str, &[&str]); 3] =
    [("general.type", &["\"model\""]), ("split.count", &["0", "1"]), ("adapter.type", &[])];

impl<'a> Keys<'a> {
    /// # Errors
    /// A file that is no whole model by itself.
    pub fn new(gguf: &'a Gguf, architecture: Architecture) -> Result<Keys<'a>, LowerError> {
        for (key, plain) in GENERAL {
            if let Some(value) = gguf.metadata.get(key).map(Value::to_string)
                && !plain.contains(&value.as_str())
            {
                return Err(LowerError::NotWhole { key: key.into(), value });
            }
        }
        Ok(Keys { gguf, architecture, consumed: RefCell::default() })
    }

    /// The whole name of a key.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name())
    }

    /// Whether the file has a key.
    pub fn has(&self, name: &str) -> bool {
        self.gguf.metadata.contains_key(&self.key(name))
    }

    /// An error about a key.
    pub fn wrong(&self, name: &str, detail: String) -> LowerError {
        LowerError::Key { key: self.key(name), detail }
    }

    /// Marks a key as read, and returns its value.
    fn take(&self, name: &str) -> Option<&'a Value> {
        let key = self.key(name);
        let value = self.gguf.metadata.get(&key);
        self.consumed.borrow_mut().insert(key);
        value
    }

    fn positive(&self, name: &str, x: u64, max: u64) -> Result<u64, LowerError> {
        if (1..=max).contains(&x) { Ok(x) } else { Err(self.wrong(name, format!("{x} is not in 1..={max}"))) }
    }

    /// A number in `1..=max`, which must be there.
    ///
    /// # Errors
    /// The key that is missing, of another type or out of bounds.
    pub fn count(&self, name: &str, max: u64) -> Result<u64, LowerError> {
        self.take(name);
        self.positive(name, self.gguf.u64(&self.key(name))?, max)
    }

    /// A number in `1..=max`, or the default.
    ///
    /// # Errors
    /// The key that is of another type or out of bounds.
    pub fn count_or(&self, name: &str, default: u64, max: u64) -> Result<u64, LowerError> {
        self.take(name);
        self.positive(name, self.gguf.u64_opt(&self.key(name))?.unwrap_or(default), max)
    }

    /// A number in `1..=max` for each of `layers`: one for all, or a list; none if there is no such key.
    ///
    /// # Errors
    /// The key that is of another type, of another length or out of bounds.
    pub fn counts(&self, name: &str, layers: usize, max: u64) -> Result<Option<Vec<u64>>, LowerError> {
        let counts = match self.take(name) {
            None => return Ok(None),
            Some(Value::Array(array)) => match array.to_u64s() {
                Some(counts) if counts.len() == layers => counts,
                _ => {
                    let value = Value::Array(array.clone());
                    return Err(self.wrong(name, format!("{value} is no number for each of {layers} layers")));
                }
            },
            Some(_) => vec![self.gguf.u64(&self.key(name))?; layers],
        };
        counts.into_iter().map(|x| self.positive(name, x, max)).collect::<Result<Vec<_>, _>>().map(Some)
    }

    /// A number that may be zero or missing, which is the same.
    ///
    /// # Errors
    /// The key that is of another type.
    pub fn number_or_none(&self, name: &str) -> Result<Option<u64>, LowerError> {
        self.take(name);
        Ok(self.gguf.u64_opt(&self.key(name))?.filter(|&n| n > 0))
    }

    /// A finite number above zero; without a default it must be there.
    ///
    /// # Errors
    /// The key that is missing, of another type or out of bounds.
    pub fn float(&self, name: &str, default: Option<f32>) -> Result<f32, LowerError> {
        self.take(name);
        let x = match default {
            Some(default) => self.gguf.f32_opt(&self.key(name))?.unwrap_or(default),
            None => self.gguf.f32(&self.key(name))?,
        };
        if x.is_finite() && x > 0.0 {
            Ok(x)
        } else {
            Err(self.wrong(name, format!("{x} is not a finite number above zero")))
        }
    }

    /// Refuses a key unless it is missing or `is_plain`.
    ///
    /// # Errors
    /// The key and its value.
    pub fn refuse_unless(&self, name: &str, is_plain: impl Fn(&Value) -> bool) -> Result<(), LowerError> {
        match self.take(name) {
            Some(value) if !is_plain(value) => {
                Err(LowerError::Unimplemented { key: self.key(name), value: value.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Refuses what asks for mathematics that is not implemented, and what nobody read and nobody knows to be harmless: it might.
    ///
    /// # Errors
    /// The key and its value.
    pub fn finish(self) -> Result<(), LowerError> {
        self.refuse_unless("attention.causal", |value| number(value) == Some(1.0))?;
        self.refuse_unless("hidden_activation", |value| value.as_str() == Some("silu"))?;
        // Linear scaling is by a factor, and that is looked at.
        self.refuse_unless("rope.scaling.type", |kind| matches!(kind.as_str(), Some("none" | "linear")))?;
        for (name, unused) in UNSUPPORTED {
            if self.consumed.borrow().contains(&self.key(name)) {
                continue;
            }
            // A factor of 0 stands for none in llama.cpp too.
            let none = (name == "rope.scaling.factor").then_some(0.0);
            self.refuse_unless(name, |value| {
                let x = number(value);
                x == Some(unused) || x.is_some() && x == none
            })?;
        }
        HARMLESS.iter().for_each(|name| _ = self.take(name));
        let (prefix, consumed) = (self.key(""), self.consumed.into_inner());
        match self.gguf.metadata.iter().find(|(key, _)| key.starts_with(&prefix) && !consumed.contains(*key))
        {
            Some((key, value)) => Err(LowerError::UnknownKey { key: key.clone(), value: value.to_string() }),
            None => Ok(()),
        }
    }
}

/// A number, with 1 for true and 0 for false.
fn number(value: &Value) -> Option<f64> {
    let float = value.as_f32().map(f64::from);
    float
        .or_else(|| value.as_u64().map(|n| n as f64))
        .or_else(|| value.as_bool().map(|b| f64::from(u8::from(b))))
}
