//! Small valid inputs, from which all others come. They are made anew each time, so they fit the formats of today.

use crate::synthetic::{Model, Shape, is_vector, shape, uniform};
use sinter::codegen::spec::HipCode;
use sinter::compile::{Options, Purpose};
use sinter::gguf::{Array, GgmlType, GgufFile, GgufWriter, Value};
use sinter::ir::DType;
use sinter::ir::Report;
use sinter::model;
use sinter::plan::{CodeObject, LoadedPlan, to_bytes};
use sinter::target::Target;
use std::sync::Arc;

/// Inputs by the names of their files.
pub type Seeds = Vec<(String, Vec<u8>)>;

/// One layer of the family of a tiny model, as small as its format allows.
fn small(family: &str) -> Shape {
    Shape {
        layers: 1,
        width: 32,
        ffn: 32,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        rotated: 8,
        vocab: 5,
        ..shape(family)
    }
}

fn file(family: &str, dtype: DType) -> Arc<GgufFile> {
    Model::new(&small(family), uniform(dtype)).file()
}

/// A layer whose weights may lie interleaved, but for two that have too few columns.
fn wide() -> Arc<GgufFile> {
    let shape = Shape { width: 256, vocab: 16, ..small("tiny-llama") };
    let format = |name: &str| match name {
        _ if is_vector(name) => DType::F32,
        "token_embd.weight" | "blk.0.attn_v.weight" => DType::Q6_K,
        _ if name.contains("output") || name.contains("down") => DType::Q4_0,
        _ => DType::Q4_K,
    };
    Model::new(&shape, format).file()
}

/// Models of each family, and tensors of each type.
pub fn gguf() -> Seeds {
    let models = [
        ("tiny-llama", DType::Q4_0),
        ("tiny-llama3", DType::BF16),
        ("tiny-qwen2", DType::Q8_0),
        ("tiny-qwen3", DType::MXFP4),
    ];
    let models = models.map(|(family, dtype)| (family.into(), file(family, dtype).bytes().to_vec()));
    let mut writer = GgufWriter::new();
    for dtype in DType::WEIGHTS {
        let bytes = (0..dtype.block_bytes()).map(|i| (i * 37) as u8).collect::<Vec<_>>();
        let ty = GgmlType::of(dtype).unwrap();
        writer.tensor(dtype.name(), ty, &[dtype.block_len() as u64], bytes).unwrap();
    }
    let values = [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(2),
        Value::I16(-2),
        Value::F32(0.5),
        Value::Bool(true),
        Value::String("text".into()),
        Value::U64(1 << 40),
        Value::I64(-3),
        Value::F64(f64::NAN),
        Value::Array(Array::Bool(vec![true, false])),
        Value::Array(Array::String(vec!["a".into(), String::new()])),
        Value::Array(Array::U16(vec![])),
        Value::Array(Array::F64(vec![1.0])),
    ];
    for (i, value) in values.into_iter().enumerate() {
        writer.metadata(format!("key.{i}"), value);
    }
    writer.metadata("general.alignment", Value::U32(64));
    let mut types = vec![];
    writer.write_to(&mut types).unwrap();
    let others = [("types".into(), types), ("wide".into(), wide().bytes().to_vec())];
    models.into_iter().chain(others).collect()
}

