//! `sinter opt` for those who write passes: graphs between passes, and the rewrite that breaks a command.

mod common;
mod support;

use common::{input, parse};
use sinter::ir::Graph;
use sinter::passes::{AfterPass, Pipeline};
use sinter::target::Target;
use std::io::Write;
use std::process::Stdio;
use support::command::{fails, run, said, sinter, stdout, text};

/// How many rewrites all passes make of the layer.
fn rewrites() -> u64 {
    let report = Pipeline::standard(false).run(&mut input("layer"), &Target::test_wave32()).unwrap();
    report.rewrites.values().sum()
}

const LAYER: &str = "tests/snapshots/inputs/layer.sir";

#[test]
fn opt_bisects_with_a_command() {
    let shows = |doc: &str, shown: &str| {
        let text = std::fs::read_to_string(support::path(doc)).unwrap();
        assert!(text.contains(shown), "{doc} does not show\n{shown}");
    };
    let (out, err) = said(&run(&["opt", LAYER, "--bisect", "! grep -q 'fused matmul_swiglu'"]));
    let command = format!("$ sinter opt {LAYER} --bisect \"! grep -q 'fused matmul_swiglu'\"");
    shows("docs/writing-a-pass.md", &format!("{command}\n{err}{out}"));
    let small = "tests/snapshots/inputs/swiglu.sir";
    let (shown, _) = said(&run(&["opt", small, "--bisect", "! grep -q 'fused swiglu'"]));
    shows(
        "README.md",
        &format!("$ sinter opt {small} --bisect \"! grep -q 'fused swiglu'\" 2>/dev/null\n{shown}"),
    );
    // What the help and the document show, runs: each names a rewrite.
    let help = stdout(&["opt", "--help"]);
    let doc = std::fs::read_to_string(support::path("docs/writing-a-pass.md")).unwrap();
    let command = |text: &str, line: &str| {
        let line =
            text.lines().find(|l| l.trim().starts_with(line)).unwrap_or_else(|| panic!("{line}: {text}"));
        line.split_once("--bisect '").unwrap().1.trim_end().trim_end_matches('\'').to_string()
    };
    let layer = command(&help, "sinter opt layer.sir --bisect");
    assert!(said(&run(&["opt", LAYER, "--bisect", &layer])).0.contains(" breaks it: "));
    let whole = command(&doc, "sinter dump --stage lowered model.gguf | sinter opt - --target cpu --bisect");
    let dir = tempfile::tempdir().unwrap();
    let lowered = dir.path().join("lowered.sir");
    std::fs::write(&lowered, stdout(&["dump", "--stage", "lowered"])).unwrap();
    let lowered = lowered.to_str().unwrap();
    let broken = said(&run(&["opt", lowered, "--target", "test-cpu", "--bisect", &whole])).0;
    assert!(broken.contains(" breaks it: "), "{broken}");
    // From stdin, by file; what the command prints goes to stderr.
    let graph = std::fs::read(support::path(LAYER)).unwrap();
    let mut child = sinter()
        .args(["opt", "-", "--bisect", "echo heard; ! grep -q 'fused matmul_swiglu' {}"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&graph).unwrap();
    let piped = child.wait_with_output().unwrap();
    assert_eq!(text(&piped.stdout), out);
    assert_eq!(text(&piped.stderr), err.replace("--fuel", "heard\n--fuel"));
    // By the number of rewrites, which a command may hand on; by a signal.
    for command in ["test $SINTER_FUEL -lt 9", "[ $SINTER_FUEL -lt 9 ] || kill -9 $$"] {
        let (out, err) = said(&run(&["opt", LAYER, "--bisect", command]));
        assert!(out.starts_with(&format!("rewrite 9 of {} breaks it: ", rewrites())), "{out}");
        let killed = format!("--fuel {}: bad (signal: 9", rewrites());
        assert_eq!(err.contains(&killed), command.contains("kill"), "{err}");
    }
    // The graphs that it names are good and bad.
    let of = |fuel: &str| stdout(&["opt", LAYER, "--fuel", fuel]).contains("fused matmul_swiglu");
    let number = out.split_whitespace().nth(1).unwrap();
    let before = (number.parse::<u64>().unwrap() - 1).to_string();
    assert_eq!((of(&before), of(number)), (false, true));
}

#[test]
fn opt_says_why_it_cannot_bisect() {
    let failed = |command: &str, more: &[&str], with: &str| {
        let output = run(&[&["opt", LAYER, "--bisect", command], more].concat());
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()), "{said}");
        let last = said.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("{said}"));
        assert!(last.contains(with) && said.matches("error:").count() == 1, "{said}");
    };
    failed("false", &[], "before any rewrite is bad already");
    failed("true", &[], &format!("after all {} rewrites is good", rewrites()));
    failed("true", &["--passes", ""], "no rewrite is made");
    failed("no-such-command", &[], "sh cannot run the command (exit status 127): no-such-command");
    failed(LAYER, &[], "(exit status 126)");
    failed(" ", &[], "--bisect takes a command");
    let output = sinter().args(["opt", LAYER, "--bisect", "true"]).env("PATH", "/nowhere").output().unwrap();
    assert!(text(&output.stderr).starts_with("error: cannot start sh"), "{}", text(&output.stderr));
    let output =
        sinter().args(["opt", LAYER, "--bisect", "true"]).env("TMPDIR", "/nowhere").output().unwrap();
    assert!(text(&output.stderr).starts_with("error: no folder for the graphs"), "{}", text(&output.stderr));
    fails(&["opt", LAYER, "--bisect", "true", "--report"], "cannot be used with");
}

