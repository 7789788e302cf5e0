//! The two encoders: byte-level byte-pair encoding (`gpt2`) and SentencePiece's by score (`llama`).
//!
//! Both start from small symbols and join neighbours, the best pair first and the leftmost of equals, until
//! no pair joins. They differ in the symbols and in what makes a pair good.

use super::pretokenize::PreTokenizer;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Tokens by the bytes they stand for.
pub(super) type PieceIds = HashMap<Box<[u8]>, u32>;

/// A join of two symbols: lower ranks come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Join {
    pub rank: u32,
    /// The token that the two become.
    pub id: u32,
}

/// A stretch of the text: a token, or bytes that are none.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    start: usize,
    /// Equal to `start` once the symbol was joined to its left neighbour.
    end: usize,
    prev: Option<usize>,
    next: Option<usize>,
    id: Option<u32>,
}

/// Chains stretches of text, given by their ends and tokens, in order.
fn chain(stretches: impl Iterator<Item = (usize, Option<u32>)>) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::new();
    for (end, id) in stretches {
        let (start, prev) = symbols.last().map_or((0, None), |s| (s.end, Some(symbols.len() - 1)));
        if let Some(prev) = prev {
            symbols[prev].next = Some(prev + 1);
        }
        symbols.push(Symbol { start, end, prev, next: None, id });
    }
    symbols
}

/// Joins neighbours until `join` offers nothing more; yields the symbols left, in order.
fn merge(
    mut symbols: Vec<Symbol>,
    join: impl Fn(&Symbol, &Symbol) -> Option<Join>,
) -> impl Iterator<Item = Symbol> {
    // Rank, left symbol, right symbol, where the right one ends (to tell offers gone stale), token.
    let mut offers = BinaryHeap::new();
    let offer = |symbols: &[Symbol], left: Option<usize>, right: Option<usize>| {
        let (left, right) = (left?, right?);
        let Join { rank, id } = join(&symbols[left], &symbols[right])?;
        Some(Reverse((rank, left, right, symbols[right].end, id)))
    };
    offers.extend((1..symbols.len()).filter_map(|i| offer(&symbols, Some(i - 1), Some(i))));

    while let Some(Reverse((_, left, right, end, id))) = offers.pop() {
        let (l, r) = (symbols[left], symbols[right]);
        // While both live they are still neighbours: a left symbol grows only by taking its right one.
        if l.start == l.end || r.start == r.end || r.end != end {
            continue;
        }
        symbols[left] = Symbol { end: r.end, next: r.next, id: Some(id), ..l };
        symbols[right].end = r.start;
        if let Some(next) = r.next {
            symbols[next].prev = Some(left);
        }
        offers.extend(offer(&symbols, l.prev, Some(left)));
        offers.extend(offer(&symbols, Some(left), r.next));
    }
    symbols.into_iter().filter(|s| s.start < s.end)
}

/// Byte-level byte-pair encoding: the symbols are bytes, pairs join in the order of the merge list.
pub(super) struct ByteLevel {
    pub pre: PreTokenizer,
    pub ids: PieceIds,
    pub merges: HashMap<(u32, u32), Join>,
    /// The token of each byte; a byte that has none becomes the unknown token or, without one, nothing.
    pub bytes: Box<[Option<u32>; 256]>,
    pub unknown: Option<u32>,
}

impl ByteLevel {
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) {
        for word in self.pre.split(text) {
            let word = word.as_bytes();
            if self.pre.whole_words
                && let Some(&id) = self.ids.get(word)
            {
                out.push(id);
                continue;
            }
            let bytes = word.iter().enumerate().map(|(i, &b)| (i + 1, self.bytes[usize::from(b)]));
            let joined = merge(chain(bytes), |l, r| self.merges.get(&(l.id?, r.id?)).copied());
            out.extend(joined.filter_map(|s| s.id.or(self.unknown)));
        }
    }
}

