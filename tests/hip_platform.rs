//! The platform of AMD's GPUs on a machine that has none: the real command with stubs of ROCm's libraries (`tests/host`), whose memory
//! is the host's and whose kernels are compiled for the CPU. What it computes; that each failure of each call is one clear error, and
//! nothing is left behind; that steps are captured once and replay as they ran. Needs clang-19.

#[path = "support/command.rs"]
#[allow(dead_code)]
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

use command::{report, said, text};
use sinter::check::{Caches, check_step_on};
use sinter::codegen::spec::{Code, HipCode};
use sinter::codegen::{Layouts, generate};
use sinter::compile::{Options, Purpose, compile};
use sinter::gguf::{Array, GgmlType, GgufFile, GgufWriter, Value};
use sinter::ir::{DType, Graph, KvTypes, StateRole, Syms, verify};
use sinter::lower::Config;
use sinter::plan::{BufRef, LoadedPlan, Parts, Plan};
use sinter::runtime::device::{Device, Submission, Ticket, open};
use sinter::runtime::{DeviceError, DeviceOptions, Executor, Progress, Stage, StepRows};
use sinter::target::Target;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use stubs::*;
use synthetic::{Model, Shape, q4_k_m, shape};

/// The kernels that `check` makes for some tokens.
fn codes_of_check(file: &Arc<GgufFile>, options: &Options, tokens: u64) -> Vec<HipCode> {
    let options = Options { context: Some(tokens), chunk: tokens, ..options.clone() };
    let steps = Purpose::Score.steps(&Config::from_gguf(file.gguf()).unwrap(), &options);
    let codes = RefCell::new(vec![]);
    for (step, tokens, cached) in
        [(steps.last().unwrap(), vec![0; tokens as usize - 1], 0), (&steps[0], vec![0], tokens - 1)]
    {
        let open = |plan: &Arc<_>, _| {
            codes.borrow_mut().extend(lanes::codes(plan).concat());
            Err(DeviceError::Threads("nothing runs yet".into()))
        };
        check_step_on(&open, file, &options, step, &tokens, cached, &mut Caches::new()).unwrap_err();
    }
    codes.take()
}

/// The floats of a file that `logits` wrote to stdout.
fn floats(npy: &[u8]) -> Vec<f32> {
    npyz::NpyFile::new(npy).unwrap().into_vec().unwrap()
}

/// How far logits are from others, relative to those.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut a.iter().zip(b).map(|(x, y)| f64::from(x - y)));
    apart / norm(&mut b.iter().map(|x| f64::from(*x)))
}

#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn the_default_model_runs_in_waves_of_32() {
    let Some(folder) = stubs() else { return };
    let file = Arc::new(sinter::model::embedded().unwrap());
    let exact = options("gfx1100").exact();
    let few = Options { chunk: 8, greedy: true, kv: KvTypes::both(DType::F32), ..exact.clone() };
    let mut all = codes(&file, &few, Purpose::Generate);
    all.extend(codes_of_check(&file, &options("gfx1100"), 6));
    all.extend(codes_of_check(&file, &Options { kv: KvTypes::both(DType::F32), ..exact }, 6));
    compile_ahead(folder, "gfx1100", &all);
    let run = ["run", "-p", "The borrow checker", "-n", "3", "--temp", "0", "--chunk", "8", "--exact"];
    let on_cpu = command::stdout(&run);
    let ran = sinter(folder, &[&run[..], &["--device", "hip"]].concat(), &[]);
    assert_eq!(said(&ran.output).0, on_cpu);
    assert_eq!(ran.leaks(), [""; 0]);
    assert!(ran.calls("kernels that ran") > 100, "{:?}", ran.counts);
    for exact in [&[][..], &["--exact"]] {
        let check = ["check", "--tokens", "33,280,5,17,90,1", "--device", "hip"];
        let ran = sinter(folder, &[&check[..], exact].concat(), &[]);
        let (out, _) = said(&ran.output);
        assert!(out.contains("every kernel computes what its body says"), "{out}");
        assert_eq!(ran.leaks(), [""; 0]);
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_small_model_runs_in_waves_of_64() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let at = Options { chunk: 4, context: Some(13), ..options("gfx942") };
    let mut all = codes(&file, &at, Purpose::Score);
    all.extend(codes_of_check(&file, &options("gfx942"), 6));
    compile_ahead(folder, "gfx942", &all);
    let arch = [("SINTER_STUB_ARCH", "gfx942")];
    let ran = sinter(folder, &["devices"], &arch);
    assert!(said(&ran.output).0.contains("(gfx942, platform amd, driver 6.4.43484)"));
    let logits = ["logits", &path, "--tokens", &tokens(13), "--chunk", "4", "-o", "-"];
    let on_cpu = floats(&command::run(&logits).stdout);
    let ran = sinter(folder, &[&logits[..], &["--device", "hip"]].concat(), &arch);
    assert!(ran.output.status.success(), "{}", text(&ran.output.stderr));
    let apart = distance(&floats(&ran.output.stdout), &on_cpu);
    assert!(apart < 4e-2, "{apart}");
    assert_eq!(ran.leaks(), [""; 0]);
    let ran = sinter(folder, &["check", &path, "--tokens", "33,80,5,17,90,1", "--device", "hip"], &arch);
    said(&ran.output);
    assert_eq!(ran.leaks(), [""; 0]);
}

/// As this target's prompts have them, beside one whose have them in bytes.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn activations_in_halves_are_nearer_than_in_bytes() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let target = Target::gpu("gfx1100").unwrap();
    let in_bytes = Target { prompt_activations: DType::Q8Act, ..target.clone() };
    let named = folder.join("in_bytes.json");
    std::fs::write(&named, serde_json::to_string(&in_bytes).unwrap()).unwrap();
    let logits = ["logits", &path, "--tokens", &tokens(13), "--chunk", "13", "-o", "-"];
    let exact = floats(&command::run(&[&logits[..], &["--exact"]].concat()).stdout);
    let [halves, bytes] = [target, in_bytes].map(|target| {
        let at = Options { chunk: 13, context: Some(13), ..Options::new(target.clone()) };
        compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
        let target = match target.prompt_activations {
            DType::Q8Act => lanes::text(&named),
            _ => "gfx1100".into(),
        };
        let ran = sinter(folder, &[&logits[..], &["--device", "hip", "--target", &target]].concat(), &[]);
        assert!(ran.output.status.success(), "{}", text(&ran.output.stderr));
        assert_eq!(ran.leaks(), [""; 0]);
        distance(&floats(&ran.output.stdout), &exact)
    });
    assert!(halves < 3e-3 && 4.0 * halves < bytes, "{halves} in halves, {bytes} in bytes");
}

