//! Splitting text into words before byte-pair merges, which never cross a word.
//!
//! A GGUF file names its rule in `tokenizer.ggml.pre`; the rules are facts of the models' training, spelled
//! here as llama.cpp's `llama-vocab.cpp` and the models' `tokenizer.json` give them.
//!
//! Most rules end in `\s+(?!\S)|\s+`: a run of white space gives its last character to the word behind it.
//! The regex engine here runs in linear time and has no look-ahead, so that ending is a second pattern
//! whose matches [`Stage::split`] shortens by one character.

use regex_automata::{Input, PatternID, meta::Regex};
use std::sync::OnceLock;

/// English contractions, letters, digits and the rest, each with one space in front: GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";
/// Contractions of any case, letters with any one character in front, digits in threes, line ends: Llama 3.
const LLAMA3: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
);
/// As Llama 3, each digit alone.
const QWEN2: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
);
/// As Qwen 2, with combining marks counted as letters.
const QWEN35: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
);
/// Words may end at a change from lower to upper case: Mistral's Tekken.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
);
/// An ASCII mark keeps the word behind it; combining marks count as letters: DeepSeek V3.
const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
);
/// Letters that have a case, as DeepSeek's tokenizer lists them.
const CASED: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}",
    r"\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}",
    r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}",
    r"\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}",
    r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}",
    r"\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}",
    r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}",
    r"\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}",
    r"\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}",
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}",
    r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}",
    "]+"
);
/// Chinese and Korean, as DeepSeek's first tokenizers take them (U+0800 on is theirs).
const CJK: &str = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+";
/// Chinese and Japanese.
const CJK_KANA: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+";

/// A rule: its names in files and its stages, each of which splits what the one before left whole.
struct Rule {
    names: &'static [&'static str],
    /// A pattern, and whether runs of white space end as the module's doc says.
    stages: &'static [(&'static str, bool)],
    /// Whether a word that is a token is that token, whatever the merges make of it.
    whole_words: bool,
    /// Whether a text starts with the start token when the file does not say.
    add_bos: bool,
}

impl Rule {
    const fn new(names: &'static [&'static str], stages: &'static [(&'static str, bool)]) -> Rule {
        Rule { names, stages, whole_words: false, add_bos: false }
    }
}

const RULES: &[Rule] = &[
    Rule::new(
        &["default"],
        &[(r"[\p{P}$+<=>^~|]+", false), (GPT2, true), (r"\p{N}+", false), ("[0-9][0-9][0-9]", false)],
    ),
    Rule::new(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ],
        &[(GPT2, true)],
    ),
    Rule {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        stages: &[(LLAMA3, true)],
        whole_words: true,
        add_bos: true,
    },
    Rule::new(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[(LLAMA3, true)]),
    Rule { whole_words: true, ..Rule::new(&["glm4", "glm5"], &[(LLAMA3, true)]) },
    Rule::new(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[(QWEN2, true)],
    ),
    Rule::new(&["qwen35"], &[(QWEN35, true)]),
    Rule::new(
        &["starcoder", "smollm", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[(r"\p{N}", false), (GPT2, true)],
    ),
    Rule::new(&["falcon"], &[(r"[\p{P}$+<=>^~|`]+", false), (GPT2, true), ("[0-9][0-9][0-9]", false)]),
    Rule::new(
        &["deepseek-llm"],
        &[
            (r"[\r\n]", false),
            (CASED, false),
            (r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+", false),
            (r"\s+$", false),
            (CJK, false),
            (r"\p{N}+", false),
        ],
    ),
    Rule::new(
        &["deepseek-coder"],
        &[(r"[\r\n]", false), (r"\s?\p{L}+", false), (r"\s?\p{P}+", false), (CJK, false), (r"\p{N}", false)],
    ),
    Rule::new(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[(r"\p{N}{1,3}", false), (CJK_KANA, false), (DEEPSEEK3, true)],
    ),
    Rule { whole_words: true, add_bos: true, ..Rule::new(&["tekken"], &[(TEKKEN, true)]) },
];

/// Every rule name that [`PreTokenizer::new`] knows.
pub(super) fn known() -> Vec<&'static str> {
    RULES.iter().flat_map(|r| r.names).copied().collect()
}

/// Splits text into words by one named rule.
pub(super) struct PreTokenizer {
    stages: &'static [Stage],
    /// Whether a word that is a token is that token, whatever the merges make of it.
    pub whole_words: bool,
    /// Whether a text starts with the start token when the file does not say.
    pub add_bos: bool,
}

impl PreTokenizer {
    /// The rule of that name, or `None` if there is none.
    pub fn new(name: &str) -> Option<PreTokenizer> {
        // Patterns take long to compile, so each rule's are compiled once.
        static STAGES: [OnceLock<Vec<Stage>>; RULES.len()] = [const { OnceLock::new() }; RULES.len()];
        let (rule, stages) = RULES.iter().zip(&STAGES).find(|(rule, _)| rule.names.contains(&name))?;
        let stage = |&(pattern, spaces): &(&str, bool)| Stage::new(pattern, spaces);
        let stages = stages.get_or_init(|| rule.stages.iter().map(stage).collect());
        Some(PreTokenizer { stages, whole_words: rule.whole_words, add_bos: rule.add_bos })
    }

    /// The words of `text`, in order; joined they give `text` again.
    pub fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for stage in self.stages {
            let mut finer = Vec::with_capacity(pieces.len());
            for piece in pieces {
                stage.split(piece, &mut finer);
            }
            pieces = finer;
        }
        pieces
    }
}

/// One pattern; every match is a word, and so is what lies between two matches.
struct Stage {
    regex: Regex,
}

impl Stage {
    const SPACES: PatternID = PatternID::new_unchecked(1);

