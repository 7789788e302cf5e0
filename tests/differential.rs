//! Random graphs through passes, codegen, planner and kernels, the CPU's at every instruction-set level and, where there is one, a
//! GPU's, against the interpreter: each kernel beside its body on the same operands, and whole plans, step after step, beside the unfused graph.
//! Steps mix prompts and single tokens of sequences whose pages lie in no order. Plans of several streams run in every order that
//! their events allow.

mod common;
#[allow(dead_code, reason = "its list of targets is longer")]
#[path = "support/everywhere.rs"]
mod everywhere;

use common::graphs::{inputs, named, weight, weights, whole};
use sinter::check::{CheckError, Checked, OnDevice, check_kernels};
use sinter::codegen::spec::{Access, Computation, Epilogue, Implementation, Layout, NormSource, Program};
use sinter::codegen::{self, Layouts};
use sinter::gguf::GgufFile;
use sinter::ir::arbitrary::{
    CONTEXT, PAGES, Paging, RandomStep, Rng, SEQUENCES, Sequences, random_primitives,
};
use sinter::ir::{DType, Graph, KvTypes, NodeId, Op, Report, Syms, TensorType, Value, Verified, verify};
use sinter::passes::Pipeline;
use sinter::plan::{self, BufRef, LoadedPlan, Parts, Plan};
use sinter::runtime::cpu::{Features, RawArg, Threads, Weights, bind};
use sinter::runtime::device::open;
use sinter::runtime::interp::{Tensor, eval};
use sinter::runtime::{DeviceOptions, Executor};
use sinter::target::{TURNED_TOKENS, Target, TargetKind};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;

/// How many random graphs there are, unless `SINTER_FUZZ_GRAPHS` says otherwise: fewer where arithmetic is checked, which takes longer.
const GRAPHS: u64 = if cfg!(debug_assertions) { 40 } else { 160 };

/// What must have been launched this often, or the run says nothing.
const LEAST: u64 = 10;

/// The most rows of a step, and of those the most that are wanted.
const BOUNDS: Syms = Syms { t: 26, r: 8 };

/// Tokens of each sequence in each step, and how many rows are wanted: two prompts, of more tokens than a matmul takes at once;
/// one more token of both; a prompt beside a single token, of which nothing is wanted; the last sequence anew; one token alone; parts
/// of prompts that see what came before, few and many; and each sequence's next token, when two are in their second page.
const STEPS: [([u64; SEQUENCES], u64); 8] = [
    ([17, 0, 9], 3),
    ([1, 0, 1], 2),
    ([1, 9, 0], 0),
    ([1, 1, 7], 8),
    ([0, 1, 0], 1),
    ([14, 0, 1], 2),
    ([0, 23, 3], 1),
    ([1, 1, 1], 3),
];

/// Tokens of steps that programs of few take: as many as attention turns itself, of one sequence and of more.
const FEW_STEPS: [([u64; SEQUENCES], u64); 8] = [
    ([3, 0, 1], 2),
    ([1, 0, 0], 1),
    ([1, 2, 1], 3),
    ([0, 1, 2], 0),
    ([0, 1, 0], 1),
    ([4, 0, 0], 4),
    ([1, 1, 1], 3),
    ([0, 0, 1], 1),
];

/// And their bounds.
const FEW: Syms = Syms { t: TURNED_TOKENS, r: TURNED_TOKENS };

/// Before which step the last sequence begins anew.
const ANEW: usize = 3;

/// Results of plans whose activations are float32 throughout: what the kernels' own tolerances may grow to.
const EXACT: f64 = 1e-4;
/// Where a GPU's matrix units take numbers rounded to F16: queries and what they attend by, of caches in F16.
const HALVES: f64 = 1e-3;
/// Where activations are quantised, or numbers rounded to BF16, a rounding that falls the other way is passed on.
const QUANTISED: f64 = 2e-2;

/// A fused random graph, its plan, and what it is made of.
struct Case {
    what: String,
    unfused: Graph,
    fused: Verified,
    target: Target,
    file: Arc<GgufFile>,
    plan: LoadedPlan,
}

impl Case {
    fn new(seed: u64, target: Target, exact: bool) -> Case {
        Case::within(BOUNDS, seed, target, exact)
    }

