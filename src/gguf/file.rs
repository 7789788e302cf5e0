//! A GGUF file with its bytes.

use super::description::{Gguf, TensorInfo};
use super::error::GgufError;
use super::shrink::{self, Listed};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::{fmt, ops::Deref};

/// Bytes hashed at each end of a tensor for [`Identity`].
pub(super) const SAMPLE_BYTES: usize = 4096;

/// A validated file and its bytes: mapped from disk, or already in memory.
#[derive(Debug)]
pub struct GgufFile {
    gguf: Gguf,
    storage: Storage,
    /// Computed once: it faults in two pages of every tensor.
    identity: OnceLock<Identity>,
}

#[derive(Debug)]
enum Storage {
    Mapped(Map),
    Memory(Cow<'static, [u8]>),
}

/// A mapped file; fields are dropped in this order.
#[derive(Debug)]
struct Map {
    _listed: Listed,
    bytes: Mmap,
}

impl Deref for Storage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => &map.bytes,
            Storage::Memory(bytes) => bytes,
        }
    }
}

impl GgufFile {
    /// Maps the file at `path` and reads its header; tensor data is not touched.
    ///
    /// # Errors
    /// A file that cannot be mapped, or whose header is no valid GGUF; both name the file.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile, GgufError> {
        let path = path.as_ref();
        let map = map_file(path).map_err(|source| GgufError::Open { path: path.to_owned(), source })?;
        let in_file = |error: GgufError| GgufError::File { path: path.to_owned(), error: error.into() };
        let file = GgufFile::new(Storage::Mapped(map)).map_err(in_file)?;
        tracing::debug!(
            path = %path.display(),
            bytes = file.gguf.file_len,
            tensors = file.gguf.tensors.len(),
            "opened"
        );
        Ok(file)
    }

    /// Reads a file that is already in memory, such as an embedded one (`include_bytes!`).
    ///
    /// Tensors are as aligned as `bytes` itself is.
    ///
    /// # Errors
    /// A header that is no valid GGUF.
    pub fn from_bytes(bytes: impl Into<Cow<'static, [u8]>>) -> Result<GgufFile, GgufError> {
        GgufFile::new(Storage::Memory(bytes.into()))
    }

    fn new(storage: Storage) -> Result<GgufFile, GgufError> {
        let gguf = Gguf::parse(&storage, storage.len() as u64)?;
        Ok(GgufFile { gguf, storage, identity: OnceLock::new() })
    }

    /// The description of the file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.storage
    }

    /// The bytes of one of this file's tensors.
    ///
    /// # Panics
    ///
    /// If `info` describes a tensor of another, longer file.
    pub fn tensor_bytes(&self, info: &TensorInfo) -> &[u8] {
        // The description was checked against the length of `storage`, so both fit a usize.
        &self.storage[info.offset as usize..][..info.bytes as usize]
    }

    /// Says that these bytes of the file will be read but once, so that they can be [given back](GgufFile::give_back) apart from
    /// what lies beside them. Bytes that are not mapped, or not of this file, are left alone; so in what follows.
    pub fn expect_one_reading(&self, bytes: &[u8]) {
        self.storage.expect_one_reading(bytes);
    }

    /// Tells the system that these bytes of the file need not stay in memory: they are read from the file again if they are wanted.
    /// Pages that hold something else too stay.
    pub fn give_back(&self, bytes: &[u8]) {
        self.storage.give_back(bytes);
    }

    /// What tells this file from others, read from the header and both ends of each tensor.
    pub fn identity(&self) -> Identity {
        *self.identity.get_or_init(|| self.sample())
    }

    fn sample(&self) -> Identity {
        // A few KiB are wanted of each tensor, not what the system would read ahead.
        self.storage.expect_random_reads(true);
        let mut samples = blake3::Hasher::new();
        for info in self.gguf.tensors.values() {
            let bytes = self.tensor_bytes(info);
            let n = bytes.len().min(SAMPLE_BYTES);
            samples.update(&bytes[..n]);
            samples.update(&bytes[bytes.len() - n..]);
        }
        self.storage.expect_random_reads(false);
        Identity {
            len: self.gguf.file_len,
            header: Digest(*blake3::hash(&self.storage[..self.gguf.data_start as usize]).as_bytes()),
            samples: Digest(*samples.finalize().as_bytes()),
        }
    }

    /// BLAKE3 of the whole file; reads all of it.
    pub fn full_hash(&self) -> Digest {
        Digest(*blake3::hash(&self.storage).as_bytes())
    }
}

