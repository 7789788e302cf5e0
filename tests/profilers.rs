//! Profilers of GPUs' makers: how a profile is run under them, and what they recorded read back.

#[path = "support/command.rs"]
#[allow(dead_code)]
mod command;

use serde_json::Value;
use sinter::bench::recorded::{Recorded, Tool, match_steps};
use sinter::bench::{Test, Work};
use sinter::codegen::spec::Code;
use sinter::compile::{Options, Purpose};
use sinter::ir::Syms;
use sinter::model;
use sinter::plan::{Output, Plan};
use sinter::target::Target;
use std::path::{Path, PathBuf};

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/profilers").join(name)
}

fn read(name: &str) -> Recorded {
    Recorded::from_csv(&std::fs::read_to_string(sample(name)).unwrap()).unwrap()
}

/// In the order in which they began, in nanoseconds, by the names of their functions.
#[test]
fn each_profiler_is_read_as_it_writes() {
    let step = ["dequant_rmsnorm", "merge", "rope_attention", "rope_attention_2", "dequant_matmul"];
    let times = |third| [4120, 6040, third, 2000, 8250];
    let cleared = "__amd_rocclr_fillBufferAligned";
    for (name, tool, before, third) in [
        ("rocprofv3_kernel_trace.csv", Tool::Rocprofv3, Some(cleared), 6500),
        ("rocprof.csv", Tool::Rocprof, Some(cleared), 6500),
        ("ncu_raw.csv", Tool::Ncu, None, 1_006_500),
    ] {
        let recorded = read(name);
        assert_eq!(recorded.tool, tool);
        let names: Vec<&str> = recorded.launches.iter().map(|launch| launch.kernel.as_str()).collect();
        assert_eq!(names, before.into_iter().chain(step).collect::<Vec<_>>(), "{name}");
        let ns: Vec<u64> = recorded.launches.iter().map(|launch| launch.ns).collect();
        assert_eq!(ns[ns.len() - 5..], times(third), "{name}");
        let starts: Vec<Option<u64>> = recorded.launches.iter().map(|launch| launch.start_ns).collect();
        assert!(
            starts.iter().all(|start| start.is_some() == (tool != Tool::Ncu)) && starts.is_sorted(),
            "{name}"
        );
    }
}

/// Units and digits as ncu may be told to write them.
#[test]
fn units_and_digits_are_understood() {
    let ns = |unit: &str, number: &str| {
        let text = format!("\"ID\",\"Kernel Name\",\"gpu__time_duration.sum\"\n,,{unit}\n0,k,\"{number}\"\n");
        Recorded::from_csv(&text).map(|recorded| recorded.launches[0].ns).map_err(|e| e.to_string())
    };
    for (unit, number, want) in [
        ("ns", "4,120", 4120),
        ("nsecond", "4120.00", 4120),
        ("usecond", "4.12", 4120),
        ("us", "1,234.5", 1_234_500),
        ("us", "1.234,50", 1_234_500),
        ("us", "4,12", 4120),
        ("ms", "0.5", 500_000),
        ("msecond", "1,000", 1_000_000_000),
        ("s", "2", 2_000_000_000),
        ("second", "2", 2_000_000_000),
    ] {
        assert_eq!(ns(unit, number), Ok(want), "{number} {unit}");
    }
    assert_eq!(ns("cycle", "4"), Err("line 2: \"cycle\" is no unit of time".into()));
    for number in ["", "x", "-1", "nan", "1e999"] {
        assert_eq!(ns("us", number), Err(format!("line 3: {number:?} is no time")));
    }
}

/// One clear error, with the line.
#[test]
fn what_is_malformed_is_told_by_its_line() {
    let said = |text: &str| Recorded::from_csv(text).unwrap_err().to_string();
    for foreign in ["", "a,b\n1,2\n", "\"Kernel Name\",\"gpu__time_duration.sum\"\n", "\u{0}\"", "\"ID"] {
        assert!(said(foreign).starts_with("no line has the columns of rocprofv3"), "{foreign:?}");
    }
    let v3 = "Kernel_Name,Start_Timestamp,End_Timestamp\n";
    assert_eq!(said(v3), "rocprofv3 recorded no kernel");
    assert_eq!(said(&format!("{v3}k,1,2\nk,1\n")), "line 3: there are 2 cells, and 3 columns");
    assert_eq!(said(&format!("{v3}k,9,2\n")), "line 2: it ends at 2, before it begins at 9");
    assert_eq!(said(&format!("{v3}k,x,2\n")), "line 2: \"x\" is no time");
    assert_eq!(said(&format!("{v3}k,-1,2\n")), "line 2: \"-1\" is no time");
    assert_eq!(
        said(&format!("{v3}k,1,99999999999999999999\n")),
        "line 2: \"99999999999999999999\" is no time"
    );
    assert_eq!(said(&format!("said\n\n{v3}\"k,1,2\n")), "line 4: there are 1 cells, and 3 columns");
    assert_eq!(said("Kernel_Name,Start_Timestamp\n"), "line 1: there is no column End_Timestamp");
    let v1 = "line 1: there is no column DurationNs: give rocprof --timestamp on";
    assert_eq!(said("Index,KernelName,gpu-id\n0,k,0\n"), v1);
    let ncu = "line 1: there is no column gpu__time_duration.sum: give ncu --page raw --metrics gpu__time_duration.sum";
    assert_eq!(said("\"ID\",\"Kernel Name\",\"Metric Name\"\n"), ncu);
}

