//! What kernels take of a GPU, without one: `tests/snapshots/kernels.txt` has a row for each kernel of the default model and of an 8B on each
//! architecture. The rows are of today's sources, or the test fails; a sample of them is compiled anew each time, and all of them with
//! `SINTER_TABLE=all`. Where kernels changed,
//!
//! ```sh
//! cargo test --release --test kernel_table -- --ignored make_the_table
//! ```
//!
//! compiles what is new and writes the table again (with `SINTER_TABLE=all`, all of it). It needs clang-19 and NVIDIA's nvrtc 13.0.

#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use sinter::codegen::spec::{Code, HipCode};
use sinter::compile::{Options, Purpose, compile};
use sinter::gguf::Gguf;
use sinter::ir::DType;
use sinter::runtime::Progress;
use sinter::runtime::hip::{Compiler, HEADERS, Platform, clang_flags};
use sinter::target::{AMD, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use synthetic::{Model, Shape, q4_k_m, shape, uniform};

/// The architectures that are targets, and what kernels are compiled for: NVIDIA's with all that it has.
fn archs() -> impl Iterator<Item = (&'static str, &'static str)> {
    AMD.into_iter().map(|arch| (arch, arch)).chain([("sm_90", "sm_90a")])
}

/// Kernels that may take scratch memory, and spill registers to it. Those of a single token never may.
struct Spills {
    archs: &'static [&'static str],
    /// Of programs of so many tokens.
    tokens: RangeInclusive<u64>,
    /// How their labels begin, and their names.
    labels: &'static [&'static str],
    names: &'static [&'static str],
    /// The most bytes of a lane.
    most: u32,
    why: &'static str,
}

const MAY_SPILL: [Spills; 5] = [
    Spills {
        archs: &["gfx1030"],
        tokens: 8..=8,
        labels: &["8b exact"],
        names: &["matmul_swiglu"],
        most: 76,
        why: "18 registers of 274, of floats: neither loads that wait nor loops that stay rolled change it",
    },
    Spills {
        archs: &["sm_90a"],
        tokens: 64..=64,
        labels: &["8b exact"],
        names: &["attention"],
        most: 8,
        why: "8 bytes of stack, so that two blocks share a multiprocessor",
    },
    Spills {
        archs: &["gfx906"],
        tokens: 8..=8,
        labels: &["8b"],
        names: &["matmul_swiglu"],
        most: 8,
        why: "one register of 257",
    },
    Spills {
        archs: &["sm_90a"],
        tokens: 2..=8,
        labels: &["13m t", "8b t"],
        names: &["matmul_swiglu", "dequant_matmul", "merge"],
        most: 96,
        why: "on matrix units, of 128 registers: with 168, which spill nothing, gates and ups of an 8B in two bytes take 44 us for 38",
    },
    Spills {
        archs: &["sm_90a"],
        tokens: 64..=512,
        labels: &["8b in bytes"],
        names: &["matmul_swiglu", "dequant_matmul", "merge"],
        most: 48,
        why: "prompts: three blocks of a multiprocessor measured faster than two, which spill nothing",
    },
];

const REMAKE: &str =
    "run `cargo test --release --test kernel_table -- --ignored make_the_table`, and read what it changed";

fn say(why: &str) {
    _ = writeln!(std::io::stderr(), "{why}");
}

fn place() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/kernels.txt")
}

/// A kernel on an architecture.
#[derive(Clone, Debug)]
struct Kernel {
    /// Of everything that its machine code follows from but the compiler: the source without comments, what it includes, flags.
    hash: String,
    /// The architecture as its compiler is told.
    arch: &'static str,
    /// The model and the most tokens of the first program that has it, and what it takes.
    label: String,
    /// The most tokens of that program.
    tokens: u64,
    code: HipCode,
}

/// A header and those that it includes, by name.
fn included(text: &str, all: &mut BTreeSet<&'static str>) {
    for (name, header) in HEADERS {
        if text.contains(&format!("#include \"{name}\"")) && all.insert(name) {
            included(header, all);
        }
    }
}

fn hash(arch: &str, source: &str) -> String {
    let code: String = source.lines().filter(|line| !line.starts_with("//")).collect();
    let mut headers = BTreeSet::new();
    included(source, &mut headers);
    let mut hasher = blake3::Hasher::new();
    let flags = if arch.starts_with("gfx") { clang_flags(arch) } else { vec![arch.into()] };
    let texts = HEADERS.iter().filter(|(name, _)| headers.contains(name)).map(|(_, text)| *text);
    for part in flags.iter().map(String::as_str).chain([code.as_str()]).chain(texts) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..16].to_string()
}