/// All formats, one for each matrix of two layers.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn weights_of_every_format_lie_as_kernels_read_them() {
    use DType::*;
    let Some(folder) = stubs() else { return };
    let shape = Shape { layers: 2, width: 256, ffn: 256, vocab: 96, ..shape("tiny-llama") };
    // Gate and up are shared by as many lanes, so their chunks have one size.
    let first = [
        ("attn_q", Q4_0),
        ("attn_k", Q4_1),
        ("attn_v", Q5_0),
        ("attn_output", Q5_1),
        ("ffn_gate", Q8_0),
        ("ffn_up", MXFP4),
        ("ffn_down", F16),
    ];
    let second = [
        ("attn_q", Q2_K),
        ("attn_k", Q3_K),
        ("attn_v", Q4_K),
        ("attn_output", BF16),
        ("ffn_gate", Q5_K),
        ("ffn_up", Q6_K),
    ];
    let format = |name: &str| {
        let of = |layer, matrices: &[(&str, DType)]| {
            let found = matrices.iter().find(|(matrix, _)| name == format!("blk.{layer}.{matrix}.weight"));
            found.map(|(_, format)| *format)
        };
        of(0, &first).or(of(1, &second)).unwrap_or(F32)
    };
    let model = Model::new(&shape, format);
    let used: BTreeSet<String> = model.tensors.values().map(|(dtype, _)| dtype.to_string()).collect();
    assert_eq!(used.len(), DType::WEIGHTS.len());
    let path = lanes::text(&folder.join("models/formats.gguf"));
    std::fs::write(&path, model.bytes()).unwrap();
    for (arch, n) in [("gfx1100", 3), ("gfx942", 2)] {
        let options = Options { chunk: 1, context: Some(n), kv: KvTypes::both(F32), ..options(arch).exact() };
        compile_ahead(folder, arch, &codes(&model.file(), &options, Purpose::Score));
        let tokens = tokens(n);
        let args = ["logits", &path, "--tokens", &tokens, "--chunk", "1", "--exact", "-o", "-"];
        let on_cpu = floats(&command::run(&args).stdout);
        let ran = sinter(folder, &[&args[..], &["--device", "hip"]].concat(), &[("SINTER_STUB_ARCH", arch)]);
        assert!(ran.output.status.success(), "{}", text(&ran.output.stderr));
        let apart = distance(&floats(&ran.output.stdout), &on_cpu);
        assert!(apart < 1e-5, "{arch}: {apart}");
    }
}

/// A command that makes steps of four tokens, launch by launch, captured and replayed, and one of a single token.
fn thirteen_tokens(folder: &Path) -> Vec<String> {
    static COMPILED: OnceLock<()> = OnceLock::new();
    let (path, file) = tiny(folder);
    COMPILED.get_or_init(|| {
        let at = Options { chunk: 4, context: Some(13), ..options("gfx1100") };
        compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
    });
    let tokens = tokens(13);
    let args = ["logits", &path, "--tokens", &tokens, "--chunk", "4", "-o", "-", "--device", "hip"];
    args.map(String::from).into()
}

/// What `logits` does not call, and what else does.
const COPIES_AND_TIMES: [&str; 2] = ["hipMemcpyDtoDAsync", "hipEventElapsedTime"];
const LOGS: [&str; 2] = ["hiprtcGetProgramLogSize", "hiprtcGetProgramLog"];

#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn each_call_that_fails_is_one_clear_error() {
    let Some(folder) = stubs() else { return };
    let args = thirteen_tokens(folder);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let whole = sinter(folder, &args, &[]);
    assert!(whole.output.status.success(), "{}", text(&whole.output.stderr));
    assert_eq!(whole.leaks(), [""; 0]);
    let unused: Vec<&str> = functions().into_iter().filter(|name| whole.calls(name) == 0).collect();
    assert_eq!(unused, [&COPIES_AND_TIMES[..], &STREAMS, &LOGS].concat());

    let faults: Vec<(&str, i64)> = functions()
        .into_iter()
        .flat_map(|name| {
            let n = whole.calls(name);
            let mut which = if n > 0 { vec![1, (n + 1) / 2, n] } else { vec![] };
            which.dedup();
            which.into_iter().map(move |n| (name, n))
        })
        .collect();
    assert!(faults.len() > 60, "{faults:?}");
    try_faults(folder, &args, &whole, &faults);
}

#[test]
#[ignore = "run by another in a process that has the stubs"]
fn rows_are_copied_and_launches_timed() {
    let Ok(path) = std::env::var("SINTER_TEST_MODEL") else { return };
    let file = Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap());
    let copied_and_timed = || -> Result<usize, Box<dyn std::error::Error>> {
        let plan = sinter::model::plan(&file, None, &two_sequences(), Purpose::Score)?;
        let plan = Arc::new(LoadedPlan::from_bytes(&plan.to_bytes()?)?);
        let mut device = open(&plan, Arc::clone(&file), &DeviceOptions::default())?;
        let (calls, at) = (0..plan.programs[0].calls.len(), Syms { t: 1, r: 1 });
        for input in &plan.programs[0].inputs {
            let bytes = plan.programs[0].buffers[input.buffer as usize].ty.bytes(&at);
            device.write(0, BufRef::Arena(input.buffer), &vec![0; bytes as usize])?;
        }
        let ticket = device.submit(&Submission { program: 0, calls, at, timed: true })?;
        device.copy_rows(StateRole::Appended, 0, PAGE as u64, PAGE as u64)?;
        device.wait(ticket)?;
        Ok(device.timings()?.len())
    };
    match copied_and_timed() {
        Ok(launches) => assert!(launches > 8),
        Err(e) => {
            say(&format!("error: {e}"));
            std::process::exit(1);
        }
    }
}

/// The calls that no command needs for logits: copies of a cache's rows, times of launches, what a compiler has to say.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn each_call_of_copies_times_and_logs_that_fails_is_one_clear_error() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    compile_ahead(folder, "gfx1100", &codes(&file, &two_sequences(), Purpose::Score));
    let model = ("SINTER_TEST_MODEL", path.as_str());
    let test = "rows_are_copied_and_launches_timed";
    let whole = in_a_process(folder, test, &[model]);
    for name in COPIES_AND_TIMES {
        let n = whole.calls(name);
        assert!(n > 1, "{name}");
        for n in [1, n] {
            let fault = format!("{name}:{n}");
            let ran = process(folder, test, &[model, ("SINTER_STUB_FAIL", &fault)]);
            let wrong = what_is_wrong(&ran, name, false, &whole);
            assert_eq!(wrong, None, "{fault}: {}", text(&ran.output.stderr));
        }
    }
    let args = thirteen_tokens(folder);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    for name in LOGS {
        // Several threads compile at once, and the first error counts.
        let faults: Vec<String> = (1..=64).map(|n| format!("{name}:{n}")).collect();
        let variables = [("SINTER_STUB_BREAK", "#error broken"), ("SINTER_STUB_FAIL", &faults.join(","))];
        let ran = sinter(folder, &args, &variables);
        let wrong = what_is_wrong(&ran, name, false, &whole);
        assert_eq!(wrong, None, "{name}: {}", text(&ran.output.stderr));
    }
}

