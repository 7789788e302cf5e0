//! The `sinter` command as people run it: the real binary, its output, its exit code, and how it says no.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use support::command::{fails, report, run, sinter, stdout, text};
use support::*;
use tempfile::TempDir;

fn piped(args: &[&str], input: &[u8]) -> Output {
    let mut child = sinter()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn arg(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// A plan of the embedded model in a folder of its own.
fn compiled(dir: &TempDir, more: &[&str]) -> String {
    let plan = arg(&dir.path().join("model.plan"));
    stdout(&[&["compile", "-c", "64", "-o", &plan], more].concat());
    plan
}

const GREEDY: [&str; 6] = ["-p", "The borrow checker", "--temp", "0", "-n", "16"];

#[test]
fn a_plan_runs_without_the_compiler() {
    let dir = temp();
    let plan = compiled(&dir, &[]);
    let model = arg(&model_path("q4_k_m"));
    let traced = |source: &str| {
        let output = sinter().args(["run", source]).args(GREEDY).env("SINTER_LOG", "trace").output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let stages = ["sinter::lower", "sinter::passes", "sinter::codegen"];
    let (from_model, log) = traced(&model);
    for stage in stages {
        assert!(log.contains(stage), "running a model shows {stage}");
    }
    let (from_plan, log) = traced(&plan);
    assert!(log.contains("sinter::runtime"), "{log}");
    for stage in stages {
        assert!(!log.contains(stage), "running a plan shows {stage}");
    }
    assert_eq!(from_plan, from_model);
}

#[test]
fn run_prints_the_text_alone() {
    let oracle = oracle();
    let wanted = &oracle.models["q4_k_m"];
    let said = stdout(&["run", "--exact", "-p", &wanted.greedy_prompt, "--temp", "0", "-n", "24"]);
    let continuation = wanted.greedy_text.strip_prefix(&wanted.greedy_prompt).unwrap();
    assert_eq!(said, format!("{continuation}\n"));

    let prompt = temp();
    let file = prompt.path().join("prompt.txt");
    std::fs::write(&file, &wanted.greedy_prompt).unwrap();
    assert_eq!(stdout(&["run", "--exact", "-f", &arg(&file), "--temp", "0", "-n", "24"]), said);
    let from_stdin = piped(&["run", "--exact", "--temp", "0", "-n", "24"], wanted.greedy_prompt.as_bytes());
    assert_eq!(text(&from_stdin.stdout), said);
    let from_stdin =
        piped(&["run", "--exact", "-f", "-", "--temp", "0", "-n", "24"], wanted.greedy_prompt.as_bytes());
    assert_eq!(text(&from_stdin.stdout), said);
}

#[test]
fn the_readme_shows_what_is_printed() {
    let readme = std::fs::read_to_string(path("README.md")).unwrap();
    let shown = |command: &str| {
        let (_, after) = readme.split_once(&format!("$ {command}\n")).expect(command);
        after.split("```").next().unwrap().to_string()
    };
    let run = "run -p \"The borrow checker\" --exact --temp 0 -n 24";
    let said = stdout(&["run", "-p", "The borrow checker", "--exact", "--temp", "0", "-n", "24"]);
    assert_eq!(shown(&format!("cargo run --release -- {run}")), said + "$ cargo test --release\n");
    assert_eq!(shown("sinter explain --step decode"), stdout(&["explain", "--step", "decode"]));
}

#[test]
fn a_model_of_no_numbers_is_an_error() {
    let dir = temp();
    let model = dir.path().join("model.gguf");
    let mut bytes = std::fs::read(model_path("q4_k_m")).unwrap();
    let place = {
        let file = sinter::gguf::GgufFile::from_bytes(bytes.clone()).unwrap();
        file.gguf().tensors["output_norm.weight"].offset as usize
    };
    bytes[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&model, &bytes).unwrap();
    let model = arg(&model);
    fails(&["run", &model, "-p", "x", "--temp", "0"], "the model's logits are not numbers (NaN)");
    fails(&["run", &model, "-p", "x", "--temp", "0", "--exact", "--no-fuse"], "are not numbers (NaN)");
    fails(&["run", &model, "-p", "x", "--temp", "1"], "the logit of token 0 is NaN");
    fails(&["perplexity", &model, "-f", "Cargo.toml", "-c", "64", "--chunks", "1"], "are not numbers (NaN)");
}

#[test]
fn what_is_slow_or_senseless_is_warned_of() {
    let warned = |flags: &[&str], of: &str| {
        let said = text(&run(&[&["run", "-p", "a", "-n", "1"], flags].concat()).stderr);
        assert_eq!(said.contains("WARN"), !of.is_empty(), "{said}");
        assert!(said.contains(of), "{said}");
    };
    warned(&["-c", "512"], "");
    warned(&["-c", "513"], "more than the 512 tokens that the model was trained for");
    let many = std::thread::available_parallelism().unwrap().get() + 1;
    warned(&["-t", &many.to_string()], &format!("{many} threads share"));
    let output = sinter().args(["run", "-p", "a", "-n", "1"]).env("SINTER_CPU", "foo").output().unwrap();
    assert!(text(&output.stderr).contains("SINTER_CPU=foo is none of baseline"), "{}", report(&output));
}

#[test]
fn a_seed_repeats_its_text() {
    let of = |seed| stdout(&["run", "-p", "A `Vec<T>`", "-n", "24", "--temp", "1.2", "--seed", seed]);
    let first = of("7");
    assert_eq!(of("7"), first);
    assert_eq!(of("0"), of("0"));
    assert!(["8", "9", "10"].map(of).iter().any(|other| *other != first));
}

#[test]
fn a_greedy_plan_says_what_it_cannot_do() {
    let dir = temp();
    let plan = compiled(&dir, &["--greedy"]);
    let said = stdout(&[&["run", &plan], &GREEDY[..]].concat());
    assert_eq!(said, stdout(&[&["run"], &GREEDY[..]].concat()));
    fails(&["run", &plan, "-p", "x", "--temp", "1"], "compiled for greedy decoding");
}

#[test]
fn dump_prints_every_stage_in_every_format() {
    for (step, name) in [("decode", "t1"), ("prefill", "t512"), ("score", "t512")] {
        for format in ["text", "dot", "json", "svg"] {
            let mut dumps: Vec<String> = vec![];
            for stage in ["lowered", "fused", "kernels", "plan"] {
                let what = format!("{stage} {step} {format}");
                let said = stdout(&["dump", "--stage", stage, "--step", step, "--format", format]);
                match (format, stage) {
                    ("dot", _) => {
                        assert!(said.starts_with(&format!("digraph \"{name}\" {{")), "{what}");
                        // Braces within labels are escaped or in pairs, so they balance too.
                        assert_eq!(said.matches('{').count(), said.matches('}').count(), "{what}");
                        assert!(said.contains(" -> "), "{what}");
                    }
                    ("svg", _) => {
                        assert!(said.starts_with("<svg ") && said.ends_with("</svg>\n"), "{what}");
                        assert_eq!(said.matches("<g ").count(), said.matches("</g>").count(), "{what}");
                        assert!(said.contains(">blk.0") && said.contains("class=\"edge"), "{what}");
                    }
                    ("json", _) => {
                        let json: serde_json::Value = serde_json::from_str(&said).expect(&what);
                        match stage {
                            "plan" => assert!(
                                json["programs"].as_array().unwrap().iter().any(|p| p["name"] == name),
                                "{what}"
                            ),
                            _ => assert_eq!(json["name"], name, "{what}"),
                        }
                    }
                    (_, "plan") => assert!(said.contains(&format!("\nprogram \"{name}\" ")), "{what}"),
                    (_, "kernels") => assert!(said.starts_with(&format!("program \"{name}\" ")), "{what}"),
                    _ => assert!(said.starts_with(&format!("graph @{name}(")), "{what}"),
                }
                assert!(!dumps.contains(&said), "{what} is what another stage is");
                dumps.push(said);
            }
        }
    }
}

#[test]
fn dump_makes_a_page() {
    let page = stdout(&["dump", "--format", "html", "--target", "test-cpu,gfx1100"]);
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let json: serde_json::Value = serde_json::from_str(data).unwrap();
    let views = json["views"].as_array().unwrap().iter();
    let views: Vec<_> =
        views.map(|view| (view["step"].as_str().unwrap(), view["target"].as_str().unwrap())).collect();
    assert_eq!(
        views,
        [("decode", "test-cpu"), ("prefill", "test-cpu"), ("decode", "gfx1100"), ("prefill", "gfx1100")]
    );
    assert!(json["views"][0]["memory"]["calls"].as_array().unwrap().len() > 20);
    fails(&["dump", "--format", "html", "--stage", "plan"], "takes neither --stage nor --after");
    fails(&["dump", "--format", "html", "--after", "swiglu"], "takes neither --stage nor --after");
    fails(&["dump", "--format", "html", "--target", "test-cpu,gpu"], "there is no target \"gpu\"");
}

#[test]
fn dump_all_writes_every_stage_and_nothing_over_what_is_not_its_own() {
    let dir = temp();
    let (own, foreign) = (dir.path().join("own"), dir.path().join("foreign"));
    stdout(&["dump", "--all", &arg(&own)]);
    let listing = std::fs::read_to_string(own.join("index.txt")).unwrap();
    let files: Vec<&str> =
        listing.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    // The lowered graph, a graph after each of 12 passes, kernels and plan, in three formats, of two steps, and two pages.
    assert_eq!(files.len(), (1 + 12 + 2) * 3 * 2 + 2);
    let index = std::fs::read_to_string(own.join("index.html")).unwrap();
    for file in &files {
        assert!(own.join(file).metadata().unwrap().len() > 0, "{file}");
        assert!(file.starts_with("index") || index.contains(&format!("href=\"{file}\"")), "{file}");
    }
    let fused = std::fs::read_to_string(own.join("decode/12-sample_head.sir")).unwrap();
    assert_eq!(fused, stdout(&["dump"]));
    let early = std::fs::read_to_string(own.join("decode/03-dequant_matmul.sir")).unwrap();
    assert_eq!(early, stdout(&["dump", "--after", "dequant_matmul"]));

    // Once more, less: what was written before and is not written now is gone, what is somebody's stays.
    std::fs::write(own.join("note"), "mine").unwrap();
    stdout(&["dump", "--all", &arg(&own), "--step", "decode"]);
    assert!(own.join("decode/00-lowered.dot").exists() && !own.join("prefill").exists());
    assert_eq!(std::fs::read_to_string(own.join("note")).unwrap(), "mine");

    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("index.txt"), "a list of mine\nnote\n").unwrap();
    std::fs::write(foreign.join("note"), "mine").unwrap();
    fails(&["dump", "--all", &arg(&foreign)], "is not empty, and not made by dump --all");
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 2);
    fails(&["dump", "--all", &arg(&foreign.join("note"))], "cannot write to");
    fails(&["dump", "--all", &arg(&own), "--format", "dot"], "cannot be used with");
}

#[test]
fn dump_after_a_pass_stops_there() {
    let after = |pass| stdout(&["dump", "--after", pass]);
    assert!(!after("quantise_acts").contains("fused"));
    assert!(after("dequant_matmul").contains("dequant_matmul"));
    assert!(!after("dequant_matmul").contains("rope_kv"));
    assert_eq!(after("sample_head"), stdout(&["dump"]));
    fails(&["dump", "--after", "nonsense"], "pass \"nonsense\" does not run here");
    fails(&["dump", "--exact", "--after", "quantise_acts"], "does not run here");
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    for (args, starts) in [
        (&["dump", "--stage", "lowered"][..], "graph @t1("),
        (&["explain", "--json", "--no-fuse"], "{"),
        (&["inspect", "--json"], "{"),
    ] {
        let mut child = sinter().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        // A buffer smaller than what is printed, or the writer would never notice.
        let mut out = BufReader::with_capacity(64, child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert!(line.starts_with(starts), "{line}");
        drop(out);
        let output = child.wait_with_output().unwrap();
        assert_eq!((text(&output.stderr), output.status.success()), (String::new(), true), "{args:?}");
    }
}

#[test]
fn opt_reads_files_and_stdin() {
    let graph = stdout(&["dump", "--stage", "lowered"]);
    let dir = temp();
    let file = dir.path().join("decode.sir");
    std::fs::write(&file, &graph).unwrap();
    let opt = |more: &[&str]| stdout(&[&["opt", &arg(&file)], more].concat());
    assert_eq!(opt(&["--passes", ""]), graph, "no passes change nothing");
    assert_eq!(opt(&["--fuel", "0"]), graph);
    let fused = opt(&["--target", "test-cpu"]);
    assert_eq!(fused.lines().filter(|l| l.contains("= fused ")).count(), 34);
    assert_eq!(
        fused,
        stdout(&["dump", "--target", "test-cpu"]),
        "what the passes make depends on the text alone"
    );
    assert_eq!(text(&piped(&["opt", "-", "--target", "test-cpu"], graph.as_bytes()).stdout), fused);
    let some = opt(&["--passes", "cleanup,dequant_matmul", "--target", "test-cpu"]);
    assert!(some.contains("dequant_matmul") && !some.contains("rope_kv"));
    let one = opt(&["--passes", "dequant_matmul", "--fuel", "1"]);
    assert_eq!(one.matches("dequant_matmul").count(), 1);
}

#[test]
fn explain_tells_what_fused() {
    let explain = ["explain", "--target", "test-cpu"];
    let said = stdout(&explain);
    for line in ["\n134 launches -> 34, ", "left unfused: nothing", "fused, and no further"] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let all = stdout(&[&explain[..], &["--all"]].concat());
    let json = stdout(&[&explain[..], &["--json"]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["steps"][1]["graph"], "t1");
    assert_eq!(json["steps"][1]["after"]["launches"]["attention"], 4);

    // Every decision is a line, in order, with what it takes and how much less that is than before.
    let (mut wanted, mut fired) = (String::new(), 0);
    for step in json["steps"].as_array().unwrap() {
        for decision in step["decisions"].as_array().unwrap() {
            let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
            let (pass, at) = (text(&decision["pass"]), text(&decision["at"]));
            let outcome = &decision["outcome"]["fired"];
            if outcome.is_null() {
                continue;
            }
            let replaced: Vec<_> = outcome["replaced"].as_array().unwrap().iter().map(text).collect();
            let us = |key: &str| outcome["gain"][key].as_f64().unwrap();
            let (before, after) = (us("unfused_us"), us("fused_us"));
            assert!(before > after, "{decision}");
            let (kernel, replaced) = (text(&outcome["kernel"]), replaced.join(", "));
            let [after, less] = [after, before - after].map(sinter::ir::Micros);
            wanted += &format!("  {pass}: {at} -> {kernel} replaces {replaced}; {after}, {less} less\n");
            fired += 1;
        }
    }
    let found: String = all
        .lines()
        .filter(|line| line.contains(" replaces ") && line.ends_with(" less"))
        .map(|l| format!("{l}\n"))
        .collect();
    assert!(fired > 80 && found == wanted, "{found}\nis not\n{wanted}");
}

/// A GPU that nobody measured is said to be one.
#[test]
fn explain_says_what_nobody_measured() {
    let says = |target: &str| {
        stdout(&["explain", "--target", target]).contains(&format!("\nnobody measured {target}:"))
    };
    let said = ["gfx1100", "gfx942", "sm_80", "sm_90", "cpu", "test-wave32"].map(says);
    assert_eq!(said, [true, true, true, false, false, false]);
    // All of NVIDIA's have the rates of one card.
    for (target, whose) in [("gfx1100", "of a card of its generation"), ("sm_89", "an H200's")] {
        let said = stdout(&["explain", "--target", target]);
        assert!(said.contains(&format!("\nnobody measured {target}: rates are {whose}, ")), "{said}");
    }
}

/// The report of the frozen target, as a user reads it.
#[test]
fn the_report() {
    let said = stdout(&["explain", "--target", "test-wave32"]);
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("report", said);
    });
}

#[test]
fn inspect_tells_what_is_in_the_file() {
    let said = stdout(&["inspect", &arg(&model_path("q8_0")), "--tensors"]);
    for part in ["GGUF version 3", "general.architecture", "\"llama\"", "blk.3.ffn_down.weight", "Q8_0"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Norms, and all else: bytes and parameters by format.
    let gguf = open("q8_0");
    for (name, count) in [("F32", 9), ("Q8_0", 29)] {
        let of = || gguf.gguf().tensors.values().filter(|t| t.ggml_type.name() == name);
        let millions = |n: u64| n as f64 / 1e6;
        let (parameters, bytes) = (of().map(|t| t.elements()).sum(), of().map(|t| t.bytes).sum());
        assert_eq!(of().count(), count, "{name}");
        let line = format!(
            "  {name:8} {count:4} tensors  {:10.1} M parameters  {:10.1} MB\n",
            millions(parameters),
            millions(bytes)
        );
        assert!(said.contains(&line), "{line}{said}");
    }
    let json: serde_json::Value = serde_json::from_str(&stdout(&["inspect", "--json"])).unwrap();
    assert_eq!(json["tensors"].as_array().unwrap().len(), open("q4_k_m").gguf().tensors.len());
}

#[test]
fn tokenize_prints_the_ids_of_the_oracle() {
    let oracle = oracle();
    assert_eq!(stdout(&["tokenize", &oracle.text]), format!("{:?}\n", oracle.tokens));
    let model = arg(&model_path("q8_0"));
    assert_eq!(
        stdout(&["tokenize", "--no-bos", &model, &oracle.text]),
        format!("{:?}\n", &oracle.tokens[1..])
    );
    assert!(stdout(&["tokenize", "--pieces", "Vec"]).starts_with("0\t"));
}

#[test]
fn logits_are_readable_by_numpy() {
    let dir = temp();
    let out = dir.path().join("logits.npy");
    let tokens = oracle().tokens;
    let list = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    stdout(&["logits", "--exact", "--tokens", &list, "--out", &arg(&out)]);
    let (shape, rows) = read_npy(&out);
    assert_eq!(shape, [tokens.len() as u64, 4096]);
    assert_close("logits", &rows, &oracle_logits("q4_k_m"), 1e-5);
}

#[test]
fn check_passes() {
    for more in [&[][..], &["--exact"], &["--tokens", "0,33,280"], &["--no-fuse"]] {
        let said = stdout(&[&["check"], more].concat());
        assert!(said.ends_with("every kernel computes what its body says\n"), "{said}");
    }
}

#[test]
fn files_that_are_no_models_are_refused() {
    let dir = temp();
    let missing = arg(&dir.path().join("missing.gguf"));
    let half = dir.path().join("half.gguf");
    let bytes = std::fs::read(model_path("q4_k_m")).unwrap();
    std::fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    let (half, folder, manifest) = (arg(&half), arg(dir.path()), arg(&path("Cargo.toml")));
    let plan = arg(&dir.path().join("out.plan"));
    for (file, says) in [
        (&missing, "No such file"),
        (&half, "it may be cut off"),
        (&folder, "not a regular file"),
        (&manifest, "not a GGUF file"),
    ] {
        for args in [
            vec!["run", file, "-p", "x"],
            vec!["compile", file, "-o", &plan],
            vec!["explain", file],
            vec!["dump", file],
            vec!["inspect", file],
            vec!["check", file],
            vec!["tokenize", file, "x"],
            vec!["logits", file, "--tokens", "1", "-o", &plan],
            vec!["perplexity", file, "-f", "Cargo.toml"],
        ] {
            fails(&args, says);
        }
    }
    assert!(!Path::new(&plan).exists());
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let held_out = arg(&path("tests/data/oracle/held_out.txt"));
    for (args, says) in [
        (
            vec!["run", "-p", "x", "--passes", "nonsense"],
            "there is no pass \"nonsense\"; the passes are cleanup,",
        ),
        (vec!["explain", "--passes=-nonsense"], "there is no pass \"nonsense\""),
        (vec!["dump", "--target", "gpu"], "there is no target \"gpu\""),
        (vec!["dump", "--target", "gpu.json"], "target file gpu.json"),
        (vec!["run", "-p", "x", "--kv", "q8"], "invalid value 'q8' for '--kv <TYPE[,TYPE]>'"),
        (vec!["run", "-p", "x", "--chunk", "0"], "--chunk must be at least 1"),
        (vec!["run", "-p", "x", "-c", "1099511627776"], "the context must lie in 1..="),
        (
            vec!["logits", "--tokens", "1", "-c", "99999999", "-o", "never.npy"],
            "the context must lie in 1..=",
        ),
        (vec!["run", "-p", "x", "-t", "0"], "the number of threads must lie in"),
        (vec!["run", "-p", "x", "--temp", "NaN"], "temperature is NaN; it must be at least 0"),
        (vec!["run", "-p", "x", "--temp=-1"], "temperature is -1; it must be at least 0"),
        (vec!["run", "-p", "x", "--temp", "-1"], "temperature is -1; it must be at least 0"),
        (vec!["run", "-p", "- x", "--top-k", "-1"], "invalid value '-1' for '--top-k <K>'"),
        (vec!["bench", "-p", "-1"], "invalid value '-1' for '--n-prompt <N,…>'"),
        (vec!["run", "-p", "x", "--top-p", "2"], "top-p is 2; it must be 0 to 1"),
        (vec!["run", "-p", "x", "--log", "a=b=c"], "--log a=b=c: "),
        (vec!["run", "-p", "x", "--log", "nonsense"], "\"nonsense\" is no level"),
        (
            vec!["run", "-p", "x", "-n", "-2"],
            "'--n-predict <N>': it must be -1 for all, or a number from 0 on",
        ),
        (vec!["dump", "--stage", "plan", "--after", "swiglu"], "--after is of the passes"),
        (vec!["run", "-f", "missing.txt"], "missing.txt"),
        (vec!["run", "-p", "one two three four five six", "-c", "3"], "do not fit a context of 3"),
        (vec!["logits", "--tokens", "1,4096", "-o", "never.npy"], "must lie in 0..4096, not 4096"),
        (
            vec!["logits", "--tokens", "1,2,3", "-c", "2", "-o", "never.npy"],
            "3 tokens do not fit a context of 2",
        ),
        (vec!["logits", "--tokens", "x", "-o", "never.npy"], "invalid value 'x'"),
        (vec!["check", "--tokens", "1"], "check needs two tokens at least"),
        (vec!["check", "--tokens", "1,4096"], "\"tokens\" must lie in 0..4096, not 4096"),
        (vec!["check", "--tokens=-1,2"], "\"tokens\" must lie in 0..4096, not -1"),
        (vec!["check", "--tokens", "1,2,3", "-c", "2"], "3 tokens do not fit a context of 2"),
        (vec!["perplexity", "-f", &held_out, "--chunks", "0"], "--chunks must be at least 1"),
        (vec!["perplexity", "-f", &held_out, "-c", "2"], "a window needs 4 at least"),
        (vec!["tokenize"], "no text"),
    ] {
        let output = run(&args);
        let said = report(&output);
        assert!(said.contains(says), "{args:?}: {said}");
        assert_eq!(text(&output.stdout).lines().filter(|l| l.contains("PPL")).count(), 0, "{args:?}");
    }
    assert!(!path("never.npy").exists() && !path("never.plan").exists());
}

#[test]
fn an_empty_prompt_is_the_start_token() {
    let output = run(&["run", "-p", "", "--temp", "0", "-n", "4"]);
    assert!(output.status.success());
    assert!(text(&output.stderr).starts_with("[1 token read"), "{}", text(&output.stderr));
}

#[test]
fn a_plan_is_run_as_it_is() {
    let dir = temp();
    let plan = compiled(&dir, &[]);
    for flag in [
        &["--exact"][..],
        &["--no-fuse"],
        &["-c", "32"],
        &["--chunk", "7"],
        &["--kv", "f32"],
        &["--passes", "cleanup"],
        &["--fuel", "3"],
        &["--target", "test-cpu"],
    ] {
        let said = report(&run(&[&["run", &plan, "-p", "x"], flag].concat()));
        assert!(said.contains("is compiled already: -"), "{said}");
    }
    let other = arg(&model_path("q8_0"));
    fails(&["run", &plan, "-m", &other, "-p", "x"], "the plan was compiled for another model file");
    fails(&["run", &plan, "-m", "missing.gguf", "-p", "x"], "give its place now with --model");
    let same = arg(&model_path("q4_k_m"));
    stdout(&["run", &plan, "-m", &same, "-p", "x", "-n", "1"]);

    let bytes = std::fs::read(&plan).unwrap();
    std::fs::write(&plan, &bytes[..bytes.len() / 2]).unwrap();
    fails(&["run", &plan, "-p", "x"], "the plan is truncated");
    fails(&["inspect", &plan], "is a compiled plan, and a model is wanted");
}

#[test]
fn a_file_of_plans_for_several_targets() {
    let dir = temp();
    let targets = ["--target", "test-cpu,gfx1100,sm_90", "--source-only"];
    let plan = arg(&dir.path().join("model.plan"));
    let (_, said) = command::said(&run(&[&["compile", "-c", "64", "-o", &plan], &targets[..]].concat()));
    for line in ["gfx1100: ", "sm_90: ", "test-cpu: "] {
        assert!(said.contains(&format!("{plan}: {line}")), "{said}");
    }
    // Without --device, what is for the CPU runs.
    let run_it = ["-p", "x", "-n", "2", "--temp", "0"];
    assert_eq!(
        stdout(&[&["run", &plan], &run_it[..]].concat()),
        stdout(&[&["run", "-c", "64"], &run_it[..]].concat())
    );
    let dump = ["dump", &plan];
    let (shown, said) = command::said(&run(&dump));
    assert!(shown.contains("\ntarget  test-cpu (cpu)\n"), "{shown}");
    assert!(
        said.contains("of the plans for test-cpu, gfx1100, sm_90, this is the one for test-cpu"),
        "{said}"
    );
    let shown = stdout(&[&dump[..], &["--target", "sm_90"]].concat());
    assert!(shown.contains("\ntarget  sm_90 (hip-nvidia)\n"), "{shown}");
    fails(&[&dump[..], &["--target", "gfx942"]].concat(), "the plan is for test-cpu, gfx1100, sm_90");
    fails(&[&dump[..], &["--exact"]].concat(), "is compiled already: --exact does not apply");
    for command in [&dump[..], &["explain", &plan]] {
        let both = [command, &["--target", "sm_90", "--exact"]].concat();
        fails(&both, "is compiled already: --exact does not apply");
    }
    assert_eq!(stdout(&["dump", &plan, "--stage", "plan"]), stdout(&dump));
    fails(&["dump", &plan, "--stage", "fused"], "of which there is --stage plan alone");
    fails(&["dump", &plan, "--after", "merge"], "of which there is --stage plan alone");
    fails(&["dump", &plan, "--format", "html"], "of which there is --stage plan alone");
    fails(&["dump", &plan, "--all", "x"], "of which there is --stage plan alone");
    let (explained, said) = command::said(&run(&["explain", &plan, "--target", "sm_90"]));
    assert!(explained.contains("rustdoc-13m on sm_90\n") && said.is_empty(), "{explained}{said}");
    fails(&["explain", &plan, "--no-fuse"], "is compiled already: --no-fuse does not apply");
    fails(&["check", &plan], "only run, profile, dump and explain take plans");
    fails(&["dump", "--target", "gfx1100,gfx942"], "of several targets there is a page (--format html)");
}

#[test]
fn a_plan_names_where_its_weights_are() {
    let dir = temp();
    let model = dir.path().join("model.gguf");
    std::fs::copy(model_path("q8_0"), &model).unwrap();
    let plan = dir.path().join("model.plan");
    // Wherever it is compiled and run; and both may move together.
    let compile = sinter().current_dir(&dir).args(["compile", "model.gguf", "-o", "model.plan"]).output();
    assert!(compile.unwrap().status.success());
    stdout(&["run", &arg(&plan), "-p", "x", "-n", "1"]);
    let moved = dir.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    std::fs::rename(&model, moved.join("model.gguf")).unwrap();
    std::fs::rename(&plan, moved.join("model.plan")).unwrap();
    let (model, plan) = (moved.join("model.gguf"), arg(&moved.join("model.plan")));
    stdout(&["run", "-m", &plan, "-p", "x", "-n", "1"]);
    // A place that is given is that place, whatever lies beside the plan.
    let elsewhere = arg(&dir.path().join("elsewhere").join("model.gguf"));
    fails(&["run", &plan, "-m", &elsewhere, "-p", "x"], "give its place now with --model");
    std::fs::remove_file(&model).unwrap();
    fails(&["run", &plan, "-p", "x"], "give its place now with --model");
}

#[test]
fn flags_reach_what_is_compiled() {
    let options = |flags: &[&str]| {
        let said = stdout(&[&["dump", "--stage", "plan"], flags].concat());
        said.lines().find(|line| line.starts_with("options ")).unwrap().to_string()
    };
    assert_eq!(options(&[]), "options context 512, sequences 1, chunk 512, kv f16");
    assert_eq!(options(&["--kv", "f32"]), "options context 512, sequences 1, chunk 512, kv f32");
    assert_eq!(options(&["--kv", "f16,f32"]), "options context 512, sequences 1, chunk 512, kv f16,f32");
    assert_eq!(options(&["--exact"]), "options context 512, sequences 1, chunk 512, kv f32, exact");
    assert_eq!(options(&["--exact", "--kv", "f16"]), "options context 512, sequences 1, chunk 512, kv f16");
    assert_eq!(options(&["-c", "100", "--chunk", "7"]), "options context 100, sequences 1, chunk 7, kv f16");
    assert_eq!(options(&["--greedy"]), "options context 512, sequences 1, chunk 512, kv f16, greedy");
    let argmax =
        |flags: &[&str]| stdout(&[&["dump", "--stage", "lowered"], flags].concat()).contains("argmax");
    assert!(argmax(&["--greedy"]) && !argmax(&[]));
}

#[test]
fn verify_sees_a_change_in_the_middle_of_a_tensor() {
    let dir = temp();
    let model = dir.path().join("model.gguf");
    std::fs::copy(model_path("q4_k_m"), &model).unwrap();
    let plan = compiled(&dir, &["-m", &arg(&model), "--verify"]);
    stdout(&["run", &plan, "--verify", "-p", "x", "-n", "1"]);
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = {
        let file = sinter::gguf::GgufFile::from_bytes(bytes.clone()).unwrap();
        let table = &file.gguf().tensors["token_embd.weight"];
        (table.offset + table.bytes / 2) as usize
    };
    bytes[middle] ^= 1;
    std::fs::write(&model, &bytes).unwrap();
    stdout(&["run", &plan, "-p", "x", "-n", "1"]);
    fails(
        &["run", &plan, "--verify", "-p", "x", "-n", "1"],
        "the model file has changed since the plan was compiled",
    );
    let plain = compiled(&dir, &["-m", &arg(&model)]);
    fails(&["run", &plain, "--verify", "-p", "x"], "compile it again with --verify");
    fails(&["run", "--verify", "-p", "x"], "no plan is given");
}

#[test]
fn a_failed_compile_leaves_what_was_there() {
    let dir = temp();
    let plan = compiled(&dir, &[]);
    let before = std::fs::read(&plan).unwrap();
    fails(&["compile", "-o", &plan, "-c", "99999999"], "the context must lie in");
    fails(&["compile", "-o", &plan, "--target", "gfx1"], "there is no target \"gfx1\"");
    assert!(std::fs::read(&plan).unwrap() == before);

    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    fails(&["compile", "-o", &arg(&folder)], "folder: ");
    fails(&["compile", "-o", &arg(&folder.join("missing/out.plan"))], "No such file");
    fails(&["logits", "--tokens", "1", "-o", &arg(&folder)], "folder: ");
    let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["folder", "model.plan"], "nothing half-written is left");

    let model = dir.path().join("model.gguf");
    std::fs::copy(model_path("q8_0"), &model).unwrap();
    for args in [vec!["compile", &arg(&model)], vec!["compile"], vec!["logits", "--tokens", "1"]] {
        let link = dir.path().join("link");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&model, &link).unwrap();
        for out in [&model, &link] {
            fails(&[&args[..], &["-o", &arg(out)]].concat(), "is a model file, which is not overwritten");
        }
    }
    stdout(&["inspect", &arg(&model)]);
}