/// All kernels of the models, once each per architecture.
fn kernels() -> Vec<Kernel> {
    let embedded = sinter::model::embedded().unwrap();
    // Layers beyond the first few have the same kernels.
    let large = Model::new(&Shape { layers: 4, ..shape("llama-3.1-8b") }, q4_k_m).description();
    let of_1b =
        |dtype| Model::new(&Shape { layers: 2, ..shape("llama-3.2-1b") }, uniform(dtype)).description();
    let (halves, bfloats) = (of_1b(DType::F16), of_1b(DType::BF16));
    let (mut seen, mut all) = (BTreeSet::new(), vec![]);
    for (target, arch) in archs() {
        let options = Options::new(Target::named(target).unwrap());
        let greedy = Options { greedy: true, ..options.clone() };
        let several = Options { sequences: 8, ..options.clone() };
        let mut in_bytes = options.clone();
        in_bytes.target.prompt_activations = DType::Q8Act;
        let models: [(&str, &Gguf, Options); 10] = [
            ("13m", embedded.gguf(), options.clone()),
            ("13m exact", embedded.gguf(), options.clone().exact()),
            ("8b", &large, options.clone()),
            ("13m greedy", embedded.gguf(), greedy.clone()),
            ("8b exact", &large, options.clone().exact()),
            ("8b greedy", &large, greedy),
            ("8b of 8 sequences", &large, several),
            ("1b f16", &halves, options.clone()),
            ("1b bf16", &bfloats, options),
            ("8b in bytes", &large, in_bytes),
        ];
        for (name, gguf, options) in models {
            for compiled in compile(gguf, &options, Purpose::Generate).unwrap() {
                let tokens = compiled.program.bounds.t;
                for launch in compiled.program.kernels.iter().flat_map(|kernel| &kernel.launches) {
                    let Code::Hip(code) = &launch.code else { panic!("a kernel of another device") };
                    let hash = hash(arch, &code.source);
                    if !seen.insert(hash.clone()) {
                        continue;
                    }
                    // Lines as `// a0 f32[T,512]`.
                    let arg = |line: &'_ str| {
                        let (name, ty) = line.strip_prefix("// a")?.split_once(' ')?;
                        name.bytes().all(|c| c.is_ascii_digit()).then(|| ty.to_string())
                    };
                    let args: Vec<String> = code.source.lines().filter_map(arg).collect();
                    let label = format!("{name} t{tokens} {}({})", code.entry, args.join(", "));
                    all.push(Kernel { hash, arch, label, tokens, code: code.clone() });
                }
            }
        }
    }
    all
}

/// What a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Takes {
    /// Vector registers of a lane, with those for accumulators.
    registers: u32,
    /// Those of a wave, where it has some.
    scalar: u32,
    /// Bytes of a block's shared memory.
    shared: u32,
    /// Bytes of memory of a lane beyond its registers.
    scratch: u32,
    /// Vector and scalar registers that are kept elsewhere at times. NVIDIA's show in `scratch`.
    spills: [u32; 2],
    /// Bytes of machine code.
    code: u32,
}

impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Takes { registers, scalar, shared, scratch, spills: [vector, scalars], code } = self;
        write!(f, "{registers:4} {scalar:4} {shared:6} {scratch:5} {vector:4} {scalars:4} {code:7}")
    }
}

/// A number of a file at a place.
fn number(bytes: &[u8], at: usize, size: usize) -> usize {
    bytes[at..at + size].iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte))
}

/// Offset and size of each section of an ELF file of 64 bits.
fn sections(elf: &[u8]) -> BTreeMap<String, (usize, usize)> {
    let (table, count, names) = (number(elf, 0x28, 8), number(elf, 0x3c, 2), number(elf, 0x3e, 2));
    let field = |section: usize, at: usize, size: usize| number(elf, table + 64 * section + at, size);
    let section = |i: usize| {
        let name = &elf[field(names, 24, 8) + field(i, 0, 4)..];
        let name = name.split(|byte| *byte == 0).next().unwrap();
        (String::from_utf8_lossy(name).into_owned(), (field(i, 24, 8), field(i, 32, 8)))
    };
    (0..count).map(section).collect()
}

