//! Opening models: a file, or the one that is embedded.

use crate::gguf::{GgufError, GgufFile};
use std::path::Path;

/// Bytes at an address that suits every element type.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static EMBEDDED: &Aligned<[u8]> = &Aligned(*include_bytes!("../models/rustdoc-13m-q4_k_m.gguf"));

/// The model that is part of the program: rustdoc-13m in Q4_K_M (see `models/README.md`).
///
/// # Errors
/// None in practice: a test opens it.
pub fn embedded() -> Result<GgufFile, GgufError> {
    GgufFile::from_bytes(&EMBEDDED.0)
}

/// The model at `path`, or the embedded one.
///
/// # Errors
/// If the file cannot be read or is no valid GGUF.
pub fn open(path: Option<&Path>) -> Result<GgufFile, GgufError> {
    path.map_or_else(embedded, GgufFile::open)
}
