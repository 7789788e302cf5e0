//! `sinter bench` as people and scripts run it.

mod support;

use serde_json::Value;
use sinter::ir::DType;
use sinter::runtime::cpu::Features;
use support::command::{self, sinter};
use support::synthetic::{self, Model, Shape};

#[track_caller]
fn stdout(args: &[&str]) -> String {
    command::stdout(&[&["bench"], args].concat())
}

#[track_caller]
fn fails(args: &[&str], with: &str) {
    command::fails(&[&["bench"], args].concat(), with);
}

fn rows(args: &[&str]) -> Vec<Value> {
    serde_json::from_str(&stdout(args)).unwrap()
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["test"].as_str().unwrap()).collect()
}

/// llama-bench's keys, of the kinds that scripts rely on.
const NUMBERS: [&str; 12] = [
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
];
const STRINGS: [&str; 8] =
    ["cpu_info", "isa", "backends", "model_filename", "model_type", "type_k", "type_v", "test_time"];

#[test]
fn json_has_the_keys_of_llama_bench() {
    let rows = rows(&["-p", "8", "-n", "4", "-r", "2", "-t", "2", "-d", "3", "-o", "json"]);
    assert_eq!(names(&rows), ["pp8 @ d3", "tg4 @ d3", "tg4 @ d3 (no logits)"]);
    let prompt_and_generated = |row: &Value| ["n_prompt", "n_gen"].map(|key| row[key].as_u64().unwrap());
    assert_eq!(rows.iter().map(prompt_and_generated).collect::<Vec<_>>(), [[8, 0], [0, 4], [0, 4]]);
    let model = support::open("q4_k_m");
    for row in &rows {
        for key in NUMBERS {
            assert!(row[key].is_number(), "{key}: {row}");
        }
        for key in STRINGS {
            assert!(row[key].is_string(), "{key}: {row}");
        }
        let numbers = |key: &str| -> Vec<f64> {
            row[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let number = |key: &str| row[key].as_f64().unwrap();
        let (ns, ts) = (numbers("samples_ns"), numbers("samples_ts"));
        assert_eq!((ns.len(), ts.len()), (2, 2));
        assert!((number("avg_ns") - (ns[0] + ns[1]) / 2.0).abs() <= 0.5, "{row}");
        let tokens = number("n_prompt") + number("n_gen");
        assert!((ts[0] - tokens * 1e9 / ns[0]).abs() < 1e-6 * ts[0], "{row}");
        let percentiles = ["p50_ns", "p90_ns", "p95_ns", "p99_ns"].map(number);
        assert!(percentiles.is_sorted(), "{row}");
        // Of two repetitions, the median is the mean.
        assert!((number("median_ts") / number("avg_ts") - 1.0).abs() < 1e-9, "{row}");
        assert!(["baseline_ts", "ratio", "slower"].iter().all(|key| row[key].is_null()), "{row}");
        assert!(number("p99_ns") <= ns[0].max(ns[1]) && number("p50_ns") > 0.0, "{row}");
        assert_eq!((number("n_depth"), number("n_threads")), (3.0, 2.0));
        assert_eq!((number("n_batch"), number("n_ubatch")), (512.0, 512.0));
        assert_eq!([0, 1].map(|i| row[["type_k", "type_v"][i]].as_str().unwrap()), ["f16", "f16"]);
        assert_eq!((&row["exact"], &row["model_filename"]), (&Value::Bool(false), &Value::from("embedded")));
        assert_eq!(
            (&row["backends"], &row["model_type"]),
            (&Value::from("CPU"), &Value::from("llama 13M Q4_K"))
        );
        let tensors = || model.gguf().tensors.values();
        assert_eq!(number("model_size"), tensors().map(|t| t.bytes).sum::<u64>() as f64);
        assert_eq!(number("model_n_params"), tensors().map(|t| t.elements()).sum::<u64>() as f64);
        assert!(number("read_bandwidth_gbs") > 0.0);
        let time = row["test_time"].as_str().unwrap();
        assert!(time.len() >= 20 && time.as_bytes()[10] == b'T' && time.ends_with('Z'), "{time}");
    }
    assert!(rows[0]["bytes_per_step"].is_null() && rows[0]["bandwidth_share"].is_null());
    for row in &rows[1..] {
        let number = |key: &str| row[key].as_f64().unwrap();
        let share = number("bytes_per_step") * number("avg_ts") / (number("read_bandwidth_gbs") * 1e9);
        assert!((share / number("bandwidth_share") - 1.0).abs() < 1e-9, "{row}");
        // All weights, as the head is the embedding; the rows of four tokens after three, at the mean; and a new row.
        let cache_row = 4 * 2 * 4 * 64 * 2;
        assert_eq!(
            number("bytes_per_step"),
            number("model_size") + f64::from(cache_row) * (5.5 + 1.0),
            "{row}"
        );
    }
    assert_eq!([0, 1, 2].map(|i| rows[i]["logits"].as_bool().unwrap()), [true, true, false]);
}

#[test]
fn lists_make_a_test_each_and_zero_makes_none() {
    let quick = ["-r", "1", "--no-warmup", "--no-bandwidth"];
    let rows = rows(&[&["-p", "0", "-n", "4", "-r", "2", "--no-bandwidth", "-o", "json"][..]].concat());
    assert_eq!(names(&rows), ["tg4", "tg4 (no logits)"]);
    assert!(rows[0]["read_bandwidth_gbs"].is_null() && rows[0]["bandwidth_share"].is_null());

    let lines = stdout(&[&["-p", "4,6", "-n", "0", "-d", "0,2", "-o", "jsonl"], &quick[..]].concat());
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(names(&rows), ["pp4", "pp6", "pp4 @ d2", "pp6 @ d2"]);

    let lines = stdout(&[&["-p", "4", "-n", "0", "-t", "2,1", "-o", "jsonl"], &quick[..]].concat());
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(names(&rows), ["pp4", "pp4"]);
    assert_eq!([0, 1].map(|i| rows[i]["n_threads"].as_u64().unwrap()), [2, 1]);
}

#[test]
fn a_model_is_called_by_the_format_of_most_bytes() {
    // More tensors are in f16, and more bytes in Q8_0.
    let shape = Shape { vocab: 256, layers: 3, ..synthetic::shape("tiny-llama") };
    let format = |name: &str| match name.contains("attn") {
        true => synthetic::uniform(DType::F16)(name),
        false => synthetic::uniform(DType::Q8_0)(name),
    };
    let model = Model::new(&shape, format);
    let count = |dtype| model.tensors.values().filter(|(of, _)| *of == dtype).count();
    assert!(count(DType::F16) > count(DType::Q8_0), "{} in f16", count(DType::F16));
    let file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
    std::fs::write(file.path(), model.file().bytes()).unwrap();
    let path = file.path().to_str().unwrap();
    let rows =
        rows(&["-m", path, "-p", "2", "-n", "0", "-r", "1", "--no-bandwidth", "--no-warmup", "-o", "json"]);
    assert_eq!(rows[0]["model_type"], "llama 2M Q8_0");
    assert_eq!(rows[0]["model_filename"], path);
}

#[test]
fn the_instruction_set_is_the_one_that_is_named() {
    let isa = |name: Option<&str>| {
        let mut command = sinter();
        command.args("bench -p 4 -n 2 -r 1 --no-warmup --no-bandwidth -o jsonl".split(' '));
        match name {
            Some(name) => command.env("SINTER_CPU", name),
            None => command.env_remove("SINTER_CPU"),
        };
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let rows: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), 3);
        rows.iter().map(|row| row["isa"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let all = Features::available();
    for features in &all {
        assert_eq!(isa(Some(features.name())), vec![features.name(); 3]);
    }
    assert_eq!(isa(None), vec![all.last().unwrap().name(); 3]);
}

#[test]
fn the_table_is_markdown() {
    let model = "models/rustdoc-13m-q8_0.gguf";
    let said = stdout(&["-m", model, "-p", "5", "-n", "2", "-r", "1", "--chunk", "2", "--exact"]);
    let lines: Vec<&str> = said.lines().collect();
    let bars = |line: &str| line.matches('|').count();
    assert!(lines[..5].iter().all(|line| bars(line) == 13), "{said}");
    for (line, test) in lines[2..].iter().zip(["pp5", "tg2", "tg2 (no logits)"]) {
        assert!(line.contains(&format!(" {test} |")) && line.contains("llama 13M Q8_0"), "{line}");
        assert!(line.contains(" ± 0.00 |"), "{line}");
        assert_eq!(line.contains("GB/s"), test != "pp5", "{line}");
    }
    assert!(said.contains("\nread bandwidth with "), "{said}");
}

#[test]
fn what_cannot_be_measured_is_one_clear_error() {
    fails(&["-p", "0", "-n", "0"], "nothing to measure");
    fails(
        &["-p", "4", "-n", "4", "-b", "1,600"],
        "600 sequences are more than a step's 512 tokens; --chunk 600",
    );
    fails(&["-p", "16", "-n", "0", "-d", "0,32", "-c", "40"], "pp16 @ d32 needs a context of 48, not 40");
    fails(&["-p", "12,x"], "invalid value 'x' for '--n-prompt");
    fails(&["-n", "4,,8"], "invalid value '' for '--n-gen");
    fails(&["-d", "1.5"], "invalid value '1.5' for '--n-depth");
    fails(&["-r", "0"], "invalid value '0' for '--repetitions");
    fails(&["-p", "4", "-t", "0"], "number of threads");
    fails(&["-p", "18446744073709551615", "-d", "18446744073709551615"], "context");
    fails(&["-o", "sql"], "invalid value 'sql'");
    fails(&["no-such.gguf"], "No such file");
    fails(&["Cargo.toml"], "not a GGUF file");
}

/// What a window has left behind is read again before the next repetition, and is no part of what a step moves.
#[test]
fn a_window_can_be_measured_at_any_depth() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let model = Model::new(&synthetic::shape("tiny-phi3"), synthetic::uniform(DType::F16));
    std::fs::write(path.path(), model.file().bytes()).unwrap();
    let path = path.path().to_str().unwrap();
    let rows = rows(&[
        "-m",
        path,
        "-p",
        "0",
        "-n",
        "40",
        "-d",
        "0,100,200",
        "-r",
        "2",
        "--no-bandwidth",
        "-o",
        "json",
    ]);
    let bytes: Vec<u64> = rows.iter().map(|row| row["bytes_per_step"].as_u64().unwrap()).collect();
    // Each with logits and without. The first tokens see fewer than the window.
    let (first, full) = (bytes[0], bytes[2]);
    assert!(bytes.len() == 6 && bytes[2..].iter().all(|n| *n == full) && first < full, "{bytes:?}");
    // Six of seven rows of two layers' keys and values at most, in f16: 2 · 2 · 128 · 2 bytes each.
    assert!(full - first < 6 * 1024, "{bytes:?}");
    // A profile sees no more than the window either.
    let moved = ["101", "102", "103", "104", "192"].map(|depth| {
        let args = ["profile", "-m", path, "-p", "0", "-r", "2", "-d", depth, "-c", "256", "--json"];
        let json: Value = serde_json::from_str(&command::stdout(&args)).unwrap();
        let step = &json["steps"][0];
        assert_eq!((&step["program"], &step["T"]), (&"t1".into(), &1.into()), "after {depth}");
        step["kernels"].as_array().unwrap().iter().map(|k| k["bytes"].as_u64().unwrap()).sum::<u64>()
    });
    assert!(moved == [moved[0]; 5] && moved[0] > full, "{moved:?}, {full}");
}

/// What is named is what ran: the CPU where no GPU is there.
#[test]
fn the_device_that_ran_is_named() {
    let args = [
        "bench",
        "--device",
        "hip",
        "-p",
        "2",
        "-n",
        "0",
        "-r",
        "1",
        "--no-bandwidth",
        "--no-warmup",
        "-o",
        "json",
    ];
    // Where it is not here, nothing stands in for it: that of another device is no measure.
    let output = command::run(&args);
    if output.status.success() {
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(rows[0]["backends"], "HIP:0");
    } else {
        for args in [&args[..], &["profile", "--device", "hip", "-p", "2"]] {
            command::fails(args, "--device hip is what is to be measured: ");
        }
        command::fails(&["check", "--device", "hip"], "--device hip is what is to be checked: ");
    }
}

/// What a profile says adds up, and a person sees it.
#[test]
fn a_profile_tells_where_the_time_goes() {
    let profile = |args: &[&str]| command::stdout(&[&["profile", "-t", "1", "-r", "2"], args].concat());
    let json: Value = serde_json::from_str(&profile(&["-p", "16", "-d", "5", "-b", "2", "--json"])).unwrap();
    let steps = json["steps"].as_array().unwrap();
    assert_eq!(names(steps), ["pp16 @ d5", "tg1 @ d5 b2"]);
    for step in steps {
        let kernels = step["kernels"].as_array().unwrap();
        let sum = |key: &str| kernels.iter().map(|k| k[key].as_f64().unwrap()).sum::<f64>();
        assert!(
            (sum("share") - 1.0).abs() < 1e-9
                && (sum("us") / step["kernels_us"].as_f64().unwrap() - 1.0).abs() < 1e-9
        );
        for kernel in kernels {
            assert!(
                ["memory", "caches", "launch", "arithmetic", "latency"]
                    .contains(&kernel["limit"].as_str().unwrap()),
                "{kernel}"
            );
        }
    }
    assert_eq!((&steps[1]["T"], &steps[1]["R"]), (&Value::from(2), &Value::from(2)));
    assert_eq!(json["memory"]["cache_per_token"], 4 * 2 * 256 * 2);
    let text = profile(&["-p", "0"]);
    assert!(
        text.contains("tg1 (program t1, T=1 R=1): ") && text.contains("blk.0-3.attn_output.weight"),
        "{text}"
    );
    assert!(!text.contains("pp512") && text.contains("\nready in "), "{text}");
    command::fails(&["profile", "-r", "0"], "0 is not in 1..=10000");
    command::fails(&["profile", "-p", "64", "-c", "32"], "pp64 needs a context of 64, not 32");
    command::fails(&["profile", "-p", "1", "--prompt", "x"], "cannot be used with");
}

/// Each call of a step stands for itself, in order, beside the kernels that it is folded into.
#[test]
fn a_profile_lists_every_node() {
    let args = ["profile", "-t", "1", "-r", "3", "-p", "0"];
    let json: Value = serde_json::from_str(&command::stdout(&[&args[..], &["--json"]].concat())).unwrap();
    let step = &json["steps"][0];
    let nodes = step["nodes"].as_array().unwrap();
    let calls: Vec<u64> = nodes.iter().map(|node| node["call"].as_u64().unwrap()).collect();
    assert_eq!(calls, (0..nodes.len() as u64).collect::<Vec<_>>());
    for key in ["bytes", "operations", "launches"] {
        let sum =
            |of: &str| step[of].as_array().unwrap().iter().map(|row| row[key].as_u64().unwrap()).sum::<u64>();
        assert_eq!(sum("nodes"), sum("kernels"), "{key}");
    }
    let downs = nodes.iter().filter(|node| node["node"].as_str().unwrap().ends_with("ffn_down.weight"));
    let downs: Vec<&str> = downs.map(|node| node["node"].as_str().unwrap()).collect();
    assert_eq!(downs, [0, 1, 2, 3].map(|layer| format!("blk.{layer}.ffn_down.weight")));
    assert!(nodes.iter().all(|node| node["us"].as_f64().unwrap() > 0.0 && node["stream"] == 0));
    let text = command::stdout(&[&args[..], &["--nodes"]].concat());
    let listed = text.lines().filter(|line| line.contains(" blk.2.")).count();
    assert!(listed == 8 && !text.contains("blk.0-"), "{text}");
}

/// What passes until the first token adds up, whatever is compiled or was.
#[test]
fn a_profile_tells_what_passes_until_the_first_token() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("m.plan");
    let plan = plan.to_str().unwrap();
    command::stdout(&["compile", "-o", plan, "-c", "64"]);
    for source in [&["-c", "64"][..], &[plan]] {
        let args = ["profile", "-r", "1", "-t", "1", "--json", "--prompt", "The borrow checker"];
        let json: Value = serde_json::from_str(&command::stdout(&[&args[..], source].concat())).unwrap();
        let (load, first) = (&json["load"], &json["first_token"]);
        let sum =
            |of: &Value, keys: &[&str]| keys.iter().map(|key| of[*key].as_f64().unwrap_or(0.0)).sum::<f64>();
        let parts =
            ["open_ms", "identify_ms", "compile_ms", "plan_ms", "kernels_ms", "weights_ms", "rest_ms"];
        let loaded = load["all_ms"].as_f64().unwrap();
        assert!((sum(load, &parts) / loaded - 1.0).abs() < 1e-9, "{load}");
        let parts = ["tokenise_ms", "upload_ms", "prefill_ms", "download_ms", "choose_ms"];
        let all = first["all_ms"].as_f64().unwrap();
        assert!(((loaded + sum(first, &parts)) / all - 1.0).abs() < 1e-9, "{first}");
        assert!(parts.iter().all(|key| first[*key].as_f64().unwrap() > 0.0), "{first}");
        // A plan enters no compiler.
        assert_eq!(load["compile_ms"].is_null(), source == [plan]);
        let ids: Vec<u32> =
            serde_json::from_str(&command::stdout(&["tokenize", "The borrow checker"])).unwrap();
        let tokens = ids.len() as u64;
        assert_eq!(
            (first["prompt_tokens"].as_u64(), first["prompt_steps"].as_u64()),
            (Some(tokens), Some(1))
        );
        // The logits of one token, over a vocabulary of 4096.
        assert_eq!(first["download_bytes"], 4 * 4096);
        assert!(first["upload_bytes"].as_u64().unwrap() >= 4 * 4 * tokens, "{first}");
        let memory = |key: &str| json["memory"][key].as_u64().unwrap();
        if cfg!(target_os = "linux") {
            assert!(
                memory("peak") > memory("repacked") + memory("cache") && memory("peak") < 1 << 30,
                "{json}"
            );
        }
        assert_eq!(json["steps"][0]["test"], format!("pp{tokens}"));
    }
    // A long prompt is read in as many steps as it takes, of which one is profiled.
    let args = ["profile", "-r", "1", "-p", "20", "--chunk", "8", "--json"];
    let json: Value = serde_json::from_str(&command::stdout(&args)).unwrap();
    assert_eq!((&json["first_token"]["prompt_steps"], &json["steps"][0]["test"]), (&3.into(), &"pp8".into()));
    assert!(json["first_token"]["tokenise_ms"].is_null());
}

/// A plan is profiled as it is: what it has room and programs for.
#[test]
fn a_plan_is_profiled_as_it_was_compiled() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let compile = |name: &str, args: &[&str]| {
        command::stdout(&[&["compile", "-o", &at(name)], args].concat());
        at(name)
    };
    let plan = compile("a.plan", &["-c", "48", "--chunk", "16", "--target", "cpu,gfx1100", "--source-only"]);
    let json: Value =
        serde_json::from_str(&command::stdout(&["profile", &plan, "-r", "1", "--json"])).unwrap();
    assert_eq!(json["target"], "cpu");
    // As many tokens as there is room for, and as a step takes.
    assert_eq!(names(json["steps"].as_array().unwrap()), ["pp16", "tg1"]);
    assert_eq!(json["first_token"]["prompt_tokens"], 48);
    let with =
        |args: &[&str], said: &str| command::fails(&[&["profile", &plan, "-r", "1"], args].concat(), said);
    with(&["--exact"], "is compiled already: --exact does not apply");
    with(&["--target", "cpu"], "is compiled already: --target does not apply");
    with(&["-c", "64"], "is compiled already: --ctx-size does not apply");
    with(&["-p", "49"], "pp49 needs a context of 49, not 48");
    with(&["-d", "48"], "tg1 @ d48 needs a context of 49, not 48");
    with(&["-b", "2"], "tg1 b2 takes 2 sequences, and the plan was compiled for 1");
    with(&["-m", "models/rustdoc-13m-q8_0.gguf"], "the plan was compiled for another model file");
    let greedy = compile("b.plan", &["--greedy"]);
    command::fails(
        &["profile", &greedy],
        "greedy decoding and returns no logits; compile it again without --greedy",
    );
    std::fs::write(at("c.plan"), &std::fs::read(&plan).unwrap()[..5000]).unwrap();
    command::fails(&["profile", &at("c.plan")], "the plan is truncated");
}

