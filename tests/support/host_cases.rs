//! The models whose kernels run on the host, and what programs of large ones are made of beside them.

use super::kinds::kinds;
use super::synthetic::{Model, Shape, TINY, q4_k_m, shape, uniform};
use sinter::codegen::spec::{Code, HipCode, Program};
use sinter::codegen::{self, Layouts};
use sinter::compile::{Options, Purpose, compile, fuse};
use sinter::gguf::{Gguf, GgufFile};
use sinter::ir::{DType, KvTypes, verify};
use sinter::lower::{Config, Step};
use sinter::target::{MatvecShape, Target, TargetKind};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

/// A model, and how its kernels are made.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub file: Arc<GgufFile>,
    pub options: Options,
    /// What the prompt's program is for; those after it are for the best token if the options say so.
    purpose: Purpose,
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens of the steps after it, each in the smallest program that holds them.
    after: &'static [usize],
}

/// Each in a program of its own: of eight, four, two tokens and one, the first two not full.
const FEW: &[usize] = &[5, 3, 2, 1];

/// Types of caches that are not the default, nor that of `--exact`.
const CACHES: [(DType, DType); 3] =
    [(DType::F16, DType::F32), (DType::F32, DType::F16), (DType::F32, DType::F32)];

impl Case {
    fn new(name: impl Into<String>, file: Arc<GgufFile>, options: &Options) -> Case {
        let name = name.into() + if options.is_exact() { " exact" } else { "" };
        let options = options.clone();
        Case { name, file, options, purpose: Purpose::Score, prompt: 13, after: &[1] }
    }

    /// The steps that run one after another, each on these tokens.
    pub fn runs(&self) -> Vec<(Step, Vec<i32>)> {
        let config = Config::from_gguf(self.file.gguf()).unwrap();
        let vocab = self.file.gguf().tensor("token_embd.weight").unwrap().shape[0] as i32;
        let tokens = |count: usize| (0..count as i32).map(|i| (i * 37 + 5) % vocab).collect();
        let steps = |purpose: Purpose| purpose.steps(&config, &self.options);
        let prompt = *steps(self.purpose).last().unwrap();
        let after = steps(if self.options.greedy { Purpose::Generate } else { self.purpose });
        let fits = |count: usize| *after.iter().find(|step| step.tokens >= count as u64).unwrap();
        let mut runs = vec![(prompt, tokens(self.prompt))];
        runs.extend(self.after.iter().map(|&count| (fits(count), tokens(count))));
        runs
    }

    /// The kernels that they launch.
    pub fn codes(&self) -> Vec<HipCode> {
        let code_of = |(step, _): &(Step, Vec<i32>)| {
            let (graph, _) = fuse(self.file.gguf(), &self.options, step).unwrap();
            let graph = verify(graph).unwrap();
            let layouts = Layouts::choose([&graph], &self.options.target).unwrap();
            codes(&codegen::generate(&graph, &self.options.target, &layouts).unwrap())
        };
        self.runs().iter().flat_map(code_of).collect()
    }
}

/// The kernels that a program launches.
fn codes(program: &Program) -> Vec<HipCode> {
    let launches = program.kernels.iter().flat_map(|kernel| &kernel.launches);
    let code = launches.map(|launch| match &launch.code {
        Code::Hip(code) => code.clone(),
        Code::Cpu(_) => panic!("a kernel of another device"),
    });
    code.collect()
}

/// Rows and heads that are normed by several warps of 64.
const WIDE: Shape = Shape {
    name: "wide",
    architecture: "qwen3",
    layers: 1,
    width: 768,
    ffn: 256,
    heads: 2,
    kv_heads: 1,
    head_dim: 256,
    rotated: 256,
    vocab: 96,
    ..TINY[0]
};

/// A layer that runs in no time.
const ONE: Shape = Shape { layers: 1, width: 256, ffn: 256, vocab: 96, ..TINY[0] };

