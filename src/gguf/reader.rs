//! From the bytes of a header to a [`Gguf`].

use super::description::{Gguf, TensorInfo, wrong_type};
use super::error::{GgufError, KeyProblem, TensorProblem, shown};
use super::types::{GgmlType, retired};
use super::value::{Array, Value, ValueType};
use indexmap::IndexMap;

/// No real header comes near this; it bounds what a hostile (possibly sparse) file can make us allocate.
pub(super) const MAX_HEADER_BYTES: usize = 128 << 20;
/// The alignment of a file that does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Above this, padding would be a way to waste memory.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// GGML tensors have at most this many dimensions.
const MAX_RANK: u64 = 4;
/// Smallest metadata entry: key length, value type, a one-byte value.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;
/// Smallest tensor entry: name length, rank, element type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

impl Gguf {
    /// Reads the header at the start of `bytes`, which may be the whole file or any prefix of it that
    /// holds the header; `file_len` is the length of the whole file, against which the tensors are checked.
    ///
    /// String values that are not UTF-8 are kept with replacement characters (files hold such text in
    /// descriptions and rare tokens); keys and tensor names have to be UTF-8.
    ///
    /// # Errors
    /// What in the header is wrong, and where.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Gguf, GgufError> {
        let mut c = Cursor::new(bytes);
        if !bytes.starts_with(b"GGUF") {
            return Err(GgufError::NotGguf);
        }
        c.at = 4;
        c.place = "the header".to_owned();
        let version = c.number(u32::from_le_bytes)?;
        match version {
            2 | 3 => {}
            v if matches!(v.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            v => return Err(GgufError::Version(v)),
        }
        let tensor_count = c.number(u64::from_le_bytes)?;
        let entry_count = c.number(u64::from_le_bytes)?;

        c.place = "the metadata".to_owned();
        let metadata = read_metadata(&mut c, entry_count)?;
        let alignment = alignment(&metadata)?;

        c.place = "the tensor table".to_owned();
        let mut tensors = read_tensors(&mut c, tensor_count)?;
        let mut data_start = (c.at as u64).next_multiple_of(alignment);
        if tensors.is_empty() {
            data_start = data_start.min(file_len);
        }
        for info in tensors.values_mut() {
            place(info, data_start, alignment, file_len)?;
        }
        refuse_overlap(&tensors)?;
        Ok(Gguf { version, metadata, tensors, alignment, data_start, file_len })
    }
}

