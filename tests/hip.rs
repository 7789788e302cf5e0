//! The kernels of GPUs. Without a GPU: a plan has them compiled, where clang is there. With one: what they compute is what the interpreter
//! says; where there is none, those tests say so and pass.

#[allow(dead_code)]
#[path = "support/everywhere.rs"]
mod everywhere;
#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use sinter::check::{Caches, NodeCheck, check_step};
use sinter::compile::{Options, Purpose, fuse};
use sinter::generate::{EncodeOptions, Tokenizer};
use sinter::gguf::GgufFile;
use sinter::ir::{DType, Graph, KvTypes, Op, StateRole, Syms};
use sinter::lower::Config;
use sinter::plan::{LoadedPlan, Output};
use sinter::runtime::interp::Tensor;
use sinter::runtime::{DeviceOptions, StepRows};
use sinter::target::{MatvecShape, Target, TargetKind};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use synthetic::{Model, Shape, TINY, q4_k_m, shape, uniform};

/// Says that a test skips, and why; tests that pass keep what they print to themselves, but not this.
fn say(why: &str) {
    _ = writeln!(std::io::stderr(), "skipped: {why}");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn a_plan_for_two_gpus_is_compiled_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let compile = |name: &str| {
        let plan = dir.path().join(name);
        let output = Command::new(env!("CARGO_BIN_EXE_sinter"))
            .args(["compile", "--target", "gfx1100,gfx942", "--chunk", "1", "-c", "64", "-o"])
            .arg(&plan)
            .env("SINTER_KERNEL_CACHE", dir.path().join("cache"))
            .output()
            .unwrap();
        (String::from_utf8_lossy(&output.stderr).into_owned(), std::fs::read(plan).ok())
    };
    let (said, Some(bytes)) = compile("a.plan") else {
        let (said, _) = compile("a.plan");
        assert!(said.contains("nothing here compiles kernels for gfx1100"), "{said}");
        return say(&said);
    };
    assert_eq!(said.matches(" kernels compiled, ").count(), 2, "{said}");
    let plans = LoadedPlan::all_from_bytes(&bytes).unwrap();
    // What the ELF header says of the processor (EF_AMDGPU_MACH).
    for (plan, (arch, mach)) in plans.iter().zip([("gfx1100", 0x41), ("gfx942", 0x4c)]) {
        assert_eq!(plan.target.arch, arch);
        assert!(plan.sources().len() > 10);
        assert_eq!(plan.objects_by_source().len(), plan.sources().len());
        for object in &plan.objects {
            assert_eq!((&object.code[..4], object.code[18], object.code[48]), (&b"\x7fELF"[..], 224, mach));
        }
    }
    // From the cache it is the same.
    assert!(compile("b.plan").1 == Some(bytes));
}

/// One GPU's target and options, if there is a GPU here.
fn here() -> Option<(Target, DeviceOptions)> {
    Some((everywhere::gpu_target()?, DeviceOptions::default()))
}

/// Each kernel of a model's steps on the GPU, against its body.
fn check(file: &Arc<GgufFile>, options: &Options, device: &DeviceOptions, what: &str) {
    let config = Config::from_gguf(file.gguf()).unwrap();
    let vocab = file.gguf().tensor("token_embd.weight").unwrap().shape[0] as i32;
    let tokens: Vec<i32> = (0..13).map(|i| (i * 37 + 5) % vocab).collect();
    let mut caches = Caches::new();
    let mut cached = 0;
    let options = Options { context: Some(64), chunk: 13, ..options.clone() };
    let steps = Purpose::Score.steps(&config, &options);
    for (step, tokens) in
        [(&steps[steps.len() - 1], &tokens[..]), (&steps[0], &tokens[..1]), (&steps[0], &tokens[1..2])]
    {
        let outcome = check_step(file, &options, device, step, tokens, cached, &mut caches).unwrap();
        cached += tokens.len() as u64;
        for node in &outcome.nodes {
            assert!(node.passes(), "{what}: {} of {}: {}", node.kernel, node.at, node.error);
        }
    }
}

