//! What there is for those who write passes: passes from outside in a pipeline, and the ways to find the rewrite that is wrong.

mod common;
mod support;

#[path = "../examples/custom_pass.rs"]
mod custom_pass;

use common::{fuse, input, parse};
use sinter::compile::{self, Options, Purpose};
use sinter::ir::{Graph, Kernel, NodeId, Op, Outcome, Value, Why, verify};
use sinter::passes::bisect::{BisectError, Culprit, bisect};
use sinter::passes::{
    Cx, Fusion, NewNode, Observer, Pass, PassError, Patch, Pipeline, Ref, Reject, Rewrite, Rule, sole_use,
};
use sinter::runtime::interp::{Tensor, eval};
use sinter::target::Target;

const GRAPH: &str = include_str!("../examples/custom_pass.sir");

fn wave32() -> Target {
    Target::test_wave32()
}

fn pass(name: &'static str, rule: Rule) -> Pass {
    Pass { name, summary: "", rule, absorbs: &[], repeat: false }
}

/// All passes, for as many rewrites.
fn fueled(fuel: u64) -> Pipeline {
    let mut pipeline = Pipeline::standard(false);
    pipeline.fuel = Some(fuel);
    pipeline
}

fn no_match(_: &Graph, _: NodeId, _: &Cx) -> Result<Patch, Reject> {
    Err(Reject::NoMatch)
}

#[test]
fn the_example_has_its_golden() {
    let shown = custom_pass::shown(GRAPH, &wave32()).unwrap();
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("custom_pass", shown);
    });
}

/// The pass of the example alone.
fn biased(graph: &str) -> (Graph, sinter::passes::Report) {
    let pipeline = custom_pass::pipeline().unwrap();
    let mut graph = parse(graph);
    // It looks whether dequant_matmul runs, so that does.
    let pipeline = pipeline.select(&["bias_first", "dequant_matmul"]).unwrap();
    let report = pipeline.run(&mut graph, &wave32()).unwrap();
    (graph, report)
}

#[test]
fn the_example_changes_results_by_rounding_alone() {
    let values = |graph: &Graph| {
        let floats = |dims: &[usize], seed: usize| {
            let n: usize = dims.iter().product();
            let values: Vec<f32> = (0..n).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0).collect();
            Tensor::from_f32(dims, &values).unwrap()
        };
        let inputs = [floats(&[4, 256], 1), floats(&[4, 512], 2)];
        let weights = |name: &str| {
            let id = graph
                .ids()
                .into_iter()
                .find(|id| matches!(graph.op(*id), Op::Weight { name: n, .. } if n == name));
            Ok(common::graphs::weight(name, None, graph.ty(id.unwrap().into()), &graph.bounds))
        };
        let results = eval(graph, &graph.bounds, &inputs, &weights, Default::default()).unwrap();
        results.iter().flat_map(|t| t.to_f32().unwrap()).collect::<Vec<f32>>()
    };
    let (rewritten, report) = biased(GRAPH);
    assert_eq!(report.rewrites["bias_first"], 1);
    let (before, after) = (values(&parse(GRAPH)), values(&rewritten));
    let largest = before.iter().fold(0f32, |a, x| a.max(x.abs()));
    let wrong = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(largest > 0.1 && wrong <= largest * 1e-5, "{wrong} of {largest}");
}

#[test]
fn the_example_leaves_alone_what_others_use() {
    let whys = |from: &str, to: &str| {
        assert!(GRAPH.contains(from));
        let report = biased(&GRAPH.replace(from, to)).1;
        assert_eq!(report.rewrites.get("bias_first"), None);
        let of = |d: &sinter::ir::Decision| match &d.outcome {
            Outcome::Rejected { why } if d.pass == "bias_first" => Some(why.clone()),
            _ => None,
        };
        report.decisions.iter().filter_map(of).collect::<Vec<Why>>()
    };
    let used = |of: &str| vec![Why::MultiUse { value: of.into() }];
    assert_eq!(whys("return %z", "return %s, %z"), used("add ffn_down.weight"));
    assert_eq!(whys("return %z", "return %m, %z"), used("matmul ffn_down.weight"));
    // No matmul, no bias, or no rows to add: not what it is about.
    assert_eq!(whys("%s = add %x, %m", "%s = add %x, %x"), []);
    assert_eq!(whys("%z = add %s, %b", "%z = add %s, %x"), []);
    assert_eq!(whys("%s = add %x, %m", "%s = add %m, %b"), []);
}

