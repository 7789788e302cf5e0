//! Fusing changes no result: random graphs under the interpreter, before and after the passes.

mod common;

use common::graphs::{inputs, named, whole};
use sinter::ir::arbitrary::{Paging, RandomStep, Sequences, random_graph};
use sinter::ir::{DType, Graph, Op, verify};
use sinter::passes::{Pipeline, names};
use sinter::runtime::interp::{Tensor, eval};
use sinter::target::Target;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

/// The results of a graph in a step, on weights and states that depend on their names alone.
fn results(g: &Graph, step: &RandomStep) -> Vec<Tensor> {
    let of = |name: &str, ty: &sinter::ir::TensorType| named(name, ty, &step.syms);
    let mut states = indexmap::IndexMap::new();
    let mut weights = std::collections::HashMap::new();
    for id in g.ids() {
        let node = g.node(id);
        match &node.op {
            Op::State { name, .. } => drop(states.insert(name.clone(), of(name, &node.outs[0]))),
            Op::Weight { name, rows } => {
                drop(weights.insert(name.clone(), of(name, &whole(&node.outs[0], *rows))));
            }
            _ => {}
        }
    }
    let inputs: Vec<Tensor> = inputs(g, step).into_iter().map(|(_, tensor)| tensor).collect();
    eval(g, &step.syms, &inputs, &|name| Ok(weights[name].clone()), states).unwrap()
}

/// How many random graphs there are, unless `SINTER_FUZZ_GRAPHS` says otherwise.
const GRAPHS: u64 = 400;

/// Passes that must have fired this often, and kinds of kernels that must have been made, or the run says nothing.
const LEAST: u64 = 20;

/// Kernels and what their bodies hold beside what all of that kernel's do.
const KINDS: [&str; 15] = [
    "add_rmsnorm",
    "attention quant_act",
    "attention window",
    "dequant_matmul add",
    "dequant_matmul add add",
    "dequant_rmsnorm",
    "gated_scan",
    "matmul_swiglu",
    "merge of one format",
    "merge of several formats",
    "rope_kv",
    "rope_kv rms_norm",
    "rope_kv rms_norm rms_norm",
    "sample_head",
    "swiglu",
];

/// The kind of every fused node, see [`KINDS`].
fn kinds(g: &Graph) -> Vec<String> {
    let mut kinds = vec![];
    for id in g.ids() {
        let Op::Fused(fused) = g.op(id) else { continue };
        let body = &fused.body;
        let count = |name: &str| body.ids().into_iter().filter(|&n| body.op(n).name() == name).count();
        let kernel = fused.kernel.name();
        let parts: &[&str] = match kernel {
            "dequant_matmul" => &["add"],
            "rope_kv" => &["rms_norm"],
            "attention" => &["quant_act"],
            _ => &[],
        };
        let mut kind = kernel.to_string();
        for part in parts {
            kind += &format!(" {part}").repeat(count(part));
        }
        if kernel == "merge" {
            let weights = body.ids().into_iter().filter(|&n| matches!(body.op(n), Op::Dequant));
            let formats: BTreeSet<_> = weights
                .map(|n| body.ty(body.operands(n)[0]).dtype)
                .filter(|d| DType::WEIGHTS.contains(d))
                .collect();
            kind += if formats.len() > 1 { " of several formats" } else { " of one format" };
        }
        kinds.push(kind);
        if body.ids().into_iter().any(|n| matches!(body.op(n), Op::CausalMask { window: Some(_) })) {
            kinds.push(format!("{kernel} window"));
        }
    }
    kinds
}

#[test]
fn fused_random_graphs_compute_what_they_did() {
    // The first token, decoding, and prompts of which some tokens see others; of one sequence and of several.
    let steps = [
        ([0, 0, 0], [1, 0, 0], 1),
        ([5, 0, 0], [1, 0, 0], 1),
        ([1, 7, 0], [1, 1, 0], 0),
        ([0, 0, 0], [4, 0, 0], 2),
        ([40, 3, 0], [1, 0, 3], 3),
    ];
    let mut made = BTreeMap::<String, u64>::new();
    let graphs = std::env::var("SINTER_FUZZ_GRAPHS").map_or(GRAPHS, |n| n.parse().expect("a number"));
    let mut rewrites = BTreeMap::<String, u64>::new();
    for seed in 0..graphs {
        let graph = random_graph(seed, 10 + (seed as usize % 5) * 12);
        let (before, tokens, wanted) = steps[seed as usize / 5 % steps.len()];
        let mut sequences = Sequences::new(Paging::of(seed), seed);
        sequences.step(before, 0);
        let step = sequences.step(tokens, wanted);
        for (target, exact) in [(Target::cpu(), true), (Target::test_wave32(), true), (Target::cpu(), false)]
        {
            let run = |mut pipeline: Pipeline, mut graph: Graph| {
                pipeline.verify_each = true;
                let report = pipeline.run(&mut graph, &target).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                (verify(graph).unwrap().into_graph(), report.rewrites)
            };
            // quantise_acts changes numbers by design, so what is fused is compared with what it made.
            let (unfused, _) = run(Pipeline::standard(exact).without_fusions(), graph.clone());
            let (fused, fired) = run(Pipeline::standard(exact), graph.clone());
            for (pass, n) in fired {
                *rewrites.entry(pass).or_default() += n;
            }
            for kind in kinds(&fused) {
                *made.entry(kind).or_default() += 1;
            }
            let expected = results(&unfused, &step);
            if exact {
                assert_eq!(expected, results(&graph, &step), "seed {seed}, without fusions:\n{unfused}");
            }
            let printed = Graph::parse(&fused.to_string()).unwrap();
            for (what, graph) in [("fused", &fused), ("printed and parsed", &printed)] {
                let found = results(graph, &step);
                assert_eq!(found, expected, "seed {seed}, {what}, on {}:\n{graph}", target.name);
            }
        }
    }
    // Not println, which a test that passes keeps to itself.
    writeln!(std::io::stderr(), "{graphs} random graphs, rewrites: {rewrites:?}, kernels: {made:?}").unwrap();
    for pass in names() {
        assert!(rewrites.get(pass).is_some_and(|n| *n >= LEAST), "{pass} fired too rarely: {rewrites:?}");
    }
    for kind in KINDS {
        assert!(made.get(kind).is_some_and(|n| *n >= LEAST), "{kind} was made too rarely: {made:?}");
    }
}
