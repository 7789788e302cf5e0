//! Fusing is decided by cost: for each gated pass a target on which it wins and one on which it loses, with both times.

mod common;
mod support;

use common::{fuse, input};
use sinter::compile::{self, Options, Purpose};
use sinter::ir::{DType, Decision, Gain, Graph, Kernel, Op, Outcome, Value, Why};
use sinter::lower::Config;
use sinter::passes::{Report, cost};
use sinter::target::Target;
use support::synthetic::{self, Model, Shape};

/// Where a target says so; else at that of float32.
#[test]
fn what_may_round_runs_at_the_rate_of_matrix_units() {
    let us = |round: &str, f16_gflops| {
        let text = format!(
            "graph @g(%x: f32[T,4096]) sym T<=512, R<=1 {{
              %w = weight \"w\" : f16[4096,4096]
              %f = dequant %w : f32[4096,4096]
              %y = matmul %x, %f {round}: f32[T,4096]
              return %y
            }}"
        );
        let mut graph = common::parse(&text);
        let target = Target { f16_gflops, f32_gflops: 1e3, ..Target::test_wave32() };
        let unfused = cost::of_graph(&graph, &target).arithmetic_us;
        fuse(&mut graph, &["dequant_matmul"], &target);
        let fused = cost::of_graph(&graph, &target).arithmetic_us;
        assert!(unfused > fused, "what is dequantised apart is computed");
        (unfused, fused)
    };
    let (apart, float) = us("", Some(4e3));
    // Before it is fused, floats meet floats, which no matrix unit takes.
    assert_eq!(us("{round=f16} ", None), (apart, float));
    assert_eq!(us("{round=f16} ", Some(4e3)), (apart, float / 4.0));
}

/// Each byte of an activation meets the weights.
#[test]
fn activations_in_two_bytes_are_multiplied_twice() {
    let of = |x: &str| {
        let text = format!(
            "graph @g(%x: f32[T,256]) sym T<=4, R<=1 {{
              %w = weight \"w\" : q8_0[32,256]
              %q = quant_act %x : {x}[T,256]
              %a = dequant %q : f32[T,256]
              %f = dequant %w : f32[32,256]
              %y = matmul %a, %f : f32[T,32]
              return %y
            }}"
        );
        let mut graph = common::parse(&text);
        let target = Target { dot4_gops: Some(1e3), ..Target::test_wave32() };
        let before = cost::of_graph(&graph, &target).operations;
        fuse(&mut graph, &["dequant_matmul"], &target);
        before - cost::of_graph(&graph, &target).operations
    };
    // Of 4 tokens and 32 rows of 256, two operations each.
    assert_eq!(of("q8_act") - of("q16_act"), 4 * 32 * 256 * 2);
}

/// A fusion on a frozen target, all of it bound by memory: `launch + bytes / bandwidth / efficiency` for each launch.
struct Case {
    input: &'static str,
    passes: &'static [&'static str],
    kernel: Kernel,
    /// Launches replaced.
    launches: f64,
    /// Bytes of what is replaced, launch by launch, and of the fused kernel.
    unfused: &'static [u64],
    fused: u64,
}

