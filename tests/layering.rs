//! Data flows one way, and so do the imports: every `crate::` and `super::` path in the source is held to this list.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What each room may import. Rooms not listed (the crate's root files, the commands) may import anything.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("ir", &[]),
    ("target", &["ir"]),
    ("gguf", &["ir"]),
    ("lower", &["gguf", "ir"]),
    ("passes", &["ir", "target"]),
    ("codegen", &["ir", "target"]),
    ("plan", &["codegen", "gguf", "ir", "target"]),
    ("runtime", &["codegen", "gguf", "ir", "plan", "target"]),
    ("generate", &["gguf", "ir", "plan", "runtime"]),
    ("load", &["generate", "gguf", "plan", "runtime"]),
    ("explain", &["ir", "passes", "target"]),
    ("show", &["codegen", "explain", "ir", "passes", "plan", "runtime", "target"]),
];

/// Source without comments, and with strings and character literals emptied.
fn strip(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let bytes: Vec<char> = source.chars().collect();
    let at = |i: usize| bytes.get(i).copied().unwrap_or('\0');
    let mut i = 0;
    while i < bytes.len() {
        match (at(i), at(i + 1)) {
            ('/', '/') => {
                while i < bytes.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            ('/', '*') => {
                while i < bytes.len() && (at(i), at(i + 1)) != ('*', '/') {
                    i += 1;
                }
                i += 2;
            }
            ('r', '"' | '#') if !at(i.wrapping_sub(1)).is_alphanumeric() && at(i.wrapping_sub(1)) != '_' => {
                let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
                if at(i + 1 + hashes) != '"' {
                    out.push('r');
                    i += 1;
                    continue;
                }
                i += 2 + hashes;
                let closes = |j: usize| at(j) == '"' && (1..=hashes).all(|h| at(j + h) == '#');
                while i < bytes.len() && !closes(i) {
                    i += 1;
                }
                i += 1 + hashes;
            }
            ('"', _) => {
                i += 1;
                while i < bytes.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            ('\'', '\\') => {
                i += 3;
                while i < bytes.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            ('\'', _) if at(i + 2) == '\'' => i += 3,
            (c, _) => {
                out.push(c);
                i += 1;
            }
        }
    }
    out
}

/// The crate-level names that `source`, the module at `module` (as in `["passes", "rule"]`), refers to.
fn rooms(source: &str, module: &[String]) -> BTreeSet<String> {
    let text = strip(source);
    let mut found = BTreeSet::new();
    let mut inline: Vec<usize> = vec![];
    let mut depth = 0;
    let mut i = 0;
    let chars: Vec<char> = text.chars().collect();
    let word_at = |i: usize| -> String {
        chars[i..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect()
    };
    while i < chars.len() {
        match chars[i] {
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                inline.retain(|d| *d <= depth);
            }
            c if c.is_alphabetic() || c == '_' => {
                let word = word_at(i);
                let after = i + word.len();
                let rest: String = chars[after..].iter().collect();
                if word == "mod"
                    && rest
                        .trim_start()
                        .split_once('{')
                        .is_some_and(|(name, _)| name.trim().chars().all(|c| c.is_alphanumeric() || c == '_'))
                {
                    inline.push(depth + 1);
                }
                let preceded = text_before(&chars, i).ends_with("::");
                if (word == "crate" || word == "super") && !preceded && rest.starts_with("::") {
                    let mut path: Vec<String> = module.to_vec();
                    path.extend(inline.iter().map(|_| "inline".to_string()));
                    if word == "crate" {
                        path.clear();
                    } else {
                        path.pop();
                    }
                    let mut rest = &rest[2..];
                    while let Some(next) = rest.strip_prefix("super::") {
                        path.pop();
                        rest = next;
                    }
                    if path.is_empty() {
                        found.extend(heads(rest));
                    } else {
                        found.insert(path[0].clone());
                    }
                }
                i = after;
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    found
}

fn text_before(chars: &[char], i: usize) -> String {
    chars[i.saturating_sub(2)..i].iter().collect()
}

/// The first names of a path or of each path in a group: `a::b` gives a, `{a::{b, c}, d}` gives a and d.
fn heads(path: &str) -> Vec<String> {
    let word = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(group) = path.strip_prefix('{') else { return vec![word(path)] };
    let (mut heads, mut depth, mut start) = (vec![], 0, true);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => start = true,
            c if start && (c.is_alphabetic() || c == '_') => {
                heads.push(word(&group[i..]));
                start = false;
            }
            _ => {}
        }
    }
    heads
}

fn sources(dir: &Path, list: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, list);
        } else if path.extension().is_some_and(|e| e == "rs") {
            list.push(path);
        }
    }
}

/// The module path of a file: `src/passes/rule.rs` is `passes::rule`, `src/passes/mod.rs` is `passes`.
fn module_of(path: &Path, root: &Path) -> Vec<String> {
    let relative = path.strip_prefix(root).unwrap().with_extension("");
    let mut module: Vec<String> = relative.iter().map(|s| s.to_str().unwrap().to_string()).collect();
    if module.last().is_some_and(|m| m == "mod") {
        module.pop();
    }
    module
}

/// What a file imports that it may not.
fn violations(source: &str, module: &[String]) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    let Some(room) = module.first() else { return vec![] };
    let Some(allowed) = allowed.get(room.as_str()) else { return vec![] };
    let imports = rooms(source, module).into_iter();
    imports
        .filter(|r| r != room && !allowed.contains(&r.as_str()))
        .map(|r| format!("{} -> {r}", module.join("::")))
        .collect()
}

