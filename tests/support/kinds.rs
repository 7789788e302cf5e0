//! What kinds of code the kernels of GPUs are: the lines of a source without its sizes. Two sources with the same lines instantiate the same
//! templates for the same formats, layouts, activations and classes of tokens.

use sinter::codegen::spec::HipCode;
use std::collections::{BTreeMap, BTreeSet};

/// The kinds of a source's lines, on a GPU of waves of so many lanes.
pub fn kinds(code: &HipCode, wave: u64) -> BTreeSet<String> {
    let mut lines = code.source.lines().skip_while(|line| !line.starts_with("KERNEL("));
    assert!(lines.next().is_some_and(|line| line.ends_with('{')), "{} has no kernel", code.entry);
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let mut kinds = BTreeSet::new();
    for line in lines.map(str::trim) {
        let mut text = Text { names: &names, wave, warps: 1, asides: BTreeSet::new(), long: BTreeSet::new() };
        let line = text.of(without_condition(line));
        let line = line.trim_start_matches("return ");
        let function = line.split(['<', '(', ' ']).next().unwrap();
        let of = if line.contains("Quantised<") { "bytes" } else { "floats" };
        if function.starts_with("matvec") {
            // A lone row of a single token loads a chunk of 32 columns before it needs it.
            let lone =
                ["matvec<_, 1, 1, 1>", "matvec<_, 2, 1, 1>", "matvec<_, 4, 1, 1>", "matvec_best<_, 1, 1,"];
            let lone = lone.iter().any(|start| line.starts_with(start));
            let asides = text.long.iter().map(|span| match span {
                32 if lone => "chunks loaded ahead".to_string(),
                span => format!("long rows, {span} columns at once"),
            });
            text.asides.extend(asides);
        }
        kinds.extend(text.asides.into_iter().map(|aside| format!("{function} of {of}: {aside}")));
        // Which pointers are null is asked whatever the types are.
        for (i, (at, _)) in line.match_indices("*)").enumerate() {
            let is = if line[at..].starts_with("*)nullptr") { "null" } else { "there" };
            kinds.insert(format!("{function}: pointer {i} is {is}"));
        }
        if let Some(declared) = declarations(line) {
            names.extend(declared);
        } else if line.chars().any(char::is_alphanumeric) {
            kinds.insert(line.replace("*)nullptr", "*)a"));
        }
    }
    kinds
}

/// A line without the blocks that it is for.
fn without_condition(line: &str) -> &str {
    let Some(rest) = line.strip_prefix("if (block_") else { return line };
    rest.split_once(") ").map_or(rest, |(_, rest)| rest.split_once(") ").map_or(rest, |(_, rest)| rest))
}

/// What a line declares, each name with its type or value: what other lines say by that name depends on it.
fn declarations(line: &str) -> Option<Vec<(String, String)>> {
    let pair = |name: &str, what: &str| (name.to_string(), what.to_string());
    if let Some(union) = line.strip_prefix("__shared__ union {") {
        let members = union.split_once('}')?.0.split(';').filter_map(|member| member.trim().rsplit_once(' '));
        return Some(members.map(|(what, name)| pair(name, what)).collect());
    }
    let line = line.strip_suffix(';')?;
    if line.starts_with("Turning<") {
        let (what, name) = line.split_once('{')?.0.rsplit_once(' ')?;
        return Some(vec![pair(name, what)]);
    }
    if let Some(value) = line.strip_prefix("const auto ") {
        let (name, what) = value.split_once(" = ")?;
        return Some(vec![pair(name, what)]);
    }
    let (what, name) =
        line.strip_prefix("typedef ").or(line.strip_prefix("__shared__ "))?.rsplit_once(' ')?;
    Some(vec![pair(name, what)])
}

/// Text of C++ on its way to a kind.
struct Text<'a> {
    names: &'a BTreeMap<String, String>,
    wave: u64,
    /// How many share a row.
    warps: u64,
    /// What code asks of the sizes, whatever else its arguments are.
    asides: BTreeSet<String>,
    /// Columns at once of weights whose rows give each lane that shares them two chunks or more.
    long: BTreeSet<u64>,
}

