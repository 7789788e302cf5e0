//! What `explain` says is true of the graphs that there are: nothing is left without a reason, sums add up, and users have their way.

mod support;

use sinter::compile::{self, Options, Purpose};
use sinter::explain::{Expectation, chains, difference, flip, left, put_in, rows};
use sinter::ir::{DType, Decision, Gain, Micros, Origin, Outcome, Report, Why};
use sinter::lower::Config;
use sinter::passes::{Pipeline, UserRule, names};
use sinter::target::Target;
use std::collections::BTreeSet;
use support::command::{fails, run, said, stdout};
use support::synthetic::{Model, TINY, description, shape, uniform};

/// The reports of every step of a model.
fn reports(name: &str, options: &Options) -> Vec<Report> {
    let gguf = description(name);
    let config = Config::from_gguf(&gguf).unwrap();
    let steps =
        Purpose::Score.steps(&config, options).into_iter().chain(Purpose::Bench.steps(&config, options));
    steps.map(|step| compile::fuse(&gguf, options, &step).unwrap().1).collect()
}

fn report(name: &str, options: &Options) -> Report {
    reports(name, options).swap_remove(0)
}

fn on(target: &str) -> Options {
    Options::new(Target::named(target).unwrap())
}

/// Ways to compile: every target kind, exact or not, without fusions, without each pass, and cut off.
fn ways() -> Vec<(String, Options)> {
    let mut ways = vec![];
    for target in ["cpu", "test-wave32", "gfx900", "sm_90"] {
        let options = on(target);
        let without = |pass: &str| {
            let mut options = options.clone();
            options.pipeline = options.pipeline.select(&[format!("-{pass}")]).unwrap();
            (format!("{target} -{pass}"), options)
        };
        ways.push((format!("{target} --exact"), options.clone().exact()));
        ways.extend(names().into_iter().map(without));
        let mut unfused = options.clone();
        unfused.pipeline = unfused.pipeline.without_fusions();
        ways.push((format!("{target} --no-fuse"), unfused));
        for fuel in [0, 1, 20] {
            let mut cut = options.clone();
            cut.pipeline.fuel = Some(fuel);
            ways.push((format!("{target} --fuel {fuel}"), cut));
        }
        ways.push((target.into(), options));
    }
    ways
}

/// Of every launch in the end, the report says that it is fused, or why it is not.
#[test]
fn nothing_is_left_without_a_reason() {
    let (mut primitives, mut said) = (0, BTreeSet::new());
    for (way, options) in ways() {
        for name in TINY.map(|shape| shape.name) {
            for report in reports(name, &options) {
                let chains = chains(&report);
                for kernel in report.kernels.iter().filter(|k| k.origin != Origin::Fused) {
                    let reasons =
                        chains.get(&kernel.number).into_iter().flatten().filter_map(|d| match &d.outcome {
                            Outcome::Rejected { why } => Some(why.name()),
                            _ => None,
                        });
                    let before = said.len();
                    said.extend(reasons.clone());
                    assert!(
                        reasons.count() > 0 || said.len() > before,
                        "{name} {way} {}: {kernel:?}",
                        report.graph
                    );
                    primitives += 1;
                }
                let listed: u64 = left(&report).0.iter().map(|l| l.times).sum();
                let are = report.kernels.iter().filter(|k| k.origin != Origin::Fused).count();
                assert_eq!(listed, are as u64, "{name} {way}");
            }
        }
    }
    assert!(primitives > 1000 && said.len() > 4, "{primitives} {said:?}");
}

/// Rows hold every launch, and what they saved is what fusing saved.
#[test]
fn rows_add_up() {
    for (way, options) in ways() {
        for report in reports("tiny-qwen3", &options) {
            let rows = rows(&report);
            let sum = |of: &dyn Fn(&sinter::explain::Row) -> f64| rows.iter().map(of).sum::<f64>();
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
            assert_eq!(rows.iter().map(|r| r.launches).sum::<u64>(), report.after.count(), "{way}");
            assert_eq!(rows.iter().map(|r| r.bytes).sum::<u64>(), report.after.bytes, "{way}");
            assert!(close(sum(&|r| r.us), report.after.us), "{way}");
            let saved = report.before.us - report.after.us;
            assert!(close(sum(&|r| r.saved_us), saved), "{way}: {} of {saved}", sum(&|r| r.saved_us));
            // What was put in is what is there more than was lowered.
            let more = report.before.count() - report.lowered.count();
            let said = put_in(&report).map_or(0, |said| said.split(' ').next().unwrap().parse().unwrap());
            assert_eq!(said, more, "{way}");
            assert!(rows.windows(2).all(|pair| pair[0].us >= pair[1].us), "{way}");
        }
    }
}

