//! Goldens of each pass alone and of the whole pipeline, and a negative test for each reason to reject.

mod common;

use common::{fuse, input, line, parse, rejections};
use sinter::ir::fused::Computation;
use sinter::ir::{DType, Decision, Kernel, Op, Outcome, Why, verify};
use sinter::passes::{Pipeline, names};
use sinter::target::Target;

/// What the passes make of an input on the frozen target: the graph, then every decision.
fn golden(snapshot: &str, name: &str, passes: &[&str]) {
    let mut graph = input(name);
    let report = fuse(&mut graph, passes, &Target::test_wave32());
    let decisions: Vec<String> = report.decisions.iter().map(line).collect();
    let (before, after) = (report.before.count(), report.after.count());
    let text = format!("{graph}\n\n{}\n\n{before} launches -> {after}", decisions.join("\n"));
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(snapshot, text);
    });
}

macro_rules! goldens {
    ($($test:ident: $input:literal, $passes:expr;)*) => {$(
        #[test]
        fn $test() {
            golden(stringify!($test), $input, &$passes);
        }
    )*};
}

goldens! {
    cleanup: "cleanup", ["cleanup"];
    quantise_acts: "quantise_acts", ["cleanup", "quantise_acts"];
    dequant_matmul: "dequant_matmul", ["dequant_matmul"];
    dequant_matmul_takes_the_residual: "residual", ["dequant_matmul", "add_rmsnorm"];
    add_rmsnorm_takes_the_residual: "residual_decode", ["dequant_matmul", "add_rmsnorm"];
    dequant_rmsnorm: "dequant_rmsnorm", ["dequant_rmsnorm"];
    dequant_rmsnorm_of_a_half_precision_weight: "norm_weight_f16", ["dequant_rmsnorm"];
    rope_kv: "rope_kv", ["rope_kv"];
    rope_kv_after_dequant_matmul: "rope_kv", ["dequant_matmul", "rope_kv"];
    rope_kv_of_keys_only: "rope_kv_keys_only", ["rope_kv"];
    merge: "merge", ["dequant_matmul", "merge"];
    add_rmsnorm: "add_rmsnorm", ["add_rmsnorm"];
    swiglu: "swiglu", ["swiglu"];
    swiglu_into_the_matmul: "matmul_swiglu", ["dequant_matmul", "merge", "swiglu"];
    attention: "attention", ["attention"];
    attention_of_float_caches: "attention_f32", ["attention"];
    attention_with_a_window: "window", ["attention"];
    rope_attention: "rope_attention", ["rope_kv", "attention", "rope_attention"];
    gated_scan: "gated_scan", ["gated_scan"];
    sample_head: "sample_head", ["dequant_matmul", "sample_head"];
    pipeline: "layer", names();
}

/// Runs passes on a text and returns why the last of them rejected something.
fn whys(text: &str, passes: &[&str], target: &Target) -> Vec<Why> {
    let report = fuse(&mut parse(text), passes, target);
    rejections(&report, passes[passes.len() - 1]).into_iter().cloned().collect()
}

fn wave32() -> Target {
    Target::test_wave32()
}

/// An input with one line changed.
fn edited(name: &str, from: &str, to: &str) -> String {
    let text = input(name).to_string();
    assert!(text.contains(from), "{from:?} is not in\n{text}");
    text.replace(from, to)
}

#[test]
fn multi_use_a_silu_that_is_returned() {
    let text = edited("swiglu", "return %2", "return %2, %0");
    assert!(matches!(&whys(&text, &["swiglu"], &wave32())[..], [Why::MultiUse { value }] if value == "silu"));
}

#[test]
fn multi_use_probabilities_that_are_returned() {
    let text = edited("attention_f32", "return %5", "return %5, %3");
    assert!(
        matches!(&whys(&text, &["attention"], &wave32())[..], [Why::MultiUse { value }] if value.starts_with("softmax"))
    );
}

