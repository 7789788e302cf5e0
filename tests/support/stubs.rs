//! The real command on stubs of GPU drivers (`tests/host`), and what should not be so when a call of theirs fails.

use crate::command::{self, text};
use crate::lanes::{self, build_lanes, clang, write_headers};
use crate::synthetic::{Model, Shape, q4_k_m, shape};
use sinter::codegen::spec::{Code, HipCode};
use sinter::compile::{Options, Purpose, compile};
use sinter::gguf::GgufFile;
use sinter::target::Target;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// The functions that the runtime takes from the libraries.
pub const API: &str = include_str!("../../src/runtime/hip/api.rs");

/// Says something that is seen where tests that pass keep what they print to themselves.
pub fn say(what: &str) {
    _ = writeln!(std::io::stderr(), "{what}");
}

/// Where the stubs are, which are built once; none, said so, where they cannot be.
pub fn stubs() -> Option<&'static Path> {
    static STUBS: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = STUBS.get_or_init(|| {
        if let Err(why) = lanes::sanitizers() {
            say(&format!("skipped: {why}"));
            return None;
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME"));
        _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(folder.join("models")).unwrap();
        build_lanes(&folder, false).unwrap();
        write_headers(&folder);
        build(&folder, "rocm", "hip.cpp", &[]);
        build(&folder, "rocm", "hiprtc.cpp", &[]);
        Some(folder)
    });
    built.as_deref()
}

/// Builds one of the stubs as if ROCm were in a folder of this name.
pub fn build(folder: &Path, name: &str, source: &str, flags: &[&str]) {
    use hip_sys::hipDeviceProp_tR0600 as Properties;
    let lib = folder.join(name).join("lib");
    std::fs::create_dir_all(&lib).unwrap();
    let bytes = format!("-DPROPERTIES_BYTES={}", size_of::<Properties>());
    let arch = format!("-DPROPERTIES_ARCH={}", std::mem::offset_of!(Properties, gcnArchName));
    let lanes = lanes::text(&folder.join("liblanes.so"));
    let path = format!("-Wl,-rpath,{}", lanes::text(folder));
    let library = match source {
        "hip.cpp" => "libamdhip64.so",
        "cuda.cpp" => "libcuda.so.1",
        _ => "libhiprtc.so",
    };
    let library = lib.join(library);
    let [source, out] = [lanes::sources().join(source), library].map(|path| lanes::text(&path));
    // The runtime unloads libraries; the stubs stay, and count on.
    let args = ["-O0", "-Wl,-z,nodelete", &bytes, &arch, &source, "-o", &out, &lanes, &path];
    clang(&[&args[..], flags].concat(), false).unwrap();
}

/// What a command did, and what the stubs counted.
pub struct Ran {
    pub output: Output,
    pub counts: BTreeMap<String, i64>,
}

impl Ran {
    pub fn calls(&self, name: &str) -> i64 {
        self.counts.get(&format!("calls {name}")).copied().unwrap_or(0)
    }

    /// What was left behind.
    pub fn leaks(&self) -> Vec<String> {
        if self.counts.is_empty() {
            return vec!["all, as it did not end by itself".into()];
        }
        let live = self.counts.iter().filter(|(name, n)| name.starts_with("live ") && **n != 0);
        live.map(|(name, n)| format!("{name}: {n}")).collect()
    }
}

/// Runs the command on the stubs.
pub fn sinter(folder: &Path, args: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = command::sinter();
    command.args(args);
    on_stubs(folder, command, variables)
}