/// Those that run each time: in waves of 32 all formats and families, in waves of 64 all formats in float32 throughout.
pub fn some(target: &Target) -> Vec<Case> {
    use DType::{F16, Q2_K, Q3_K, Q4_0, Q4_K, Q8_0};
    let bytes = &in_bytes(target);
    let all = &DType::WEIGHTS;
    match target.wave {
        32 => [
            cases(bytes, all, &[Q2_K], &TINY),
            large(bytes),
            unpacked(target, all),
            fine(target, all),
            units(target, all),
        ]
        .concat(),
        _ => {
            let shapes = [shape("tiny-odd"), shape("tiny-phi3"), WIDE];
            let formats = [Q4_0, Q4_K, Q8_0, F16, Q3_K];
            [cases(bytes, &formats, all, &shapes), unpacked(target, &[Q4_K]), fine(target, &[Q4_K])].concat()
        }
    }
}

/// What device.h has another way for where there is no matrix unit, or no dot product: prompts, whose tiles are wide and narrow and whose
/// heads are of 64 and of 128, and floats of a few tokens.
pub fn otherwise(target: &Target) -> Vec<Case> {
    let options = Options { context: Some(96), chunk: 70, ..Options::new(target.clone()) };
    let wide = Options { context: Some(4096), chunk: 4096, ..options.clone() };
    let long = Shape { heads: 2, kv_heads: 1, head_dim: 128, rotated: 128, ..ONE };
    let mut cases = vec![];
    for (name, shape) in [("heads of 64", ONE), ("heads of 128", long)] {
        let file = Model::new(&shape, q4_k_m).file();
        for (tiles, options) in [("narrow", &options), ("wide", &wide)] {
            let case = Case::new(format!("{name}, {tiles} tiles"), file.clone(), options);
            cases.push(Case { prompt: 70, after: FEW, ..case });
        }
    }
    for dtype in [DType::Q8_0, DType::Q4_K] {
        cases.push(Case { after: FEW, ..Case::new(dtype.to_string(), of(dtype), &options.clone().exact()) });
    }
    cases
}

/// All that there are.
pub fn all(target: &Target) -> Vec<Case> {
    let formats = &DType::WEIGHTS;
    let shapes = [&TINY[..], &[WIDE]].concat();
    let bytes = &in_bytes(target);
    let halves = [unpacked(target, formats), fine(target, formats)].concat();
    let units = if target.wave == 32 { units(target, formats) } else { vec![] };
    [cases(bytes, formats, formats, &shapes), large(bytes), otherwise(bytes), halves, units].concat()
}

