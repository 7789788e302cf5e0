//! A vocabulary and a text: encoded, decoded, and compared where the one must undo the other.
//!
//! The input is a GGUF file whose text follows its header or, as more mutations of that are a vocabulary, lines:
//!
//! ```text
//! model llama
//! add_bos_token true
//! bytes
//! token 1 -2.5 ▁a
//! merge a b
//! text
//! all that follows
//! ```
//!
//! `bytes` adds a token for each byte; `token` takes a kind, a score and the text; other keys are those of
//! `tokenizer.ggml`.

use sinter::generate::{EncodeOptions, Tokenizer};
use sinter::gguf::{Array, Gguf, GgufWriter, Value};

/// What [`run`] returns of a vocabulary whose encoding was undone.
#[allow(dead_code, reason = "a fuzz target does not ask")]
pub const DEEPEST: usize = 2;

/// Returns how far the input got: refused, encoded, compared.
pub fn run(data: &[u8]) -> usize {
    let made;
    let (header, text) = if data.starts_with(b"GGUF") {
        (data, None)
    } else {
        let (file, text) = file(data);
        made = file;
        (&made[..], Some(text))
    };
    let Ok(gguf) = Gguf::parse(header, header.len() as u64) else { return 0 };
    let tokenizer = match Tokenizer::from_gguf(&gguf) {
        Ok(tokenizer) => tokenizer,
        Err(e) => {
            _ = e.to_string();
            return 0;
        }
    };
    let text = text.or(data.get(gguf.data_start as usize..)).unwrap_or_default();
    // Any ids may be decoded.
    decodes(&tokenizer, &text.iter().map(|&b| u32::from(b)).collect::<Vec<_>>());
    let text = &*String::from_utf8_lossy(text);
    for (bos, special) in [(true, true), (true, false), (false, true)] {
        decodes(&tokenizer, &tokenizer.encode(text, EncodeOptions { bos, special }));
    }
    let ids = tokenizer.encode(text, EncodeOptions { bos: false, special: false });
    let decoded = decodes(&tokenizer, &ids);
    if !can_undo(&gguf, &tokenizer, text) {
        return 1;
    }
    assert_eq!(decoded, text);
    2
}

/// The text of ids, which is the same if they come one by one.
fn decodes(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
    streamed += &stream.finish();
    let decoded = tokenizer.decode(ids);
    assert!(streamed == decoded || streamed.strip_prefix(' ') == Some(&decoded), "{streamed:?}, {decoded:?}");
    decoded
}

/// Whether decoding must give back what was encoded: every byte is a token by itself, and no token reads otherwise than it
/// is looked up, as those do that users define. U+2581 stands for a space.
fn can_undo(gguf: &Gguf, tokenizer: &Tokenizer, text: &str) -> bool {
    let kinds = gguf.ints_opt("tokenizer.ggml.token_type").ok().flatten().unwrap_or_default();
    let kind = |id: u32| kinds.get(id as usize).copied();
    if kinds.contains(&4) {
        return false;
    }
    let texts = || (0..tokenizer.len() as u32).filter_map(|id| Some((id, tokenizer.token_text(id)?)));
    let mut bytes = [false; 256];
    if gguf.str("tokenizer.ggml.model").is_ok_and(|model| model == "llama") {
        let spaces = texts().any(|(id, text)| text == "▁" && matches!(kind(id), None | Some(0 | 1 | 5)));
        for (id, text) in texts() {
            let byte = |b: &u8| format!("<0x{b:02X}>").eq_ignore_ascii_case(text) && text.starts_with("<0x");
            if matches!(kind(id), None | Some(6))
                && let Some(b) = (0..=255).find(byte)
            {
                bytes[usize::from(b)] = true;
            }
        }
        return spaces && !text.contains('▁') && bytes.iter().all(|b| *b);
    }
    for (id, text) in texts() {
        if matches!(kind(id), None | Some(0 | 1 | 5))
            && let Some(b) = (0..=255).find(|&b| text.chars().eq([byte_char(b)]))
        {
            bytes[usize::from(b)] = true;
        }
    }
    bytes.iter().all(|b| *b)
}

/// The file of a vocabulary in lines, and the text.
fn file(data: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut writer = GgufWriter::new();
    let (mut tokens, mut kinds, mut scores, mut merges) = (vec![], vec![], vec![], vec![]);
    let mut llama = false;
    let mut rest = data;
    while !rest.is_empty() {
        let end = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        let line = String::from_utf8_lossy(&rest[..end]);
        rest = &rest[(end + 1).min(rest.len())..];
        let (key, value) = line.split_once(' ').unwrap_or((&line, ""));
        match key {
            "text" => break,
            "bytes" => {
                for b in 0..=255 {
                    tokens.push(if llama { format!("<0x{b:02X}>") } else { byte_char(b).to_string() });
                    kinds.push(if llama { 6 } else { 1 });
                    scores.push(0.0);
                }
            }
            "token" => {
                let mut parts = value.splitn(3, ' ');
                kinds.push(parts.next().and_then(|kind| kind.parse().ok()).unwrap_or(1));
                scores.push(parts.next().and_then(|score| score.parse().ok()).unwrap_or(0.0));
                tokens.push(parts.next().unwrap_or_default().to_string());
            }
            "merge" => merges.push(value.to_string()),
            _ => {
                llama |= key == "model" && value == "llama";
                let value = match (value.parse(), value.parse()) {
                    (Ok(number), _) => Value::U32(number),
                    (_, Ok(flag)) => Value::Bool(flag),
                    _ => Value::String(value.to_string()),
                };
                writer.metadata(format!("tokenizer.ggml.{key}"), value);
            }
        }
    }
    writer.metadata("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    writer.metadata("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    writer.metadata("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    writer.metadata("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
    let mut file = vec![];
    writer.write_to(&mut file).unwrap();
    (file, rest)
}

/// The character that stands for a byte in the tokens of `gpt2`.
fn byte_char(byte: u8) -> char {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..);
    if printable(&byte) {
        return byte.into();
    }
    let nth = (0..byte).filter(|b| !printable(b)).count();
    char::from_u32(0x100 + nth as u32).unwrap()
}
