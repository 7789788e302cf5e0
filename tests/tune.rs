//! `sinter tune`: what it measures is kept, found again, and gone by.

mod support;

use sinter::compile::{self, Options, Purpose};
use sinter::ir::{Outcome, Why};
use sinter::lower::Config;
use sinter::target::{Losing, Measured, MeasuredTime, Target};
use std::path::{Path, PathBuf};
use std::process::Output;
use support::command::{report, said, sinter};
use support::synthetic::description;

fn with(folder: &Path, args: &[&str]) -> Output {
    sinter().args(args).env("SINTER_TUNED", folder).output().unwrap()
}

fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn what_is_measured_is_gone_by() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tuned");
    let before = said(&with(&folder, &["explain", "--step", "decode"])).0;
    assert!(before.contains("not of this machine (sinter tune measures it)"), "{before}");
    let (table, where_to) = said(&with(&folder, &["tune", "-p", "16", "-r", "1", "--rates-only"]));
    for part in ["reads ", " GB/s", "a launch", "\n  t16 ", "\n  t1 ", "off by"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let file = only_file(&folder);
    assert!(where_to.contains(file.to_str().unwrap()), "{where_to}");
    let target: Target = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(target.validate(), Ok(()));
    let measured = target.measured.as_ref().unwrap();
    assert!(measured.times.len() > 60 && measured.times.iter().all(|time| time.us > 0.0), "{measured:?}");
    assert_ne!(target.bandwidth_gbs, Target::cpu().bandwidth_gbs);
    assert!(measured.efficiency.len() > 5, "{:?}", measured.efficiency);
    // What nobody measured of primitives must not make fusions lose to them.
    assert_eq!(target.efficiency, Target::cpu().efficiency);

    // Whatever compiles for the CPU finds it, and explain says so, beside what was predicted; of other depths it says which were timed.
    let elsewhere = said(&with(&folder, &["explain", "--step", "decode"])).0;
    let hint = "measured were t16 and t1 with caches filled to 64: -c 64 --chunk 16 sets";
    assert!(elsewhere.contains(hint) && !elsewhere.contains("rank correlation"), "{elsewhere}");
    let prefill = ["explain", "--step", "prefill", "-c", "64", "--chunk", "16"];
    assert!(said(&with(&folder, &prefill)).0.contains("rank correlation"));
    let after = said(&with(&folder, &["explain", "--step", "decode", "-c", "64"])).0;
    for part in ["rates were measured on ", "with rustdoc-13m", " measured ", "rank correlation "] {
        assert!(after.contains(part), "{part}: {after}");
    }
    assert!(!said(&with(Path::new("off"), &["explain"])).0.contains("rates were measured"));
    let named = said(&with(Path::new("off"), &["explain", "--target", file.to_str().unwrap()])).0;
    assert!(named.contains("rates were measured on "), "{named}");

    // What was measured is not called assumed.
    let profile = said(&with(&folder, &["profile", "--json", "-p", "0", "-r", "1"])).0;
    assert!(profile.contains("measured by sinter tune") && !profile.contains("assumed"), "{profile}");

    // What makes no sense is said, and keeps nothing from running; named as a target it is an error.
    for (text, says) in [
        ("", "target file"),
        ("{}", "missing field"),
        (&serde_json::to_string(&Target::gpu("sm_90").unwrap()).unwrap(), "is not what sinter tune measured"),
        (&serde_json::to_string(&Target::cpu()).unwrap(), "is not what sinter tune measured"),
    ] {
        std::fs::write(&file, text).unwrap();
        let (table, warning) = said(&with(&folder, &["explain", "--step", "decode"]));
        assert!(warning.contains(says) && warning.contains("built-in rates are used"), "{warning}");
        assert_eq!(table, before);
        if says != "is not what sinter tune measured" {
            let error = report(&with(&folder, &["explain", "--target", file.to_str().unwrap()]));
            assert!(error.contains(says), "{error}");
        }
    }
    // Which tune does not read, but makes anew.
    said(&with(&folder, &["tune", "-p", "4", "-r", "1", "--rates-only"]));
    said(&with(&folder, &["explain"]));
    assert!(report(&with(&folder, &["tune", "--margin", "100"])).contains("--margin must lie between"));
    assert!(
        report(&with(Path::new("off"), &["tune", "-p", "4", "-r", "1", "--rates-only"])).contains("give -o")
    );
}

