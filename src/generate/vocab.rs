//! The vocabulary of a model file.

use super::{TokenKind, Tokenizer, TokenizerError, Vocab};
use crate::gguf::{Gguf, GgufError};

/// A model file without a usable tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum VocabError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("key {key:?} holds {value}, which is no token id")]
    Id { key: String, value: u64 },
}

impl Tokenizer {
    /// The tokenizer of a model file (keys `tokenizer.ggml.*`).
    ///
    /// # Errors
    /// A missing or mistyped key, or a vocabulary that contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, VocabError> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| match gguf.u64_opt(&key(name))? {
            None => Ok(None),
            // Some converters write -1 as u32 for "none".
            Some(value) if value == u64::from(u32::MAX) => Ok(None),
            Some(value) => {
                u32::try_from(value).map(Some).map_err(|_| VocabError::Id { key: key(name), value })
            }
        };
        let strings = |name: &str| gguf.strings_opt(&key(name)).map(|list| list.unwrap_or_default().to_vec());
        let kinds = gguf.ints_opt(&key("token_type"))?.unwrap_or_default();
        let vocab = Vocab {
            model: gguf.str(&key("model"))?.to_string(),
            pre: gguf.str_opt(&key("pre"))?.map(str::to_string),
            tokens: gguf.strings(&key("tokens"))?.to_vec(),
            kinds: kinds
                .into_iter()
                .map(|kind| TokenKind::try_from(i32::try_from(kind).unwrap_or(-1)))
                .collect::<Result<_, _>>()?,
            scores: gguf.floats_opt(&key("scores"))?.unwrap_or_default(),
            merges: strings("merges")?,
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            eot: id("eot_token_id")?,
            eom: id("eom_token_id")?,
            unknown: id("unknown_token_id")?,
            add_bos: gguf.bool_opt(&key("add_bos_token"))?,
            add_space_prefix: gguf.bool_opt(&key("add_space_prefix"))?,
        };
        Ok(Tokenizer::new(vocab)?)
    }
}