/// Of more tokens each block would turn too much of what others turn.
#[test]
fn shape_of_many_tokens_that_are_turned_where_they_attend() {
    let passes = ["rope_kv", "attention", "rope_attention"];
    let of = |text: &str| whys(text, &passes, &wave32());
    assert_eq!(of(&input("rope_attention").to_string()), []);
    let many = of(&edited("rope_attention", "T<=4", "T<=5"));
    assert!(matches!(&many[..], [Why::Shape { detail }] if detail.contains("5 tokens")), "{many:?}");
    // Values that are attended to as keys, and keys as values.
    let text = std::fs::read_to_string("tests/snapshots/inputs/rope_attention.sir").unwrap();
    let swapped = text.replace("kv_read %k1,", "kv_read %v,").replace("kv_read %v1,", "kv_read %k1,");
    let swapped = of(&swapped.replace("kv_read %v,", "kv_read %v1,"));
    assert!(matches!(&swapped[..], [Why::Shape { .. }]), "{swapped:?}");
    // Queries that turn by another base, so in a kernel of their own.
    let other = of(&edited(
        "rope_attention",
        "%2 = rope %1, %positions {base=10000,",
        "%2 = rope %1, %positions {base=500,",
    ));
    assert!(matches!(&other[..], [Why::Shape { detail }] if detail.contains("one rope_kv")), "{other:?}");
}

#[test]
fn dtype_activations_in_half_precision() {
    let text = "graph @g(%x: f16[T,64]) sym T<=1, R<=1 {
      %f = dequant %x : f32[T,64]
      %w = weight \"w\" : f32[8,64]
      %y = matmul %f, %w : f32[T,8]
      return %y
    }";
    assert_eq!(whys(text, &["dequant_matmul"], &wave32()), [Why::Dtype { dtype: "f16".into() }]);
}

#[test]
fn shape_of_gate_and_up() {
    let text = "graph @g(%gate: f32[T,64], %up: f32[64]) sym T<=1, R<=1 {
      %s = silu %gate : f32[T,64]
      %y = mul %s, %up : f32[T,64]
      return %y
    }";
    assert!(matches!(&whys(text, &["swiglu"], &wave32())[..], [Why::Shape { .. }]));
}

#[test]
fn shape_of_activations_that_are_no_whole_blocks() {
    let text = "graph @g(%x: f32[T,40]) sym T<=1, R<=1 {
      %w = weight \"w\" : f16[8,40]
      %f = dequant %w : f32[8,40]
      %y = matmul %x, %f : f32[T,8]
      return %y
    }";
    // A float weight keeps float activations, so nothing is rejected; no quantised weight has such rows.
    assert!(whys(text, &["quantise_acts"], &wave32()).is_empty());
    let text = edited("attention_f32", "%3 = softmax %2 : f32[4,T,64]", "%3 = silu %2 : f32[4,T,64]");
    assert!(
        matches!(&whys(&text, &["attention"], &wave32())[..], [Why::Shape { detail }] if detail.contains("softmax expected"))
    );
}

/// The caches of keys and values must lie in the same pages, or one block table does not find both.
#[test]
fn shape_of_caches_in_different_pages() {
    let from = "%v = kv_read %v0, %tables, %lengths {page=32}";
    let read = |text: &str| std::fs::read_to_string(format!("tests/snapshots/inputs/{text}.sir")).unwrap();
    let text = read("attention_f32");
    assert!(text.contains(from));
    for to in
        ["%v = kv_read %v0, %tables, %lengths {page=32}", "%v = kv_read %v0, %others, %lengths {page=32}"]
    {
        let text =
            text.replace(from, to).replace("%lengths: i32[1])", "%lengths: i32[1], %others: i32[1,2])");
        let whys = whys(&text, &["attention"], &wave32());
        if to == from {
            assert!(whys.is_empty(), "{whys:?}");
        } else {
            assert!(
                matches!(&whys[..], [Why::Shape { detail }] if detail.contains("different pages")),
                "{whys:?}"
            );
        }
    }
}