    fn within(bounds: Syms, seed: u64, target: Target, exact: bool) -> Case {
        let graph = random_primitives(seed, 10 + (seed as usize % 5) * 12, bounds);
        let run = |pipeline: Pipeline| {
            let mut graph = graph.clone();
            let report = pipeline.run(&mut graph, &target).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            (verify(graph).unwrap(), report)
        };
        let unfused = run(Pipeline::standard(exact).without_fusions()).0.into_graph();
        let (fused, report) = run(Pipeline::standard(exact));
        let file = weights(&graph);
        let plan = planned(&fused, &file, &target);
        let mut launches = BTreeMap::<String, u64>::new();
        for call in &plan.programs[0].calls {
            let kernel = &plan.kernels[call.kernel as usize];
            *launches.entry(kernel.spec.name().to_string()).or_default() += kernel.launches.len() as u64;
        }
        let reported: BTreeMap<String, u64> = report.after.launches.into_iter().collect();
        assert_eq!(launches, reported, "seed {seed}: planned, reported");
        Case { what: format!("seed {seed} on {}", target.name), unfused, fused, target, file, plan }
    }
}

/// The plan of one program, by way of its bytes.
fn planned(graph: &Verified, file: &GgufFile, target: &Target) -> LoadedPlan {
    let parts = Parts {
        model: plan::Model {
            source: None,
            identity: file.identity(),
            full_hash: None,
            architecture: "random".into(),
            name: "random".into(),
        },
        target: target.clone(),
        options: plan::Options {
            exact: true,
            kv: KvTypes::both(DType::F32),
            context: CONTEXT,
            sequences: SEQUENCES as u64,
            chunk: graph.bounds.t,
            greedy: false,
        },
        programs: vec![(generated(graph, target).0, Report::default())],
    };
    LoadedPlan::from_bytes(&Plan::build(parts).unwrap().to_bytes().unwrap()).unwrap()
}

/// The program of a graph, and the node of each call.
fn generated(graph: &Verified, target: &Target) -> (Program, Vec<NodeId>) {
    let layouts = Layouts::choose([graph], target);
    let generated = layouts.and_then(|layouts| codegen::generate_traced(graph, target, &layouts));
    generated.unwrap_or_else(|e| panic!("{e}:\n{}", **graph))
}

/// The steps of a case.
fn steps(seed: u64, bounds: Syms) -> impl Iterator<Item = RandomStep> {
    let mut sequences = Sequences::new(Paging::of(seed), seed);
    let steps = if bounds.t == FEW.t { FEW_STEPS } else { STEPS };
    steps.into_iter().enumerate().map(move |(i, (tokens, wanted))| {
        if i == ANEW {
            sequences.begin(SEQUENCES - 1);
        }
        sequences.step(tokens, wanted)
    })
}

type States = indexmap::IndexMap<String, Tensor>;

/// Each kernel beside its body, for operands that follow from `states`.
fn checked(case: &Case, device: &mut OnDevice, step: &RandomStep, states: &States) -> Checked {
    let (at, given) = (step.syms, inputs(&case.fused, step));
    let leaf = |op: &Op, ty: &TensorType| -> Result<Tensor, CheckError> {
        Ok(match op {
            Op::Input { name, .. } => given.iter().find(|(n, _)| n == name).unwrap().1.clone(),
            Op::State { name, .. } => {
                states.get(name).map_or_else(|| Tensor::zeros(ty, &at), |s| Ok(s.clone()))?
            }
            Op::Weight { name, rows } => weight(name, *rows, ty, &at),
            _ => unreachable!("a leaf"),
        })
    };
    let (_, nodes) = generated(&case.fused, &case.target);
    check_kernels(&case.fused, device.calls_of(&nodes), at, &leaf)
        .unwrap_or_else(|e| panic!("{}: {e}", case.what))
}