/// The inputs of the passes' goldens.
pub fn ir_text() -> Seeds {
    let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snapshots/inputs")).unwrap();
    let mut seeds: Seeds = folder
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_stem().unwrap().to_str().unwrap().into(), std::fs::read(&path).unwrap())
        })
        .collect();
    seeds.sort();
    // Those are as large as layers are; this one is small enough to be run.
    let small = r#"graph @small(%ids: i32[T], %positions: i32[T], %sequences: i32[T], %rows: i32[T], %tables: i32[2,3], %lengths: i32[2], %wanted: i32[R]) sym T<=2, R<=2 {
  %w0 = weight "e" : q8_0[5,32]
  %0 = get_rows %w0, %ids : q8_0[T,32]
  %1 = dequant %0 : f32[T,32]
  %c0 = const 0.5 : f32[32]
  %2 = rms_norm %1, %c0 {eps=0.00001} : f32[T,32]
  %w1 = weight "k" : f32[16,32]
  %3 = matmul %2, %w1 : f32[T,16]
  %4 = reshape %3 : f32[T,2,8]
  %5 = rope %4, %positions {base=10000, dims=8, style=neox} : f32[T,2,8]
  %s0 = state "k" : f16[8,2,8] appended
  %6 = kv_append %s0, %5, %rows : f16[8,2,8]
  %7 = kv_read %6, %tables, %lengths {page=2} : f16[2,6,2,8]
  %8 = dequant %7 : f32[2,6,2,8]
  %9 = scores %5, %8, %sequences {scale=0.25} : f32[2,T,6]
  %10 = causal_mask %9, %positions {window=4} : f32[2,T,6]
  %11 = softmax %10 : f32[2,T,6]
  %12 = weighted_sum %11, %8, %sequences : f32[T,2,8]
  %13 = silu %3 : f32[T,16]
  %14 = mul %13, %3 : f32[T,16]
  %s1 = state "h" : f32[2,16] replaced
  %15, %16 = gated_scan %s1, %3, %14, %sequences, %positions : f32[T,16], f32[2,16]
  %17 = argmax %15 : i32[T]
  %18 = reshape %12 : f32[T,16]
  %19 = get_rows %18, %wanted : f32[R,16]
  return %17, %19, %6, %16
}"#;
    seeds.push(("small".into(), small.into()));
    // Weights that may lie interleaved, read by rows and multiplied.
    let interleaved = r#"graph @interleaved(%ids: i32[T]) sym T<=2, R<=1 {
  %we = weight "e" : q6_k[16,256]
  %0 = get_rows %we, %ids : q6_k[T,256]
  %1 = dequant %0 : f32[T,256]
  %c = const 0.5 : f32[256]
  %2 = rms_norm %1, %c {eps=0.00001} : f32[T,256]
  %3 = quant_act %2 : q8_act[T,256]
  %4 = dequant %3 : f32[T,256]
  %w = weight "w" : q4_k[32,256]
  %5 = dequant %w : f32[32,256]
  %6 = matmul %4, %5 : f32[T,32]
  %7 = dequant %we : f32[16,256]
  %8 = matmul %4, %7 : f32[T,16]
  %9 = argmax %8 : i32[T]
  return %6, %9
}"#;
    seeds.push(("interleaved".into(), interleaved.into()));
    seeds
}

/// Payloads of plans: fused and not, of one program and of four.
pub fn plan() -> Seeds {
    let options = Options { context: Some(8), chunk: 4, ..Options::new(Target::cpu()) };
    let unfused = Options { pipeline: options.pipeline.clone().without_fusions(), ..options.clone() };
    let plans = [
        ("fused", file("tiny-llama3", DType::Q4_0), options.clone(), Purpose::Score),
        ("exact", file("tiny-qwen3", DType::F32), options.clone().exact(), Purpose::Score),
        ("unfused", file("tiny-qwen2", DType::Q8_0), unfused.clone(), Purpose::Score),
        ("unfused-exact", file("tiny-llama", DType::F16), unfused.exact(), Purpose::Score),
        ("steps", file("tiny-llama", DType::MXFP4), options.clone(), Purpose::Bench),
        ("interleaved", wide(), options, Purpose::Generate),
    ];
    let seed = |(name, file, options, purpose): (&str, Arc<GgufFile>, Options, Purpose)| {
        let mut plan = model::plan(&file, None, &options, purpose).unwrap();
        // Words about fusions, which nothing depends on, are most of a plan.
        plan.programs.iter_mut().for_each(|program| {
            program.report.decisions.truncate(2);
            program.report.kernels.truncate(2);
            program.report.forms.truncate(1);
        });
        let bytes = plan.to_bytes().unwrap();
        assert!(LoadedPlan::from_bytes(&bytes).is_ok());
        (name.to_string(), bytes[52..].to_vec())
    };
    let seeds = plans.into_iter().map(seed);
    seeds.chain([("targets".to_string(), for_two_targets())]).collect()
}