/// Values that go to other rows than the keys are left to an append of their own.
#[test]
fn an_append_to_other_rows_is_no_part_of_rope_kv() {
    let text = std::fs::read_to_string("tests/snapshots/inputs/rope_kv.sir").unwrap();
    let append = "%v1 = kv_append %v0, %v, %rows";
    assert!(text.contains(append));
    let text = text.replace(append, "%v1 = kv_append %v0, %v, %others");
    let text = text.replace("%rows: i32[T])", "%rows: i32[T], %others: i32[T])");
    let mut graph = parse(&text);
    fuse(&mut graph, &["rope_kv"], &wave32());
    let text = graph.to_string();
    assert!(text.contains("fused rope_kv") && text.contains(", %others : f16[128,2,32]\n"), "{text}");
}

#[test]
fn effect_between_values_that_need_the_new_cache() {
    // The values' bias is read from the keys' new cache: both appends cannot be one launch.
    let text = "graph @g(%x: f32[1,64], %positions: i32[1], %sequences: i32[1], %rows: i32[1], %tables: i32[1,1], %lengths: i32[1]) {
      %wk = weight \"k\" : f32[64,64]
      %yk = matmul %x, %wk : f32[1,64]
      %hk = reshape %yk : f32[1,2,32]
      %k = rope %hk, %positions {base=10000, dims=32, style=neox} : f32[1,2,32]
      %k0 = state \"k\" : f32[32,2,32] appended
      %k1 = kv_append %k0, %k, %rows : f32[32,2,32]
      %kr = kv_read %k1, %tables, %lengths {page=32} : f32[1,32,2,32]
      %s = scores %hk, %kr, %sequences {scale=1} : f32[2,1,32]
      %m = weighted_sum %s, %kr, %sequences : f32[1,2,32]
      %bias = reshape %m : f32[64]
      %wv = weight \"v\" : f32[64,64]
      %yv = matmul %x, %wv : f32[1,64]
      %bv = add %yv, %bias : f32[1,64]
      %hv = reshape %bv : f32[1,2,32]
      %v0 = state \"v\" : f32[32,2,32] appended
      %v1 = kv_append %v0, %hv, %rows : f32[32,2,32]
      return %k1, %v1
    }";
    let whys = whys(text, &["dequant_matmul", "rope_kv"], &wave32());
    assert!(matches!(&whys[..], [Why::EffectBetween { .. }]), "{whys:?}");
}

#[test]
fn dependent_matmuls_of_one_input() {
    // The second weight-matmul's bias is computed from the first one's result: they share an input, but not a time.
    let text = "graph @g(%x: f32[1,64]) sym T<=1, R<=1 {
      %a = weight \"a\" : f32[64,64]
      %ya = matmul %x, %a : f32[1,64]
      %s = silu %ya : f32[1,64]
      %bias = reshape %s : f32[64]
      %b = weight \"b\" : f32[64,64]
      %yb = matmul %x, %b : f32[1,64]
      %yb1 = add %yb, %bias : f32[1,64]
      return %ya, %yb1
    }";
    let whys = whys(text, &["dequant_matmul", "merge"], &wave32());
    assert!(matches!(&whys[..], [Why::Dependent { .. }]), "{whys:?}");
}

#[test]
fn target_lacks_integer_dots() {
    let none = Target { dot4_gops: None, ..wave32() };
    let slow = Target { dot4_gops: Some(1.0), ..wave32() };
    for target in [none, slow] {
        let whys = whys(&input("quantise_acts").to_string(), &["quantise_acts"], &target);
        assert!(matches!(&whys[..], [Why::TargetLacks { .. }, Why::TargetLacks { .. }]), "{whys:?}");
    }
}

