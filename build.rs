//! Sets `SINTER_KERNELS_HASH`: BLAKE3 of everything that a plan's kernels rely on, so that a plan compiled for
//! other kernels is refused.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// The kernels, and all that they import: what a spec says, how blocks lie in memory, how indices are bounded.
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

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or(io::ErrorKind::NotFound)?);
    let mut files = vec![];
    for source in SOURCES.iter().filter(|s| root.join(s).exists()) {
        println!("cargo::rerun-if-changed={source}");
        collect(&root.join(source), &mut files)?;
    }
    println!("cargo::rerun-if-changed=build.rs");
    let mut named: Vec<(String, PathBuf)> = vec![];
    for path in files {
        let relative = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        named.push((relative, path));
    }
    named.sort();
    let mut hash = blake3::Hasher::new();
    for (name, path) in named {
        let content = fs::read(path)?;
        for part in [name.as_bytes(), &content] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    println!("cargo::rustc-env=SINTER_KERNELS_HASH={}", hash.finalize().to_hex());
    Ok(())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