/// What an unfused graph gives: its results that are no states, and the states after it.
fn interpreted(g: &Graph, step: &RandomStep, states: &States) -> (Vec<Tensor>, States) {
    let at = step.syms;
    let given: Vec<Tensor> = inputs(g, step).into_iter().map(|(_, tensor)| tensor).collect();
    let mut types = BTreeMap::new();
    let mut before = States::new();
    for id in g.ids() {
        match g.op(id) {
            Op::State { name, .. } => {
                let state = states.get(name).cloned();
                before.insert(
                    name.clone(),
                    state.unwrap_or_else(|| Tensor::zeros(g.ty(id.into()), &at).unwrap()),
                );
            }
            Op::Weight { name, rows } => _ = types.insert(name.clone(), whole(g.ty(id.into()), *rows)),
            _ => {}
        }
    }
    let weight = |name: &str| Ok(named(name, &types[name], &at));
    let all = eval(g, &at, &given, &weight, before).unwrap_or_else(|e| panic!("{e}"));
    let (mut results, mut after) = (vec![], States::new());
    for (v, tensor) in g.results().into_iter().zip(all) {
        match state_of(g, v) {
            Some(name) => _ = after.insert(name, tensor),
            None => results.push(tensor),
        }
    }
    (results, after)
}

/// The state that a value of an unfused graph is a version of.
fn state_of(g: &Graph, mut v: Value) -> Option<String> {
    while let Some(previous) = g.previous_version(v) {
        v = previous;
    }
    match g.op(v.node) {
        Op::State { name, .. } => Some(name.clone()),
        _ => None,
    }
}

/// Whether any value of the graph is quantised on the way.
fn quantises(g: &Graph) -> bool {
    g.ids().into_iter().any(|id| match g.op(id) {
        Op::QuantAct => true,
        Op::Fused(fused) => quantises(&fused.body),
        _ => false,
    })
}

/// What results of the plan may be off by.
fn tolerance_of(case: &Case) -> f64 {
    let rounds_to = |dtype| case.plan.kernels.iter().any(|kernel| kernel.precision == dtype);
    match quantises(&case.fused) || rounds_to(DType::BF16) {
        true => QUANTISED,
        false if rounds_to(DType::F16) => HALVES,
        false => EXACT,
    }
}

fn is_finite(x: &Tensor) -> bool {
    x.dtype() == DType::I32 || x.to_f32().unwrap().iter().all(|x| x.is_finite())
}

/// How far a result of a plan is from the interpreter's; none for indices, which are right or wrong.
fn far(found: &[u8], wanted: &Tensor) -> Option<f64> {
    let found = Tensor::new(wanted.dtype(), wanted.dims().to_vec(), found.to_vec()).unwrap();
    if wanted.dtype() == DType::I32 {
        return None;
    }
    let (a, b) = (found.to_f32().unwrap(), wanted.to_f32().unwrap());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(&b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    Some(if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() })
}

/// The logits whose largest the graph's argmax takes, from the interpreter.
fn logits(g: &Graph, step: &RandomStep, states: &States) -> Vec<f32> {
    let argmax = g.ids().into_iter().find(|&id| matches!(g.op(id), Op::ArgMax)).expect("what gave an index");
    let mut graph = g.clone();
    // Before all others, as what states become must be returned, and last.
    let all: Vec<_> = g.operand(argmax, 0).into_iter().chain(g.results()).collect();
    graph.set_return(&all);
    interpreted(&graph, step, states).0[0].to_f32().unwrap()
}

/// Indices of the largest logits must be such, but for what rounding may change.
fn assert_largest(what: &str, found: &[u8], logits: &[f32], tolerance: f64) {
    let found: Vec<i32> = found.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    for (row, &i) in logits.chunks((logits.len() / found.len().max(1)).max(1)).zip(&found) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let size = row.iter().fold(0f32, |m, x| m.max(x.abs()));
        let short = f64::from(largest - row[usize::try_from(i).unwrap()]);
        assert!(short <= tolerance * f64::from(size), "{what}: {i} is not the largest, by {short} of {size}");
    }
}

