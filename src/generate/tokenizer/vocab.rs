//! A vocabulary as a file gives it, and the checks that turn it into a [`Tokenizer`].

use super::bpe::{self, ByteAlphabet, ByteLevel, Join, PieceIds, SentencePiece};
use super::pretokenize::{self, PreTokenizer};
use super::{Model, Tokenizer};
use std::collections::HashMap;

/// What a token is: `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenKind {
    Normal,
    /// Stands for text that no token covers.
    Unknown,
    /// Never text: start, end, turns.
    Control,
    /// Text that is split off before anything else.
    UserDefined,
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

impl TryFrom<i32> for TokenKind {
    type Error = TokenizerError;

    /// From the file's number; 0 is "undefined", which older converters wrote for padding.
    fn try_from(kind: i32) -> Result<TokenKind, TokenizerError> {
        match kind {
            1 => Ok(TokenKind::Normal),
            2 => Ok(TokenKind::Unknown),
            3 => Ok(TokenKind::Control),
            4 => Ok(TokenKind::UserDefined),
            0 | 5 => Ok(TokenKind::Unused),
            6 => Ok(TokenKind::Byte),
            kind => Err(TokenizerError::Kind { kind }),
        }
    }
}

/// The keys `tokenizer.ggml.*` of a GGUF file, unchecked.
#[derive(Clone, Debug, Default)]
pub struct Vocab {
    /// `model`: `gpt2` (byte-level byte pairs) or `llama` (SentencePiece byte pairs).
    pub model: String,
    /// `pre`: how `gpt2` splits text into words; `default` if the file does not say.
    pub pre: Option<String>,
    /// `tokens`: the text of each id.
    pub tokens: Vec<String>,
    /// `token_type`: one for each token, or empty for all normal.
    pub kinds: Vec<TokenKind>,
    /// `scores`: one for each token; `llama` needs them.
    pub scores: Vec<f32>,
    /// `merges`: pairs of tokens with a space between, best first; for `gpt2`.
    pub merges: Vec<String>,
    /// `bos_token_id`: starts a text; 1 for `llama` if the file does not say.
    pub bos: Option<u32>,
    /// `eos_token_id`: ends a text; 2 for `llama` if the file does not say.
    pub eos: Option<u32>,
    /// `eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `eom_token_id`: ends a message that awaits a tool.
    pub eom: Option<u32>,
    /// `unknown_token_id`; 0 for `llama` if the file does not say.
    pub unknown: Option<u32>,
    /// `add_bos_token`; if the file does not say, `llama` and some rules of `gpt2` add it.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`: whether `llama` puts a space in front of a text; yes if the file does not say.
    pub add_space_prefix: Option<bool>,
}

