//! Models of well-known and of odd shapes with random weights: files to run, or descriptions of models of any size.
//!
//! A tensor's bytes depend on the seed, its name and its format alone, so models that differ in one of them share the others.

use indexmap::IndexMap;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sinter::gguf::{GgmlType, Gguf, GgufFile, GgufWriter, TensorInfo, Value};
use sinter::ir::DType;
use std::sync::Arc;

/// The hyperparameters of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub architecture: &'static str,
    pub layers: u64,
    pub width: u64,
    pub ffn: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    /// How many dimensions of a head RoPE turns.
    pub rotated: u64,
    pub vocab: u64,
    pub rope_base: f32,
    pub eps: f32,
    /// The head is the embedding table.
    pub tied: bool,
    /// Queries, keys and values have biases.
    pub biases: bool,
    /// RoPE's frequencies are divided by `rope_freqs`.
    pub rope_factors: bool,
    /// The rows of queries, keys and values lie in one tensor.
    pub fused_qkv: bool,
    /// Positions that a token sees, where not all; of phi3 only.
    pub window: Option<u32>,
}

const LLAMA: Shape = Shape {
    name: "tiny-llama",
    architecture: "llama",
    layers: 2,
    width: 256,
    ffn: 768,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    rotated: 64,
    vocab: 512,
    rope_base: 1e4,
    eps: 1e-5,
    tied: false,
    biases: false,
    rope_factors: false,
    fused_qkv: false,
    window: None,
};

const LLAMA3: Shape = Shape {
    name: "tiny-llama3",
    ffn: 512,
    kv_heads: 1,
    rope_base: 5e5,
    tied: true,
    rope_factors: true,
    ..LLAMA
};

const QWEN2: Shape = Shape {
    name: "tiny-qwen2",
    architecture: "qwen2",
    rope_base: 1e6,
    eps: 1e-6,
    tied: true,
    biases: true,
    ..LLAMA
};

const QWEN3: Shape =
    Shape { name: "tiny-qwen3", architecture: "qwen3", head_dim: 128, rotated: 128, biases: false, ..QWEN2 };

/// It sees fewer positions than texts of the tests have.
const PHI3: Shape =
    Shape { name: "tiny-phi3", architecture: "phi3", fused_qkv: true, window: Some(7), ..LLAMA };

/// Shapes that run in no time: one of each family, and one whose rows are no whole blocks of 256.
pub const TINY: [Shape; 6] = [
    LLAMA,
    LLAMA3,
    Shape {
        name: "tiny-odd",
        width: 160,
        ffn: 416,
        heads: 2,
        head_dim: 80,
        rotated: 80,
        vocab: 301,
        eps: 1e-6,
        ..LLAMA
    },
    QWEN2,
    QWEN3,
    PHI3,
];

/// Shapes of published models.
pub const REAL: [Shape; 7] = [
    Shape {
        name: "llama-3.1-8b",
        layers: 32,
        width: 4096,
        ffn: 14336,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        rotated: 128,
        vocab: 128256,
        tied: false,
        ..LLAMA3
    },
    Shape {
        name: "llama-3.3-70b",
        layers: 80,
        width: 8192,
        ffn: 28672,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        rotated: 128,
        vocab: 128256,
        tied: false,
        ..LLAMA3
    },
    Shape {
        name: "llama-3.2-1b",
        layers: 16,
        width: 2048,
        ffn: 8192,
        heads: 32,
        kv_heads: 8,
        vocab: 128256,
        ..LLAMA3
    },
    Shape { name: "qwen2.5-0.5b", layers: 24, width: 896, ffn: 4864, heads: 14, vocab: 151936, ..QWEN2 },
    Shape {
        name: "qwen2.5-7b",
        layers: 28,
        width: 3584,
        ffn: 18944,
        heads: 28,
        kv_heads: 4,
        head_dim: 128,
        rotated: 128,
        vocab: 152064,
        tied: false,
        ..QWEN2
    },
    Shape {
        name: "qwen3-0.6b",
        layers: 28,
        width: 1024,
        ffn: 3072,
        heads: 16,
        kv_heads: 8,
        vocab: 151936,
        ..QWEN3
    },
    Shape {
        name: "phi-3-mini-4k",
        layers: 32,
        width: 3072,
        ffn: 8192,
        heads: 32,
        kv_heads: 32,
        head_dim: 96,
        rotated: 96,
        vocab: 32064,
        window: Some(2047),
        ..PHI3
    },
];

/// The shape of that name.
pub fn shape(name: &str) -> Shape {
    TINY.into_iter().chain(REAL).find(|s| s.name == name).unwrap()
}

impl Shape {
    /// Whether every matrix can be stored in `dtype`.
    pub fn allows(&self, dtype: DType) -> bool {
        let columns = [self.width, self.ffn, self.heads * self.head_dim];
        columns.iter().all(|n| n.is_multiple_of(dtype.block_len() as u64))
    }
}

