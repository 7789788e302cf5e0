//! Whole files: round trips, hostile input, real models.

use super::file::SAMPLE_BYTES;
use super::reader::MAX_HEADER_BYTES;
use super::*;
use crate::ir::DType;
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::Write;
use std::path::Path;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/rustdoc-13m-q4_k_m.gguf");

/// A file written by hand, so that it can be wrong.
struct Raw(Vec<u8>);

impl Raw {
    fn header(tensors: u64, entries: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(3).u64(tensors).u64(entries)
    }

    fn u32(mut self, v: u32) -> Raw {
        self.0.extend(v.to_le_bytes());
        self
    }

    fn u64(mut self, v: u64) -> Raw {
        self.0.extend(v.to_le_bytes());
        self
    }

    fn str(self, text: impl AsRef<[u8]>) -> Raw {
        let mut raw = self.u64(text.as_ref().len() as u64);
        raw.0.extend(text.as_ref());
        raw
    }

    /// A tensor entry; `dims` in the file's order.
    fn tensor(self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Raw {
        let raw = self.str(name).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, &d| raw.u64(d)).u32(ty).u64(offset)
    }

    /// Pads to the default alignment and adds `data` zero bytes.
    fn data(mut self, data: usize) -> Raw {
        self.0.resize(self.0.len().next_multiple_of(32) + data, 0);
        self
    }

    fn parse(&self) -> Result<Gguf, GgufError> {
        Gguf::parse(&self.0, self.0.len() as u64)
    }

