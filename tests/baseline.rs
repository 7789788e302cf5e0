//! `sinter bench` with baselines and histories, `sinter trend`, and the script for CI systems.

mod support;

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::command::{self, said, sinter, text};
use tempfile::TempDir;

/// Short tests, with one thread and of few tokens: nothing here depends on how fast they are but for factors of a thousand.
const QUICK: [&str; 8] = ["-p", "4", "-n", "2", "-t", "1", "-r", "2"];

/// A folder with a baseline of [`QUICK`].
struct Baseline {
    folder: TempDir,
    path: PathBuf,
}

impl Baseline {
    fn new() -> Baseline {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.json");
        said(&bench(&[&QUICK[..], &["--save", path.to_str().unwrap()]].concat()));
        Baseline { folder, path }
    }

    fn read(&self) -> Value {
        read(&self.path)
    }

    /// Changes what is in the file.
    fn edit(&self, change: impl FnOnce(&mut Value)) {
        let mut run = self.read();
        change(&mut run);
        std::fs::write(&self.path, run.to_string()).unwrap();
    }

    /// Makes all tests so many times as fast as they were.
    fn scale(&self, by: f64) {
        self.edit(|run| {
            for test in run["tests"].as_array_mut().unwrap() {
                for key in ["median_ts", "avg_ts"] {
                    test[key] = json!(test[key].as_f64().unwrap() * by);
                }
            }
        });
    }

    fn compare(&self, args: &[&str]) -> Output {
        bench(&[&["--compare", self.path.to_str().unwrap()], args].concat())
    }