/// What the metadata of a code object of one kernel says.
fn takes(arch: &str, entry: &str, elf: &[u8]) -> Takes {
    let sections = sections(elf);
    if arch.starts_with("gfx") {
        // MessagePack: a name, and a number behind it.
        let of = |name: &str| {
            let at = elf.windows(name.len()).position(|at| at == name.as_bytes()).unwrap() + name.len();
            let size = match elf[at] {
                n @ 0..0x80 => return u32::from(n),
                0xcc => 1,
                0xcd => 2,
                0xce => 4,
                other => panic!("{name} is no number but {other:#x}"),
            };
            let digits = elf[at + 1..at + 1 + size].iter();
            digits.fold(0, |n, byte| n << 8 | u32::from(*byte))
        };
        return Takes {
            registers: of(".vgpr_count"),
            scalar: of(".sgpr_count"),
            shared: of(".group_segment_fixed_size"),
            scratch: of(".private_segment_fixed_size"),
            spills: [of(".vgpr_spill_count"), of(".sgpr_spill_count")],
            code: sections[".text"].1 as u32,
        };
    }
    // Records of an attribute, for a function of the file: only the kernel has a least stack (0x12).
    let (start, size) = sections[".nv.info"];
    let (mut at, mut of) = (start, BTreeMap::new());
    while at < start + size {
        let (form, attribute, length) = (elf[at], elf[at + 1], number(elf, at + 2, 2));
        at += 4;
        if form == 4 {
            if length == 8 {
                of.insert((attribute, number(elf, at, 4)), number(elf, at + 4, 4) as u32);
            }
            at += length;
        }
    }
    let kernel = of.keys().find(|(attribute, _)| *attribute == 0x12).unwrap().1;
    Takes {
        registers: of[&(0x2f, kernel)],
        scalar: 0,
        shared: sections.get(&format!(".nv.shared.{entry}")).map_or(0, |(_, size)| *size as u32),
        scratch: of[&(0x12, kernel)],
        spills: [0, 0],
        code: sections[&format!(".text.{entry}")].1 as u32,
    }
}

/// The compilers that rows are made by: of AMD's architectures and of NVIDIA's. None where there is none here.
struct Compilers {
    clang: Option<String>,
    nvrtc: Option<Compiler>,
}

impl Compilers {
    fn here() -> Compilers {
        let said = Command::new("clang-19").arg("--version").output().ok();
        let line =
            said.map(|out| String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or("").to_string());
        // Where it was built does not matter.
        let clang = line
            .and_then(|line| Some(format!("clang {}", line.split_once("version ")?.1.split(' ').next()?)));
        let nvrtc = Compiler::of_platform(Platform::Nvidia).ok();
        Compilers { clang, nvrtc }
    }

    fn name(&self, arch: &str) -> Option<&str> {
        match arch.starts_with("gfx") {
            true => self.clang.as_deref(),
            false => self.nvrtc.as_ref().map(Compiler::name),
        }
    }

    /// Compiles kernels on all cores, without a warning.
    fn compile(&self, kernels: &[&Kernel]) -> Vec<Takes> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in HEADERS {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let (next, all) = (AtomicUsize::new(0), Mutex::new(vec![None; kernels.len()]));
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(Kernel { arch, code, label, .. }) = kernels.get(i) else { return };
                let elf = match &self.nvrtc {
                    Some(nvrtc) if !arch.starts_with("gfx") => {
                        let made = nvrtc.compile(arch, [code], &Progress::default());
                        made.unwrap_or_else(|e| panic!("{arch}: {label}: {e}"))
                            .remove(code.source.as_str())
                            .unwrap()
                    }
                    _ => clang(dir.path(), i, arch, code).unwrap_or_else(|e| panic!("{arch}: {label}: {e}")),
                };
                all.lock().unwrap()[i] = Some(takes(arch, &code.entry, &elf));
            }
        };
        std::thread::scope(|scope| {
            let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
            (0..threads).for_each(|_| _ = scope.spawn(work));
        });
        all.into_inner().unwrap().into_iter().map(Option::unwrap).collect()
    }
}

/// Compiles a kernel as `sinter compile` does, and allows no warning.
fn clang(dir: &Path, i: usize, arch: &str, code: &HipCode) -> Result<Vec<u8>, String> {
    let (file, made) = (format!("{i}.hip"), format!("{i}.co"));
    std::fs::write(dir.join(&file), &code.source).unwrap();
    let out = Command::new("clang-19")
        .args(clang_flags(arch))
        .args(["-Werror", "-Wall", "-Wno-unused-function", "-Wno-pass-failed"])
        .args([&file, "-o", &made])
        .current_dir(dir)
        .output()
        .map_err(|e| e.to_string())?;
    match out.status.success() {
        true => Ok(std::fs::read(dir.join(made)).unwrap()),
        false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
    }
}