#[test]
fn kernels_on_a_gpu_compute_what_their_bodies_say() {
    let Some((target, device)) = here() else { return };
    let shape = Shape {
        layers: 1,
        width: 256,
        ffn: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        rotated: 64,
        ..shape("tiny-llama")
    };
    let files = DType::WEIGHTS
        .into_iter()
        .map(|dtype| (dtype.name().to_string(), Model::new(&shape, uniform(dtype)).file()));
    for (name, file) in files.chain([("default".to_string(), Arc::new(sinter::model::embedded().unwrap()))]) {
        let options = Options::new(target.clone());
        for (i, options) in ways(&options).iter().enumerate() {
            check(&file, options, &device, &format!("{name}, way {i}"));
        }
        if name == "default" {
            let pipeline = options.pipeline.clone().without_fusions();
            check(&file, &Options { pipeline, ..options.exact() }, &device, "unfused");
        }
    }
}

/// Caches of a graph that are full of what nobody computed.
fn full_caches(graph: &Graph) -> Caches {
    let mut state = 1u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Not around zero, where a sum of many is lost in what they are rounded to.
        (state >> 8) as f32 / (1 << 23) as f32 - 0.7
    };
    let mut caches = Caches::new();
    for id in graph.ids() {
        let Op::State { name, .. } = graph.op(id) else { continue };
        let (ty, at) = (graph.ty(id.into()), Syms { t: 1, r: 1 });
        let numbers: Vec<f32> = (0..ty.elements(&at)).map(|_| number()).collect();
        let bytes = match ty.dtype {
            DType::F16 => numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            DType::F32 => bytemuck::cast_slice(&numbers).to_vec(),
            other => panic!("a cache of {other}"),
        };
        let dims = ty.dims(&at).into_iter().map(|n| n as usize).collect();
        caches.insert(name.clone(), Tensor::new(ty.dtype, dims, bytes).unwrap());
    }
    caches
}

/// Each kernel of a step of so many tokens after so many others, against its body. Steps of up to 65 tokens are those of programs that
/// take more, where there are such.
fn check_at(file: &Arc<GgufFile>, options: &Options, device: &DeviceOptions, tokens: u64, cached: u64) {
    check_in(file, options, device, tokens, cached, tokens.max(65));
}

/// The same of a step of a model that takes up to so many tokens at once.
fn check_in(
    file: &Arc<GgufFile>,
    options: &Options,
    device: &DeviceOptions,
    tokens: u64,
    cached: u64,
    chunk: u64,
) {
    let config = Config::from_gguf(file.gguf()).unwrap();
    let vocab = file.gguf().tensor("token_embd.weight").unwrap().shape[0];
    let options = Options { context: Some(cached + chunk), chunk, ..options.clone() };
    let steps = Purpose::Score.steps(&config, &options);
    let step = steps.iter().find(|step| step.tokens >= tokens).unwrap();
    let mut caches = full_caches(&fuse(file.gguf(), &options, step).unwrap().0);
    let tokens: Vec<i32> = (0..tokens).map(|i| ((i * 37 + 5) % vocab) as i32).collect();
    let outcome = check_step(file, &options, device, step, &tokens, cached, &mut caches).unwrap();
    assert!(outcome.nodes.len() > 5);
    for node in &outcome.nodes {
        let NodeCheck { at, kernel, error, tolerance } = node;
        let n = tokens.len();
        assert!(node.passes(), "{n} tokens after {cached}: {kernel} of {at}: {error:e} of {tolerance:e}");
    }
}

/// Models whose sizes are no powers of two: heads of 40 and of 32 columns, one with formats in blocks of 256, one of halves in rows that are no
/// whole steps of a tile, and one whose rows are of a single step, of five, and of two ranges of eight and nine.
fn uneven_models() -> [Arc<GgufFile>; 5] {
    let shape = Shape { layers: 1, width: 96, ffn: 160, vocab: 61, ..shape("tiny-llama") };
    let fives = Shape { heads: 4, kv_heads: 2, head_dim: 40, rotated: 40, ..shape };
    let threes = Shape { heads: 3, kv_heads: 1, head_dim: 32, rotated: 32, ..shape };
    let wide = Shape { width: 256, ffn: 512, heads: 4, kv_heads: 1, head_dim: 64, rotated: 64, ..shape };
    [
        Model::new(&fives, uniform(DType::Q8_0)).file(),
        Model::new(&threes, uniform(DType::Q4_0)).file(),
        Model::new(&wide, q4_k_m).file(),
        Model::new(&Shape { ffn: 164, ..fives }, uniform(DType::F16)).file(),
        Model::new(&Shape { width: 32, ffn: 544, ..fives }, uniform(DType::BF16)).file(),
    ]
}