    #[track_caller]
    fn refused(&self, expected: &str) {
        let message = self.parse().unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
}

const F32: u32 = 0;
const Q8_0: u32 = 8;
const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;

fn one_tensor(dims: &[u64], ty: u32, offset: u64, data: usize) -> Raw {
    Raw::header(1, 0).tensor("w", dims, ty, offset).data(data)
}

#[test]
fn a_valid_file_by_hand() {
    let g = Raw::header(2, 1)
        .str("n")
        .u32(U32)
        .u32(7)
        .tensor("a", &[32, 3], Q8_0, 0)
        .tensor("b", &[2], F32, 128)
        .data(136)
        .parse()
        .unwrap();
    assert_eq!((g.version, g.alignment, g.u64("n").unwrap()), (3, 32, 7));
    let a = g.tensor("a").unwrap();
    assert_eq!((a.shape.as_slice(), a.dtype().unwrap(), a.bytes), ([3, 32].as_slice(), DType::Q8_0, 102));
    assert_eq!(a.offset, g.data_start);
    let b = g.tensor("b").unwrap();
    assert_eq!((b.offset, b.bytes, b.offset + b.bytes), (g.data_start + 128, 8, g.file_len));
}

#[test]
fn other_versions_and_byte_orders_are_refused() {
    Raw(vec![]).refused("not a GGUF file");
    Raw(b"GGU".to_vec()).refused("not a GGUF file");
    Raw(b"GGML\x03\0\0\0".to_vec()).refused("not a GGUF file");
    Raw(b"GGUF".to_vec()).refused("ends in the middle of the header, at byte 4");
    Raw(b"GGUF".to_vec()).u32(1).u32(0).u32(0).refused("version 1 is not supported");
    Raw(b"GGUF".to_vec()).u32(4).u64(0).u64(0).refused("version 4 is not supported");
    Raw(b"GGUF\0\0\0\x03".to_vec()).u64(0).u64(0).refused("big-endian");
    assert_eq!(Raw(b"GGUF".to_vec()).u32(2).u64(0).u64(0).parse().unwrap().version, 2);
}

#[test]
fn counts_are_compared_with_the_bytes_left() {
    Raw::header(0, u64::MAX).refused("the metadata claims 18446744073709551615 entries");
    Raw::header(u64::MAX, 0).refused("the tensor table claims");
    Raw::header(1 << 40, 0).data(4096).refused("the tensor table claims");
    Raw::header(0, 1).u64(u64::MAX).data(64).refused("ends in the middle of the key of metadata entry 0");
    Raw::header(0, 1).str("k").u32(STRING).u64(1 << 62).refused("ends in the middle of metadata \"k\"");
    let array = |ty: u32, n: u64| Raw::header(0, 1).str("k").u32(ARRAY).u32(ty).u64(n).data(64);
    array(U64, 1 << 61).refused("metadata \"k\" claims 2305843009213693952 entries");
    array(U8, u64::MAX).refused("metadata \"k\" claims");
    array(STRING, 1000).refused("metadata \"k\" claims 1000 entries");
    Raw::header(1, 0).u64(1 << 50).data(64).refused("ends in the middle of the name of tensor 0");
}

#[test]
fn unknown_and_nested_values_are_refused() {
    Raw::header(0, 1).str("k").u32(13).u64(0).refused("\"k\" has a value of unknown type 13");
    let array = |ty: u32| Raw::header(0, 1).str("k").u32(ARRAY).u32(ty).u64(1).data(64);
    array(ARRAY).refused("\"k\" is an array of arrays");
    array(77).refused("\"k\" has a value of unknown type 77");
    Raw::header(0, 1).str("k").u32(BOOL).u32(2).refused("\"k\" holds a bool of value 2");
}

#[test]
fn names_have_to_be_unique_text() {
    let entry = |raw: Raw| raw.str("k").u32(U32).u32(0);
    entry(entry(Raw::header(0, 2))).refused("metadata \"k\" occurs twice");
    let twice = Raw::header(2, 0).tensor("w", &[8], F32, 0).tensor("w", &[8], F32, 32);
    twice.data(64).refused("tensor \"w\" occurs twice");
    let key = Raw::header(0, 1).str(b"\xFF").u32(U32).u32(0);
    key.refused("the key of metadata entry 0 is not valid UTF-8");
    let long = "\u{1b}".repeat(10_000);
    let message = Raw::header(1, 0).tensor(&long, &[0], F32, 0).data(8).parse().unwrap_err().to_string();
    assert!(message.len() < 600 && !message.contains('\u{1b}'), "{message:?}");
}

#[test]
fn values_that_are_not_utf8_are_kept_as_well_as_possible() {
    let g = Raw::header(0, 1).str("k").u32(STRING).str(b"a\xFFb").parse().unwrap();
    assert_eq!(g.str("k").unwrap(), "a\u{FFFD}b");
}

#[test]
fn impossible_alignments_are_refused() {
    let aligned = |a: u32| Raw::header(0, 1).str("general.alignment").u32(U32).u32(a);
    for a in [0, 1, 4, 24, 1 << 21, 1 << 31, u32::MAX] {
        aligned(a).refused("metadata \"general.alignment\" should be a power of two from 8 to 1048576");
    }
    for a in [8, 32, 64, 4096] {
        assert_eq!(aligned(a).parse().unwrap().alignment, u64::from(a));
    }
    let long = Raw::header(0, 1).str("general.alignment").u32(U64).u64(32);
    long.refused("should be a u32, but is the u64 32");
    let text = Raw::header(0, 1).str("general.alignment").u32(STRING).str("32");
    text.refused("should be a u32, but is the string \"32\"");
}

#[test]
fn impossible_shapes_are_refused() {
    one_tensor(&[1, 1, 1, 1, 1], F32, 0, 64).refused("tensor \"w\" has 5 dimensions");
    Raw::header(1, 0).str("w").u32(u32::MAX).data(64).refused("tensor \"w\" has 4294967295 dimensions");
    one_tensor(&[4, 0], F32, 0, 64).refused("tensor \"w\" has a dimension of size zero");
    one_tensor(&[1 << 32, 1 << 32], F32, 0, 64).refused("overflows 64 bits");
    one_tensor(&[1 << 62], F32, 0, 64).refused("overflows 64 bits");
    one_tensor(&[u64::MAX, 2], F32, 0, 64).refused("overflows 64 bits");
    one_tensor(&[33], Q8_0, 0, 64)
        .refused("has rows of 33 elements, not a whole number of Q8_0 blocks of 32");
    one_tensor(&[16, 2], Q8_0, 0, 64).refused("has rows of 16 elements");
}

#[test]
fn element_types_are_refused_by_name() {
    one_tensor(&[32], 31, 0, 64).refused("has the retired element type Q4_0_4_4 (31)");
    one_tensor(&[32], 4, 0, 64).refused("has the retired element type Q4_2 (4)");
    one_tensor(&[32], 1000, 0, 64).refused("has the unknown element type 1000");
    let g = one_tensor(&[256], 23, 0, 136).parse().expect("unsupported types can still be described");
    let w = g.tensor("w").unwrap();
    assert_eq!((w.ggml_type.name(), w.bytes), ("IQ4_XS", 136));
    assert!(w.dtype().unwrap_err().to_string().starts_with("tensor \"w\" has the element type IQ4_XS"));
}

#[test]
fn tensors_lie_within_the_file_and_apart() {
    assert!(one_tensor(&[16], F32, 0, 64).parse().is_ok());
    one_tensor(&[17], F32, 0, 64)
        .refused("tensor \"w\" needs 68 bytes from byte 64 on, but the file has 128");
    one_tensor(&[1], F32, 64, 64).refused("it may be cut off");
    one_tensor(&[1], F32, 96, 64).refused("it may be cut off");
    one_tensor(&[1], F32, 4, 64).refused("starts at offset 4, not a multiple of the alignment 32");
    one_tensor(&[8], F32, u64::MAX - 31, 64).refused("overflows 64 bits");
    let two = |second| Raw::header(2, 0).tensor("a", &[16], F32, 0).tensor("b", &[8], F32, second).data(96);
    two(32).refused("tensor \"b\" overlaps tensor \"a\"");
    two(0).refused("overlaps");
    assert!(two(64).parse().is_ok());
}

#[test]
fn a_header_without_end_is_refused() {
    let mut raw = Raw::header(0, 1 << 20).0;
    raw.resize(MAX_HEADER_BYTES + 1, 0);
    // Every entry is an empty key with the u8 0: the second one is refused long before the end.
    Raw(raw).refused("metadata \"\" occurs twice");
    let mut raw = Raw::header(0, 1).str("k").u32(STRING).u64(MAX_HEADER_BYTES as u64).0;
    raw.resize(MAX_HEADER_BYTES + 1024, b'x');
    Raw(raw).refused("the header is larger than 128 MiB");
}

#[test]
fn what_real_files_hold_is_accepted() {
    // No tensors and no padding: a vocabulary; an empty array; a repeated token.
    let raw = Raw::header(0, 2).str("none").u32(ARRAY).u32(STRING).u64(0);
    let raw = raw.str("tokens").u32(ARRAY).u32(STRING).u64(2).str("a").str("a");
    let g = raw.parse().unwrap();
    assert_eq!(g.data_start, g.file_len);
    assert!(g.strings("none").unwrap().is_empty());
    // A gap between tensors, any order in the file, a scalar, no padding after the last tensor.
    let raw = Raw::header(2, 0).tensor("b", &[1], F32, 128).tensor("a", &[], F32, 0).data(132);
    assert_eq!(raw.parse().unwrap().tensors.len(), 2);
}

fn sample_file() -> Vec<u8> {
    let ty = |d| GgmlType::of(d).unwrap();
    let mut w = GgufWriter::new();
    w.metadata("general.architecture", Value::String("llama".into()))
        .metadata("general.alignment", Value::U32(64))
        .metadata("tokens", Value::Array(Array::String(vec!["a".into(), "é".into()])))
        .metadata("scores", Value::Array(Array::F32(vec![0.5, -1.0])));
    w.tensor("f", ty(DType::F32), &[2, 3], (0..24).collect::<Vec<u8>>()).unwrap();
    w.tensor("q", ty(DType::Q8_0), &[2, 32], vec![7; 68]).unwrap();
    let mut bytes = Vec::new();
    w.write_to(&mut bytes).unwrap();
    bytes
}

#[test]
fn integers_of_any_width_are_what_they_are() {
    let ints = |array: Array| array.as_ints();
    assert_eq!(ints(Array::U8(vec![0, u8::MAX])), Some(vec![0, 255]));
    assert_eq!(ints(Array::I8(vec![i8::MIN, -1])), Some(vec![-128, -1]));
    assert_eq!(ints(Array::U16(vec![u16::MAX])), Some(vec![65535]));
    assert_eq!(ints(Array::I16(vec![i16::MIN])), Some(vec![-32768]));
    assert_eq!(ints(Array::U32(vec![7, u32::MAX])), Some(vec![7, 4_294_967_295]));
    assert_eq!(ints(Array::I32(vec![i32::MIN, 5])), Some(vec![-2_147_483_648, 5]));
    assert_eq!(ints(Array::I64(vec![i64::MIN])), Some(vec![i64::MIN]));
    assert_eq!(ints(Array::U64(vec![i64::MAX as u64])), Some(vec![i64::MAX]));
    assert_eq!(ints(Array::U64(vec![1, 1 << 63])), None);
    assert_eq!((ints(Array::F32(vec![1.0])), ints(Array::Bool(vec![true]))), (None, None));
}

#[test]
fn identity_sees_the_header_and_the_ends_of_tensors() {
    // Two tensors with a middle that is not looked at, and a small one between them.
    let mut w = GgufWriter::new();
    w.metadata("general.architecture", Value::String("llama".into()));
    for (name, n) in [("a", 20_000u64), ("b", 8), ("last", 10_000)] {
        let bytes: Vec<u8> = (0..4 * n).map(|i| (i * 7) as u8).collect();
        w.tensor(name, GgmlType::of(DType::F32).unwrap(), &[n], bytes).unwrap();
    }
    let mut bytes = vec![];
    w.write_to(&mut bytes).unwrap();
    let file = GgufFile::from_bytes(bytes.clone()).unwrap();
    let (identity, hash) = (file.identity(), file.full_hash());
    let changed = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        let file = GgufFile::from_bytes(bytes).unwrap();
        (file.identity(), file.full_hash())
    };
    assert_eq!(GgufFile::from_bytes(bytes.clone()).unwrap().identity(), identity);
    // Letters of the first key and of its value, and of the name of the last tensor.
    let at = |text: &[u8]| bytes.windows(text.len()).rposition(|w| w == text).unwrap();
    for place in [at(b"general"), at(b"llama") + 4, at(b"last")] {
        let (other, other_hash) = changed(place);
        assert!(other.header != identity.header && other_hash != hash, "{place}");
        assert_eq!(other.samples, identity.samples);
    }
    for info in file.gguf().tensors.values() {
        let (start, len) = (info.offset as usize, info.bytes as usize);
        let near = SAMPLE_BYTES.min(len);
        for at in [0, near - 1, len - near, len - 1] {
            let (other, other_hash) = changed(start + at);
            assert_eq!(other.header, identity.header);
            assert!(other.samples != identity.samples && other_hash != hash, "{} at {at}", info.name);
        }
        if len > 2 * near {
            for at in [near, len / 2, len - near - 1] {
                let (other, other_hash) = changed(start + at);
                assert!(other == identity && other_hash != hash, "{} at {at}", info.name);
            }
        }
    }
    // A byte more at the end is another file.
    let longer = [&bytes[..], &[0]].concat();
    assert_ne!(GgufFile::from_bytes(longer).unwrap().identity(), identity);

