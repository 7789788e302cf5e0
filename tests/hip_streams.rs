//! Plans of several streams on a GPU's driver, without a GPU: by the stubs of `hip_platform.rs`. Needs clang-19.

#[allow(dead_code)]
#[path = "support/command.rs"]
mod command;
#[allow(dead_code)]
#[path = "support/lanes.rs"]
mod lanes;
#[allow(dead_code)]
#[path = "support/stubs.rs"]
mod stubs;
#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use command::text;
use sinter::compile::{Options, Purpose};
use sinter::runtime::{DeviceOptions, StepRows};
use sinter::target::Target;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use stubs::*;

/// Options of steps of one token by plans for so many streams, with some of the command's options for fusions.
fn options_on_streams(streams: u32, fusions: &[&str]) -> Options {
    let target = Target { streams, ..Target::gpu("gfx1100").unwrap() };
    let mut at = Options { chunk: 1, context: Some(16), ..Options::new(target) };
    at.pipeline = match fusions {
        ["--no-fuse"] => at.pipeline.without_fusions(),
        ["--passes", list] => at.pipeline.select(&[list]).unwrap(),
        _ => at.pipeline,
    };
    at
}

/// A command that makes such steps; and of its plan's first program, by stream, how many calls wait for events.
fn on_streams(folder: &Path, streams: u32, fusions: &[&str]) -> (Vec<String>, BTreeMap<u32, usize>) {
    let (path, file) = tiny(folder);
    let at = options_on_streams(streams, fusions);
    let target_path = folder.join(format!("streams_{streams}.json"));
    // At once, as other tests read it.
    let written = target_path.with_extension(format!("{:?}", std::thread::current().id()));
    std::fs::write(&written, serde_json::to_vec(&at.target).unwrap()).unwrap();
    std::fs::rename(written, &target_path).unwrap();
    compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
    let plan = sinter::model::plan(&file, None, &at, Purpose::Score).unwrap();
    let mut waits = BTreeMap::new();
    for call in &plan.programs[0].calls {
        *waits.entry(call.slot.stream).or_default() += usize::from(!call.slot.waits.is_empty());
    }
    let tokens = tokens(4);
    let args = ["logits", &path, "--tokens", &tokens, "-c", "16", "--chunk", "1", "-o", "-"];
    let more = ["--device", "hip", "--target", &lanes::text(&target_path)];
    (args.iter().chain(&more).chain(fusions).map(|arg| arg.to_string()).collect(), waits)
}

/// The inputs of a step of one token, at a position of the first page.
fn step_at(position: i32) -> StepRows {
    StepRows {
        tokens: vec![position * 37 % 96],
        positions: vec![position],
        sequences: vec![0],
        rows: vec![position],
        tables: vec![0],
        lengths: vec![position + 1],
        wanted: vec![0],
    }
}

/// As many steps as it is told, of which but the last is waited for.
#[test]
#[ignore = "run by another in a process that has the stubs"]
fn some_steps() {
    let Ok(path) = std::env::var("SINTER_TEST_MODEL") else { return };
    let told = |name: &str| std::env::var(name).unwrap();
    let file = Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap());
    let device = DeviceOptions { eager: told("SINTER_TEST_EAGER") == "yes", ..Default::default() };
    let at = options_on_streams(1, &[]);
    let mut executor = sinter::model::executor(&file, None, &at, Purpose::Score, &device).unwrap();
    for position in 0..told("SINTER_TEST_STEPS").parse().unwrap() {
        executor.forward(0, &step_at(position)).unwrap();
    }
    let mut logits = vec![];
    executor.read_f32(0, 0..1, &mut logits).unwrap();
    assert!(logits.iter().all(|x| x.is_finite()));
}

/// Giving a step to the GPU waits for nothing: more steps are not waited for more often.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn the_host_goes_on_while_a_step_runs() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let at = options_on_streams(1, &[]);
    compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
    for eager in ["yes", "no"] {
        let waits = ["4", "12"].map(|steps| {
            let variables =
                [("SINTER_TEST_MODEL", &*path), ("SINTER_TEST_STEPS", steps), ("SINTER_TEST_EAGER", eager)];
            let ran = in_a_process(folder, "some_steps", &variables);
            let launched = ran.calls("kernels that ran");
            assert!(launched > 4 * steps.parse::<i64>().unwrap(), "{launched} in {steps} steps");
            ran.calls("hipStreamSynchronize") + ran.calls("hipEventSynchronize")
        });
        assert_eq!(waits[0], waits[1], "eager: {eager}");
    }
}