/// Matrices in `dtype`, vectors in f32, as files have them.
pub fn uniform(dtype: DType) -> impl Fn(&str) -> DType {
    move |name| if is_vector(name) { DType::F32 } else { dtype }
}

/// Whether the tensor is a norm's weight, a bias or RoPE's factors.
pub fn is_vector(name: &str) -> bool {
    ["norm.weight", ".bias", "rope_freqs.weight"].iter().any(|end| name.ends_with(end))
}

/// Formats as in Q4_K_M files: more bits for the head, and for values and the way down in every third layer.
pub fn q4_k_m(name: &str) -> DType {
    let layer = name.split('.').nth(1).and_then(|n| n.parse::<u64>().ok());
    let more =
        ["attn_v", "ffn_down"].iter().any(|part| name.contains(part)) && layer.is_some_and(|n| n % 3 == 0);
    match name {
        _ if is_vector(name) => DType::F32,
        "token_embd.weight" | "output.weight" => DType::Q6_K,
        _ if more => DType::Q6_K,
        _ => DType::Q4_K,
    }
}

/// What a file of that shape says about itself, in Q4_K_M if its rows allow.
pub fn description(name: &str) -> Gguf {
    let shape = shape(name);
    match shape.allows(DType::Q4_K) {
        true => Model::new(&shape, q4_k_m).description(),
        false => Model::new(&shape, uniform(DType::Q8_0)).description(),
    }
}

/// A model before it is written: its parts can be changed.
#[derive(Clone, Debug)]
pub struct Model {
    pub metadata: IndexMap<String, Value>,
    /// Format and row-major shape by name.
    pub tensors: IndexMap<String, (DType, Vec<u64>)>,
    pub seed: u64,
}

impl Model {
    /// The model of a shape whose tensors have the formats that `format` gives for their names.
    pub fn new(s: &Shape, format: impl Fn(&str) -> DType) -> Model {
        let int = |x: u64| Value::U32(x.try_into().unwrap());
        let metadata = [
            ("block_count", int(s.layers)),
            ("context_length", int(8192)),
            ("embedding_length", int(s.width)),
            ("feed_forward_length", int(s.ffn)),
            ("attention.head_count", int(s.heads)),
            ("attention.head_count_kv", int(s.kv_heads)),
            ("attention.key_length", int(s.head_dim)),
            ("attention.value_length", int(s.head_dim)),
            ("attention.layer_norm_rms_epsilon", Value::F32(s.eps)),
            ("rope.dimension_count", int(s.rotated)),
            ("rope.freq_base", Value::F32(s.rope_base)),
        ];
        let window = s.window.map(|n| ("attention.sliding_window", Value::U32(n)));
        let metadata = metadata.into_iter().chain(window);
        let metadata = metadata.map(|(key, value)| (format!("{}.{key}", s.architecture), value));
        let text = |key: &str, value: &str| (key.to_string(), Value::String(value.into()));
        let general = [text("general.architecture", s.architecture), text("general.name", s.name)];
        let tensors = tensors(s).into_iter().map(|(name, shape)| {
            let dtype = format(&name);
            (name, (dtype, shape))
        });
        Model { metadata: general.into_iter().chain(metadata).collect(), tensors: tensors.collect(), seed: 0 }
    }

    /// The model as a file in memory.
    pub fn file(&self) -> Arc<GgufFile> {
        Arc::new(GgufFile::from_bytes(self.bytes()).unwrap())
    }

    /// What a file of the model has.
    pub fn bytes(&self) -> Vec<u8> {
        let mut writer = GgufWriter::new();
        for (key, value) in &self.metadata {
            writer.metadata(key, value.clone());
        }
        for (name, (dtype, shape)) in &self.tensors {
            let bytes = bytes(self.seed, name, *dtype, shape.iter().product());
            writer.tensor(name, GgmlType::of(*dtype).unwrap(), shape, bytes).unwrap();
        }
        let mut file = vec![];
        writer.write_to(&mut file).unwrap();
        file
    }

    /// What a file of this model would say about itself, without one.
    pub fn description(&self) -> Gguf {
        const ALIGNMENT: u64 = 32;
        let mut end = 0u64;
        let tensors = self.tensors.iter().map(|(name, (dtype, shape))| {
            let blocks = shape.iter().product::<u64>() / dtype.block_len() as u64;
            let bytes = blocks * dtype.block_bytes() as u64;
            let ggml_type = GgmlType::of(*dtype).unwrap();
            let info = TensorInfo { name: name.clone(), ggml_type, shape: shape.clone(), offset: end, bytes };
            end = (end + bytes).next_multiple_of(ALIGNMENT);
            (name.clone(), info)
        });
        let tensors = tensors.collect();
        let metadata = self.metadata.clone();
        Gguf { version: 3, metadata, tensors, alignment: ALIGNMENT, data_start: 0, file_len: end }
    }
}