#[test]
fn imports_go_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    sources(&root, &mut files);
    assert!(files.len() > 50, "only {} files", files.len());
    let (mut wrong, mut seen) = (vec![], BTreeSet::new());
    for path in &files {
        let source = std::fs::read_to_string(path).unwrap();
        let module = module_of(path, &root);
        wrong.extend(violations(&source, &module));
        let room = module.first().cloned().unwrap_or_default();
        seen.extend(rooms(&source, &module).into_iter().map(|r| (room.clone(), r)));
    }
    assert!(wrong.is_empty(), "imports against the direction of data:\n{}", wrong.join("\n"));
    // The list is what the code does, not what it might: each allowed import happens, but for generate's use of ir.
    for (room, allowed) in ALLOWED {
        for import in allowed.iter().filter(|i| (room, **i) != ("generate", "ir")) {
            assert!(
                seen.contains(&(room.to_string(), import.to_string())),
                "{room} no longer imports {import}"
            );
        }
    }
}

/// Kernels say what differs between vendors and architectures in one header alone, and sources that are made say nothing of it.
#[test]
fn only_one_header_has_conditions_of_vendors() {
    const VENDORS: [&str; 9] = [
        "SINTER_AMD",
        "SINTER_NVIDIA",
        "__gfx",
        "__GFX",
        "__CUDA",
        "__HIP",
        "__NVCC",
        "__builtin_amdgcn",
        "asm(",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(root.join("kernels")).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources(&root.join("src/codegen"), &mut files);
    let names = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        VENDORS.into_iter().filter(|word| text.contains(word)).collect::<Vec<_>>()
    };
    let (device, others): (Vec<_>, Vec<_>) =
        files.iter().partition(|path| path.ends_with("kernels/device.h"));
    assert!(device.iter().all(|path| names(path).len() > 5) && device.len() == 1 && others.len() > 20);
    for path in others {
        assert_eq!(names(path), [""; 0], "{}", path.display());
    }
}

/// What runs never calls the interpreter: only the checks and tests of kernels do.
#[test]
fn nothing_that_runs_names_the_interpreter() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    sources(&root, &mut files);
    let mut users = vec![];
    for path in &files {
        let module = module_of(path, &root).join("::");
        let source = strip(&std::fs::read_to_string(path).unwrap());
        if source.contains("interp") && !module.starts_with("runtime::interp") {
            users.push(module);
        }
    }
    users.sort();
    // `runtime` declares the module, `check` compares kernels with it.
    assert_eq!(users, ["check", "check::kernels", "runtime"]);
}