/// No two decisions of a pass that were made have one name.
#[test]
fn decisions_have_names_of_their_own() {
    for name in ["llama-3.2-1b", "qwen3-0.6b"] {
        for report in reports(name, &on("test-wave32")) {
            let mut names = BTreeSet::new();
            for d in report.decisions.iter().filter(|d| matches!(d.outcome, Outcome::Fired { .. })) {
                // A fused node may grow, and keeps its name.
                assert!(names.insert((&d.pass, &d.at, &d.takes)), "{d}");
                let add = d.at.strip_prefix("add ");
                let named = report
                    .decisions
                    .iter()
                    .filter(|e| e.at == d.at && e.pass == d.pass && e.takes != d.takes);
                let fired = named.filter(|e| matches!(e.outcome, Outcome::Fired { .. })).count();
                assert!(add.is_none() || fired == 0, "two are called {d}");
            }
        }
    }
}

#[test]
fn users_have_their_way() {
    let mut options = on("test-cpu");
    let free = report("tiny-llama", &options);
    let fired = |report: &Report, pass: &str, place: &str| {
        let made = report.decisions.iter().filter(|d| d.pass == pass && d.at.contains(place));
        made.filter(|d| matches!(d.outcome, Outcome::Fired { .. })).count()
    };
    assert!(fired(&free, "merge", "blk.0.") > 0 && fired(&free, "merge", "blk.1.") > 0);
    let denied = |rule: &str| Why::Denied { rule: rule.into() };
    let said = |report: &Report, rule: &str| {
        report.decisions.iter().filter(|d| d.outcome == Outcome::Rejected { why: denied(rule) }).count()
    };
    for (rule, pass) in [("merge@blk.1", "merge"), ("dequant_matmul+dequant_matmul@blk.1", "merge")] {
        options.pipeline.denied = vec![rule.parse::<UserRule>().unwrap()];
        let report = report("tiny-llama", &options);
        assert_eq!((fired(&report, pass, "blk.1."), said(&report, rule) > 0), (0, true), "{rule}");
        assert_eq!(fired(&report, pass, "blk.0."), fired(&free, pass, "blk.0."), "{rule}");
    }
    options.pipeline.denied = vec!["matmul_swiglu".parse().unwrap()];
    let report = report("tiny-llama", &options);
    let kernels = report.fired();
    assert!(
        kernels.keys().all(|k| k.name() != "matmul_swiglu") && kernels.keys().any(|k| k.name() == "swiglu")
    );
    // What is kept apart shows at what is left of it.
    let (_, no_further) = left(&report);
    let reasons = no_further.iter().filter(|l| l.kernel == "swiglu").flat_map(|l| &l.reasons);
    assert!(
        reasons.clone().any(|(_, why)| **why == denied("matmul_swiglu")),
        "{:?}",
        reasons.collect::<Vec<_>>()
    );
}

/// What one rewrite would take in along with the rest, is left out alone, whether the rule names the kernel or an operation of it.
#[test]
fn what_is_kept_apart_leaves_the_rest_fused() {
    let mut options = on("test-cpu");
    let free = report("tiny-llama", &options);
    let count = |report: &Report, kernel: &str| report.kernels.iter().filter(|k| k.kernel == kernel).count();
    for (rule, kernel) in [
        ("attention+quant_act", "attention"),
        ("quant_act+softmax", "attention"),
        ("mul+quant_act", "matmul_swiglu"),
        ("rms_norm+quant_act", "add_rmsnorm"),
        ("quant_act+add_rmsnorm@blk.1", "add_rmsnorm"),
    ] {
        options.pipeline.denied = vec![rule.parse().unwrap()];
        let apart = report("tiny-llama", &options);
        let (forbade, left) = (apart.forbade()[rule], count(&apart, "quant_act") - count(&free, "quant_act"));
        assert!(forbade > 0 && left > 0, "{rule} forbade {forbade}, and leaves {left} quantisations");
        if kernel != "add_rmsnorm" {
            assert_eq!(count(&apart, kernel), count(&free, kernel), "{rule}");
        }
        // A norm by itself is one launch as it is.
        let all = |report: &Report| count(report, kernel) + count(report, "rms_norm");
        assert!(all(&apart) >= all(&free), "{rule}");
    }
    options.pipeline.denied = vec!["merge@blk.77".parse().unwrap()];
    assert_eq!(report("tiny-llama", &options).forbade()["merge@blk.77"], 0);
    let text = stdout(&["explain", "--deny", "merge@blk.77", "--deny", "merge@blk.2", "--step", "decode"]);
    assert!(text.contains("  your rules: merge@blk.77 met nothing; merge@blk.2 forbade "), "{text}");
    let said = said(&run(&["run", "--deny", "merge@blk.77", "-n", "1"])).1;
    assert!(said.contains("the rule merge@blk.77 met nothing"), "{said}");
}