/// Of a GPU's steps of few tokens, and of as many layers as the target has it; whatever is fused afterwards.
#[test]
fn activations_of_the_first_layers_are_in_two_bytes() {
    let of = |layer: u64, tokens: u64, target: &Target| {
        let mut graph = parse(&format!(
            "graph @g(%x: f32[T,256]) sym T<={tokens}, R<=1 {{
              %n = weight \"blk.{layer}.ffn_norm.weight\" : f32[256]
              %w = weight \"blk.{layer}.ffn_down.weight\" : q4_k[8,256]
              %a = rms_norm %x, %n {{eps=0.5}} : f32[T,256]
              %f = dequant %w : f32[8,256]
              %y = matmul %a, %f : f32[T,8]
              return %y
            }}"
        ));
        Pipeline::standard(false).run(&mut graph, target).unwrap();
        let text = verify(graph).unwrap().to_string();
        assert!(text.contains("fused dequant_matmul"), "{text}");
        [text.contains("q8_act"), text.contains("q16_act")]
    };
    let one = Target { fine_layers: 1, ..Target::gpu("gfx90a").unwrap() };
    let [coarse, fine] = [[true, false], [false, true]];
    for (layer, tokens, target, found) in [
        (0, 1, Target::gpu("sm_90").unwrap(), fine),
        (0, 8, Target::gpu("gfx1030").unwrap(), fine),
        (1, 8, Target::gpu("sm_90").unwrap(), fine),
        (2, 8, Target::gpu("sm_90").unwrap(), coarse),
        (0, 8, one.clone(), fine),
        (1, 8, one.clone(), coarse),
        (0, 9, one, coarse),
        (0, 9, Target::gpu("sm_90").unwrap(), [false, false]),
        (0, 1, Target { fine_layers: 1, ..Target::cpu() }, coarse),
        (0, 1, wave32(), coarse),
    ] {
        assert_eq!(of(layer, tokens, &target), found, "layer {layer}, {tokens} tokens, {}", target.name);
    }
}

/// Of more than a few tokens, where the target has matrix units that take such rows; not twice, and nothing of it is told to a reader of another format.
#[test]
fn matmuls_of_prompts_may_round() {
    let matmul = |format: &str, columns: u64, tokens: u64| {
        format!(
            "graph @g(%x: f32[T,{columns}]) sym T<={tokens}, R<=1 {{
              %w = weight \"w\" : {format}[8,{columns}]
              %f = dequant %w : f32[8,{columns}]
              %y = matmul %x, %f : f32[T,8]
              return %y
            }}"
        )
    };
    let of = |format: &str, columns: u64, tokens: u64, target: Target| {
        let mut graph = parse(&matmul(format, columns, tokens));
        let report = fuse(&mut graph, &["quantise_acts"], &target);
        let rounds = graph.to_string().contains(&format!("matmul %x, %0 {{round={format}}}"));
        assert_eq!(report.rewrites.get("quantise_acts").copied().unwrap_or(0), u64::from(rounds), "{graph}");
        // Kernels are told, and a second run finds nothing.
        fuse(&mut graph, &["quantise_acts", "dequant_matmul"], &target);
        assert_eq!(graph.to_string().matches(" {round=").count(), usize::from(rounds), "{graph}");
        let body = graph.ids().into_iter().find_map(|id| match graph.op(id) {
            Op::Fused(fused) => Some(fused.read().unwrap()),
            _ => None,
        });
        let Some(Computation::Matmul(m)) = body else { panic!("{graph}") };
        assert_eq!(m.parts[0].round.is_some(), rounds);
        rounds
    };
    let named = |name: &str| Target::named(name).unwrap();
    // What is quantised, where the target has it so; else, and where there are few tokens or no whole steps, activations go in bytes.
    let in_bytes = |name: &str| Target { prompt_activations: DType::Q8Act, ..named(name) };
    let in_halves = |name: &str| Target { prompt_activations: DType::F16, ..named(name) };
    for (format, columns, tokens, target, to) in [
        ("q4_k", 256, 9, named("sm_90"), Some(DType::F16)),
        ("q8_0", 64, 9, named("gfx1100"), Some(DType::F16)),
        ("q4_k", 256, 9, in_bytes("sm_90"), None),
        ("q4_k", 256, 9, named("sm_89"), None),
        ("q4_k", 256, 8, in_halves("sm_90"), None),
        ("q8_0", 96, 9, in_halves("sm_90"), None),
        ("q4_k", 256, 9, in_halves("gfx90a"), None),
        ("q4_k", 256, 9, in_halves("gfx1030"), None),
        ("q4_k", 256, 9, in_halves("cpu"), None),
    ] {
        let mut graph = parse(&matmul(format, columns, tokens));
        fuse(&mut graph, &["quantise_acts"], &target);
        let ops = graph.ids().into_iter().map(|id| graph.op(id));
        let rounds = ops.filter_map(|op| match op {
            Op::MatMul { round } => Some(*round),
            _ => None,
        });
        assert_eq!(
            rounds.collect::<Vec<_>>(),
            [to],
            "{format}, {columns} columns, {tokens} tokens on {}",
            target.name
        );
        assert_eq!(graph.to_string().contains("quant_act"), to.is_none(), "{graph}");
    }
    // The best of all rows is found without tiles.
    let head = matmul("q4_k", 256, 9).replace("return %y", "%best = argmax %y : i32[T]\nreturn %best");
    let mut graph = parse(&head);
    fuse(&mut graph, &["quantise_acts"], &in_halves("sm_90"));
    assert!(graph.to_string().contains("quant_act"), "{graph}");
    // Why not is told of those that would have been.
    for (format, columns, tokens, target, why) in [
        ("f16", 40, 9, named("sm_90"), Some("rows of 40 are not whole steps of tiles of f16")),
        ("bf16", 64, 9, named("gfx1030"), Some("the target lacks matrix units of bf16")),
        ("f16", 64, 8, named("gfx1030"), None),
        ("f16", 64, 9, named("cpu"), None),
    ] {
        let told = whys(&matmul(format, columns, tokens), &["quantise_acts"], &target);
        let told: Vec<String> = told.iter().map(Why::to_string).collect();
        assert!(told.len() == usize::from(why.is_some()), "{told:?}");
        assert!(why.is_none_or(|why| told[0].contains(why)), "{told:?}");
    }
    assert!(of("f16", 64, 9, wave32()) && of("bf16", 64, 9, wave32()) && of("f16", 96, 512, named("sm_90")));
    assert!(!of("f16", 64, 8, wave32()) && !of("f16", 40, 9, wave32()));
    assert!(!of("f16", 64, 9, named("gfx1030")) && !of("bf16", 64, 9, named("cpu")));
}