/// The context of a CUDA device is given back when nothing uses it any more, whatever failed.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_context_is_released() {
    let Some(folder) = stubs() else { return };
    let names: Vec<&str> = API.split('"').skip(1).step_by(2).collect();
    let named = names.windows(2).filter(|pair| pair[0].starts_with("cu") && pair[1].starts_with("hip"));
    let named: Vec<String> = named.map(|pair| format!("-D{}={}", pair[1], pair[0])).collect();
    assert!(named.len() > 30, "{named:?}");
    build(folder, "cuda", "cuda.cpp", &named.iter().map(String::as_str).collect::<Vec<_>>());
    let devices = |fault: &str| {
        let [cuda, none] = ["cuda", "no_rocm"].map(|name| lanes::text(&folder.join(name)));
        let lib = format!("{cuda}/lib");
        let variables = [
            ("CUDA_PATH", &*cuda),
            ("ROCM_PATH", &none),
            ("LD_LIBRARY_PATH", &lib),
            ("SINTER_STUB_FAIL", fault),
        ];
        let ran = sinter(folder, &["devices"], &variables);
        let said = text(&ran.output.stdout) + &text(&ran.output.stderr);
        assert_eq!(ran.leaks(), [""; 0], "{fault}: {said}");
        (ran, said)
    };
    let (whole, said) = devices("");
    assert!(
        said.contains("(sm_90, platform nvidia, driver 13.0)") && said.contains(" of 8.6 GB free"),
        "{said}"
    );
    let calls =
        |ran: &Ran| ["Retain", "Release_v2"].map(|name| ran.calls(&format!("cuDevicePrimaryCtx{name}")));
    assert_eq!(calls(&whole), [1, 1]);
    let mut faults = 0;
    for (name, n) in &whole.counts {
        let Some(name) = name.strip_prefix("calls ") else { continue };
        for n in 1..=*n {
            let (ran, said) = devices(&format!("{name}:{n}"));
            assert!(said.contains(name) && !said.contains("panicked"), "{name}:{n}: {said}");
            // One that is not retained is not released.
            let [retained, released] = calls(&ran);
            assert_eq!(retained - i64::from(name == "cuDevicePrimaryCtxRetain"), released, "{name}:{n}");
            faults += 1;
        }
    }
    assert!(faults > 10, "{faults}");

    // AMD's are numbered first. One that there are no kernels for, as of a processor, is not what `hip` means where there is another.
    let [cuda, rocm] = ["cuda", "rocm"].map(|name| lanes::text(&folder.join(name)));
    let variables = [("CUDA_PATH", &*cuda), ("ROCM_PATH", &rocm), ("SINTER_STUB_ARCH", "gfx1013")];
    let lib = format!("{cuda}/lib:{rocm}/lib");
    let both = |args: &[&str], more: &[(&str, &str)]| {
        let ran = sinter(folder, args, &[&variables[..], &[("LD_LIBRARY_PATH", &*lib)], more].concat());
        assert_eq!(ran.leaks(), [""; 0]);
        (String::from_utf8_lossy(&ran.output.stdout).into_owned(), text(&ran.output.stderr))
    };
    let (listed, _) = both(&["devices"], &[]);
    let gpus: Vec<&str> = listed.lines().filter(|line| line.starts_with("hip:")).collect();
    assert!(gpus.len() == 2 && gpus[0].starts_with("hip:0  a CPU that stands in for gfx1013"), "{listed}");
    assert!(gpus[0].contains("no kernels for it") && gpus[1].contains("(sm_90, platform nvidia"), "{listed}");
    let (path, _) = tiny(folder);
    let run = |device: &str| both(&["logits", &path, "--tokens", "1", "-o", "-", "--device", device], &[]).1;
    assert!(run("hip:0").contains("gfx1013, for which there are no kernels"), "{}", run("hip:0"));
    for device in ["hip", "hip:1"] {
        assert!(run(device).contains("kernels cannot be compiled here"), "{}", run(device));
    }
    // A driver that is broken does not stand in the way of another's.
    build(folder, "without_device_beside", "hip.cpp", &["-DhipSetDevice=hipSetDeviceOfLater"]);
    let broken = lanes::text(&folder.join("without_device_beside"));
    let lib = format!("{cuda}/lib:{broken}/lib");
    let beside = [("ROCM_PATH", &*broken), ("LD_LIBRARY_PATH", &lib)];
    let (listed, _) = both(&["devices"], &beside);
    assert!(listed.contains("hip:0  ") && listed.contains("(sm_90, platform nvidia"), "{listed}");
    let said = both(&["logits", &path, "--tokens", "1", "-o", "-", "--device", "hip:7"], &beside).1;
    assert!(said.starts_with("error: there is no GPU 7: there is 1, counted from 0"), "{said}");
    let said = run("hip:2");
    assert!(said.starts_with("error: there is no GPU 2: there are 2, counted from 0"), "{said}");
}

/// The command on the stubs is one error, which says so much.
fn fails(folder: &Path, variables: &[(&str, &str)], with: &[&str]) {
    let args = thirteen_tokens(folder);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ran = sinter(folder, &args, variables);
    let said = report(&ran.output);
    for with in with {
        assert!(said.contains(with), "{with:?}: {said}");
    }
    assert_eq!(ran.leaks(), [""; 0]);
}

/// The same, with the libraries of another folder.
fn fails_on(folder: &Path, rocm: &str, with: &[&str]) {
    let rocm = folder.join(rocm);
    let lib = lanes::text(&rocm.join("lib"));
    fails(folder, &[("ROCM_PATH", rocm.to_str().unwrap()), ("LD_LIBRARY_PATH", &lib)], with);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn what_a_machine_lacks_is_said() {
    let Some(folder) = stubs() else { return };
    let args = thirteen_tokens(folder);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let little = [("SINTER_STUB_MEMORY", "300000")];
    fails(folder, &little, &["beside", "of weights, but 300.0 kB are free"]);
    // That is known before anything is compiled, loaded or copied.
    let ran = sinter(folder, &args, &little);
    for name in
        ["hiprtcCompileProgram", "hipModuleLoadData", "hipMalloc", "hipHostMalloc", "hipMemcpyHtoDAsync"]
    {
        assert_eq!(ran.calls(name), 0, "{name}");
    }
    fails(folder, &[("SINTER_STUB_ARCH", "gfx803")], &["is gfx803, for which there are no kernels"]);
    // The compiler's log has errors of its own.
    let ran = sinter(folder, &args, &[("SINTER_STUB_BREAK", "#error broken")]);
    let said = text(&ran.output.stderr);
    assert_eq!(ran.output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: the kernel "), "{said}");
    assert!(said.contains(" does not compile for gfx1100:\n") && said.contains("broken"), "{said}");
    assert_eq!(said.matches("does not compile").count(), 1, "{said}");
    assert_eq!(ran.leaks(), [""; 0]);
    // Without a device, the CPU is used, which is said.
    let ran = sinter(folder, &args, &[("SINTER_STUB_DEVICES", "0")]);
    assert!(ran.output.status.success());
    assert!(text(&ran.output.stderr).contains("no GPU is used, but the CPU: there is no GPU 0: there are 0"));
    let [from, to] = ["rocm", "without_compiler"].map(|name| folder.join(name).join("lib"));
    std::fs::create_dir_all(&to).unwrap();
    std::fs::copy(from.join("libamdhip64.so"), to.join("libamdhip64.so")).unwrap();
    fails_on(folder, "without_compiler", &["libamdhip64.so has no hiprtcCreateProgram"]);
}

/// Each function that a driver, or its compiler, is too old to have.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn each_function_that_is_not_there_is_named() {
    let Some(folder) = stubs() else { return };
    // Before ROCm 6 properties had another name, which does as well.
    for name in functions().into_iter().filter(|name| *name != "hipGetDevicePropertiesR0600") {
        let lacking = format!("without_{name}");
        let [from, to] = ["rocm", &lacking].map(|name| folder.join(name).join("lib"));
        std::fs::create_dir_all(&to).unwrap();
        let of_library = if name.starts_with("hiprtc") { "libhiprtc.so" } else { "libamdhip64.so" };
        for library in ["libamdhip64.so", "libhiprtc.so"] {
            let mut bytes = std::fs::read(from.join(library)).unwrap();
            // Under another name it is not found.
            let named = [b"\0", name.as_bytes(), b"\0"].concat();
            let places: Vec<usize> =
                (0..bytes.len() - named.len()).filter(|at| bytes[*at..].starts_with(&named)).collect();
            assert_eq!(places.is_empty(), library != of_library, "{library}: {name}");
            places.into_iter().for_each(|at| bytes[at + 1] = b'X');
            std::fs::write(to.join(library), bytes).unwrap();
        }
        fails_on(folder, &lacking, &[&format!("{lacking}/lib/{of_library} has no {name}: it is too old")]);
    }
}

/// Memory that was free when it was looked at, and is not there when it is asked for.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn memory_that_is_refused_is_told_with_what_is_needed() {
    let Some(folder) = stubs() else { return };
    // It says that it has more than it gives: for the pool, and for weights.
    for call in ["hipMalloc:1", "hipMalloc:2"] {
        let with = ["for the KV cache", "of weights, which the driver refuses though 8.6 GB are free"];
        fails(folder, &[("SINTER_STUB_FAIL", call)], &with);
    }
    // What others take between the look and the asking is seen by another look.
    fails(folder, &[("SINTER_STUB_OTHERS", "8589900000")], &["of weights, but 34.6 kB are free"]);
}