/// What a launch of a kernel is made of, for counting.
fn kinds(kernel: &Implementation, step: &RandomStep) -> Vec<String> {
    let spec = &kernel.spec;
    let name = spec.name();
    let dtype = |arg: u16| spec.args[usize::from(arg)].ty.dtype;
    let tokens = if step.syms.t == 1 { "one token" } else { "some tokens" };
    let mut kinds = vec![format!("{name} of {tokens}")];
    let several =
        || format!("{name} of {} sequence", if step.sequences == 1 { "one" } else { "more than one" });
    match &spec.computes {
        Computation::Matmul(m) => {
            let x = dtype(m.x);
            for part in &m.parts {
                kinds.push(format!("{} weights meet {x}", part.format));
                if kernel.layout(part.weight) != Layout::RowMajor {
                    kinds.push(format!("{} weights lie {}", part.format, kernel.layout(part.weight).name()));
                }
                let bias = if part.bias.is_some() { " bias" } else { "" };
                let residual = if part.residual.is_some() { " residual" } else { "" };
                let epilogue = match &m.epilogue {
                    Epilogue::Store => "store".to_string(),
                    Epilogue::Swiglu { out } => format!("swiglu to {}", dtype(*out)),
                    Epilogue::ArgMax { .. } => "argmax".to_string(),
                };
                kinds.push(format!("epilogue{bias}{residual} {epilogue}"));
            }
        }
        Computation::Norm(n) => {
            let source = match n.source {
                NormSource::Embedding { table, .. } => {
                    kinds.push(format!("{} rows", dtype(table)));
                    "rows of a table"
                }
                NormSource::Sum { .. } => "a sum",
                NormSource::Rows { .. } => "rows",
            };
            let to = |name: &str, out: Option<u16>| out.map(|_| format!(" {name}")).unwrap_or_default();
            let outs =
                [to("rows", n.rows_out), to("norm", n.norm_out), to("quantised", n.quant_out)].concat();
            kinds.push(format!("norm of {source}, to{outs}"));
        }
        Computation::RopeKv(r) => {
            kinds.push(format!("rope_kv {:?} to {}", r.rope.style, dtype(r.k.rows.cache)));
            kinds.push(format!("rope_kv {} norm", if r.k.norm.is_some() { "with" } else { "without" }));
        }
        Computation::Attention(a) => {
            let shared = if a.heads == a.kv_heads { "own" } else { "shared" };
            kinds.push(format!("attention over {shared} {} to {}", dtype(a.k), dtype(a.out)));
            kinds.push(format!("attention {} window", if a.window.is_some() { "with" } else { "without" }));
            kinds.push(format!("attention over pages of {}", a.page));
            kinds.push(several());
        }
        // Of GPUs.
        Computation::RopeAttention(_) => kinds.push(several()),
        Computation::Swiglu(s) => kinds.push(format!("swiglu to {}", dtype(s.out))),
        Computation::GatedScan(s) => {
            kinds.push(format!("gated_scan {} gate", if s.gate.is_some() { "with" } else { "without" }));
            kinds.push(several());
        }
        Computation::Op(_) => {}
    }
    kinds
}

/// All that must occur: see [`kinds`].
fn wanted() -> BTreeSet<String> {
    let mut all: BTreeSet<String> = [
        "epilogue store",
        "epilogue bias store",
        "epilogue residual store",
        "epilogue bias residual store",
        "epilogue argmax",
        "epilogue swiglu to f32",
        "epilogue swiglu to q8_act",
        "swiglu to f32",
        "swiglu to q8_act",
        "norm of a sum, to rows norm",
        "norm of a sum, to norm quantised",
        "norm of rows of a table, to rows norm",
        "norm of rows of a table, to rows quantised",
        "norm of rows, to norm",
        "norm of rows, to quantised",
        "rope_kv Interleaved to f16",
        "rope_kv NeoX to f16",
        "rope_kv Interleaved to f32",
        "rope_kv NeoX to f32",
        "rope_kv with norm",
        "rope_kv without norm",
        "attention over own f16 to f32",
        "attention over shared f16 to f32",
        "attention over shared f16 to q8_act",
        "attention over shared f32 to f32",
        "attention over shared f32 to q8_act",
        "attention with window",
        "attention without window",
        "attention of one sequence",
        "attention of more than one sequence",
        "gated_scan with gate",
        "gated_scan without gate",
        "gated_scan of one sequence",
        "gated_scan of more than one sequence",
    ]
    .map(String::from)
    .into();
    for page in PAGES {
        all.insert(format!("attention over pages of {page}"));
    }
    for format in [DType::Q4_K, DType::Q6_K] {
        all.insert(format!("{format} weights lie interleaved16"));
    }
    for format in DType::WEIGHTS {
        all.insert(format!("{format} rows"));
        all.insert(format!("{format} weights meet f32"));
        if format.is_quantised() {
            all.insert(format!("{format} weights meet q8_act"));
        }
    }
    for kernel in [
        "dequant_matmul",
        "merge",
        "matmul_swiglu",
        "sample_head",
        "attention",
        "rope_kv",
        "add_rmsnorm",
        "dequant_rmsnorm",
        "swiglu",
        "gated_scan",
        "quant_act",
    ] {
        for tokens in ["one token", "some tokens"] {
            all.insert(format!("{kernel} of {tokens}"));
        }
    }
    all
}

