//! Writes GGUF files, version 3.

use super::error::{GgufError, TensorProblem};
use super::reader::{alignment, storage_bytes};
use super::types::GgmlType;
use super::value::{Array, Value};
use indexmap::IndexMap;
use std::borrow::Cow;
use std::io::{self, Write};

/// Collects metadata and tensors, then writes them in the order in which they came.
///
/// `general.alignment`, if set (as a u32), is obeyed.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter<'a> {
    metadata: IndexMap<String, Value>,
    tensors: IndexMap<String, Tensor<'a>>,
}

#[derive(Clone, Debug)]
struct Tensor<'a> {
    ty: GgmlType,
    shape: Vec<u64>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> GgufWriter<'a> {
    pub fn new() -> GgufWriter<'a> {
        GgufWriter::default()
    }

    /// Sets a metadata entry; a second value for one key replaces the first.
    pub fn metadata(&mut self, key: impl Into<String>, value: Value) -> &mut Self {
        self.metadata.insert(key.into(), value);
        self
    }

    /// Adds a tensor of row-major `shape`.
    ///
    /// # Errors
    /// What a reader would refuse: a name that occurs twice, rows that are not whole blocks, a wrong number of bytes.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        ty: GgmlType,
        shape: &[u64],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<&mut Self, GgufError> {
        let (name, bytes) = (name.into(), bytes.into());
        let expected = storage_bytes(ty, shape).map_err(|p| GgufError::tensor(&name, p))?;
        let given = bytes.len() as u64;
        if given != expected {
            return Err(GgufError::tensor(&name, TensorProblem::Bytes { expected, given }));
        }
        if self.tensors.contains_key(&name) {
            return Err(GgufError::tensor(&name, TensorProblem::Duplicate));
        }
        self.tensors.insert(name, Tensor { ty, shape: shape.to_vec(), bytes });
        Ok(self)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If `out` fails; an alignment that a reader would refuse is an [`io::ErrorKind::InvalidInput`].
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let alignment =
            alignment(&self.metadata).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let padding = |len: u64| vec![0; (len.next_multiple_of(alignment) - len) as usize];

        let mut header = self.header(alignment);
        header.extend(padding(header.len() as u64));
        out.write_all(&header)?;
        for t in self.tensors.values() {
            out.write_all(&t.bytes)?;
            out.write_all(&padding(t.bytes.len() as u64))?;
        }
        Ok(())
    }

    fn header(&self, alignment: u64) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            out.extend(value.value_type().id().to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for (name, t) in &self.tensors {
            put_string(&mut out, name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            for dim in t.shape.iter().rev() {
                out.extend(dim.to_le_bytes());
            }
            out.extend(t.ty.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (t.bytes.len() as u64).next_multiple_of(alignment);
        }
        out
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().for_each(|text| put_string(out, text)),
        Array::U64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::DType;

    #[test]
    fn refuses_what_a_reader_would() {
        let q8 = GgmlType::of(DType::Q8_0).unwrap();
        let mut w = GgufWriter::new();
        w.tensor("a", q8, &[2, 32], vec![0; 68]).unwrap();
        let says = |e: GgufError| e.to_string();
        assert_eq!(says(w.tensor("a", q8, &[32], vec![0; 34]).unwrap_err()), "tensor \"a\" occurs twice");
        assert_eq!(
            says(w.tensor("b", q8, &[32], vec![0; 32]).unwrap_err()),
            "tensor \"b\" needs 34 bytes, but 32 are given"
        );
        assert!(w.tensor("c", q8, &[33], vec![0; 34]).is_err());
        assert!(w.tensor("d", q8, &[1, 1, 1, 1, 32], vec![0; 34]).is_err());
        w.metadata("general.alignment", Value::U32(48));
        assert_eq!(w.write_to(&mut Vec::new()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
