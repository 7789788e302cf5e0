use super::*;
use proptest::prelude::*;

const PLAIN: EncodeOptions = EncodeOptions { bos: false, special: false };
const SPECIAL: EncodeOptions = EncodeOptions { bos: false, special: true };

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&t| t.to_owned()).collect()
}

/// `<|end|>` as 0, the 256 bytes as 1 to 256, then four merges, a user-defined token and a turn's end.
fn byte_level() -> Vocab {
    let mut tokens = strings(&["<|endoftext|>"]);
    tokens.extend((0..=255).map(|b| bpe::byte_char(b).to_string()));
    tokens.extend(strings(&["th", "Ġth", "Ġthe", "he", "<tab>", "<|im_end|>"]));
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    kinds[0] = TokenKind::Control;
    kinds[261] = TokenKind::UserDefined;
    kinds[262] = TokenKind::Control;
    Vocab {
        model: "gpt2".into(),
        pre: Some("qwen2".into()),
        tokens,
        kinds,
        merges: strings(&["t h", "Ġ th", "Ġth e", "h e"]),
        bos: Some(0),
        eos: Some(0),
        add_bos: Some(true),
        ..Vocab::default()
    }
}

/// `<unk> <s> </s>`, the 256 bytes as 3 to 258, then words.
fn sentence_piece() -> Vocab {
    let mut tokens = strings(&["<unk>", "<s>", "</s>"]);
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(strings(&["▁", "a", "b", "ab", "▁a", "ba", "▁ab"]));
    let mut kinds = vec![TokenKind::Byte; tokens.len()];
    kinds[..3].copy_from_slice(&[TokenKind::Unknown, TokenKind::Control, TokenKind::Control]);
    kinds[259..].fill(TokenKind::Normal);
    let mut scores = vec![0.0; tokens.len()];
    scores[259..].copy_from_slice(&[-1e9, -1e9, -1e9, -1.0, -2.0, -1.0, -3.0]);
    Vocab { model: "llama".into(), tokens, kinds, scores, ..Vocab::default() }
}

fn error(vocab: Vocab) -> TokenizerError {
    Tokenizer::new(vocab).err().expect("the vocabulary is bad")
}

#[test]
fn byte_pairs_join_in_the_order_of_the_merges() {
    let t = Tokenizer::new(byte_level()).unwrap();
    assert_eq!(t.encode("the the", PLAIN), [257, 102, 259]);
    assert_eq!(t.encode("he", PLAIN), [260]);
    assert_eq!(t.encode("the", EncodeOptions::default()), [0, 257, 102]);
    assert_eq!(t.encode("", EncodeOptions::default()), [0]);
    assert!(t.encode("", PLAIN).is_empty());
    assert_eq!(t.encode("é", PLAIN), [1 + 0xC3, 1 + 0xA9]);
    assert_eq!((t.len(), t.bos(), t.eos()), (263, Some(0), Some(0)));
    assert_eq!((t.token_text(259), t.token_text(263)), (Some("Ġthe"), None));
}

#[test]
fn control_tokens_in_text_are_text_unless_allowed() {
    let t = Tokenizer::new(byte_level()).unwrap();
    let text = "a<|endoftext|>b";
    let as_text = t.encode(text, PLAIN);
    assert!(!as_text.contains(&0));
    assert_eq!(t.decode(&as_text), text);
    assert_eq!(t.encode(text, SPECIAL), [98, 0, 99]);
    assert_eq!(t.decode(&[98, 0, 99]), "ab");
    // User-defined tokens are text, and always whole.
    assert_eq!(t.encode("a<tab>", PLAIN), [98, 261]);
    assert_eq!(t.decode(&[98, 261]), "a<tab>");
}

#[test]
fn of_special_tokens_the_longest_is_taken() {
    let mut vocab = byte_level();
    vocab.tokens.extend(strings(&["<|", "<|endoftext|>x"]));
    vocab.kinds.extend([TokenKind::Control; 2]);
    let t = Tokenizer::new(vocab).unwrap();
    assert_eq!(t.encode("<|endoftext|>x<|endoftext|><|", SPECIAL), [264, 0, 263]);
}

#[test]
fn ends_are_the_end_token_and_turn_markers() {
    let mut vocab = byte_level();
    vocab.eot = Some(99);
    vocab.tokens.push("</s>".into());
    vocab.kinds.push(TokenKind::Normal);
    let t = Tokenizer::new(vocab).unwrap();
    let ends: Vec<u32> = (0..1000).filter(|&id| t.is_end(id)).collect();
    assert_eq!(ends, [0, 99, 262], "a plain word that reads </s> is no end");
}

