//! Fusing changes no result: random graphs under the interpreter, before and after the passes.

use sinter::ir::arbitrary::{BOUNDS, random_bytes, random_graph};
use sinter::ir::{Graph, Op, Syms, verify};
use sinter::passes::Pipeline;
use sinter::runtime::interp::{Tensor, eval};
use sinter::target::Target;

/// A tensor of random content for a type at `syms`.
fn tensor(ty: &sinter::ir::TensorType, syms: &Syms, seed: u64) -> Tensor {
    let dims = ty.dims(syms).into_iter().map(|d| d as usize).collect();
    Tensor::new(ty.dtype, dims, random_bytes(ty, syms, seed)).unwrap()
}

fn hash(name: &str) -> u64 {
    name.bytes().fold(1, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)))
}

/// The results of a graph on inputs, weights and states that depend on their names alone.
fn results(g: &Graph, syms: &Syms) -> Vec<Tensor> {
    let of = |name: &str, ty: &sinter::ir::TensorType| tensor(ty, syms, hash(name));
    let mut states = indexmap::IndexMap::new();
    let mut weights = std::collections::HashMap::new();
    for id in g.ids() {
        let node = g.node(id);
        match &node.op {
            Op::State { name } => drop(states.insert(name.clone(), of(name, &node.outs[0]))),
            Op::Weight { name } => drop(weights.insert(name.clone(), of(name, &node.outs[0]))),
            _ => {}
        }
    }
    let inputs: Vec<Tensor> = g
        .inputs()
        .iter()
        .map(|&id| match g.op(id) {
            Op::Input { name } => of(name, &g.node(id).outs[0]),
            _ => unreachable!("inputs are inputs"),
        })
        .collect();
    eval(g, syms, &inputs, &|name| Ok(weights[name].clone()), states).unwrap()
}

#[test]
fn fused_random_graphs_compute_what_they_did() {
    let syms = Syms { t: 2.min(BOUNDS.t), p: 1.min(BOUNDS.p), s: BOUNDS.s };
    let mut rewrites = std::collections::BTreeMap::<String, u64>::new();
    for seed in 0..300 {
        let graph = random_graph(seed, 10 + (seed as usize % 5) * 12);
        let expected = results(&graph, &syms);
        for target in [Target::cpu(), Target::test_wave32()] {
            // quantise_acts changes numbers by design, so the exact pipeline.
            let mut pipeline = Pipeline::standard(true);
            pipeline.verify_each = true;
            let mut fused = graph.clone();
            let report = pipeline.run(&mut fused, &target).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            for (pass, n) in report.rewrites {
                *rewrites.entry(pass).or_default() += n;
            }
            let fused = verify(fused).unwrap().into_graph();
            let printed = Graph::parse(&fused.to_string()).unwrap();
            for (what, graph) in [("fused", &fused), ("printed and parsed", &printed)] {
                assert_eq!(
                    results(graph, &syms),
                    expected,
                    "seed {seed}, {what}, on {}:\n{graph}",
                    target.name
                );
            }
        }
    }
    println!("rewrites: {rewrites:?}");
    for pass in ["cleanup", "dequant_matmul", "merge", "add_rmsnorm", "swiglu", "attention", "rope_kv"] {
        assert!(rewrites.get(pass).is_some_and(|n| *n >= 20), "{pass} fired too rarely: {rewrites:?}");
    }
}