/// Tokens of a step, and depths of a cache.
const TOKENS: [u64; 12] = [1, 2, 3, 7, 8, 9, 17, 64, 65, 128, 513, 4096];
const DEPTHS: [u64; 5] = [0, 1, 511, 4095, 16000];

/// What the interpreter goes through in a second or a few.
fn is_quick(tokens: u64, depth: u64) -> bool {
    tokens * (tokens + depth) < 1 << 20
}

#[test]
fn steps_of_all_sizes_at_all_depths_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let options = Options::new(target);
    // The interpreter takes the time, and one thread.
    let of_each: Vec<_> =
        uneven_models().into_iter().flat_map(|file| ways(&options).map(|way| (file.clone(), way))).collect();
    everywhere::at_once(&of_each, |(file, options)| {
        for (tokens, depth) in TOKENS.into_iter().flat_map(|t| DEPTHS.map(|d| (t, d))) {
            if is_quick(tokens, depth) {
                check_at(file, options, &device, tokens, depth);
            }
        }
    });
}

/// Of each format: what a few tokens have, a tile, several and a part of one. Those of which a sanitizer has the time for one or two come first.
#[test]
fn steps_of_some_sizes_of_all_formats_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let wide = Shape {
        layers: 1,
        width: 256,
        ffn: 512,
        heads: 4,
        kv_heads: 1,
        head_dim: 64,
        rotated: 64,
        vocab: 61,
        ..shape("tiny-llama")
    };
    let options = Options::new(target);
    let of_each: Vec<_> = DType::WEIGHTS
        .into_iter()
        .flat_map(|dtype| {
            let file = Model::new(&wide, uniform(dtype)).file();
            // Weights that are no bytes have one way beside the exact.
            let ways = ways(&options).into_iter().skip(usize::from(!dtype.is_quantised()));
            ways.map(move |way| (file.clone(), way))
        })
        .collect();
    let steps = [(5, 1), (65, 7), (2, 511), (3, 40), (8, 100), (17, 33), (64, 0), (130, 511)];
    everywhere::at_once(&of_each, |(file, options)| {
        for &(tokens, depth) in &steps[..everywhere::cases(steps.len())] {
            check_at(file, options, &device, tokens, depth);
        }
    });
}

/// The same with activations of prompts so, and of as many layers' few tokens in two bytes.
fn with(options: &Options, prompt_activations: DType, fine_layers: u64) -> Options {
    let target = Target { prompt_activations, fine_layers, ..options.target.clone() };
    Options { target, ..options.clone() }
}

/// Activations as a target may have them: by default and the other way; and floats.
fn ways(options: &Options) -> [Options; 3] {
    [with(options, DType::F16, 2), with(options, DType::Q8Act, 0), options.clone().exact()]
}

/// Weights in 16 bits and such as are unpacked to those, of whose tiles there are so many that they are large, in ranges of the columns and in whole,
/// of all tokens that there may be and of fewer.
#[test]
fn large_tiles_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let shape = Shape {
        architecture: "qwen2",
        biases: true,
        layers: 1,
        width: 1056,
        ffn: 1120,
        heads: 33,
        kv_heads: 3,
        head_dim: 32,
        rotated: 32,
        vocab: 61,
        ..shape("tiny-llama")
    };
    let whole = Shape { width: 1024, ffn: 1280, heads: 32, kv_heads: 4, ..shape };
    let formats: Vec<DType> = DType::WEIGHTS.into_iter().filter(|dtype| *dtype != DType::F32).collect();
    everywhere::at_once(&formats, |&dtype| {
        let shape = if dtype.is_quantised() { whole } else { shape };
        let format = |name: &str| if name.ends_with("bias") { DType::F32 } else { dtype };
        let (file, options) =
            (Model::new(&shape, format).file(), with(&Options::new(target.clone()), DType::F16, 2));
        // Of the other formats tiles differ by how a share of a row is unpacked alone.
        let all = [DType::F16, DType::BF16, DType::Q4_K, DType::Q6_K, DType::Q8_0].contains(&dtype);
        let steps: &[u64] = if all { &[650, 257, 128, 70, 9] } else { &[650, 70] };
        for &tokens in &steps[..everywhere::cases(steps.len())] {
            check_in(&file, &options, &device, tokens, 0, 650);
        }
    });
}

