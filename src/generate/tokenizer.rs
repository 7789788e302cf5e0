//! Text to tokens and back, from the vocabulary in a GGUF file.
//!
//! Two kinds of vocabulary are known: byte-level byte pairs (`gpt2`: Llama 3, Qwen, …) and SentencePiece byte
//! pairs (`llama`: Llama 2, Mistral, …). Both encode every text; ids agree with llama.cpp's, except that text
//! which merely reads like a control token never becomes one unless [`EncodeOptions::special`] allows it.

mod bpe;
mod pretokenize;
mod vocab;

#[cfg(test)]
mod tests;

pub use vocab::{TokenKind, TokenizerError, Vocab};

use bpe::{ByteLevel, SentencePiece};
use std::collections::HashMap;

/// How to encode a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put the start token in front, if the vocabulary asks for one.
    pub bos: bool,
    /// Read control tokens in the text as such. Only for text that is trusted, such as a chat template's.
    pub special: bool,
}

impl Default for EncodeOptions {
    fn default() -> EncodeOptions {
        EncodeOptions { bos: true, special: false }
    }
}

/// A checked vocabulary.
pub struct Tokenizer {
    texts: Vec<String>,
    kinds: Vec<TokenKind>,
    /// What each token stands for: nothing for control tokens.
    pieces: Vec<Box<[u8]>>,
    model: Model,
    /// Tokens that are split off before encoding, by first character, the longest first.
    specials: HashMap<char, Vec<u32>>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    /// Sorted.
    ends: Vec<u32>,
}

enum Model {
    ByteLevel(ByteLevel),
    SentencePiece { model: SentencePiece, space_prefix: bool },
}

/// A stretch of text to encode, or a token that was found in it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

impl Tokenizer {
    /// The tokens of `text`.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        if options.bos && self.add_bos {
            ids.extend(self.bos);
        }
        // SentencePiece puts its space in front of the text and after each special token.
        let mut at_start = true;
        for fragment in self.fragments(text, options.special) {
            match (fragment, &self.model) {
                (Fragment::Token(id), _) => ids.push(id),
                (Fragment::Text(text), Model::ByteLevel(model)) => model.encode(text, &mut ids),
                (Fragment::Text(text), Model::SentencePiece { model, space_prefix }) => {
                    model.encode(text, *space_prefix && at_start, &mut ids);
                }
            }
            at_start = matches!(fragment, Fragment::Token(_));
        }
        ids
    }

    /// Splits off user-defined tokens and, if `special`, control tokens: the leftmost, the longest of those.
    fn fragments<'t>(&self, text: &'t str, special: bool) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        let mut done = 0;
        for (at, first) in text.char_indices() {
            if at < done {
                continue;
            }
            let Some(candidates) = self.specials.get(&first) else { continue };
            let found = candidates.iter().find(|&&id| {
                let allowed = special || self.kinds[id as usize] == TokenKind::UserDefined;
                allowed && text[at..].starts_with(&self.texts[id as usize])
            });
            if let Some(&id) = found {
                if at > done {
                    fragments.push(Fragment::Text(&text[done..at]));
                }
                fragments.push(Fragment::Token(id));
                done = at + self.texts[id as usize].len();
            }
        }
        if done < text.len() {
            fragments.push(Fragment::Text(&text[done..]));
        }
        fragments
    }

    /// The text of a whole sequence: what was encoded, without control tokens. Bytes that are not UTF-8 become
    /// U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.decode_bytes(id)).copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        match &self.model {
            Model::SentencePiece { space_prefix: true, .. } => {
                text.strip_prefix(' ').unwrap_or(&text).to_owned()
            }
            _ => text.into_owned(),
        }
    }

    /// What one token stands for; not always whole characters. Nothing for control tokens and for ids beyond
    /// the vocabulary, which a model whose head has padding rows can produce.
    pub fn decode_bytes(&self, id: u32) -> &[u8] {
        self.pieces.get(id as usize).map_or(&[], |piece| piece)
    }

    /// A decoder for tokens as they are generated.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, held: Vec::new() }
    }

    /// The token's text as the file has it.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// The start token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether generation stops at this token: it ends a text, a turn or a message.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Tokens in the vocabulary.
    #[expect(clippy::len_without_is_empty, reason = "a vocabulary is never empty")]
    pub fn len(&self) -> usize {
        self.texts.len()
    }
}

/// Turns tokens into text as they come, and holds back a character until its last byte is there.
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    /// The start of a character: at most three bytes.
    held: Vec<u8>,
}

impl StreamDecoder<'_> {
    /// The text that this token completes; bytes that can no longer become UTF-8 are U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        self.held.extend_from_slice(self.tokenizer.decode_bytes(id));
        let mut text = String::new();
        let mut rest = 0;
        let mut chunks = self.held.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && is_cut_short(invalid) {
                rest = invalid.len();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.held.drain(..self.held.len() - rest);
        text
    }

    /// What is still held back, when no more tokens come: nothing, or U+FFFD.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

/// Whether more bytes could complete these to a character.
fn is_cut_short(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}
