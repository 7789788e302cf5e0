//! Codegen takes only bodies that its kernels compute: whatever a pass, or whoever wrote a graph, calls them.

mod common;
#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use common::{fuse, input, parse};
use sinter::codegen::spec::Access;
use sinter::codegen::{self, Layouts};
use sinter::compile::{Options, Purpose, compile};
use sinter::ir::{Op, Syms, Verified, verify};
use sinter::target::Target;
use synthetic::{Model, Shape, q4_k_m, shape};

/// What codegen says of a fused graph after a change to its text.
fn generated(name: &str, passes: &[&str], from: &str, to: &str) -> Result<(), String> {
    let target = Target::test_cpu();
    let mut graph = input(name);
    fuse(&mut graph, passes, &target);
    let text = graph.to_string();
    assert!(text.contains(from), "{from} is not in\n{text}");
    let graph = verify(parse(&text.replace(from, to))).unwrap();
    codegen::generate(&graph, &target, &Layouts::default()).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn a_body_must_be_what_its_kernel_computes() {
    const ROPE: &str = "%4 = rope %3, %x1 {base=10000, dims=32, style=interleaved}";
    for (name, passes, from, to) in [
        // Keys that turn otherwise than queries: by base, by dimensions, by pairs.
        ("rope_kv", &["rope_kv"][..], ROPE, "%4 = rope %3, %x1 {base=20000, dims=32, style=interleaved}"),
        ("rope_kv", &["rope_kv"], ROPE, "%4 = rope %3, %x1 {base=10000, dims=16, style=interleaved}"),
        ("rope_kv", &["rope_kv"], ROPE, "%4 = rope %3, %x1 {base=10000, dims=32, style=neox}"),
        // Values that turn, and some that go to other rows than the keys.
        ("rope_kv", &["rope_kv"], "%7 = kv_append %x6, %6", "%7 = kv_append %x6, %4"),
        ("rope_kv", &["rope_kv"], "%7 = kv_append %x6, %6, %x5", "%7 = kv_append %x6, %6, %x1"),
        // A gate that goes through no SiLU, and one that is its own.
        ("swiglu", &["swiglu"], "%0 = silu %x0", "%0 = add %x0, %x0"),
        // An operand that has no part in it.
        ("swiglu", &["swiglu"], "%x1 = %up)", "%x1 = %up, %x2 = %gate)"),
        // Keys and values by other block tables.
        (
            "attention_f32",
            &["attention"],
            "%x6 = %s1) : f32[T,4,32] {\n    %0 = kv_read %x1, %x2, %x3",
            "%x6 = %s1, %x7 = %tables) : f32[T,4,32] {\n    %0 = kv_read %x1, %x7, %x3",
        ),
        ("attention_f32", &["attention"], "softmax", "silu"),
        ("attention_f32", &["attention"], "causal_mask %1, %x5", "silu %1"),
        // Values of another sequence than the keys.
        ("attention_f32", &["attention"], "weighted_sum %3, %4, %x4", "weighted_sum %3, %4, %x5"),
        // A gate that goes through no SiLU, and one that is added.
        ("gated_scan", &["gated_scan"], "%0 = silu %x2", "%0 = add %x2, %x2"),
        ("gated_scan", &["gated_scan"], "%1 = mul %0, %x3", "%1 = add %0, %x3"),
        ("add_rmsnorm", &["add_rmsnorm"], "%0 = add %x0, %x1", "%0 = mul %x0, %x1"),
    ] {
        generated(name, passes, from, from).unwrap();
        let says = generated(name, passes, from, to).expect_err(&format!("{name}: {to}"));
        assert!(
            says.starts_with("the body of ") && says.contains(" is not what the kernel computes: "),
            "{says}"
        );
    }
}

#[test]
fn another_kernels_body_is_refused() {
    for (name, passes, kernel) in [
        ("swiglu", &["swiglu"][..], "swiglu"),
        ("add_rmsnorm", &["add_rmsnorm"], "add_rmsnorm"),
        ("attention_f32", &["attention"], "attention"),
        ("rope_kv", &["rope_kv"], "rope_kv"),
        ("gated_scan", &["gated_scan"], "gated_scan"),
        ("dequant_matmul", &["dequant_matmul"], "dequant_matmul"),
    ] {
        for other in [
            "swiglu",
            "add_rmsnorm",
            "attention",
            "rope_kv",
            "gated_scan",
            "dequant_matmul",
            "sample_head",
            "merge",
        ] {
            let (from, to) = (format!("fused {kernel}("), format!("fused {other}("));
            let found = generated(name, passes, &from, &to);
            // A merge of one part is a plain matmul.
            let alike = kernel == other || (kernel, other) == ("dequant_matmul", "merge");
            assert_eq!(found.is_ok(), alike, "{kernel} as {other}: {found:?}");
        }
    }
}

/// Products of quantised activations with the weights that `text` declares by name, format and rows, after the passes.
fn products(weights: &str) -> Verified {
    let mut text = "graph @g(%x: f32[T,256], %ids: i32[T]) sym T<=4, R<=4 {\n".to_string();
    let mut results = vec![];
    for (i, line) in weights.lines().map(str::trim).enumerate() {
        let (weight, rows) = line.rsplit_once(' ').unwrap();
        text +=
            &format!("  %w{i} = weight {weight}[{rows},256]\n  %d{i} = dequant %w{i} : f32[{rows},256]\n");
        text += &format!("  %y{i} = matmul %x, %d{i} : f32[T,{rows}]\n");
        results.push(format!("%y{i}"));
    }
    text += &format!("  return {}\n}}\n", results.join(", "));
    let mut graph = parse(&text);
    fuse(&mut graph, &["quantise_acts", "dequant_matmul"], &Target::test_cpu());
    verify(graph).unwrap()
}

/// The layout of each weight of a graph.
fn layouts(graphs: &[&Verified]) -> Vec<String> {
    let chosen = Layouts::choose(graphs.iter().copied(), &Target::test_cpu()).unwrap();
    let mut found = vec![];
    for id in graphs[0].ids() {
        if let Op::Weight { name, rows } = graphs[0].op(id) {
            found.push(format!("{name} {}", chosen.of(name, *rows).name()));
        }
    }
    found
}

#[test]
fn weights_lie_as_all_their_uses_take_them() {
    let graph = products(
        "\"a\" : q4_k 64
         \"b\" : q6_k 16
         \"few\" : q4_k 40
         \"other\" : q5_k 64
         \"first\" from 0 of 64 : q4_k 32
         \"first\" from 32 of 64 : q4_k 32
         \"twice\" from 0 of 64 : q4_k 48
         \"twice\" from 16 of 64 : q4_k 48
         \"half\" : f16 32",
    );
    let want = [
        "a interleaved16",
        "b interleaved16",
        "few row-major",
        "other row-major",
        "first interleaved16",
        "first interleaved16",
        // Rows that both have would be there twice.
        "twice row-major",
        "twice row-major",
        "half row-major",
    ];
    assert_eq!(layouts(&[&graph]), want);

    // Another program that reads a weight as floats has a say.
    let mut other = input("quantise_acts");
    fuse(&mut other, &["dequant_matmul"], &Target::test_cpu());
    let other = verify(other).unwrap();
    let named = products("\"q\" : q4_k 64\n\"k\" : q6_k 32\n\"lone\" : q4_k 64");
    assert_eq!(layouts(&[&named])[..2], ["q interleaved16", "k interleaved16"]);
    assert_eq!(layouts(&[&named, &other]), ["q row-major", "k row-major", "lone interleaved16"]);
}

/// What does not fit the memory that a block shares is fused otherwise or not, and said; it is never an error of codegen.
#[test]
fn the_widest_models_have_kernels_on_gpus() {
    let one = Shape { layers: 1, vocab: 256, ffn: 512, ..shape("llama-3.1-8b") };
    let rows = Shape { width: 12_288, heads: 96, kv_heads: 8, ..one };
    let heads =
        |head_dim: u64| Shape { width: 1024, heads: 2, kv_heads: 1, head_dim, rotated: head_dim, ..one };
    let mut lacks = std::collections::BTreeMap::<String, u64>::new();
    for shape in [rows, heads(512), heads(1024)] {
        let model = Model::new(&shape, q4_k_m).description();
        for arch in ["gfx900", "gfx942", "gfx1100", "sm_90"] {
            let options = Options::new(Target::gpu(arch).unwrap());
            for options in [options.clone(), options.exact()] {
                let compiled = compile(&model, &options, Purpose::Generate);
                for compiled in compiled.unwrap_or_else(|e| panic!("{shape:?} on {arch}: {e}")) {
                    for decision in &compiled.report.decisions {
                        if format!("{decision:?}").contains("shared memory for") {
                            *lacks.entry(decision.pass.clone()).or_default() += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(lacks.keys().collect::<Vec<_>>(), ["dequant_rmsnorm", "rope_attention"], "{lacks:?}");
}

/// A grid that no GPU takes is refused where it is compiled for.
#[test]
fn grids_are_held_to_what_gpus_take() {
    let model = Model::new(&Shape { layers: 1, ..shape("tiny-llama") }, q4_k_m).description();
    let at = |chunk| {
        let options =
            Options { chunk, context: Some(1 << 20), ..Options::new(Target::gpu("sm_90").unwrap()) };
        let pipeline = options.pipeline.clone().without_fusions();
        compile(&model, &Options { pipeline, ..options }, Purpose::Generate).map(|_| ())
    };
    at(4096).unwrap();
    let refused = at(100_000).unwrap_err().to_string();
    assert!(refused.contains("a smaller chunk has fewer"), "{refused}");
}

/// What a layer costs beside its work: a token of an 8B goes through eight launches of each, on every GPU; unfused through many more.
#[test]
fn a_layer_takes_eight_launches_on_gpus() {
    let launches = |layers: u64, options: &Options| {
        let model = Model::new(&Shape { layers, ..shape("llama-3.1-8b") }, q4_k_m).description();
        let compiled = compile(&model, options, Purpose::Generate).unwrap();
        let program = &compiled.iter().find(|compiled| compiled.program.bounds.t == 1).unwrap().program;
        program.calls.iter().map(|call| program.kernels[call.kernel as usize].launches.len()).sum::<usize>()
    };
    for arch in ["gfx900", "gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_90"] {
        let options = Options::new(Target::gpu(arch).unwrap());
        // Behind those whose activations are in two bytes.
        assert_eq!(launches(6, &options) - launches(5, &options), 8, "{arch}");
        let unfused = Options { pipeline: options.pipeline.clone().without_fusions(), ..options };
        assert!(launches(6, &unfused) - launches(5, &unfused) > 20, "{arch}");
    }
}

/// Of a step whose last tokens nobody wants the logits of, kernels of those rows have no blocks: such a launch is not made.
#[test]
fn kernels_of_no_rows_have_no_blocks() {
    let model = Model::new(&Shape { layers: 2, ..shape("llama-3.1-8b") }, q4_k_m).description();
    let mut kernels = 0;
    for arch in ["gfx942", "gfx1100", "sm_90"] {
        let options = Options { sequences: 8, ..Options::new(Target::gpu(arch).unwrap()) };
        for options in [options.clone(), options.exact()] {
            for compiled in compile(&model, &options, Purpose::Generate).unwrap() {
                let at = Syms { r: 0, ..compiled.program.bounds };
                for kernel in &compiled.program.kernels {
                    let mut written = kernel.args().filter(|arg| arg.access != Access::Read);
                    if written.any(|arg| arg.ty.bytes(&at) > 0) {
                        continue;
                    }
                    kernels += 1;
                    for launch in &kernel.launches {
                        assert!(launch.grid.iter().any(|extent| extent.eval(&at) == 0), "{arch}: {launch:?}");
                    }
                }
            }
        }
    }
    assert!(kernels > 50, "{kernels}");
}