/// Gate and up as the pass `swiglu` fuses them, by a pass from outside: a fusion into a kernel that there is.
fn own_swiglu(g: &Graph, mul: NodeId, cx: &Cx) -> Result<Patch, Reject> {
    let silu = g.operand(mul, 0).filter(|v| matches!((g.op(mul), g.op(v.node)), (Op::Mul, Op::Silu)));
    let silu = silu.ok_or(Reject::NoMatch)?.node;
    let mut members = vec![silu, mul];
    members
        .extend(sole_use(g, mul.into()).map(|(user, _)| user).filter(|n| matches!(g.op(*n), Op::QuantAct)));
    let results = vec![Value::from(members[members.len() - 1])];
    Fusion { graph: g, kernel: Kernel::Swiglu, members, results }.patch(mul, cx)?.if_it_pays(mul)
}

/// What an observer heard of a pass.
#[derive(Default)]
struct Heard {
    before: Vec<u64>,
    after: Vec<u64>,
    passes: Vec<&'static str>,
}

impl Observer for Heard {
    fn before_rewrite(&mut self, rewrite: &Rewrite, _: &Graph) {
        self.before.extend((rewrite.pass == "own_swiglu").then_some(rewrite.number));
    }
    fn after_rewrite(&mut self, rewrite: &Rewrite, _: &[NodeId], _: &Graph) {
        self.after.extend((rewrite.pass == "own_swiglu").then_some(rewrite.number));
    }
    fn after_pass(&mut self, pass: &'static str, _: &Graph) {
        self.passes.push(pass);
    }
}

#[test]
fn a_pass_from_outside_is_a_pass() {
    let own = pass("own_swiglu", own_swiglu);
    let pipeline = Pipeline::standard(false).insert_after("merge", own).unwrap();
    let pipeline = pipeline.select(&["-swiglu", "-gated_scan"]).unwrap();
    let at = pipeline.enabled().iter().position(|p| *p == "own_swiglu").unwrap();
    assert_eq!(pipeline.enabled()[at - 1..=at + 1], ["merge", "own_swiglu", "add_rmsnorm"]);

    let mut heard = Heard::default();
    let mut graph = input("layer");
    let report = pipeline.run_observed(&mut graph, &wave32(), &mut heard).unwrap();
    assert!(graph.to_string().contains("fused swiglu"), "{graph}");
    assert_eq!(report.rewrites["own_swiglu"], 1);
    assert_eq!((heard.before.len(), heard.before), (1, heard.after));
    assert_eq!(heard.passes, pipeline.enabled());
    let fired = report.decisions.iter().filter(|d| d.pass == "own_swiglu");
    let kernels: Vec<Kernel> = fired
        .map(|d| match d.outcome {
            Outcome::Fired { kernel, .. } => kernel,
            Outcome::Rewritten { .. } | Outcome::Rejected { .. } => panic!("{d:?}"),
        })
        .collect();
    assert_eq!(kernels, [Kernel::Swiglu]);

    // A model compiled with it makes the kernels that it makes.
    let launches_swiglu = |pipeline: Pipeline| {
        let options = Options { pipeline, ..support::frozen() };
        let file = support::open("q4_k_m");
        let compiled = compile::compile(file.gguf(), &options, Purpose::Generate).unwrap();
        compiled[0].program.to_string().contains("swiglu")
    };
    assert!(launches_swiglu(pipeline.clone()));
    assert!(!launches_swiglu(pipeline.select(&["-own_swiglu"]).unwrap()));
}

#[test]
fn where_a_pass_goes_and_what_it_is_called() {
    let last = *Pipeline::standard(false).with(pass("own", no_match)).unwrap().enabled().last().unwrap();
    assert_eq!(last, "own");
    // After one that does not run.
    let exact = Pipeline::standard(true).insert_after("quantise_acts", pass("own", no_match)).unwrap();
    let all = sinter::passes::names();
    let follows = all[all.iter().position(|name| *name == "quantise_acts").unwrap() + 1];
    let at = exact.enabled().iter().position(|name| *name == "own").unwrap();
    assert_eq!(exact.enabled()[at + 1], follows);
    // In the order of the pipeline, whatever the order of the names; taken out by name, and as a fusion.
    let of = |list: &[&str]| exact.clone().select(list).unwrap().enabled();
    assert_eq!(of(&["merge", "own"]), ["own", "merge"]);
    assert!(!of(&["-own"]).contains(&"own"));
    assert!(!exact.clone().without_fusions().enabled().contains(&"own"));
    // Options for float activations keep it.
    let options = Options { pipeline: exact.clone(), ..Options::new(wave32()) };
    assert_eq!(options.exact().pipeline.enabled(), exact.enabled());

    let error = |r: Result<Pipeline, PassError>| r.map(|p| p.enabled()).unwrap_err().to_string();
    let said = error(exact.clone().select(&["mine"]));
    assert!(said.contains("no pass \"mine\"") && said.contains("own"), "{said}");
    assert!(error(exact.clone().insert_after("marge", pass("b", no_match))).contains("no pass \"marge\""));
    for (name, why) in [
        ("own", "one of that name"),
        ("merge", "one of that name"),
        ("", "letters"),
        ("-a", "letters"),
        ("a,b", "letters"),
    ] {
        let said = error(exact.clone().with(pass(name, no_match)));
        assert!(said.contains(why) && said.contains(&format!("{name:?}")), "{said}");
    }
}