/// One token, whose rows are so long that warps share them: as many as there are by default, and as a target may have it.
#[test]
fn warps_that_share_rows_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let long = Shape { layers: 1, width: 256, ffn: 8448, vocab: 61, ..shape("tiny-llama") };
    for dtype in DType::WEIGHTS {
        let file = Model::new(&long, uniform(dtype)).file();
        for warps in [1, 2, 4] {
            let mut options = Options::new(target.clone());
            let shape = MatvecShape { warps, ..target.shape(dtype) };
            options.target.shapes.insert(dtype, shape);
            for options in ways(&options) {
                check_at(&file, &options, &device, 1, 40);
            }
        }
    }
}

/// Heads as wide as those of an 8B, four of a group, after caches of all depths and of both types: what splits them, and what joins their parts.
#[test]
fn heads_of_128_at_all_depths_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let heads = Shape {
        heads: 8,
        kv_heads: 2,
        head_dim: 128,
        rotated: 128,
        width: 256,
        ffn: 256,
        layers: 1,
        ..shape("tiny-llama")
    };
    let file = Model::new(&Shape { vocab: 61, ..heads }, uniform(DType::Q8_0)).file();
    let options = Options::new(target);
    let kinds = [
        options.clone(),
        Options { kv: KvTypes { k: DType::F16, v: DType::F32 }, ..options.clone() },
        options.exact(),
    ];
    let of_each: Vec<_> = kinds.iter().flat_map(|options| DEPTHS.map(|depth| (options, depth))).collect();
    everywhere::at_once(&of_each, |(options, depth)| {
        let quick: Vec<u64> =
            [3, 70, 1, 8, 9].into_iter().filter(|tokens| is_quick(*tokens, *depth)).collect();
        for tokens in &quick[..everywhere::cases(quick.len())] {
            check_at(&file, options, &device, *tokens, *depth);
        }
    });
}

/// Weights so large that they go to the GPU in several lots, as planes and as the file has them: the embedding's first rows, some in the middle, and its
/// last; and all rows of the head.
#[test]
fn weights_of_several_lots_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let vocab = 150_001;
    let shape = Shape { layers: 1, vocab, width: 256, ffn: 256, ..shape("tiny-llama") };
    for dtype in [DType::F16, DType::Q8_0, DType::Q6_K] {
        let file = Model::new(&shape, uniform(dtype)).file();
        let head = file.gguf().tensor("output.weight").unwrap();
        assert!(head.shape.iter().product::<u64>() > 2 << 24, "{:?}", head.shape);
        let options = Options { context: Some(64), chunk: 8, ..Options::new(target.clone()) };
        let steps = Purpose::Score.steps(&Config::from_gguf(file.gguf()).unwrap(), &options);
        let step = steps.iter().find(|step| step.tokens >= 5).unwrap();
        let last = vocab as i32 - 1;
        let tokens = [0, last / 3, last / 2, last / 3 * 2, last];
        let outcome = check_step(&file, &options, &device, step, &tokens, 0, &mut Caches::new()).unwrap();
        for node in &outcome.nodes {
            assert!(node.passes(), "{dtype}: {node:?}");
        }
    }
}

