//! Vocabularies of real models on the texts that llama.cpp tests them with (`tests/data/tokenizer`), and how a model file's
//! keys become a tokenizer.

mod support;

use serde::Deserialize;
use sinter::generate::{EncodeOptions, Tokenizer};
use sinter::gguf::{Array, GgufFile, GgufWriter, Value};
use std::collections::BTreeMap;
use support::path;

const PLAIN: EncodeOptions = EncodeOptions { bos: false, special: false };
const SPECIAL: EncodeOptions = EncodeOptions { bos: false, special: true };

/// `tests/data/tokenizer/vocabularies.json`.
#[derive(Deserialize)]
struct Vocabularies {
    texts: Vec<String>,
    vocabularies: BTreeMap<String, Vocabulary>,
}

/// A part of a vocabulary under the keys of a GGUF file.
#[derive(Deserialize)]
struct Vocabulary {
    model: String,
    pre: String,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    unknown_token_id: Option<u32>,
    add_bos_token: Option<bool>,
    add_space_prefix: Option<bool>,
    /// Of each token, the id in the whole vocabulary.
    ids: Vec<u32>,
    tokens: Vec<String>,
    /// Of the tokens that are not normal.
    kinds: BTreeMap<usize, i32>,
    #[serde(default)]
    merges: Vec<String>,
    #[serde(default)]
    scores: Vec<f32>,
    /// The number of a text, and its ids in the whole vocabulary.
    expected: Vec<(usize, Vec<u32>)>,
}

/// The tokenizer of a file with these keys.
fn tokenizer(keys: &[(&str, Value)]) -> Tokenizer {
    let mut writer = GgufWriter::new();
    for (key, value) in keys {
        writer.metadata(format!("tokenizer.ggml.{key}"), value.clone());
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    Tokenizer::from_gguf(GgufFile::from_bytes(bytes).unwrap().gguf()).unwrap()
}

fn strings(texts: &[String]) -> Value {
    Value::Array(Array::String(texts.to_vec()))
}

impl Vocabulary {
    fn tokenizer(&self) -> Tokenizer {
        let kinds = (0..self.tokens.len()).map(|id| self.kinds.get(&id).copied().unwrap_or(1)).collect();
        let mut keys = vec![
            ("model", Value::String(self.model.clone())),
            ("pre", Value::String(self.pre.clone())),
            ("tokens", strings(&self.tokens)),
            ("token_type", Value::Array(Array::I32(kinds))),
        ];
        if self.model == "gpt2" {
            keys.push(("merges", strings(&self.merges)));
        } else {
            keys.push(("scores", Value::Array(Array::F32(self.scores.clone()))));
        }
        let id = |key, id: Option<u32>| id.map(|id| (key, Value::U32(id)));
        let yes = |key, yes: Option<bool>| yes.map(|yes| (key, Value::Bool(yes)));
        keys.extend(id("bos_token_id", self.bos_token_id));
        keys.extend(id("eos_token_id", self.eos_token_id));
        keys.extend(id("unknown_token_id", self.unknown_token_id));
        keys.extend(yes("add_bos_token", self.add_bos_token));
        keys.extend(yes("add_space_prefix", self.add_space_prefix));
        tokenizer(&keys)
    }
}

fn vocabularies() -> Vocabularies {
    let json = std::fs::read_to_string(path("tests/data/tokenizer/vocabularies.json")).unwrap();
    serde_json::from_str(&json).unwrap()
}

#[test]
fn ids_are_those_of_llama_cpp() {
    let Vocabularies { texts, vocabularies } = vocabularies();
    let mut compared = vec![];
    for (name, vocabulary) in &vocabularies {
        let tokenizer = vocabulary.tokenizer();
        for (text, expected) in &vocabulary.expected {
            let text = &texts[*text];
            let found = tokenizer.encode(text, PLAIN);
            let ids: Vec<u32> = found.iter().map(|&id| vocabulary.ids[id as usize]).collect();
            assert_eq!(&ids, expected, "{name}: {text:?}");
            assert_eq!(&tokenizer.decode(&found), text, "{name}");
            let mut stream = tokenizer.stream();
            let mut streamed: String = found.iter().map(|&id| stream.push(id)).collect();
            streamed += &stream.finish();
            // In a stream nobody knows whether a text began with SentencePiece's own space.
            let own = if vocabulary.model == "llama" && !text.is_empty() { " " } else { "" };
            assert_eq!(streamed, format!("{own}{text}"), "{name}");
        }
        let begins = tokenizer.encode("", EncodeOptions::default());
        compared.push((name.as_str(), vocabulary.expected.len(), begins.len()));
    }
    // By name: how many texts, and whether a text begins with a start token.
    assert_eq!(
        compared,
        [
            ("command-r", 46, 1),
            ("deepseek-coder", 46, 1),
            ("deepseek-llm", 46, 1),
            ("falcon", 46, 0),
            ("gpt-2", 46, 0),
            ("llama-bpe", 46, 1),
            ("llama-spm", 46, 1),
            ("mpt", 46, 0),
            ("phi-3", 46, 1),
            ("qwen2", 46, 0),
            ("qwen35", 50, 0),
            ("refact", 46, 0),
            ("starcoder", 46, 0),
        ]
    );
}

/// A SentencePiece vocabulary of few tokens, and other values for some keys.
fn few(changes: &[(&str, Option<Value>)]) -> Tokenizer {
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "<turn>", "<tool>", "<0x21>", "<tab>"];
    let scores = vec![0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, 0.0, 0.0, 0.0, 0.0];
    let mut keys = vec![
        ("model", Value::String("llama".into())),
        ("tokens", strings(&tokens.map(String::from))),
        ("token_type", Value::Array(Array::I32(vec![2, 3, 3, 1, 1, 1, 1, 1, 3, 3, 6, 4]))),
        ("scores", Value::Array(Array::F32(scores))),
    ];
    for (key, value) in changes {
        keys.retain(|(k, _)| k != key);
        keys.extend(value.clone().map(|value| (*key, value)));
    }
    tokenizer(&keys)
}