/// The pool of a plan, which nothing but these calls touches.
struct Memory {
    /// Aligned to 64 bytes, as a page is.
    pool: memmap2::MmapMut,
    arena: std::ops::Range<usize>,
}

impl Memory {
    fn of(plan: &Plan) -> Memory {
        let pool = memmap2::MmapMut::map_anon(plan.pool_bytes().max(1) as usize).unwrap();
        let arena = plan.arena_offset as usize..plan.pool_bytes() as usize;
        Memory { pool, arena }
    }
}

/// Whether a step launches a kernel: not if there is nothing to write, as where no rows are wanted.
fn is_launched(kernel: &Implementation, at: &Syms) -> bool {
    kernel.args().any(|arg| arg.access != Access::Read && arg.ty.bytes(at) > 0)
}

/// Makes the calls of a step in an order that is random, but for what streams and events say; returns the results.
fn in_any_order(
    case: &Case,
    features: &Features,
    memory: &mut Memory,
    step: &RandomStep,
    rng: &mut Rng,
) -> (Vec<Vec<u8>>, bool) {
    let (program, at) = (&case.plan.programs[0], &step.syms);
    let arena = memory.arena.clone();
    // NaN in every format: whatever a launch needs, this step must have written.
    memory.pool[arena.clone()].fill(0xff);
    let given = inputs(&case.fused, step);
    for input in &program.inputs {
        let (_, tensor) = given.iter().find(|(name, _)| *name == input.name).unwrap();
        let offset = arena.start + program.buffers[input.buffer as usize].offset as usize;
        memory.pool[offset..][..tensor.bytes().len()].copy_from_slice(&tensor.bytes());
    }
    let threads = Threads::new(Some(1)).unwrap();
    let weights =
        Weights::load(&case.plan, Arc::clone(&case.file), &threads, features, &Default::default()).unwrap();
    let base = memory.pool.as_mut_ptr();
    let (n, mut done) = (program.calls.len(), vec![false; program.calls.len()]);
    let mut sorted = true;
    for made in 0..n {
        let signalled =
            |event: &u32| (0..n).any(|l| done[l] && program.calls[l].slot.signals == Some(*event));
        let ready = |l: &usize| {
            let slot = &program.calls[*l].slot;
            let first = (0..*l).all(|k| done[k] || program.calls[k].slot.stream != slot.stream);
            !done[*l] && first && slot.waits.iter().all(signalled)
        };
        let able: Vec<usize> = (0..n).filter(ready).collect();
        let l = *rng.pick(&able);
        sorted &= l == made;
        let call = &program.calls[l];
        let kernel = &case.plan.kernels[call.kernel as usize];
        let place = |arg: &BufRef| match *arg {
            BufRef::Arena(b) => base.wrapping_add(arena.start + program.buffers[b as usize].offset as usize),
            BufRef::State(s) => base.wrapping_add(case.plan.states[s as usize].offset as usize),
            BufRef::Weight(w) => weights.at(w).cast_mut(),
        };
        let args: Vec<RawArg> = (call.args.iter().zip(kernel.args()))
            .map(|(arg, of)| RawArg { ptr: place(arg), len: of.ty.bytes(at) as usize })
            .collect();
        done[l] = true;
        if !is_launched(kernel, at) {
            continue;
        }
        for (bound, launch) in bind(kernel, features).unwrap().iter().zip(&kernel.launches) {
            // SAFETY: the plan is validated, so every argument lies within the pool or is a weight, which is only read; one
            // launch runs at a time, on all of its items.
            unsafe { bound.run(&args, at, &mut std::iter::once(0..launch.items(at) as usize)) };
        }
    }
    let result = |&b: &u32| {
        let buffer = &program.buffers[b as usize];
        let bytes = buffer.ty.bytes(at) as usize;
        memory.pool[arena.start + buffer.offset as usize..][..bytes].to_vec()
    };
    (program.results.iter().map(result).collect(), sorted)
}