/// Of many tokens a GPU has tiles of gates and ups of one format alone, without biases; a CPU, and few tokens, take any.
#[test]
fn gates_and_ups_without_tiles_stay_apart() {
    let text = |tokens: u64, up: &str, gate: &str| {
        let biased = if gate.is_empty() { "%gate" } else { "%b" };
        format!(
            "graph @g(%q: q8_act[T,256]) sym T<={tokens}, R<=1 {{
              %x = dequant %q : f32[T,256]
              %wg = weight \"gate\" : q4_k[512,256]
              %g = dequant %wg : f32[512,256]
              %gate = matmul %x, %g : f32[T,512]
              {gate}
              %wu = weight \"up\" : {up}[512,256]
              %u = dequant %wu : f32[512,256]
              %up = matmul %x, %u : f32[T,512]
              %s = silu {biased} : f32[T,512]
              %y = mul %s, %up : f32[T,512]
              return %y
            }}"
        )
    };
    let bias = "%c = weight \"bias\" : f32[512] %b = add %gate, %c : f32[T,512]";
    let named = |name: &str| Target::named(name).unwrap();
    for (tokens, up, gate, target, lacks) in [
        (9, "q4_k", "", "gfx1100", None),
        (9, "q6_k", "", "gfx1100", Some("tiles of gates and ups of two formats")),
        (9, "q4_k", bias, "sm_90", Some("tiles of gates and ups with biases")),
        (8, "q6_k", bias, "sm_90", None),
        (9, "q6_k", bias, "cpu", None),
    ] {
        let mut graph = parse(&text(tokens, up, gate));
        let report = fuse(&mut graph, &["dequant_matmul", "merge", "swiglu"], &named(target));
        let told: Vec<String> = rejections(&report, "swiglu").iter().map(|why| why.to_string()).collect();
        assert_eq!(told.is_empty(), lacks.is_none(), "{told:?}");
        assert!(lacks.is_none_or(|lacks| told[0].contains(lacks)), "{told:?}");
        assert_eq!(graph.to_string().contains("matmul_swiglu("), lacks.is_none(), "{graph}");
    }
}