/// Where there is another than the one that is named, the CPU does not stand in for it.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_gpu_that_is_named_is_meant() {
    let Some(folder) = stubs() else { return };
    let args = thirteen_tokens(folder);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let on = |device: &str| {
        let args: Vec<&str> = args.iter().map(|arg| if *arg == "hip" { device } else { arg }).collect();
        let ran = sinter(folder, &args, &[]);
        assert_eq!(ran.leaks(), [""; 0]);
        report(&ran.output)
    };
    assert!(on("hip:1").contains("there is no GPU 1: there is 1, counted from 0"), "{}", on("hip:1"));
}

/// Neither platform is here, or one is and does not load.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn why_no_driver_loads_is_said_of_each_platform() {
    let Some(folder) = stubs() else { return };
    let args = thirteen_tokens(folder);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let broken = folder.join("broken/lib");
    std::fs::create_dir_all(&broken).unwrap();
    std::fs::write(broken.join("libamdhip64.so"), "this is no library").unwrap();
    for (rocm, with) in [
        ("nothing", "there is no libamdhip64.so; there is no libcuda.so.1\n".into()),
        ("broken", format!("{}/libamdhip64.so does not load: file too short; there is no", broken.display())),
    ] {
        let rocm = folder.join(rocm);
        let lib = lanes::text(&rocm.join("lib"));
        let variables = [("ROCM_PATH", rocm.to_str().unwrap()), ("LD_LIBRARY_PATH", &lib)];
        let ran = sinter(folder, &args, &variables);
        let told = text(&ran.output.stderr);
        assert!(ran.output.status.success() && told.lines().count() == 1, "{told}");
        let start = "no GPU is used, but the CPU: no library of a GPU's driver can be loaded: ";
        assert!(told.starts_with(&format!("{start}{with}")), "{told}");
    }
}

/// What every call needs is looked for before any.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_driver_that_lacks_a_function_is_named() {
    let Some(folder) = stubs() else { return };
    build(folder, "without_device", "hip.cpp", &["-DhipSetDevice=hipSetDeviceOfLater"]);
    fails_on(
        folder,
        "without_device",
        &["without_device/lib/libamdhip64.so has no hipSetDevice: it is too old"],
    );
}

/// That of ROCm 5 has an older structure of properties.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn an_older_driver_tells_its_architecture() {
    let Some(folder) = stubs() else { return };
    build(folder, "rocm5", "hip.cpp", &["-DhipGetDevicePropertiesR0600=hipGetDevicePropertiesOfLater"]);
    build(folder, "rocm5", "hiprtc.cpp", &[]);
    let rocm = folder.join("rocm5");
    let variables = [("ROCM_PATH", rocm.to_str().unwrap()), ("SINTER_STUB_ARCH", "gfx90a")];
    let ran = sinter(folder, &["devices"], &variables);
    let said = text(&ran.output.stdout);
    // Once in its name, which has another source.
    let named = said.matches("gfx90a").count() > 1 && !said.contains("sramecc");
    assert!(named, "{said}{}", text(&ran.output.stderr));
    assert!(ran.calls("hipGetDeviceProperties") > 0);
}

/// Kernels are timed by events, and a graph beside them.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_profile_is_of_the_gpus_kernels() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let at = Options { context: Some(1), ..options("gfx1100") };
    compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Bench));
    let ran = sinter(folder, &["profile", &path, "-p", "0", "-r", "2", "--json", "--device", "hip"], &[]);
    assert!(ran.output.status.success(), "{}", text(&ran.output.stderr));
    assert_eq!(ran.leaks(), [""; 0]);
    let json: serde_json::Value = serde_json::from_slice(&ran.output.stdout).unwrap();
    assert_eq!((&json["target"], &json["isa"]), (&"gfx1100".into(), &"gfx1100".into()));
    let memory = |key: &str| json["memory"][key].as_u64().unwrap();
    assert!(memory("device_used") <= memory("device_all") && memory("device_all") > 0, "{json}");
    let kernels = json["steps"][0]["kernels"].as_array().unwrap();
    let launches: u64 = kernels.iter().map(|kernel| kernel["launches"].as_u64().unwrap()).sum();
    assert!(kernels.iter().any(|kernel| kernel["kernel"] == "rope_attention") && launches >= 9, "{json}");
    assert!(ran.calls("hipEventElapsedTime") as u64 >= 2 * launches && ran.calls("hipGraphLaunch") > 0);
}