/// What takes the interpreter longer, of one model each.
#[test]
fn large_steps_on_a_gpu() {
    let Some((target, device)) = here() else { return };
    let options = Options::new(target);
    let [fives, threes, wide, ..] = uneven_models();
    for (tokens, depth) in [(128, 16000), (513, 4095), (4096, 0)] {
        assert!(!is_quick(tokens, depth));
        check_at(&threes, &options, &device, tokens, depth);
    }
    check_at(&wide, &options, &device, 4096, 0);
    check_at(&fives, &options.exact(), &device, 4096, 0);
}

/// A few of them on the CPU, in an optimised build alone.
#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes")]
fn steps_of_some_sizes_at_some_depths_on_the_cpu() {
    let options = Options::new(Target::cpu());
    for file in uneven_models() {
        for (tokens, depth) in [(1, 0), (1, 16000), (3, 511), (9, 1), (17, 4095), (65, 511), (128, 1)] {
            check_at(&file, &options, &DeviceOptions::default(), tokens, depth);
            check_at(&file, &options.clone().exact(), &DeviceOptions::default(), tokens, depth);
        }
    }
}

/// The logits of some tokens, read in chunks.
fn logits(file: &Arc<GgufFile>, options: &Options, device: &DeviceOptions, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut session = sinter::model::session(file, None, options, Purpose::Score, device).unwrap();
    let mut rows = vec![];
    session.score(tokens, |_, row| rows.push(row.to_vec())).unwrap();
    rows
}

/// How far a row is from another, relative to that.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut a.iter().zip(b).map(|(x, y)| f64::from(x - y)));
    apart / norm(&mut b.iter().map(|x| f64::from(*x)))
}

/// A small model of each family, and the trained one in two formats.
fn models() -> impl Iterator<Item = (&'static str, Arc<GgufFile>)> {
    let tiny = TINY.into_iter().map(|shape| {
        let model = match shape.allows(DType::Q4_K) {
            true => Model::new(&shape, q4_k_m),
            false => Model::new(&shape, uniform(DType::Q8_0)),
        };
        (shape.name, model.file())
    });
    let trained = ["q4_k_m", "q8_0"].map(|format| {
        let path = format!("{}/models/rustdoc-13m-{format}.gguf", env!("CARGO_MANIFEST_DIR"));
        (format, Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap()))
    });
    tiny.chain(trained)
}

/// Whole models, fused and not, a token at a time and in chunks, against the CPU.
fn families(target: &Target, device: &DeviceOptions) {
    for (name, file) in models() {
        let tokens: Vec<u32> = (0..43).map(|i| (i * 37 + 5) % 301).collect();
        let context = Some(tokens.len() as u64);
        let exact =
            |target: &Target, chunk| Options { chunk, context, ..Options::new(target.clone()).exact() };
        let expected = logits(&file, &exact(&Target::cpu(), 16), &DeviceOptions::default(), &tokens);
        for chunk in [1, 16] {
            let fused = exact(target, chunk);
            let plain = Options { pipeline: fused.pipeline.clone().without_fusions(), ..fused.clone() };
            for (what, options) in [("fused", fused), ("--no-fuse", plain)] {
                let found = logits(&file, &options, device, &tokens);
                assert_eq!(found.len(), expected.len());
                for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let apart = distance(found, expected);
                    assert!(apart < 1e-4, "{name}, {what}, chunks of {chunk}, row {row}: {apart:e}");
                }
            }
        }
    }
}

#[test]
fn exact_logits_of_every_family_on_a_gpu_are_those_of_the_cpu() {
    let Some((target, device)) = here() else { return };
    families(&target, &device);
}

/// The same by default, which rounds activations and the cache.
#[test]
fn default_logits_of_every_family_on_a_gpu_are_close_to_exact_ones_of_the_cpu() {
    let Some((target, device)) = here() else { return };
    let tokens: Vec<u32> = (0..43).map(|i| (i * 37 + 5) % 301).collect();
    for (name, file) in models() {
        let options =
            |target: &Target, chunk| Options { chunk, context: Some(43), ..Options::new(target.clone()) };
        let expected = logits(&file, &options(&Target::cpu(), 16).exact(), &device, &tokens).concat();
        for chunk in [1, 5, 16, 43] {
            let fused = options(&target, chunk);
            let plain = Options { pipeline: fused.pipeline.clone().without_fusions(), ..fused.clone() };
            for (what, options) in [("fused", fused), ("--no-fuse", plain)] {
                let apart = distance(&logits(&file, &options, &device, &tokens).concat(), &expected);
                assert!(apart < 4e-2, "{name}, {what}, chunks of {chunk}: {apart:e}");
            }
        }
    }
}

