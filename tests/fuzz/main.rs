//! What the fuzzers in `fuzz/` do, on stable Rust and in seconds: the inputs that they kept, and some mutations of those,
//! go through the same functions. None may panic.

mod execute;
mod gguf;
mod ir_text;
mod plan;
mod seeds;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../support/synthetic.rs"]
mod synthetic;
mod tokenizer;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use seeds::Seeds;
use std::fmt;
use std::path::Path;

/// A body, as the module of each target has it, and how to mutate what it takes.
struct Fuzz {
    name: &'static str,
    run: fn(&[u8]) -> usize,
    deepest: usize,
    seeds: Seeds,
    mutate: fn(&[u8], u64) -> Option<Vec<u8>>,
}

impl Fuzz {
    fn test(self, cases: u32) {
        let reached = self.seeds.iter().map(|(_, seed)| (self.run)(seed)).max();
        assert_eq!(reached, Some(self.deepest), "no seed gets as far as there is");
        if let Some(folder) = std::env::var_os("SINTER_FUZZ_SEEDS") {
            self.write(Path::new(&folder));
        }
        let mut inputs = self.corpus();
        for input in &inputs {
            (self.run)(input);
        }
        inputs.extend(self.seeds.into_iter().map(|(_, seed)| seed));

        let config = Config { cases, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let changes = prop::collection::vec(change(), 1..5);
        let strategy = (any::<Index>(), changes).prop_map(|(input, changes)| {
            let mut input = input.get(&inputs).clone();
            changes.iter().for_each(|change| change.apply(&mut input, &inputs, self.mutate));
            Input(input)
        });
        let outcome = runner.run(&strategy, |input| {
            (self.run)(&input.0);
            Ok(())
        });
        outcome.unwrap_or_else(|e| panic!("{}: {e}", self.name));
    }

    /// The inputs that fuzzing kept, each for code that no other reaches.
    fn corpus(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(self.name);
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(files.len() > 5, "{}: {} inputs", self.name, files.len());
        files.iter().map(|path| std::fs::read(path).unwrap()).collect()
    }

    /// Writes the seeds to a folder, for the fuzzers.
    fn write(&self, folder: &Path) {
        let folder = folder.join(self.name);
        std::fs::create_dir_all(&folder).unwrap();
        for (name, seed) in &self.seeds {
            std::fs::write(folder.join(name), seed).unwrap();
        }
    }
}

/// Bytes that are shown as text.
struct Input(Vec<u8>);

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

#[derive(Clone, Debug)]
enum Change {
    Byte(Index, u8),
    /// The lowest bytes of a number, as many as the second says.
    Number(Index, usize, u64),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, usize),
    /// From there on, the rest of another input.
    Splice(Index, Index, Index),
    /// What the target knows of its inputs.
    Fields(u64),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    let number = prop_oneof![
        (0u32..64).prop_map(|n| 1u64 << n),
        (0u32..64).prop_map(|n| u64::MAX >> n),
        0u64..20,
        any::<u64>()
    ];
    prop_oneof![
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        2 => (at(), prop::sample::select(vec![2, 4, 8]), number).prop_map(|(at, len, n)| Change::Number(at, len, n)),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (at(), 1usize..40).prop_map(|(at, len)| Change::Remove(at, len)),
        1 => (at(), 1usize..40).prop_map(|(at, len)| Change::Repeat(at, len)),
        1 => (at(), at(), at()).prop_map(|(at, other, from)| Change::Splice(at, other, from)),
        8 => any::<u64>().prop_map(Change::Fields),
    ]
}

impl Change {
    fn apply(&self, input: &mut Vec<u8>, inputs: &[Vec<u8>], fields: fn(&[u8], u64) -> Option<Vec<u8>>) {
        let len = input.len();
        if len == 0 {
            return;
        }
        match self {
            Change::Byte(at, byte) => *at.get_mut(input) = *byte,
            Change::Number(at, bytes, n) => {
                let rest = &mut input[at.index(len)..];
                rest.iter_mut().zip(n.to_le_bytes()).take(*bytes).for_each(|(to, from)| *to = from);
            }
            Change::Insert(at, bytes) => {
                drop(input.splice(at.index(len)..at.index(len), bytes.iter().copied()))
            }
            Change::Remove(at, n) => drop(input.drain(at.index(len)..len.min(at.index(len) + n))),
            Change::Repeat(at, n) => {
                let (from, to) = (at.index(len), len.min(at.index(len) + n));
                input.splice(to..to, input[from..to].to_vec());
            }
            Change::Splice(at, other, from) => {
                let other = other.get(inputs);
                input.truncate(at.index(len));
                input.extend(&other[from.index(other.len() + 1)..]);
            }
            Change::Fields(seed) => *input = fields(input, *seed).unwrap_or_else(|| std::mem::take(input)),
        }
    }
}

/// Puts a word or a sign of a text in the place of another.
fn words(text: &[u8], seed: u64) -> Option<Vec<u8>> {
    let is_word = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'%') || !b.is_ascii();
    let words: Vec<&[u8]> = text.chunk_by(|a, b| is_word(a) && is_word(b)).collect();
    let pick = |n: u64| (!words.is_empty()).then(|| (n % words.len() as u64) as usize);
    let (to, from) = (pick(seed & 0xffff_ffff)?, pick(seed >> 32)?);
    let mut words = words.clone();
    words[to] = words[from];
    Some(words.concat())
}

#[test]
fn model_files() {
    let (run, deepest, seeds) = (gguf::run, gguf::DEEPEST, seeds::gguf());
    Fuzz { name: "gguf", run, deepest, seeds, mutate: |_, _| None }.test(600);
}

#[test]
fn graphs_in_text_form() {
    let (run, deepest, seeds) = (ir_text::run, ir_text::DEEPEST, seeds::ir_text());
    Fuzz { name: "ir_text", run, deepest, seeds, mutate: words }.test(600);
}

#[test]
fn plans() {
    let (run, deepest, seeds) = (plan::run, plan::DEEPEST, seeds::plan());
    Fuzz { name: "plan", run, deepest, seeds, mutate: plan::mutate }.test(600);
}

#[test]
fn vocabularies() {
    let (run, deepest, seeds) = (tokenizer::run, tokenizer::DEEPEST, seeds::tokenizer());
    Fuzz { name: "tokenizer", run, deepest, seeds, mutate: words }.test(600);
}
