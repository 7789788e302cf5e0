//! What can be wrong with a GGUF file.

use super::types::GgmlType;
use crate::ir::DType;
use std::path::PathBuf;
use thiserror::Error;

/// Why a file was refused, or why a question about it has no answer.
#[derive(Debug, Error)]
pub enum GgufError {
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: Box<GgufError> },
    #[error("not a GGUF file: its first four bytes are not \"GGUF\"")]
    NotGguf,
    #[error("the file is big-endian GGUF, which is not supported; convert the model again as little-endian")]
    BigEndian,
    #[error("GGUF version {0} is not supported, only 2 and 3 are; convert the model again")]
    Version(u32),
    #[error("the header is larger than {} MiB, more than any real model needs", limit >> 20)]
    HeaderTooLarge { limit: usize },
    #[error("the file ends in the middle of {place}, at byte {at}")]
    Truncated { place: String, at: u64 },
    #[error(
        "{place} claims {count} entries, which do not fit the {remaining} bytes left; the file is cut off or damaged"
    )]
    Count { place: String, count: u64, remaining: u64 },
    #[error("{place} is not valid UTF-8")]
    Utf8 { place: String },
    #[error("metadata \"{key}\" {problem}")]
    Key { key: String, problem: KeyProblem },
    #[error("tensor \"{name}\" {problem}")]
    Tensor { name: String, problem: TensorProblem },
}

/// What is wrong with one metadata entry. Reads on after `metadata "key" `.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyProblem {
    #[error("is missing")]
    Missing,
    #[error("occurs twice")]
    Duplicate,
    #[error("should be {wanted}, but is {found}")]
    Type { wanted: &'static str, found: String },
    #[error("has a value of unknown type {0}")]
    UnknownType(u32),
    #[error("is an array of arrays, which is not supported")]
    NestedArray,
    #[error("holds a bool of value {0}; only 0 and 1 are bools")]
    Bool(u8),
    #[error("should be a power of two from 8 to {max}, but is {found}")]
    Alignment { found: u64, max: u64 },
}

/// What is wrong with one tensor. Reads on after `tensor "name" `.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TensorProblem {
    #[error("is missing")]
    Missing,
    #[error("occurs twice")]
    Duplicate,
    #[error("has {0} dimensions; at most 4 are allowed")]
    Rank(u64),
    #[error("has a dimension of size zero")]
    ZeroDim,
    #[error("has a size that overflows 64 bits")]
    Overflow,
    #[error("has rows of {row} elements, not a whole number of {ty} blocks of {block}")]
    Blocks { row: u64, ty: &'static str, block: u64 },
    #[error("has the retired element type {name} ({id}); quantise the model again")]
    RetiredType { name: &'static str, id: u32 },
    #[error("has the unknown element type {0}; the file is damaged, or newer than this program")]
    UnknownType(u32),
    #[error("has the element type {name}, which is not supported; these are: {}", supported_types())]
    UnsupportedType { name: &'static str },
    #[error("starts at offset {offset}, not a multiple of the alignment {alignment}")]
    Misaligned { offset: u64, alignment: u64 },
    #[error("needs {bytes} bytes from byte {offset} on, but the file has {file_len}; it may be cut off")]
    PastEnd { offset: u64, bytes: u64, file_len: u64 },
    #[error("overlaps tensor \"{0}\"")]
    Overlap(String),
    #[error("needs {expected} bytes, but {given} are given")]
    Bytes { expected: u64, given: u64 },
}

/// What the compiler takes, for the message: GGML's names.
fn supported_types() -> String {
    let names: Vec<&str> = DType::WEIGHTS.into_iter().filter_map(GgmlType::of).map(|t| t.name()).collect();
    names.join(", ")
}

impl GgufError {
    pub(super) fn key(key: &str, problem: KeyProblem) -> GgufError {
        GgufError::Key { key: shown(key), problem }
    }

    pub(super) fn tensor(name: &str, problem: TensorProblem) -> GgufError {
        GgufError::Tensor { name: shown(name), problem }
    }
}

/// Text of a file as it may appear in a message: control characters escaped, long text clipped.
pub(super) fn shown(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    let mut out: String = text.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        out.push('…');
    }
    out
}