/// A layer of each format, and of some in float32 throughout; models of families and of an odd shape; and what options make.
fn cases(target: &Target, formats: &[DType], exact: &[DType], shapes: &[Shape]) -> Vec<Case> {
    let options = Options { context: Some(96), chunk: 13, ..Options::new(target.clone()) };
    let greedy = Options { greedy: true, ..options.clone() };
    let file = Model::new(&ONE, q4_k_m).file();
    let mut cases = vec![];
    for dtype in formats {
        cases.push(Case { after: FEW, ..Case::new(dtype.to_string(), of(*dtype), &greedy) });
    }
    for dtype in exact {
        let case = Case::new(dtype.to_string(), of(*dtype), &greedy.clone().exact());
        cases.push(Case { after: FEW, ..case });
    }
    // Rows of numbers that are no whole tiles, nor all of them whole vectors.
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let uneven = Shape { width: 96, ffn: 164, heads: 4, head_dim: 40, rotated: 40, ..ONE };
        let file = Model::new(&uneven, uniform(dtype)).file();
        cases.push(Case { after: FEW, ..Case::new(format!("{dtype} in uneven rows"), file, &greedy) });
    }
    // Rows of which tiles of few tokens have a range each, the second a step more than the first, with biases; and parts of a merged matmul that
    // go in tiles of several kinds.
    let long = Shape { architecture: "qwen2", biases: true, width: 512, ffn: 544, ..ONE };
    for dtype in [DType::F16, DType::BF16] {
        let file = Model::new(&long, uniform(dtype)).file();
        cases.push(Case::new(format!("{dtype} in ranges of columns"), file, &options));
    }
    // Of so many tokens that tiles are large: two of tokens, one or more of rows, and those of downs in two ranges.
    let many = Options { context: Some(4096), chunk: 4096, ..options.clone() };
    let wide = Shape { width: 160, heads: 2, head_dim: 80, rotated: 80, ffn: 544, ..ONE };
    for dtype in [DType::F16, DType::BF16] {
        let case =
            Case::new(format!("{dtype} in large tiles"), Model::new(&wide, uniform(dtype)).file(), &many);
        cases.push(Case { prompt: 140, after: &[], ..case });
    }
    let several = Model::new(&long, |name| match name {
        name if name.contains("attn_q") => DType::F16,
        name if name.contains("attn_k") => DType::BF16,
        _ => DType::F32,
    });
    cases.push(Case::new("tiles of several kinds", several.file(), &options));
    // In the shapes that matvecs do not have by default, and in rows so long that warps share them.
    for dtype in [DType::Q4_0, DType::Q8_0, DType::Q4_K, DType::Q6_K, DType::F16] {
        let MatvecShape { rows, pairs, .. } = target.shape(dtype);
        let mut options = options.clone();
        options.target.shapes.insert(dtype, MatvecShape { rows: 3 - rows, pairs: 3 - pairs, warps: 4 });
        cases.push(Case::new(format!("{dtype} in another shape"), of(dtype), &options));
        let long = Model::new(&Shape { ffn: 8448, vocab: 33, ..ONE }, uniform(dtype)).file();
        let options = Options { chunk: 1, ..options };
        for (how, options) in [("", &options), (", unfused", &unfused(&options))] {
            let case = Case::new(format!("{dtype}, rows that warps share{how}"), long.clone(), options);
            cases.push(Case { purpose: Purpose::Generate, prompt: 1, after: &[], ..case });
        }
    }
    for shape in shapes {
        let shape = Shape { layers: 1, vocab: shape.vocab.min(128), ..*shape };
        let format = |name: &str| match shape.allows(DType::Q4_K) {
            true => q4_k_m(name),
            false => uniform(DType::Q8_0)(name),
        };
        let case = Case::new(shape.name, Model::new(&shape, format).file(), &options);
        cases.push(Case { after: if shape.name == "tiny-odd" { FEW } else { &[1] }, ..case });
    }
    cases.push(Case { purpose: Purpose::Generate, ..Case::new("the best token", file.clone(), &greedy) });
    let apart = ["-swiglu", "-add_rmsnorm", "-dequant_rmsnorm", "-merge", "-dequant_matmul"];
    for options in [options.clone(), options.clone().exact()] {
        let pipeline = options.pipeline.clone().select(&apart).unwrap();
        cases.push(Case::new("in part fused", file.clone(), &Options { pipeline, ..options }));
    }
    for options in [greedy.clone(), greedy.exact()] {
        cases.push(Case::new("unfused", file.clone(), &unfused(&options)));
    }
    for dtype in formats {
        // Of a single token, as what it takes to dequantise is the same of many.
        let options = Options { chunk: 1, ..unfused(&options) };
        let case = Case::new(format!("{dtype} unfused"), of(*dtype), &options);
        cases.push(Case { prompt: 1, after: &[], ..case });
    }
    cases
}