/// The commands that measure: a prompt, tokens of one sequence and of two; and a text in windows, of which the CPU says nearly the same.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn bench_and_perplexity_run() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny_with_words(folder);
    let at = |context, sequences| Options { context: Some(context), sequences, ..options("gfx1100") };
    let mut all = codes(&file, &Options { chunk: 8, ..at(4, 2) }, Purpose::Bench);
    all.extend(codes(&file, &Options { chunk: 8, ..at(6, 1) }.exact(), Purpose::Score));
    compile_ahead(folder, "gfx1100", &all);
    let bench =
        ["bench", &path, "-p", "2", "-n", "2", "-b", "1,2", "-r", "1", "-o", "jsonl", "--no-bandwidth"];
    let ran = sinter(folder, &[&bench[..], &["-c", "4", "--chunk", "8", "--device", "hip"]].concat(), &[]);
    let (lines, _) = said(&ran.output);
    assert_eq!(ran.leaks(), [""; 0]);
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tests: Vec<&str> = lines.iter().map(|line| line["test"].as_str().unwrap()).collect();
    for wanted in ["pp2", "tg2", "tg2 (no logits)", "tg2 b2"] {
        assert!(tests.contains(&wanted), "{wanted} of {tests:?}");
    }
    for line in &lines {
        assert!(line["median_ts"].as_f64().unwrap() > 0.0 && line["isa"] == "gfx1100", "{line}");
    }
    let text = folder.join("text");
    std::fs::write(&text, "Twelve bytes, and some more of them.").unwrap();
    let text = lanes::text(&text);
    let perplexity = ["perplexity", &path, "-f", &text, "-c", "6", "--chunk", "8", "--exact"];
    let of = |said: &str| said.split("PPL = ").nth(1)?.split(' ').next()?.parse::<f64>().ok();
    let on_cpu = of(&command::stdout(&perplexity)).unwrap();
    let ran = sinter(folder, &[&perplexity[..], &["--device", "hip"]].concat(), &[]);
    let found = of(&said(&ran.output).0).unwrap();
    assert!((found / on_cpu - 1.0).abs() < 1e-5, "{found} of {on_cpu}");
    assert!(ran.calls("hipModuleLaunchKernel") > 0, "kernels ran");
    assert_eq!(ran.leaks(), [""; 0]);
}

/// Each position of a cache, from the first to the last, launch by launch and as one graph that is captured once.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn one_graph_replays_at_every_depth() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let at = Options { chunk: 1, context: Some(513), ..options("gfx1100") };
    compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
    let all = tokens(513);
    let args = ["logits", &path, "--tokens", &all, "--chunk", "1", "-o", "-", "--device", "hip"];
    let eager = sinter(folder, &[&args[..], &["--no-graph"]].concat(), &[]);
    let replayed = sinter(folder, &args, &[("SINTER_STUB_SEED", "77")]);
    let late = sinter(folder, &args, &[("SINTER_STUB_LATE_ARGUMENTS", "1")]);
    for ran in [&eager, &replayed, &late] {
        let said = text(&ran.output.stderr);
        assert!(ran.output.status.success() && !said.contains("WARN"), "{said}");
        assert_eq!(ran.leaks(), [""; 0]);
        assert!(eager.output.stdout == ran.output.stdout, "a replayed step computes something else");
    }
    let counts = |ran: &Ran| {
        ["hipStreamBeginCapture", "hipGraphInstantiateWithFlags", "hipGraphLaunch"]
            .map(|name| ran.calls(name))
    };
    assert_eq!(counts(&eager), [0, 0, 0]);
    assert_eq!(counts(&replayed), [1, 1, 512]);
    // The first replay is compared with its launches, which are made once more for that.
    let (eager, replayed) = (eager.calls("kernels that ran"), replayed.calls("kernels that ran"));
    assert_eq!(replayed, eager + eager / 513);
}

/// A replay that leaves a launch out, whichever it is, or does not see what the host wrote: that is noticed at the first, and what the
/// launches compute one by one stands.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_replay_that_goes_wrong_is_noticed() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let at = Options { chunk: 1, context: Some(16), ..options("gfx1100") };
    compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
    let tokens = tokens(6);
    let args =
        ["logits", &path, "--tokens", &tokens, "-c", "16", "--chunk", "1", "-o", "-", "--device", "hip"];
    let right = sinter(folder, &args, &[]);
    let said = text(&right.output.stderr);
    assert!(right.output.status.success() && !said.contains("WARN"), "{said}");
    assert_eq!(right.calls("hipGraphLaunch"), 5);
    let program = &compile(file.gguf(), &at, Purpose::Score).unwrap()[0].program;
    let kernels = program.calls.iter().map(|call| &program.kernels[call.kernel as usize]);
    // Parts of a cache that is so short need not be put together.
    let idle = |code: &Code| matches!(code, Code::Hip(code) if code.entry == "rope_attention_2");
    let launches = kernels.flat_map(|kernel| &kernel.launches).map(|launch| !idle(&launch.code));
    let works: Vec<bool> = launches.collect();
    assert_eq!(works.iter().filter(|works| !**works).count(), 1);
    let with_work = (1..).zip(&works).filter(|(_, works)| **works).map(|(n, _): (usize, _)| n.to_string());
    for defect in with_work.chain(["stale".to_string()]) {
        let ran = sinter(folder, &args, &[("SINTER_STUB_REPLAY", &defect)]);
        let said = text(&ran.output.stderr);
        assert!(ran.output.status.success() && ran.output.stdout == right.output.stdout, "{defect}: {said}");
        assert_eq!(said.matches("WARN").count(), 1, "{defect}: {said}");
        assert!(said.contains("a graph of t1 replayed with other results"), "{said}");
        assert_eq!((ran.calls("hipGraphLaunch"), ran.leaks()), (1, vec![]), "{defect}");
    }
}

/// Each step replaces the state `h` by another.
const RECURRENCE: &str = r#"graph @t1(%tokens: i32[T], %positions: i32[T], %sequences: i32[T]) sym T<=1, R<=1 {
  %w0 = weight "table" : f32[16,40]
  %0 = get_rows %w0, %tokens : f32[T,40]
  %s0 = state "h" : f32[1,40] replaced
  %1, %2 = gated_scan %s0, %0, %0, %sequences, %positions : f32[T,40], f32[1,40]
  return %1, %2
}"#;

#[test]
#[ignore = "run by another in a process that has the stubs"]
fn states_that_are_replaced() {
    if std::env::var("SINTER_STUB_FOLDER").is_err() {
        return;
    }
    let mut writer = GgufWriter::new();
    let table: Vec<f32> = (0..16 * 40).map(|i| (i as f32).sin()).collect();
    let format = GgmlType::of(DType::F32).unwrap();
    writer.tensor("table", format, &[16, 40], bytemuck::cast_slice(&table).to_vec()).unwrap();
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    let file = Arc::new(GgufFile::from_bytes(bytes).unwrap());
    let target = Target::gpu("gfx1100").unwrap();
    let graph = verify(Graph::parse(RECURRENCE).unwrap()).unwrap();
    let program = generate(&graph, &target, &Layouts::default()).unwrap();
    let name = || "none".to_string();
    let model = sinter::plan::Model {
        source: None,
        identity: file.identity(),
        full_hash: None,
        architecture: name(),
        name: name(),
    };
    let kv = KvTypes::both(DType::F32);
    let options =
        sinter::plan::Options { exact: true, kv, context: 8, sequences: 1, chunk: 1, greedy: false };
    let plan = Plan::build(Parts {
        model,
        target,
        options,
        programs: vec![(program, sinter::ir::Report::default())],
    })
    .unwrap();
    let bytes = plan.to_bytes().unwrap();
    let results = |eager| {
        let device = DeviceOptions { eager, ..DeviceOptions::default() };
        let plan = LoadedPlan::from_bytes(&bytes).unwrap();
        let mut executor = Executor::new(plan, Arc::clone(&file), &device).unwrap();
        let step = |position| {
            let step = StepRows {
                tokens: vec![3],
                positions: vec![position],
                sequences: vec![0],
                ..StepRows::default()
            };
            executor.forward(0, &step).unwrap();
            executor.result(0).unwrap()
        };
        (0..5).map(step).collect::<Vec<_>>()
    };
    let eager = results(true);
    assert!(eager.windows(2).all(|pair| pair[0] != pair[1]), "the state is not replaced");
    assert!(eager == results(false), "a graph's state differs");
}

