//! The architectures that can be lowered.

use super::LowerError;
use crate::gguf::Gguf;
use crate::ir::RopeStyle;

/// An architecture, by the value of `general.architecture`; what it computes is one function in `families`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Phi3,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// Every architecture that can be lowered.
    pub const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Phi3, Architecture::Qwen2, Architecture::Qwen3];

    /// The value of `general.architecture`, and the prefix of the model's own keys.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Phi3 => "phi3",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        }
    }

    /// Which elements of a head RoPE turns together.
    pub const fn rope_style(self) -> RopeStyle {
        match self {
            Architecture::Llama => RopeStyle::Interleaved,
            Architecture::Phi3 | Architecture::Qwen2 | Architecture::Qwen3 => RopeStyle::NeoX,
        }
    }

    /// The architecture of a model.
    ///
    /// # Errors
    /// None given, or one that is not among [`Architecture::ALL`].
    pub fn of(gguf: &Gguf) -> Result<Architecture, LowerError> {
        let name = gguf.str("general.architecture")?;
        let found = Architecture::ALL.into_iter().find(|a| a.name() == name);
        found.ok_or_else(|| LowerError::Architecture { architecture: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::{HARMLESS, UNSUPPORTED};
    use super::super::{Architecture, Config};
    use crate::gguf::{Gguf, GgufWriter, Value};

    /// Reads a model with this key beside those that it must have.
    fn check(architecture: &str, key: &str, value: Value) -> Result<(), String> {
        let mut writer = GgufWriter::new();
        writer.metadata("general.architecture", Value::String(architecture.into()));
        for name in ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"] {
            writer.metadata(
                format!("{architecture}.{name}"),
                Value::U32(if name == "embedding_length" { 8 } else { 2 }),
            );
        }
        let eps = format!("{architecture}.attention.layer_norm_rms_epsilon");
        writer.metadata(eps, Value::F32(1e-5)).metadata(key, value);
        let mut bytes = vec![];
        writer.write_to(&mut bytes).unwrap();
        let gguf = Gguf::parse(&bytes, bytes.len() as u64).unwrap();
        Config::from_gguf(&gguf).map(|_| ()).map_err(|e| e.to_string())
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
            for architecture in Architecture::ALL {
                // One that has windows.
                if key == "attention.sliding_window" && architecture == Architecture::Phi3 {
                    continue;
                }
                let key = format!("{}.{key}", architecture.name());
                let says = check(architecture.name(), &key, value.clone()).unwrap_err();
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
        assert_eq!((UNSUPPORTED.len(), HARMLESS.len()), (27, 8), "a key that moved changes what is refused");
        for (name, unused) in UNSUPPORTED {
            for architecture in Architecture::ALL.map(Architecture::name) {
                if (name, architecture) == ("attention.sliding_window", "phi3") {
                    continue;
                }
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
        assert_eq!(says, "architecture \"mamba\" is not supported; these are: llama, phi3, qwen2, qwen3");
    }
}
