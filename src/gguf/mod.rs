//! GGUF files: what a model file says about itself, and its tensor bytes.
//!
//! [`Gguf`] is the validated description of a file (metadata and tensor table); the compiler sees
//! nothing else. [`GgufFile`] adds the bytes, mapped or embedded. [`GgufWriter`] writes files.
//! [`blocks`] holds the storage layouts of the quantised formats, [`dequant`] the slow reference
//! that gives them their meaning.
//!
//! The format is that of GGML's `docs/gguf.md`. A file is untrusted: every count is compared with
//! the bytes that are left before anything is reserved, sizes are computed with checked arithmetic,
//! and whatever cannot be described exactly is refused with a sentence that names it.

pub mod blocks;
pub mod dequant;
mod description;
mod error;
mod file;
mod reader;
mod shrink;
#[cfg(test)]
mod tests;
mod types;
mod value;
mod writer;

pub use description::{Gguf, TensorInfo};
pub use error::{GgufError, KeyProblem, TensorProblem};
pub use file::{Digest, GgufFile, Identity};
pub use shrink::exit_when_a_file_shrinks;
pub use types::GgmlType;
pub use value::{Array, Value, ValueType};
pub use writer::GgufWriter;