fn read_metadata(c: &mut Cursor<'_>, count: u64) -> Result<IndexMap<String, Value>, GgufError> {
    let count = c.fits(count, MIN_ENTRY_BYTES)?;
    let mut metadata = IndexMap::new();
    for i in 0..count {
        c.place = format!("the key of metadata entry {i}");
        let key = c.name()?;
        c.place = format!("metadata \"{}\"", shown(&key));
        let ty = c.number(u32::from_le_bytes)?;
        let value = c.value(ty, &key)?;
        if metadata.contains_key(&key) {
            return Err(GgufError::key(&key, KeyProblem::Duplicate));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// The tensor table; offsets are still those of the file, relative to where tensor data begins.
fn read_tensors(c: &mut Cursor<'_>, count: u64) -> Result<IndexMap<String, TensorInfo>, GgufError> {
    let count = c.fits(count, MIN_TENSOR_BYTES)?;
    let mut tensors = IndexMap::new();
    for i in 0..count {
        c.place = format!("the name of tensor {i}");
        let name = c.name()?;
        c.place = format!("tensor \"{}\"", shown(&name));
        let refuse = |problem| GgufError::tensor(&name, problem);
        let rank = u64::from(c.number(u32::from_le_bytes)?);
        if rank > MAX_RANK {
            return Err(refuse(TensorProblem::Rank(rank)));
        }
        let mut shape = (0..rank).map(|_| c.number(u64::from_le_bytes)).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let id = c.number(u32::from_le_bytes)?;
        let ggml_type = GgmlType::from_id(id).ok_or_else(|| {
            refuse(match retired(id) {
                Some(name) => TensorProblem::RetiredType { name, id },
                None => TensorProblem::UnknownType(id),
            })
        })?;
        let offset = c.number(u64::from_le_bytes)?;
        let bytes = storage_bytes(ggml_type, &shape).map_err(refuse)?;
        if tensors.contains_key(&name) {
            return Err(refuse(TensorProblem::Duplicate));
        }
        tensors.insert(name.clone(), TensorInfo { name, ggml_type, shape, offset, bytes });
    }
    Ok(tensors)
}

/// Bytes of a tensor of row-major `shape`; its rows must be whole blocks.
pub(super) fn storage_bytes(ty: GgmlType, shape: &[u64]) -> Result<u64, TensorProblem> {
    if shape.len() as u64 > MAX_RANK {
        return Err(TensorProblem::Rank(shape.len() as u64));
    }
    if shape.contains(&0) {
        return Err(TensorProblem::ZeroDim);
    }
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(ty.block_len()) {
        return Err(TensorProblem::Blocks { row, ty: ty.name(), block: ty.block_len() });
    }
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or(TensorProblem::Overflow)?;
    (elements / ty.block_len()).checked_mul(ty.block_bytes()).ok_or(TensorProblem::Overflow)
}

/// Turns the offset from where data begins into one from the start of the file, within the file.
fn place(info: &mut TensorInfo, data_start: u64, alignment: u64, file_len: u64) -> Result<(), GgufError> {
    let refuse = |problem| GgufError::tensor(&info.name, problem);
    if !info.offset.is_multiple_of(alignment) {
        return Err(refuse(TensorProblem::Misaligned { offset: info.offset, alignment }));
    }
    let offset = data_start.checked_add(info.offset).ok_or_else(|| refuse(TensorProblem::Overflow))?;
    if offset > file_len || info.bytes > file_len - offset {
        return Err(refuse(TensorProblem::PastEnd { offset, bytes: info.bytes, file_len }));
    }
    info.offset = offset;
    Ok(())
}

fn refuse_overlap(tensors: &IndexMap<String, TensorInfo>) -> Result<(), GgufError> {
    let mut by_offset: Vec<&TensorInfo> = tensors.values().collect();
    by_offset.sort_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if pair[1].offset - pair[0].offset < pair[0].bytes {
            return Err(GgufError::tensor(&pair[1].name, TensorProblem::Overlap(shown(&pair[0].name))));
        }
    }
    Ok(())
}

/// What `general.alignment` says; the format wants a u32 that is a multiple of 8.
pub(super) fn alignment(metadata: &IndexMap<String, Value>) -> Result<u64, GgufError> {
    const KEY: &str = "general.alignment";
    match metadata.get(KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(a)) => {
            let found = u64::from(a);
            if found.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&found) {
                Ok(found)
            } else {
                Err(GgufError::key(KEY, KeyProblem::Alignment { found, max: MAX_ALIGNMENT }))
            }
        }
        Some(other) => Err(wrong_type(KEY, "a u32", other)),
    }
}