/// By default, which rounds activations and the cache, on a text that the model knows: at once, and in steps of few tokens, which are nearer where the
/// first layers' activations are in two bytes.
#[test]
fn default_logits_on_a_gpu_are_close_to_exact_ones_of_the_cpu() {
    let Some((target, device)) = here() else { return };
    let file = Arc::new(sinter::model::embedded().unwrap());
    let tokenizer = Tokenizer::from_gguf(file.gguf()).unwrap();
    let text = include_str!("data/oracle/held_out.txt");
    let mut tokens = tokenizer.encode(text, EncodeOptions { bos: true, ..EncodeOptions::default() });
    tokens.truncate(500);
    assert_eq!(tokens.len(), 500);
    let options = |target: Target| Options { context: Some(500), ..Options::new(target) };
    let expected = logits(&file, &options(Target::cpu()).exact(), &DeviceOptions::default(), &tokens);
    let of = |options: Options| apart(&logits(&file, &options, &device, &tokens), &expected);
    let options = options(target);
    let by = |chunk: u64, fine_layers: u64| {
        with(&Options { chunk, ..options.clone() }, options.target.prompt_activations, fine_layers)
    };
    let fine = options.target.fine_layers;
    assert!(fine > 0, "no layer of it is fine by default");
    let [at_once, by_eight, one_by_one, coarse] = [by(500, fine), by(8, fine), by(1, fine), by(1, 0)].map(of);
    _ = writeln!(
        std::io::stderr(),
        "default logits and their divergence: {at_once:?} at once, {by_eight:?} by eight, {one_by_one:?} one by one, {coarse:?} with no fine layer"
    );
    for (furthest, divergence) in [at_once, by_eight, one_by_one, coarse] {
        assert!(furthest < 4e-2 && divergence < 1e-3, "{furthest:e}, {divergence:e}");
    }
    if options.target.prompt_activations == DType::F16 {
        assert!(at_once.0 < 4e-3 && at_once.1 < 5e-5, "{at_once:?}");
    }
    for fine in [by_eight, one_by_one] {
        assert!(fine.1 < 0.8 * coarse.1, "{fine:?} of {coarse:?}");
    }
}

/// The row that is furthest off, and the mean divergence. The best token is the same where it is better than the next by some.
fn apart(found: &[Vec<f32>], expected: &[Vec<f32>]) -> (f64, f64) {
    let (mut divergence, mut furthest) = (0.0, 0f64);
    for (found, expected) in found.iter().zip(expected) {
        furthest = furthest.max(distance(found, expected));
        let [p, q] = [expected, found].map(|row| log_probabilities(row));
        divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let best = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
        let margin = expected[best(expected)] - expected[best(found)];
        assert!(margin <= 0.3, "the best token is another, by {margin}");
    }
    (furthest, divergence / expected.len() as f64)
}

fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - most).exp()).sum();
    logits.iter().map(|x| f64::from(*x) - most - sum.ln()).collect()
}

/// How steps are made of which graphs are captured.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Way {
    /// Tokens of a step.
    tokens: u64,
    /// Launch by launch, not as a graph.
    eager: bool,
    /// The pages of the sequence move between steps.
    moves: bool,
}