/// The table: which compiler made the rows of an architecture, and each row by architecture and hash.
struct Table {
    compilers: BTreeMap<String, String>,
    rows: BTreeMap<(String, String), Row>,
}

/// Numbers and a label as they are written, and the numbers as such.
#[derive(Clone)]
struct Row {
    takes: Takes,
    label: String,
}

impl Table {
    fn read() -> Table {
        let text = std::fs::read_to_string(place()).unwrap_or_default();
        let (mut compilers, mut rows) = (BTreeMap::new(), BTreeMap::new());
        let mut arch = String::new();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some((name, compiler)) = line.split_once(" by ") {
                arch = name.into();
                compilers.insert(arch.clone(), compiler.into());
                continue;
            }
            let mut words = line.split_whitespace();
            let hash = words.next().unwrap().to_string();
            let mut next = || words.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{line}"));
            let [registers, scalar, shared, scratch] = [next(), next(), next(), next()];
            let spills = [next(), next()];
            let takes = Takes { registers, scalar, shared, scratch, spills, code: next() };
            let label = words.collect::<Vec<_>>().join(" ");
            rows.insert((arch.clone(), hash), Row { takes, label });
        }
        Table { compilers, rows }
    }

    fn row(&self, kernel: &Kernel) -> Option<&Row> {
        self.rows.get(&(kernel.arch.to_string(), kernel.hash.clone()))
    }
}

/// NVIDIA's other architectures, of which the first lacks what Hopper has, and the last is newer: kernels of a prompt and of a few tokens.
#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn kernels_compile_for_other_gpus_of_nvidia() {
    let Some(nvrtc) = Compilers::here().nvrtc else { return say("skipped: there is no nvrtc here") };
    let shape = Shape { layers: 3, width: 256, ffn: 512, ..shape("tiny-llama") };
    let format = |name: &str| if name == "output.weight" { DType::BF16 } else { q4_k_m(name) };
    let model = Model::new(&shape, format).description();
    for arch in ["sm_80", "sm_89", "sm_120"] {
        let options = Options { chunk: 64, ..Options::new(Target::gpu(arch).unwrap()) };
        let compiled = compile(&model, &options, Purpose::Score).unwrap();
        let some = compiled.iter().filter(|c| [4, 64].contains(&c.program.bounds.t));
        let launches = some.flat_map(|c| c.program.kernels.iter().flat_map(|kernel| &kernel.launches));
        let codes: Vec<&HipCode> = launches
            .map(|launch| match &launch.code {
                Code::Hip(code) => code,
                _ => panic!("a kernel of another device"),
            })
            .collect();
        let made = nvrtc.compile(arch, codes, &Progress::default()).unwrap_or_else(|e| panic!("{arch}: {e}"));
        assert!(made.len() > 12, "{arch}: {}", made.len());
    }
}

#[test]
fn the_table_is_of_todays_kernels() {
    let (table, kernels) = (Table::read(), kernels());
    let today: BTreeSet<(String, String)> =
        kernels.iter().map(|kernel| (kernel.arch.to_string(), kernel.hash.clone())).collect();
    assert!(today.len() > 500, "{}", today.len());
    let missing: Vec<&Kernel> = kernels.iter().filter(|kernel| table.row(kernel).is_none()).collect();
    if let Some(first) = missing.first() {
        let Kernel { arch, label, .. } = first;
        panic!("{} kernels have no row, the first {label} on {arch}: {REMAKE}", missing.len());
    }
    let stale = table.rows.keys().filter(|row| !today.contains(row)).count();
    assert_eq!(stale, 0, "rows are of kernels that are no more: {REMAKE}");
    for kernel in &kernels {
        assert_eq!(table.row(kernel).unwrap().label, kernel.label, "{REMAKE}");
    }
}

#[test]
fn hot_kernels_keep_to_their_registers() {
    let (table, mut used) = (Table::read(), BTreeSet::new());
    let mut wrong = vec![];
    for kernel in kernels() {
        let Some(Row { takes, label }) = table.row(&kernel) else { continue };
        // A scalar register that goes to a lane of a vector register goes no way.
        if takes.scratch == 0 && takes.spills[0] == 0 {
            continue;
        }
        let may = |spills: &Spills| {
            spills.archs.contains(&kernel.arch)
                && spills.tokens.contains(&kernel.tokens)
                && spills.labels.iter().any(|labels| label.starts_with(labels))
                && spills.names.contains(&kernel.code.entry.as_str())
                && takes.scratch <= spills.most
        };
        match MAY_SPILL.iter().position(may) {
            Some(i) if kernel.tokens > 1 => _ = used.insert(i),
            _ => wrong.push(format!("{} {takes} {label}", kernel.arch)),
        }
    }
    assert!(wrong.is_empty(), "{} kernels spill or take scratch:\n{}", wrong.len(), wrong.join("\n"));
    let unused =
        MAY_SPILL.iter().enumerate().filter(|(i, _)| !used.contains(i)).map(|(_, spills)| spills.why);
    assert_eq!(unused.collect::<Vec<_>>(), [""; 0], "nothing spills for these reasons any more");
}

