//! Every architecture in every format against exact answers, and what is refused.

mod support;

use sinter::compile::{self, Options, Purpose};
use sinter::gguf::{Array, GgufFile, Value};
use sinter::ir::{DType, Kernel};
use sinter::lower::{Config, LowerError};

use sinter::target::{Target, TargetKind};
use std::sync::Arc;
use support::synthetic::{Model, REAL, Shape, TINY, is_vector, shape, uniform};
use support::*;

/// What float32 arithmetic may add.
const EXACT: f64 = 1e-5;
/// What activations in 8 bits and caches in 16 may.
const DEFAULT: f64 = 4e-2;

/// Tokens of the committed oracle; all are below 61.
const TOKENS: [u32; 12] = [1, 42, 60, 5, 42, 0, 13, 60, 17, 55, 1, 33];

fn reference(file: &GgufFile, tokens: &[u32]) -> Vec<Vec<f32>> {
    reference::to_f32(reference::logits(file, tokens))
}

/// Asserts that the model computes `expected`, exactly, without fusions, and by default.
#[track_caller]
fn assert_computes(what: &str, file: &Arc<GgufFile>, tokens: &[u32], expected: &[Vec<f32>]) {
    for (path, options, tolerance) in [
        ("exact", exact(), EXACT),
        ("exact --no-fuse", unfused(exact()), EXACT),
        ("default", defaults(), DEFAULT),
    ] {
        for (level, device) in levels() {
            let found = score_on(file, &options, tokens, &device);
            assert_close(&format!("{what}, {path}, {level}"), &found, expected, tolerance);
        }
    }
}

#[track_caller]
fn assert_matches_reference(what: &str, model: &Model) {
    let file = model.file();
    assert_computes(what, &file, &TOKENS, &reference(&file, &TOKENS));
}

/// The logits of tokens that go through one by one.
fn decoded(file: &Arc<GgufFile>, options: &Options, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut reader = Reader::new(executor(file, options, Purpose::Generate));
    tokens.iter().map(|&id| reader.last(&[id])).collect()
}

/// Long enough for a chunk of 512, a position of 1024, and blocks of cache rows beyond both; no multiple of anything.
const LONG: usize = 1501;

#[test]
fn positions_far_into_a_text_are_as_near_ones() {
    let base = Shape { layers: 2, width: 64, ffn: 96, vocab: 61, ..shape("tiny-llama") };
    for base in [base, Shape { architecture: "qwen3", ..base }] {
        // Heads that few queries take as they are, and that many take as lanes; the slowest turn only at far positions.
        let shape = Shape { head_dim: 16, rotated: 16, rope_base: 1e3, ..base };
        let file = Model::new(&shape, uniform(DType::F32)).file();
        let tokens: Vec<u32> = (0..LONG as u32).map(|i| (i * i + 7 * i) % 61).collect();
        let expected = reference(&file, &tokens);
        let context = Some(LONG as u64);
        for (path, options, tolerance) in [
            ("exact", Options { context, ..exact() }, EXACT),
            ("exact --no-fuse", Options { context, ..unfused(exact()) }, EXACT),
            ("f16 cache", Options { context, ..float_activations(defaults()) }, 1e-3),
        ] {
            for (level, device) in levels() {
                let what = format!("{} at position {LONG}, {path}, {level}", shape.architecture);
                assert_close(&what, &score_on(&file, &options, &tokens, &device), &expected, tolerance);

                // Prompts up to far positions, and from there token by token.
                let mut reader = Reader::new(executor_on(&file, &options, Purpose::Generate, &device));
                for from in [500, 1010, LONG - 20] {
                    reader.truncate(0);
                    tokens[..from].chunks(512).for_each(|chunk| reader.skip(chunk));
                    let range = from..from + 20;
                    let found: Vec<_> = tokens[range.clone()].iter().map(|&id| reader.last(&[id])).collect();
                    assert_close(
                        &format!("{what}, decoded from {from}"),
                        &found,
                        &expected[range],
                        tolerance,
                    );
                }
            }
        }
    }
}

#[test]
fn both_references_and_the_engine_agree() {
    for name in ["tiny-odd-mxfp4", "tiny-llama3-q2_k", "tiny-qwen2-q2_k", "tiny-qwen3-q2_k"] {
        let data = |end: &str| path(&format!("tests/data/oracle/synthetic/{name}.{end}"));
        let file = Arc::new(GgufFile::open(data("gguf")).unwrap());
        let (_, expected) = read_npy(&data("npy"));
        assert_close(&format!("{name}, reference"), &reference(&file, &TOKENS), &expected, 1e-7);
        assert_computes(name, &file, &TOKENS, &expected);
    }
}