#[test]
fn a_whole_word_wins_over_the_merges_where_the_rule_says_so() {
    let mut vocab = byte_level();
    vocab.tokens.push("hello".into());
    vocab.kinds.push(TokenKind::Normal);
    vocab.add_bos = None;
    assert_eq!(Tokenizer::new(vocab.clone()).unwrap().encode("hello", PLAIN).len(), 4);
    vocab.pre = Some("llama-bpe".into());
    let t = Tokenizer::new(vocab).unwrap();
    assert_eq!(t.encode("hello", EncodeOptions::default()), [0, 263], "this rule adds the start token too");
}

#[test]
fn sentence_piece_joins_by_score_and_falls_back_to_bytes() {
    let t = Tokenizer::new(sentence_piece()).unwrap();
    // ▁aba: "ab" (-1) before "▁a" (-2); "▁" + "ab" then join (-3).
    assert_eq!(t.encode("aba", PLAIN), [265, 260]);
    // "ba" and "ab" score alike, the left one joins.
    assert_eq!(t.encode("bab", PLAIN), [259, 264, 261]);
    assert_eq!(t.encode("é", PLAIN), [259, 3 + 0xC3, 3 + 0xA9]);
    assert_eq!(t.encode("a", EncodeOptions::default()), [1, 263]);
    assert_eq!(t.encode("</s>a", SPECIAL), [2, 263], "a space follows a special token");
    assert!(!t.encode("</s>", PLAIN).contains(&2));
    assert_eq!(t.decode(&[1, 263, 259, 261]), "a b");
    assert_eq!(t.decode_bytes(263), b" a");
    assert!(t.is_end(2) && !t.is_end(1));

    let bare = Vocab { add_space_prefix: Some(false), ..sentence_piece() };
    let t = Tokenizer::new(bare).unwrap();
    assert_eq!(t.encode("a", PLAIN), [260]);
    assert_eq!(t.decode(&[263]), " a");
}

#[test]
fn text_without_bytes_in_the_vocabulary_becomes_the_unknown_token() {
    let vocab = Vocab {
        model: "llama".into(),
        tokens: strings(&["<unk>", "a"]),
        scores: vec![0.0; 2],
        add_space_prefix: Some(false),
        ..Vocab::default()
    };
    let t = Tokenizer::new(vocab).unwrap();
    assert_eq!(t.encode("aéa", PLAIN), [1, 0, 1]);
    assert_eq!(t.eos(), None, "the default, 2, is beyond this vocabulary");
}

#[test]
fn streamed_text_holds_back_unfinished_characters() {
    let t = Tokenizer::new(byte_level()).unwrap();
    let ids = |bytes: &[u8]| -> Vec<u32> { bytes.iter().map(|&b| u32::from(b) + 1).collect() };
    let mut stream = t.stream();
    let parts: Vec<String> = ids("é🦀!".as_bytes()).into_iter().map(|id| stream.push(id)).collect();
    assert_eq!(parts, ["", "é", "", "", "", "🦀", "!"]);
    assert_eq!(stream.finish(), "");

    let mut stream = t.stream();
    let parts: Vec<String> = ids(b"\xE2\x82a\xFF").into_iter().map(|id| stream.push(id)).collect();
    assert_eq!(parts, ["", "", "\u{FFFD}a", "\u{FFFD}"]);
    assert_eq!(stream.push(9999), "");
    stream.push(1 + 0xF0);
    assert_eq!(stream.finish(), "\u{FFFD}");
}

#[test]
fn real_oddities_are_accepted() {
    let mut vocab = byte_level();
    vocab.eos = Some(263);
    assert_eq!(Tokenizer::new(vocab).unwrap().eos(), None, "equal to the vocabulary's size");

    let mut vocab = byte_level();
    vocab.tokens.extend(strings(&["the", "th", "", ""]));
    vocab.kinds.extend([TokenKind::Normal; 4]);
    vocab.merges.push("t h".into());
    let t = Tokenizer::new(vocab).unwrap();
    assert_eq!(t.encode("the", PLAIN), [257, 102], "of duplicates, the lowest id");

    let t = Tokenizer::new(Vocab { kinds: vec![], merges: vec![], ..byte_level() }).unwrap();
    assert_eq!(t.decode(&t.encode("the <tab>", PLAIN)), "the <tab>");
    let t = Tokenizer::new(Vocab { bos: None, pre: None, ..byte_level() }).unwrap();
    assert_eq!(t.encode("h", EncodeOptions::default()), [105]);
}