/// Filters narrow the table and the JSON to what they take, and the table's numbers stay.
#[test]
fn filters_narrow_tables_and_json() {
    let explain = ["explain", "--step", "decode"];
    let json = |flags: &[&str]| -> serde_json::Value {
        serde_json::from_str(&stdout(&[&explain[..], flags, &["--json"]].concat())).unwrap()
    };
    let of = |json: &serde_json::Value, key: &str, name: &str| -> Vec<String> {
        let items = json["steps"][0][key].as_array().unwrap().iter();
        items.map(|item| item[name].as_str().unwrap().to_string()).collect()
    };
    let all = json(&[]);
    let merges = json(&["--pass", "merge", "--layer", "blk.2"]);
    assert!(of(&merges, "decisions", "pass").iter().all(|pass| pass == "merge"));
    assert!(of(&merges, "decisions", "at").iter().all(|at| at.contains("blk.2.")));
    let kernels = of(&merges, "kernels", "kernel");
    assert!(
        kernels.contains(&"merge".into()) && kernels.len() < of(&all, "kernels", "kernel").len(),
        "{kernels:?}"
    );
    let third = json(&["--kernel", "3"]);
    assert_eq!(
        of(&third, "kernels", "at"),
        ["matmul token_embd.weight"].map(|at| at.replace("matmul", "dequant_matmul"))
    );
    assert!(of(&third, "decisions", "at").iter().all(|at| at.contains("token_embd.weight")), "{third}");

    let whole = stdout(&explain);
    let text = stdout(&[&explain[..], &["--layer", "blk.2"]].concat());
    let rows: Vec<&str> = text.lines().filter(|line| line.contains(" blk.") && line.contains('%')).collect();
    assert!(rows.len() > 4 && rows.iter().all(|row| whole.contains(row)), "{text}");
    assert!(!text.contains("left unfused") && text.contains("  merge: "), "{text}");
    let none = stdout(&[&explain[..], &["--layer", "blk.2", "--reason", "denied"]].concat());
    assert!(none.contains("t1: no such decision"), "{none}");
    // A weight may be named without its layer.
    let named = stdout(&["explain", "--kernel", "ffn_down"]);
    assert!(
        named.contains("dequant_matmul blk.2.ffn_down.weight") && named.contains("runner-up: unfused, "),
        "{named}"
    );
    // What fuses the tail saves little, and says how little.
    assert!(!named.contains("1.23 ms -> 1.23 ms") && named.contains(" µs less\n"), "{named}");
}

#[test]
fn rules_come_from_flags_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules");
    let path = file.to_str().unwrap();
    let explain = ["explain", "--target", "test-cpu", "--step", "decode"];
    std::fs::write(&file, "# mine\ndeny merge@blk.*.attn_q  # not these\n\ndeny silu+matmul\n").unwrap();
    let text = stdout(&[&explain[..], &["--rules", path, "--deny", "rope_kv@blk.2"]].concat());
    for line in [
        "merge: you said so: merge@blk.*.attn_q",
        "swiglu: you said so: silu+matmul",
        "rope_kv: you said so: rope_kv@blk.2",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    for (text, says) in [
        ("deny\n", "rules:1: a rule is: deny RULE[@NODE], not \"deny\""),
        ("deny merge\nallow merge\n", "rules:2: a rule is"),
        ("\n\ndeny fusion", "rules:3: there is no rule \"fusion\""),
        ("deny merge@", "rules:1: \"\" is no name of a weight"),
    ] {
        std::fs::write(&file, text).unwrap();
        fails(&[&explain[..], &["--rules", path]].concat(), says);
    }
    fails(&[&explain[..], &["--deny", "fusion"]].concat(), "there is no rule \"fusion\"");
    fails(&[&explain[..], &["--rules", "missing"]].concat(), "cannot read missing");
    // What is denied is compiled so.
    let plan = dir.path().join("plan");
    let plan = plan.to_str().unwrap();
    stdout(&["compile", "-c", "64", "--deny", "attention", "-o", plan]);
    assert!(stdout(&["explain", plan]).contains("attention: you said so: attention"));
    fails(&["run", plan, "--deny", "merge"], "--deny does not apply");
}

