//! What `run`, `perplexity` and `tokenize` make of their options: the same as the library makes of them.

mod support;

use sinter::compile::{Options, Purpose};
use sinter::generate::{EncodeOptions, Perplexity, Sampler, Sampling, Tokenizer};
use sinter::gguf::{GgufFile, GgufWriter, Value};
use sinter::model;
use sinter::runtime::DeviceOptions;
use sinter::target::Target;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use support::command::{said, sinter, stdout};
use support::*;

#[track_caller]
fn run(args: &[&str]) -> (String, String) {
    said(&sinter().args(args).output().unwrap())
}

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The number before `what` in the summary of a run.
#[track_caller]
fn told(summary: &str, what: &str) -> usize {
    let (before, _) = summary.split_once(what).unwrap_or_else(|| panic!("{what}: {summary}"));
    before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

const PROMPT: &str = "A `Vec<T>` is a collection";

/// What the library generates after `prompt`, in a context of 64 unless `options` say otherwise.
fn generated(
    file: &Arc<GgufFile>,
    options: &Options,
    prompt: &str,
    sampling: Sampling,
    count: usize,
) -> Vec<u32> {
    let tokenizer = Tokenizer::from_gguf(file.gguf()).unwrap();
    let prompt = tokenizer.encode(prompt, EncodeOptions::default());
    let mut session =
        model::session(file, None, options, Purpose::Generate, &DeviceOptions::default()).unwrap();
    let mut found = vec![];
    let keep = |id| {
        found.push(id);
        ControlFlow::Continue(())
    };
    let mut sampler = Sampler::new(sampling).unwrap();
    session.generate(&prompt, count, &mut sampler, |id| tokenizer.is_end(id), keep).unwrap();
    found
}

fn text(file: &GgufFile, tokens: &[u32]) -> String {
    Tokenizer::from_gguf(file.gguf()).unwrap().decode(tokens)
}

/// The embedded model as a file with other metadata.
fn with_metadata(path: &Path, changes: &[(&str, Value)]) -> Arc<GgufFile> {
    let file = model::embedded().unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in &file.gguf().metadata {
        writer.metadata(key, value.clone());
    }
    for (key, value) in changes {
        assert!(file.gguf().metadata.contains_key(*key), "{key}");
        writer.metadata(*key, value.clone());
    }
    for (name, info) in &file.gguf().tensors {
        writer.tensor(name, info.ggml_type, &info.shape, file.tensor_bytes(info)).unwrap();
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    std::fs::write(path, bytes).unwrap();
    Arc::new(GgufFile::open(path).unwrap())
}

#[test]
fn every_sampling_flag_reaches_the_sampler() {
    // Any token may come, unless a flag says otherwise.
    let open_flags =
        [("--temp", "1.5"), ("--seed", "7"), ("--top-k", "0"), ("--top-p", "1"), ("--min-p", "0")];
    let all =
        Sampling { temperature: 1.5, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(7), ..Sampling::default() };
    // More than the penalty looks back unless told.
    let count = 80;
    let options = Options { context: Some(128), ..defaults() };
    let file = open("q4_k_m");
    let mut texts = vec![];
    for (flags, sampling) in [
        (&[][..], all.clone()),
        (&[("--temp", "0")], Sampling { temperature: 0.0, ..all.clone() }),
        (&[("--temp", "0.9")], Sampling { temperature: 0.9, ..all.clone() }),
        (&[("--seed", "8")], Sampling { seed: Some(8), ..all.clone() }),
        (&[("--top-k", "2")], Sampling { top_k: 2, ..all.clone() }),
        (&[("--top-p", "0.5")], Sampling { top_p: 0.5, ..all.clone() }),
        (&[("--min-p", "0.1")], Sampling { min_p: 0.1, ..all.clone() }),
        (&[("--repeat-penalty", "1.3")], Sampling { repeat_penalty: 1.3, ..all.clone() }),
        (
            &[("--repeat-penalty", "1.3"), ("--repeat-last-n", "2")],
            Sampling { repeat_penalty: 1.3, repeat_last_n: 2, ..all.clone() },
        ),
        (
            &[("--repeat-penalty", "1.3"), ("--repeat-last-n", "-1")],
            Sampling { repeat_penalty: 1.3, repeat_last_n: usize::MAX, ..all.clone() },
        ),
    ] {
        let mut args = vec!["run", "-p", PROMPT, "-n", "80", "-c", "128"];
        for (flag, value) in open_flags.iter().chain(flags) {
            // A flag may stand once only.
            match args.iter().position(|a| a == flag) {
                Some(at) => args[at + 1] = *value,
                None => args.extend([flag, value]),
            }
        }
        let wanted = text(&file, &generated(&file, &options, PROMPT, sampling, count));
        let found = stdout(&args);
        assert_eq!(found, wanted + "\n", "{flags:?}");
        assert!(!texts.contains(&found), "{flags:?} makes no difference");
        texts.push(found);
    }
}

#[test]
fn one_token_to_choose_from_is_the_best_however_it_comes_to_be_one() {
    let greedy = stdout(&["run", "-p", PROMPT, "-n", "16", "--temp", "0"]);
    let hot = ["run", "-p", PROMPT, "-n", "16", "--temp", "5", "--seed", "1"];
    for (flags, one) in [
        (["--top-k", "1", "--top-p", "1", "--min-p", "0"], true),
        (["--top-k", "0", "--top-p", "0", "--min-p", "0"], true),
        (["--top-k", "0", "--top-p", "1", "--min-p", "1"], true),
        (["--top-k", "0", "--top-p", "1", "--min-p", "0"], false),
    ] {
        let found = stdout(&[&hot[..], &flags].concat());
        assert_eq!(found == greedy, one, "{flags:?}: {found}");
    }
}

#[test]
fn without_flags_sampling_is_that_of_the_library() {
    let file = open("q4_k_m");
    let sampling = Sampling { seed: Some(3), ..Sampling::default() };
    let wanted = text(&file, &generated(&file, &defaults(), PROMPT, sampling, 24));
    assert_eq!(stdout(&["run", "-p", PROMPT, "-n", "24", "-s", "3"]), wanted + "\n");
}

#[test]
fn the_seed_that_is_told_repeats_the_text() {
    let args = ["run", "-p", PROMPT, "-n", "24", "--temp", "1.5"];
    let (found, summary) = run(&[&args[..], &["--seed", "-1"]].concat());
    let seed = summary.trim_end().rsplit_once(", seed ").unwrap().1.trim_end_matches(']');
    assert_eq!(stdout(&[&args[..], &["--seed", seed]].concat()), found);
    // The greedy choice has none.
    assert!(!run(&["run", "-p", PROMPT, "-n", "2", "--temp", "0"]).1.contains("seed"));
}

#[test]
fn minus_one_generates_as_much_as_fits_the_context() {
    let file = open("q4_k_m");
    let prompt = "The borrow checker";
    for context in [8, 24] {
        let options = Options { context: Some(context), ..defaults() };
        let wanted = generated(&file, &options, prompt, Sampling::greedy(), usize::MAX);
        let c = context.to_string();
        let args = ["run", "-p", prompt, "--temp", "0", "-c", &c, "-n"];
        let (found, summary) = run(&[&args[..], &["-1"]].concat());
        assert_eq!(found, text(&file, &wanted) + "\n");
        let (read, generated) = (told(&summary, " tokens read"), told(&summary, " generated"));
        // What follows the last token that fits needs no room.
        assert_eq!((read + generated, generated), (context as usize + 1, wanted.len()), "{summary}");
        assert!(summary.contains("; the context is full (-c)]"), "{summary}");

        let (exactly, summary) = run(&[&args[..], &[&wanted.len().to_string()]].concat());
        assert_eq!(exactly, found);
        assert!(summary.contains("; -n reached]"), "{summary}");
    }
}

#[test]
fn no_tokens_are_an_empty_line() {
    let (found, summary) = run(&["run", "-p", PROMPT, "-n", "0"]);
    assert_eq!((found.as_str(), told(&summary, " generated")), ("\n", 0));
}

#[test]
fn a_long_prompt_is_read_in_chunks() {
    let file = open("q4_k_m");
    let prompt = oracle().text;
    let tokens = oracle().tokens.len();
    let wanted = text(&file, &generated(&file, &exact(), &prompt, Sampling::greedy(), 8)) + "\n";
    for (chunk, steps) in [(7, tokens.div_ceil(7)), (tokens, 1), (1, tokens)] {
        let chunk = chunk.to_string();
        let args = ["run", "-p", &prompt, "--exact", "-c", "64", "-n", "8", "--temp", "0", "--chunk", &chunk];
        let output = sinter().args(args).env("SINTER_LOG", "sinter::runtime::exec=trace").output().unwrap();
        let (found, log) = said(&output);
        assert_eq!(found, wanted, "chunks of {chunk}");
        let of = |wanted: &str| log.lines().filter(|l| l.contains("step{") && l.contains(wanted)).count();
        assert_eq!((of(" r=0}"), of(" r=1}")), (steps - 1, 1 + 7), "chunks of {chunk}");
    }
}

#[test]
fn the_model_ends_its_text_with_its_end_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let wanted = &oracle().models["q4_k_m"];
    let end = 5;
    let eos = wanted.greedy_tokens[end];
    assert!(!wanted.greedy_tokens[..end].contains(&eos));
    let file = with_metadata(&path, &[("tokenizer.ggml.eos_token_id", Value::U32(eos))]);
    for best in [["--temp", "0"], ["--top-k", "1"]] {
        let args = ["run", arg(&path), "-p", &wanted.greedy_prompt, "--exact", "-n", "24"];
        let (found, summary) = run(&[&args[..], &best].concat());
        assert_eq!(found, text(&file, &wanted.greedy_tokens[..end]) + "\n");
        assert_eq!(told(&summary, " generated"), end);
        assert!(summary.contains("; the model ended its text"), "{summary}");
    }
}

#[test]
fn a_text_that_stops_within_a_character_says_so() {
    let file = open("q4_k_m");
    // Any token may come, so sooner or later one that begins a character and does not end it.
    let hot = Sampling { temperature: 5.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Sampling::default() };
    let cut = (0..100).find_map(|seed| {
        let tokens = generated(&file, &exact(), PROMPT, Sampling { seed: Some(seed), ..hot.clone() }, 24);
        let cut = (1..=tokens.len()).find(|&n| text(&file, &tokens[..n]).ends_with('\u{FFFD}'))?;
        Some((seed.to_string(), cut.to_string(), text(&file, &tokens[..cut])))
    });
    let (seed, count, wanted) = cut.expect("a token that ends within a character");
    let args = ["run", "-p", PROMPT, "--exact", "-c", "64", "-n", &count, "--temp", "5", "-s", &seed];
    let open_flags = ["--top-k", "0", "--top-p", "1", "--min-p", "0"];
    assert_eq!(stdout(&[&args[..], &open_flags].concat()), wanted + "\n");
}

#[test]
fn a_prompt_is_taken_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    let prompt = "  Two spaces, a line\n\nand its end\n";
    std::fs::write(&file, prompt).unwrap();
    let model = open("q4_k_m");
    let read = Tokenizer::from_gguf(model.gguf()).unwrap().encode(prompt, EncodeOptions::default()).len();
    let wanted = text(&model, &generated(&model, &defaults(), prompt, Sampling::greedy(), 8)) + "\n";
    let more = ["--temp", "0", "-n", "8"];
    for args in [["run", "-p", prompt], ["run", "-f", arg(&file)], ["run", "-p", "-"], ["run", "-f", "-"]] {
        let mut command = sinter();
        command.args(args).args(more);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Who does not read it does not care.
        _ = child.stdin.take().unwrap().write_all(prompt.as_bytes());
        let (found, summary) = said(&child.wait_with_output().unwrap());
        assert_eq!((found, told(&summary, " tokens read")), (wanted.clone(), read), "{args:?}");
    }
}