#[test]
fn bad_vocabularies_are_refused_by_name() {
    let model = Vocab { model: "bert".into(), ..byte_level() };
    assert_eq!(error(model), TokenizerError::UnknownModel { model: "bert".into() });
    let pre = error(Vocab { pre: Some("qwen9".into()), ..byte_level() }).to_string();
    assert!(pre.contains("`qwen9`") && pre.contains("llama-bpe, llama3"), "{pre}");
    let empty = Vocab { tokens: vec![], kinds: vec![], ..byte_level() };
    assert_eq!(error(empty), TokenizerError::Size { tokens: 0 });

    let mut vocab = byte_level();
    vocab.kinds.pop();
    assert_eq!(error(vocab), TokenizerError::Length { what: "token types", tokens: 263, found: 262 });
    let scores = Vocab { scores: vec![0.0; 264], ..byte_level() };
    assert_eq!(error(scores), TokenizerError::Length { what: "scores", tokens: 263, found: 264 });
    assert_eq!(error(Vocab { scores: vec![], ..sentence_piece() }), TokenizerError::NoScores);
    let mut vocab = sentence_piece();
    vocab.scores[7] = f32::NAN;
    assert_eq!(error(vocab), TokenizerError::Score { id: 7 });

    let mut vocab = sentence_piece();
    vocab.tokens[4] = "<0x-1>".into();
    assert_eq!(error(vocab), TokenizerError::ByteToken { id: 4, text: "<0x-1>".into() });

    let merge = |merge: &str| error(Vocab { merges: strings(&["t h", merge]), ..byte_level() });
    for form in ["", "th", " ", " h"] {
        assert_eq!(merge(form), TokenizerError::MergeForm { index: 1, merge: form.into() });
    }
    for (text, part) in [("xy h", "xy"), ("t ", ""), ("t x", "tx"), ("t h e", "h e"), ("t €", "€")] {
        let expected = TokenizerError::MergeToken { index: 1, merge: text.into(), part: part.into() };
        assert_eq!(merge(text), expected);
    }

    for (what, vocab) in [
        ("start", Vocab { bos: Some(264), ..byte_level() }),
        ("end", Vocab { eos: Some(u32::MAX), ..byte_level() }),
        ("end-of-turn", Vocab { eot: Some(300), ..byte_level() }),
        ("end-of-message", Vocab { eom: Some(300), ..byte_level() }),
        ("unknown", Vocab { unknown: Some(300), ..byte_level() }),
    ] {
        assert!(matches!(error(vocab), TokenizerError::SpecialId { what: w, tokens: 263, .. } if w == what));
    }
    assert_eq!(TokenKind::try_from(7), Err(TokenizerError::Kind { kind: 7 }));
    assert_eq!(TokenKind::try_from(-1), Err(TokenizerError::Kind { kind: -1 }));
    assert_eq!(TokenKind::try_from(6), Ok(TokenKind::Byte));
}

proptest! {
    #[test]
    fn byte_level_decoding_undoes_encoding(text in any::<String>()) {
        let t = Tokenizer::new(byte_level()).unwrap();
        prop_assert_eq!(t.decode(&t.encode(&text, EncodeOptions::default())), text);
    }

    /// U+2581 is the one character that this encoding cannot tell from a space.
    #[test]
    fn sentence_piece_decoding_undoes_encoding(text in any::<String>(), words in "[ab ]*") {
        let t = Tokenizer::new(sentence_piece()).unwrap();
        let text = text.replace('\u{2581}', "") + &words;
        prop_assert_eq!(t.decode(&t.encode(&text, EncodeOptions::default())), text);
    }

    #[test]
    fn streaming_gives_what_decoding_at_once_gives(bytes in any::<Vec<u8>>()) {
        let t = Tokenizer::new(byte_level()).unwrap();
        let ids: Vec<u32> = bytes.iter().map(|&b| u32::from(b) + 1).collect();
        let mut stream = t.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
        prop_assert_eq!(text, t.decode(&ids));
    }

    #[test]
    fn hostile_vocabularies_never_panic(
        tokens in prop::collection::vec("[ab Ġ<>0x▁]{0,4}", 0..6), merges in prop::collection::vec("[abĠ ]{0,4}", 0..4),
        kinds in prop::collection::vec(0i32..7, 0..6), bos: u32, eos in 0u32..8, llama: bool, text: String,
    ) {
        let kinds = kinds.into_iter().map(|k| TokenKind::try_from(k).unwrap()).collect();
        let scores = vec![0.5; tokens.len()];
        let model = if llama { "llama" } else { "gpt2" }.to_owned();
        let vocab =
            Vocab { model, tokens, merges, kinds, scores, bos: Some(bos % 8), eos: Some(eos), ..Vocab::default() };
        if let Ok(t) = Tokenizer::new(vocab) {
            let ids = t.encode(&(text + "aab ab <0x41>"), SPECIAL);
            prop_assert!(ids.iter().all(|&id| (id as usize) < t.len()));
            t.decode(&ids);
        }
    }
}