#[test]
fn expectations_fail_with_reasons() {
    let expect = |rule: &str| run(&["explain", "--target", "test-cpu", "--expect", rule]);
    for met in
        ["merge", "merge@blk.0.attn_q", "attention@blk.*", "matmul_swiglu@blk.3", "dequant_matmul@token_embd"]
    {
        said(&expect(met));
    }
    for (unmet, why) in [
        (
            "sample_head",
            "t1: sample_head did not happen\n  sample_head: dequant_matmul token_embd.weight not fused: the logits",
        ),
        ("rope_attention", "attention blk.0.k not fused: the target lacks a kernel for it, as GPUs have"),
        ("merge@blk.9", "merge@blk.9 did not happen: no rule was tried there"),
        ("gated_scan@blk.0", "gated_scan@blk.0 did not happen"),
    ] {
        let output = expect(unmet);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && text.contains(why), "{unmet}: {text}");
    }
    assert_eq!(expect("nothing").status.code(), Some(2), "no such rule");
    let all = "merge".parse::<Expectation>().unwrap();
    let mut options = on("test-cpu");
    options.pipeline = Pipeline::standard(false).select(&["-merge"]).unwrap();
    assert!(all.check(&report("tiny-llama", &options)).is_err());
}

#[test]
fn differences_read_both_ways() {
    let [cpu, gpu] = ["test-cpu", "test-wave32"].map(|target| vec![report("tiny-llama", &on(target))]);
    assert!(
        difference(&cpu, &cpu).steps.iter().all(|step| step.kernels.is_empty() && step.decisions.is_empty())
    );
    // A fusion that is named by another weight is the same, by the operations it took.
    let mut renamed = cpu.clone();
    renamed.iter_mut().flat_map(|report| &mut report.decisions).for_each(|d| d.at += "_of_another_name");
    let (same, back) = (difference(&cpu, &renamed), difference(&renamed, &cpu));
    assert!(same.steps.iter().chain(&back.steps).all(|step| step.decisions.is_empty()), "{same:?}");
    let (there, back) = (difference(&cpu, &gpu), difference(&gpu, &cpu));
    for (a, b) in there.steps.iter().zip(&back.steps) {
        assert_eq!((a.launches[0], a.us[0]), (b.launches[1], b.us[1]));
        assert_eq!((a.kernels.len(), a.decisions.len()), (b.kernels.len(), b.decisions.len()));
    }
    assert!(there.steps.iter().any(|step| !step.decisions.is_empty()));

    let dir = tempfile::tempdir().unwrap();
    let (plan, json) = (dir.path().join("a.plan"), dir.path().join("b.json"));
    let [plan, json] = [&plan, &json].map(|path| path.to_str().unwrap());
    stdout(&["compile", "--target", "test-cpu", "-o", plan]);
    std::fs::write(json, stdout(&["explain", "--target", "test-cpu", "--json"])).unwrap();
    let same = stdout(&["explain", "--diff", plan, json]);
    assert_eq!(same.matches("  the same\n").count(), 2, "{same}");
    let other = stdout(&["explain", "--diff", json, "gfx1100"]);
    assert!(other.contains("only B has rope_attention of blk.0-3."), "{other}");
    let other = stdout(&["explain", "--diff", "gfx1100", plan]);
    assert!(other.contains("only A has rope_attention of blk.0-3."), "{other}");
    // A kernel that one of them lacks is missed by name, whatever else its pass made there; and the other says why.
    let denied = ["explain", "--target", "test-cpu", "--deny", "matmul_swiglu@blk.2", "--json"];
    std::fs::write(json, stdout(&denied)).unwrap();
    let other = stdout(&["explain", "--diff", plan, json]);
    let line =
        "only A has matmul_swiglu of blk.2.ffn_gate.weight; the other: you said so: matmul_swiglu@blk.2";
    assert!(other.contains(line), "{other}");
    // A fusion is the same whatever weight names its site, and a kernel whatever the layers are that it is folded with.
    std::fs::write(json, stdout(&["explain", "--target", "test-cpu", "--deny", "merge", "--json"])).unwrap();
    let other = stdout(&["explain", "--diff", plan, json]);
    let only: BTreeSet<&str> = other.lines().filter(|line| line.starts_with("  only")).collect();
    let denied =
        |of: &str| format!("  only A has merge of blk.0-3.{of}.weight; the other: you said so: merge");
    assert!(only.iter().copied().eq([&denied("attn_q"), &denied("ffn_gate")]), "{other}");
    let merges: Vec<&str> = other.lines().filter(|line| line.contains("  merge  ")).collect();
    assert!(!merges.is_empty() && merges.iter().all(|line| line.contains(" blk.0-3.attn_q.")), "{other}");
    // Options for compiling are for what is compiled, and steps are those of what was saved, too.
    let diff = ["explain", "--diff", plan, json];
    fails(&[&diff[..], &["--deny", "merge"]].concat(), "are compiled already: --deny does not apply");
    let steps = |more: &[&str]| stdout(&[&diff[..], more].concat()).matches(" launches in A").count();
    assert_eq!((steps(&[]), steps(&["--step", "decode"]), steps(&["--step", "prefill"])), (2, 1, 1));
    fails(&[&diff[..], &["--step", "score"]].concat(), "b.json has no score step: it has t512, t1");
    let model = dir.path().join("model");
    std::fs::write(&model, b"GGUF\xff\xfe").unwrap();
    fails(&["explain", "--diff", model.to_str().unwrap(), "cpu"], "is a model: --diff takes targets, plans");
    std::fs::write(json, "{}").unwrap();
    fails(&["explain", "--diff", json, "gfx1100"], "is no plan, no target, and nothing that explain --json");
    fails(&["explain", "--diff", "gfx1", "gfx1100"], "there is no target \"gfx1\"");
}