/// The functions that a step of a program launches, in order.
fn functions(plan: &Plan, program: usize, at: Syms) -> Vec<(usize, String)> {
    let calls = plan.programs[program].calls.iter().enumerate();
    calls
        .flat_map(|(i, call)| {
            let launches = plan.kernels[call.kernel as usize].launches.iter();
            let made = launches.filter(move |launch| launch.grid.iter().all(|extent| extent.eval(&at) > 0));
            made.map(move |launch| match &launch.code {
                Code::Hip(code) => (i, code.entry.clone()),
                Code::Cpu(_) => panic!("a kernel of the CPU"),
            })
        })
        .collect()
}

fn plan(arch: &str, sequences: u64) -> Plan {
    plan_for(Target::gpu(arch).unwrap(), sequences)
}

fn plan_for(target: Target, sequences: u64) -> Plan {
    let file = model::embedded().unwrap();
    let options = Options { context: Some(512), sequences, ..Options::new(target) };
    model::plan(&file, None, &options, Purpose::Bench).unwrap()
}

/// Steps as rocprofv3 records them, launch `i` of each taking so many nanoseconds; between them and within, what is of no step.
fn trace(steps: &[&[(usize, String)]], ns: impl Fn(usize) -> u64) -> String {
    let mut text = String::from("\"Kind\",\"Kernel_Name\",\"Start_Timestamp\",\"End_Timestamp\"\n");
    let mut clock = 1_000_000_000_000_000u64;
    let mut launch = |name: &str, ns: u64| {
        text += &format!("\"KERNEL_DISPATCH\",\"{name}\",{clock},{}\n", clock + ns);
        clock += ns + 500;
    };
    for step in steps {
        launch("__amd_rocclr_copyBuffer", 7);
        for (i, (_, name)) in step.iter().enumerate() {
            launch(name, ns(i));
            if i == 3 {
                launch("__amd_rocclr_copyBuffer", 7);
            }
        }
    }
    text
}

#[test]
fn steps_are_found_among_whatever_was_recorded() {
    let plan = plan("gfx1100", 1);
    let [prompt, token] = [Work::Prompt(512), Work::Generate { tokens: 1, logits: true }].map(|work| Test {
        work,
        depth: 0,
        sequences: 1,
    });
    let program = |t| plan.program_for(t, 1, Output::Logits).unwrap();
    let of = |t| functions(&plan, program(t), Syms { t, r: 1 });
    let (read, generated) = (of(512), of(1));
    // Two that are whole, one that breaks off before the next, one of the prompt.
    let text = trace(&[&generated, &generated[..10], &generated, &read], |i| 1000 + i as u64);
    let recorded = Recorded::from_csv(&text).unwrap();
    let matched = match_steps(&plan, &[prompt, token], &recorded).unwrap();
    assert_eq!((matched.others, &matched.missing[..]), (10, &[][..]));
    assert_eq!(matched.foreign.into_iter().collect::<Vec<_>>(), [("__amd_rocclr_copyBuffer".to_string(), 8)]);
    let [(_, of_prompt), (_, of_token)] = &matched.profiles[..] else { panic!("both") };
    assert_eq!((of_prompt.steps, of_token.steps), (1, 2));
    for (profile, launches) in [(of_prompt, &read), (of_token, &generated)] {
        let all = launches.len() as u64;
        assert_eq!(profile.kernels_ns(), (0..all).map(|i| 1000 + i).sum::<u64>());
        for (i, (launch, (call, _))) in profile.launches.iter().zip(launches).enumerate() {
            assert_eq!((launch.call, launch.ns), (*call, 1000 + i as u64));
        }
        for node in &profile.nodes {
            let own = launches.iter().enumerate().filter(|(_, (call, _))| *call == node.call);
            assert_eq!(node.ns, own.map(|(i, _)| 1000 + i as u64).sum::<u64>(), "{}", node.node);
        }
        // One after the other, as they were.
        let starts: Vec<u64> = profile.launches.iter().map(|launch| launch.start_ns).collect();
        assert!(starts[0] == 0 && starts.is_sorted() && starts[1] == 1000 + 500, "{starts:?}");
    }
    // Of a recording without the prompt, that is said.
    let recorded = Recorded::from_csv(&trace(&[&generated], |_| 5)).unwrap();
    let matched = match_steps(&plan, &[prompt, token], &recorded).unwrap();
    assert_eq!((matched.missing, matched.profiles.len()), (vec![prompt], 1));
    let recorded = Recorded::from_csv(&trace(&[&generated[1..]], |_| 5)).unwrap();
    let said = match_steps(&plan, &[token], &recorded).unwrap_err().to_string();
    let (all, known) = (generated.len() + 1, generated.len() - 1);
    assert!(
        said.starts_with(&format!("of {all} launches {known} are of kernels that the plan has, and nowhere")),
        "{said}"
    );
    let eight = Test { work: Work::Prompt(8), ..token };
    let seven = Test { work: Work::Prompt(7), ..token };
    let said = match_steps(&plan, &[eight, seven], &recorded).unwrap_err().to_string();
    assert_eq!(
        said,
        "pp8 and pp7 launch the same kernels in the same order, and cannot be told apart; leave one out (-p 0)"
    );
}

