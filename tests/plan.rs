//! Plans as data: what they launch is what was fused, they survive their byte form, and they refuse what they were not
//! compiled for.

mod support;

use sinter::codegen::spec::{Computation, Epilogue};
use sinter::compile::{self, Options, Purpose};
use sinter::gguf::GgufFile;
use sinter::model;
use sinter::passes::{NOT_FUSIONS, names};
use sinter::plan::{FORMAT, LoadedPlan, Output, Plan, PlanError};
use sinter::runtime::{DeviceOptions, Executor, Wanted};
use sinter::target::{Target, TargetKind};
use std::collections::BTreeMap;
use std::sync::Arc;
use support::*;

type Counts = BTreeMap<String, u64>;

/// The primitives that fused programs launch. Where few of many rows are wanted, they are fetched before the last projection
/// of attention, and quantised, apart; under `--exact` residuals are added by matmuls, so norms stand by themselves.
fn allowed(fewer_wanted: bool, exact: bool) -> &'static [&'static str] {
    match (fewer_wanted, exact) {
        (true, false) => &["get_rows", "quant_act"],
        (true, true) => &["get_rows", "rms_norm"],
        (false, false) => &[],
        (false, true) => &["rms_norm"],
    }
}

/// The launches of a program by kernel, as the plan lists them.
fn planned(plan: &Plan, program: usize) -> Counts {
    let mut counts = Counts::new();
    for call in &plan.programs[program].calls {
        let kernel = &plan.kernels[call.kernel as usize];
        *counts.entry(kernel.spec.name().to_string()).or_default() += kernel.launches.len() as u64;
    }
    counts
}

fn owned<'a>(counts: impl IntoIterator<Item = (&'a str, u64)>) -> Counts {
    counts.into_iter().map(|(name, n)| (name.to_string(), n)).collect()
}

/// What one step of a program launches.
fn executed(file: &Arc<GgufFile>, options: &Options, program: usize) -> Counts {
    let mut reader = Reader::new(executor(file, options, Purpose::Generate));
    // As many tokens as no smaller program takes.
    let programs = &reader.sequences.executor().plan().programs;
    let tokens = if program == 0 { 1 } else { programs[program - 1].bounds.t as usize + 1 };
    let output = if options.greedy { Output::Token } else { Output::Logits };
    reader.step(&[0, 33, 280].repeat(3)[..tokens], Wanted::Last, output);
    owned(reader.sequences.executor().launch_counts())
}

/// What the passes report of each program.
fn reported(file: &GgufFile, options: &Options) -> Vec<Counts> {
    let compiled = compile::compile(file.gguf(), options, Purpose::Generate).unwrap();
    compiled.into_iter().map(|c| c.report.after.launches.into_iter().collect()).collect()
}

/// The names of the primitives of [`planned`] counts.
fn primitives<'a>(plan: &Plan, counts: &'a Counts) -> Vec<&'a str> {
    let fused = |name: &str| plan.kernels.iter().any(|k| k.spec.kernel.is_some() && k.spec.name() == name);
    counts.keys().map(String::as_str).filter(|name| !fused(name)).collect()
}

#[test]
fn what_is_launched_is_what_was_fused() {
    for name in MODELS {
        let file = open(name);
        for (path, options) in [
            ("default", frozen()),
            ("exact", frozen().exact()),
            ("greedy", Options { greedy: true, ..frozen() }),
        ] {
            let plan = plan(&file, &options, Purpose::Generate);
            for (program, report) in reported(&file, &options).into_iter().enumerate() {
                let what = format!("{name} {path} {}", plan.programs[program].name);
                let launched = executed(&file, &options, program);
                assert_eq!(launched, planned(&plan, program), "{what}: executed, planned");
                assert_eq!(launched, report, "{what}: executed, reported");
                let found = primitives(&plan, &launched);
                let bounds = plan.programs[program].bounds;
                assert_eq!(found, allowed(bounds.r < bounds.t, path == "exact"), "{what}: primitives");
            }
        }
    }
}

#[test]
fn decode_launches_these_kernels() {
    let counts = executed(&open("q4_k_m"), &frozen(), 0);
    let wanted = [
        ("add_rmsnorm", 7),
        ("attention", 4),
        ("dequant_matmul", 9),
        ("dequant_rmsnorm", 2),
        ("matmul_swiglu", 4),
        ("merge", 4),
        ("rope_kv", 4),
    ];
    assert_eq!(counts, owned(wanted));
    let greedy = executed(&open("q4_k_m"), &Options { greedy: true, ..frozen() }, 0);
    assert_eq!((greedy["dequant_matmul"], greedy["sample_head"]), (8, 2));
}