/// Reads the cache as it was before the append: no type is wrong, but the order of effects is.
fn stale(g: &Graph, id: NodeId, _: &Cx) -> Result<Patch, Reject> {
    let cache =
        g.operand(id, 0).filter(|v| matches!((g.op(id), g.op(v.node)), (Op::KvRead { .. }, Op::KvAppend)));
    let cache = cache.ok_or(Reject::NoMatch)?;
    let old = g.previous_version(cache).ok_or(Reject::NoMatch)?;
    let mut operands: Vec<Ref> = g.operands(id).into_iter().map(Ref::Old).collect();
    operands[0] = Ref::Old(old);
    Ok(Patch {
        add: vec![NewNode { op: g.op(id).clone(), operands, types: vec![] }],
        redirect: vec![(id.into(), Ref::New { index: 0, out: 0 })],
        drop: vec![id],
        fused: None,
    })
}

/// Drops what is used.
fn careless(g: &Graph, id: NodeId, _: &Cx) -> Result<Patch, Reject> {
    match g.op(id) {
        Op::Silu => Ok(Patch { drop: vec![id], ..Patch::default() }),
        _ => Err(Reject::NoMatch),
    }
}

#[test]
fn a_broken_graph_is_laid_at_the_door_of_a_rewrite() {
    let run = |rule: Rule, verify_each: bool| {
        let mut pipeline =
            Pipeline::standard(true).insert_after("dequant_matmul", pass("own", rule)).unwrap();
        pipeline = pipeline.select(&["dequant_matmul", "own"]).unwrap();
        pipeline.verify_each = verify_each;
        let mut graph = input("layer");
        let outcome = pipeline.run(&mut graph, &wave32()).map(|report| report.rewrites["own"]);
        (graph, outcome)
    };
    let before = fuse(&mut input("layer"), &["dequant_matmul"], &wave32()).rewrites["dequant_matmul"];
    let (_, outcome) = run(stale, true);
    let Err(PassError::Verify { rewrite, pass, at, message }) = outcome else { panic!("{outcome:?}") };
    assert_eq!((rewrite, pass), (before + 1, "own"));
    assert!(at.starts_with("kv_read blk.0."), "{at}");
    assert!(message.contains("overwritten before it runs"), "{message}");
    // Not asked to look, the pipeline goes on; the graph is as broken.
    let (graph, outcome) = run(stale, false);
    assert_eq!(outcome.unwrap(), 2);
    assert!(verify(graph).is_err());
    // What cannot be applied is seen in any case.
    let (_, outcome) = run(careless, false);
    let said = outcome.unwrap_err().to_string();
    assert!(
        said.contains(&format!("rewrite {}, by pass own at silu", before + 1)) && said.contains("still used"),
        "{said}"
    );
}

/// How many rewrites all passes make of the layer.
fn rewrites() -> u64 {
    Pipeline::standard(false).run(&mut input("layer"), &wave32()).unwrap().rewrites.values().sum()
}

/// Bisects the layer with a judge that counts what it is asked.
fn search(
    pipeline: &Pipeline,
    mut good: impl FnMut(u64, &Graph) -> bool,
) -> (Result<Culprit, BisectError>, Vec<u64>) {
    let mut asked = vec![];
    let found = bisect(&input("layer"), pipeline, &wave32(), &mut |fuel, graph| {
        asked.push(fuel);
        verify(graph.clone()).map_err(|e| e.to_string())?;
        Ok(good(fuel, graph))
    });
    (found, asked)
}