#[test]
fn a_profile_of_what_was_recorded_is_like_one_of_what_was_timed() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("trace.csv");
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let plan = plan("gfx1100", 1);
    let launches = functions(&plan, plan.program_for(1, 1, Output::Logits).unwrap(), Syms { t: 1, r: 1 });
    std::fs::write(&csv, trace(&[&launches, &launches], |_| 4000)).unwrap();
    let csv = csv.to_str().unwrap();
    let args = ["profile", "-p", "0", "-c", "512", "--target", "gfx1100", "--import", csv];
    let output = command::run(
        &[&args[..], &["--json", "--trace", &at("t.json"), "--roofline", &at("r.svg")]].concat(),
    );
    let (out, err) = command::said(&output);
    assert_eq!(err, format!("{csv}: no such step launches __amd_rocclr_copyBuffer, of which there are 4\n"));
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["recorded_by"], &json["target"]), (&"rocprofv3".into(), &"gfx1100".into()));
    assert!(json["load"].is_null() && json["first_token"].is_null() && json["memory"]["peak"].is_null());
    let step = &json["steps"][0];
    assert_eq!((&step["test"], &step["steps"], &step["step_us"]), (&"tg1".into(), &2.into(), &Value::Null));
    let sum = |of: &str, key: &str| {
        step[of].as_array().unwrap().iter().map(|row| row[key].as_f64().unwrap()).sum::<f64>()
    };
    for of in ["kernels", "nodes"] {
        assert_eq!(sum(of, "launches"), launches.len() as f64);
        assert!((sum(of, "us") - 4.0 * launches.len() as f64).abs() < 1e-6);
    }
    assert!(
        std::fs::read_to_string(at("r.svg")).unwrap().contains("GB/s, of a card of its generation</text>")
    );
    assert!(std::fs::read_to_string(at("t.json")).unwrap().contains("\"tg1 (program t1)\""));
    let table = command::stdout(&args);
    assert!(
        table.contains("times recorded by rocprofv3\n") && table.contains("fewer launches gain most"),
        "{table}"
    );

    // What is recorded of something else, or is nothing.
    let with = |file: &str| -> Vec<String> {
        args[..args.len() - 1].iter().chain([&file]).map(|arg| arg.to_string()).collect()
    };
    let other = sample("rocprofv3_kernel_trace.csv");
    command::fails(&with(other.to_str().unwrap()), "nowhere are all those of a step of tg1 in order");
    command::fails(&with("Cargo.toml"), "Cargo.toml: no line has the columns");
    command::fails(&with("no-such.csv"), "cannot read no-such.csv");
    command::fails(
        &["profile", "--import", csv],
        "the target is cpu, and rocprofv3, rocprof and ncu see kernels of GPUs",
    );
    // A plan of several targets: the GPU's, or the one that is named.
    let plan = at("both.plan");
    command::stdout(&["compile", "-o", &plan, "--target", "cpu,gfx1100,sm_90", "--source-only", "-c", "512"]);
    let json = command::stdout(&["profile", &plan, "-p", "0", "--import", csv, "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["steps"][0]["kernels_us"], step["kernels_us"]);
    command::fails(
        &["profile", &plan, "--target", "gfx942", "--import", csv],
        "the plan is for cpu, gfx1100, sm_90",
    );
    command::fails(
        &["profile", &plan, "--exact", "--import", csv],
        "is compiled already: --exact does not apply",
    );
}

#[test]
fn command_lines_are_ready_to_run() {
    let said = |args: &[&str]| command::stdout(&[&["profile"], args, &["--commands"]].concat());
    let amd = said(&["-p", "0", "--target", "gfx1100"]);
    assert!(amd.contains("\nrocprofv3 --kernel-trace --output-format csv -d . -o sinter -- "), "{amd}");
    assert!(amd.contains(" profile -p 0 --device hip --no-graph\n"), "{amd}");
    assert!(amd.contains(" profile -p 0 --target gfx1100 --import sinter_kernel_trace.csv\n"), "{amd}");
    let nvidia = said(&["-p", "0", "--target", "sm_90"]);
    assert!(nvidia.starts_with("ncu --csv --page raw --metrics gpu__time_duration.sum"), "{nvidia}");
    command::fails(
        &["profile", "--commands"],
        "the target is cpu, and rocprofv3, rocprof and ncu see kernels of GPUs",
    );

    // Of a plan for several, for each GPU, or for the one that is named.
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("p.plan");
    let plan = plan.to_str().unwrap();
    command::stdout(&["compile", "-o", plan, "--target", "cpu,gfx1100,sm_90", "--source-only"]);
    let (both, one) = (said(&[plan]), said(&[plan, "--target", "sm_90"]));
    assert!(both.starts_with("# for gfx1100\n# ROCm") && both.contains("\n\n# for sm_90\nncu "), "{both}");
    assert!(
        both.contains(" --target gfx1100 --import") && both.contains(" --target sm_90 --import"),
        "{both}"
    );
    assert!(one.starts_with("# for sm_90\nncu ") && !one.contains("rocprof"), "{one}");
    // Of those, a recording of ncu is for the one that it can be of.
    let sample = sample("ncu_h200.csv");
    let args = ["profile", plan, "-p", "0", "--import", sample.to_str().unwrap(), "--json"];
    let (json, err) = command::said(&command::run(&args));
    assert!(err.contains("taken for the one for sm_90") && json.contains("\"target\": \"sm_90\""), "{err}");
}

/// What Nsight Compute wrote of the embedded model on an H200, as the command reads it.
#[test]
fn a_recording_of_a_gpu_is_found_to_be_its_steps() {
    let recorded = read("ncu_h200.csv");
    let names: Vec<&str> = recorded.launches.iter().map(|launch| launch.kernel.as_str()).collect();
    let plan = plan_for(Target::gpu("sm_90").unwrap(), 1);
    let of = |t| functions(&plan, plan.program_for(t, 1, Output::Logits).unwrap(), Syms { t, r: 1 });
    let (prompt, token) = (of(512), of(1));
    let wanted: Vec<&str> =
        [&prompt, &token, &token].into_iter().flatten().map(|(_, name)| name.as_str()).collect();
    assert_eq!(
        names, wanted,
        "the embedded model launches other kernels than it did: record ncu_h200.csv anew, as tests/data/profilers/README.md says"
    );
    let path = sample("ncu_h200.csv");
    let args = ["profile", "--target", "sm_90", "--import", path.to_str().unwrap(), "--json"];
    let (out, err) = command::said(&command::run(&args));
    assert_eq!(err, "");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["recorded_by"], "ncu");
    let steps = json["steps"].as_array().unwrap().iter();
    let steps: Vec<_> =
        steps.map(|step| (&step["test"], &step["steps"], step["kernels_us"].as_f64().unwrap())).collect();
    // One took 487.040 µs; the other two 128.928 and 128.416, and each launch its median.
    let [pp, tg] = &steps[..] else { panic!("{steps:?}") };
    assert_eq!((pp.0, pp.1, tg.0, tg.1), (&"pp512".into(), &1.into(), &"tg1".into(), &2.into()));
    assert!((pp.2 - 487.04).abs() < 1e-6 && (tg.2 - 128.672).abs() < 1e-6, "{steps:?}");
}

/// More than the model was trained for is refused before anything is made for it, unless it was asked for.
#[test]
fn a_prompt_and_a_depth_must_fit() {
    let said = |needs: u64| format!("this needs a context of {needs}, and the model was trained for 512;");
    command::fails(&["profile", "-p", "99999"], &said(99_999));
    command::fails(&["profile", "-d", "600"], &said(601));
    command::fails(&["profile", "-p", "512", "-d", "1", "--target", "sm_90", "--commands"], &said(513));
    command::fails(&["profile", "-p", "600", "-c", "512"], "pp600 needs a context of 600, not 512");
    command::stdout(&["profile", "-p", "600", "-c", "600", "--target", "sm_90", "--commands"]);
}