pub fn on_stubs(folder: &Path, mut command: Command, variables: &[(&str, &str)]) -> Ran {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let log = folder.join(format!("log_{}", RUNS.fetch_add(1, Ordering::Relaxed)));
    command
        .env("ROCM_PATH", folder.join("rocm"))
        .env("LD_LIBRARY_PATH", folder.join("rocm/lib"))
        .env("SINTER_STUB_FOLDER", folder)
        .env("SINTER_STUB_LOG", &log)
        .env("SINTER_KERNEL_CACHE", "off")
        .envs(variables.iter().copied());
    let output = command.output().unwrap();
    let counted = std::fs::read_to_string(&log).unwrap_or_default();
    let counts = counted.lines().filter_map(|line| {
        let (name, n) = line.rsplit_once(' ')?;
        Some((name.to_string(), n.parse().ok()?))
    });
    Ran { output, counts: counts.collect() }
}

/// Runs one of the ignored tests in a process of its own, which has the stubs.
pub fn process(folder: &Path, test: &str, variables: &[(&str, &str)]) -> Ran {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    on_stubs(folder, command, variables)
}

/// The same, of a test that passes and leaves nothing behind.
pub fn in_a_process(folder: &Path, test: &str, variables: &[(&str, &str)]) -> Ran {
    let ran = process(folder, test, variables);
    let said = text(&ran.output.stdout) + &text(&ran.output.stderr);
    assert!(ran.output.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(ran.leaks(), [""; 0]);
    ran
}

/// Compiles kernels before a command asks for them one by one, which takes longer.
pub fn compile_ahead(folder: &Path, arch: &str, codes: &[HipCode]) {
    let object = |code: &HipCode| {
        let text = format!("{arch}\n{}", code.source);
        // As hiprtc.cpp finds it: FNV-1a.
        let hash = text
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, c| (h ^ u64::from(c)).wrapping_mul(0x100_0000_01b3));
        folder.join(format!("{hash:016x}.code"))
    };
    let new: Vec<HipCode> = codes.iter().filter(|code| !object(code).exists()).cloned().collect();
    for (code, library, symbol) in lanes::compile(folder, arch, false, &new) {
        let written = library.with_extension(&symbol);
        std::fs::write(&written, format!("lanes:{}:{symbol}:{}\n", lanes::text(&library), code.entry))
            .unwrap();
        // At once, as others look for it.
        std::fs::rename(written, object(&code)).unwrap();
    }
}

/// The kernels of a model's programs.
pub fn codes(file: &GgufFile, options: &Options, purpose: Purpose) -> Vec<HipCode> {
    let compiled = compile(file.gguf(), options, purpose).unwrap();
    let launches = compiled.iter().flat_map(|c| &c.program.kernels).flat_map(|kernel| &kernel.launches);
    let code = |code: &Code| match code {
        Code::Hip(code) => code.clone(),
        Code::Cpu(_) => panic!("a kernel of another device"),
    };
    launches.map(|launch| code(&launch.code)).collect()
}

pub fn options(arch: &str) -> Options {
    Options::new(Target::gpu(arch).unwrap())
}

/// A model of one layer, and the folder that it is in.
pub fn tiny(folder: &Path) -> (String, Arc<GgufFile>) {
    static MODEL: OnceLock<Arc<GgufFile>> = OnceLock::new();
    let path = folder.join("models/tiny.gguf");
    let file = MODEL.get_or_init(|| {
        let shape = Shape { layers: 1, width: 256, ffn: 256, vocab: 96, ..shape("tiny-llama") };
        let model = Model::new(&shape, q4_k_m);
        std::fs::write(&path, model.bytes()).unwrap();
        model.file()
    });
    (lanes::text(&path), Arc::clone(file))
}

/// Tokens as the command takes them.
pub fn tokens(n: u64) -> String {
    (0..n).map(|i| (i * 37 % 96).to_string()).collect::<Vec<_>>().join(",")
}

/// Names of the functions of AMD's libraries that the runtime knows.
pub fn functions() -> Vec<&'static str> {
    let names: Vec<&str> = API.split("\", \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let mut names: Vec<&str> = names.into_iter().filter(|name| name.starts_with("hip")).collect();
    names.extend(["hipSetDevice", "hipGetDevicePropertiesR0600"]);
    assert!(names.len() > 40, "{names:?}");
    names
}