/// What `run PLAN` reaches is [`sinter::load`] and the rooms that it may import, and those that they may. None of them
/// compiles, but for the builder of plans and the generator of kernels in two of them: those, nobody there may name.
#[test]
fn what_runs_a_plan_cannot_compile() {
    let (mut reached, mut todo) = (BTreeSet::from(["load"]), vec!["load"]);
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    while let Some(room) = todo.pop() {
        todo.extend(allowed[room].iter().filter(|next| reached.insert(next)));
    }
    let all = ["codegen", "generate", "gguf", "ir", "load", "plan", "runtime", "target"];
    assert_eq!(reached, BTreeSet::from(all), "neither lower, passes, compile nor model");

    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    sources(&root, &mut files);
    let mut looked_at = 0;
    for path in &files {
        let module = module_of(path, &root);
        let runs = ["load", "generate", "plan", "runtime"].contains(&module[0].as_str());
        if !runs || module.last().is_some_and(|m| m == "tests") || module == ["plan", "build"] {
            continue;
        }
        looked_at += 1;
        let source = std::fs::read_to_string(path).unwrap();
        let compiles = compiling(source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default());
        // The room of plans says what its builder takes.
        let own = module == ["plan"] && compiles == ["Parts", "build"];
        assert!(compiles.is_empty() || own, "{}: {compiles:?}", module.join("::"));
    }
    assert!(looked_at > 40, "{looked_at}");
    for bad in [
        "codegen::generate(&g, &t, &l)",
        "use crate::codegen::{self, spec};",
        "Plan::build(p)",
        "use memory::{align_up, place};",
        "memory::place(x)",
    ] {
        assert_eq!(compiling(bad).len(), 1, "{bad}");
    }
    assert!(
        compiling("use crate::codegen::spec::{Arg}; // Plan::build\nuse crate::codegen::mark;").is_empty()
    );
}

/// What a source names that builds plans or makes kernels.
fn compiling(source: &str) -> Vec<&'static str> {
    let text = strip(source);
    let harmless = |rest: &&str| rest.starts_with("spec") || rest.starts_with("mark");
    let kernels = text.split("codegen::").skip(1).any(|rest| !harmless(&rest));
    let words =
        |text: &str, word: &str| text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word);
    // Of the planner of memory, one function places; others check.
    let planner = text.split("memory::").skip(1).any(|rest| match rest.strip_prefix('{') {
        Some(group) => words(group.split('}').next().unwrap_or_default(), "place"),
        None => rest.starts_with("place("),
    });
    let builder = ["Parts", "build"].into_iter().filter(|name| words(&text, name));
    let builder = builder.chain(planner.then_some("place"));
    builder.chain(kernels.then_some("codegen")).collect()
}

#[test]
fn a_violation_is_found_however_it_is_written() {
    let module = |path: &str| path.split("::").map(String::from).collect::<Vec<_>>();
    let bad = [
        ("passes::merge", "use crate::codegen::spec::Program;"),
        ("passes::merge", "fn f() { let x = crate::plan::FORMAT; }"),
        ("passes::merge", "use super::super::runtime::plan;"),
        ("ir::text::parse", "use super::super::super::gguf;"),
        ("codegen", "use crate::{ir::{Graph, Op}, passes::Report};"),
        ("runtime::exec", "#[cfg(test)] mod tests { use super::super::super::lower::Config; }"),
        ("ir", "use super::passes;"),
    ];
    for (at, source) in bad {
        assert_eq!(violations(source, &module(at)).len(), 1, "{at}: {source}");
    }
    let good = [
        ("passes::merge", "use crate::ir::Graph; use super::rule::Cx;"),
        ("passes::merge", "// crate::codegen\n/* crate::codegen */ const S: &str = \"crate::codegen\";"),
        (
            "passes::merge",
            "const S: &str = r#\"crate::codegen \" \"#; const C: char = '\"'; use crate::target;",
        ),
        ("passes::merge", "mod tests { use super::*; use super::super::rule; }"),
        ("check", "use crate::passes; use crate::codegen;"),
    ];
    for (at, source) in good {
        assert_eq!(violations(source, &module(at)), Vec::<String>::new(), "{at}: {source}");
    }
}
