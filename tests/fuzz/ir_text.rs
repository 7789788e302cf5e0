//! The text of a graph: parsed, printed, verified, fused, compiled and run.

use crate::execute::execute;
use sinter::codegen::{self, Layouts};
use sinter::gguf::{Digest, Identity};
use sinter::ir::{DType, Graph, KvTypes, verify, verify_unfinished};
use sinter::passes::Pipeline;
use sinter::plan::{LoadedPlan, Model, Options, Parts, Plan};
use sinter::show::Diagram;
use sinter::show::dot::dot;
use sinter::target::Target;

/// What [`run`] returns of a graph that runs.
#[allow(dead_code, reason = "a fuzz target does not ask")]
pub const DEEPEST: usize = 5;

/// Returns how far the text got: refused, parsed, verified, compiled, planned, executed.
pub fn run(data: &[u8]) -> usize {
    let text = String::from_utf8_lossy(data);
    let graph = match Graph::parse(&text) {
        Ok(graph) => graph,
        Err(e) => {
            _ = e.to_string();
            return 0;
        }
    };
    survives_printing(&graph);
    if let Err(e) = verify_unfinished(&graph) {
        _ = e.to_string();
        return 1;
    }
    _ = dot(&Diagram::of_graph(&graph, &Target::test_cpu(), false));
    let (cpu, gpu) = (Target::cpu(), Target::test_wave32());
    let mut reached = compile(graph.clone(), &cpu);
    for (target, exact) in [(&cpu, false), (&cpu, true), (&gpu, false)] {
        let mut fused = graph.clone();
        let mut pipeline = Pipeline::standard(exact);
        pipeline.verify_each = true;
        pipeline.run(&mut fused, target).unwrap_or_else(|e| panic!("{e}"));
        survives_printing(&fused);
        reached = reached.max(compile(fused, target));
    }
    reached
}

fn survives_printing(graph: &Graph) {
    let text = graph.to_string();
    let again = Graph::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert_eq!(again.to_string(), text);
}

/// Makes a plan of a graph that keeps the rules of the IR, and runs it.
fn compile(graph: Graph, target: &Target) -> usize {
    let graph = verify(graph).unwrap_or_else(|e| panic!("{e}"));
    let program =
        match Layouts::choose([&graph], target).and_then(|all| codegen::generate(&graph, target, &all)) {
            Ok(program) => program,
            Err(e) => {
                _ = e.to_string();
                return 2;
            }
        };
    let none = Digest([0; 32]);
    let parts = Parts {
        model: Model {
            source: None,
            identity: Identity { len: 0, header: none, samples: none },
            full_hash: None,
            architecture: String::new(),
            name: String::new(),
        },
        target: target.clone(),
        options: Options {
            exact: false,
            kv: KvTypes::both(DType::F16),
            context: 64,
            sequences: 1,
            chunk: 1,
            greedy: false,
        },
        programs: vec![(program, sinter::ir::Report::default())],
    };
    match Plan::build(parts) {
        Ok(plan) => {
            _ = plan.to_string();
            let loaded = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
            4 + usize::from(execute(&loaded))
        }
        Err(e) => {
            _ = e.to_string();
            3
        }
    }
}
