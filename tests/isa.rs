//! What the kernels become on AMD's GPUs. What the host writes before each step must not be read through the scalar cache: copies do not
//! invalidate that, so a graph that is replayed would see the step before. Needs clang-19.
//!
//! Machine code does not tell what a load is of, as registers are used again. LLVM's code, from which it is made, does: there a pointer
//! keeps its name. So in that all loads of step data must be those of `load_step`, and the machine code must go past the caches as often.

mod common;
#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use sinter::codegen::spec::{Code, HipCode, LaunchSpec, Program};
use sinter::codegen::{self, Layouts};
use sinter::compile::{Options, Purpose, compile};
use sinter::ir::{DType, verify};
use sinter::runtime::hip::{HEADERS, clang_flags};
use sinter::target::{AMD_RELATIVES, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use synthetic::{Model, Shape, q4_k_m, shape, uniform};

/// Architectures, and how a load ends there that goes past the caches of a compute unit.
const ARCHS: [(&str, &str); 8] = [
    ("gfx900", " glc"),
    ("gfx906", " glc"),
    ("gfx90a", " glc"),
    ("gfx942", " sc1"),
    ("gfx1030", " glc dlc"),
    ("gfx1100", " glc"),
    ("gfx1151", " glc"),
    ("gfx1201", " scope:SCOPE_DEV"),
];

/// Operations that follow step data in no model.
const OTHERS: &str =
    "graph @others(%x: f32[T,64], %w: f32[5,20,64], %ids: i32[T], %rows: i32[R]) sym T<=8, R<=8 {
  %0 = matmul_id %x, %w, %ids : f32[T,20]
  %1 = quant_act %x : q8_act[T,64]
  %2 = get_rows %1, %rows : q8_act[R,64]
  %3 = quant_act %x : q16_act[T,64]
  %4 = get_rows %3, %rows : q16_act[R,64]
  return %0, %2, %4
}";

/// A kernel, and which of its arguments are step data.
struct Kernel {
    code: HipCode,
    step: BTreeSet<usize>,
}

/// The kernels that take step data: of programs of one token, of eight and of a prompt, whose attention turns what it needs, or does not,
/// or which are not fused; and of graphs that no model has.
fn kernels(arch: &str) -> Vec<Kernel> {
    let model = Model::new(&shape("tiny-llama"), uniform(DType::Q4_0)).description();
    // Of a single sequence it is not read which one a token is of.
    let options = Options { chunk: 64, sequences: 2, ..Options::new(Target::gpu(arch).unwrap()) };
    let all = || options.pipeline.clone();
    let mut programs = vec![];
    for pipeline in [all(), all().select(&["-rope_attention"]).unwrap(), all().without_fusions()] {
        let options = Options { pipeline, ..options.clone() };
        let compiled = compile(&model, &options, Purpose::Generate).unwrap();
        let tokens: Vec<u64> = compiled.iter().map(|c| c.program.bounds.t).collect();
        assert!([1, 8, 64].iter().all(|t| tokens.contains(t)), "{tokens:?}");
        programs.extend(compiled.into_iter().map(|c| c.program));
    }
    for graph in [common::input("gated_scan"), common::parse(OTHERS)] {
        let graph = verify(graph).unwrap();
        programs.push(codegen::generate(&graph, &options.target, &Layouts::default()).unwrap());
    }
    let mut kernels = BTreeMap::new();
    programs.iter().for_each(|program| take_kernels(program, &mut kernels));
    kernels.into_values().collect()
}

/// Adds the kernels of a program that take step data: inputs of whole numbers. Each is taken by some.
fn take_kernels(program: &Program, kernels: &mut BTreeMap<String, Kernel>) {
    let inputs = program.inputs.iter().map(|(_, buffer)| *buffer);
    let inputs: BTreeSet<u32> =
        inputs.filter(|buffer| program.buffers[*buffer as usize].ty.dtype == DType::I32).collect();
    let mut taken = BTreeSet::new();
    for call in &program.calls {
        let step = call.args.iter().enumerate().filter(|(_, buffer)| inputs.contains(buffer));
        let step: BTreeSet<usize> = step.map(|(i, buffer)| (i, taken.insert(*buffer)).0).collect();
        for launch in &program.kernels[call.kernel as usize].launches {
            let Code::Hip(code) = &launch.code else { panic!("a kernel of another device") };
            if !step.is_empty() {
                let new = || Kernel { code: code.clone(), step: BTreeSet::new() };
                kernels.entry(code.source.clone()).or_insert_with(new).step.extend(&step);
            }
        }
    }
    assert_eq!(taken, inputs, "{}", program.name);
}

