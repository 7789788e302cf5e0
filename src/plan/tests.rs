use super::bytes::frame;
use super::*;
use crate::codegen::spec::{
    Access, Alias, Arg, Buffer, Call, Code, CpuCode, Extent, HipCode, Index, IndexSource, LaunchSpec, Place,
    Program,
};
use crate::gguf::Digest;
use crate::ir::{Decision, Dim, Op, Outcome, Report, Slice, Why};
use proptest::prelude::*;

pub(crate) fn identity() -> Identity {
    Identity { len: 1000, header: Digest([0xab; 32]), samples: Digest([0xcd; 32]) }
}

fn spec(op: Op, args: Vec<Arg>, may_alias: Vec<Alias>) -> Implementation {
    let grid = vec![Extent::each(args.last().unwrap().ty.shape[0])];
    Implementation {
        spec: KernelSpec { kernel: None, computes: Computation::Op(op), args },
        layouts: vec![],
        workspace: vec![],
        precision: DType::F32,
        may_alias,
        launches: vec![LaunchSpec { code: Code::Cpu(CpuCode::Whole), grid }],
    }
}

fn arg(access: Access, ty: &TensorType) -> Arg {
    Arg::new(access, ty.clone())
}

/// An index argument that comes from an input.
fn index(ty: &TensorType, below: u64, distinct: bool) -> Arg {
    let index = Index { below: Dim::n(below), distinct, source: IndexSource::Input };
    Arg { index: Some(index), ..arg(Access::Read, ty) }
}

/// Rows of a table plus a bias, appended to a cache of one page, whose filled rows go through SiLU: the result.
pub(crate) fn toy(name: &str, t: u64) -> Program {
    use Access::{Read, Update, Write};
    let ids = TensorType::new(DType::I32, [Dim::T]);
    let table = TensorType::new(DType::F32, [5, 8]);
    let bias = TensorType::new(DType::F32, [8]);
    let rows = TensorType::new(DType::F32, [Dim::T, Dim::n(8)]);
    let heads = TensorType::new(DType::F32, [Dim::T, Dim::n(1), Dim::n(8)]);
    let cache = TensorType::new(DType::F32, [16, 1, 8]);
    let filled = TensorType::new(DType::F32, [1, 16, 1, 8]);
    let (tables, lengths) = (TensorType::new(DType::I32, [1, 1]), TensorType::new(DType::I32, [1]));
    let alias = |write, read| vec![Alias { write, read }];
    let append = vec![arg(Update, &cache), arg(Read, &heads), index(&ids, 16, true)];
    let over_filled = vec![Extent::each(1), Extent::each(16), Extent::each(1)];
    let read =
        vec![arg(Read, &cache), index(&tables, 1, false), index(&lengths, 17, false), arg(Write, &filled)];
    let mut read = spec(Op::KvRead { page: 16 }, read, vec![]);
    let mut silu = spec(Op::Silu, vec![arg(Read, &filled), arg(Write, &filled)], vec![]);
    (read.launches[0].grid, silu.launches[0].grid) = (over_filled.clone(), over_filled);
    let fetch = vec![arg(Read, &table), index(&ids, 5, false), arg(Write, &rows)];
    let state = Place::State { name: "cache".into(), role: StateRole::Appended };
    Program {
        name: name.into(),
        bounds: Syms { t, r: 0 },
        kernels: vec![
            spec(Op::GetRows, fetch, vec![]),
            spec(Op::Add, vec![arg(Read, &rows), arg(Read, &bias), arg(Write, &rows)], alias(2, 0)),
            spec(Op::KvAppend, append, vec![]),
            silu,
            read,
        ],
        calls: [
            (0, vec![1, 0, 3]),
            (1, vec![3, 2, 4]),
            (2, vec![5, 4, 8]),
            (4, vec![5, 9, 10, 7]),
            (3, vec![7, 6]),
        ]
        .into_iter()
        .map(|(kernel, args)| Call { kernel, args, label: format!("node {kernel}") })
        .collect(),
        buffers: [
            (&ids, Place::Arena),
            (&table, Place::weight("table")),
            (&bias, Place::weight("bias")),
            (&rows, Place::Arena),
            (&rows, Place::Arena),
            (&cache, state),
            (&filled, Place::Arena),
            (&filled, Place::Arena),
            (&ids, Place::Arena),
            (&tables, Place::Arena),
            (&lengths, Place::Arena),
        ]
        .map(|(ty, place)| Buffer { ty: ty.clone(), place })
        .into(),
        inputs: [("tokens", 0), ("rows", 8), ("tables", 9), ("lengths", 10)]
            .map(|(name, buffer)| (name.into(), buffer))
            .into(),
        results: vec![6],
    }
}