    fn new(pattern: &str, spaces: bool) -> Stage {
        let patterns = [pattern, r"\s+"];
        let regex = Regex::new_many(if spaces { &patterns } else { &patterns[..1] });
        Stage { regex: regex.expect("the patterns of RULES are valid: a test builds them all") }
    }

    fn split<'t>(&self, text: &'t str, words: &mut Vec<&'t str>) {
        let mut done = 0;
        while let Some(found) = self.regex.find(Input::new(text).range(done..)) {
            let mut end = found.end();
            if found.pattern() == Stage::SPACES && end < text.len() {
                let last = text[..end].chars().next_back().map_or(0, char::len_utf8);
                if end - last > found.start() {
                    end -= last;
                }
            }
            if found.start() > done {
                words.push(&text[done..found.start()]);
            }
            words.push(&text[found.start()..end]);
            done = end;
        }
        if done < text.len() {
            words.push(&text[done..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn split(rule: &str, text: &'static str) -> Vec<&'static str> {
        PreTokenizer::new(rule).unwrap().split(text)
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_next_word() {
        assert_eq!(split("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(split("gpt-2", "a\t\u{3000}b "), ["a", "\t", "\u{3000}", "b", " "]);
        assert_eq!(split("gpt-2", "a  \n"), ["a", "  \n"]);
        assert_eq!(split("qwen2", "a  \n\n  b"), ["a", "  \n\n", " ", " b"]);
        assert_eq!(split("qwen2", "x \n"), ["x", " \n"]);
    }

    #[test]
    fn digits_are_grouped_as_each_rule_says() {
        assert_eq!(split("gpt-2", "v 12345"), ["v", " 12345"]);
        assert_eq!(split("llama-bpe", "v 12345"), ["v", " ", "123", "45"]);
        assert_eq!(split("qwen2", "v 123"), ["v", " ", "1", "2", "3"]);
        assert_eq!(split("smollm", "v 12"), ["v", " ", "1", "2"]);
        assert_eq!(split("default", "12345"), ["123", "45"]);
    }

    #[test]
    fn apostrophes_punctuation_and_case() {
        assert_eq!(split("gpt-2", "I'll WE'LL!"), ["I", "'ll", " WE", "'", "LL", "!"]);
        assert_eq!(split("llama3", "I'll WE'LL!"), ["I", "'ll", " WE", "'LL", "!"]);
        assert_eq!(split("qwen2", "fn(x);\n\ny"), ["fn", "(x", ");\n\n", "y"]);
        assert_eq!(split("tekken", "HelloWorld ABc/"), ["Hello", "World", " ABc", "/"]);
        assert_eq!(split("deepseek-coder", "a b\n1"), ["a", " b", "\n", "1"]);
        assert_eq!(split("deepseek-llm", "我们 ok  "), ["我们", " ok", "  "]);
    }

    #[test]
    fn names_are_unique_and_unknown_names_are_none() {
        let mut names = known();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n);
        assert!(PreTokenizer::new("no-such-rule").is_none());
        assert!(PreTokenizer::new("").is_none());
    }

    #[test]
    fn a_long_run_of_spaces_takes_linear_time() {
        let text = format!("{}x", " ".repeat(2_000_000));
        let words = PreTokenizer::new("qwen2").unwrap().split(&text);
        assert_eq!(words.iter().map(|w| w.len()).collect::<Vec<_>>(), [1_999_999, 2]);
    }

    /// `tests/data/tokenizer/splits.json`: what another engine makes of llama.cpp's expressions.
    #[derive(serde::Deserialize)]
    struct Splits {
        rules: Vec<SplitRule>,
        /// A text, and by expression how many bytes its words have.
        texts: Vec<(String, Vec<Vec<usize>>)>,
    }

    #[derive(serde::Deserialize)]
    struct SplitRule {
        names: Vec<String>,
        whole_words: bool,
        add_bos: bool,
        /// Its expression, of those of a text.
        splits: usize,
    }

    #[test]
    fn every_rule_is_that_of_llama_cpp() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/splits.json");
        let Splits { rules, texts } = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!((rules.len(), texts.len()), (13, 98));
        let mut names = vec![];
        for SplitRule { names: of_rule, whole_words, add_bos, splits } in &rules {
            for name in of_rule {
                let pre = PreTokenizer::new(name).expect(name);
                assert_eq!((pre.whole_words, pre.add_bos), (*whole_words, *add_bos), "{name}");
                for (text, expected) in &texts {
                    let mut rest = text.as_str();
                    let expected: Vec<&str> = expected[*splits]
                        .iter()
                        .map(|&bytes| {
                            let (word, behind) = rest.split_at(bytes);
                            rest = behind;
                            word
                        })
                        .collect();
                    let found = pre.split(text);
                    // An empty text is one empty word or none.
                    assert!(found == expected || text.is_empty(), "{name}: {found:?}, not {expected:?}");
                }
                names.push(name.as_str());
            }
        }
        let mut known = known();
        known.sort_unstable();
        names.sort_unstable();
        assert_eq!(names, known);
    }

    proptest! {
        #[test]
        fn words_join_to_the_text_under_every_rule(text in r"(\PC|[ \t\r\n'0-9a-zA-Z])*") {
            static BUILT: LazyLock<Vec<PreTokenizer>> =
                LazyLock::new(|| RULES.iter().filter_map(|r| PreTokenizer::new(r.names[0])).collect());
            prop_assert_eq!(BUILT.len(), RULES.len());
            for rule in BUILT.iter() {
                let words = rule.split(&text);
                prop_assert_eq!(words.concat(), text.as_str());
                prop_assert!(words.iter().all(|w| !w.is_empty()) || text.is_empty());
            }
        }
    }
}