/// What clang makes of a file of a folder, in text.
fn clang(folder: &Path, args: &[String], file: &str) -> String {
    let out = Command::new("clang-19")
        .args(args)
        .args(["-S", "-o", "-", file])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// LLVM's code of a source, as the back end gets it.
fn optimised(folder: &Path, arch: &str, name: &str, source: &str) -> String {
    let file = format!("{name}.hip");
    std::fs::write(folder.join(&file), source).unwrap();
    clang(folder, &[clang_flags(arch), vec!["-emit-llvm".into()]].concat(), &file)
}

/// What the back end makes of that.
fn assembly(folder: &Path, arch: &str, name: &str, code: &str) -> String {
    let file = format!("{name}.ll");
    std::fs::write(folder.join(&file), code).unwrap();
    let cpu = format!("-mcpu={arch}");
    let args = ["--target=amdgcn-amd-amdhsa", &cpu, "-nogpulib", "-O3", "-Xclang", "-disable-llvm-passes"];
    clang(folder, &args.map(String::from), &file)
}

/// How many loads of step data a kernel has in LLVM's code, all by `load_step`; or what else it does there with a pointer to some.
fn loads(code: &str, step: &BTreeSet<usize>) -> Result<usize, String> {
    /// Values, as `%12`.
    fn values(line: &str) -> impl Iterator<Item = &str> {
        line.split([' ', ',', '(', ')', '[', ']']).filter(|word| word.starts_with('%'))
    }
    let kernel = code.lines().skip_while(|line| !line.contains(" amdgpu_kernel "));
    let mut lines = kernel.take_while(|line| *line != "}").map(str::trim);
    let arguments: Vec<&str> = values(lines.next().unwrap()).collect();
    let lines: Vec<&str> = lines.collect();
    let mut pointers: BTreeSet<&str> = step.iter().map(|i| arguments[*i]).collect();
    // A pointer may go round a loop before the line that it comes from.
    loop {
        let before = pointers.len();
        let (mut loads, mut other) = (0, None);
        for line in &lines {
            let (to, what) = line.split_once(" = ").unwrap_or(("", line));
            if !values(what).any(|value| pointers.contains(value)) {
                continue;
            }
            match what.split(' ').next().unwrap() {
                "getelementptr" | "phi" | "select" | "addrspacecast" | "ptrtoint" | "inttoptr" => {
                    _ = pointers.insert(to)
                }
                "load" if what.starts_with("load atomic i32, ") && what.contains(" syncscope(\"agent") => {
                    loads += 1
                }
                _ => other = other.or(Some(line)),
            }
        }
        if pointers.len() == before {
            return other.map_or(Ok(loads), |line| Err(line.to_string()));
        }
    }
}

/// Does work `0..count`, on all cores.
fn on_all_cores(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let some = || {
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                i if i < count => work(i),
                _ => return,
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        (0..threads).for_each(|_| _ = scope.spawn(some));
    });
}

/// A folder that has the headers, each after a change.
fn headers(change: impl Fn(&str, &str) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in HEADERS {
        std::fs::write(folder.path().join(name), change(name, text)).unwrap();
    }
    folder
}

/// Whether there is a compiler.
fn has_clang() -> bool {
    let is_there = Command::new("clang-19").arg("--version").output().is_ok();
    if !is_there {
        _ = writeln!(std::io::stderr(), "skipped: there is no clang-19 here");
    }
    is_there
}