/// Reads forward and knows, for error messages, what it is reading.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    place: String,
    /// Whether `bytes` was cut at [`MAX_HEADER_BYTES`].
    capped: bool,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &'a [u8]) -> Cursor<'a> {
        let capped = bytes.len() > MAX_HEADER_BYTES;
        Cursor { bytes: &bytes[..bytes.len().min(MAX_HEADER_BYTES)], at: 0, place: String::new(), capped }
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// `count` as a length, if that many entries of at least `smallest` bytes can follow.
    fn fits(&self, count: u64, smallest: u64) -> Result<usize, GgufError> {
        let remaining = self.remaining();
        if count > remaining / smallest {
            return Err(GgufError::Count { place: self.place.clone(), count, remaining });
        }
        Ok(count as usize)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], GgufError> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..n) else {
            return Err(if self.capped {
                GgufError::HeaderTooLarge { limit: MAX_HEADER_BYTES }
            } else {
                GgufError::Truncated { place: self.place.clone(), at: self.bytes.len() as u64 }
            });
        };
        self.at += n;
        Ok(taken)
    }

    fn number<const N: usize, T>(&mut self, decode: fn([u8; N]) -> T) -> Result<T, GgufError> {
        let mut le = [0; N];
        le.copy_from_slice(self.take(N)?);
        Ok(decode(le))
    }

    fn string_bytes(&mut self) -> Result<&'a [u8], GgufError> {
        let len = self.number(u64::from_le_bytes)?;
        // A length beyond usize cannot be there either.
        self.take(usize::try_from(len).unwrap_or(usize::MAX))
    }

    /// A key or a tensor's name.
    fn name(&mut self) -> Result<String, GgufError> {
        let bytes = self.string_bytes()?;
        let text = str::from_utf8(bytes).map_err(|_| GgufError::Utf8 { place: self.place.clone() })?;
        Ok(text.to_owned())
    }

    fn string(&mut self) -> Result<String, GgufError> {
        Ok(String::from_utf8_lossy(self.string_bytes()?).into_owned())
    }

    fn value(&mut self, type_id: u32, key: &str) -> Result<Value, GgufError> {
        Ok(match value_type(type_id, key)? {
            ValueType::U8 => Value::U8(self.number(u8::from_le_bytes)?),
            ValueType::I8 => Value::I8(self.number(i8::from_le_bytes)?),
            ValueType::U16 => Value::U16(self.number(u16::from_le_bytes)?),
            ValueType::I16 => Value::I16(self.number(i16::from_le_bytes)?),
            ValueType::U32 => Value::U32(self.number(u32::from_le_bytes)?),
            ValueType::I32 => Value::I32(self.number(i32::from_le_bytes)?),
            ValueType::F32 => Value::F32(self.number(f32::from_le_bytes)?),
            ValueType::Bool => Value::Bool(to_bool(self.number(u8::from_le_bytes)?, key)?),
            ValueType::String => Value::String(self.string()?),
            ValueType::Array => Value::Array(self.array(key)?),
            ValueType::U64 => Value::U64(self.number(u64::from_le_bytes)?),
            ValueType::I64 => Value::I64(self.number(i64::from_le_bytes)?),
            ValueType::F64 => Value::F64(self.number(f64::from_le_bytes)?),
        })
    }

    fn array(&mut self, key: &str) -> Result<Array, GgufError> {
        let ty = value_type(self.number(u32::from_le_bytes)?, key)?;
        let count = self.number(u64::from_le_bytes)?;
        Ok(match ty {
            ValueType::U8 => Array::U8(self.numbers(count, u8::from_le_bytes)?),
            ValueType::I8 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            ValueType::U16 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            ValueType::I16 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            ValueType::U32 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            ValueType::I32 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            ValueType::F32 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            ValueType::Bool => {
                let bytes = self.numbers(count, u8::from_le_bytes)?;
                Array::Bool(bytes.into_iter().map(|b| to_bool(b, key)).collect::<Result<_, _>>()?)
            }
            ValueType::String => {
                let count = self.fits(count, 8)?;
                let mut strings = Vec::with_capacity(count);
                for _ in 0..count {
                    strings.push(self.string()?);
                }
                Array::String(strings)
            }
            ValueType::Array => return Err(GgufError::key(key, KeyProblem::NestedArray)),
            ValueType::U64 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            ValueType::I64 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            ValueType::F64 => Array::F64(self.numbers(count, f64::from_le_bytes)?),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let count = self.fits(count, N as u64)?;
        let (chunks, _) = self.take(count * N)?.as_chunks();
        Ok(chunks.iter().map(|&le| decode(le)).collect())
    }
}

fn value_type(id: u32, key: &str) -> Result<ValueType, GgufError> {
    ValueType::from_id(id).ok_or_else(|| GgufError::key(key, KeyProblem::UnknownType(id)))
}

fn to_bool(byte: u8, key: &str) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(GgufError::key(key, KeyProblem::Bool(other))),
    }
}