/// Prompts whose activations are rounded to F16 and whose weights are unpacked to it, a layer of each format: rows of 256 columns, and of 512, which
/// have ranges; in small tiles, and of one format in large ones. Then formats that are merged, with biases, and rows that are no whole tiles.
fn unpacked(target: &Target, formats: &[DType]) -> Vec<Case> {
    let few = Options { context: Some(96), chunk: 13, ..Options::new(with(target, DType::F16)) };
    let many = Options { context: Some(4096), chunk: 4096, ..few.clone() };
    let mut cases = vec![];
    for dtype in formats.iter().copied().filter(|dtype| dtype.is_quantised()) {
        let file = Model::new(&Shape { ffn: 512, ..ONE }, uniform(dtype)).file();
        let case = Case::new(format!("{dtype} unpacked in small tiles"), file.clone(), &few);
        cases.push(Case { after: &[], ..case });
        if dtype == (if target.wave == 32 { DType::Q6_K } else { DType::Q4_K }) {
            // Two of tokens.
            let case = Case::new(format!("{dtype} unpacked in large tiles"), file, &many);
            cases.push(Case { prompt: 140, after: &[], ..case });
        }
    }
    // Of one step, of five, and of ranges of four and five; gates and ups of rows that are no whole tiles.
    let one = Shape { heads: 2, kv_heads: 1, head_dim: 32, rotated: 32, width: 64, ffn: 336, ..ONE };
    let five = Shape { heads: 5, kv_heads: 1, width: 320, ffn: 576, ..ONE };
    for (steps, shape, options, prompt) in
        [("one step", one, &few, 13), ("five steps", five, &few, 13), ("five steps, large", five, &many, 20)]
    {
        let file =
            Model::new(&shape, |name| match name.contains("ffn_down") && !shape.ffn.is_multiple_of(32) {
                true => DType::F32,
                false => uniform(DType::Q8_0)(name),
            });
        let file = file.file();
        cases.push(Case { prompt, after: &[], ..Case::new(format!("{steps} unpacked"), file, options) });
    }
    let uneven = Shape {
        architecture: "qwen2",
        biases: true,
        heads: 3,
        kv_heads: 1,
        head_dim: 32,
        rotated: 32,
        ffn: 768,
        ..ONE
    };
    let merged = Model::new(&uneven, |name| match name {
        name if name.ends_with("bias") => DType::F32,
        name if name.contains("attn_q") => DType::Q6_K,
        name if name.contains("attn_k") => DType::F16,
        name if name.contains("attn_output") => DType::BF16,
        _ => DType::Q5_K,
    });
    cases.push(Case {
        prompt: 70,
        ..Case::new("merged formats unpacked", merged.file(), &Options { chunk: 70, ..few })
    });
    cases
}

/// Few tokens whose activations are in two bytes each, a layer of each format, of several that are merged, and unfused.
fn fine(target: &Target, formats: &[DType]) -> Vec<Case> {
    let options = Options { context: Some(96), chunk: 8, greedy: true, ..Options::new(target.clone()) };
    let mut cases = vec![];
    let mut add = |name: String, file: Arc<GgufFile>, options: &Options| {
        cases.push(Case { prompt: 5, after: &[3, 2, 1], ..Case::new(name, file, options) });
    };
    for dtype in formats.iter().copied().filter(|dtype| dtype.is_quantised()) {
        add(format!("{dtype} of a fine layer"), of(dtype), &options);
    }
    for shape in [ONE, Shape { head_dim: 40, rotated: 40, width: 160, ffn: 544, ..ONE }] {
        let format = if shape.width == 256 { q4_k_m } else { |name: &str| uniform(DType::Q8_0)(name) };
        let file = Model::new(&shape, format).file();
        add("a fine layer".into(), file.clone(), &options);
        add("a fine layer, unfused".into(), file, &unfused(&options));
    }
    if target.wave == 32 {
        let file = Model::new(&ONE, q4_k_m).file();
        for (k, v) in CACHES {
            let options = Options { kv: KvTypes { k, v }, ..options.clone() };
            add(format!("a fine layer with caches of {k} and {v}"), file.clone(), &options);
        }
    }
    let three = Model::new(&Shape { layers: 3, ..ONE }, q4_k_m).file();
    let case = Case::new("fine layers and another", three, &Options { chunk: 1, greedy: false, ..options });
    cases.push(Case { purpose: Purpose::Generate, prompt: 1, after: &[], ..case });
    cases
}