#[test]
fn bisection_finds_each_rewrite_in_few_steps() {
    let pipeline = Pipeline::standard(false);
    let mut heard = vec![];
    struct All<'a>(&'a mut Vec<(u64, &'static str, String)>);
    impl Observer for All<'_> {
        fn before_rewrite(&mut self, rewrite: &Rewrite, g: &Graph) {
            self.0.push((rewrite.number, rewrite.pass, g.describe(rewrite.at)));
        }
    }
    pipeline.run_observed(&mut input("layer"), &wave32(), &mut All(&mut heard)).unwrap();
    assert!(heard.len() > 30);
    let most = 3 + heard.len().ilog2() as usize;
    for (number, pass, at) in &heard {
        let (found, asked) = search(&pipeline, |fuel, _| fuel < *number);
        let found = found.unwrap();
        assert_eq!((found.number, found.pass, &found.at, found.of), (*number, *pass, at, heard.len() as u64));
        assert!(asked.len() <= most, "{asked:?}");
        assert!(found.broken.is_none() && !found.diff.is_empty(), "{found:?}");
        // What is told to be gone and new is what the difference shows.
        let count = |sign: char, of: &str| {
            let starts = format!(" = {}", of.split_whitespace().next().unwrap());
            found.diff.iter().filter(|l| l.starts_with(sign) && l.contains(&starts)).count()
        };
        assert!(found.dropped.iter().all(|op| count('-', op) > 0), "{found:?}");
        assert!(found.added.iter().all(|op| count('+', op) > 0), "{found:?}");
    }
    // Fewer rewrites are all that there are, if there is fuel for no more.
    let (found, asked) = search(&fueled(9), |fuel, _| fuel < 7);
    assert_eq!((found.unwrap().of, asked[1]), (9, 9));
}

#[test]
fn bisection_says_why_it_finds_nothing() {
    let pipeline = Pipeline::standard(false);
    assert!(matches!(search(&pipeline, |_, _| false), (Err(BisectError::BadBefore), asked) if asked == [0]));
    let (found, asked) = search(&pipeline, |_, _| true);
    assert!(matches!(found, Err(BisectError::GoodAfter { rewrites: n }) if n == rewrites()), "{found:?}");
    assert_eq!(asked, [0, rewrites()]);
    let none = pipeline.clone().select(&[""]).unwrap();
    assert!(matches!(search(&none, |_, _| true), (Err(BisectError::NoRewrites), asked) if asked.is_empty()));
    let judge = bisect(&input("layer"), &pipeline, &wave32(), &mut |_, _| Err("no judge".into()));
    assert_eq!(judge.unwrap_err().to_string(), "no judge");
}

/// A rewrite that breaks the graph is found without the judge, unless something was wrong before.
#[test]
fn bisection_finds_what_breaks_the_graph_itself() {
    for (rule, diff) in [(stale as Rule, true), (careless as Rule, false)] {
        let pipeline = Pipeline::standard(true).insert_after("dequant_rmsnorm", pass("own", rule)).unwrap();
        let (found, asked) = search(&pipeline, |_, _| true);
        let found = found.unwrap();
        assert_eq!((found.pass, found.number, found.of), ("own", found.of, found.number));
        assert_eq!(asked, [0, found.number - 1]);
        assert!(found.broken.is_some());
        assert_eq!(!found.diff.is_empty(), diff, "{found:?}");
        let (earlier, _) = search(&pipeline, |fuel, _| fuel < 1);
        let earlier = earlier.unwrap();
        assert_eq!((earlier.number, earlier.pass, earlier.broken.is_some()), (1, "dequant_matmul", false));
    }
}

#[test]
fn a_difference_is_no_longer_than_what_changed() {
    let of = |fuel: u64| {
        let mut graph = input("layer");
        fueled(fuel).run(&mut graph, &wave32()).unwrap();
        graph
    };
    assert_eq!(sinter::ir::text::diff(&of(5), &of(5)), Vec::<String>::new());
    let before = parse(
        "graph @g(%x: f32[T,64]) sym T<=1, R<=1 { %a = silu %x : f32[T,64] %b = silu %a : f32[T,64] %c = silu %b : f32[T,64] return %c }",
    );
    let mut after = before.clone();
    let ids = before.order();
    let patch = Patch {
        add: vec![NewNode {
            op: Op::Mul,
            operands: vec![Ref::Old(ids[1].into()), Ref::Old(ids[1].into())],
            types: vec![],
        }],
        redirect: vec![(ids[2].into(), Ref::New { index: 0, out: 0 })],
        drop: vec![ids[2]],
        fused: None,
    };
    patch.apply(&mut after).unwrap();
    let wanted = [
        "-  %1 = silu %0 : f32[T,64]",
        "-  %2 = silu %1 : f32[T,64]",
        "+  %new0 = mul %0, %0 : f32[T,64]",
        "+  %2 = silu %new0 : f32[T,64]",
    ];
    assert_eq!(sinter::ir::text::diff(&before, &after), wanted);
}
