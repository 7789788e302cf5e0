//! A plan refuses to run on other kernels than it was compiled for, so the hash it knows them by must be of all they rely on.

use sinter::plan::KERNELS_HASH;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What the kernels are, and what they import. Folders count whole.
const SOURCES: [&str; 9] = [
    "kernels",
    "src/codegen/spec.rs",
    "src/gguf/blocks.rs",
    "src/ir/attributes.rs",
    "src/ir/fused.rs",
    "src/ir/kernel.rs",
    "src/ir/op.rs",
    "src/ir/types.rs",
    "src/runtime/cpu",
];

/// The files below a path of the repository by their paths, with what is in them.
fn files(path: &str) -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut todo, mut found): (Vec<PathBuf>, _) = (vec![root.join(path)], BTreeMap::new());
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.exists() {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
            found.insert(name, std::fs::read_to_string(&path).unwrap());
        }
    }
    found
}

#[test]
fn the_hash_is_of_these_sources() {
    let mut hash = blake3::Hasher::new();
    let all: BTreeMap<String, String> = SOURCES.into_iter().flat_map(files).collect();
    assert!(all.len() > 15, "{:?}", all.keys());
    for (name, content) in &all {
        for part in [name, content] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
    }
    assert_eq!(KERNELS_HASH, hash.finalize().to_hex().as_str(), "build.rs hashes other files than these");
}

/// The names in a path or a group of paths after `use crate::`, as `ir::DType` or `codegen::spec::Access`.
fn names(path: &str) -> Vec<String> {
    match path.split_once('{') {
        None => vec![path.trim().to_string()],
        Some((start, group)) => {
            let names = group.trim_end_matches('}').split(',').map(str::trim).filter(|name| !name.is_empty());
            names.map(|name| format!("{start}{name}")).collect()
        }
    }
}

#[test]
fn kernels_import_nothing_that_is_not_hashed() {
    let mut imports = BTreeSet::new();
    for (name, content) in SOURCES.into_iter().flat_map(files) {
        // The device around the kernels, where weights come from, and tests make no result another.
        if name.ends_with("/device.rs") || name.ends_with("/weights.rs") || name.contains("test") {
            continue;
        }
        let code = content.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for after in code.split("use crate::").skip(1) {
            imports.extend(names(after.split(';').next().unwrap()));
        }
        if !name.starts_with("src/runtime/cpu") {
            // Siblings, by `super`. What types say is of the graph that they are in, but no kernel sees a graph.
            let of = name.trim_start_matches("src/").rsplit_once('/').unwrap().0.replace('/', "::");
            for after in code.split("use super::").skip(1) {
                imports.extend(
                    names(after.split(';').next().unwrap()).into_iter().map(|n| format!("{of}::{n}")),
                );
            }
            imports.retain(|import| !import.starts_with("ir::graph::"));
        }
        let stray = code.replace("use crate::", "");
        let stray = stray.lines().filter(|line| !line.trim_start().starts_with("//"));
        let stray: Vec<&str> =
            stray.filter(|line| line.contains("crate::") && !line.contains("]: ")).collect();
        assert_eq!(stray, [""; 0], "{name}: import by `use crate::`, so that it is seen here");
    }
    assert!(imports.contains("ir::DType") && imports.contains("gguf::blocks::BlockMXFP4"), "{imports:?}");
    for import in imports {
        let (module, item) = import.rsplit_once("::").unwrap();
        // Where an item of `ir` is defined, as that hands on what is in its files; and so does what codegen produces.
        let folder = format!("src/{}", module.replace("::", "/"));
        let defined = |content: &str| {
            ["struct", "enum", "const", "fn", "type"].iter().any(|kind| {
                content.lines().any(|line| {
                    let rest = line.strip_prefix("pub ").and_then(|l| l.strip_prefix(kind));
                    let rest = rest.and_then(|l| l.strip_prefix(' ')).and_then(|l| l.strip_prefix(item));
                    rest.is_some_and(|l| !l.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
                })
            })
        };
        let handed_on = (module == "codegen::spec").then(|| files("src/ir/fused.rs")).into_iter().flatten();
        let places = files(&folder).into_iter().chain(files(&format!("{folder}.rs"))).chain(handed_on);
        let homes: Vec<String> =
            places.filter(|(_, content)| defined(content)).map(|(name, _)| name).collect();
        assert_eq!(homes.len(), 1, "{import} is defined in {homes:?}");
        assert!(SOURCES.contains(&homes[0].as_str()), "{import}, of {}, is not hashed", homes[0]);
    }
}