#[test]
fn plans_of_random_graphs_compute_what_the_graphs_do() {
    let graphs = std::env::var("SINTER_FUZZ_GRAPHS").map_or(GRAPHS, |n| n.parse().expect("a number"));
    let cpu = |name: &str, target: Target, streams| Target {
        name: name.into(),
        kind: TargetKind::Cpu,
        streams,
        ..target
    };
    let mut launched = BTreeMap::<String, u64>::new();
    let (mut runs, mut waits, mut shuffled, mut overflows, mut worst) = (0, 0, 0, 0, [0f64; 3]);
    let gpu = everywhere::gpu_target();
    for seed in 0..graphs {
        let cpus = [
            (cpu("cpu", Target::cpu(), 1), seed % 2 == 0),
            // Other fusions win where launches cost more.
            (cpu("three streams", Target::test_wave32(), 3), seed % 4 < 2),
        ];
        // Kernels of a GPU take a compiler a second or two.
        let gpu = gpu.iter().filter(|_| seed % 4 < 2).map(|gpu| (gpu.clone(), seed % 4 == 0));
        for (target, exact) in cpus.into_iter().chain(gpu) {
            let on_cpu = target.kind == TargetKind::Cpu;
            // A GPU's kernels of few tokens are others.
            let bounds = if !on_cpu && seed % 8 < 4 { FEW } else { BOUNDS };
            let case = Case::within(bounds, seed, target, exact);
            let tolerance = tolerance_of(&case);
            let of_such = [EXACT, HALVES, QUANTISED].iter().position(|of| *of == tolerance).unwrap();
            waits += case.plan.programs[0].calls.iter().map(|l| l.slot.waits.len()).sum::<usize>();
            for features in Features::available().into_iter().take(if on_cpu { usize::MAX } else { 1 }) {
                let what = format!("{}, {}", case.what, features.name());
                let options = DeviceOptions {
                    threads: Some(1 + seed as usize % 2),
                    features: Some(features),
                    ..DeviceOptions::default()
                };
                let mut device = Executor::new(case.plan.clone(), case.file.clone(), &options).unwrap();
                let plan = Arc::new(case.plan.clone());
                let mut alone = OnDevice { device: open(&plan, case.file.clone(), &options).unwrap(), plan };
                let (mut memory, mut rng) = (Memory::of(&case.plan), Rng::new(seed));
                let (mut states, mut made) = (States::new(), 0);
                runs += 1;
                for step in &steps(seed, bounds).collect::<Vec<_>>() {
                    let at = step.syms;
                    let what = format!("{what}, {at:?} of {} sequences", step.sequences);
                    let (wanted, after) = interpreted(&case.unfused, step, &states);
                    // Where f16 overflows, nothing can be said any more.
                    if after.values().chain(&wanted).any(|x| !is_finite(x)) {
                        overflows += 1;
                        break;
                    }
                    let beside = checked(&case, &mut alone, step, &states);
                    for node in &beside.nodes {
                        assert!(node.passes(), "{what}: {node:?}\n{}", *case.fused);
                    }
                    let given = inputs(&case.fused, step);
                    let given: Vec<_> = given.iter().map(|(n, x)| (n.as_str(), x.bytes())).collect();
                    let given: Vec<(&str, &[u8])> = given.iter().map(|(n, x)| (*n, &x[..])).collect();
                    device.step(0, &at, &given).unwrap_or_else(|e| panic!("{what}: {e}"));
                    let shown = on_cpu.then(|| in_any_order(&case, &features, &mut memory, step, &mut rng));
                    shuffled += u64::from(shown.as_ref().is_some_and(|(_, sorted)| !sorted));
                    assert!(shown.iter().all(|(shown, _)| shown.len() == wanted.len()), "{what}");
                    for (i, wanted) in wanted.iter().enumerate() {
                        let found = &device.result(i).unwrap();
                        assert!(
                            shown.iter().all(|(shown, _)| *found == shown[i]),
                            "{what}: result {i} depends on the order of calls\n{}",
                            *case.plan
                        );
                        match far(found, wanted) {
                            Some(error) => {
                                worst[of_such] = worst[of_such].max(error);
                                assert!(
                                    error <= tolerance,
                                    "{what}: result {i} is off by {error:e}\n{}",
                                    *case.fused
                                );
                            }
                            None => {
                                assert_largest(&what, found, &logits(&case.unfused, step, &states), tolerance)
                            }
                        }
                    }
                    states = after;
                    for call in &case.plan.programs[0].calls {
                        let kernel = &case.plan.kernels[call.kernel as usize];
                        if !is_launched(kernel, &at) {
                            continue;
                        }
                        made += kernel.launches.len() as u64;
                        for kind in kinds(kernel, step) {
                            *launched.entry(kind).or_default() += 1;
                        }
                    }
                }
                let counts: u64 = device.launch_counts().values().sum();
                assert_eq!(counts, made, "{what}");
            }
        }
    }
    // Not println, which a test that passes keeps to itself.
    writeln!(
        std::io::stderr(),
        "{graphs} random graphs; errors up to {:.1e} exactly, {:.1e} in F16, {:.1e} quantised; {overflows} of {runs} runs overflow; {waits} waits, {shuffled} steps \
         in another order; launches: {launched:#?}",
        worst[0], worst[1], worst[2]
    )
    .unwrap();
    assert!(waits > 100 && shuffled > 100, "{waits} waits, {shuffled} steps in another order");
    assert!(overflows * 20 < runs, "{overflows} of {runs} runs overflow");
    // Where arithmetic is checked, the graphs are a quarter of those that an optimised build is held to.
    if !cfg!(debug_assertions) {
        for kind in wanted() {
            assert!(launched.get(&kind).is_some_and(|n| *n >= LEAST), "{kind} was launched too rarely");
        }
        // Of which there are fewer graphs.
        for kind in ["one token", "some tokens"].map(|tokens| format!("rope_attention of {tokens}")) {
            assert!(gpu.is_none() || launched.contains_key(&kind), "no {kind} was launched");
        }
    }
}

