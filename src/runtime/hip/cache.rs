//! Machine code of kernels, kept on disk from run to run.
//!
//! An entry is a file whose name is the hash of everything that it follows from: source, headers, options and the version of the
//! compiler. It holds the hash of its bytes and the bytes, so one that was cut off or damaged is no entry. It is written under another
//! name and then renamed, so processes that write the same do not meet. What cannot be read or written is compiled.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries beyond these are dropped, those first that were written first.
const MOST_BYTES: u64 = 512 << 20;

/// A folder of entries.
#[derive(Clone, Debug)]
pub struct KernelCache {
    folder: PathBuf,
}

/// What an entry follows from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(blake3::Hash);

impl Key {
    /// The key of these parts; no two lists of parts have the same.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Key {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Key(hasher.finalize())
    }
}

impl KernelCache {
    pub fn new(folder: impl Into<PathBuf>) -> KernelCache {
        KernelCache { folder: folder.into() }
    }

    /// The user's: `SINTER_KERNEL_CACHE`, else `sinter/kernels` among the caches of the user. None where that variable is `off` or
    /// nothing says where caches are.
    pub fn of_user() -> Option<KernelCache> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        match variable("SINTER_KERNEL_CACHE") {
            Some(value) if value == "off" => None,
            Some(folder) => Some(KernelCache::new(folder)),
            None => {
                let caches = variable("XDG_CACHE_HOME")
                    .or_else(|| variable("LOCALAPPDATA"))
                    .map(PathBuf::from)
                    .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")))?;
                Some(KernelCache::new(caches.join("sinter").join("kernels")))
            }
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(key.0.to_hex().as_str())
    }

    /// The entry of a key, if it is there whole.
    pub fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let file = std::fs::read(self.path(key)).ok()?;
        let (hash, bytes) = file.split_first_chunk::<32>()?;
        (blake3::hash(bytes).as_bytes() == hash).then(|| bytes.to_vec())
    }

    /// Makes an entry. What hinders that is logged and nothing else, as there is the compiler.
    pub fn put(&self, key: &Key, bytes: &[u8]) {
        if let Err(why) = self.try_put(key, bytes) {
            tracing::debug!(folder = %self.folder.display(), %why, "a kernel is not kept");
        }
    }

    fn try_put(&self, key: &Key, bytes: &[u8]) -> std::io::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        std::fs::create_dir_all(&self.folder)?;
        let own = format!("{}-{}.new", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let own = self.folder.join(own);
        let whole = [&blake3::hash(bytes).as_bytes()[..], bytes].concat();
        let written = std::fs::write(&own, whole).and_then(|()| std::fs::rename(&own, self.path(key)));
        if written.is_err() {
            _ = std::fs::remove_file(&own);
        }
        written
    }

    /// Drops the oldest entries of a folder that has grown too large.
    pub fn trim(&self) {
        self.trim_to(MOST_BYTES);
    }

    fn trim_to(&self, most: u64) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        let mut files: Vec<(std::time::SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let of = entry.metadata().ok().filter(|of| of.is_file() && is_ours(&entry.file_name()))?;
                Some((of.modified().ok()?, of.len(), entry.path()))
            })
            .collect();
        files.sort();
        let mut bytes: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if bytes <= most {
                return;
            }
            bytes -= len;
            _ = std::fs::remove_file(path);
        }
    }
}

/// Whether a file is an entry, or one on its way: the user may have named a folder that holds other things.
fn is_ours(name: &std::ffi::OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let on_its_way = name.strip_suffix(".new").and_then(|own| own.split_once('-'));
    blake3::Hash::from_hex(name).is_ok()
        || on_its_way.is_some_and(|(process, n)| is_number(process) && is_number(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[&str]) -> Key {
        Key::of(parts.iter().map(|part| part.as_bytes()))
    }

    #[test]
    fn keys_differ_where_parts_do() {
        let all = [
            key(&["source", "sm_90", "13.0"]),
            key(&["source", "sm_80", "13.0"]),
            key(&["source", "sm_90", "13.1"]),
            key(&["sources", "m_90", "13.0"]),
            key(&["source", "sm_9013.0"]),
            key(&["", "source", "sm_90", "13.0"]),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all.iter().enumerate().all(|(j, b)| (a == b) == (i == j)), "{i}");
        }
    }

    #[test]
    fn an_entry_comes_back_or_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(dir.path().join("not/yet/there"));
        let (a, b) = (key(&["a"]), key(&["b"]));
        assert_eq!(cache.get(&a), None);
        cache.put(&a, b"code of a");
        cache.put(&b, b"");
        assert_eq!(cache.get(&a).as_deref(), Some(&b"code of a"[..]));
        assert_eq!(cache.get(&b).as_deref(), Some(&b""[..]));
        cache.put(&a, b"other code");
        assert_eq!(cache.get(&a).as_deref(), Some(&b"other code"[..]));
        // Nothing else is left behind.
        assert_eq!(std::fs::read_dir(&cache.folder).unwrap().count(), 2);
    }

    #[test]
    fn a_damaged_entry_is_none_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, key) = (KernelCache::new(dir.path()), key(&["a"]));
        cache.put(&key, b"code of a");
        let whole = std::fs::read(cache.path(&key)).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(cache.path(&key), &damaged).unwrap();
            assert_eq!(cache.get(&key), None, "byte {at}");
            std::fs::write(cache.path(&key), &whole[..at]).unwrap();
            assert_eq!(cache.get(&key), None, "the first {at} bytes");
        }
        cache.put(&key, b"code of a");
        assert_eq!(cache.get(&key).as_deref(), Some(&b"code of a"[..]));
    }

    #[test]
    fn many_may_write_and_read_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let code: Vec<u8> = (0..200_000).map(|i| i as u8).collect();
        let key = key(&["a"]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = KernelCache::new(dir.path());
                    for _ in 0..50 {
                        cache.put(&key, &code);
                        assert_eq!(cache.get(&key).as_ref(), Some(&code));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn where_nothing_can_be_written_nothing_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let (cache, key) = (KernelCache::new(dir.path().join("file")), key(&["a"]));
        cache.put(&key, b"code");
        assert_eq!(cache.get(&key), None);
        cache.trim();
    }

    #[test]
    fn the_oldest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(dir.path());
        let keys: Vec<Key> = (0u8..5).map(|i| Key::of([&[i][..]])).collect();
        for (age, key) in (1..).zip(keys.iter().rev()) {
            cache.put(key, &[7; 68]);
            let file = std::fs::File::options().write(true).open(cache.path(key)).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(age))
                .unwrap();
        }
        // What is not of the cache is not its to drop, however old and large it is.
        let others = ["model.gguf", "1-x.new", "notes.new"].map(|name| dir.path().join(name));
        for other in &others {
            std::fs::write(other, [7; 1000]).unwrap();
            let file = std::fs::File::options().write(true).open(other).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }
        cache.trim_to(300);
        let there: Vec<bool> = keys.iter().map(|key| cache.get(key).is_some()).collect();
        assert_eq!(there, [true, true, true, false, false]);
        cache.trim_to(300);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3 + others.len());
        std::fs::write(dir.path().join("12-3.new"), [7; 300]).unwrap();
        cache.trim_to(0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), others.len());
    }
}