/// To compare a replay with its launches, the state of before is put back; else the graph would be dropped, and the state be wrong.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn one_graph_replays_a_recurrence() {
    let Some(folder) = stubs() else { return };
    let ran = in_a_process(folder, "states_that_are_replaced", &[]);
    assert_eq!(ran.calls("hipGraphLaunch"), 4);
}

/// Machine code is kept: what was compiled is not compiled again, unless what was kept is damaged.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn kernels_are_compiled_once() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    let at = Options { chunk: 2, context: Some(8), ..options("gfx1100") };
    compile_ahead(folder, "gfx1100", &codes(&file, &at, Purpose::Score));
    let cache = tempfile::tempdir().unwrap();
    let kept = || {
        let entries = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.collect::<BTreeSet<PathBuf>>()
    };
    let run = |cache: &str| {
        let args = ["logits", &path, "--tokens", "1,2,3", "--chunk", "2", "-o", "-", "--device", "hip"];
        let ran = sinter(folder, &args, &[("SINTER_KERNEL_CACHE", cache)]);
        assert!(ran.output.status.success(), "{}", text(&ran.output.stderr));
        assert_eq!(ran.leaks(), [""; 0]);
        (ran.calls("hiprtcCompileProgram"), ran.output.stdout)
    };
    let (all, logits) = run("off");
    assert_eq!(run(lanes::text(cache.path()).as_str()), (all, logits.clone()));
    let entries = kept();
    assert!(all > 5 && entries.len() as i64 == all, "{all} compiled, {} kept", entries.len());
    assert_eq!(run(lanes::text(cache.path()).as_str()), (0, logits.clone()));
    let damaged = entries.first().unwrap();
    let mut bytes = std::fs::read(damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(damaged, bytes).unwrap();
    assert_eq!(run(lanes::text(cache.path()).as_str()), (1, logits.clone()));
    assert_eq!(run(lanes::text(cache.path()).as_str()), (0, logits.clone()));
    assert_eq!(kept(), entries);
    // Processes that find nothing and write the same at once.
    entries.iter().for_each(|entry| std::fs::remove_file(entry).unwrap());
    let at_once = || -> Vec<(i64, Vec<u8>)> {
        let folder = lanes::text(cache.path());
        std::thread::scope(|scope| {
            let processes = [(); 4].map(|()| scope.spawn(|| run(&folder)));
            processes.into_iter().map(|process| process.join().unwrap()).collect()
        })
    };
    let together = at_once();
    assert!(together.iter().all(|(_, same)| *same == logits));
    assert!(together.iter().map(|(compiled, _)| compiled).sum::<i64>() >= all, "{all} and more");
    assert_eq!(kept(), entries);
    assert!(at_once().iter().all(|(compiled, same)| *compiled == 0 && *same == logits));
}

#[test]
#[ignore = "run by another in a process that has the stubs"]
fn loading_is_told() {
    let Ok(path) = std::env::var("SINTER_TEST_MODEL") else { return };
    let file = Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap());
    let told = Arc::new(Mutex::new(vec![]));
    let progress = {
        let told = Arc::clone(&told);
        Progress::to(move |stage, done, all| told.lock().unwrap().push((stage, done, all)))
    };
    let device = DeviceOptions { progress, ..DeviceOptions::default() };
    let made = sinter::model::executor(&file, None, &two_sequences(), Purpose::Score, &device);
    let told = told.lock().unwrap();
    for stage in [Stage::Kernels, Stage::Weights] {
        let told: Vec<(u64, u64)> = told.iter().filter(|t| t.0 == stage).map(|t| (t.1, t.2)).collect();
        let (_, all) = told[0];
        assert!(told.len() > 3 && told.iter().all(|t| t.1 == all) && told.is_sorted(), "{told:?}");
        let ends = told.iter().position(|(done, _)| *done >= all);
        let does = made.is_ok() || stage == Stage::Kernels;
        assert_eq!(ends, does.then_some(told.len() - 1), "{stage:?}: {told:?}");
    }
    let fails = std::env::var("SINTER_STUB_FAIL").is_ok();
    assert_eq!(made.is_err(), fails);
}

/// How far a load is, whether it succeeds or its last bytes do not arrive.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_load_that_fails_is_not_told_to_end() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    compile_ahead(folder, "gfx1100", &codes(&file, &two_sequences(), Purpose::Score));
    let model = ("SINTER_TEST_MODEL", path.as_str());
    let whole = in_a_process(folder, "loading_is_told", &[model]);
    let last = format!("hipMemcpyHtoDAsync:{}", whole.calls("hipMemcpyHtoDAsync"));
    in_a_process(folder, "loading_is_told", &[model, ("SINTER_STUB_FAIL", &last)]);
}