#[test]
fn weights_of_every_format_have_one_size() {
    for format in DType::WEIGHTS {
        let name = "blk.0.ffn_gate.weight";
        let file = Model::new(&shape("tiny-llama"), uniform(format)).file();
        let x = reference::values(&file, name);
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let deviation = (x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt();
        assert!(
            mean.abs() < 1e-3 && (deviation / 0.02 - 1.0).abs() < 0.2,
            "{format}: {mean:e} ± {deviation:e}"
        );
    }
}

#[test]
fn every_shape_in_every_format() {
    for shape in TINY {
        for format in DType::WEIGHTS.into_iter().filter(|&format| shape.allows(format)) {
            let model = Model::new(&shape, uniform(format));
            assert_matches_reference(&format!("{} {format}", shape.name), &model);
        }
    }
}

#[test]
fn formats_mix_freely_within_a_model() {
    for shape in TINY {
        let formats: Vec<DType> = DType::WEIGHTS.into_iter().filter(|&f| shape.allows(f)).collect();
        let plain = [DType::F32, DType::F16, DType::BF16];
        for first in 0..formats.len() {
            // Every tensor has another format than its neighbours, and over all turns every format.
            let next = std::cell::Cell::new(first);
            let model = Model::new(&shape, |name| {
                let i = next.replace(next.get() + 1);
                if is_vector(name) { plain[i % plain.len()] } else { formats[i % formats.len()] }
            });
            assert_matches_reference(&format!("{} mixed from {}", shape.name, formats[first]), &model);
        }
    }
}

#[test]
fn token_by_token_equals_at_once() {
    for shape in TINY {
        for format in [DType::F32, DType::Q8_0, DType::Q4_K].into_iter().filter(|&f| shape.allows(f)) {
            let file = Model::new(&shape, uniform(format)).file();
            let what = format!("{} {format}, token by token", shape.name);
            let at_once = score(&file, &exact(), &TOKENS);
            assert_close(&what, &decoded(&file, &exact(), &TOKENS), &at_once, EXACT);
            let plain = unfused(exact());
            assert_close(&format!("{what}, --no-fuse"), &decoded(&file, &plain, &TOKENS), &at_once, EXACT);
            let expected = reference(&file, &TOKENS);
            assert_close(
                &format!("{what}, default"),
                &decoded(&file, &defaults(), &TOKENS),
                &expected,
                DEFAULT,
            );
        }
    }
}

#[test]
fn heads_of_any_even_size_and_any_sharing() {
    for base in ["tiny-llama", "tiny-qwen2", "tiny-qwen3"].map(shape) {
        for head_dim in [2, 6, 80, 250] {
            for kv_heads in [1, 2, 4] {
                let small = Shape { width: 64, ffn: 96, vocab: 61, layers: 1, ..base };
                let shape = Shape { head_dim, rotated: head_dim, kv_heads, ..small };
                // The rows of this one are as long as all heads together: no whole blocks.
                let format = |name: &str| match name.contains("attn_output") {
                    true => DType::F16,
                    false => uniform(DType::Q8_0)(name),
                };
                let what = format!("{}, 4 heads of {head_dim}, {kv_heads} cached", shape.architecture);
                assert_matches_reference(&what, &Model::new(&shape, format));
            }
        }
    }
}

#[test]
fn some_of_a_head_may_stay_unturned() {
    for base in TINY {
        let shape = Shape { rotated: base.head_dim / 2, ..base };
        assert_matches_reference(
            &format!("{} half turned", base.name),
            &Model::new(&shape, uniform(DType::F16)),
        );
    }
}

#[test]
fn llama_may_have_biases_and_qwen_none_and_heads_of_their_own() {
    for base in TINY {
        let shape = Shape { biases: !base.biases, tied: !base.tied, ..base };
        assert_matches_reference(
            &format!("{}, other biases and head", base.name),
            &Model::new(&shape, uniform(DType::Q8_0)),
        );
    }
    let mut model = Model::new(&shape("tiny-llama"), uniform(DType::Q8_0));
    for (name, rows) in [("attn_output", 256), ("ffn_gate", 768), ("ffn_up", 768), ("ffn_down", 256)] {
        model.tensors.insert(format!("blk.1.{name}.bias"), (DType::F32, vec![rows]));
    }
    assert_matches_reference("biases everywhere", &model);
}

#[test]
fn keys_that_may_be_absent_have_defaults() {
    let mut model = Model::new(&shape("tiny-odd"), uniform(DType::F16));
    let expected = score(&model.file(), &exact(), &TOKENS);
    for key in ["head_count_kv", "key_length", "value_length"]
        .map(|key| format!("attention.{key}"))
        .into_iter()
        .chain(["rope.dimension_count".into(), "rope.freq_base".into(), "context_length".into()])
    {
        assert!(model.metadata.shift_remove(&format!("llama.{key}")).is_some(), "{key}");
    }
    assert_eq!(score(&model.file(), &exact(), &TOKENS), expected);
}

#[test]
fn the_context_is_what_was_asked_for_or_a_modest_default() {
    for (trained, asked, context) in [
        (8192, None, 4096),
        (4096, None, 4096),
        (512, None, 512),
        (8192, Some(6000), 6000),
        (512, Some(700), 700),
    ] {
        let mut model = Model::new(&shape("tiny-odd"), uniform(DType::F16));
        model.metadata.insert("llama.context_length".into(), Value::U32(trained));
        let config = Config::from_gguf(&model.description()).unwrap();
        let options = Options { context: asked, ..Options::new(Target::cpu()) };
        assert_eq!(options.context_of(&config), context, "{trained} {asked:?}");
    }
}

/// What shows that the comparisons can fail.
#[test]
fn every_part_of_an_architecture_is_seen() {
    let assert_differs = |what: &str, model: &Model, changed: &Model| {
        let found = score(&changed.file(), &exact(), &TOKENS);
        let error = worst(&found, &reference(&model.file(), &TOKENS));
        println!("{what}: {error:.1e}");
        assert!(error > 100.0 * EXACT, "{what}: {error:e}");
    };
    for shape in TINY {
        let model = Model::new(&shape, uniform(DType::F16));
        for (key, value) in [("rope.freq_base", 2e4), ("attention.layer_norm_rms_epsilon", 2e-4)] {
            let mut changed = model.clone();
            changed.metadata.insert(format!("{}.{key}", shape.architecture), Value::F32(value));
            assert_differs(&format!("{} {key}", shape.name), &model, &changed);
        }
        for window in shape.window.into_iter().flat_map(|window| [window - 1, window + 1, 0]) {
            let mut changed = model.clone();
            changed.metadata.insert("phi3.attention.sliding_window".into(), Value::U32(window));
            assert_differs(&format!("{} window {window}", shape.name), &model, &changed);
        }
        let optional = |name: &str| name.ends_with(".bias") || name == "rope_freqs.weight";
        for name in model.tensors.keys().filter(|name| optional(name)) {
            let mut changed = model.clone();
            changed.tensors.shift_remove(name);
            assert_differs(&format!("{} without {name}", shape.name), &model, &changed);
        }
    }
    // The same tensors as another architecture: RoPE turns other pairs.
    let model = Model::new(&shape("tiny-llama"), uniform(DType::F16));
    let other = Shape { architecture: "qwen2", ..shape("tiny-llama") };
    assert_differs("the NeoX style of rotation", &model, &Model::new(&other, uniform(DType::F16)));
}

/// The launches of a decode step, by kernel.
fn launches(shape: &Shape, format: DType, options: &Options) -> Vec<(String, u64)> {
    let gguf = Model::new(shape, uniform(format)).description();
    let config = Config::from_gguf(&gguf).unwrap();
    let step = Purpose::Generate.steps(&config, options).remove(0);
    let (_, report) = compile::fuse(&gguf, options, &step).unwrap();
    report.after.launches.iter().map(|(kernel, n)| (kernel.clone(), *n)).collect()
}

#[test]
fn biases_and_head_norms_cost_no_launch() {
    for target in [Target::cpu(), Target::test_wave32()] {
        for options in [Options::new(target.clone()), Options::new(target.clone()).exact()] {
            // A launch more would be one in each layer.
            for base in TINY.into_iter().chain(REAL.map(|real| Shape { layers: 4, ..real })) {
                let plain = Shape {
                    architecture: "llama",
                    biases: false,
                    rope_factors: false,
                    fused_qkv: false,
                    window: None,
                    ..base
                };
                let format = if base.allows(DType::Q4_K) { DType::Q4_K } else { DType::Q8_0 };
                let found = launches(&base, format, &options);
                // On a GPU attention turns heads itself, in two launches.
                let of_layers = match target.kind {
                    TargetKind::Cpu => (Kernel::RopeKv.name().to_string(), base.layers),
                    _ => (Kernel::RopeAttention.name().to_string(), 2 * base.layers),
                };
                assert!(found.contains(&of_layers), "{}: {found:?}", base.name);
                assert_eq!(found, launches(&plain, format, &options), "{}", base.name);
            }
        }
    }
}

fn refusal(model: &Model) -> String {
    let gguf = model.description();
    let lowered = compile::compile(&gguf, &defaults(), Purpose::Score);
    lowered.map(|_| ()).expect_err("a refusal").to_string()
}

/// A number for each layer, of heads, of those that are cached, and of the feed-forward's width.
#[test]
fn layers_may_differ() {
    for base in TINY {
        let mut model = Model::new(&base, uniform(DType::F16));
        let list = |values: [u64; 2]| Value::Array(Array::U32(values.map(|x| x as u32).into()));
        // The second layer has fewer of each.
        let (d, width, ffn) = (base.head_dim, base.width, base.ffn - 32);
        for (key, values) in [
            ("attention.head_count", [base.heads, base.heads / 2]),
            ("attention.head_count_kv", [base.kv_heads, 1]),
            ("feed_forward_length", [base.ffn, ffn]),
        ] {
            model.metadata.insert(format!("{}.{key}", base.architecture), list(values));
        }
        let rows = [base.heads / 2 * d, d, d];
        for (name, (_, shape)) in &mut model.tensors {
            let Some(part) = name.strip_prefix("blk.1.") else { continue };
            let up = if base.architecture == "phi3" { 2 * ffn } else { ffn };
            *shape = match part {
                "attn_q.weight" => vec![rows[0], width],
                "attn_k.weight" | "attn_v.weight" => vec![d, width],
                "attn_q.bias" => vec![rows[0]],
                "attn_k.bias" | "attn_v.bias" => vec![d],
                "attn_qkv.weight" => vec![rows.iter().sum(), width],
                "attn_output.weight" => vec![width, rows[0]],
                "ffn_gate.weight" => vec![ffn, width],
                "ffn_up.weight" => vec![up, width],
                "ffn_down.weight" => vec![width, ffn],
                _ => continue,
            };
        }
        assert_matches_reference(&format!("{}, layers that differ", base.name), &model);
        let key = format!("{}.feed_forward_length", base.architecture);
        for wrong in [vec![2], vec![2, 2, 2], vec![]] {
            model.metadata.insert(key.clone(), Value::Array(Array::U32(wrong)));
            let says = refusal(&model);
            assert!(says.contains(&key) && says.contains("no number for each of 2 layers"), "{says}");
        }
        model.metadata.insert(key.clone(), Value::Array(Array::F32(vec![2.0, 2.0])));
        assert!(refusal(&model).contains(&key));
        model.metadata.insert(key.clone(), list([32, 0]));
        assert!(refusal(&model).contains("0 is not in 1..="));
    }
}

/// One tensor with the rows of queries, keys and values, as any family may have it, is as good as three.
#[test]
fn queries_keys_and_values_may_lie_in_one_tensor() {
    for base in TINY {
        for format in [DType::F32, DType::Q8_0, DType::Q4_K].into_iter().filter(|&f| base.allows(f)) {
            let shape = Shape { fused_qkv: !base.fused_qkv, ..base };
            let model = Model::new(&shape, uniform(format));
            assert_matches_reference(&format!("{} {format}, fused otherwise", base.name), &model);
        }
        // Nothing is copied, and there is no launch more.
        let fused = Shape { fused_qkv: true, ..base };
        let options = Options::new(Target::cpu());
        assert_eq!(
            launches(&fused, DType::F16, &options),
            launches(&Shape { fused_qkv: false, ..base }, DType::F16, &options),
            "{}",
            base.name
        );
    }
    let mut model = Model::new(&Shape { fused_qkv: true, ..shape("tiny-llama") }, uniform(DType::F16));
    model.tensors.insert("blk.0.attn_k.weight".into(), (DType::F16, vec![128, 256]));
    assert!(refusal(&model).contains("\"blk.0.attn_k.weight\" is not part of"));
    model.tensors.shift_remove("blk.0.attn_k.weight");
    model.tensors["blk.1.attn_qkv.weight"].1 = vec![511, 256];
    assert!(
        refusal(&model)
            .contains("\"blk.1.attn_qkv.weight\" is [511,256], but the metadata asks for [512,256]")
    );
}

/// Factors for long contexts change the angles, by tensors and by a key.
#[test]
fn phi3_with_factors_for_long_contexts_is_refused_by_name() {
    let long = || Model::new(&shape("tiny-phi3"), uniform(DType::F16));
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        let mut model = long();
        model.tensors.insert(name.into(), (DType::F32, vec![32]));
        assert!(refusal(&model).contains(name));
    }
    let mut model = long();
    model.metadata.insert("phi3.rope.scaling.attn_factor".into(), Value::F32(1.19));
    assert!(refusal(&model).contains("phi3.rope.scaling.attn_factor"));
    let mut model = long();
    model.metadata.insert("phi3.attention.sliding_window_pattern".into(), Value::U32(2));
    assert!(refusal(&model).contains("phi3.attention.sliding_window_pattern"));
}