/// SentencePiece's byte-pair encoding: the symbols are characters, pairs join to the token of the best score.
pub(super) struct SentencePiece {
    pub ids: PieceIds,
    /// By token: how many distinct scores are better.
    pub ranks: Vec<u32>,
    /// The token of each byte, for characters that are no token.
    pub bytes: Box<[Option<u32>; 256]>,
    pub unknown: Option<u32>,
}

impl SentencePiece {
    /// What stands for a space inside tokens: U+2581.
    pub const SPACE: &str = "\u{2581}";

    /// Encodes `text`, in front of which a space is put if `space_prefix`.
    pub fn encode(&self, text: &str, space_prefix: bool, out: &mut Vec<u32>) {
        let mut escaped = text.replace(' ', Self::SPACE);
        if space_prefix {
            escaped.insert_str(0, Self::SPACE);
        }
        let bytes = escaped.as_bytes();
        let chars = escaped.char_indices().map(|(start, c)| {
            let end = start + c.len_utf8();
            (end, self.ids.get(&bytes[start..end]).copied())
        });
        let joined = merge(chain(chars), |l, r| {
            let &id = self.ids.get(&bytes[l.start..r.end])?;
            Some(Join { rank: self.ranks[id as usize], id })
        });
        for symbol in joined {
            if let Some(id) = symbol.id {
                out.push(id);
                continue;
            }
            let char = &bytes[symbol.start..symbol.end];
            let before = out.len();
            out.extend(char.iter().map_while(|&b| self.bytes[usize::from(b)]));
            if out.len() - before < char.len() {
                out.truncate(before);
                out.extend(self.unknown);
            }
        }
    }
}

/// GPT-2's alphabet: the character that stands for a byte. Printable Latin-1 characters stand for themselves,
/// the 68 other bytes for U+0100 onward, in order.
pub(super) fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + nth).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Reads tokens written in GPT-2's alphabet.
pub(super) struct ByteAlphabet([Option<u8>; 0x144]);

impl ByteAlphabet {
    pub fn new() -> ByteAlphabet {
        let mut bytes = [None; 0x144];
        for b in 0..=u8::MAX {
            bytes[byte_char(b) as usize] = Some(b);
        }
        ByteAlphabet(bytes)
    }

    /// The bytes that `text` stands for; `None` if a character is not of the alphabet.
    pub fn bytes(&self, text: &str) -> Option<Box<[u8]>> {
        text.chars().map(|c| self.0.get(c as usize).copied().flatten()).collect()
    }
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` alone would take a sign.
    let two_digits = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    if two_digits { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection_with_the_known_corners() {
        let alphabet = ByteAlphabet::new();
        for b in 0..=u8::MAX {
            assert_eq!(alphabet.bytes(&byte_char(b).to_string()).as_deref(), Some(&[b][..]));
        }
        assert_eq!((byte_char(b' '), byte_char(b'\n'), byte_char(0xAD)), ('Ġ', 'Ċ', '\u{143}'));
        assert_eq!(alphabet.bytes("a b"), None);
        assert_eq!(alphabet.bytes("\u{144}"), None);
    }

    #[test]
    fn byte_tokens_take_two_hex_digits_only() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for bad in ["<0x-1>", "<0x+1>", "<0x>", "<0x1>", "<0x100>", "<0xé>", "0x41", "<0x41"] {
            assert_eq!(byte_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_best_pair_joins_first_and_the_leftmost_of_equals() {
        // Tokens are bytes, or 256 for "aa" (rank 1), 257 for "ab" (rank 0).
        let join = |l: &Symbol, r: &Symbol| match (l.id?, r.id?) {
            (97, 97) => Some(Join { rank: 1, id: 256 }),
            (97, 98) => Some(Join { rank: 0, id: 257 }),
            _ => None,
        };
        let run = |text: &str| -> Vec<u32> {
            let bytes = text.bytes().enumerate().map(|(i, b)| (i + 1, Some(u32::from(b))));
            merge(chain(bytes), join).filter_map(|s| s.id).collect()
        };
        assert_eq!(run("aaab"), [256, 257]);
        assert_eq!(run("aab"), [97, 257]);
        assert_eq!(run("aaa"), [256, 97]);
        assert!(run("").is_empty());
    }
}
