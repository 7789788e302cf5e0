//! docs/writing-a-pass.md says what the source says.

use std::collections::BTreeMap;
use std::path::Path;

fn read(relative: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(relative);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{relative}: {e}"))
}

fn doc() -> String {
    read("docs/writing-a-pass.md")
}

/// Blocks of Rust: the file that the first line names, and the rest.
fn quotes(doc: &str) -> Vec<(String, String)> {
    let blocks = doc.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let quote = |block: &str| {
        let (path, code) = block.split_once('\n').unwrap();
        let path =
            path.strip_prefix("// ").unwrap_or_else(|| panic!("a block of no file begins with {path:?}"));
        (path.to_string(), code.to_string())
    };
    blocks.map(quote).collect()
}

/// The function of this name, to its closing brace.
fn function(source: &str, name: &str) -> String {
    let (_, rest) = source.split_once(&format!("fn {name}(")).unwrap_or_else(|| panic!("no fn {name}"));
    format!("fn {name}({}\n}}\n", rest.split("\n}\n").next().unwrap())
}

#[test]
fn rules_in_the_doc_are_those_of_the_source() {
    let quotes = quotes(&doc());
    for (path, code) in &quotes {
        assert!(read(path).contains(code.as_str()), "{path} has no such lines:\n{code}");
    }
    // And whole.
    for (path, name) in [
        ("src/passes/gated_scan.rs", "try_fuse"),
        ("examples/custom_pass.rs", "try_rewrite"),
        ("examples/custom_pass.rs", "pipeline"),
    ] {
        let body = function(&read(path), name);
        let shown = quotes.iter().any(|(from, code)| from == path && code.contains(&body));
        assert!(shown, "the doc does not show all of {name} of {path}:\n{body}");
    }
}

/// The variants of `Why` in a source, each as a pattern with the names of its fields.
fn variants(source: &str) -> Vec<String> {
    let (_, rest) = source.split_once("pub enum Why {\n").unwrap();
    let lines = rest.split("\n}").next().unwrap().lines();
    let code =
        lines.map(|line| line.split("//").next().unwrap().trim()).filter(|line| !line.starts_with('#'));
    let text = code.collect::<Vec<_>>().join(" ");
    let (mut depth, mut parts, mut part) = (0, vec![], String::new());
    for c in text.chars() {
        depth += i32::from("{(<".contains(c)) - i32::from("})>".contains(c));
        match c {
            ',' if depth == 0 => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
    }
    parts.push(part);
    let pattern = |part: &str| {
        let (name, fields) = part.split_once('{').unwrap_or((part, ""));
        let fields = fields.trim().trim_end_matches('}').split(',');
        let fields: Vec<&str> =
            fields.filter_map(|field| field.split_once(':')).map(|(name, _)| name.trim()).collect();
        let list = if fields.is_empty() { String::new() } else { format!(" {{ {} }}", fields.join(", ")) };
        format!("Why::{}{list}", name.trim())
    };
    parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty()).map(pattern).collect()
}

#[test]
fn the_doc_has_every_reason() {
    let rows: Vec<String> = doc()
        .lines()
        .filter_map(|line| line.strip_prefix("| `Why::"))
        .map(|row| {
            let (name, rest) = row.split_once('`').unwrap();
            assert!(rest.split('|').filter(|cell| !cell.trim().is_empty()).count() == 2, "{row}");
            format!("Why::{name}")
        })
        .collect();
    let known = variants(&read("src/ir/decision.rs"));
    assert!(known.len() >= 9, "{known:?}");
    let missing: Vec<_> = known.iter().filter(|why| !rows.contains(why)).collect();
    let gone: Vec<_> = rows.iter().filter(|row| !known.contains(row)).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "the table of docs/writing-a-pass.md lacks {missing:?}, and has {gone:?}, which Why has not"
    );
    // Every name that is spoken of elsewhere in the doc is one, too.
    let doc = doc();
    for name in doc.split("Why::").skip(1) {
        let name: String = name.chars().take_while(char::is_ascii_alphanumeric).collect();
        assert!(
            known.iter().any(|why| why.split(' ').next() == Some(&format!("Why::{name}"))),
            "Why::{name}"
        );
    }
    let two =
        "pub enum Why {\n    /// A, {b}.\n    #[x]\n    One { a: Vec<(u8, u8)>, b: f64 },\n    Two,\n}\n";
    assert_eq!(variants(two), ["Why::One { a, b }", "Why::Two"]);
}

/// Files, functions of the tests and options that the doc names are there.
#[test]
fn the_doc_speaks_of_what_there_is() {
    let doc = doc();
    let code = doc.split('`').skip(1).step_by(2);
    let files: BTreeMap<&str, bool> = code
        .filter(|c| ["src/", "tests/", "examples/", "kernels/", "docs/"].iter().any(|dir| c.starts_with(dir)))
        .filter(|c| !c.contains("NAME") && !c.contains(char::is_whitespace))
        .map(|c| (c, Path::new(env!("CARGO_MANIFEST_DIR")).join(c).exists()))
        .collect();
    assert!(files.len() > 15, "{files:?}");
    assert!(files.values().all(|there| *there), "{files:?}");
    let options = read("src/cli/opt.rs")
        + &read("src/cli/args.rs")
        + &read("src/cli/dump.rs")
        + &read("src/cli/run.rs");
    for option in doc.split("`--").skip(1) {
        let name: String = option.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        let field = format!("{}:", name.replace('-', "_"));
        assert!(options.contains(&field), "--{name}");
    }
}

#[test]
fn the_doc_shows_what_the_example_prints() {
    let golden = read("tests/snapshots/custom_pass.snap");
    let printed = golden.splitn(3, "---\n").nth(2).unwrap();
    let head = printed.split("\n\n").next().unwrap();
    assert!(doc().contains(&format!("$ cargo run --release --example custom_pass\n{head}\n")), "{head}");
}