#[test]
fn impossible_heads_are_refused_by_key() {
    for (key, value) in [
        ("attention.head_count", 0),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 0),
        ("attention.key_length", 1026),
        ("attention.value_length", 32),
        ("rope.dimension_count", 63),
        ("rope.dimension_count", 66),
        ("block_count", 0),
    ] {
        let key = format!("llama.{key}");
        let mut model = Model::new(&shape("tiny-llama"), uniform(DType::F16));
        model.metadata.insert(key.clone(), Value::U32(value));
        let says = refusal(&model);
        assert!(says.contains(&key), "{says}");
    }
    // What follows from another key is that key's fault.
    let mut model = Model::new(&shape("tiny-llama"), uniform(DType::F16));
    for key in ["attention.value_length", "rope.dimension_count"] {
        model.metadata.shift_remove(&format!("llama.{key}"));
    }
    model.metadata.insert("llama.attention.key_length".into(), Value::U32(33));
    let says = refusal(&model);
    assert!(says.starts_with("key \"llama.attention.key_length\": cannot rotate 33 dimensions"), "{says}");
}

#[test]
fn tensors_that_an_architecture_lacks_or_needs_are_named() {
    let qwen3 = shape("tiny-qwen3");
    for name in
        ["blk.1.attn_q_norm.weight", "blk.0.attn_k_norm.weight", "blk.1.ffn_up.weight", "output_norm.weight"]
    {
        let mut model = Model::new(&qwen3, uniform(DType::F16));
        assert!(model.tensors.shift_remove(name).is_some());
        assert_eq!(refusal(&model), format!("tensor {name:?} is missing"));
    }
    // What the experts of Mixtral, head norms where there should be none, and the factors of longrope bring.
    for (name, shape) in [
        ("blk.0.ffn_gate_inp.weight", vec![8, 256]),
        ("blk.1.ffn_down_exps.weight", vec![8, 256, 768]),
        ("blk.0.attn_q_norm.weight", vec![64]),
        ("blk.0.attn_norm.bias", vec![256]),
        ("blk.0.attn_sinks.weight", vec![4]),
        ("rope_factors_long.weight", vec![32]),
        ("blk.2.attn_norm.weight", vec![256]),
    ] {
        let mut model = Model::new(&support::synthetic::shape("tiny-llama"), uniform(DType::F16));
        model.tensors.insert(name.into(), (DType::F32, shape));
        let says = refusal(&model);
        assert!(says.contains(name) && says.contains("not part of a llama model"), "{says}");
    }
}

#[test]
fn shapes_that_the_metadata_does_not_bear_out_are_refused() {
    for (name, shape) in [
        ("blk.0.attn_k_norm.weight", vec![64]),
        ("blk.0.attn_q.weight", vec![256, 256]),
        ("blk.0.attn_output.weight", vec![256, 256]),
        ("token_embd.weight", vec![512, 512]),
    ] {
        let mut model = Model::new(&support::synthetic::shape("tiny-qwen3"), uniform(DType::F16));
        model.tensors[name].1 = shape;
        let gguf = model.description();
        let error = compile::compile(&gguf, &defaults(), Purpose::Score).expect_err("a refusal");
        let compile::CompileError::Lower(LowerError::Tensor { name: found, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!(found, name);
    }
}