#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn step_data_is_never_a_scalar_load() {
    if !has_clang() {
        return;
    }
    let folder = headers(|_, text| text.into());
    let all: Vec<_> = ARCHS
        .into_iter()
        .flat_map(|arch| kernels(arch.0).into_iter().map(move |kernel| (arch, kernel)))
        .collect();
    let (wrong, total) = (Mutex::new(vec![]), AtomicUsize::new(0));
    on_all_cores(all.len(), |i| {
        let ((arch, past), Kernel { code, step }) = &all[i];
        let optimised = optimised(folder.path(), arch, &i.to_string(), &code.source);
        let assembly = assembly(folder.path(), arch, &i.to_string(), &optimised);
        let past = assembly.lines().filter(|line| line.contains("load_") && line.ends_with(past)).count();
        match loads(&optimised, step) {
            Ok(loads) if loads == past => _ = total.fetch_add(loads, Ordering::Relaxed),
            found => wrong
                .lock()
                .unwrap()
                .push(format!("{arch}: {}: {found:?}, {past} go past the caches", code.entry)),
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(total.into_inner() > 100 * ARCHS.len(), "few loads are seen");
}

/// A prompt's kernels for the last relative of each of the architectures all of whose kernels are in the table, as LLVM knows few differences between the others.
#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn kernels_compile_for_relatives() {
    if !has_clang() {
        return;
    }
    let folder = headers(|_, text| text.into());
    let shape = Shape { layers: 3, width: 256, ffn: 512, ..shape("tiny-llama") };
    let format = |name: &str| if name == "output.weight" { DType::BF16 } else { q4_k_m(name) };
    let model = Model::new(&shape, format).description();
    let sources = |arch: &'static str| {
        let options = Options { chunk: 64, ..Options::new(Target::gpu(arch).unwrap()) };
        let compiled = compile(&model, &options, Purpose::Score).unwrap();
        let prompt = compiled.iter().find(|c| c.program.bounds.t == 64).unwrap();
        let of = |launch: &LaunchSpec| match &launch.code {
            Code::Hip(code) => (arch, code.source.clone()),
            _ => panic!("a kernel of another device"),
        };
        prompt.program.kernels.iter().flat_map(|kernel| &kernel.launches).map(of).collect::<BTreeSet<_>>()
    };
    let last: BTreeMap<_, _> = AMD_RELATIVES.map(|(arch, of)| (of, arch)).into();
    let all: Vec<_> = last.values().flat_map(|arch| sources(arch)).collect();
    assert!(all.len() > 8 * last.len(), "{}", all.len());
    on_all_cores(all.len(), |i| {
        let (arch, source) = &all[i];
        let file = format!("{i}.hip");
        std::fs::write(folder.path().join(&file), source).unwrap();
        clang(folder.path(), &clang_flags(arch), &file);
    });
}

/// Whether a file includes a header.
fn includes(text: &str, header: &str) -> bool {
    let direct = |(name, _): &&(&str, &str)| text.contains(&format!("#include \"{name}\""));
    HEADERS.iter().filter(direct).any(|(name, text)| *name == header || includes(text, header))
}

/// Wherever kernels read step data, a plain load in its place is seen: each in turn.
#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn any_plain_load_of_step_data_is_seen() {
    const PLAIN: &str = "DEVICE i32 plain_step(const i32* from) { return *from; }
DEVICE i32 plain_index(const i32* from, i32 below) { return *from < 0 ? 0 : least(*from, below - 1); }
";
    if !has_clang() {
        return;
    }
    let kernels = kernels("gfx1100");
    // Of a header that has one, or of a kernel's own source: where it is, and the kernels in which it may show.
    let mut planted = vec![];
    let own = kernels.iter().map(|kernel| ("", kernel.code.source.as_str()));
    for (header, text) in HEADERS.iter().copied().filter(|(name, _)| *name != "device.h").chain(own) {
        let may_show = |kernel: &&Kernel| match header {
            "" => kernel.code.source == text,
            _ => includes(&kernel.code.source, header),
        };
        let found: Vec<&Kernel> = kernels.iter().filter(may_show).collect();
        let calls = ["load_step(", "load_index("].into_iter().flat_map(|call| text.match_indices(call));
        planted.extend(calls.map(|(at, _)| {
            let changed = format!("{}plain{}", &text[..at], &text[at + "load".len()..]);
            (header, text[..at].lines().count(), changed, found.clone())
        }));
    }
    assert!(planted.len() > 25, "{}", planted.len());
    let unseen = Mutex::new(vec![]);
    on_all_cores(planted.len(), |i| {
        let (header, line, changed, kernels) = &planted[i];
        let folder = headers(|name, text| match name {
            "device.h" => format!("{text}{PLAIN}"),
            _ if name == *header => changed.clone(),
            _ => text.into(),
        });
        let is_seen = kernels.iter().any(|Kernel { code, step }| {
            let source = if header.is_empty() { changed } else { &code.source };
            loads(&optimised(folder.path(), "gfx1100", "kernel", source), step).is_err()
        });
        if !is_seen {
            unseen.lock().unwrap().push(format!("{header}:{line} of {} kernels", kernels.len()));
        }
    });
    assert_eq!(unseen.into_inner().unwrap(), [""; 0]);
}
