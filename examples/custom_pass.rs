//! A pass of one's own, in a crate outside: Sinter's public API, and nothing else.
//!
//! ```text
//! add (add %x, (matmul ..)), %bias   =>   add %x, (add (matmul ..), %bias)
//! ```
//!
//! It makes no kernel. A bias that is added after the residual is added before it, right after the matmul, where `dequant_matmul`
//! takes it in: one launch less. The sum is the same but for the rounding of floats.
//!
//! ```sh
//! cargo run --release --example custom_pass [FILE.sir]
//! ```
//!
//! docs/writing-a-pass.md walks through it; tests/pass_kit.rs holds it to a golden.

use sinter::ir::{Graph, NodeId, Op, Value, Why, verify};
use sinter::passes::{Cx, NewNode, Pass, Patch, Pipeline, Ref, Reject, Report, sole_use};
use sinter::target::Target;
use std::error::Error;
use std::process::ExitCode;

pub const PASS: Pass = Pass {
    name: "bias_first",
    summary: "a bias after the residual goes before it",
    rule: try_rewrite,
    absorbs: &[],
    repeat: false,
};

fn try_rewrite(g: &Graph, id: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let (Op::Add, Some(sum), Some(bias)) = (g.op(id), g.operand(id, 0), g.operand(id, 1)) else {
        return Err(Reject::NoMatch);
    };
    let is_vector = |v: Value| g.ty(v).shape.len() == 1;
    if !is_vector(bias) || !matches!(g.op(sum.node), Op::Add) || !cx.runs("dequant_matmul") {
        return Err(Reject::NoMatch);
    }
    let operands = g.operands(sum.node);
    let Some(slot) = operands.iter().rposition(|v| matches!(g.op(v.node), Op::MatMul { .. })) else {
        return Err(Reject::NoMatch);
    };
    if operands.iter().any(|v| is_vector(*v)) {
        return Err(Reject::NoMatch);
    }
    for v in [sum, operands[slot]] {
        if sole_use(g, v).is_none() {
            return Err(Reject::near(id, Why::MultiUse { value: g.describe(v.node) }));
        }
    }
    let mut parts: Vec<Ref> = operands.iter().copied().map(Ref::Old).collect();
    parts[slot] = Ref::New { index: 0, out: 0 };
    Ok(Patch {
        add: vec![
            NewNode { op: Op::Add, operands: vec![Ref::Old(operands[slot]), Ref::Old(bias)], types: vec![] },
            NewNode { op: Op::Add, operands: parts, types: vec![] },
        ],
        redirect: vec![(id.into(), Ref::New { index: 1, out: 0 })],
        drop: vec![id, sum.node],
        fused: None,
    })
}

/// All passes of Sinter, and this one where it has to be: before the fusion that it is for.
///
/// # Errors
/// If a pass of that name is there already, or none that it could come after.
pub fn pipeline() -> Result<Pipeline, Box<dyn Error>> {
    let mut pipeline = Pipeline::standard(true).insert_after("cleanup", PASS)?;
    // A pass in the making breaks graphs, and this says at which rewrite.
    pipeline.verify_each = true;
    Ok(pipeline)
}

/// What the passes make of a graph in text form, without this pass and with it.
///
/// # Errors
/// A text that is no graph, or a rule that breaks it.
pub fn shown(text: &str, target: &Target) -> Result<String, Box<dyn Error>> {
    let graph = verify(Graph::parse(text)?)?.into_graph();
    let with = pipeline()?;
    let without = with.clone().select(&["-bias_first"])?;
    let (_, before) = run(&without, graph.clone(), target)?;
    let (graph, after) = run(&with, graph, target)?;
    let line = |report: &Report| {
        let Report { after, .. } = report;
        let launches: Vec<String> = after.launches.iter().map(|(name, n)| format!("{n} {name}")).collect();
        format!("{} launches, {:.1} µs estimated: {}", after.count(), after.us, launches.join(", "))
    };
    let rewrites = after.rewrites.get(PASS.name).copied().unwrap_or(0);
    Ok(format!(
        "{}: {rewrites} rewrites\nwithout it {}\nwith it    {}\n\n{graph}\n",
        PASS.name,
        line(&before),
        line(&after)
    ))
}

fn run(pipeline: &Pipeline, mut graph: Graph, target: &Target) -> Result<(Graph, Report), Box<dyn Error>> {
    let report = pipeline.run(&mut graph, target)?;
    Ok((verify(graph)?.into_graph(), report))
}

/// Runs on a file, or on the graph beside this source.
fn of_arguments() -> Result<String, Box<dyn Error>> {
    let text = match std::env::args().nth(1) {
        Some(path) => std::fs::read_to_string(&path).map_err(|e| format!("cannot read {path}: {e}"))?,
        None => include_str!("custom_pass.sir").into(),
    };
    shown(&text, &Target::test_wave32())
}

#[allow(dead_code, reason = "the test takes the rest")]
fn main() -> ExitCode {
    match of_arguments() {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}