    #[track_caller]
    fn refused(&self, args: &[&str], with: &str) {
        let report = command::report(&self.compare(args));
        assert!(report.contains(with) && report.lines().count() == 1, "{report}");
        assert!(report.contains("base.json"), "{report}");
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn bench(args: &[&str]) -> Output {
    sinter().arg("bench").arg("--no-bandwidth").args(args).output().unwrap()
}

fn names(run: &Value) -> Vec<&str> {
    run["tests"].as_array().unwrap().iter().map(|t| t["test"].as_str().unwrap()).collect()
}

#[test]
fn a_baseline_says_what_was_measured_on_what() {
    let baseline = Baseline::new();
    let run = baseline.read();
    assert_eq!(names(&run), ["pp4", "tg2", "tg2 (no logits)"]);
    let rows = bench(&[&QUICK[..], &["-o", "json"]].concat());
    let rows: Value = serde_json::from_str(&said(&rows).0).unwrap();
    assert_eq!((&run["format"], &run["software"]["sinter"]), (&json!(1), &rows[0]["version"]));
    assert_eq!((&run["hardware"]["cpu"], &run["hardware"]["isa"]), (&rows[0]["cpu_info"], &rows[0]["isa"]));
    assert_eq!(run["hardware"]["gpu"], Value::Null);
    let model = (&run["model"]["name"], &run["model"]["bytes"], &run["model"]["parameters"]);
    assert_eq!(model, (&rows[0]["model_type"], &rows[0]["model_size"], &rows[0]["model_n_params"]));
    for test in run["tests"].as_array().unwrap() {
        let [p50, p95, p99] = ["p50_ns", "p95_ns", "p99_ns"].map(|key| test[key].as_u64().unwrap());
        assert!(0 < p50 && p50 <= p95 && p95 <= p99, "{test}");
        assert_eq!((&test["n_threads"], &test["repetitions"]), (&json!(1), &json!(2)));
        assert!(test["median_ts"].as_f64().unwrap() > 0.0, "{test}");
        assert!(["avg_ts", "stddev_ts"].iter().all(|key| test[key].is_number()), "{test}");
    }
}

/// The same tests, threads and repetitions, without being told them.
#[test]
fn a_comparison_runs_the_tests_of_the_baseline_and_prints_both_speeds() {
    let baseline = Baseline::new();
    baseline.scale(1e-3);
    let (out, _) = said(&baseline.compare(&[]));
    let table = out.split_once("against ").unwrap().1;
    let rows: Vec<&str> = table.lines().filter(|line| line.ends_with('|')).skip(2).collect();
    assert_eq!(rows.len(), 3, "{out}");
    for (row, test) in rows.iter().zip(baseline.read()["tests"].as_array().unwrap()) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!((cells[1], cells[2], cells[7]), (test["test"].as_str().unwrap(), "1", "faster"), "{row}");
        let [before, now, ratio] = [3, 4, 5].map(|i| cells[i].parse::<f64>().unwrap());
        assert!((before - test["median_ts"].as_f64().unwrap()).abs() < 0.006, "{row}");
        assert!((now / before / ratio - 1.0).abs() < 0.1, "{row}");
    }
    let json = baseline.compare(&["-o", "json"]);
    let (out, err) = said(&json);
    let rows: Vec<Value> = serde_json::from_str(&out).unwrap();
    assert!(rows.len() == 3 && err.contains("against "), "{err}");
    for (row, test) in rows.iter().zip(baseline.read()["tests"].as_array().unwrap()) {
        assert_eq!((&row["baseline_ts"], &row["slower"]), (&test["median_ts"], &json!(false)));
        let ratio = row["median_ts"].as_f64().unwrap() / test["median_ts"].as_f64().unwrap();
        assert!((row["ratio"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9, "{row}");
        assert_eq!(row["samples_ts"].as_array().unwrap().len(), 2);
    }
}

/// A machine does not become a thousand times as slow for a moment, three times in turn.
#[test]
fn a_slower_test_exits_with_3_and_is_named() {
    let baseline = Baseline::new();
    baseline.edit(|run| {
        run["tests"][1]["median_ts"] = json!(run["tests"][1]["median_ts"].as_f64().unwrap() * 1e3)
    });
    for i in [0, 2] {
        baseline.edit(|run| {
            run["tests"][i]["median_ts"] = json!(run["tests"][i]["median_ts"].as_f64().unwrap() / 1e3)
        });
    }
    let output = baseline.compare(&[]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(3), "{err}");
    assert!(out.contains("| slower, 3 times  |") && out.matches("| faster").count() == 2, "{out}");
    let says = format!(
        "error: slower than in {} by more than 10 %: tg2 (1 thread) to 0.00 of it\n",
        baseline.path.display()
    );
    assert_eq!(err, says);
    // A threshold may be as wide as one likes.
    let wide = baseline.compare(&["--threshold", "99.9999"]);
    assert!(wide.status.success(), "{}", text(&wide.stderr));
    // What was measured is kept even so, but not as the new baseline.
    let before = baseline.read();
    let [history, other] = ["runs.jsonl", "other.json"].map(|name| baseline.folder.path().join(name));
    let keep = |save: &Path| {
        let args = ["--history", history.to_str().unwrap(), "--save", save.to_str().unwrap()];
        let output = baseline.compare(&args);
        assert_eq!(output.status.code(), Some(3));
        text(&output.stderr)
    };
    let said = keep(&baseline.path);
    assert!(said.contains("base.json stays as it was, as a test is slower"), "{said}");
    assert_eq!(baseline.read(), before);
    keep(&other);
    assert_eq!(names(&read(&other)), names(&before));
    assert_eq!(std::fs::read_to_string(&history).unwrap().lines().count(), 2);
}

#[test]
fn a_baseline_that_holds_is_replaced_by_what_was_measured() {
    let baseline = Baseline::new();
    baseline.scale(1e-3);
    let path = baseline.path.to_str().unwrap().to_string();
    let before = baseline.read();
    let (_, err) = said(&baseline.compare(&["-p", "4", "-n", "0", "--save", &path]));
    assert!(err.contains("stays as it was, as not all of its tests were run"), "{err}");
    assert_eq!(baseline.read(), before);
    said(&baseline.compare(&["--save", &path]));
    let speed = |run: &Value| run["tests"][0]["median_ts"].as_f64().unwrap();
    assert!(speed(&baseline.read()) > 10.0 * speed(&before));
}

#[test]
fn tests_of_one_side_alone_are_said() {
    let baseline = Baseline::new();
    baseline.scale(1e-3);
    let (out, _) = said(&baseline.compare(&["-p", "4,6", "-n", "0"]));
    assert!(out.contains("\nnot run now: tg2 (1 thread); tg2 (no logits) (1 thread)\n"), "{out}");
    assert!(out.contains("\nnot in the baseline: pp6 (1 thread)\n"), "{out}");
    baseline.refused(&["-p", "5", "-n", "0"], "has none of the tests that were run");
    baseline.refused(&["-p", "4", "-n", "0", "-t", "2"], "has none of the tests that were run");
    baseline.edit(|run| run["software"]["sinter"] = json!("0.0.7"));
    let (out, _) = said(&baseline.compare(&[]));
    assert!(out.contains("\nversions: sinter: then 0.0.7, now "), "{out}");
}

#[test]
fn other_hardware_models_and_options_are_refused() {
    let baseline = Baseline::new();
    baseline.refused(&["models/rustdoc-13m-q8_0.gguf"], "it is of another model, \"llama 13M Q4_K\"");
    baseline.refused(&["--deny", "merge@blk.0"], "with other options: --deny: then none, now merge@blk.0");
    baseline.refused(
        &["--exact"],
        "with other options: --exact: then false, now true; --kv: then f16,f16, now f32,f32",
    );
    baseline.refused(&["--passes", "-merge"], "--passes: then all, now -merge");
    baseline.refused(&["--no-warmup"], "--no-warmup: then false, now true");
    // Another set of instructions of the same processor counts as another one.
    if read(&baseline.path)["hardware"]["isa"] != "baseline" {
        let mut other = sinter();
        other.env("SINTER_CPU", "baseline").args(["bench", "--compare"]).arg(&baseline.path);
        let report = command::report(&other.output().unwrap());
        assert!(
            report.contains("other hardware: instruction set: then avx") && report.contains(", now baseline"),
            "{report}"
        );
    }
    baseline.edit(|run| run["hardware"]["cpu"] = json!("i486"));
    baseline.refused(
        &[],
        "cannot be compared with: it was measured on other hardware: processor: then i486, now ",
    );
}

#[test]
fn a_file_that_is_no_baseline_is_one_clear_error() {
    let baseline = Baseline::new();
    let text = std::fs::read_to_string(&baseline.path).unwrap();
    // Between values: within a number it is that which is invalid.
    let half = text[..text.len() / 2].rfind(',').unwrap() + 1;
    for (content, says) in [
        (text[..half].to_string(), "is no run that sinter bench kept: EOF while parsing"),
        (String::new(), "EOF while parsing"),
        ("[]".into(), "is no run that sinter bench kept"),
        (
            text.replacen("\"format\": 1", "\"format\": 9", 1),
            "is of format 9, and this sinter reads format 1",
        ),
        (text.replacen("\"median_ts\": ", "\"median_ts\": NaN, \"x\": ", 1), "expected value at line"),
        (
            text.replacen("\"median_ts\": ", "\"median_ts\": 0, \"x\": ", 1),
            "median_ts is 0, which is no speed",
        ),
    ] {
        std::fs::write(&baseline.path, content).unwrap();
        baseline.refused(&[], says);
    }
    std::fs::write(&baseline.path, [0xff, 0xfe, 0]).unwrap();
    baseline.refused(&[], "it is no text");
    std::fs::remove_file(&baseline.path).unwrap();
    baseline.refused(&[], "No such file");
    let fails = |args: &[&str], with: &str| {
        let report = command::report(&bench(args));
        assert!(report.contains(with), "{report}");
    };
    fails(&["--compare", "src"], "cannot read src: Is a directory");
    fails(&["--save", "no/such/folder/base.json"], "there is no folder no/such/folder");
    // Before anything is measured.
    for (flag, path, with) in [
        ("--history", "/proc/x", "cannot write /proc/x: "),
        ("--save", "src", "cannot write src: it is a folder"),
        ("--save", "-", "--save -: the results go to stdout"),
    ] {
        let output = bench(&[flag, path, "-p", "0", "-n", "1", "-r", "1"]);
        assert!(output.stdout.is_empty() && command::report(&output).contains(with), "{output:?}");
    }
    fails(&["--threshold", "5"], "--compare <BASELINE>");
    fails(&["--trend", "x.svg"], "--history <FILE>");
    for threshold in ["0", "100", "NaN", "-3", "ten"] {
        let threshold = format!("--threshold={threshold}");
        fails(&["--compare", "x", &threshold], "a threshold is a number above 0 and below 100");
    }
    // Nothing is written over a model.
    fails(&["--save", "models/rustdoc-13m-q8_0.gguf"], "is a model file, which is not overwritten");
    fails(&["--history", "models/rustdoc-13m-q8_0.gguf"], "is no run that sinter bench kept: it is no text");
}

#[test]
fn a_history_grows_and_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let [history, svg, again] = ["runs.jsonl", "trend.svg", "again.svg"].map(|name| folder.path().join(name));
    let keep = ["--history", history.to_str().unwrap(), "--trend", svg.to_str().unwrap()];
    for _ in 0..2 {
        said(&bench(&[&QUICK[..], &keep].concat()));
    }
    assert_eq!(std::fs::read_to_string(&history).unwrap().lines().count(), 2);
    let drawn = std::fs::read_to_string(&svg).unwrap();
    let count = |what: &str| drawn.matches(what).count();
    assert_eq!((count("class=\"test\""), count("<circle")), (3, 6));
    // Drawing alone measures nothing, and draws the same.
    let trend = |args: &[&str]| {
        let mut command = sinter();
        command.arg("trend").arg(&history).args(args).env("SINTER_CPU", "no such set");
        command.output().unwrap()
    };
    assert_eq!(said(&trend(&[])).0, drawn);
    said(&trend(&["-o", again.to_str().unwrap()]));
    assert_eq!(std::fs::read_to_string(&again).unwrap(), drawn);

    // What is broken is found before anything is measured, and stays as it is.
    let runs = std::fs::read_to_string(&history).unwrap();
    std::fs::write(&history, &runs[..runs.len() - 100]).unwrap();
    for output in [trend(&[]), bench(&[&QUICK[..], &keep].concat())] {
        let report = command::report(&output);
        assert!(report.contains("line 2 of ") && report.contains("EOF while parsing"), "{report}");
        assert_eq!(output.stdout, b"");
    }
    assert_eq!(std::fs::read_to_string(&history).unwrap(), runs[..runs.len() - 100]);
    command::fails(&["trend", "no-such.jsonl"], "cannot read no-such.jsonl");
}

/// The script as a CI system calls it: nothing kept yet, then a baseline, then a slower engine.
#[test]
fn the_script_keeps_baselines_and_says_how_it_went_by_its_exit_code() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("no python3 here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let baselines = folder.path().join("baselines");
    let script = |args: &[&str]| {
        let mut command = Command::new("python3");
        command.arg(support::path("scripts/bench_regression.py")).arg("--baselines").arg(&baselines);
        command.args(["--sinter", env!("CARGO_BIN_EXE_sinter")]).args(args);
        command.arg("--").args(QUICK).arg("--no-bandwidth");
        let output = command.output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let files = || -> Vec<PathBuf> {
        let mut files: Vec<_> = std::fs::read_dir(&baselines).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    };
    let (code, _, err) = script(&[]);
    assert_eq!(code, Some(4), "{err}");
    assert!(err.contains("there is no baseline") && err.contains("--update"), "{err}");
    assert!(!baselines.exists());
    let (code, _, err) = script(&["--update"]);
    assert_eq!(code, Some(0), "{err}");
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    let scale = |by: f64| {
        let mut run = read(file);
        for test in run["tests"].as_array_mut().unwrap() {
            test["median_ts"] = json!(test["median_ts"].as_f64().unwrap() * by);
        }
        std::fs::write(file, run.to_string()).unwrap();
    };
    scale(1e-3);
    let (code, out, err) = script(&["--history"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("| faster "), "{out}");
    assert_eq!(files().len(), 3, "{:?}", files());
    scale(1e6);
    let (code, _, err) = script(&["--threshold", "50"]);
    assert_eq!(code, Some(3), "{err}");
    assert!(err.contains("by more than 50 %"), "{err}");
    let (code, ..) = script(&["--update"]);
    assert_eq!((code, script(&["--threshold", "99"]).0), (Some(0), Some(0)));
    std::fs::write(file, "{}").unwrap();
    let (code, _, err) = script(&[]);
    assert!(code == Some(1) && err.contains("missing field `format`"), "{code:?}: {err}");
    assert_eq!(script(&["--nonsense"]).0, Some(2));
}