/// GPUs have a kernel for everything that graphs can hold, and it takes as many launches as the cost model says.
#[test]
fn random_graphs_have_kernels_on_gpus() {
    let mut turned = 0;
    for seed in 0..300 {
        // Of few tokens they are others.
        let bounds = if seed / 2 % 2 == 0 { FEW } else { BOUNDS };
        for arch in ["sm_90", "gfx1100", "gfx942"] {
            let case = Case::within(bounds, seed, Target::gpu(arch).unwrap(), seed % 2 == 0);
            let turns = |k: &&Implementation| matches!(k.spec.computes, Computation::RopeAttention(_));
            turned += case.plan.kernels.iter().filter(turns).count();
        }
    }
    assert!(turned >= 20, "{turned} kernels turn where they attend");
}

/// Each wait of a plan is needed: without any of them, the plan is refused.
#[test]
fn a_plan_without_one_of_its_waits_is_refused() {
    let mut dropped = 0;
    for seed in 0..40 {
        let target = Target { kind: TargetKind::Cpu, streams: 3, ..Target::test_wave32() };
        let case = Case::new(seed, target, true);
        for (l, call) in case.plan.programs[0].calls.iter().enumerate() {
            for w in 0..call.slot.waits.len() {
                let mut plan: Plan = (*case.plan).clone();
                plan.programs[0].calls[l].slot.waits.remove(w);
                let says = plan.validate().expect_err("a plan that races").to_string();
                assert!(says.contains("nothing orders them") || says.contains("share bytes"), "{says}");
                dropped += 1;
            }
        }
    }
    assert!(dropped > 50, "{dropped} waits in all");
}