/// A plan that was compiled ahead of time runs where there is a driver and no compiler, with the very numbers; what is wrong with its
/// code, or what it is not for, is said.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn a_plan_with_machine_code_needs_no_compiler() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny_with_words(folder);
    let few = |arch| Options { chunk: 2, context: Some(16), greedy: true, ..options(arch) };
    for arch in ["gfx1100", "gfx942"] {
        compile_ahead(folder, arch, &codes(&file, &few(arch), Purpose::Generate));
    }
    let clang = lanes::text(&build_clang(folder));
    let plans = tempfile::tempdir().unwrap();
    let plan = |name: &str| lanes::text(&plans.path().join(name));
    let compile = |targets: &str, to: &str, more: &[&str], variables: &[(&str, &str)]| {
        let args = ["compile", &path, "--target", targets, "-o", to, "--chunk", "2", "-c", "16", "--greedy"];
        sinter(
            folder,
            &[&args[..], more].concat(),
            &[&[("SINTER_HIP_CLANG", clang.as_str())], variables].concat(),
        )
    };
    // A driver that came alone, as those for players of games do.
    let alone = folder.join("driver_alone");
    build(folder, "driver_alone", "hip.cpp", &[]);
    let (alone, lib) = (lanes::text(&alone), lanes::text(&alone.join("lib")));
    let no_compiler = [("ROCM_PATH", alone.as_str()), ("LD_LIBRARY_PATH", &lib)];
    let run = |plan: &str, more: &[&str], variables: &[(&str, &str)]| {
        let args = ["run", plan, "-p", "x", "-n", "3", "--temp", "0"];
        sinter(folder, &[&args[..], more].concat(), &[&no_compiler, variables].concat())
    };
    let both = plan("both.plan");
    let made = compile("gfx1100, gfx942", &both, &[], &[]);
    let (_, told) = said(&made.output);
    for arch in ["gfx1100", "gfx942"] {
        let line = format!("{both}: {arch}: ");
        let line =
            told.lines().find(|l| l.starts_with(&line) && l.contains(" kernels compiled, ")).unwrap_or(&told);
        assert!(line.ends_with(", by stub clang version 1.2.3"), "{told}");
    }
    let wanted = |arch| {
        let args = [
            "run", &path, "-p", "x", "-n", "3", "--temp", "0", "--device", "hip", "--chunk", "2", "-c", "16",
        ];
        said(&sinter(folder, &args, &[("SINTER_STUB_ARCH", arch)]).output).0
    };
    for arch in ["gfx1100", "gfx942"] {
        for device in [&[][..], &["--device", "hip"]] {
            let ran = run(&both, device, &[("SINTER_STUB_ARCH", arch)]);
            assert_eq!(said(&ran.output).0, wanted(arch), "{arch}");
            assert!(
                ran.calls("hiprtcVersion") == 0 && ran.calls("kernels that ran") > 10,
                "{:?}",
                ran.counts
            );
            assert_eq!(ran.leaks(), [""; 0]);
        }
    }
    let refused = |ran: &Ran, with: &str| {
        let said = report(&ran.output);
        assert!(said.contains(with), "{with:?}: {said}");
        // Without a call to the driver nothing is counted.
        assert!(ran.counts.is_empty() || ran.leaks().is_empty(), "{:?}", ran.leaks());
    };
    // No plan of the file fits.
    refused(
        &run(&both, &[], &[("SINTER_STUB_ARCH", "gfx906")]),
        "both.plan: the plan is for gfx1100, gfx942, and this GPU is gfx906 (",
    );
    refused(
        &run(&both, &["--device", "cpu"], &[]),
        "the plan is for gfx1100, gfx942, and the device is the CPU",
    );
    refused(
        &run(&both, &[], &[("SINTER_STUB_DEVICES", "0")]),
        "the plan is for gfx1100, gfx942, and there is no GPU here: ",
    );
    // Where there is no GPU, what is for the CPU runs there.
    let three = plan("three.plan");
    said(&compile("gfx1100,cpu", &three, &[], &[]).output);
    let on_cpu = said(&run(&three, &[], &[]).output).0;
    let ran = run(&three, &["--device", "hip"], &[("SINTER_STUB_DEVICES", "0")]);
    assert_eq!(said(&ran.output).0, on_cpu);
    assert!(text(&ran.output.stderr).contains("no GPU is used, but the CPU"));
    assert!(run(&three, &["--device", "hip"], &[]).calls("kernels that ran") > 10);
    refused(
        &run(&three, &["--device", "hip:1"], &[]),
        "three.plan: there is no GPU 1: there is 1, counted from 0",
    );
    // As source it needs the compiler of the device.
    let source = plan("source.plan");
    let (_, told) = said(&compile("gfx1100", &source, &["--source-only"], &[]).output);
    assert!(told.contains(" kernels as source"), "{told}");
    refused(&run(&source, &[], &[]), "has no hiprtcCreateProgram");
    let args = ["run", &source, "-p", "x", "-n", "3", "--temp", "0"];
    assert_eq!(said(&sinter(folder, &args, &[]).output).0, wanted("gfx1100"));
    // What the driver refuses is named.
    let refuse = plan("refused.plan");
    said(&compile("gfx1100", &refuse, &[], &[("SINTER_STUB_OBJECT", "no code at all")]).output);
    refused(
        &run(&refuse, &[], &[]),
        "error: the driver refuses the code of dequant_rmsnorm (dequant_rmsnorm), which stub clang version 1.2.3 compiled for gfx1100: \
         the GPU's driver answers hipErrorInvalidImage to hipModuleLoadData",
    );
    // One that was damaged on the way.
    let mut bytes = std::fs::read(&both).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&both, bytes).unwrap();
    refused(&run(&both, &[], &[]), "both.plan: the plan is damaged: its checksum does not match");
    // A compiler that does not know the target, is none, or refuses a source.
    let never = plan("never.plan");
    refused(
        &compile("gfx906", &never, &[], &no_compiler),
        "nothing here compiles kernels for gfx906: SINTER_HIP_CLANG names ",
    );
    refused(&compile("gfx906", &never, &[], &no_compiler), "invalid target ID");
    let missing = [("SINTER_HIP_CLANG", "/no/clang"), no_compiler[0], no_compiler[1]];
    refused(
        &compile("gfx1100", &never, &[], &missing),
        "SINTER_HIP_CLANG names /no/clang: there is no such program",
    );
    let broken = compile("gfx1100", &never, &[], &[("SINTER_STUB_BREAK", "#error broken")]);
    let told = text(&broken.output.stderr);
    assert!(!broken.output.status.success() && told.contains(" does not compile for gfx1100:\n"), "{told}");
    refused(&compile("gfx1100,gfx942,gfx1100", &never, &[], &[]), "the file holds two plans for gfx1100");
    assert!(!Path::new(&never).exists());
    // Without any clang, hiprtc compiles.
    let by_library = plan("library.plan");
    let no_clang = [("SINTER_HIP_CLANG", "/no/clang")];
    let (_, told) = said(&compile("gfx1100", &by_library, &[], &no_clang).output);
    assert!(told.contains(", by hiprtc 6.4\n"), "{told}");
    assert_eq!(said(&run(&by_library, &[], &[]).output).0, wanted("gfx1100"));
}

/// A model of one layer whose tokens are bytes.
fn tiny_with_words(folder: &Path) -> (String, Arc<GgufFile>) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.push("▁".into());
    let kinds = (0..tokens.len()).map(|i| [2, 3, 3].get(i).copied().unwrap_or(if i < 259 { 6 } else { 1 }));
    let shape = Shape { layers: 1, width: 256, ffn: 256, vocab: tokens.len() as u64, ..shape("tiny-llama") };
    let mut model = Model::new(&shape, q4_k_m);
    let vocabulary = [
        ("model", Value::String("llama".into())),
        ("scores", Value::Array(Array::F32(vec![0.0; tokens.len()]))),
        ("token_type", Value::Array(Array::I32(kinds.collect()))),
        ("tokens", Value::Array(Array::String(tokens))),
    ];
    model.metadata.extend(vocabulary.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)));
    let path = folder.join("models/words.gguf");
    std::fs::write(&path, model.bytes()).unwrap();
    (lanes::text(&path), model.file())
}

/// Builds the stub of a clang (`tests/host/clang.cpp`).
fn build_clang(folder: &Path) -> PathBuf {
    let out = folder.join("clang");
    let lib = folder.join("rocm/lib");
    let [source, to, library] = [lanes::sources().join("clang.cpp"), out.clone(), lib.join("libhiprtc.so")]
        .map(|path| lanes::text(&path));
    let paths = [&lib, folder].map(|path| format!("-Wl,-rpath,{}", lanes::text(path)));
    let args = ["-std=c++17", "-Wall", "-Werror", "-O1", &source, "-o", &to, &library, &paths[0], &paths[1]];
    let made = Command::new("clang++-19").args(args).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    out
}

/// Rows of a page of a cache.
const PAGE: i32 = sinter::ir::PAGE as i32;
/// Positions of the sequence that moves: into its third page.
const POSITIONS: i32 = 2 * PAGE + 6;

