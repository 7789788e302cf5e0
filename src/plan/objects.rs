//! Machine code of kernels in a plan, by the source that it was compiled from.

use super::{Plan, PlanError};
use crate::codegen::spec::{Code, HipCode};
use crate::gguf::Digest;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What a compiler made of a source, for all kernels that have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeObject {
    /// The architecture that it runs on, as compilers name it.
    pub arch: String,
    /// [`CodeObject::hash`] of the source.
    pub source: Digest,
    /// The compiler and its version, for people.
    pub compiler: String,
    /// What the driver is given.
    #[serde(with = "bytes")]
    pub code: Vec<u8>,
}

impl CodeObject {
    /// BLAKE3 of a source. What it includes is in [`Plan::kernels_hash`].
    pub fn hash(source: &str) -> Digest {
        Digest(blake3::hash(source.as_bytes()).into())
    }
}

impl Plan {
    /// The launches that run code of a GPU, each with the name of its kernel.
    fn hip_codes(&self) -> impl Iterator<Item = (&'static str, &HipCode)> {
        let launches = self.kernels.iter().flat_map(|kernel| {
            let name = kernel.spec.name();
            kernel.launches.iter().map(move |launch| (name, launch))
        });
        launches.filter_map(|(name, launch)| match &launch.code {
            Code::Hip(code) => Some((name, code)),
            Code::Cpu(_) => None,
        })
    }

    /// The sources of all kernels of a GPU, once each.
    pub fn sources(&self) -> Vec<&HipCode> {
        let mut seen = BTreeSet::new();
        self.hip_codes().map(|(_, code)| code).filter(|code| seen.insert(code.source.as_str())).collect()
    }

    /// The machine code of each source for which there is some.
    pub fn objects_by_source(&self) -> BTreeMap<&str, &CodeObject> {
        if self.objects.is_empty() {
            return BTreeMap::new();
        }
        let of = |hash| self.objects.iter().find(|object| object.source == hash);
        let sources = self.sources().into_iter().map(|code| code.source.as_str());
        sources.filter_map(|source| Some((source, of(CodeObject::hash(source))?))).collect()
    }

    /// Rule 8.
    pub(super) fn validate_objects(&self) -> Result<(), PlanError> {
        if self.objects.is_empty() {
            return Ok(());
        }
        let mut unused = BTreeSet::new();
        for object in &self.objects {
            if object.arch != self.target.arch {
                let (has, wants) = (object.arch.clone(), self.target.arch.clone());
                return Err(PlanError::ObjectArch { has, wants });
            }
            if !unused.insert(object.source.0) {
                return Err(PlanError::Duplicate { what: "code objects", name: object.source.to_string() });
            }
        }
        let all = unused.clone();
        for (kernel, code) in self.hip_codes() {
            let hash = CodeObject::hash(&code.source);
            if !all.contains(&hash.0) {
                return Err(PlanError::NoObject { kernel: format!("{kernel} ({})", code.entry) });
            }
            unused.remove(&hash.0);
        }
        match unused.first() {
            Some(hash) => Err(PlanError::ForeignObject { source_hash: Digest(*hash) }),
            None => Ok(()),
        }
    }
}

/// Bytes as they are, or in hex where people read them.
mod bytes {
    use serde::de::{Error, Visitor};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return serializer.serialize_bytes(bytes);
        }
        serializer.collect_str(&Hex(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        if !deserializer.is_human_readable() {
            return deserializer.deserialize_byte_buf(Bytes);
        }
        let text = String::deserialize(deserializer)?;
        let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
        let byte = |pair: &[u8]| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        };
        text.as_bytes().chunks(2).map(byte).collect::<Option<_>>().ok_or_else(|| D::Error::custom("not hex"))
    }

    struct Hex<'a>(&'a [u8]);

    impl std::fmt::Display for Hex<'_> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        }
    }

    struct Bytes;

    impl Visitor<'_> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }
    }
}