#[test]
fn a_plan_is_explained_as_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let plan = dir.path().join("a.plan");
    let plan = plan.to_str().unwrap();
    stdout(&["compile", "--target", "sm_90", "--source-only", "-o", plan]);
    for more in [&[][..], &["--all"], &["--json"], &["--kernel", "blk.2.ffn_down"]] {
        let of_model = stdout(&[&["explain", "--target", "sm_90"], more].concat());
        assert_eq!(stdout(&[&["explain", plan], more].concat()), of_model, "{more:?}");
    }
}

#[test]
fn a_kernel_tells_its_story() {
    let text = stdout(&["explain", "--target", "test-cpu", "--kernel", "blk.2.ffn_gate"]);
    for part in [
        "matmul_swiglu blk.0-3.ffn_gate.weight, ffn_up.weight",
        "= dequant %x1 : f32[1280,512]",
        "after: matmul_swiglu(q8_act[T,512], q4_k[1280,512], q4_k[1280,512])",
        "decisions of matmul_swiglu blk.2.ffn_gate.weight",
        "quantise_acts: matmul blk.2.ffn_gate.weight: matmul became quant_act, dequant, matmul",
        "merge: dequant_matmul blk.2.ffn_gate.weight -> merge replaces dequant_matmul, dequant_matmul",
        "runner-up: unfused",
        "would turn over with: --deny merge; ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let named = stdout(&["explain", "--target", "test-cpu", "--kernel", "merge"]);
    assert_eq!(named.matches("\nt1 #").count(), named.matches(": merge blk.").count(), "{named}");
    assert!(named.contains(": merge blk."), "{named}");
    let one = stdout(&["explain", "--target", "test-cpu", "--kernel", "1"]);
    assert!(one.contains("\nt1 #1: "), "{one}");
    for wrong in ["0", "999", "blk.77"] {
        fails(&["explain", "--kernel", wrong], &format!("t1 has no kernel {wrong}: there are 1 to "));
        fails(&["explain", "--kernel", wrong], "those of a name (add_rmsnorm, attention, ");
    }
    fails(&["explain", "--kernel", "a..b"], "\"a..b\" is no name of a weight or state");
    fails(&["explain", "--layer", ""], "\"\" is no name of a weight or state");
}

/// What is said to turn a decision over does.
#[test]
fn a_launch_of_another_cost_turns_decisions_over() {
    let made = |launch_us: f64| {
        let mut options = on("test-wave32");
        options.target.launch_us = launch_us;
        let report = report("tiny-llama", &options);
        let d = report.decisions.into_iter().find(|d| d.pass == "merge").unwrap();
        (matches!(d.outcome, Outcome::Fired { .. }), flip(&d, &options.target), d)
    };
    let launch_us = on("test-wave32").target.launch_us;
    let (fires, _, d) = made(launch_us);
    assert!(fires, "{d}");
    // As if the fused kernel's work took longer than that of its parts: it then pays by its launches alone.
    let Outcome::Fired { kernel, replaced, gain } = d.outcome.clone() else { panic!("{d}") };
    let saved = gain.launches_saved as f64;
    let fused_us = gain.unfused_us - saved * (launch_us - 0.5);
    let outcome = Outcome::Fired { kernel, replaced, gain: Gain { fused_us, ..gain } };
    let by_launches = flip(&Decision { outcome, ..d }, &on("test-wave32").target);
    let says = format!("--deny merge; a launch that takes less than 0.5 µs, not {}", Micros(launch_us));
    assert_eq!(by_launches, says);
    let free = made(0.0);
    assert_eq!(
        (free.0, free.1.as_str()),
        (true, "--deny merge; no cost of a launch, as it saves time without")
    );
}

/// Rows are told apart by what differs in the step alone, and each says of which layers it is.
#[test]
fn equal_kernels_are_one_row() {
    let text = stdout(&["explain", "--step", "decode"]);
    // Of one token the logits are wanted: what reads them does not differ from the other layers.
    assert!(text.contains("matmul_swiglu    blk.0-3.ffn_gate.weight"), "{text}");
    assert!(text.contains("blk.2-3.ffn_down.weight") && !text.contains(" blk.3.ffn_down.weight"), "{text}");
    // Of many tokens few have their logits wanted, and the row says that it is of those.
    let prefill = stdout(&["explain", "--step", "prefill"]);
    let (_, last) = prefill.split_once(" blk.3.ffn_gate.weight, ffn_up.weight\n").unwrap();
    assert!(last.lines().next().unwrap().ends_with("; R tokens"), "{prefill}");
    // A norm has no add here, though its kernel is called so.
    assert!(
        text.contains("replaces rms_norm, quant_act") && text.contains("add_rmsnorm is the kernel of norms")
    );
    // Frequencies that all layers share do not tell of which layer a rotation is.
    let mut options = on("test-cpu");
    options.pipeline = options.pipeline.without_fusions();
    let report = report("llama-3.2-1b", &options);
    let ropes = ["q", "k"].map(|of| format!("rope_freqs.weight, after blk.0-15.attn_{of}.weight"));
    assert_eq!(rows_of(&report, "rope"), ropes);
    // Nor does a merged matmul, of which each result is of its own weight.
    let mut options = on("test-cpu");
    options.pipeline.denied = vec!["rope_kv".parse().unwrap()];
    assert_eq!(rows_of(&self::report("llama-3.2-1b", &options), "rope"), ropes);
}

fn rows_of(report: &Report, kernel: &str) -> Vec<String> {
    rows(report).into_iter().filter(|row| row.kernel() == kernel).map(|row| row.of).collect()
}

#[test]
fn decisions_are_filtered() {
    let all = |more: &[&str]| {
        let text =
            stdout(&[&["explain", "--target", "test-wave32", "--step", "decode", "--all"], more].concat());
        let (_, decisions) = text.rsplit_once("\n\n").unwrap();
        decisions.lines().map(str::to_string).collect::<Vec<_>>()
    };
    let everything = all(&[]);
    for (flags, holds) in [
        (&["--pass", "merge"][..], "merge: "),
        (&["--layer", "blk.2"], " blk.2."),
        (&["--reason", "cost_loses"], " longer than unfused"),
        (&["--pass", "merge", "--layer", "blk.*.attn_q"], "merge: dequant_matmul blk."),
    ] {
        let some = all(flags);
        assert!(!some.is_empty() && some.len() < everything.len(), "{flags:?}");
        assert!(
            some.iter().all(|line| line.contains(holds) && everything.contains(line)),
            "{flags:?} {some:?}"
        );
    }
    fails(&["explain", "--all", "--pass", "fuse"], "there is no pass \"fuse\"");
    fails(&["explain", "--all", "--reason", "fuse"], "there is no reason \"fuse\"");
    fails(
        &["explain", "--layer", "blk.9"],
        "there is no weight or state whose name begins with blk.9; one is",
    );
}

/// Remarks have the keys that LLVM's have, one document each.
#[test]
fn remarks_are_those_of_llvm() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("remarks.yaml");
    let flags = ["explain", "--target", "test-cpu", "--json", "--remarks", file.to_str().unwrap()];
    let json: serde_json::Value = serde_json::from_str(&stdout(&flags)).unwrap();
    let yaml = std::fs::read_to_string(&file).unwrap();
    let alone = ["explain", "--target", "test-cpu", "--remarks", "-"];
    assert_eq!(stdout(&alone), yaml);
    fails(&[&alone[..], &["--json"]].concat(), "--remarks - and --json go to stdout, and only one can");
    let count = |of: &str| {
        let steps = json["steps"].as_array().unwrap().iter();
        let decisions = steps.flat_map(|step| step["decisions"].as_array().unwrap());
        decisions.filter(|d| !d["outcome"][of].is_null()).count()
    };
    assert_eq!(yaml.matches("--- !Passed\n").count(), count("fired") + count("rewritten"));
    assert_eq!(yaml.matches("--- !Missed\n").count(), count("rejected"));
    assert!(yaml.contains("--- !Analysis\nPass:            'cost'\n"));
    for document in yaml.split("...\n").filter(|document| !document.is_empty()) {
        let lines: Vec<&str> = document.lines().collect();
        let place = "DebugLoc:        { File: 't";
        let keys =
            ["--- !", "Pass:            '", "Name:            '", place, "Function:        '", "Args:"];
        assert!(lines.iter().zip(keys).all(|(line, key)| line.starts_with(key)), "{document}");
        assert!(lines[6..].iter().all(|line| line.starts_with("  - ") && line.ends_with('\'')), "{document}");
    }
}