fn ends(tokenizer: &Tokenizer) -> Vec<u32> {
    (0..100).filter(|&id| tokenizer.is_end(id)).collect()
}

#[test]
fn every_key_of_a_vocabulary_is_heeded() {
    let plain = few(&[]);
    assert_eq!(
        (plain.bos(), plain.prefix(), plain.eos(), ends(&plain)),
        (Some(1), Some(1), Some(2), vec![2])
    );
    assert_eq!(plain.encode("ab!é<tab>", EncodeOptions::default()), [1, 3, 6, 10, 0, 11]);

    let with = |key: &'static str, value| few(&[(key, Some(value))]);
    let t = with("bos_token_id", Value::U32(8));
    assert_eq!((t.bos(), t.prefix(), t.encode("", EncodeOptions::default())), (Some(8), Some(8), vec![8]));
    let t = with("add_bos_token", Value::Bool(false));
    assert_eq!((t.bos(), t.prefix(), t.encode("", EncodeOptions::default())), (Some(1), None, vec![]));
    let t = with("eos_token_id", Value::U32(8));
    // A control token that reads </s> ends a text whatever the file names.
    assert_eq!((t.eos(), ends(&t)), (Some(8), vec![2, 8]));
    assert_eq!(ends(&with("eot_token_id", Value::U32(8))), [2, 8]);
    assert_eq!(ends(&with("eom_token_id", Value::U32(9))), [2, 9]);
    assert_eq!(with("unknown_token_id", Value::U32(8)).encode("é", PLAIN), [3, 8]);
    assert_eq!(with("add_space_prefix", Value::Bool(false)).encode("ab", PLAIN), [6]);
    // Now ▁a comes before ab.
    let scores = vec![0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -3.0, -2.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(with("scores", Value::Array(Array::F32(scores))).encode("ab", PLAIN), [7, 5]);
    // Without types, only bytes are told by their looks.
    let t = few(&[("token_type", None)]);
    assert_eq!((t.encode("!", PLAIN), t.encode("<tab>", SPECIAL)), (vec![3, 10], vec![3, 0, 0, 6, 0]));
    // No token at all, as some converters write it.
    for none in [Value::U32(u32::MAX), Value::U64(u32::MAX.into())] {
        let t = few(&[("bos_token_id", Some(none.clone())), ("eot_token_id", Some(none))]);
        assert_eq!((t.bos(), ends(&t)), (Some(1), vec![2]));
    }
}

#[test]
fn each_token_stands_for_its_text() {
    let t = few(&[]);
    let pieces: Vec<&[u8]> = (0..13).map(|id| t.decode_bytes(id)).collect();
    let expected: [&str; 13] = ["", "", "", " ", "a", "b", "ab", " a", "", "", "!", "<tab>", ""];
    assert_eq!(pieces, expected.map(str::as_bytes));
}