/// Whether all kernels are to be compiled, whatever the table says already.
fn all_anew() -> bool {
    std::env::var("SINTER_TABLE").is_ok_and(|value| value == "all")
}

/// One kernel of each kind of the default model, of the first and the last program that has it.
fn sample<'a>(of_arch: &[&'a Kernel]) -> Vec<&'a Kernel> {
    let mut sample: BTreeMap<(bool, &str), [&Kernel; 2]> = BTreeMap::new();
    for kernel in of_arch.iter().copied() {
        let is_bf16 = kernel.label.starts_with("1b bf16 t64");
        if is_bf16 || ["13m t", "13m greedy t"].iter().any(|start| kernel.label.starts_with(start)) {
            sample.entry((is_bf16, &kernel.code.entry)).or_insert([kernel; 2])[1] = kernel;
        }
    }
    let mut sample: Vec<&Kernel> = sample.into_values().flatten().collect();
    sample.dedup_by_key(|kernel| &kernel.hash);
    sample
}

/// Compiles a sample, or all with `SINTER_TABLE=all`.
#[test]
#[cfg_attr(debug_assertions, ignore = "compiles the same as in an optimised build")]
fn kernels_take_what_the_table_says() {
    let (table, kernels, compilers) = (Table::read(), kernels(), Compilers::here());
    for (_, arch) in archs() {
        let Some(name) = compilers.name(arch) else {
            say(&format!("skipped: there is no compiler for {arch} here"));
            continue;
        };
        let mut compiled: Vec<&Kernel> = kernels.iter().filter(|kernel| kernel.arch == arch).collect();
        if !all_anew() {
            compiled = sample(&compiled);
        }
        assert!(compiled.len() > 10, "{}", compiled.len());
        let made = compilers.compile(&compiled);
        if table.compilers.get(arch).is_none_or(|made_by| made_by != name) {
            say(&format!(
                "{arch}: kernels compile; the table is of {:?}, and this is {name}",
                table.compilers.get(arch)
            ));
            continue;
        }
        for (kernel, takes) in compiled.iter().zip(made) {
            let row = table.row(kernel).map(|row| row.takes);
            assert_eq!(row, Some(takes), "{arch}: {}: {REMAKE}", kernel.label);
        }
    }
}

#[test]
#[ignore = "compiles all kernels, and writes the table"]
fn make_the_table() {
    let (old, kernels, compilers) = (Table::read(), kernels(), Compilers::here());
    let mut text = format!(
        "# What kernels take, by architecture. Made by: {}\n#{:>16} {:>4} {:>4} {:>6} {:>5} {:>4} {:>4} {:>7} kernel\n",
        "cargo test --release --test kernel_table -- --ignored make_the_table",
        "hash",
        "vreg",
        "sreg",
        "shared",
        "local",
        "vsp",
        "ssp",
        "code"
    );
    for (_, arch) in archs() {
        let name = compilers.name(arch).unwrap_or_else(|| panic!("there is no compiler for {arch} here"));
        let start = std::time::Instant::now();
        let same = !all_anew() && old.compilers.get(arch).is_some_and(|made_by| made_by == name);
        let of_arch: Vec<&Kernel> = kernels.iter().filter(|kernel| kernel.arch == arch).collect();
        let new: Vec<&Kernel> =
            of_arch.iter().copied().filter(|kernel| !same || old.row(kernel).is_none()).collect();
        let made: BTreeMap<&str, Takes> =
            new.iter().map(|kernel| kernel.hash.as_str()).zip(compilers.compile(&new)).collect();
        say(&format!("{arch}: {} of {} compiled in {:.1?}", new.len(), of_arch.len(), start.elapsed()));
        text += &format!("\n{arch} by {name}\n");
        for kernel in of_arch {
            let kept = || old.row(kernel).unwrap().takes;
            let takes = made.get(kernel.hash.as_str()).copied().unwrap_or_else(kept);
            text += &format!(" {} {takes} {}\n", kernel.hash, kernel.label);
        }
    }
    std::fs::write(place(), text).unwrap();
}