/// Why a vocabulary cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TokenizerError {
    #[error("the file's tokenizer is `{model}`; known are `gpt2` and `llama`")]
    UnknownModel { model: String },
    #[error("the file's pre-tokenizer is `{pre}`; known are {}", known.join(", "))]
    UnknownPre { pre: String, known: Vec<&'static str> },
    #[error("the vocabulary has {tokens} tokens; it needs between 1 and {}", u32::MAX)]
    Size { tokens: usize },
    #[error("the vocabulary has {tokens} tokens but {found} {what}")]
    Length { what: &'static str, tokens: usize, found: usize },
    #[error("the vocabulary has no scores, which a `llama` tokenizer needs")]
    NoScores,
    #[error("the score of token {id} is not a number")]
    Score { id: u32 },
    #[error("unknown token type {kind}; known are 0 to 6")]
    Kind { kind: i32 },
    #[error("token {id} is marked as a byte but reads {text:?}, not `<0x00>` to `<0xFF>`")]
    ByteToken { id: u32, text: String },
    #[error("merge {index} ({merge:?}) is not two tokens with a space between")]
    MergeForm { index: usize, merge: String },
    #[error("merge {index} ({merge:?}) needs {part:?}, which is not a token")]
    MergeToken { index: usize, merge: String, part: String },
    #[error("the {what} token is {id}, but the vocabulary has {tokens} tokens")]
    SpecialId { what: &'static str, id: u32, tokens: u32 },
}

/// Control tokens that end a turn or a text in common chat formats, besides those that the file names.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
];

impl Tokenizer {
    /// Checks a vocabulary and indexes it.
    ///
    /// Of tokens with one text, the lowest id is the one that encoding uses. A start or end token equal to the
    /// number of tokens, as some real files have, counts as absent.
    ///
    /// # Errors
    ///
    /// An unknown model or rule, arrays of unequal length, scores that are not numbers, byte tokens that name
    /// no byte, merges of or to what is no token, special ids beyond the vocabulary.
    pub fn new(vocab: Vocab) -> Result<Tokenizer, TokenizerError> {
        let spm = match vocab.model.as_str() {
            "gpt2" => false,
            "llama" => true,
            _ => return Err(TokenizerError::UnknownModel { model: clip(&vocab.model) }),
        };
        let Vocab { tokens, kinds, scores, merges, .. } = vocab;
        let n = match u32::try_from(tokens.len()) {
            Ok(n) if n > 0 => n,
            _ => return Err(TokenizerError::Size { tokens: tokens.len() }),
        };
        for (what, found) in [("token types", kinds.len()), ("scores", scores.len())] {
            if found != 0 && found != tokens.len() {
                return Err(TokenizerError::Length { what, tokens: tokens.len(), found });
            }
        }
        let kinds = if kinds.is_empty() { default_kinds(&tokens, spm) } else { kinds };
        let special = |what, id, default| special_id(what, id, default, n);
        let bos = special("start", vocab.bos, spm.then_some(1))?;
        let eos = special("end", vocab.eos, spm.then_some(2))?;
        let eot = special("end-of-turn", vocab.eot, None)?;
        let eom = special("end-of-message", vocab.eom, None)?;
        let unknown = special("unknown", vocab.unknown, spm.then_some(0))?;

        let pieces = pieces(&tokens, &kinds, spm)?;
        let (model, adds_bos) = if spm {
            let ranks = ranks(&scores)?;
            let bytes = byte_tokens(&tokens, &kinds, &pieces.ids);
            let space_prefix = vocab.add_space_prefix.unwrap_or(true);
            let model = SentencePiece { ids: pieces.ids, ranks, bytes, unknown };
            (Model::SentencePiece { model, space_prefix }, true)
        } else {
            let pre = pre_tokenizer(vocab.pre)?;
            let adds_bos = pre.add_bos;
            let merges = merge_table(&merges, &pieces.ids)?;
            let bytes = byte_tokens(&tokens, &kinds, &pieces.ids);
            let missing = bytes.iter().filter(|b| b.is_none()).count();
            if missing > 0 {
                tracing::warn!(missing, "the vocabulary lacks tokens for some bytes: text with them is cut");
            }
            (Model::ByteLevel(ByteLevel { pre, ids: pieces.ids, merges, bytes, unknown }), adds_bos)
        };

        let add_bos = vocab.add_bos.unwrap_or(adds_bos);
        if add_bos && bos.is_none() {
            tracing::warn!("the file asks for a start token but has none: texts start without");
        }
        let markers = (0..n).filter(|&id| {
            let kind = kinds[id as usize];
            matches!(kind, TokenKind::Control | TokenKind::UserDefined)
                && ENDS.contains(&tokens[id as usize].as_str())
        });
        let mut ends: Vec<u32> = [eos, eot, eom].into_iter().flatten().chain(markers).collect();
        ends.sort_unstable();
        ends.dedup();
        let specials = specials(&tokens, &kinds);
        Ok(Tokenizer { texts: tokens, kinds, pieces: pieces.bytes, model, specials, bos, eos, add_bos, ends })
    }
}

/// Without token types, `<0x0A>` in a SentencePiece vocabulary is still a byte.
fn default_kinds(tokens: &[String], spm: bool) -> Vec<TokenKind> {
    let kind = |t: &String| match bpe::byte_token(t) {
        Some(_) if spm => TokenKind::Byte,
        _ => TokenKind::Normal,
    };
    tokens.iter().map(kind).collect()
}

/// Checks a special id after its default; equal to the vocabulary's size, or a default beyond it, is absent.
fn special_id(
    what: &'static str,
    id: Option<u32>,
    default: Option<u32>,
    tokens: u32,
) -> Result<Option<u32>, TokenizerError> {
    match id {
        None => Ok(default.filter(|&id| id < tokens)),
        Some(id) if id < tokens => Ok(Some(id)),
        Some(id) if id == tokens => {
            tracing::warn!(id, "the {what} token is just beyond the vocabulary: taken as absent");
            Ok(None)
        }
        Some(id) => Err(TokenizerError::SpecialId { what, id, tokens }),
    }
}

/// What each token stands for, and the way back.
struct Pieces {
    bytes: Vec<Box<[u8]>>,
    ids: PieceIds,
}

fn pieces(tokens: &[String], kinds: &[TokenKind], spm: bool) -> Result<Pieces, TokenizerError> {
    let alphabet = ByteAlphabet::new();
    let mut pieces =
        Pieces { bytes: Vec::with_capacity(tokens.len()), ids: HashMap::with_capacity(tokens.len()) };
    for (id, (text, kind)) in (0u32..).zip(tokens.iter().zip(kinds)) {
        // Encoding looks text up as it reads inside the model: with ▁ for spaces, or as plain bytes.
        let key = if spm { Some(text.as_bytes().into()) } else { alphabet.bytes(text) };
        let bytes: Box<[u8]> = match kind {
            TokenKind::Control | TokenKind::Unknown => Box::default(),
            TokenKind::UserDefined => text.as_bytes().into(),
            TokenKind::Byte => match bpe::byte_token(text) {
                Some(byte) => [byte].into(),
                None => return Err(TokenizerError::ByteToken { id, text: clip(text) }),
            },
            TokenKind::Normal | TokenKind::Unused if spm => {
                text.replace(SentencePiece::SPACE, " ").into_bytes().into()
            }
            TokenKind::Normal | TokenKind::Unused => key.clone().unwrap_or_else(|| text.as_bytes().into()),
        };
        let is_text = matches!(kind, TokenKind::Normal | TokenKind::Unused | TokenKind::UserDefined);
        if let Some(key) = key
            && is_text
            && !key.is_empty()
        {
            pieces.ids.entry(key).or_insert(id);
        }
        pieces.bytes.push(bytes);
    }
    Ok(pieces)
}

/// The token of each byte: one that is just that byte as text or, failing that, `<0x0A>`.
fn byte_tokens(tokens: &[String], kinds: &[TokenKind], ids: &PieceIds) -> Box<[Option<u32>; 256]> {
    let mut bytes = Box::new([None; 256]);
    for (id, (text, kind)) in (0u32..).zip(tokens.iter().zip(kinds)) {
        if *kind == TokenKind::Byte
            && let Some(byte) = bpe::byte_token(text)
        {
            bytes[usize::from(byte)].get_or_insert(id);
        }
    }
    for b in 0..=u8::MAX {
        if let Some(&id) = ids.get(&[b][..]) {
            bytes[usize::from(b)] = Some(id);
        }
    }
    bytes
}

/// By token: how many distinct scores are better, so that equal scores rank equal.
fn ranks(scores: &[f32]) -> Result<Vec<u32>, TokenizerError> {
    if scores.is_empty() {
        return Err(TokenizerError::NoScores);
    }
    if let Some(id) = scores.iter().position(|s| s.is_nan()) {
        return Err(TokenizerError::Score { id: id as u32 });
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut ranks = vec![0; scores.len()];
    for pair in order.windows(2) {
        ranks[pair[1]] = ranks[pair[0]] + u32::from(scores[pair[0]] != scores[pair[1]]);
    }
    Ok(ranks)
}

fn pre_tokenizer(pre: Option<String>) -> Result<PreTokenizer, TokenizerError> {
    let name = pre.unwrap_or_else(|| {
        tracing::warn!("the file names no pre-tokenizer: `default` may split text as the model never saw it");
        "default".to_owned()
    });
    PreTokenizer::new(&name)
        .ok_or_else(|| TokenizerError::UnknownPre { pre: clip(&name), known: pretokenize::known() })
}

/// Merges by the tokens that they join; of one pair given twice, the first counts.
fn merge_table(merges: &[String], ids: &PieceIds) -> Result<HashMap<(u32, u32), Join>, TokenizerError> {
    let alphabet = ByteAlphabet::new();
    let mut table = HashMap::with_capacity(merges.len());
    for (index, merge) in merges.iter().enumerate() {
        // A token may itself start with a space in some files, hence not the first character.
        let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let Some((left, right)) = cut.map(|at| (&merge[..at], &merge[at + 1..])) else {
            return Err(TokenizerError::MergeForm { index, merge: clip(merge) });
        };
        let bytes = |part: &str| alphabet.bytes(part).unwrap_or_default();
        let (l, r) = (bytes(left), bytes(right));
        let joined = [&l[..], &r[..]].concat();
        let missing = |part: &str| TokenizerError::MergeToken { index, merge: clip(merge), part: clip(part) };
        let pair = (*ids.get(&l).ok_or_else(|| missing(left))?, *ids.get(&r).ok_or_else(|| missing(right))?);
        let id = *ids.get(&joined[..]).ok_or_else(|| missing(&format!("{left}{right}")))?;
        let join = Join { rank: index as u32, id };
        table.entry(pair).or_insert(join);
    }
    Ok(table)
}

/// The start of a file's string, for a message.
fn clip(text: &str) -> String {
    text.chars().take(48).collect()
}

/// Tokens that are split off before encoding, by first character, the longest first.
fn specials(tokens: &[String], kinds: &[TokenKind]) -> HashMap<char, Vec<u32>> {
    let mut specials: HashMap<char, Vec<u32>> = HashMap::new();
    for (id, (text, kind)) in (0u32..).zip(tokens.iter().zip(kinds)) {
        if matches!(kind, TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown)
            && let Some(first) = text.chars().next()
        {
            specials.entry(first).or_default().push(id);
        }
    }
    for ids in specials.values_mut() {
        ids.sort_by_key(|&id| std::cmp::Reverse(tokens[id as usize].len()));
    }
    specials
}