/// What gives something back. If that fails, the work is done all the same.
pub const GIVE_BACK: [&str; 8] = [
    "hipFree",
    "hipHostFree",
    "hipStreamDestroy",
    "hipEventDestroy",
    "hipModuleUnload",
    "hipGraphDestroy",
    "hipGraphExecDestroy",
    "hiprtcDestroyProgram",
];

/// What a plan of several streams calls besides.
pub const STREAMS: [&str; 1] = ["hipStreamWaitEvent"];

/// Runs a command with each of some faults: the call of a name that fails, by its number. What it does without any is given.
pub fn try_faults(folder: &Path, args: &[&str], whole: &Ran, faults: &[(&str, i64)]) {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(vec![]);
    std::thread::scope(|scope| {
        let work = || {
            while let Some((name, n)) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                let fault = format!("{name}:{n}");
                let ran = sinter(folder, args, &[("SINTER_STUB_FAIL", &fault)]);
                // The last of these are of what ends the stream.
                let ends = ["hipSetDevice", "hipStreamSynchronize"].contains(name) && *n == whole.calls(name);
                let gives_back = GIVE_BACK.contains(name) || ends;
                if let Some(why) = what_is_wrong(&ran, name, gives_back, whole) {
                    wrong.lock().unwrap().push(format!("{fault}: {why}\n{}", text(&ran.output.stderr)));
                }
            }
        };
        (0..2).for_each(|_| _ = scope.spawn(work));
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), faults.len(), wrong.join("\n"));
}

/// Calls that make a graph.
pub const CAPTURES: [&str; 3] =
    ["hipStreamBeginCapture", "hipStreamEndCapture", "hipGraphInstantiateWithFlags"];

/// Calls that only steps make, and what reads what they left.
pub const OF_STEPS: [&str; 6] = [
    "hipModuleLaunchKernel",
    "hipGraphLaunch",
    "hipStreamWaitEvent",
    "hipMemcpyDtoHAsync",
    "hipMemcpyDtoDAsync",
    "hipEventElapsedTime",
];

/// What should not be so when a call of this name failed.
pub fn what_is_wrong(ran: &Ran, name: &str, gives_back: bool, whole: &Ran) -> Option<String> {
    let said = text(&ran.output.stderr);
    // A graph that cannot be made is gone without, and so is a launch for one.
    let warns = || said.matches("WARN").count() == 1 && said.contains("each launch is made by itself");
    let same = || ran.output.status.success() && ran.output.stdout == whole.output.stdout;
    let gives_back = gives_back || warns() && said.contains("could not be made");
    if CAPTURES.contains(&name) && !(warns() && same()) {
        return Some("without a graph it is not the same, or not said".into());
    }
    if ran.counts.is_empty() {
        return Some(format!("it ended by {:?}", ran.output.status));
    }
    if !ran.leaks().is_empty() {
        return Some(format!("it leaves {:?}", ran.leaks()));
    }
    if said.contains("panicked") {
        return Some("it panics".into());
    }
    // Memory that is not there is told by what it is for.
    let named = if name == "hipMalloc" { "of weights, which the driver refuses though" } else { name };
    if !said.contains(named) {
        return Some("the call is not named".into());
    }
    if gives_back {
        return (!same() || said.matches("WARN").count() != 1)
            .then(|| "not the same with one warning".into());
    }
    if ran.output.status.code() != Some(1) || said.matches("error: ").count() != 1 {
        return Some("it is not one error".into());
    }
    // Those of hipMemcpyHtoDAsync and hipStreamSynchronize are of weights, too.
    if OF_STEPS.contains(&name) && !(said.contains(", in a step of t") && said.contains(" with T=")) {
        return Some("the step is not named".into());
    }
    if name == "hipModuleLaunchKernel" && !(said.contains(" of \"") && said.contains("launch 0")) {
        return Some("the kernel, its node and the launch are not named".into());
    }
    None
}
