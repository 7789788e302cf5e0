//! Kernels of AMD's GPUs by a clang of this machine, which needs neither ROCm nor a GPU.

use super::HipError;
use super::kernels::HEADERS;
use crate::codegen::spec::HipCode;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Names of compilers that can compile for AMD's GPUs, those of ROCm first.
const NAMES: [&str; 7] = ["amdclang++", "clang-22", "clang-21", "clang-20", "clang-19", "clang", "hipcc"];

/// The variable that names one.
const VARIABLE: &str = "SINTER_HIP_CLANG";

/// The flags by which clang compiles a file of kernels for an architecture to a code object. Headers come from the folder that it runs
/// in. Nothing of ROCm's is included or linked: `kernels/device.h` declares what kernels need.
pub fn clang_flags(arch: &str) -> Vec<String> {
    let fixed = [
        "-x",
        "hip",
        "--offload-device-only",
        "--no-gpu-bundle-output",
        "-nogpuinc",
        "-nogpulib",
        "-fdeclspec",
        "-std=c++17",
        "-O3",
        // Which drivers have read since ROCm 5.6; what newer compilers write by default, only those of 6.3 on do.
        "-mcode-object-version=5",
    ];
    fixed.into_iter().map(String::from).chain([format!("--offload-arch={arch}")]).collect()
}

/// A clang, and a folder that it compiles in.
pub struct Clang {
    program: PathBuf,
    /// The first line of what it says of its version.
    pub version: String,
    folder: tempfile::TempDir,
    files: AtomicUsize,
}

impl Clang {
    /// The first clang of this machine that compiles for an architecture, or the one that `SINTER_HIP_CLANG` names.
    ///
    /// # Errors
    /// In words: what was looked for, and why each that is there does not do.
    pub fn find(arch: &str) -> Result<Clang, String> {
        if let Some(named) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            let program = PathBuf::from(named);
            return Clang::open(&program, arch)
                .map_err(|why| format!("{VARIABLE} names {}: {why}", program.display()));
        }
        let roots = ["ROCM_PATH", "HIP_PATH"].iter().filter_map(std::env::var_os);
        let roots = roots.filter(|root| !root.is_empty()).map(PathBuf::from).chain(["/opt/rocm".into()]);
        let in_rocm =
            roots.flat_map(|root| ["bin/amdclang++", "llvm/bin/clang++"].map(|name| root.join(name)));
        let on_path = NAMES.iter().map(PathBuf::from);
        let mut unfit = String::new();
        for program in on_path.chain(in_rocm.filter(|program| program.exists())) {
            match Clang::open(&program, arch) {
                Ok(clang) => return Ok(clang),
                Err(Unfit::Absent) => {}
                Err(Unfit::Because(why)) => unfit += &format!("; {} does not do: {why}", program.display()),
            }
        }
        Err(format!("none of {} compiles for {arch}{unfit}", NAMES.join(", ")))
    }

    fn open(program: &Path, arch: &str) -> Result<Clang, Unfit> {
        let because = |why: &dyn std::fmt::Display| Unfit::Because(why.to_string());
        let said = Command::new(program).arg("--version").output().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Unfit::Absent,
            _ => because(&e),
        })?;
        // hipcc has a line of its own before that of its clang.
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let line = said.lines().find(|line| line.contains("clang version")).or(said.lines().next());
        let version = line.unwrap_or("clang of no version").trim().to_string();
        let folder = tempfile::Builder::new().prefix("sinter-").tempdir().map_err(|e| because(&e))?;
        for (name, text) in HEADERS {
            std::fs::write(folder.path().join(name), text).map_err(|e| because(&e))?;
        }
        let clang = Clang { program: program.into(), version, folder, files: AtomicUsize::new(0) };
        // Whether it knows the architecture, and can write code for it.
        let said = |log: String| {
            let first =
                log.lines().find_map(|line| Some(line.split_once("error: ")?.1)).or(log.lines().next());
            Unfit::Because(first.unwrap_or("it fails").to_string())
        };
        clang.run(arch, "__attribute__((global)) void nothing() {}\n").map_err(said)?;
        Ok(clang)
    }

    /// The code object of a source.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn compile(&self, arch: &str, code: &HipCode) -> Result<Vec<u8>, HipError> {
        let failed = |log| HipError::Compile { kernel: code.entry.clone(), arch: arch.into(), log };
        self.run(arch, &code.source).map_err(failed)
    }

    fn run(&self, arch: &str, source: &str) -> Result<Vec<u8>, String> {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let (file, made) = (format!("{number}.hip"), format!("{number}.co"));
        let [source_path, made_path] = [&file, &made].map(|name| self.folder.path().join(name));
        std::fs::write(&source_path, source).map_err(|e| e.to_string())?;
        let mut command = Command::new(&self.program);
        command.args(clang_flags(arch)).args([&file, "-o", &made]).current_dir(self.folder.path());
        let output = command.output().map_err(|e| e.to_string())?;
        let log = String::from_utf8_lossy(&output.stderr).trim_end().to_string();
        if !output.status.success() {
            return Err(if log.is_empty() { format!("it ends with {}", output.status) } else { log });
        }
        let code = std::fs::read(&made_path).map_err(|e| format!("its code object cannot be read: {e}"))?;
        for path in [source_path, made_path] {
            _ = std::fs::remove_file(path);
        }
        Ok(code)
    }
}

/// Why a program is not taken.
enum Unfit {
    Absent,
    Because(String),
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unfit::Absent => f.write_str("there is no such program"),
            Unfit::Because(why) => f.write_str(why),
        }
    }
}
