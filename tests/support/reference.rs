//! The logits of a model in double precision, straight from the mathematics: no graph, no passes, no kernels.
//!
//! Tokens go through one by one. Only the file reader and the reference dequantiser are the engine's own; both have tests
//! against the `gguf` Python package.

use sinter::gguf::dequant::dequantise;
use sinter::gguf::{GgufFile, Value};
use std::iter::zip;

/// The logits of every token.
pub fn logits(file: &GgufFile, tokens: &[u32]) -> Vec<Vec<f64>> {
    let mut model = Model::load(file);
    tokens.iter().map(|&id| model.step(id as usize)).collect()
}

/// Rows as the engine gives them.
pub fn to_f32(rows: Vec<Vec<f64>>) -> Vec<Vec<f32>> {
    rows.into_iter().map(|row| row.into_iter().map(|x| x as f32).collect()).collect()
}

type Vector = Vec<f64>;

/// `y = W·x + b`.
struct Linear {
    weight: Vec<Vector>,
    bias: Option<Vector>,
}

impl Linear {
    fn of(&self, x: &[f64]) -> Vector {
        let mut y: Vector = self.weight.iter().map(|row| dot(row, x)).collect();
        if let Some(bias) = &self.bias {
            add(&mut y, bias);
        }
        y
    }
}

impl Linear {
    /// The first rows, the next ones, and so on.
    fn split<const N: usize>(self, rows: [usize; N]) -> [Linear; N] {
        let (mut weight, mut bias) = (self.weight.into_iter(), self.bias.map(Vec::into_iter));
        let parts = rows.map(|n| Linear {
            weight: weight.by_ref().take(n).collect(),
            bias: bias.as_mut().map(|bias| bias.by_ref().take(n).collect()),
        });
        assert!(weight.next().is_none(), "rows are left");
        parts
    }
}

struct Layer {
    heads: usize,
    attention_norm: Vector,
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: Option<Vector>,
    key_norm: Option<Vector>,
    output: Linear,
    ffn_norm: Vector,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// Of each token so far.
    keys: Vec<Vector>,
    values: Vec<Vector>,
}

struct Model {
    embedding: Vec<Vector>,
    layers: Vec<Layer>,
    output_norm: Vector,
    /// None if it is the embedding.
    head: Option<Linear>,
    head_dim: usize,
    /// Positions that a token sees, itself included.
    window: usize,
    eps: f64,
    rope: Rope,
}

struct Rope {
    /// The angle by which each pair turns from one position to the next.
    frequencies: Vector,
    /// The elements of each pair.
    pairs: Vec<(usize, usize)>,
}

impl Rope {
    fn turn(&self, head: &mut [f64], position: usize) {
        for (&(a, b), frequency) in zip(&self.pairs, &self.frequencies) {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
        }
    }
}

impl Model {
    fn load(file: &GgufFile) -> Model {
        let gguf = file.gguf();
        let architecture = gguf.str("general.architecture").unwrap();
        let key = |name: &str| format!("{architecture}.{name}");
        let int = |name: &str| gguf.u64_opt(&key(name)).unwrap().map(|n| n as usize);
        let vector = |name: &str| gguf.tensors.get(name).map(|_| values(file, name));
        let linear = |name: &str| Linear {
            weight: matrix(file, &format!("{name}.weight")),
            bias: vector(&format!("{name}.bias")),
        };

        // Of a number for each layer, only files with a key length have lists.
        let head_dim = int("attention.key_length")
            .unwrap_or_else(|| int("embedding_length").unwrap() / int("attention.head_count").unwrap());
        let rotated = int("rope.dimension_count").unwrap_or(head_dim);
        let base = f64::from(gguf.f32_opt(&key("rope.freq_base")).unwrap().unwrap_or(10_000.0));
        let factors = vector("rope_freqs.weight").unwrap_or_else(|| vec![1.0; rotated / 2]);
        let frequency =
            |(pair, factor): (usize, &f64)| base.powf(-((2 * pair) as f64) / rotated as f64) / factor;
        let pair = |i: usize| if architecture == "llama" { (2 * i, 2 * i + 1) } else { (i, i + rotated / 2) };
        let rope = Rope {
            frequencies: factors.iter().enumerate().map(frequency).collect(),
            pairs: (0..rotated / 2).map(pair).collect(),
        };

        let layer = |i: usize| {
            let name = |part: &str| format!("blk.{i}.{part}");
            // One number for all layers, or one for each.
            let of_layer = |part: &str| match gguf.metadata.get(&key(part)) {
                Some(Value::Array(list)) => Some(list.to_u64s().unwrap()[i] as usize),
                _ => int(part),
            };
            let heads = of_layer("attention.head_count").unwrap();
            let kv_heads = of_layer("attention.head_count_kv").unwrap_or(heads);
            let of = |count: usize| count * head_dim;
            let [query, key, value] = match gguf.tensors.contains_key(&name("attn_qkv.weight")) {
                true => linear(&name("attn_qkv")).split([of(heads), of(kv_heads), of(kv_heads)]),
                false => ["attn_q", "attn_k", "attn_v"].map(|part| linear(&name(part))),
            };
            let ffn = of_layer("feed_forward_length").unwrap();
            let [gate, up] = match gguf.tensors.contains_key(&name("ffn_gate.weight")) {
                true => ["ffn_gate", "ffn_up"].map(|part| linear(&name(part))),
                false => linear(&name("ffn_up")).split([ffn, ffn]),
            };
            Layer {
                heads,
                attention_norm: values(file, &name("attn_norm.weight")),
                query,
                key,
                value,
                query_norm: vector(&name("attn_q_norm.weight")),
                key_norm: vector(&name("attn_k_norm.weight")),
                output: linear(&name("attn_output")),
                ffn_norm: values(file, &name("ffn_norm.weight")),
                gate,
                up,
                down: linear(&name("ffn_down")),
                keys: vec![],
                values: vec![],
            }
        };
        Model {
            embedding: matrix(file, "token_embd.weight"),
            layers: (0..int("block_count").unwrap()).map(layer).collect(),
            output_norm: values(file, "output_norm.weight"),
            head: gguf.tensors.contains_key("output.weight").then(|| linear("output")),
            head_dim,
            window: int("attention.sliding_window").unwrap_or(usize::MAX),
            eps: f64::from(gguf.f32(&key("attention.layer_norm_rms_epsilon")).unwrap()),
            rope,
        }
    }

