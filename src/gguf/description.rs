//! The description of a file: all the compiler ever sees of a model.

use super::error::{GgufError, KeyProblem, TensorProblem};
use super::types::GgmlType;
use super::value::{Array, Value};
use crate::ir::DType;
use indexmap::IndexMap;

/// A tensor's place in the file. Its range lies within the file and overlaps no other tensor's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub ggml_type: GgmlType,
    /// Row-major: the last dimension is contiguous. (Files list dimensions the other way round.)
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file; a multiple of the alignment.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// The compiler's element type, which is one that weights may have.
    ///
    /// # Errors
    /// Another type, with the name of the tensor.
    pub fn dtype(&self) -> Result<DType, GgufError> {
        let unsupported = || TensorProblem::UnsupportedType { name: self.ggml_type.name() };
        let dtype = self.ggml_type.dtype().filter(|dtype| DType::WEIGHTS.contains(dtype));
        dtype.ok_or_else(|| GgufError::tensor(&self.name, unsupported()))
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// The validated header of a GGUF file: metadata and tensor table, but no tensor data.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// Format version, 2 or 3.
    pub version: u32,
    /// In file order.
    pub metadata: IndexMap<String, Value>,
    /// By name, in file order.
    pub tensors: IndexMap<String, TensorInfo>,
    /// Each tensor starts at a multiple of this many bytes: a power of two, at least 8.
    pub alignment: u64,
    /// Where the header ends and tensor data begins, in bytes.
    pub data_start: u64,
    /// Length of the whole file in bytes.
    pub file_len: u64,
}

/// Typed questions about metadata. The plain form fails when the key is absent, the `_opt` form
/// answers `None`; both fail when the value has another type.
impl Gguf {
    /// A non-negative integer of any width.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        required(key, self.u64_opt(key)?)
    }

    /// See [`Gguf::u64`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn u64_opt(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// A floating-point number, narrowed to f32.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        required(key, self.f32_opt(key)?)
    }

    /// See [`Gguf::f32`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn f32_opt(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a floating-point number", Value::as_f32)
    }

    /// True or false.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        required(key, self.bool_opt(key)?)
    }

    /// See [`Gguf::bool`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a bool", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        required(key, self.str_opt(key)?)
    }

    /// See [`Gguf::str`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn str_opt(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array of strings.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        required(key, self.strings_opt(key)?)
    }

    /// See [`Gguf::strings`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn strings_opt(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |v| v.as_array()?.as_strings())
    }

    /// An array of integers of any width.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn ints(&self, key: &str) -> Result<Vec<i64>, GgufError> {
        required(key, self.ints_opt(key)?)
    }

    /// See [`Gguf::ints`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn ints_opt(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        self.typed(key, "an array of integers", |v| v.as_array().and_then(Array::as_ints))
    }

    /// An array of floating-point numbers, narrowed to f32.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn floats(&self, key: &str) -> Result<Vec<f32>, GgufError> {
        required(key, self.floats_opt(key)?)
    }

    /// See [`Gguf::floats`].
    ///
    /// # Errors
    /// A value of another type.
    pub fn floats_opt(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.typed(key, "an array of floating-point numbers", |v| v.as_array().and_then(Array::as_floats))
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.tensors.get(name).ok_or_else(|| GgufError::tensor(name, TensorProblem::Missing))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match get(value) {
            Some(v) => Ok(Some(v)),
            None => Err(wrong_type(key, wanted, value)),
        }
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, GgufError> {
    value.ok_or_else(|| GgufError::key(key, KeyProblem::Missing))
}

pub(super) fn wrong_type(key: &str, wanted: &'static str, value: &Value) -> GgufError {
    let found = match value {
        Value::Array(_) => format!("the array {value}"),
        _ => format!("the {} {value}", value.value_type().name()),
    };
    GgufError::key(key, KeyProblem::Type { wanted, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gguf() -> Gguf {
        let metadata = [
            ("n", Value::U32(4)),
            ("neg", Value::I32(-5)),
            ("eps", Value::F32(1e-5)),
            ("flag", Value::Bool(true)),
            ("arch", Value::String("llama".into())),
            ("tokens", Value::Array(Array::String(vec!["a".into(), "b".into()]))),
            ("types", Value::Array(Array::I32(vec![1, -3]))),
            ("scores", Value::Array(Array::F64(vec![0.5]))),
        ];
        Gguf {
            version: 3,
            metadata: metadata.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            tensors: IndexMap::new(),
            alignment: 32,
            data_start: 0,
            file_len: 0,
        }
    }

    #[test]
    fn typed_access() {
        let g = gguf();
        assert_eq!(g.u64("n").unwrap(), 4);
        assert_eq!(g.f32("eps").unwrap(), 1e-5);
        assert!(g.bool("flag").unwrap());
        assert_eq!(g.str("arch").unwrap(), "llama");
        assert_eq!(g.strings("tokens").unwrap(), ["a", "b"]);
        assert_eq!(g.ints("types").unwrap(), [1, -3]);
        assert_eq!(g.floats("scores").unwrap(), [0.5]);
        assert_eq!(g.u64_opt("absent").unwrap(), None);
    }

    #[test]
    fn errors_name_the_key() {
        let g = gguf();
        let says = |e: GgufError| e.to_string();
        assert_eq!(says(g.u64("absent").unwrap_err()), "metadata \"absent\" is missing");
        assert_eq!(
            says(g.u64_opt("neg").unwrap_err()),
            "metadata \"neg\" should be a non-negative integer, but is the i32 -5"
        );
        assert_eq!(
            says(g.strings("types").unwrap_err()),
            "metadata \"types\" should be an array of strings, but is the array i32[2]"
        );
        assert!(g.f32("n").is_err() && g.bool("n").is_err() && g.str("n").is_err());
        assert!(g.ints("n").is_err() && g.ints("scores").is_err() && g.floats("types").is_err());
        assert_eq!(says(g.tensor("x").unwrap_err()), "tensor \"x\" is missing");
    }

    #[test]
    fn unsupported_types_are_refused_by_name() {
        let info = |ggml_type: GgmlType| TensorInfo {
            name: "blk.0.attn_q.weight".into(),
            ggml_type,
            shape: vec![2, 256],
            offset: 0,
            bytes: 512 / ggml_type.block_len() * ggml_type.block_bytes(),
        };
        let mut supported = vec![];
        for ty in (0..64).filter_map(GgmlType::from_id) {
            let info = info(ty);
            assert_eq!(info.elements(), 512);
            match info.dtype() {
                Ok(dtype) => supported.push(dtype),
                Err(e) => {
                    let start = format!("tensor \"blk.0.attn_q.weight\" has the element type {ty},");
                    assert!(e.to_string().starts_with(&start), "{e}");
                }
            }
        }
        let mut weights = DType::WEIGHTS.to_vec();
        weights.sort();
        supported.sort();
        assert_eq!(supported, weights);
    }
}