    let text = identity.to_string();
    assert!(text.starts_with(&format!("{} bytes, header ", bytes.len())) && text.len() < 80, "{text}");
    let json = serde_json::to_string(&identity).unwrap();
    assert_eq!(serde_json::from_str::<Identity>(&json).unwrap(), identity);
}

#[test]
fn a_file_on_disk_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let bytes = sample_file();
    std::fs::write(&path, &bytes).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.bytes(), bytes);
    assert_eq!(file.tensor_bytes(file.gguf().tensor("f").unwrap()), (0..24).collect::<Vec<u8>>());
    assert_eq!(file.identity(), GgufFile::from_bytes(bytes).unwrap().identity());

    assert!(GgufFile::open(dir.path()).unwrap_err().to_string().ends_with("not a regular file"));
    let absent = GgufFile::open(dir.path().join("b.gguf")).unwrap_err().to_string();
    assert!(absent.starts_with("cannot open ") && absent.contains("b.gguf"), "{absent}");
    std::fs::write(&path, b"").unwrap();
    match GgufFile::open(&path) {
        Err(GgufError::File { path: named, error }) => {
            assert_eq!(named, path);
            assert!(matches!(*error, GgufError::NotGguf));
        }
        other => panic!("{other:?}"),
    }
}

/// The bytes of a mapped file that are in memory, as Linux says.
#[cfg(target_os = "linux")]
fn in_memory(path: &std::path::Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let path = path.to_str().unwrap();
    let (mut ours, mut kib) = (false, 0);
    for line in maps.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            kib += if ours { rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap() } else { 0 };
        } else if line.contains('-') && !line.contains("kB") {
            ours = line.ends_with(path);
        }
    }
    kib << 10
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_given_back_is_read_again() {
    let mut writer = GgufWriter::new();
    let content = |seed: usize| (0..1usize << 20).map(|i| ((i * seed) >> 3) as u8).collect::<Vec<u8>>();
    for (name, seed) in [("a", 3), ("b", 5)] {
        writer.tensor(name, GgmlType::of(DType::F32).unwrap(), &[1 << 18], content(seed)).unwrap();
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap().join("a.gguf");
    std::fs::write(&path, &bytes).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let tensor = |name| file.tensor_bytes(file.gguf().tensor(name).unwrap());
    let all = file.bytes().len() as u64;
    file.expect_one_reading(tensor("b"));
    // Pages that the system moves just then count as none, and are there when they are read again.
    let is_read = |_| {
        assert!(file.bytes() == bytes);
        in_memory(&path) >= all
    };
    assert!((0..20).any(is_read));
    // Pages that hold something else too stay.
    file.give_back(tensor("b"));
    let left = in_memory(&path);
    assert!((1 << 20..(1 << 20) + (256 << 10)).contains(&left), "{left} of {all}");
    assert!(tensor("b") == content(5) && in_memory(&path) > left);
    // What is not of the file is left alone, wherever it lies.
    file.give_back(&bytes);
    file.give_back(&[0; 3]);
    for beside in [-70_000isize, -1, 1] {
        // Only where it lies is looked at.
        let start = file.bytes().as_ptr().wrapping_offset(beside);
        // SAFETY: not read, and of no bytes.
        file.give_back(unsafe { std::slice::from_raw_parts(start, 0) });
    }
    assert!(file.bytes() == bytes);
}

#[test]
fn opening_reads_no_tensor_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.gguf");
    let header = Raw::header(1, 0).tensor("w", &[1 << 30], F32, 0).data(0).0;
    let len = header.len() as u64 + (4 << 30);
    let described = Gguf::parse(&header, len).unwrap();
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&header).unwrap();
    file.set_len(len).unwrap();
    assert_eq!(*GgufFile::open(&path).unwrap().gguf(), described);
}