/// A fusion that loses in a step is not made there, and the reason has both times; elsewhere it is.
#[test]
fn what_loses_is_not_used() {
    let mut options = Options::new(Target::test_cpu());
    let losing = Losing { pass: "merge".into(), step: "t1".into(), with_us: 20.0, without_us: 10.0 };
    let gguf = description("tiny-llama");
    let config = Config::from_gguf(&gguf).unwrap();
    let steps = Purpose::Generate.steps(&config, &options).into_iter();
    let times = steps.map(|step| MeasuredTime { step: step.name(), at: String::new(), us: 1.0 }).collect();
    options.target.measured = Some(Measured { losing: vec![losing], times, ..Measured::default() });
    for step in Purpose::Generate.steps(&config, &options) {
        let report = compile::fuse(&gguf, &options, &step).unwrap().1;
        let merges = report.decisions.iter().filter(|d| d.pass == "merge");
        let made = merges.clone().filter(|d| matches!(d.outcome, Outcome::Fired { .. })).count();
        let why = Why::LosesHere { with_us: 20.0, without_us: 10.0 };
        let not = merges.filter(|d| d.outcome == Outcome::Rejected { why: why.clone() }).count();
        assert_eq!((made == 0, not > 0), (report.graph == "t1", report.graph == "t1"), "{}", report.graph);
    }
    // Rates that were fitted do not decide between integer and float products, but what was timed does.
    let quantised = |losing: Vec<Losing>| {
        let mut options = Options::new(Target { dot4_gops: Some(1.0), ..Target::test_cpu() });
        options.target.measured = Some(Measured { losing, ..Measured::default() });
        let step = Purpose::Generate.steps(&config, &options)[0];
        compile::fuse(&gguf, &options, &step).unwrap().1.rewrites.contains_key("quantise_acts")
    };
    let losing = Losing { pass: "quantise_acts".into(), step: "t1".into(), with_us: 20.0, without_us: 10.0 };
    assert!(quantised(vec![]) && !quantised(vec![losing]));
    // Of steps that nobody timed, the nearest speaks.
    let losing = |pass: &str, step: &str, us| Losing {
        pass: pass.into(),
        step: step.into(),
        with_us: us,
        without_us: 1.0,
    };
    let measured = Measured {
        losing: vec![losing("merge", "t1", 2.0), losing("merge", "t256", 3.0), losing("swiglu", "t256", 4.0)],
        ..Measured::default()
    };
    for (pass, step, us) in [
        ("merge", "t2", Some(2.0)),
        ("merge", "t1_greedy", Some(2.0)),
        ("merge", "t512", Some(3.0)),
        ("swiglu", "t64", Some(4.0)),
        ("swiglu", "t4", None),
        ("merge", "other", None),
    ] {
        assert_eq!(measured.losing(pass, step).map(|l| l.with_us), us, "{pass} in {step}");
    }
    assert_eq!(
        Why::LosesHere { with_us: 20.0, without_us: 10.0 }.to_string(),
        "measured here: with it a step takes 20.0 µs, without 10.0 µs"
    );
    let mut target = Target::test_cpu();
    let losing = Losing { pass: "merge".into(), step: "t1".into(), with_us: f64::NAN, without_us: 10.0 };
    target.measured = Some(Measured { losing: vec![losing], ..Measured::default() });
    assert!(target.validate().unwrap_err().contains("measured times"));
}