#[test]
fn needs_logits_when_they_are_returned() {
    let text = edited("sample_head", "return %3", "return %3, %2");
    assert_eq!(whys(&text, &["dequant_matmul", "sample_head"], &wave32()), [Why::NeedsLogits]);
}

#[test]
fn cost_loses_on_a_target_with_a_slow_kernel() {
    let mut target = wave32();
    target.efficiency.insert(Kernel::Swiglu, 0.001);
    target.launch_us = 0.0;
    let whys = whys(&input("swiglu").to_string(), &["swiglu"], &target);
    assert!(
        matches!(&whys[..], [Why::CostLoses { fused_us, unfused_us, .. }] if fused_us > unfused_us),
        "{whys:?}"
    );
}

#[test]
fn fuel_stops_after_as_many_rewrites() {
    let all = fuse(&mut input("layer"), &names(), &wave32());
    let total: u64 = all.rewrites.values().sum();
    assert!(total > 20, "{total}");
    for fuel in 0..=total {
        let mut pipeline = Pipeline::standard(false);
        (pipeline.fuel, pipeline.verify_each) = (Some(fuel), true);
        let report = pipeline.run(&mut input("layer"), &wave32()).unwrap();
        assert_eq!(report.rewrites.values().sum::<u64>(), fuel);
        let exhausted =
            report.decisions.iter().any(|d| d.outcome == Outcome::Rejected { why: Why::FuelExhausted });
        assert_eq!(exhausted, fuel < total);
    }
}

#[test]
fn only_what_changes_nothing_is_folded() {
    // 0 added to -0 is 0; -0 added to anything is that.
    for (zero, folds) in [("0", false), ("-0", true)] {
        let mut graph = parse(&format!(
            "graph @g(%x: f32[T,64]) sym T<=1, R<=1 {{
              %z = const {zero} : f32[64]
              %y = add %x, %z : f32[T,64]
              %s = silu %y : f32[T,64]
              return %s
            }}"
        ));
        fuse(&mut graph, &["cleanup"], &wave32());
        assert_eq!(!graph.to_string().contains("add"), folds, "{graph}");
    }
}

#[test]
fn what_is_no_anchor_stays_silent() {
    let text = "graph @g(%x: f32[T,64]) sym T<=1, R<=1 {
      %s = silu %x : f32[T,64]
      %y = mul %x, %x : f32[T,64]
      %z = add %s, %y : f32[T,64]
      return %z
    }";
    let mut graph = parse(text);
    let report = fuse(&mut graph, &names(), &wave32());
    // Of each that is left the report says in the end which patterns it is no part of; no rule has a word on it.
    let said = |d: &Decision| matches!(&d.outcome, Outcome::Rejected { why: Why::NoPattern { .. } });
    assert!(report.decisions.iter().all(said), "{:?}", report.decisions);
    assert!(names().iter().all(|pass| rejections(&report, pass).is_empty()));
    assert_eq!(graph, parse(text));
}

#[test]
fn passes_are_selected_by_name() {
    let enabled = |list: &[&str]| Pipeline::standard(false).select(list).map(|p| p.enabled());
    assert_eq!(enabled(&["merge", "cleanup"]).unwrap(), ["cleanup", "merge"]);
    let without: Vec<&str> = names().into_iter().filter(|n| *n != "merge").collect();
    assert_eq!(enabled(&["-merge"]).unwrap(), without);
    assert_eq!(enabled(&["merge", "swiglu", "-merge"]).unwrap(), ["swiglu"]);
    assert!(enabled(&[""]).unwrap().is_empty());
    let error = enabled(&["marge"]).unwrap_err().to_string();
    assert!(error.contains("marge") && error.contains("merge"), "{error}");
    let exact = Pipeline::standard(true);
    assert!(!exact.enabled().contains(&"quantise_acts"));
    let without = exact.select(&["-swiglu"]).unwrap().enabled();
    assert!(!without.contains(&"quantise_acts") && !without.contains(&"swiglu"), "{without:?}");
}