pub(crate) fn parts(identity: Identity) -> Parts {
    let decision = Decision {
        pass: "swiglu".into(),
        at: "silu".into(),
        takes: vec![1],
        makes: vec![],
        outcome: Outcome::Rejected { why: Why::NeedsLogits },
    };
    Parts {
        model: Model {
            source: Some("toy.gguf".into()),
            identity,
            full_hash: None,
            architecture: "toy".into(),
            name: "Toy".into(),
        },
        target: Target::test_cpu(),
        options: Options {
            exact: true,
            kv: KvTypes::both(DType::F32),
            context: 16,
            sequences: 1,
            chunk: 4,
            greedy: false,
        },
        programs: vec![
            (toy("prefill", 4), Report { decisions: vec![decision], ..Report::default() }),
            (toy("decode", 1), Report::default()),
        ],
    }
}

fn plan() -> Plan {
    Plan::build(parts(identity())).unwrap()
}

#[test]
fn a_plan_is_readable() {
    let mut plan = plan();
    plan.kernels_hash = "0123456789abcdef".into();
    plan.engine = "0.1.0".into();
    insta::assert_snapshot!(plan, @r#"
    plan by sinter 0.1.0, kernels 0123456789ab
    model   "Toy" (toy), toy.gguf: 1000 bytes, header abababababab, samples cdcdcdcdcdcd
    target  test-cpu (cpu)
    options context 16, sequences 1, chunk 4, kv f32, exact
    pool    1536 bytes: states 512, arena 1024
      @0          "cache" f32[16,1,8] appended
    weights 2 (192 bytes)
      "table" f32[5,8]
      "bias" f32[8]
    kernels 5
      k0 get_rows(f32[5,8], i32[T], >f32[T,8]) grid T
      k1 add(f32[T,8], f32[8], >f32[T,8]) 2=0 grid T
      k2 kv_append(&f32[16,1,8], f32[T,1,8], i32[T]) grid T
      k3 silu(f32[1,16,1,8], >f32[1,16,1,8]) grid 1 16 1
      k4 kv_read(f32[16,1,8], i32[1,1], i32[1], >f32[1,16,1,8]) grid 1 16 1
    program "prefill" T<=4 R<=0
      arena 1024 bytes, 1024 live at once
      b0 i32[T] @128..144 input %tokens < 5
      b1 i32[T] @192..208 input %rows < 16 distinct
      b2 i32[1,1] @512..516 input %tables < 1
      b3 i32[1] @576..580 input %lengths < 17
      b4 f32[T,8] @0..128
      b5 f32[T,8] @0..128
      b6 f32[1,16,1,8] @0..512
      b7 f32[1,16,1,8] @512..1024 result 0
         0: k0 get_rows("table", b0, >b4)  node 0
         1: k1 add(b4, "bias", >b5)  node 1
         2: k2 kv_append(&"cache", b5, b1)  node 2
         3: k4 kv_read("cache", b2, b3, >b6)  node 4
         4: k3 silu(b6, >b7)  node 3
      decisions: 1
    program "decode" T<=1 R<=0
      arena 1024 bytes, 1024 live at once
      b0 i32[T] @0..4 input %tokens < 5
      b1 i32[T] @64..68 input %rows < 16 distinct
      b2 i32[1,1] @512..516 input %tables < 1
      b3 i32[1] @576..580 input %lengths < 17
      b4 f32[T,8] @128..160
      b5 f32[T,8] @128..160
      b6 f32[1,16,1,8] @0..512
      b7 f32[1,16,1,8] @512..1024 result 0
         0: k0 get_rows("table", b0, >b4)  node 0
         1: k1 add(b4, "bias", >b5)  node 1
         2: k2 kv_append(&"cache", b5, b1)  node 2
         3: k4 kv_read("cache", b2, b3, >b6)  node 4
         4: k3 silu(b6, >b7)  node 3
      decisions: 0
    "#);
}

#[test]
fn kernels_states_and_weights_are_shared_by_programs() {
    let plan = plan();
    assert_eq!(plan.kernels.len(), 5);
    assert_eq!((plan.weights.len(), plan.states.len()), (2, 1));
    assert_eq!(plan.programs[1].inputs[0].below, Some(Dim::n(5)));
    assert_eq!(plan.arena_offset, plan.state_bytes());
    assert_eq!(plan.pool_bytes(), plan.arena_offset + plan.programs[0].arena_bytes);
}

#[test]
fn bytes_are_reproducible_and_round_trip() {
    let bytes = plan().to_bytes().unwrap();
    assert_eq!(bytes, plan().to_bytes().unwrap());
    let loaded = LoadedPlan::from_bytes(&bytes).unwrap();
    assert_eq!(*loaded, plan());
    assert_eq!(loaded.to_bytes().unwrap(), bytes);
}

/// The types of a plan as they are written, which [`FORMAT`] is the version of: another hash needs another version, which
/// plans of the last one are then refused by.
#[test]
fn the_format_has_one_schema() {
    use serde_reflection::{Samples, Tracer, TracerConfig};
    let mut tracer = Tracer::new(TracerConfig::default());
    let samples = Samples::new();
    // Enums take a turn for each of their variants.
    tracer.trace_type::<Plan>(&samples).unwrap();
    macro_rules! trace {
        ($($ty:ty)*) => { $(tracer.trace_type::<$ty>(&samples).unwrap();)* };
    }
    trace!(crate::ir::Limit crate::ir::Origin DType Layout Outcome Why Computation Op Access Code CpuCode BufRef TargetKind);
    trace!(crate::ir::Kernel crate::ir::RopeStyle StateRole IndexSource NormSource crate::codegen::spec::Epilogue);
    let registry = tracer.registry().unwrap();
    let mut text = String::new();
    for (name, format) in &registry {
        text += &format!("{name}: {format:?}\n");
    }
    for name in ["Plan", "PlannedCall", "MatmulSpec", "Decision", "Syms", "Why", "DType"] {
        assert!(registry.contains_key(name), "{name} is not in {:?}", registry.keys());
    }
    let hash = blake3::hash(text.as_bytes()).to_hex();
    assert_eq!((FORMAT, &hash[..16]), (15, "a9caf60f4924235d"), "the schema of plans:\n{text}");
}

/// The widest window counts, and one mask without any sees everything.
#[test]
fn pages_are_kept_for_the_widest_window() {
    let window = |masks: &[Option<u32>]| {
        let mut plan = plan();
        let mask = |window: &Option<u32>| {
            spec(Op::CausalMask { window: *window }, plan.kernels[1].spec.args.clone(), vec![])
        };
        let masks: Vec<_> = masks.iter().map(mask).collect();
        plan.kernels.extend(masks);
        plan.paging().unwrap().unwrap().window
    };
    assert_eq!(window(&[]), None);
    assert_eq!(window(&[Some(4), Some(9), Some(2)]), Some(9));
    assert_eq!(window(&[Some(4), None, Some(9)]), None);
}

/// A plan for a GPU of two kernels with one source and one with another, compiled ahead of time.
fn with_objects() -> Plan {
    let mut plan = plan();
    plan.target = Target::gpu("gfx1100").unwrap();
    for (kernel, source) in plan.kernels.iter_mut().zip(["a", "a", "b", "b", "b"]) {
        let code = HipCode { source: source.into(), entry: "entry".into(), threads: 64 };
        kernel.launches[0].code = Code::Hip(code);
    }
    let object = |source| CodeObject {
        arch: "gfx1100".into(),
        source: CodeObject::hash(source),
        compiler: "clang 19".into(),
        code: source.bytes().cycle().take(300).collect(),
    };
    plan.objects = ["a", "b"].map(object).into();
    plan
}

#[test]
fn machine_code_is_of_the_sources_or_refused() {
    let plan = with_objects();
    let loaded = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
    assert!(*loaded == plan && loaded.objects[1].code == [b'b'; 300]);
    assert_eq!(plan.sources().len(), 2);
    assert!(plan.to_string().contains("\nobjects 2 (600 bytes) by clang 19\n"));
    let tree = serde_json::to_value(&plan).unwrap();
    assert!(tree["objects"][0]["code"].as_str().unwrap().starts_with("6161"));
    assert_eq!(serde_json::from_value::<Plan>(tree).unwrap(), plan);

    type Change = fn(&mut Plan);
    let cases: [(&str, Change); 6] = [
        ("there is machine code for \"gfx942\", and the plan is for \"gfx1100\"", |p| {
            p.objects[1].arch = "gfx942".into()
        }),
        ("kv_append (entry): there is no machine code of its source", |p| drop(p.objects.pop())),
        ("get_rows (entry): there is no machine code of its source", |p| {
            p.objects[0].source = CodeObject::hash("c")
        }),
        ("there is machine code of the source ", |p| {
            p.objects.push(CodeObject { source: CodeObject::hash("d"), ..p.objects[0].clone() });
        }),
        ("there are two code objects called", |p| p.objects.push(p.objects[0].clone())),
        ("there is machine code for \"gfx1100\", and the plan is for \"\"", |p| {
            p.target = Target::test_cpu()
        }),
    ];
    for (says, change) in cases {
        let mut plan = with_objects();
        change(&mut plan);
        let error = plan.validate().unwrap_err().to_string();
        assert!(error.starts_with(says), "{error}");
        assert_eq!(refused(&plan.to_bytes().unwrap()), error);
    }
    // Without any, the sources are compiled where the plan runs.
    let mut plan = with_objects();
    plan.objects.clear();
    plan.validate().unwrap();
    assert!(plan.objects_by_source().is_empty());
}

#[test]
fn a_file_holds_plans_of_one_model_for_different_targets() {
    let plans = [plan(), with_objects()];
    let bytes = to_bytes(&plans).unwrap();
    let loaded = LoadedPlan::all_from_bytes(&bytes).unwrap();
    assert!(loaded.len() == 2 && loaded.iter().zip(&plans).all(|(a, b)| **a == *b));
    assert_eq!(refused(&bytes), "the file holds plans for test-cpu, gfx1100, and one is wanted");
    for len in 8..bytes.len() {
        let says = refused(&bytes[..len]);
        assert!(says.starts_with(&format!("the plan is truncated: {len} bytes of ")), "{says}");
    }
    let refuses = |plans: &[Plan], says: &str| {
        assert_eq!(to_bytes(plans).unwrap_err().to_string(), says);
        let bytes = frame(&postcard::to_stdvec(plans).unwrap());
        assert_eq!(LoadedPlan::all_from_bytes(&bytes).unwrap_err().to_string(), says);
    };
    refuses(&[], "the file holds no plan");
    refuses(&[plan(), with_objects(), with_objects()], "the file holds two plans for gfx1100");
    let mut other = with_objects();
    other.model.identity.len += 1;
    refuses(
        &[plan(), other],
        &format!(
            "the file holds plans of different models, {}, {}",
            plan().model.identity,
            Identity { len: 1001, ..identity() }
        )
        .replace(", 1001", " and 1001"),
    );
    // Each is held to the rules.
    let mut invalid = with_objects();
    invalid.objects.pop();
    assert!(refused(&to_bytes(&[plan(), invalid]).unwrap()).contains("there is no machine code"));
}

fn refused(bytes: &[u8]) -> String {
    LoadedPlan::from_bytes(bytes).unwrap_err().to_string()
}

#[test]
fn damaged_bytes_are_refused() {
    let bytes = plan().to_bytes().unwrap();
    assert_eq!(refused(b""), "this is not a plan: it does not begin with SINTERPL");
    assert_eq!(refused(b"GGUF\x03\0\0\0"), refused(b""));
    for len in 8..bytes.len() {
        let says = refused(&bytes[..len]);
        assert!(says.starts_with(&format!("the plan is truncated: {len} bytes of ")), "{says}");
    }
    let mut newer = bytes.clone();
    newer[8] += 1;
    let found = FORMAT + 1;
    let says = format!("the plan has format {found}, this sinter reads format {FORMAT}; compile it again");
    assert_eq!(refused(&newer), says);
    let mut older = bytes.clone();
    older[8] -= 1;
    assert_eq!(refused(&older), says.replace(&found.to_string(), &(FORMAT - 1).to_string()));
    let mut flipped = bytes.clone();
    flipped[100] ^= 4;
    assert_eq!(refused(&flipped), "the plan is damaged: its checksum does not match");
    let longer = [&bytes[..], b"abc"].concat();
    assert_eq!(refused(&longer), "3 bytes follow the end of the plan");
    let payload = &bytes[52..];
    assert_eq!(refused(&frame(&[payload, b"abc"].concat())), "3 bytes follow the end of the plan");
    assert!(refused(&frame(&payload[..payload.len() - 9])).starts_with("the plan is damaged: "));
}

/// What is said of the plan after `change`.
fn invalid(change: impl FnOnce(&mut Plan)) -> String {
    let mut plan = plan();
    change(&mut plan);
    let says = plan.validate().unwrap_err().to_string();
    assert_eq!(refused(&plan.to_bytes().unwrap()), says);
    says
}

fn decode(plan: &mut Plan) -> &mut PlannedProgram {
    &mut plan.programs[1]
}

#[test]
fn every_rule_is_checked() {
    type Change = Box<dyn FnOnce(&mut Plan)>;
    let cases: Vec<(&str, Change)> = vec![
        ("kernel 9 does not exist: there are 5", Box::new(|p| decode(p).calls[0].kernel = 9)),
        ("buffer 17 does not exist: there are 8", Box::new(|p| decode(p).results[0] = 17)),
        (
            "weight \"table\": f32[5,8] cannot lie interleaved16",
            Box::new(|p| p.weights[0].layout = Layout::Interleaved16),
        ),
        (
            "call \"node 0\" does not take its argument 0 as it lies in memory",
            Box::new(|p| p.kernels[0].layouts.push((0, Layout::Interleaved16))),
        ),
        (
            "call \"node 4\" does not take its argument 3 as it lies in memory",
            Box::new(|p| p.kernels[4].layouts.push((3, Layout::Interleaved16))),
        ),
        ("buffer 17 does not exist", Box::new(|p| decode(p).inputs[0].buffer = 17)),
        ("buffer 17 does not exist", Box::new(|p| decode(p).calls[0].args[2] = BufRef::Arena(17))),
        ("state 1 does not exist: there are 1", Box::new(|p| decode(p).calls[2].args[0] = BufRef::State(1))),
        (
            "weight 2 does not exist: there are 2",
            Box::new(|p| decode(p).calls[0].args[0] = BufRef::Weight(2)),
        ),
        ("has 2 arguments, its kernel get_rows takes 3", Box::new(|p| decode(p).calls[0].args.truncate(2))),
        (
            "uses 160 bytes as f32[5,8], but weight \"bias\" has 32",
            Box::new(|p| decode(p).calls[0].args[0] = BufRef::Weight(1)),
        ),
        ("may not write weight \"bias\"", Box::new(|p| decode(p).calls[1].args[2] = BufRef::Weight(1))),
        ("may not write state \"cache\"", Box::new(|p| decode(p).calls[1].args[2] = BufRef::State(0))),
        ("lies at 65536", Box::new(|p| decode(p).buffers[4].offset = 65536)),
        ("not a multiple of 64", Box::new(|p| decode(p).buffers[4].offset = 4)),
        (
            "share bytes while both are in use",
            Box::new(|p| decode(p).buffers[1].offset = decode(p).buffers[0].offset),
        ),
        ("reads buffer b4 f32[T,8] before", Box::new(|p| decode(p).calls.swap(0, 1))),
        ("runs on stream 1, but there are 1", Box::new(|p| decode(p).calls[0].slot.stream = 1)),
        ("waits for event 3", Box::new(|p| decode(p).calls[0].slot.waits.push(3))),
        ("bytes of arena, the plan has 1", Box::new(|p| p.arena_bytes = 1)),
        ("of arena, but 9999 live at once", Box::new(|p| decode(p).lower_bound = 9999)),
        ("state \"cache\" lies at 64 with 512 bytes", Box::new(|p| p.states[0].offset = 64)),
        ("the arena lies at 18446744073709551552", Box::new(|p| p.arena_offset = u64::MAX - 63)),
        ("the arena lies at 513", Box::new(|p| p.arena_offset = 513)),
        ("there are two states called \"cache\"", Box::new(|p| p.states.push(p.states[0].clone()))),
        ("there are two weights called \"bias\"", Box::new(|p| p.weights[0].name = "bias".into())),
        (
            "there are two inputs called \"tokens\"",
            Box::new(|p| decode(p).inputs = vec![decode(p).inputs[0].clone(); 2]),
        ),
        ("state \"cache\" cannot be f32[T,1,8]", Box::new(|p| p.states[0].ty.shape[0] = Dim::T)),
        (
            "follows values that are not checked inputs",
            // Of as many bytes at the bounds, but of one value at every size.
            Box::new(|p| decode(p).buffers[0].ty.shape[0] = Dim::n(1)),
        ),
        (
            "weight \"table\": f32[5,8] from row 1 on is more than 5 rows",
            Box::new(|p| p.weights[0].rows = Some(Slice { first: 1, of: 5 })),
        ),
        ("weight \"bias\" cannot be f32[R]", Box::new(|p| p.weights[1].ty.shape[0] = Dim::R)),
        ("larger than any memory", Box::new(|p| p.states[0].ty.shape[1] = Dim::n(1 << 60))),
        ("not whole blocks", Box::new(|p| p.weights[1].ty.dtype = DType::Q8_0)),
        ("bounds need 1 <= T and R <= T", Box::new(|p| decode(p).bounds.t = 0)),
        ("bounds need 1 <= T and R <= T", Box::new(|p| decode(p).bounds.r = 2)),
        ("1 sequences of 16 tokens with chunks of 0", Box::new(|p| p.options.chunk = 0)),
        ("with chunks of 17", Box::new(|p| p.options.chunk = 17)),
        ("make no sense", Box::new(|p| p.options.sequences = 1 << 40)),
        ("5000 sequences of 16 tokens", Box::new(|p| p.options.sequences = 5000)),
        ("caches of f32,q8_0 make no sense", Box::new(|p| p.options.kv.v = DType::Q8_0)),
        ("values that are not checked inputs", Box::new(|p| decode(p).inputs[0].below = None)),
        (
            "input \"tokens\" allows values that call \"node 0\" cannot follow",
            Box::new(|p| decode(p).inputs[0].below = Some(Dim::n(6))),
        ),
        (
            "input \"tokens\" allows values that call \"node 0\" cannot follow",
            Box::new(|p| decode(p).inputs[0].below = Some(Dim::T)),
        ),
        (
            "input \"rows\" allows values that call \"node 2\" cannot follow",
            Box::new(|p| decode(p).inputs[1].distinct = false),
        ),
        (
            "cache has not 16 rows",
            Box::new(|p| {
                p.states.push(State { name: "more cache".into(), offset: 512, ..p.states[0].clone() });
                p.states[1].ty.shape[0] = Dim::n(8);
                p.arena_offset += 512;
            }),
        ),
        ("streams must lie in 1..=64", Box::new(|p| p.target.streams = 0)),
    ];
    for (want, change) in cases {
        let says = invalid(change);
        assert!(says.contains(want), "{says:?} does not contain {want:?}");
    }
}

/// Whatever the plan says, rows that are repacked are in memory once.
#[test]
fn rows_that_are_repacked_are_in_no_other_weight() {
    let says = |weights: &[(&str, u64, u64, Layout)]| {
        let mut plan = plan();
        let weight = |&(name, first, rows, layout): &(&str, u64, u64, Layout)| Tensor {
            name: name.into(),
            ty: TensorType::new(DType::Q4_K, [rows, 256]),
            rows: Some(Slice { first, of: 96 }),
            layout,
        };
        plan.weights.extend(weights.iter().map(weight));
        plan.validate().map_err(|e| e.to_string())
    };
    use Layout::{Interleaved16 as I, RowMajor as R};
    assert_eq!(says(&[("w", 0, 16, I), ("w", 16, 32, I), ("w", 48, 16, R), ("w", 50, 16, R)]), Ok(()));
    assert_eq!(says(&[("w", 0, 32, I), ("v", 16, 32, I)]), Ok(()));
    for (weights, row) in [
        (&[("w", 0, 32, I), ("w", 16, 32, I)][..], 16),
        (&[("w", 16, 32, I), ("w", 0, 32, R)], 16),
        (&[("w", 0, 64, R), ("w", 1, 2, R), ("w", 48, 16, I)], 48),
        (&[("w", 0, 96, I), ("w", 8, 2, R)], 8),
    ] {
        let want = format!("weight \"w\": row {row} is repacked, and in another weight too");
        assert_eq!(says(weights), Err(want), "{weights:?}");
    }
}

#[test]
fn looked_up_values_must_come_from_an_input_that_nothing_writes() {
    // A launch that changes the tokens before they are looked up, whatever it says of them.
    for access in [Access::Write, Access::Scratch] {
        let mut parts = parts(identity());
        let program = &mut parts.programs[0].0;
        let ids = program.buffers[0].ty.clone();
        program.kernels.push(spec(Op::ArgMax, vec![arg(access, &ids)], vec![]));
        program.calls.insert(0, Call { kernel: 5, args: vec![0], label: "evil".into() });
        let says = Plan::build(parts).unwrap_err().to_string();
        assert_eq!(
            says, "program \"prefill\": call \"node 0\" follows values that are not checked inputs",
            "{access:?}"
        );
    }
}

/// What is looked up in two tables must exist in both.
#[test]
fn ids_of_two_tables_are_held_to_the_smaller() {
    for (first, second) in [(5u64, 3u64), (3, 5)] {
        let mut parts = parts(identity());
        let (decode, _) = &mut parts.programs[1];
        decode.kernels[0].spec.args[0].ty.shape[0] = first.into();
        decode.buffers[1].ty.shape[0] = first.into();
        let mut lookup = decode.kernels[0].clone();
        lookup.spec.args[0].ty.shape[0] = second.into();
        for (kernel, rows) in [(&mut decode.kernels[0], first), (&mut lookup, second)] {
            kernel.spec.args[1].index.as_mut().unwrap().below = rows.into();
        }
        let table = lookup.spec.args[0].ty.clone();
        decode.buffers.push(Buffer { ty: table, place: Place::weight("other") });
        decode.buffers.push(Buffer { ty: lookup.spec.args[2].ty.clone(), place: Place::Arena });
        decode.kernels.push(lookup);
        let other = decode.buffers.len() as u32 - 2;
        decode.calls.push(Call { kernel: 5, args: vec![other, 0, other + 1], label: "other".into() });
        parts.programs.remove(0);
        let mut plan = Plan::build(parts).unwrap();
        assert_eq!(plan.programs[0].inputs[0].below, Some(Dim::n(3)));
        plan.programs[0].inputs[0].below = Some(Dim::n(4));
        assert!(plan.validate().unwrap_err().to_string().contains("allows values that call"));
    }
}

/// Two states and the arena, each a line too near to the next.
#[test]
fn a_line_of_a_state_is_not_overlooked() {
    let mut plan = plan();
    plan.states.push(State { name: "other".into(), ..plan.states[0].clone() });
    plan.states[1].offset = 512;
    plan.arena_offset = 1024;
    plan.validate().unwrap();
    for (a, b) in [(0, 1), (1, 0)] {
        let mut near = plan.clone();
        (near.states[a].offset, near.states[b].offset) = (0, 448);
        let says = near.validate().unwrap_err().to_string();
        assert!(says.contains("share bytes while both are in use"), "{says}");
    }
    plan.arena_offset = 960;
    let says = plan.validate().unwrap_err().to_string();
    assert!(says.contains("lies at 512 with 512 bytes, beyond the 960 bytes"), "{says}");
}

#[test]
fn programs_that_do_not_go_together_are_refused() {
    let built = |change: &dyn Fn(&mut Parts)| {
        let mut parts = parts(identity());
        change(&mut parts);
        Plan::build(parts).unwrap_err().to_string()
    };
    let says = built(&|p| p.programs[1].0.buffers[2].ty.shape[0] = Dim::n(16));
    assert_eq!(says, "weight \"bias\" is f32[8] in one program and f32[16] in another");
    let says = built(&|p| {
        p.programs[1].0.buffers[2].place =
            Place::Weight { name: "bias".into(), rows: None, layout: Layout::Interleaved16 }
    });
    assert_eq!(says, "weight \"bias\" is f32[8] in one program and f32[8] interleaved16 in another");
    let says = built(&|p| p.programs[1].0.inputs[0].1 = 1);
    assert_eq!(says, "program \"decode\": the input \"tokens\" must be planned in the arena");
    assert!(built(&|p| p.programs[1].0.results[0] = 5).contains("the result \"0\" must be planned"));
    assert!(built(&|p| p.programs[1].0.results[0] = 50).contains("buffer 50 does not exist: there are 11"));
    assert!(built(&|p| p.programs[1].0.calls[0].kernel = 5).contains("kernel 5 does not exist"));
    let says = built(&|p| {
        p.programs[1].0.buffers[5].place = Place::State { name: "cache".into(), role: StateRole::Replaced }
    });
    assert_eq!(
        says,
        "state \"cache\" is f32[16,1,8] appended in one program and f32[16,1,8] replaced in another"
    );
    let says = built(&|p| p.programs[1].0.kernels[4].spec.computes = Computation::Op(Op::KvRead { page: 8 }));
    assert!(says.contains("do not agree on the pages"), "{says}");
}

#[test]
fn a_plan_refuses_what_it_was_not_compiled_for() {
    let mut plan = plan();
    plan.require_model(&identity()).unwrap();
    plan.require_device(TargetKind::Cpu).unwrap();
    plan.require_kernels().unwrap();
    let other = Identity { len: 1001, ..identity() };
    let says = plan.require_model(&other).unwrap_err().to_string();
    assert!(says.starts_with("the plan was compiled for another model file: it needs 1000 bytes"), "{says}");
    assert_eq!(
        plan.require_device(TargetKind::HipAmd).unwrap_err().to_string(),
        "the plan was compiled for test-cpu (cpu), which cannot run on the device hip-amd"
    );
    plan.kernels_hash = "00".into();
    plan.engine = "0.0.9".into();
    assert_eq!(
        plan.require_kernels().unwrap_err().to_string(),
        "the kernels have changed since sinter 0.0.9 compiled the plan; compile it again"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    /// Damage that the checksum does not show, as whoever did it made a new one.
    #[test]
    fn forged_plans_do_no_harm(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let bytes = plan().to_bytes().unwrap();
        let mut payload = bytes[52..].to_vec();
        for (at, value) in flips {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        if let Some(cut) = cut {
            payload.truncate(cut.index(payload.len()));
        }
        if let Ok(plan) = LoadedPlan::from_bytes(&frame(&payload)) {
            let _ = plan.to_string();
            prop_assert!(plan.pool_bytes() <= i64::MAX as u64);
        }
    }
}