/// Few tokens that NVIDIA's matrix units multiply, a layer of each format, with activations in one byte and in two; rows that more warps share, of more
/// tiles, the last of them not full, with biases; and formats that are merged.
fn units(target: &Target, formats: &[DType]) -> Vec<Case> {
    let fine = Target { kind: TargetKind::HipNvidia, units_from: Some(2), ..target.clone() };
    let coarse = Target { fine_layers: 0, ..fine.clone() };
    let mut cases = vec![];
    let mut add = |name: String, file: Arc<GgufFile>, target: &Target| {
        let options = Options { context: Some(96), chunk: 8, ..Options::new(target.clone()) };
        let case = Case::new(format!("{name} on units"), file, &options);
        let case = Case { prompt: 5, after: &[8, 3, 2], ..case };
        assert!(case.codes().iter().any(|code| code.source.contains("matvec_eight(")), "{}", case.name);
        cases.push(case);
    };
    for dtype in formats.iter().copied().filter(|dtype| dtype.is_quantised() && *dtype != DType::Q2_K) {
        add(dtype.to_string(), of(dtype), &coarse);
        add(format!("{dtype} of a fine layer"), of(dtype), &fine);
    }
    let long =
        Shape { architecture: "qwen2", biases: true, width: 1024, ffn: 4608, heads: 16, kv_heads: 4, ..ONE };
    let long = Model::new(&Shape { vocab: 3275, ..long }, |name| match name {
        name if name.ends_with("bias") => DType::F32,
        name if name.contains("attn_k") => DType::Q6_K,
        name if name.contains("ffn") => DType::Q4_K,
        _ => DType::Q8_0,
    });
    let file = long.file();
    add("long rows".into(), file.clone(), &coarse);
    add("long rows of a fine layer".into(), file, &fine);
    cases
}

/// A target whose prompts have such activations.
fn with(target: &Target, activations: DType) -> Target {
    Target { prompt_activations: activations, ..target.clone() }
}

/// A target whose activations are all in 8 bits.
fn in_bytes(target: &Target) -> Target {
    Target { fine_layers: 0, ..with(target, DType::Q8Act) }
}

/// What only large models and long prompts have, and caches of other types.
fn large(target: &Target) -> Vec<Case> {
    let options = Options { context: Some(96), ..Options::new(target.clone()) };
    let mut cases = vec![];
    // Tiles of programs of so many tokens are wide, however many run.
    let many = Options { context: Some(4096), chunk: 4096, ..options.clone() };
    for dtype in DType::WEIGHTS.into_iter().filter(|dtype| dtype.is_quantised()) {
        let case = Case::new(format!("{dtype} in wide tiles"), of(dtype), &many);
        cases.push(Case { after: &[], ..case });
    }
    let file = Model::new(&ONE, q4_k_m).file();
    cases.push(Case { prompt: 70, after: &[], ..Case::new("two tiles of tokens", file.clone(), &many) });
    for (k, v) in CACHES {
        let options = Options { kv: KvTypes { k, v }, ..options.clone() };
        // Of activations in 8 bits, and of floats.
        for (weights, file) in [("q4_k_m", &file), ("f16", &of(DType::F16))] {
            let case = Case::new(format!("{weights} with caches of {k} and {v}"), file.clone(), &options);
            cases.push(Case { after: FEW, ..case });
        }
    }
    for options in [options.clone(), options.exact()] {
        let options = Options { greedy: true, ..options };
        // Rows of which each lane of a wave of 32 has several chunks, not all as many.
        for (dtype, width) in [(DType::Q8_0, 2144), (DType::Q5_K, 4352)] {
            let narrow = Shape { ffn: 32, heads: 1, kv_heads: 1, head_dim: 32, rotated: 32, ..ONE };
            let file = Model::new(&Shape { width, vocab: 33, ..narrow }, |name| {
                let is_short = ["attn_output", "ffn_down"].iter().any(|part| name.contains(part));
                uniform(if is_short { DType::Q8_0 } else { dtype })(name)
            });
            let mut options = Options { chunk: 2, ..options.clone() };
            let alone = MatvecShape { warps: 1, ..target.shape(dtype) };
            options.target.shapes.insert(dtype, alone);
            let case = Case::new(format!("{dtype} in long rows"), file.file(), &options);
            cases.push(Case { purpose: Purpose::Generate, prompt: 2, ..case });
        }
        // So many words that a block seeks the best of some more than once.
        let model = Model::new(&Shape { vocab: 16_500, tied: true, ..ONE }, uniform(DType::Q8_0));
        // Of this seed it is not among the first.
        let case =
            Case::new("many words", Model { seed: 1, ..model }.file(), &Options { chunk: 1, ..options });
        cases.push(Case { purpose: Purpose::Generate, prompt: 1, after: &[], ..case });
    }
    cases
}