#[test]
fn special_tokens_are_read_as_such_only_when_told() {
    let file = open("q4_k_m");
    let tokenizer = Tokenizer::from_gguf(file.gguf()).unwrap();
    let prompt = "a<|endoftext|>b";
    for (flags, special) in [(&[][..], false), (&["--special"], true)] {
        let ids = tokenizer.encode(prompt, EncodeOptions { bos: true, special });
        let (_, summary) = run(&[&["run", "-p", prompt, "-n", "1"], flags].concat());
        assert_eq!(told(&summary, " tokens read"), ids.len());
        assert_eq!(stdout(&[&["tokenize", prompt], flags].concat()), format!("{ids:?}\n"));
        assert_eq!(ids.iter().filter(|&&id| id == 0).count(), 1 + usize::from(special));
    }
}

#[test]
fn tokenize_reads_files_and_shows_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    let text = " a\n";
    std::fs::write(&path, text).unwrap();
    let tokenizer = Tokenizer::from_gguf(open("q4_k_m").gguf()).unwrap();
    let ids = tokenizer.encode(text, EncodeOptions::default());
    assert_eq!(stdout(&["tokenize", "-f", arg(&path)]), format!("{ids:?}\n"));
    let q8_0 = model_path("q8_0");
    assert_eq!(stdout(&["tokenize", arg(&q8_0), "-f", arg(&path)]), format!("{ids:?}\n"));
    assert_eq!(stdout(&["tokenize", "-m", arg(&q8_0), text]), format!("{ids:?}\n"));
    let pieces = format!("{}\t\"Ġa\"\n{}\t\"Ċ\"\n", ids[1], ids[2]);
    assert_eq!(stdout(&["tokenize", "--pieces", "--no-bos", text]), pieces);
}