/// Whoever wants to read what runs on a GPU can, without one.
#[test]
fn dump_shows_the_source_of_gpu_kernels() {
    let shown = stdout(&["dump", "--stage", "kernels", "--target", "gfx1100"]);
    for what in [
        "\nsource of k2, launch 2\n// rope_attention, launch 2 of the kernel, for this body, ",
        "\n//   %9 = softmax %8 : f32[8,T,512]\n",
        "\nKERNEL(rope_attention_2, 256, 1)(",
    ] {
        assert!(shown.contains(what), "{shown}");
    }
    assert!(!stdout(&["dump", "--stage", "kernels"]).contains("source of"));
}

/// A file that grows to its limit while it is written, as on a disk that is full.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_written_whole_is_not_there() {
    let dir = temp();
    let plan = dir.path().join("model.plan");
    std::fs::write(&plan, "old").unwrap();
    let limited = "trap '' XFSZ; ulimit -f 8; exec \"$0\" compile -o \"$1\"";
    let mut shell = Command::new("sh");
    shell
        .args(["-c", limited, env!("CARGO_BIN_EXE_sinter"), &arg(&plan)])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    let said = report(&shell.stdin(Stdio::null()).output().unwrap());
    assert!(said.contains("model.plan: File too large"), "{said}");
    assert_eq!(std::fs::read(&plan).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-written is left");
}