/// A plan for the CPU and one for a GPU, which holds what passes for machine code.
fn for_two_targets() -> Vec<u8> {
    let file = file("tiny-llama", DType::Q4_0);
    let plan = |target| {
        let options = Options { context: Some(8), chunk: 1, ..Options::new(target) };
        let mut plan = model::plan(&file, None, &options, Purpose::Generate).unwrap();
        plan.programs.iter_mut().for_each(|program| program.report = Report::default());
        plan
    };
    let mut plans = [plan(Target::cpu()), plan(Target::gpu("gfx1100").unwrap())];
    let object = |code: &HipCode| CodeObject {
        arch: "gfx1100".into(),
        source: CodeObject::hash(&code.source),
        compiler: "none".into(),
        code: vec![7; 9],
    };
    let objects = plans[1].sources().into_iter().map(object).collect();
    plans[1].objects = objects;
    to_bytes(&plans).unwrap().split_off(52)
}

/// Vocabularies of both kinds, in lines and as files.
pub fn tokenizer() -> Seeds {
    let lines = |name: &str, lines: &[&str]| (name.to_string(), lines.join("\n").into_bytes());
    let text = "text\na ab  abc <s>x\n 12345 I'll, don’t\té中\u{1f600}";
    let mut seeds = vec![
        lines(
            "llama",
            &[
                "model llama",
                "token 2 0 <unk>",
                "token 3 0 <s>",
                "token 3 0 </s>",
                "bytes",
                "token 1 -1 ▁",
                "token 1 -2 a",
                "token 1 -3 b",
                "token 1 -4 ab",
                "token 1 -5 ▁ab",
                "token 1 -0.5 c",
                text,
            ],
        ),
        lines(
            "llama-user",
            &[
                "model llama",
                "add_space_prefix false",
                "add_bos_token true",
                "bos_token_id 1",
                "token 2 0 <unk>",
                "token 4 0 <s>",
                "token 4 0 ab",
                "token 1 -1 ▁",
                "token 5 1 a",
                text,
            ],
        ),
        lines(
            "user",
            &[
                "model gpt2",
                "pre llama-bpe",
                "token 4 0 Ġ",
                "token 3 0 <s>",
                "token 1 0 a",
                "token 6 0 <0x0A>",
                text,
            ],
        ),
    ];
    for pre in ["default", "gpt-2", "llama-bpe", "dbrx", "qwen2", "qwen35", "smollm", "falcon"] {
        seeds.push(lines(
            pre,
            &[
                "model gpt2",
                &format!("pre {pre}"),
                "bytes",
                "token 1 0 ab",
                "token 1 0 Ġa",
                "token 1 0 Ġab",
                "merge a b",
                "merge Ġ a",
                "merge Ġa b",
                "token 3 0 <s>",
                "eos_token_id 259",
                text,
            ],
        ));
    }
    for pre in ["deepseek-llm", "deepseek-coder", "deepseek-v3", "tekken"] {
        seeds.push(lines(
            pre,
            &["model gpt2", &format!("pre {pre}"), "bytes", "token 1 0 ab", "merge a b", text],
        ));
    }
    let mut writer = GgufWriter::new();
    let list = |list: &[&str]| Value::Array(Array::String(list.iter().map(|s| s.to_string()).collect()));
    writer.metadata("tokenizer.ggml.model", Value::String("llama".into()));
    writer.metadata("tokenizer.ggml.tokens", list(&["<unk>", "<s>", "</s>", "▁", "a", "<0x0A>"]));
    writer.metadata("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0, 0.0, 0.0, -1.0, -2.0, 0.0])));
    writer.metadata("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![2, 3, 3, 1, 1, 6])));
    writer.metadata("tokenizer.ggml.eot_token_id", Value::U32(2));
    let mut file = vec![];
    writer.write_to(&mut file).unwrap();
    file.extend(b"a aa \n<s>");
    seeds.push(("file".into(), file));
    seeds
}