#[test]
fn without_a_pass_other_kernels_are_launched() {
    // What shows that the counts can be wrong.
    let file = open("q4_k_m");
    let options = Options { greedy: true, ..frozen() };
    let all = executed(&file, &options, 0);
    // No model has a recurrence yet, and on a CPU nothing is turned where it attends.
    let others = NOT_FUSIONS.into_iter().chain(["gated_scan", "rope_attention"]).collect::<Vec<_>>();
    for pass in names().into_iter().filter(|pass| !others.contains(pass)) {
        let options = without(pass, options.clone());
        let counts = executed(&file, &options, 0);
        assert_ne!(counts, all, "without {pass}");
        assert_eq!(counts, reported(&file, &options)[0], "without {pass}");
    }
    let plain = unfused(options);
    let counts = executed(&file, &plain, 0);
    let plan = plan(&file, &plain, Purpose::Generate);
    assert_eq!(primitives(&plan, &counts).len(), counts.len(), "--no-fuse launches primitives alone");
    assert!(counts.values().sum::<u64>() > 3 * all.values().sum::<u64>());
}

/// The error of an executor for the plan after a change, which the plan's own rules allow.
fn refusal(mut plan: Plan, change: impl FnOnce(&mut Plan), file: &Arc<GgufFile>) -> String {
    change(&mut plan);
    let plan = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
    match Executor::new(plan, Arc::clone(file), &DeviceOptions::default()) {
        Ok(_) => panic!("the executor takes it"),
        Err(e) => e.to_string(),
    }
}

fn built(file: &GgufFile) -> Plan {
    model::plan(file, None, &frozen(), Purpose::Generate).unwrap()
}