/// The logits of a sequence's tokens, one after another. Where it moves, its pages lie in no order, and two are copied to others on the
/// way, as when a sequence writes to what it shares; where they were, there is nothing that is a number.
fn step_by_step(executor: &mut Executor, moves: bool) -> Vec<f32> {
    let mut tables = if moves { [4, 1, 5, 0, 0, 0] } else { [0, 1, 2, 0, 0, 0] };
    let (mut all, mut one) = (vec![], vec![]);
    for position in 0..POSITIONS {
        for (when, page, to) in [(20, 0, 2), (PAGE + 18, 1, 0)] {
            if moves && position == when {
                let [from, into] = [tables[page], to].map(|page| (page * PAGE) as u64);
                executor.copy_rows(StateRole::Appended, from, into, PAGE as u64).unwrap();
                executor.fill_rows(StateRole::Appended, from, PAGE as u64, 0xff).unwrap();
                tables[page] = to;
            }
        }
        let step = StepRows {
            tokens: vec![position * 37 % 96],
            positions: vec![position],
            sequences: vec![0],
            rows: vec![tables[(position / PAGE) as usize] * PAGE + position % PAGE],
            tables: tables.into(),
            lengths: vec![position + 1, 0],
            wanted: vec![0],
        };
        executor.forward(0, &step).unwrap();
        executor.read_f32(0, 0..1, &mut one).unwrap();
        all.extend_from_slice(&one);
    }
    all
}

#[test]
#[ignore = "run by another in a process that has the stubs"]
fn pages_that_move() {
    let Ok(path) = std::env::var("SINTER_TEST_MODEL") else { return };
    let file = Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap());
    let at = two_sequences();
    let executor = |eager| {
        let device = DeviceOptions { eager, ..DeviceOptions::default() };
        sinter::model::executor(&file, None, &at, Purpose::Score, &device).unwrap()
    };
    let expected = step_by_step(&mut executor(true), false);
    assert!(expected.iter().all(|x| x.is_finite()));
    assert!(step_by_step(&mut executor(true), true) == expected, "launch by launch");
    assert!(step_by_step(&mut executor(false), true) == expected, "as a graph");
}

/// Each call in a thread of its own, which has set no device; or on the thread that made the device.
fn called<T: Send>(elsewhere: bool, call: impl FnOnce() -> T + Send) -> T {
    match elsewhere {
        true => std::thread::scope(|scope| scope.spawn(call).join().unwrap()),
        false => call(),
    }
}

/// What a device leaves of some steps, each call of which is made by `called`.
fn steps_of(
    devices: &mut [Box<dyn Device>],
    plan: &LoadedPlan,
    elsewhere: bool,
) -> Result<Vec<Vec<u8>>, DeviceError> {
    let (program, at) = (&plan.programs[0], Syms { t: 1, r: 1 });
    let calls = 0..program.calls.len();
    let result = program.results[0];
    let bytes = program.buffers[result as usize].ty.bytes(&at);
    let mut left = vec![];
    // The second replays what was captured, and is compared with its launches; then there are replays alone.
    for position in 0..4i32 {
        for device in devices.iter_mut() {
            for input in &program.inputs {
                let value = match input.name.as_str() {
                    "lengths" => position + 1,
                    "tokens" | "positions" | "rows" => position,
                    _ => 0,
                };
                let room = program.buffers[input.buffer as usize].ty.bytes(&at) as usize;
                let mut given = vec![0; room];
                given[..4].copy_from_slice(&value.to_le_bytes());
                called(elsewhere, || device.write(0, BufRef::Arena(input.buffer), &given))?;
            }
            // What is written is on its way before, so the launch is the first call of its thread.
            called(elsewhere, || device.wait(Ticket(0)))?;
        }
        let timed = position == 3;
        let work = Submission { program: 0, calls: calls.clone(), at, timed };
        let mut tickets = vec![];
        for device in devices.iter_mut() {
            tickets.push(called(elsewhere, || device.submit(&work))?);
        }
        for (device, ticket) in devices.iter_mut().zip(tickets) {
            called(elsewhere, || device.wait(ticket))?;
            let mut logits = vec![0; bytes as usize];
            called(elsewhere, || device.read(0, BufRef::Arena(result), 0, &mut logits))?;
            let viewed = called(elsewhere, || {
                let mut room = vec![];
                let view = device.view(ticket, (0, BufRef::Arena(result)), 0, bytes as usize, &mut room);
                view.map(|bytes| bytes.to_vec())
            })?;
            assert_eq!(viewed, logits);
            left.push(logits);
        }
    }
    for device in devices.iter_mut() {
        assert!(called(elsewhere, || device.timings())?.len() > 8);
        called(elsewhere, || device.copy_rows(StateRole::Appended, 0, PAGE as u64, PAGE as u64))?;
        called(elsewhere, || device.fill_rows(StateRole::Appended, 0, PAGE as u64, 0xff))?;
        called(elsewhere, || device.wait(Ticket(0)))?;
    }
    Ok(left)
}

#[test]
#[ignore = "run by another in a process that has the stubs"]
fn steps_of_two_devices() {
    let Ok(path) = std::env::var("SINTER_TEST_MODEL") else { return };
    let file = Arc::new(sinter::model::open(Some(Path::new(&path))).unwrap());
    let plan = sinter::model::plan(&file, None, &two_sequences(), Purpose::Score).unwrap();
    let plan = Arc::new(LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap());
    let devices = |gpus: &[usize]| -> Vec<Box<dyn Device>> {
        let opened = gpus.iter().map(|gpu| {
            let options = DeviceOptions { gpu: Some(*gpu), ..DeviceOptions::default() };
            open(&plan, Arc::clone(&file), &options).unwrap()
        });
        opened.collect()
    };
    let one = steps_of(&mut devices(&[0]), &plan, false).unwrap();
    assert!(one.windows(2).all(|pair| pair[0] != pair[1]), "steps differ");
    let twice: Vec<Vec<u8>> = one.iter().flat_map(|step| [step.clone(), step.clone()]).collect();
    for elsewhere in [false, true] {
        let mut two = devices(&[0, 1]);
        assert!(steps_of(&mut two, &plan, elsewhere).unwrap() == twice, "{elsewhere}");
        called(elsewhere, move || drop(two));
    }
}

/// Whatever thread calls has the device that is meant, though it made none, or made another last.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn any_thread_may_call_any_device() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    compile_ahead(folder, "gfx1100", &codes(&file, &two_sequences(), Purpose::Score));
    let variables = [("SINTER_TEST_MODEL", path.as_str()), ("SINTER_STUB_DEVICES", "2")];
    let ran = in_a_process(folder, "steps_of_two_devices", &variables);
    // Of five devices in all: one replay to compare, and one alone.
    assert_eq!(ran.calls("hipGraphLaunch"), 10);
}

fn two_sequences() -> Options {
    Options { chunk: 1, context: Some(3 * PAGE as u64), sequences: 2, ..options("gfx1100") }
}

/// A graph that was captured with one block table follows another.
#[test]
#[cfg_attr(debug_assertions, ignore = "the driver's calls are the same as in an optimised build")]
fn one_graph_follows_pages_that_move() {
    let Some(folder) = stubs() else { return };
    let (path, file) = tiny(folder);
    compile_ahead(folder, "gfx1100", &codes(&file, &two_sequences(), Purpose::Score));
    let ran = in_a_process(folder, "pages_that_move", &[("SINTER_TEST_MODEL", &path)]);
    assert_eq!(ran.calls("hipGraphInstantiateWithFlags"), 1);
    assert_eq!(ran.calls("hipGraphLaunch"), i64::from(POSITIONS) - 1);
    assert!(ran.calls("hipMemcpyDtoDAsync") > 0);
}