#[cfg(target_os = "linux")]
#[test]
fn results_go_where_they_are_sent() {
    let dir = temp();
    let place = dir.path().join("model.plan");
    stdout(&["compile", "-o", &arg(&place)]);
    let plan = std::fs::read(place).unwrap();
    // A pipe by two names, of which the second is a link that must stay one.
    for out in ["-", "/dev/stdout"] {
        let output = run(&["compile", "-o", out]);
        assert!(output.status.success() && output.stdout == plan, "{}", report(&output));
    }
    assert!(std::fs::symlink_metadata("/dev/stdout").unwrap().is_symlink());
    assert_eq!(run(&["logits", "--tokens", "1,2", "-o", "-"]).stdout.len(), 128 + 2 * 4096 * 4);
    fails(&["compile", "-o", "/dev/full"], "cannot write /dev/full: ");
    // A link to a file is followed.
    let (file, link) = (dir.path().join("file.plan"), dir.path().join("link.plan"));
    std::fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    stdout(&["compile", "-o", &arg(&link)]);
    assert!(link.is_symlink() && std::fs::read(&file).unwrap() == plan);
}

#[cfg(target_os = "linux")]
#[test]
fn nobody_need_listen_to_stderr() {
    for args in [&["run", "-p", "a", "-n", "2"][..], &["--log", "debug", "run", "-p", "a", "-n", "1"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert!(sinter().args(args).stderr(full).output().unwrap().status.success(), "{args:?}");
    }
}

#[test]
fn graphs_with_errors_are_refused_by_line() {
    let dir = temp();
    let file = dir.path().join("bad.sir");
    let graph = |line: &str| format!("graph @a(%x: f32[T,4]) sym T<=1, R<=1 {{\n  {line}\n  return %1\n}}\n");
    let name = arg(&file);
    std::fs::write(&file, graph("%1 = nonsense %x : f32[T,4]")).unwrap();
    fails(&["opt", &name], "bad.sir:2:8: unknown operation \"nonsense\"");
    std::fs::write(&file, graph("%1 = silu %y : f32[T,4]")).unwrap();
    fails(&["opt", &name], "bad.sir:2:13: ");
    std::fs::write(&file, graph("%1 = silu %x : f32[T,5]")).unwrap();
    fails(&["opt", &name], "f32[T,5]");
    fails(&["opt", "missing.sir"], "missing.sir: No such file");
    fails(&["opt", &arg(dir.path())], "Is a directory");

    std::fs::write(&file, [0x67, 0xff, 0xfe, 0x00]).unwrap();
    fails(&["opt", &name], "bad.sir: stream did not contain valid UTF-8");
    let said = report(&piped(&["opt", "-"], &[0xff, 0xfe]));
    assert!(said.contains("stdin: stream did not contain valid UTF-8"), "{said}");
    report(&piped(&["opt", "-"], b""));
}

/// What a pipe holds on Linux.
#[cfg(target_os = "linux")]
const PIPE: usize = 64 << 10;

/// A file of about a gigabyte whose tensor data are a hole: what only needs the description reads no more.
#[test]
#[cfg(target_os = "linux")]
fn a_large_model_is_explained_from_its_header() {
    let bytes = std::fs::read(model_path("q8_0")).unwrap();
    let gguf = open("q8_0");
    let dir = temp();
    let large = dir.path().join("large.gguf");
    let file = std::fs::File::create(&large).unwrap();
    (&file).write_all(&bytes[..gguf.gguf().data_start as usize]).unwrap();
    file.set_len(1 << 30).unwrap();
    let said = stdout(&["explain", "--target", "test-cpu", &arg(&large)]);
    assert!(said.contains("134 launches -> 34, "), "{said}");

    let dump = ["dump", "--stage", "plan", "--format", "json", &arg(&large)];
    assert!(stdout(&dump).len() > 4 * PIPE, "what is printed would fit a pipe");
    let mut child = sinter().args(dump).stdout(Stdio::piped()).spawn().unwrap();
    // So it is still there, in the midst of printing, when the first of it has come.
    let mut out = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut out, &mut [0; 100]).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    assert!(child.try_wait().unwrap().is_none(), "it waits for its reader");
    drop(out);
    child.wait().unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kb: u64 = peak.expect("a peak").trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kb < 100_000, "{kb} kB in memory at the peak");
}