/// Fields as the trace event format has them; what is on a thread nests or follows.
#[test]
fn a_trace_nests_and_follows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let args = ["profile", "-t", "1", "-r", "2", "-p", "8", "--trace", path.to_str().unwrap()];
    assert!(command::stdout(&args).contains("tg1 (program t1"));
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let mut named = std::collections::BTreeSet::new();
    let mut threads = std::collections::BTreeMap::<(u64, u64), Vec<(f64, f64)>>::new();
    for event in events {
        let thread = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        assert!(event["name"].is_string() && event["args"].is_object(), "{event}");
        match event["ph"].as_str().unwrap() {
            "M" => {
                assert!(
                    ["process_name", "thread_name"].contains(&event["name"].as_str().unwrap()),
                    "{event}"
                );
                assert!(event["args"]["name"].is_string(), "{event}");
                named.insert(thread);
            }
            "X" => {
                let [ts, dur] = ["ts", "dur"].map(|key| event[key].as_f64().unwrap());
                assert!(ts >= 0.0 && dur >= 0.0 && event["cat"].is_string(), "{event}");
                threads.entry(thread).or_default().push((ts, ts + dur));
            }
            other => panic!("{other}"),
        }
    }
    for (thread, spans) in &threads {
        assert!(named.contains(thread), "{thread:?} has no name");
        assert!(spans.is_sorted_by(|a, b| a.0 <= b.0), "{thread:?}");
        let mut open: Vec<f64> = vec![];
        for (start, end) in spans {
            while open.last().is_some_and(|last| *last <= start + 1e-6) {
                open.pop();
            }
            assert!(open.iter().all(|outer| *end <= outer + 1e-6), "{thread:?}: {start}..{end} in {open:?}");
            open.push(*end);
        }
    }
    // One event for each launch, within its step, at what it reads.
    let kernels: Vec<&Value> = events.iter().filter(|event| event["cat"] == "kernel").collect();
    for (pid, test) in [(2, "pp8"), (3, "tg1")] {
        let step = events.iter().find(|event| event["cat"] == "step" && event["pid"] == pid).unwrap();
        assert_eq!(step["name"], test);
        let own: Vec<&&Value> = kernels.iter().filter(|event| event["pid"] == pid).collect();
        let sum: f64 = own.iter().map(|event| event["dur"].as_f64().unwrap()).sum();
        assert!((sum / step["dur"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{sum} in {step}");
        assert!(own.len() > 20 && own.iter().all(|event| event["ts"].as_f64() >= step["ts"].as_f64()));
        for event in own {
            let [bytes, gbs] = ["bytes_of_call", "gbs"].map(|key| event["args"][key].as_f64().unwrap());
            let time = event["dur"].as_f64().unwrap();
            assert!((bytes / time / 1e3 / gbs - 1.0).abs() < 1e-6, "{event}");
        }
    }
}

/// A dot and a line of the legend for each kernel whose operations are counted; its own file, or stdout alone.
#[test]
fn a_roofline_shows_every_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roofline.svg");
    let args = ["profile", "-t", "1", "-r", "2", "-p", "8", "--json", "--roofline", path.to_str().unwrap()];
    let json: Value = serde_json::from_str(&command::stdout(&args)).unwrap();
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && svg.ends_with("</svg>\n"));
    assert!(
        svg.contains("prefers-color-scheme: dark") && svg.matches("http").count() == 1,
        "from the network"
    );
    let counted = |step: &Value| {
        let kernels = step["kernels"].as_array().unwrap().iter();
        kernels.filter(|kernel| kernel["operations"].as_u64() > Some(0)).cloned().collect::<Vec<_>>()
    };
    let steps = json["steps"].as_array().unwrap();
    let dots: Vec<Value> = steps.iter().flat_map(counted).collect();
    assert_eq!(svg.matches("<circle class=\"a\"").count(), counted(&steps[0]).len());
    assert_eq!(svg.matches("<circle class=\"b\"").count(), counted(&steps[1]).len());
    assert_eq!(svg.matches("<text class=\"ink number\"").count(), dots.len());
    for dot in &dots {
        let name = format!("{} {}", dot["kernel"].as_str().unwrap(), dot["node"].as_str().unwrap());
        assert!(svg.contains(&format!(">{name}: ")), "{name}");
    }
    assert!(svg.contains("GB/s, measured</text>"), "{svg}");
    // Opening and closing tags balance, and nothing is no number.
    let opened = svg.matches('<').count() - 2 * svg.matches("</").count() - svg.matches("/>").count();
    assert!(opened == 0 && !svg.contains("NaN") && !svg.contains("inf"), "{opened}");
    let only_one = "go to stdout, and only one can";
    for both in [
        ["--roofline", "-", "--json"].as_slice(),
        &["--trace", "-", "--json"],
        &["--trace", "-", "--roofline", "-"],
    ] {
        command::fails(&[&["profile", "-p", "0"], both].concat(), only_one);
    }
    let out = command::stdout(&["profile", "-r", "1", "-p", "0", "--roofline", "-"]);
    assert!(out.starts_with("<svg ") && out.ends_with("</svg>\n"), "{out}");
    command::fails(
        &["profile", "-r", "1", "-p", "0", "--trace", "no/such/folder"],
        "cannot write no/such/folder",
    );
}