#[test]
fn the_default_model_opens() {
    let file = GgufFile::open(Path::new(MODEL)).unwrap();
    let g = file.gguf();
    assert_eq!(g.str("general.architecture").unwrap(), "llama");
    assert_eq!(g.u64("llama.block_count").unwrap(), 4);
    assert_eq!(g.f32("llama.rope.freq_base").unwrap(), 10000.0);
    assert_eq!(g.strings("tokenizer.ggml.tokens").unwrap().len(), 4096);
    assert_eq!(g.ints("tokenizer.ggml.token_type").unwrap().len(), 4096);
    assert!(g.bool("tokenizer.ggml.add_bos_token").unwrap());
    assert_eq!((g.tensors.len(), g.data_start, g.alignment), (38, 130_176, 32));
    let embd = g.tensor("token_embd.weight").unwrap();
    assert_eq!((embd.dtype().unwrap(), embd.shape.as_slice()), (DType::Q6_K, [4096, 512].as_slice()));
    assert_eq!(g.tensor("blk.0.attn_k.weight").unwrap().dtype().unwrap(), DType::Q4_K);
    for info in g.tensors.values() {
        let mut values = vec![0.0; info.elements() as usize];
        dequant::dequantise(info.dtype().unwrap(), file.tensor_bytes(info), &mut values).unwrap();
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(values.iter().all(|v| v.is_finite()) && (0.05..50.0).contains(&largest), "{}", info.name);
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let text = || ".{0,6}";
    let f32s = || any::<f32>().prop_filter("NaN is not equal to itself", |v| !v.is_nan());
    let f64s = || any::<f64>().prop_filter("NaN is not equal to itself", |v| !v.is_nan());
    let scalar = prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        f32s().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        text().prop_map(Value::String),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        f64s().prop_map(Value::F64),
    ];
    let array = prop_oneof![
        vec(any::<u8>(), 0..5).prop_map(Array::U8),
        vec(any::<i8>(), 0..5).prop_map(Array::I8),
        vec(any::<u16>(), 0..5).prop_map(Array::U16),
        vec(any::<i16>(), 0..5).prop_map(Array::I16),
        vec(any::<u32>(), 0..5).prop_map(Array::U32),
        vec(any::<i32>(), 0..5).prop_map(Array::I32),
        vec(f32s(), 0..5).prop_map(Array::F32),
        vec(any::<bool>(), 0..5).prop_map(Array::Bool),
        vec(text(), 0..5).prop_map(Array::String),
        vec(any::<u64>(), 0..5).prop_map(Array::U64),
        vec(any::<i64>(), 0..5).prop_map(Array::I64),
        vec(f64s(), 0..5).prop_map(Array::F64),
    ];
    prop_oneof![scalar, array.prop_map(Value::Array)]
}