/// Each step's work on every stream comes after all of the step before, though nobody waits between them.
#[test]
#[ignore = "run by another in a process that has the stubs"]
fn steps_that_nobody_waits_for() {
    let Ok(path) = std::env::var("SINTER_TEST_MODEL") else { return };
    let file = Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap());
    let device =
        DeviceOptions { eager: std::env::var("SINTER_TEST_EAGER").unwrap() == "yes", ..Default::default() };
    let logits = |streams, waits: bool| {
        let at = options_on_streams(streams, &["--no-fuse"]);
        let mut executor = sinter::model::executor(&file, None, &at, Purpose::Score, &device).unwrap();
        let mut logits = vec![];
        for position in 0..6 {
            executor.forward(0, &step_at(position)).unwrap();
            if waits || position == 5 {
                executor.read_f32(0, 0..1, &mut logits).unwrap();
            }
        }
        logits
    };
    // The first to be made has the streams of the lowest numbers.
    let several = logits(3, false);
    assert!(several == logits(1, true) && several.iter().all(|x| x.is_finite()));
}

/// Plans of several streams compute what those of one do, bit for bit, launch by launch and as a graph, whichever stream is ahead of the
/// others as far as events allow. A plan that has several and needs one makes the calls that it makes with one.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn streams_wait_for_each_other_and_for_nothing_else() {
    let Some(folder) = stubs() else { return };
    let run = |args: &[String], more: &[&str], first: Option<u32>| {
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let first = first.map(|n| n.to_string());
        let variables: Vec<_> = first.iter().map(|n| ("SINTER_STUB_FIRST", n.as_str())).collect();
        let ran = sinter(folder, &args, &variables);
        let said = text(&ran.output.stderr);
        assert!(ran.output.status.success() && !said.contains("WARN"), "{args:?} {first:?}: {said}");
        assert_eq!(ran.leaks(), [""; 0]);
        ran
    };
    // Without `merge` the last call lies on another stream than the first; without any, others begin with what waits for no call.
    for fusions in [&["--passes", "-merge"][..], &["--no-fuse"]] {
        let one = run(&on_streams(folder, 1, fusions).0, &[], None);
        assert_eq!(one.calls("hipStreamWaitEvent"), 0);
        let (args, waits) = on_streams(folder, 3, fusions);
        assert!(waits.len() == 3 && waits.values().sum::<usize>() > 2, "{waits:?}");
        for first in [None, Some(0), Some(1), Some(2)] {
            for eager in [&[][..], &["--no-graph"]] {
                let ran = run(&args, eager, first);
                assert!(ran.output.stdout == one.output.stdout, "{fusions:?} {eager:?}, ahead is {first:?}");
                assert!(ran.calls("hipStreamWaitEvent") > 0);
                let graphs = ["hipGraphInstantiateWithFlags", "hipGraphLaunch"].map(|name| ran.calls(name));
                assert_eq!(graphs, if eager.is_empty() { [1, 3] } else { [0, 0] });
            }
        }
    }
    for (first, eager) in [("1", "no"), ("1", "yes"), ("2", "no"), ("2", "yes")] {
        let (path, _) = tiny(folder);
        let variables =
            [("SINTER_TEST_MODEL", &*path), ("SINTER_STUB_FIRST", first), ("SINTER_TEST_EAGER", eager)];
        let ran = in_a_process(folder, "steps_that_nobody_waits_for", &variables);
        assert!(ran.calls("hipStreamWaitEvent") > 0);
    }
    let (args, waits) = on_streams(folder, 3, &[]);
    assert_eq!(waits, BTreeMap::from([(0, 0)]));
    let [three, one] = [args, on_streams(folder, 1, &[]).0].map(|args| run(&args, &[], None));
    assert_eq!((three.counts, three.output.stdout), (one.counts, one.output.stdout));
}

/// Of a plan of several streams: each wait, within a capture and not, and what else it calls more often.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn each_call_of_several_streams_that_fails_is_one_clear_error() {
    let Some(folder) = stubs() else { return };
    let [(one, _), (args, _)] = [1, 3].map(|streams| on_streams(folder, streams, &["--passes", "-merge"]));
    let [one, args] = [&one, &args].map(|args| args.iter().map(String::as_str).collect::<Vec<_>>());
    let [one, whole] = [&one, &args].map(|args| sinter(folder, args, &[]));
    assert!(whole.output.stdout == one.output.stdout && whole.output.status.success());
    let mut faults = vec![];
    for name in functions().into_iter().filter(|name| *name != "hipSetDevice") {
        let n = whole.calls(name);
        match name {
            "hipStreamWaitEvent" | "hipEventRecord" => faults.extend((1..=n).map(|n| (name, n))),
            _ if n > one.calls(name) => faults.extend([(name, 1), (name, (n + 1) / 2), (name, n)]),
            _ => {}
        }
    }
    let names: BTreeSet<&str> = faults.iter().map(|(name, _)| *name).collect();
    assert!(STREAMS.iter().all(|name| names.contains(name)) && names.len() > 4, "{names:?}");
    try_faults(folder, &args, &whole, &faults);
}