    /// The logits after one more token.
    fn step(&mut self, id: usize) -> Vector {
        let mut x = self.embedding[id].clone();
        for layer in &mut self.layers {
            let a = normalise(&x, &layer.attention_norm, self.eps);
            let position = layer.keys.len();
            let turned = |mut heads: Vector, norm: &Option<Vector>| {
                for head in heads.chunks_mut(self.head_dim) {
                    if let Some(norm) = norm {
                        head.copy_from_slice(&normalise(head, norm, self.eps));
                    }
                    self.rope.turn(head, position);
                }
                heads
            };
            let queries = turned(layer.query.of(&a), &layer.query_norm);
            layer.keys.push(turned(layer.key.of(&a), &layer.key_norm));
            layer.values.push(layer.value.of(&a));
            let first = layer.keys.len().saturating_sub(self.window);
            let (keys, values) = (&layer.keys[first..], &layer.values[first..]);
            let mixed = attend(&queries, keys, values, layer.heads, self.head_dim);
            add(&mut x, &layer.output.of(&mixed));

            let f = normalise(&x, &layer.ffn_norm, self.eps);
            let gated = zip(layer.gate.of(&f), layer.up.of(&f)).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
            add(&mut x, &layer.down.of(&gated.collect::<Vector>()));
        }
        let x = normalise(&x, &self.output_norm, self.eps);
        match &self.head {
            Some(head) => head.of(&x),
            None => self.embedding.iter().map(|row| dot(row, &x)).collect(),
        }
    }
}

/// What each head sees of the values, weighted by how well its query matches the keys. Neighbouring heads share those.
fn attend(queries: &[f64], keys: &[Vector], values: &[Vector], heads: usize, head_dim: usize) -> Vector {
    let sharing = heads / (keys[0].len() / head_dim);
    let mut mixed = vec![0.0; queries.len()];
    for (head, (query, out)) in zip(queries.chunks(head_dim), mixed.chunks_mut(head_dim)).enumerate() {
        let own = head / sharing * head_dim..(head / sharing + 1) * head_dim;
        let score = |key: &Vector| dot(query, &key[own.clone()]) / (head_dim as f64).sqrt();
        let scores: Vector = keys.iter().map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vector = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (weight, value) in zip(weights, values) {
            zip(&mut *out, &value[own.clone()]).for_each(|(o, v)| *o += weight / total * v);
        }
    }
    mixed
}

/// RMSNorm.
fn normalise(x: &[f64], weight: &[f64], eps: f64) -> Vector {
    let mean_square = dot(x, x) / x.len() as f64;
    zip(x, weight).map(|(x, w)| x / (mean_square + eps).sqrt() * w).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    zip(a, b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    assert_eq!(x.len(), y.len());
    zip(x, y).for_each(|(x, y)| *x += y);
}

/// The values of a tensor.
pub fn values(file: &GgufFile, name: &str) -> Vec<f64> {
    let info = file.gguf().tensor(name).unwrap();
    let mut out = vec![0.0; info.elements() as usize];
    dequantise(info.dtype().unwrap(), file.tensor_bytes(info), &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

fn matrix(file: &GgufFile, name: &str) -> Vec<Vector> {
    let columns = file.gguf().tensor(name).unwrap().shape[1] as usize;
    values(file, name).chunks(columns).map(<[f64]>::to_vec).collect()
}
