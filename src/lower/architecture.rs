//! The architectures that can be lowered, and the metadata keys that say what else a model would need.

use super::LowerError;
use crate::gguf::{Gguf, Value};
use crate::ir::RopeStyle;

/// What sets an architecture apart; the rest is the same for all (see `decoder`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Architecture {
    /// The value of `general.architecture`, and the prefix of the model's own keys.
    pub name: &'static str,
    /// Which elements of a head RoPE turns together.
    pub rope: RopeStyle,
    /// Queries and keys go through an RMSNorm per head before RoPE.
    pub qk_norm: bool,
}

/// Every architecture that can be lowered.
pub const ARCHITECTURES: [Architecture; 3] = [
    Architecture { name: "llama", rope: RopeStyle::Interleaved, qk_norm: false },
    Architecture { name: "qwen2", rope: RopeStyle::NeoX, qk_norm: false },
    Architecture { name: "qwen3", rope: RopeStyle::NeoX, qk_norm: true },
];

/// Keys, after the architecture's name, that [`super::Config`] reads, or that change nothing in what is computed.
const UNDERSTOOD: [&str; 21] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
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

/// Keys that change the mathematics in ways that are not implemented, and the value that means "not used".
const UNUSED: [(&str, f64); 27] = [
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

/// Keys outside of the architecture's own with but one value that a whole, plain model has.
const GENERAL: [(&str, &[&str]); 3] =
    [("general.type", &["\"model\""]), ("split.count", &["0", "1"]), ("adapter.type", &[])];

impl Architecture {
    /// The architecture of a model.
    ///
    /// # Errors
    /// None given, or one that is not among [`ARCHITECTURES`].
    pub fn of(gguf: &Gguf) -> Result<Architecture, LowerError> {
        let name = gguf.str("general.architecture")?;
        let found = ARCHITECTURES.into_iter().find(|a| a.name == name);
        found.ok_or_else(|| LowerError::Architecture { architecture: name.into() })
    }

    /// Checks that no key asks for mathematics that is not implemented. A key that is not known at all might, so it
    /// is refused too.
    ///
    /// # Errors
    /// The key and its value.
    pub fn refuse_unimplemented(&self, gguf: &Gguf) -> Result<(), LowerError> {
        let unimplemented = |key: &str, value: &Value| {
            Err(LowerError::Unimplemented { key: key.into(), value: value.to_string() })
        };
        for (key, value) in &gguf.metadata {
            if let Some((_, plain)) = GENERAL.iter().find(|(general, _)| general == key)
                && !plain.contains(&value.to_string().as_str())
            {
                return Err(LowerError::NotWhole { key: key.clone(), value: value.to_string() });
            }
            let Some(name) = key.strip_prefix(self.name).and_then(|rest| rest.strip_prefix('.')) else {
                continue;
            };
            let plain = match name {
                "attention.causal" => number(value) == Some(1.0),
                "rope.scaling.type" => match value.as_str() {
                    // Linear scaling is by a factor, and that is looked at.
                    Some(kind) => kind == "none" || kind == "linear",
                    None => false,
                },
                "hidden_activation" => value.as_str() == Some("silu"),
                // In which order the rows of queries and keys lie, and with them the pairs that RoPE turns.
                "tensor_data_layout" => match self.rope {
                    RopeStyle::Interleaved => value.as_str() == Some("Meta AI original pth"),
                    RopeStyle::NeoX => value.as_str() == Some("reference"),
                },
                _ => match UNUSED.iter().find(|(unused, _)| *unused == name) {
                    // A factor of 0 stands for none in llama.cpp too.
                    Some(_) if name == "rope.scaling.factor" && number(value) == Some(0.0) => true,
                    Some((_, unused)) => number(value) == Some(*unused),
                    None if UNDERSTOOD.contains(&name) => true,
                    None => {
                        let (key, value) = (key.clone(), value.to_string());
                        return Err(LowerError::UnknownKey { key, value });
                    }
                },
            };
            if !plain {
                return unimplemented(key, value);
            }
        }
        Ok(())
    }
}

/// A number, with 1 for true and 0 for false.
fn number(value: &Value) -> Option<f64> {
    let float = value.as_f32().map(f64::from);
    float
        .or_else(|| value.as_u64().map(|n| n as f64))
        .or_else(|| value.as_bool().map(|b| f64::from(u8::from(b))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufWriter;

    fn check(architecture: &str, key: &str, value: Value) -> Result<(), String> {
        let mut writer = GgufWriter::new();
        writer.metadata("general.architecture", Value::String(architecture.into())).metadata(key, value);
        let mut bytes = vec![];
        writer.write_to(&mut bytes).unwrap();
        let gguf = Gguf::parse(&bytes, bytes.len() as u64).unwrap();
        let checked = Architecture::of(&gguf).and_then(|a| a.refuse_unimplemented(&gguf));
        checked.map_err(|e| e.to_string())
    }

    #[test]
    fn mathematics_that_is_missing_is_refused_by_key() {
        let text = |s: &str| Value::String(s.into());
        for (key, value) in [
            ("rope.scaling.type", text("yarn")),
            ("rope.scaling.type", text("longrope")),
            ("rope.scaling.type", Value::U32(1)),
            ("rope.scaling.factor", Value::F32(4.0)),
            ("rope.scale_linear", Value::F32(2.0)),
            ("rope.scaling.attn_factor", Value::F32(1.19)),
            ("attention.sliding_window", Value::U32(4096)),
            ("attention.causal", Value::Bool(false)),
            ("attention.scale", Value::F32(0.125)),
            ("attention.clamp_kqv", Value::F32(8.0)),
            ("attn_logit_softcapping", Value::F32(50.0)),
            ("final_logit_softcapping", Value::F32(30.0)),
            ("logit_scale", Value::F32(0.0625)),
            ("logit_scale", text("much")),
            ("residual_scale", Value::F32(0.22)),
            ("embedding_scale", Value::F32(12.0)),
            ("expert_count", Value::U32(8)),
            ("expert_used_count", Value::U32(2)),
            ("use_parallel_residual", Value::Bool(true)),
            ("hidden_activation", text("gelu")),
            ("tensor_data_layout", text("jploski")),
        ] {
            for architecture in ARCHITECTURES {
                let key = format!("{}.{key}", architecture.name);
                let says = check(architecture.name, &key, value.clone()).unwrap_err();
                assert!(says.contains(&key) && says.contains("not supported"), "{says}");
            }
        }
        let meta = text("Meta AI original pth");
        let says = check("qwen2", "qwen2.tensor_data_layout", meta).unwrap_err();
        assert!(says.contains("qwen2.tensor_data_layout") && says.contains("not supported"), "{says}");
        for group in ["", "attention.", "rope.", "rope.scaling.", "expert_", "ssm."] {
            for value in [Value::U32(1), Value::U32(0), Value::Bool(false)] {
                let key = format!("qwen3.{group}gate");
                let says = check("qwen3", &key, value).unwrap_err();
                assert!(says.contains(&key) && says.contains("not known"), "{says}");
            }
        }
        for (key, value) in
            [("split.count", Value::U16(3)), ("general.type", text("mmproj")), ("adapter.type", text("lora"))]
        {
            let says = check("llama", key, value).unwrap_err();
            assert!(says.contains(key) && says.contains("not a whole model"), "{says}");
        }
    }

    /// All of the table, whatever a value that is not "not used" looks like.
    #[test]
    fn every_key_of_what_is_missing_is_refused_but_for_one_value() {
        assert_eq!((UNUSED.len(), UNDERSTOOD.len()), (27, 21), "a key that moved changes what is refused");
        for (name, unused) in UNUSED {
            for Architecture { name: architecture, .. } in ARCHITECTURES {
                let key = format!("{architecture}.{name}");
                let plain = if unused == 0.0 { 0u32 } else { 1 };
                for value in [Value::F32(unused as f32), Value::U32(plain), Value::Bool(plain == 1)] {
                    assert_eq!(check(architecture, &key, value.clone()), Ok(()), "{key} {value}");
                }
                let other = unused as f32 + 0.5;
                let mut wrong = vec![
                    Value::F32(other),
                    Value::F32(f32::NAN),
                    Value::F32(-1.0),
                    Value::F64(f64::from(other)),
                    Value::U32(7),
                    Value::I32(-1),
                    Value::Bool(plain == 0),
                    Value::String(unused.to_string()),
                    Value::Array(crate::gguf::Array::F32(vec![unused as f32])),
                ];
                // The one factor of which 0 means "none" too.
                if name == "rope.scaling.factor" {
                    wrong.retain(|value| *value != Value::Bool(false));
                }
                for value in wrong {
                    let says = check(architecture, &key, value.clone()).expect_err(&format!("{key} {value}"));
                    assert!(says.contains(&key) && says.contains("not supported"), "{says}");
                }
            }
        }
    }

    #[test]
    fn keys_that_say_not_used_pass() {
        for (key, value) in [
            ("llama.rope.scaling.type", Value::String("none".into())),
            ("llama.rope.scaling.type", Value::String("linear".into())),
            ("llama.rope.scaling.factor", Value::F32(1.0)),
            ("llama.rope.scaling.factor", Value::F32(0.0)),
            ("llama.rope.scaling.original_context_length", Value::U32(8192)),
            ("llama.rope.scaling.finetuned", Value::Bool(false)),
            ("llama.attention.sliding_window", Value::U32(0)),
            ("llama.attention.causal", Value::Bool(true)),
            ("llama.attention.scale", Value::F32(0.0)),
            ("llama.expert_count", Value::U32(0)),
            ("llama.logit_scale", Value::F32(1.0)),
            ("llama.use_parallel_residual", Value::Bool(false)),
            ("llama.hidden_activation", Value::String("silu".into())),
            ("llama.tensor_data_layout", Value::String("Meta AI original pth".into())),
            ("llama.vocab_size", Value::U32(32000)),
            ("general.type", Value::String("model".into())),
            ("split.count", Value::U16(0)),
            // Another model's keys are none of ours.
            ("clip.expert_count", Value::U32(8)),
            ("llamas.expert_count", Value::U32(8)),
        ] {
            assert_eq!(check("llama", key, value), Ok(()), "{key}");
        }
    }

    #[test]
    fn an_unknown_architecture_is_refused_with_the_known_ones() {
        let says = check("mamba", "mamba.ssm.state_size", Value::U32(16)).unwrap_err();
        assert_eq!(says, "architecture \"mamba\" is not supported; these are: llama, qwen2, qwen3");
    }
}