#[test]
fn no_kernel_falls_back() {
    let file = open("q4_k_m");
    let plan = built(&file);
    for name in
        ["merge", "dequant_matmul", "matmul_swiglu", "attention", "rope_kv", "add_rmsnorm", "dequant_rmsnorm"]
    {
        let message = refusal(
            plan.clone(),
            |plan| {
                let kernel = plan.kernels.iter_mut().find(|k| k.spec.name() == name).unwrap();
                match &mut kernel.spec.computes {
                    Computation::Matmul(m) => m.k += 256,
                    Computation::Norm(n) => n.n += 1,
                    Computation::RopeKv(r) => r.head_dim += 2,
                    Computation::Attention(a) => a.head_dim += 2,
                    other => panic!("{other:?}"),
                }
            },
            &file,
        );
        let start = format!("the cpu device has no kernel {name} as the plan needs it: ");
        assert!(message.starts_with(&start), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let message = refusal(
        plan,
        |plan| {
            let kernel = plan.kernels.iter_mut().find(|k| k.spec.name() == "matmul_swiglu").unwrap();
            let Computation::Matmul(matmul) = &mut kernel.spec.computes else { panic!("{kernel:?}") };
            matmul.epilogue = Epilogue::Store;
        },
        &file,
    );
    assert!(message.contains("no kernel matmul_swiglu"), "{message}");
}

#[test]
fn compiling_is_deterministic() {
    for name in MODELS {
        let file = open(name);
        let bytes = built(&file).to_bytes().unwrap();
        assert!(bytes == built(&file).to_bytes().unwrap(), "{name}: two compilations differ");
    }
}

#[test]
fn the_byte_form_keeps_everything() {
    for name in MODELS {
        for options in [defaults(), exact(), unfused(defaults()), Options { greedy: true, ..defaults() }] {
            let plan = model::plan(&open(name), None, &options, Purpose::Generate).unwrap();
            let bytes = plan.to_bytes().unwrap();
            let loaded = LoadedPlan::from_bytes(&bytes).unwrap();
            assert!(*loaded == plan);
            assert!(loaded.to_bytes().unwrap() == bytes);
        }
    }
}

#[test]
fn the_plan_of_the_embedded_model() {
    let text = built(&open("q4_k_m")).to_string();
    // The first line names the version and the kernels, which change without the plan.
    let (first, rest) = text.split_once('\n').unwrap();
    assert!(first.starts_with("plan by sinter "), "{first}");
    insta::assert_snapshot!(rest);
}

#[test]
fn the_arena_is_near_its_lower_bound() {
    for name in MODELS {
        for (options, purpose) in [
            (Options::new(Target::cpu()), Purpose::Generate),
            (Options::new(Target::cpu()).exact(), Purpose::Generate),
            (Options::new(Target::cpu()), Purpose::Score),
        ] {
            let plan = model::plan(&open(name), None, &options, purpose).unwrap();
            for p in &plan.programs {
                let program = &p.name;
                let (bytes, least) = (p.arena_bytes, p.lower_bound);
                assert!(least > 0 && least <= bytes, "{name} {program}");
                assert!(
                    bytes as f64 <= 1.05 * least as f64,
                    "{name} {program}: {bytes} bytes, {least} needed"
                );
                assert!(bytes <= plan.arena_bytes);
            }
        }
    }
}

#[test]
fn states_and_arena_lie_apart() {
    let plan = built(&open("q4_k_m"));
    assert_eq!(plan.states.len(), 8);
    let mut end = 0;
    for state in &plan.states {
        assert!(state.offset >= end, "{}", state.name);
        end = state.offset + state.ty.bytes(&plan.programs[0].bounds);
    }
    assert!(end <= plan.arena_offset);
    assert_eq!(plan.pool_bytes(), plan.arena_offset + plan.arena_bytes);

    let mut overlapping = plan.clone();
    overlapping.states[1].offset = plan.states[0].offset;
    assert!(overlapping.validate().is_err());
    let mut overlapping = plan.clone();
    overlapping.arena_offset = plan.states[7].offset;
    assert!(overlapping.validate().is_err());
}

#[test]
fn another_model_is_refused() {
    let (q4, q8) = (open("q4_k_m"), open("q8_0"));
    let message = refusal(built(&q4), |_| {}, &q8);
    let wanted = format!(
        "the plan was compiled for another model file: it needs {}, this one has {}",
        q4.identity(),
        q8.identity()
    );
    assert_eq!(message, wanted);

    // A file of the same length and header, but with other weights, is another model too.
    let mut bytes = q4.bytes().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    let other = Arc::new(GgufFile::from_bytes(bytes).unwrap());
    assert!(
        refusal(built(&q4), |_| {}, &other).starts_with("the plan was compiled for another model file: ")
    );
}

#[test]
fn other_kernels_and_devices_are_refused() {
    let file = open("q4_k_m");
    let plan = built(&file);
    let message = refusal(
        plan.clone(),
        |plan| {
            plan.kernels_hash = "0".repeat(64);
            plan.engine = "9.9.9".into();
        },
        &file,
    );
    assert_eq!(message, "the kernels have changed since sinter 9.9.9 compiled the plan; compile it again");
    let for_amd = |plan: &mut Plan| {
        (plan.target.kind, plan.target.arch, plan.target.wave) = (TargetKind::HipAmd, "gfx900".into(), 64)
    };
    let message = refusal(plan.clone(), for_amd, &file);
    let is_another = message.starts_with("the plan is for gfx900, and this GPU is ");
    assert!(is_another || message.starts_with("there is no device of kind hip-amd here: "), "{message}");
    let error = plan.require_device(TargetKind::HipNvidia).unwrap_err().to_string();
    assert_eq!(error, "the plan was compiled for test-cpu (cpu), which cannot run on the device hip-nvidia");
}

#[test]
fn damaged_bytes_are_refused() {
    let bytes = built(&open("q4_k_m")).to_bytes().unwrap();
    let error = |bytes: &[u8]| LoadedPlan::from_bytes(bytes).unwrap_err().to_string();
    let len = bytes.len();

    assert_eq!(error(&[]), "this is not a plan: it does not begin with SINTERPL");
    assert_eq!(error(b"GGUF"), "this is not a plan: it does not begin with SINTERPL");
    let mut other = bytes.clone();
    other[8] += 1;
    let wanted =
        format!("the plan has format {}, this sinter reads format {FORMAT}; compile it again", FORMAT + 1);
    assert_eq!(error(&other), wanted);
    assert_eq!(error(&bytes[..len / 2]), format!("the plan is truncated: {} bytes of {len}", len / 2));
    let longer = [&bytes[..], b"more"].concat();
    assert_eq!(error(&longer), "4 bytes follow the end of the plan");
    let mut flipped = bytes.clone();
    flipped[len - 1] ^= 0x10;
    assert_eq!(error(&flipped), "the plan is damaged: its checksum does not match");

    for cut in (0..100).chain((100..len).step_by(len / 50)) {
        assert!(LoadedPlan::from_bytes(&bytes[..cut]).is_err(), "cut to {cut} bytes");
    }
    for at in (0..100).chain((100..len).step_by(len / 50)) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        assert!(LoadedPlan::from_bytes(&flipped).is_err(), "byte {at} flipped");
    }
}

#[test]
fn lengths_of_billions_are_no_allocation() {
    // A header that claims the longest payload there is.
    let mut bytes = built(&open("q4_k_m")).to_bytes().unwrap();
    bytes[12..20].fill(0xff);
    assert!(matches!(LoadedPlan::from_bytes(&bytes), Err(PlanError::Truncated { want: u64::MAX, .. })));
}