/// Names and shapes of a model's tensors.
fn tensors(s: &Shape) -> Vec<(String, Vec<u64>)> {
    let (queries, keys) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let mut list = vec![("token_embd.weight".into(), vec![s.vocab, s.width])];
    if !s.tied {
        list.push(("output.weight".into(), vec![s.vocab, s.width]));
    }
    list.push(("output_norm.weight".into(), vec![s.width]));
    if s.rope_factors {
        list.push(("rope_freqs.weight".into(), vec![s.rotated / 2]));
    }
    for layer in 0..s.layers {
        let mut add = |name: &str, shape: &[u64]| list.push((format!("blk.{layer}.{name}"), shape.to_vec()));
        add("attn_norm.weight", &[s.width]);
        let (apart, fused) = ([("q", queries), ("k", keys), ("v", keys)], [("qkv", queries + 2 * keys)]);
        for &(name, rows) in if s.fused_qkv { &fused[..] } else { &apart } {
            add(&format!("attn_{name}.weight"), &[rows, s.width]);
            if s.biases {
                add(&format!("attn_{name}.bias"), &[rows]);
            }
        }
        for name in ["q", "k"].into_iter().filter(|_| s.architecture == "qwen3") {
            add(&format!("attn_{name}_norm.weight"), &[s.head_dim]);
        }
        add("attn_output.weight", &[s.width, queries]);
        add("ffn_norm.weight", &[s.width]);
        if s.architecture == "phi3" {
            add("ffn_up.weight", &[2 * s.ffn, s.width]);
        } else {
            add("ffn_gate.weight", &[s.ffn, s.width]);
            add("ffn_up.weight", &[s.ffn, s.width]);
        }
        add("ffn_down.weight", &[s.width, s.ffn]);
    }
    list
}

/// Mean and standard deviation of a tensor's values. Queries and keys are large enough for attention to tell tokens apart.
fn spread(name: &str) -> (f32, f32) {
    let ends = |end: &str| name.ends_with(end);
    if ends("norm.weight") {
        (1.0, 0.05)
    } else if ends("rope_freqs.weight") {
        (4.0, 1.5)
    } else if ends(".bias") {
        (0.0, 0.1)
    } else if ends("attn_q.weight") || ends("attn_k.weight") || ends("attn_qkv.weight") {
        (0.0, 0.06)
    } else {
        (0.0, 0.02)
    }
}

/// `n` random elements of a tensor.
fn bytes(seed: u64, name: &str, dtype: DType, n: u64) -> Vec<u8> {
    let seed = *blake3::hash(format!("{seed} {name}").as_bytes()).as_bytes();
    let mut rng = ChaCha8Rng::from_seed(seed);
    let (mean, deviation) = spread(name);
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let mut float = |_| mean + deviation * 3f32.sqrt() * rng.random_range(-1.0..1.0f32);
    match dtype {
        DType::F32 => (0..n).map(&mut float).flat_map(f32::to_le_bytes).collect(),
        DType::F16 => (0..n).map(&mut float).flat_map(half).collect(),
        DType::BF16 => (0..n).map(&mut float).flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => {
            let mut bytes = vec![0; n as usize / dtype.block_len() * dtype.block_bytes()];
            rng.fill(&mut bytes[..]);
            for block in bytes.chunks_mut(dtype.block_bytes()) {
                let scale = deviation * rng.random_range(0.75..1.25f32);
                let scale = if rng.random() { scale } else { -scale };
                set_scales(dtype, block, scale);
            }
            bytes
        }
    }
}

/// Gives a block of random bits the scales at which its values have the standard deviation `scale` and a mean near zero.
///
/// What divides is the deviation at `d = 1`, from those of the fields, which are uniform.
fn set_scales(dtype: DType, block: &mut [u8], scale: f32) {
    let mut put = |at: usize, x: f32| {
        block[at..at + 2].copy_from_slice(&half::f16::from_f32(x).to_le_bytes());
    };
    match dtype {
        DType::Q4_0 => put(0, scale / 4.6),
        DType::Q4_1 => {
            put(0, scale / 4.6);
            put(2, scale / 4.6 * -7.5);
        }
        DType::Q5_0 => put(0, scale / 9.2),
        DType::Q5_1 => {
            put(0, scale / 9.2);
            put(2, scale / 9.2 * -15.5);
        }
        DType::Q8_0 => put(0, scale / 73.9),
        DType::Q2_K => {
            put(80, scale / 13.9);
            put(82, scale / 13.9 * 1.5);
        }
        DType::Q3_K => put(108, scale / 43.3),
        DType::Q4_K => {
            put(0, scale / 258.0);
            put(2, scale / 258.0 * 7.5);
        }
        DType::Q5_K => {
            put(0, scale / 527.0);
            put(2, scale / 527.0 * 15.5);
        }
        DType::Q6_K => put(208, scale / 1366.0),
        // A power of two: 127 is the exponent's bias, 2.9 the deviation of E2M1.
        DType::MXFP4 => block[0] = (127.0 + (scale.abs() / 2.9).log2().round()) as u8,
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::Q8Act | DType::Q16Act => {
            unreachable!("no blocks in a file")
        }
    }
}