impl Text<'_> {
    fn of(&mut self, text: &str) -> String {
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        let (mut out, mut rest) = (String::new(), text);
        while let Some(first) = rest.chars().next() {
            if !is_word(first) {
                out.push(first);
                rest = &rest[first.len_utf8()..];
                continue;
            }
            let (word, after) = rest.split_at(rest.find(|c| !is_word(c)).unwrap_or(rest.len()));
            rest = after;
            if first.is_ascii_digit() {
                // Exponents have signs.
                rest = rest
                    .strip_prefix('-')
                    .filter(|_| word.ends_with('e'))
                    .map_or(rest, |rest| rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == 'f'));
                out += if word == "0" { "0" } else { "_" };
            } else if rest.starts_with('<') {
                let arguments;
                (arguments, rest) = arguments_of(rest);
                out += &self.template(word, &arguments);
            } else if ["T", "R"].contains(&word) {
                out.push('_');
            } else if word.strip_prefix('a').is_some_and(|n| n.parse::<u32>().is_ok()) {
                out.push('a');
            } else {
                let member = word.strip_prefix("room.").unwrap_or(word);
                out += self.names.get(member).map_or(word, String::as_str);
            }
        }
        // Which part of a merged matmul it is.
        out.replace(" - _", "").replace(" - 0", "").replace(" - first", "")
    }

    /// A template with its arguments. Of sizes there is left what code differs by.
    fn template(&mut self, name: &str, arguments: &[&str]) -> String {
        let size = |i: usize| arguments[i].parse::<u64>().unwrap_or_else(|_| panic!("{name}<{arguments:?}>"));
        let is = |is: bool, what: &str| if is { what.into() } else { format!("no {what}") };
        let kept: Vec<(usize, String)> = match name {
            // Warps of a row, rows at once, and tokens.
            "matvec" => {
                self.warps = size(1);
                [1, 2, 3].map(|i| (i, arguments[i].into())).into()
            }
            // Rows at once, and tokens.
            "matvec_swiglu" | "matvec_best" => [1, 2].map(|i| (i, arguments[i].into())).into(),
            // Tokens, and heads of a group.
            "Turning" => [1, 2].map(|i| (i, arguments[i].into())).into(),
            "attend_part" => vec![(1, arguments[1].into())],
            "matmul_halves" => vec![(1, is(size(1) > 1, "ranges"))],
            "matmul_unpacked" => [0, 1]
                .map(|i| (i, arguments[i].into()))
                .into_iter()
                .chain([(2, is(size(2) > 1, "ranges"))])
                .collect(),
            "attend" | "Tile" | "HalfTile" => vec![(0, arguments[0].into())],
            "Shape" => {
                let head_dim = [64, 32, 16].into_iter().find(|n| size(2).is_multiple_of(*n));
                let head_dim = head_dim.map_or("odd".into(), |n| format!("{n}s"));
                vec![(2, head_dim), (7, is(size(7) > 0, "window")), (8, is(size(8) > 1, "parts"))]
            }
            _ => vec![],
        };
        let mut aside = |what: String| _ = self.asides.insert(what);
        match name {
            "matvec_best" => aside(is(size(4) > 1, "several times")),
            "rms_norm" => {
                aside(is(size(0) > self.wave, "several warps"));
                aside(is(size(1).is_multiple_of(4), "fours"));
            }
            "rope_head" => {
                aside(is(size(0) > self.wave, "several warps"));
                aside(is(size(2) == 0 || size(1) == size(2), "whole heads"));
            }
            // Formats are unpacked in the same way in all.
            "UnpackedTile" => aside(format!("tiles of {} rows", size(0))),
            "get_row" => aside(is(size(1).is_multiple_of(4), "fours")),
            "Matrix" => {
                let span = if arguments[0].ends_with("_K") { 64 } else { 32 };
                if size(3) >= 2 * self.wave * self.warps * span {
                    self.long.insert(span);
                }
            }
            _ => {}
        }
        let one = |(i, argument): (usize, &&str)| match kept.iter().find(|(at, _)| *at == i) {
            Some((_, kept)) => kept.clone(),
            None => self.of(argument),
        };
        let arguments: Vec<String> = arguments.iter().enumerate().map(one).collect();
        format!("{name}<{}>", arguments.join(", "))
    }
}

/// The arguments of a template, from its bracket on, and what follows it.
fn arguments_of(text: &str) -> (Vec<&str>, &str) {
    let (mut arguments, mut depth, mut from) = (vec![], 0, 1);
    for (at, c) in text.char_indices() {
        match c {
            '<' | '(' | '{' | '[' => depth += 1,
            '>' | ')' | '}' | ']' => depth -= 1,
            _ => {}
        }
        let ends = depth == 0;
        if ends || c == ',' && depth == 1 {
            arguments.push(text[from..at].trim());
            from = at + 1;
        }
        if ends {
            return (arguments, &text[at + 1..]);
        }
    }
    panic!("{text} does not end");
}