/// Element type, row-major shape and bytes.
fn any_tensor() -> impl Strategy<Value = (GgmlType, Vec<u64>, Vec<u8>)> {
    let types: Vec<GgmlType> = (0..=41).filter_map(GgmlType::from_id).collect();
    (proptest::sample::select(types), vec(1u64..4, 0..4), 1u64..3, any::<u8>()).prop_map(
        |(ty, mut shape, row_blocks, seed)| {
            shape.push(row_blocks * ty.block_len());
            let blocks: u64 = shape.iter().product::<u64>() / ty.block_len();
            let bytes = (0..blocks * ty.block_bytes()).map(|i| (i as u8).wrapping_add(seed)).collect();
            (ty, shape, bytes)
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        metadata in proptest::collection::hash_map("[a-z.]{0,8}", any_value(), 0..8),
        tensors in vec(any_tensor(), 0..5),
        alignment in proptest::option::of(3u32..9),
    ) {
        let mut expected: indexmap::IndexMap<String, Value> = metadata.into_iter().collect();
        if let Some(log) = alignment {
            expected.insert("general.alignment".into(), Value::U32(1 << log));
        }
        let mut w = GgufWriter::new();
        for (key, value) in &expected {
            w.metadata(key, value.clone());
        }
        for (i, (ty, shape, bytes)) in tensors.iter().enumerate() {
            w.tensor(format!("t{i}"), *ty, shape, bytes.as_slice()).unwrap();
        }
        let mut written = Vec::new();
        w.write_to(&mut written).unwrap();

        let file = GgufFile::from_bytes(written).unwrap();
        let g = file.gguf();
        prop_assert!(g.metadata.iter().eq(&expected));
        prop_assert_eq!(g.alignment, alignment.map_or(32, |log| 1 << log));
        prop_assert_eq!(g.tensors.len(), tensors.len());
        for (info, (ty, shape, bytes)) in g.tensors.values().zip(&tensors) {
            prop_assert_eq!((info.ggml_type, &info.shape), (*ty, shape));
            prop_assert_eq!(file.tensor_bytes(info), bytes);
            prop_assert!(info.offset.is_multiple_of(g.alignment));
        }
        // A prefix with the whole header is enough.
        prop_assert_eq!(&Gguf::parse(&file.bytes()[..g.data_start as usize], g.file_len).unwrap(), g);
    }

    #[test]
    fn damaged_files_do_no_harm(
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = sample_file();
        for (at, with) in flips {
            let at = at.index(bytes.len());
            bytes[at] = with;
        }
        if let Some(at) = cut {
            bytes.truncate(at.index(bytes.len()));
        }
        if let Ok(file) = GgufFile::from_bytes(bytes) {
            file.identity();
            for info in file.gguf().tensors.values() {
                prop_assert_eq!(file.tensor_bytes(info).len() as u64, info.bytes);
            }
        }
    }
}