impl Storage {
    /// Tells the system whether to read ahead. Only a hint, so it may fail.
    fn expect_random_reads(&self, random: bool) {
        #[cfg(unix)]
        if let Storage::Mapped(map) = self {
            let advice = if random { memmap2::Advice::Random } else { memmap2::Advice::Normal };
            let _ = map.bytes.advise(advice);
        }
        #[cfg(not(unix))]
        let _ = random;
    }
}

/// Bytes to which the system maps files, or a multiple of it.
#[cfg(unix)]
const PAGE: usize = 64 << 10;

impl Map {
    /// The whole pages of the map among some bytes: where they begin, and how many bytes they are.
    #[cfg(unix)]
    fn pages(&self, bytes: &[u8]) -> Option<(usize, usize)> {
        let start = (bytes.as_ptr() as usize).checked_sub(self.bytes.as_ptr() as usize)?;
        let end = start.checked_add(bytes.len()).filter(|end| *end <= self.bytes.len())?;
        let (first, end) = (start.checked_next_multiple_of(PAGE)?, end / PAGE * PAGE);
        Some((first, end.checked_sub(first)?)).filter(|(_, len)| *len > 0)
    }
}

impl Storage {
    /// See [`GgufFile::expect_one_reading`]. Only a hint, so it may fail.
    fn expect_one_reading(&self, bytes: &[u8]) {
        // Else whoever reads what lies beside them could bring them back, with a page of megabytes.
        #[cfg(target_os = "linux")]
        if let Storage::Mapped(map) = self
            && let Some((first, len)) = map.pages(bytes)
        {
            let _ = map.bytes.advise_range(memmap2::Advice::NoHugePage, first, len);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = bytes;
    }

    /// See [`GgufFile::give_back`]. Only a hint, so it may fail.
    fn give_back(&self, bytes: &[u8]) {
        #[cfg(unix)]
        if let Storage::Mapped(map) = self
            && let Some((first, len)) = map.pages(bytes)
        {
            // SAFETY: the map is read-only and of a file, so what is dropped is read from there again: the bytes stay what they are.
            let _ =
                unsafe { map.bytes.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, len) };
        }
        #[cfg(not(unix))]
        let _ = bytes;
    }
}

fn map_file(path: &Path) -> io::Result<Map> {
    // Opening a pipe would block, and mapping a directory fails with an error that nobody understands.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::open(path)?;
    // SAFETY: the map is read-only and only ever seen as bytes, any value of which is valid. That nobody
    // truncates or rewrites the file while it is mapped cannot be enforced here; like every engine that
    // maps models, we rely on the user not to edit a model that is running. One that shrinks is never read
    // beyond its end: that is a SIGBUS, which `shrink` turns into a sentence.
    let bytes = unsafe { Mmap::map(&file) }?;
    Ok(Map { _listed: shrink::list(path, bytes.as_ptr_range()), bytes })
}

/// Names a model file without reading all of it.
///
/// Equal identities mean the same length, the same header and the same first and last 4 KiB of every
/// tensor; a change in the middle of a tensor needs [`GgufFile::full_hash`] to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// Length of the file in bytes.
    pub len: u64,
    /// BLAKE3 of everything before the tensor data.
    pub header: Digest,
    /// BLAKE3 of the first and last 4 KiB of each tensor, in file order.
    pub samples: Digest,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, header {:.12}, samples {:.12}", self.len, self.header, self.samples)
    }
}

/// A BLAKE3 hash; prints as 64 hexadecimal digits, or as many as a precision asks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}