/// The logits of steps at some depths of a cache that is full of what nobody computed, after the step was captured elsewhere, and from
/// another thread half of the times.
fn at_depths(file: &Arc<GgufFile>, options: &Options, way: Way) -> Vec<f32> {
    let Way { tokens, eager, moves } = way;
    let pages = CONTEXT / PAGE;
    let device = DeviceOptions { eager, ..DeviceOptions::default() };
    let options = Options { chunk: tokens, context: Some(CONTEXT), sequences: 2, ..options.clone() };
    let mut executor = sinter::model::executor(file, None, &options, Purpose::Score, &device).unwrap();
    let program = executor.plan().program_for(tokens, tokens, Output::Logits).unwrap();
    let mut all = vec![];
    let depths = [7, 0, 1, 511, CONTEXT - tokens, 511, 0];
    for (i, depth) in depths.into_iter().enumerate() {
        let first = if moves { pages * (i as u64 % 2) } else { 0 };
        let mut tables = vec![0; 2 * pages as usize];
        for page in 0..pages {
            let at = first + if moves { pages - 1 - page } else { page };
            tables[page as usize] = at as i32;
            // Of the sequence each page has numbers of its own, about 1 in f16 and to 0.75 in f32, wherever it is; other pages have none.
            executor.fill_rows(StateRole::Appended, at * PAGE, PAGE, 0x3c + (page % 4) as u8).unwrap();
            let other = (at + pages) % (2 * pages);
            executor.fill_rows(StateRole::Appended, other * PAGE, PAGE, 0).unwrap();
        }
        let positions = depth..depth + tokens;
        let row = |position: u64| tables[(position / PAGE) as usize] * PAGE as i32 + (position % PAGE) as i32;
        let step = StepRows {
            tokens: positions.clone().map(|position| position as i32 * 37 % 61).collect(),
            positions: positions.clone().map(|position| position as i32).collect(),
            sequences: vec![0; tokens as usize],
            rows: positions.clone().map(row).collect(),
            tables,
            lengths: vec![positions.end as i32, 0],
            wanted: (0..tokens as i32).collect(),
        };
        let mut one = vec![];
        let mut make = || {
            executor.forward(program, &step).unwrap();
            executor.read_f32(0, 0..tokens, &mut one).unwrap();
        };
        match i % 2 {
            0 => make(),
            _ => std::thread::scope(|scope| scope.spawn(make).join()).unwrap(),
        }
        all.extend_from_slice(&one);
    }
    // The first is launched, and the second compared with what its graph does.
    let has_graphs = options.target.kind != TargetKind::Cpu && !eager;
    assert_eq!(executor.replays(), if has_graphs { depths.len() as u64 - 2 } else { 0 }, "{way:?}");
    all
}

/// Other ways to make what steps make launch by launch on pages that stay.
fn other_ways(tokens: u64) -> [Way; 3] {
    [(true, true), (false, false), (false, true)].map(|(eager, moves)| Way { tokens, eager, moves })
}

/// Positions of a sequence, and of a page.
const CONTEXT: u64 = 1024;
const PAGE: u64 = sinter::ir::PAGE as u64;

/// One captured graph at the first, a middle and the last position, with pages that lie here and there, is what launches are, bit for bit: of each
/// program that has a graph. On the CPU, where there is no GPU, calls are calls.
#[test]
fn graphs_are_their_launches_at_every_depth() {
    let target = here().map_or_else(Target::cpu, |(target, _)| target);
    for (file, options) in uneven_models().iter().flat_map(|file| {
        let options = Options::new(target.clone());
        [(file, options.clone()), (file, options.exact())]
    }) {
        for tokens in [1, 2, 4, 8] {
            let expected = at_depths(file, &options, Way { tokens, eager: true, moves: false });
            assert!(expected.iter().all(|x| x.is_finite()));
            for way in other_ways(tokens) {
                assert!(at_depths(file, &options, way) == expected, "{way:?}");
            }
        }
    }
}

/// What a plan spreads over streams runs on them at once, in graphs too, and computes what it does on one.
#[test]
fn several_streams_on_a_gpu_compute_what_one_does() {
    let Some((target, _)) = here() else { return };
    for file in uneven_models() {
        let spread = |streams| {
            let options = Options::new(Target { streams, ..target.clone() });
            Options { pipeline: options.pipeline.clone().without_fusions(), ..options }
        };
        let expected = at_depths(&file, &spread(1), Way { tokens: 1, eager: true, moves: false });
        for way in other_ways(1) {
            assert!(at_depths(&file, &spread(4), way) == expected, "{way:?}");
        }
    }
}