/// A path with what a shell would take apart is one word.
#[test]
fn a_graph_has_a_path_that_sh_can_read() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("it's a $folder");
    std::fs::create_dir(&odd).unwrap();
    let output = sinter()
        .args(["opt", LAYER, "--bisect", "! grep -q 'fused matmul_swiglu' {}"])
        .env("TMPDIR", &odd)
        .output()
        .unwrap();
    assert!(said(&output).0.contains("breaks it: swiglu at swiglu"));
    assert_eq!(std::fs::read_dir(&odd).unwrap().count(), 0, "the graphs are left there");
}

#[test]
fn opt_prints_after_a_pass() {
    let after = |passes: &[&str]| stdout(&[&["opt", LAYER], passes].concat());
    let merged = after(&["--print-after", "merge"]);
    assert!(merged.starts_with("// after merge\ngraph @layer("), "{merged}");
    assert_eq!(merged.matches("graph @layer(").count(), 1);
    // It is a graph that opt reads, and the one that there was.
    let mut there = None;
    let mut keep =
        AfterPass(|pass, g: &Graph| there = there.take().or((pass == "merge").then(|| g.to_string())));
    Pipeline::standard(false).run_observed(&mut input("layer"), &Target::test_wave32(), &mut keep).unwrap();
    assert_eq!(parse(&merged).to_string(), there.unwrap());
    let two = after(&["--print-after", "merge,gated_scan"]);
    assert_eq!(two, after(&["--print-after", "merge", "--print-after", "gated_scan"]));
    assert!(two.starts_with(&merged) && two.contains("\n// after gated_scan\n"), "{two}");
    fails(&["opt", LAYER, "--print-after", "marge"], "there is no pass \"marge\"; the passes are cleanup, ");
    let not = ["opt", LAYER, "--passes=-merge", "--print-after", "merge"];
    fails(&not, "pass \"merge\" does not run here; these do: cleanup, ");
    fails(&["opt", LAYER, "--passes", "", "--print-after", "merge"], "does not run here; none does");
    // Rewrites that make no kernel are told, too.
    let told = text(&run(&["opt", LAYER, "--report"]).stderr);
    assert!(told.contains("\nquantise_acts: ") && told.contains("\ncleanup: "), "{told}");
    let each = stdout(&["opt", LAYER, "--verify-each", "--print-after-each"]);
    assert!(each.contains("// after merge\n") && !each.contains("// after gated_scan\n"), "{each}");
}