const CASES: [Case; 10] = [
    // 4 rows of 256: silu 4+4 KiB, mul 8+4 KiB, quant_act 4 KiB + 4·8·40.
    Case {
        input: "swiglu",
        passes: &["swiglu"],
        kernel: Kernel::Swiglu,
        launches: 3.0,
        unfused: &[8192, 12288, 4096 + 1280],
        fused: 8192 + 1280,
    },
    // Two weights of 512·144, activations 8·40, results 2·512·4; then those and 16·40.
    Case {
        input: "matmul_swiglu",
        passes: &["dequant_matmul", "merge", "swiglu"],
        kernel: Kernel::MatmulSwiglu,
        launches: 2.0,
        unfused: &[320 + 147_456 + 4096, 4096 + 640],
        fused: 320 + 147_456 + 640,
    },
    // 64·144 and 32·210 bytes of weights, the activations read twice or once.
    Case {
        input: "merge",
        passes: &["dequant_matmul", "merge"],
        kernel: Kernel::Merge,
        launches: 2.0,
        unfused: &[320 + 9216 + 256, 320 + 6720 + 128],
        fused: 320 + 9216 + 256 + 6720 + 128,
    },
    // 4 rows of 256: add, norm with its weight, quant_act; fused, sum and norm are still written.
    Case {
        input: "add_rmsnorm",
        passes: &["add_rmsnorm"],
        kernel: Kernel::AddRmsnorm,
        launches: 3.0,
        unfused: &[8192 + 4096, 4096 + 1024 + 4096, 4096 + 1280],
        fused: 8192 + 1024 + 4096 + 4096 + 1280,
    },
    // 4 rows of 210 bytes are fetched by 16 bytes of ids, not the table.
    Case {
        input: "dequant_rmsnorm",
        passes: &["dequant_rmsnorm"],
        kernel: Kernel::DequantRmsnorm,
        launches: 4.0,
        unfused: &[840 + 840 + 16, 840 + 4096, 4096 + 1024 + 4096, 4096 + 1280],
        fused: 840 + 16 + 1024 + 4096 + 1280,
    },
    // Queries, QK-norm, keys, two appends of 4 rows each; caches count by rows, of which there are 16 bytes of numbers.
    Case {
        input: "rope_kv",
        passes: &["dequant_matmul", "rope_kv"],
        kernel: Kernel::RopeKv,
        launches: 5.0,
        unfused: &[2048 + 16 + 2048, 1024 + 128 + 1024, 1024 + 16 + 1024, 1024 + 16 + 512, 1024 + 16 + 512],
        fused: 2048 + 16 + 16 + 1024 + 128 + 1024 + 2048 + 512 + 512,
    },
    // 64 positions of two sequences, of 128 bytes each, in two caches, with 16 bytes of tables and 8 of lengths; scores of 4 heads,
    // 4 queries, 64 positions.
    Case {
        input: "attention",
        passes: &["attention"],
        kernel: Kernel::Attention,
        launches: 9.0,
        unfused: &[
            2 * 16_384 + 24,
            2 * 16_384 + 24,
            16_384 + 32_768,
            16_384 + 32_768,
            2048 + 32_768 + 16 + 4096,
            4096 + 16 + 4096,
            4096 + 4096,
            4096 + 32_768 + 16 + 2048,
            2048 + 640,
        ],
        fused: 2048 + 2 * 16_384 + 24 + 16 + 16 + 640,
    },
    // What "rope_kv" and "attention" move, but for the queries that one wrote and the other read, and positions twice.
    Case {
        input: "rope_attention",
        passes: &["rope_kv", "attention", "rope_attention"],
        kernel: Kernel::RopeAttention,
        launches: 3.0,
        unfused: &[
            2048 + 16 + 16 + 1024 + 128 + 1024 + 2048 + 512 + 512,
            2048 + 2 * 16_384 + 24 + 16 + 16 + 640,
            0,
        ],
        fused: 2048 + 16 + 16 + 1024 + 128 + 1024 + 512 + 512 + 2 * 16_384 + 24 + 16 + 640,
    },
    // 4 rows of 256 as in "swiglu"; the recurrence takes decay and input, gives as many rows, and goes through two rows of state.
    Case {
        input: "gated_scan",
        passes: &["gated_scan"],
        kernel: Kernel::GatedScan,
        launches: 3.0,
        unfused: &[8192, 12288, 8192 + 4096 + 32 + 2 * 2048],
        fused: 12288 + 4096 + 32 + 2 * 2048,
    },
    // 1000·210 bytes of weight; 1000 logits, or one id.
    Case {
        input: "sample_head",
        passes: &["dequant_matmul", "sample_head"],
        kernel: Kernel::SampleHead,
        launches: 2.0,
        unfused: &[320 + 210_000 + 4000, 4000 + 4],
        fused: 320 + 210_000 + 4,
    },
];