/// Of a prompt alone, by default alone, and what would have to be otherwise.
#[test]
fn matmuls_that_may_round_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f16.gguf");
    let model = Model::new(&shape("tiny-llama"), uniform(DType::F16));
    std::fs::write(&path, model.bytes()).unwrap();
    let of = |more: &[&str]| {
        let text = stdout(&[&["explain", path.to_str().unwrap(), "--target", "sm_90"], more].concat());
        text.matches("; may round activations to f16\n").count()
    };
    assert!(of(&["--step", "prefill"]) > 3);
    assert_eq!([of(&["--step", "decode"]), of(&["--step", "prefill", "--exact"])], [0; 2]);
    // What is quantised may be too, but where the target has it otherwise.
    let target = folder.path().join("target.json");
    let in_bytes = Target { prompt_activations: DType::Q8Act, ..Target::gpu("sm_90").unwrap() };
    std::fs::write(&target, serde_json::to_string(&in_bytes).unwrap()).unwrap();
    for (target, rounds) in [("sm_90", true), (target.to_str().unwrap(), false)] {
        let text = stdout(&["explain", "--step", "prefill", "--target", target]);
        assert_eq!(text.contains("; of q4_k; may round activations to f16\n"), rounds, "{text}");
    }
    // And those in 16 bits of the first layers, of a few tokens.
    let text = stdout(&["explain", "--step", "decode", "--target", "sm_90"]);
    let is_fine = |at: &str| {
        let mut lines = text.lines().skip_while(|line| !line.contains(at));
        lines.nth(1).unwrap_or_else(|| panic!("{at}:\n{text}")).contains("; activations in q16_act")
    };
    assert!(is_fine("blk.0-1.ffn_gate.weight") && !is_fine("blk.2-3.ffn_gate.weight"), "{text}");
    let config = Config::from_gguf(&model.description()).unwrap();
    let options = on("sm_90");
    let step = Purpose::Generate.steps(&config, &options).into_iter().max_by_key(|step| step.tokens).unwrap();
    let (_, report) = compile::fuse(&model.description(), &options, &step).unwrap();
    let rounds = report.decisions.iter().find(|d| d.pass == "quantise_acts").unwrap();
    let in_bytes = Target { prompt_activations: DType::Q8Act, ..options.target.clone() };
    let lacks = "--exact, or a target whose matrix units do not take 16 bits";
    assert_eq!(flip(rounds, &in_bytes), lacks);
    let quantised = format!("{lacks}, or, of quantised weights, whose prompt_activations are Q8Act");
    assert_eq!(flip(rounds, &options.target), quantised);
    assert!(put_in(&report).is_none(), "another matmul is no launch more");
}