/// A model of one layer in a format, with more heads of a group where its activations are floats.
fn of(dtype: DType) -> Arc<GgufFile> {
    let kv_heads = if dtype.is_quantised() { 2 } else { 1 };
    Model::new(&Shape { kv_heads, ..ONE }, uniform(dtype)).file()
}

fn unfused(options: &Options) -> Options {
    Options { pipeline: options.pipeline.clone().without_fusions(), ..options.clone() }
}

/// The kinds of code that these cases run.
pub fn kinds_of_cases(cases: &[Case]) -> BTreeSet<String> {
    let kinds_of = |case: &Case| {
        let wave = case.options.target.wave.into();
        case.codes().iter().flat_map(|code| kinds(code, wave)).collect::<Vec<_>>()
    };
    cases.iter().flat_map(kinds_of).collect()
}

/// The kinds of code that models are compiled to, each with where it was met first: of the default model and an 8B in Q4_K_M, and, where
/// all `formats` are asked for, an 8B in each; fused or not, exact or not, to give logits or the best token, of one sequence or several, with
/// caches of each type.
pub fn kinds_of_models(target: &Target, formats: bool) -> BTreeMap<String, String> {
    let model = |layers: u64, format: &dyn Fn(&str) -> DType| {
        Model::new(&Shape { layers, ..shape("llama-3.1-8b") }, format).description()
    };
    let embedded = sinter::model::embedded().unwrap();
    // Layers beyond these have the same kernels.
    let mut models: Vec<(String, Gguf)> =
        vec![("13m".into(), embedded.gguf().clone()), ("8b".into(), model(2, &q4_k_m))];
    for dtype in DType::WEIGHTS.into_iter().filter(|_| formats) {
        models.push((format!("8b {dtype}"), model(1, &uniform(dtype))));
    }
    let (mut seen, mut kinds_of_all) = (HashSet::new(), BTreeMap::new());
    for (how, options, purpose) in ways(target) {
        for (model, gguf) in &models {
            for compiled in compile(gguf, &options, purpose).unwrap() {
                for code in codes(&compiled.program) {
                    if !seen.insert(code.source.clone()) {
                        continue;
                    }
                    let tokens = compiled.program.bounds.t;
                    let place = || format!("{} of {model} t{tokens}, {how}, {}", code.entry, target.name);
                    for kind in kinds(&code, target.wave.into()) {
                        kinds_of_all.entry(kind).or_insert_with(place);
                    }
                }
            }
        }
    }
    kinds_of_all
}

/// How models are compiled.
fn ways(target: &Target) -> Vec<(String, Options, Purpose)> {
    let default = Options::new(target.clone());
    let mut ways = vec![];
    for (precision, options) in [("", default.clone()), (" exact", default.clone().exact())] {
        for (fused, options) in [("fused", options.clone()), ("unfused", unfused(&options))] {
            let mut add = |what: &str, options: Options, purpose: Purpose| {
                ways.push((format!("{fused}{precision} {what}"), options, purpose));
            };
            add("to generate", options.clone(), Purpose::Generate);
            add("to score", options.clone(), Purpose::Score);
            add("for the best token", Options { greedy: true, ..options.clone() }, Purpose::Generate);
            add("of four sequences", Options { sequences: 4, ..options }, Purpose::Bench);
        }
    }
    let bytes = Options { target: in_bytes(target), ..default.clone() };
    for (fused, options) in [("fused", bytes.clone()), ("unfused", unfused(&bytes))] {
        for (what, purpose) in [("to generate", Purpose::Generate), ("to score", Purpose::Score)] {
            ways.push((format!("{fused} in bytes {what}"), options.clone(), purpose));
        }
    }
    for (k, v) in CACHES {
        let options = Options { kv: KvTypes { k, v }, ..default.clone() };
        ways.push((format!("with caches of {k} and {v}"), options, Purpose::Generate));
    }
    ways
}