/// The estimate after each window, and what follows `PPL = `, of a report.
fn perplexity(args: &[&str]) -> (Vec<String>, String) {
    let held_out = path("tests/data/oracle/held_out.txt");
    let report = stdout(&[&["perplexity", "-f", arg(&held_out)], args].concat());
    let (windows, last) = report.trim_end().split_once('\n').unwrap();
    let windows = windows.split(',').enumerate().map(|(n, window)| {
        window.strip_prefix(&format!("[{}]", n + 1)).unwrap_or_else(|| panic!("{report}")).to_string()
    });
    (windows.collect(), last.strip_prefix("Final estimate: PPL = ").unwrap().to_string())
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "takes a minute where arithmetic is checked, and tests/oracle.rs does the same there"
)]
fn perplexity_is_that_of_the_oracle() {
    let json = std::fs::read_to_string(path("tests/data/oracle/perplexity.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let windows = json["windows"].to_string();
    // Windows are as long as the oracle's unless told.
    assert_eq!(json["window_tokens"], 512);
    let (each, last) = perplexity(&["--exact", "--chunks", &windows, "--chunk", "100"]);
    assert_eq!(each.len().to_string(), windows);
    assert!(last.starts_with(&format!("{} +/- ", each[each.len() - 1])), "{last}");
    let found: f64 = each[each.len() - 1].parse().unwrap();
    let wanted = json["perplexity"]["q4_k_m"].as_f64().unwrap();
    assert!((found / wanted - 1.0).abs() <= 5e-4, "perplexity {found}, not {wanted}");
}

#[test]
fn windows_begin_with_the_start_token_if_texts_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let bare = with_metadata(&path, &[("tokenizer.ggml.add_bos_token", Value::Bool(false))]);
    let text = std::fs::read_to_string(support::path("tests/data/oracle/held_out.txt")).unwrap();
    let mut found = vec![];
    for (model, file, start) in [(model_path("q4_k_m"), open("q4_k_m"), Some(0)), (path, bare, None)] {
        let tokens = Tokenizer::from_gguf(file.gguf()).unwrap().encode(&text, EncodeOptions::default());
        let options = Options { context: Some(40), ..Options::new(Target::cpu()) };
        let mut session =
            model::session(&file, None, &options, Purpose::Score, &DeviceOptions::default()).unwrap();
        let mut perplexity = Perplexity::default();
        let mut each = vec![];
        for window in tokens.chunks_exact(40).take(3) {
            perplexity.window(&mut session, window, start).unwrap();
            each.push(format!("{:.4}", perplexity.estimate()));
        }
        let last = format!("{:.4} +/- {:.5}", perplexity.estimate(), perplexity.error());
        let report = self::perplexity(&[arg(&model), "-c", "40", "--chunks", "3"]);
        assert_eq!(report, (each, last));
        found.push(report);
    }
    assert_ne!(found[0], found[1]);
}

#[test]
fn only_whole_windows_count_and_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    let of = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let report = stdout(&["perplexity", "-f", arg(&path), "-c", "8"]);
        report.lines().next().unwrap().split(',').count()
    };
    // The start token and 23 words of one token each, then one more.
    let text = "a b".to_string() + &" a".repeat(21);
    let tokenizer = Tokenizer::from_gguf(open("q4_k_m").gguf()).unwrap();
    assert_eq!(tokenizer.encode(&text, EncodeOptions::default()).len(), 24);
    assert_eq!((of(&text), of(&(text.clone() + " a")), of(&text[..text.len() - 2])), (3, 3, 2));
}

/// A prompt of several chunks: the summary alone where stderr is a pipe; on a terminal bars, which are gone before the text.
#[test]
fn bars_are_for_terminals() {
    let args = ["run", "-p", PROMPT, "-n", "2", "--temp", "0", "--chunk", "2"];
    let (text, summary) = run(&args);
    assert!(summary.starts_with('[') && summary.lines().count() == 1, "{summary:?}");
    let line = [&[env!("CARGO_BIN_EXE_sinter")], &args[..5], &args[5..]].concat();
    let line = line.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let mut script = std::process::Command::new("script");
    let script = script.args(["-qec", &line, "/dev/null"]).env("TERM", "xterm").stdin(Stdio::null());
    let Ok(shown) = script.output() else { return };
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for bar in ["loading weights [", "reading the prompt ["] {
        assert!(shown.contains(bar), "{shown:?}");
    }
    let (_, after) = shown.rsplit_once("] ").unwrap();
    let (of_bar, after) = after.split_once("\x1b[2K").unwrap_or_else(|| panic!("{shown:?}"));
    assert!(of_bar.contains(" of ") && after.contains(text.trim()), "{shown:?}");
}