/// `test-wave32` with one kernel at this efficiency.
fn target(kernel: Kernel, efficiency: f64, launch_us: f64) -> Target {
    let mut target = Target { launch_us, ..Target::test_wave32() };
    target.efficiency.insert(kernel, efficiency);
    target
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

/// The first decision about a kernel: the times of a fusion, or of its rejection by cost.
fn decided(report: &Report, pass: &str, kernel: Kernel) -> (bool, f64, f64) {
    let times = |d: &Decision| match &d.outcome {
        Outcome::Fired { kernel: k, gain: Gain { fused_us, unfused_us, .. }, .. } if *k == kernel => {
            Some((true, *fused_us, *unfused_us))
        }
        Outcome::Rejected { why: Why::CostLoses { fused_us, unfused_us, .. } } if d.pass == pass => {
            Some((false, *fused_us, *unfused_us))
        }
        _ => None,
    };
    report.decisions.iter().find_map(times).unwrap_or_else(|| panic!("{kernel:?}: {:?}", report.decisions))
}

#[test]
fn every_gated_fusion_wins_on_one_target_and_loses_on_another() {
    for case in &CASES {
        let pass = case.passes[case.passes.len() - 1];
        // Bytes per microsecond at 800 GB/s.
        let us = |bytes: u64| bytes as f64 / 800e3;
        let moved: u64 = case.unfused.iter().sum();
        assert_eq!(case.unfused.len() as f64, case.launches);
        for (efficiency, launch_us, wins) in [(1.0, 4.0, true), (0.1, 0.0, false)] {
            let target = target(case.kernel, efficiency, launch_us);
            let report = fuse(&mut input(case.input), case.passes, &target);
            let (fired, fused, unfused) = decided(&report, pass, case.kernel);
            // The best of some rows each, and the best of those; some parts of the positions each, and their join.
            let joins = matches!(case.kernel, Kernel::SampleHead | Kernel::Attention | Kernel::RopeAttention);
            let launches = if joins { 2.0 } else { 1.0 };
            let expected =
                (launches * launch_us + us(case.fused) / efficiency, case.launches * launch_us + us(moved));
            assert!(close(fused, expected.0), "{}: fused {fused} µs, expected {}", case.input, expected.0);
            assert!(
                close(unfused, expected.1),
                "{}: unfused {unfused} µs, expected {}",
                case.input,
                expected.1
            );
            assert_eq!(fired, wins, "{}", case.input);
            assert_eq!(report.fired().contains_key(&case.kernel), wins, "{}", case.input);
        }
    }
}

#[test]
fn a_residual_add_goes_where_it_is_cheaper() {
    let passes = ["dequant_matmul", "add_rmsnorm"];
    // Matmul 1024 + 36864 + 1024, with the residual 1024 more; add 3072; norm 3072, with the add 5120.
    let us = |bytes: f64| bytes / 800e3;
    for (residual_epilogue, in_epilogue) in [(1.0, true), (0.95, false)] {
        let target = Target { residual_epilogue, ..Target::test_wave32() };
        let mut graph = input("residual_decode");
        let report = fuse(&mut graph, &passes, &target);
        let add =
            report.decisions.iter().find(|d| d.at.starts_with("add ")).expect("a decision about the add");
        let epilogue = 4.0 + us(39_936.0) / residual_epilogue;
        // The two futures.
        let (kept, norm_adds) = (epilogue + 4.0 + us(3072.0), 8.0 + us(38_912.0) + us(5120.0));
        assert_eq!(kept <= norm_adds, in_epilogue);
        let (fused, unfused, expected) = match &add.outcome {
            Outcome::Fired { gain, .. } => {
                (gain.fused_us, gain.unfused_us, (epilogue, 8.0 + us(38_912.0) + us(3072.0)))
            }
            Outcome::Rejected { why: Why::CostLoses { fused_us, unfused_us, .. } } => {
                (*fused_us, *unfused_us, (kept, norm_adds))
            }
            other => panic!("{other:?}"),
        };
        assert!(close(fused, expected.0), "{fused} {expected:?}");
        assert!(close(unfused, expected.1), "{unfused} {expected:?}");
        assert_eq!(matches!(add.outcome, Outcome::Fired { .. }), in_epilogue);
        assert_eq!(!report.fired().contains_key(&Kernel::AddRmsnorm), in_epilogue);
        assert_eq!(report.after.count(), 2);
    }
}

#[test]
fn the_launch_cost_changes_a_decision() {
    // The kernel reaches 31 % of the plain matmul's speed: worth it for a launch of 4 µs, not for one of 0.1 µs.
    for (launch_us, fires) in [(4.0, true), (0.1, false)] {
        let target = Target { launch_us, ..Target::test_wave32() };
        let report = fuse(&mut input("matmul_swiglu"), &["dequant_matmul", "merge", "swiglu"], &target);
        assert_eq!(report.fired().contains_key(&Kernel::MatmulSwiglu), fires);
    }
}

#[test]
fn the_core_of_dequant_matmul_is_not_gated() {
    // Its unfused form would hold a float copy of the weight.
    let target = target(Kernel::DequantMatmul, 1e-6, 0.0);
    let report = fuse(&mut input("dequant_matmul"), &["dequant_matmul"], &target);
    assert_eq!(report.fired()[&Kernel::DequantMatmul], 3);
}

/// Bytes of weights and caches that the cost model counts for a graph: what it counts, less activations.
fn stored_bytes(g: &Graph, target: &Target) -> u64 {
    let root = |mut v: Value| {
        while g.op(v.node).is_view() {
            v = g.operand(v.node, 0).unwrap();
        }
        v
    };
    let is_stored = |v: Value| is_state(g, root(v)) || matches!(g.op(root(v).node), Op::Weight { .. });
    let mut bytes = 0;
    for id in g.ids() {
        let cost = cost::of_node(g, id, target);
        if cost.launches == 0 {
            continue;
        }
        let written = (0..g.node(id).outs.len() as u32).map(|out| Value { node: id, out });
        let written: Vec<Value> = written.filter(|v| !is_state(g, *v)).collect();
        let activations = written.iter().map(|v| g.ty(*v).bytes(&g.bounds));
        let read = g.operands(id).into_iter().enumerate().filter(|(_, v)| !is_stored(*v));
        let read = read.map(|(slot, v)| match g.op(id) {
            Op::GetRows if slot == 0 => g.ty(id.into()).bytes(&g.bounds),
            Op::Fused(fused) => rows_read(&fused.body, slot).unwrap_or(g.ty(v).bytes(&g.bounds)),
            _ => g.ty(v).bytes(&g.bounds),
        });
        bytes += cost.bytes - activations.chain(read).sum::<u64>();
    }
    bytes
}

/// The bytes that a body looks up in one of its inputs; none if it reads all of it.
fn rows_read(body: &Graph, input: usize) -> Option<u64> {
    let uses = body.uses(body.inputs()[input].into());
    let rows = uses.iter().map(|&(user, slot)| {
        let looks_up = matches!(body.op(user), Op::GetRows) && slot == 0;
        looks_up.then(|| body.ty(user.into()).bytes(&body.bounds))
    });
    rows.sum()
}

/// Whether a value is a version of a state.
fn is_state(g: &Graph, v: Value) -> bool {
    g.state_role(v).is_some()
}

/// Fusing is decided by the bytes that running is measured by: those of weights and caches, of every family, fused or not.
#[test]
fn bytes_are_those_that_bench_counts() {
    let mut compared = 0;
    for shape in synthetic::TINY {
        for (format, tied) in [(DType::F16, false), (DType::Q8_0, false), (DType::Q8_0, true)] {
            let shape = Shape { tied, ..shape };
            let gguf = Model::new(&shape, synthetic::uniform(format)).description();
            let config = Config::from_gguf(&gguf).unwrap();
            let default = Options { context: Some(96), chunk: 32, ..Options::new(Target::test_cpu()) };
            let unfused =
                |o: &Options| Options { pipeline: o.pipeline.clone().without_fusions(), ..o.clone() };
            let exact = default.clone().exact();
            for (path, options) in [
                ("default", default.clone()),
                ("exact", exact.clone()),
                ("default --no-fuse", unfused(&default)),
                ("exact --no-fuse", unfused(&exact)),
            ] {
                let plan = support::plan_of_description(&gguf, &options, Purpose::Bench);
                for (program, step) in Purpose::Bench.steps(&config, &options).into_iter().enumerate() {
                    let what = format!("{} {format} {path} {}", shape.name, step.name());
                    let (graph, _) = compile::fuse(&gguf, &options, &step).unwrap();
                    // At its bounds a step fills the caches.
                    let counted = stored_bytes(&graph, &options.target);
                    let moved = plan.bytes_per_step(program, &graph.bounds, step.rows()).unwrap();
                    // What several launches read counts once in the step: a table that the head reads whole beside the rows
                    // that are looked up in it, and the factors of RoPE in every layer.
                    let row = shape.width * format.block_bytes() as u64 / format.block_len() as u64;
                    let mut again = if tied { step.tokens * row } else { 0 };
                    for id in graph.ids() {
                        if matches!(graph.op(id), Op::Weight { name, .. } if name == "rope_freqs.weight") {
                            let others = graph.uses(id.into()).len() as u64 - 1;
                            again += others * graph.ty(id.into()).bytes(&graph.bounds);
                        }
                    }
                    assert_eq!(counted, moved + again, "{what}");
                    assert!(moved > 0, "{what}");
                    compared += 1;
                }
            }
        }
    }
    assert_eq!(compared, 6 * 3 * 4 * 4);
}

/// Fusions and launches of the real model on the frozen target: a rule that stops firing, or fires more, shows.
#[test]
fn counts_on_the_real_model() {
    let file = sinter::model::embedded().unwrap();
    let config = Config::from_gguf(file.gguf()).unwrap();
    let mut default = Options::new(Target::test_wave32());
    default.pipeline.verify_each = true;
    let greedy = Options { greedy: true, ..default.clone() };
    let mut exact = default.clone().exact();
    exact.pipeline.verify_each = true;
    let mut text = String::new();
    for (name, options) in [("default", &default), ("greedy", &greedy), ("exact", &exact)] {
        for (what, purpose) in [("generate", Purpose::Generate), ("score", Purpose::Score)] {
            for step in purpose.steps(&config, options) {
                let (_, report) = compile::fuse(file.gguf(), options, &step).unwrap();
                let counts = |map: Vec<(&str, u64)>| {
                    map.iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ")
                };
                let fired = report.fired().iter().map(|(k, n)| (k.name(), *n)).collect();
                let launches = report.after.launches.iter().map(|(k, n)| (k.as_str(), *n)).collect();
                text += &format!(
                    "{name} {what} {}: {} launches -> {}\n  fused    {}\n  launches {}\n",
                    step.name(),
                    report.before.count(),
                    report.after.count(),
                    counts(fired),
                    counts(launches)
                );
            }
        }
    }
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("counts_on_the_real_model", text);
    });
}
