//! Kernels from their sources: compiled on all cores, ahead of time or when they are loaded, and kept for the next time.

use super::HipError;
use super::api::{Platform, Rtc};
use super::cache::{KernelCache, Key};
use super::clang::{Clang, clang_flags};
use crate::codegen::spec::HipCode;
use crate::plan::{CodeObject, Plan};
use crate::runtime::progress::{Progress, Stage};
use crate::target::TargetKind;
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_char, c_int};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The headers that sources include, by name.
pub const HEADERS: [(&str, &str); 18] = [
    ("attention.h", include_str!("../../../kernels/attention.h")),
    ("device.h", include_str!("../../../kernels/device.h")),
    ("elementwise.h", include_str!("../../../kernels/elementwise.h")),
    ("embed.h", include_str!("../../../kernels/embed.h")),
    ("matmul.h", include_str!("../../../kernels/matmul.h")),
    ("matmul_halves.h", include_str!("../../../kernels/matmul_halves.h")),
    ("matmul_unpacked.h", include_str!("../../../kernels/matmul_unpacked.h")),
    ("matvec.h", include_str!("../../../kernels/matvec.h")),
    ("matvec_eight.h", include_str!("../../../kernels/matvec_eight.h")),
    ("prefill_attention.h", include_str!("../../../kernels/prefill_attention.h")),
    ("primitive.h", include_str!("../../../kernels/primitive.h")),
    ("quads.h", include_str!("../../../kernels/quads.h")),
    ("quant.h", include_str!("../../../kernels/quant.h")),
    ("reduce.h", include_str!("../../../kernels/reduce.h")),
    ("rmsnorm.h", include_str!("../../../kernels/rmsnorm.h")),
    ("rope_attention.h", include_str!("../../../kernels/rope_attention.h")),
    ("rope_kv.h", include_str!("../../../kernels/rope_kv.h")),
    ("sample.h", include_str!("../../../kernels/sample.h")),
];

/// What makes machine code of sources.
pub struct Compiler {
    platform: Platform,
    /// Which it is and of what version: what one makes, another may not.
    name: String,
    by: By,
}

enum By {
    /// hiprtc or nvrtc.
    Library(Rtc),
    Clang(Clang),
}

impl Compiler {
    /// The platform's library, as it compiles on a machine that has the GPU.
    ///
    /// # Errors
    /// If there is none here.
    pub fn of_platform(platform: Platform) -> Result<Compiler, HipError> {
        let rtc = Rtc::open(platform)?;
        let [major, minor] = rtc.version()?;
        let library = match platform {
            Platform::Amd => "hiprtc",
            Platform::Nvidia => "nvrtc",
        };
        Ok(Compiler { platform, name: format!("{library} {major}.{minor}"), by: By::Library(rtc) })
    }

    /// One for the kernels of a plan, on a machine that need not have the GPU; none if they are the CPU's.
    ///
    /// # Errors
    /// As [`Compiler::ahead`].
    pub fn for_plan(plan: &Plan) -> Result<Option<Compiler>, HipError> {
        let platform = match plan.target.kind {
            TargetKind::Cpu => return Ok(None),
            TargetKind::HipAmd => Platform::Amd,
            TargetKind::HipNvidia => Platform::Nvidia,
        };
        Compiler::ahead(platform, &plan.target.arch).map(Some)
    }

    /// One that needs no GPU: a clang for AMD's if there is one that knows the architecture, else the platform's library.
    ///
    /// # Errors
    /// If there is none here: what was looked for.
    pub fn ahead(platform: Platform, arch: &str) -> Result<Compiler, HipError> {
        let absent = |looked, install| HipError::NoCompilerAhead { arch: arch.into(), looked, install };
        let library = |library| {
            Compiler::of_platform(platform).map_err(|e| match e {
                HipError::NoCompiler { why } => format!("{library} cannot be loaded ({why})"),
                other => other.to_string(),
            })
        };
        match platform {
            Platform::Nvidia => {
                let install = "CUDA, or put the folder of libnvrtc (PyPI: nvidia-cuda-nvrtc) where libraries are looked for";
                library("libnvrtc").map_err(|why| absent(why, install))
            }
            Platform::Amd => {
                let clang = match Clang::find(arch) {
                    Ok(clang) => {
                        let name = clang.version.clone();
                        return Ok(Compiler { platform, name, by: By::Clang(clang) });
                    }
                    Err(why) => why,
                };
                let install = "clang 19 or later and its lld, or ROCm, or name a clang in SINTER_HIP_CLANG";
                library("libhiprtc").map_err(|why| absent(format!("{clang}, and {why}"), install))
            }
        }
    }

    /// Which it is, and of what version.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The flags that it is given.
    fn flags(&self, arch: &str) -> Vec<String> {
        match &self.by {
            By::Library(_) => options(self.platform, arch),
            By::Clang(_) => clang_flags(arch),
        }
    }

    /// Everything that the machine code of a source follows from.
    fn key(&self, arch: &str, code: &HipCode) -> Key {
        let of = format!("{} {} {}", env!("CARGO_PKG_VERSION"), self.platform.name(), self.name);
        let mut parts = vec![of, code.entry.clone(), code.source.clone()];
        parts.extend(self.flags(arch));
        let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
        Key::of(parts.iter().map(String::as_str).chain(headers).map(str::as_bytes))
    }

    fn one(&self, arch: &str, code: &HipCode) -> Result<Vec<u8>, HipError> {
        match &self.by {
            By::Library(rtc) => one(rtc, self.platform, arch, code),
            By::Clang(clang) => clang.compile(arch, code),
        }
    }

    /// Machine code for each source, which is compiled once, on all cores, or found in the user's cache.
    ///
    /// # Errors
    /// If a source does not compile.
    pub fn compile<'a>(
        &self,
        arch: &str,
        codes: impl IntoIterator<Item = &'a HipCode>,
        progress: &Progress,
    ) -> Result<HashMap<&'a str, Vec<u8>>, HipError> {
        let mut seen = HashSet::new();
        let sources: Vec<&HipCode> =
            codes.into_iter().filter(|code| seen.insert(code.source.as_str())).collect();
        let cache = KernelCache::of_user();
        let next = AtomicUsize::new(0);
        let done = Mutex::new(HashMap::new());
        let made_some = AtomicBool::new(false);
        let failed = Mutex::new(None);
        let work = || {
            while let Some(code) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                let key = self.key(arch, code);
                let kept = cache.as_ref().and_then(|cache| cache.get(&key));
                let made = kept.map_or_else(
                    || {
                        let binary = self.one(arch, code)?;
                        if let Some(cache) = &cache {
                            cache.put(&key, &binary);
                            made_some.store(true, Ordering::Relaxed);
                        }
                        Ok(binary)
                    },
                    Ok,
                );
                match made {
                    Ok(binary) => {
                        let mut done = lock(&done);
                        done.insert(code.source.as_str(), binary);
                        progress.tell(Stage::Kernels, done.len() as u64, sources.len() as u64);
                    }
                    Err(e) => {
                        lock(&failed).get_or_insert(e);
                        // The others have nothing left to do.
                        next.store(sources.len(), Ordering::Relaxed);
                        return;
                    }
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(sources.len());
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        if let (Some(cache), true) = (&cache, made_some.into_inner()) {
            cache.trim();
        }
        match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(e) => Err(e),
            None => Ok(done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)),
        }
    }
}

/// Machine code of all kernels of a plan for a GPU, for [`Plan::objects`]. Needs no GPU.
///
/// # Errors
/// If a source does not compile.
pub fn compile_ahead(
    plan: &Plan,
    compiler: &Compiler,
    progress: &Progress,
) -> Result<Vec<CodeObject>, HipError> {
    let arch = &plan.target.arch;
    let sources = plan.sources();
    let mut made = compiler.compile(arch, sources.iter().copied(), progress)?;
    let object = |code: &&HipCode| {
        let source = code.source.as_str();
        Some(CodeObject {
            arch: arch.clone(),
            source: CodeObject::hash(source),
            compiler: compiler.name.clone(),
            code: made.remove(source)?,
        })
    };
    Ok(sources.iter().filter_map(object).collect())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The options of the compilers. Nothing is relaxed: what is fast and what is exact share their arithmetic.
fn options(platform: Platform, arch: &str) -> Vec<String> {
    match platform {
        Platform::Nvidia => vec![format!("--gpu-architecture={arch}"), "--std=c++17".into()],
        Platform::Amd => vec![format!("--offload-arch={arch}"), "-std=c++17".into(), "-O3".into()],
    }
}

fn one(rtc: &Rtc, platform: Platform, arch: &str, code: &HipCode) -> Result<Vec<u8>, HipError> {
    let failed = |log: String| HipError::Compile { kernel: code.entry.clone(), arch: arch.into(), log };
    let cstring = |text: &str| CString::new(text).map_err(|_| failed("a source with a zero byte".into()));
    let (source, name) = (cstring(&code.source)?, cstring(&format!("{}.hip", code.entry))?);
    let texts = HEADERS.iter().map(|(_, text)| cstring(text)).collect::<Result<Vec<_>, _>>()?;
    let names = HEADERS.iter().map(|(name, _)| cstring(name)).collect::<Result<Vec<_>, _>>()?;
    let options = options(platform, arch).iter().map(|o| cstring(o)).collect::<Result<Vec<_>, _>>()?;
    let pointers = |all: &[CString]| all.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let (texts, names, options) = (pointers(&texts), pointers(&names), pointers(&options));
    let mut program = std::ptr::null_mut();
    let check = |answer: c_int, call: &'static str| match answer {
        0 => Ok(()),
        answer => Err(HipError::Compiler { kernel: code.entry.clone(), arch: arch.into(), call, answer }),
    };
    let n = HEADERS.len() as c_int;
    // SAFETY: every pointer is to a string that ends in 0, or to as many of them as is said; they outlive the calls.
    let made = unsafe {
        (*rtc.create)(&mut program, source.as_ptr(), name.as_ptr(), n, texts.as_ptr(), names.as_ptr())
    };
    check(made, rtc.create.name)?;
    let result = || {
        let mut size = 0;
        // SAFETY: the program lives, and there is room for as many bytes as it says that it has.
        unsafe {
            let compiled = (*rtc.compile)(program, options.len() as c_int, options.as_ptr());
            if compiled != 0 {
                check((*rtc.log_size)(program, &mut size), rtc.log_size.name)?;
                let mut log = vec![0u8; size];
                check((*rtc.log)(program, log.as_mut_ptr().cast()), rtc.log.name)?;
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_string();
                // A compiler that failed itself has nothing to say of the source.
                return Err(if log.is_empty() {
                    HipError::Compiler {
                        kernel: code.entry.clone(),
                        arch: arch.into(),
                        call: rtc.compile.name,
                        answer: compiled,
                    }
                } else {
                    failed(log)
                });
            }
            check((*rtc.code_size)(program, &mut size), rtc.code_size.name)?;
            let mut binary = vec![0u8; size];
            check((*rtc.code)(program, binary.as_mut_ptr().cast()), rtc.code.name)?;
            Ok(binary)
        }
    };
    let result = result();
    // SAFETY: made above, and destroyed once.
    if let Err(e) = check(unsafe { (*rtc.destroy)(&mut program) }, rtc.destroy.name) {
        tracing::warn!("something of the compiler's was not given back: {e}");
    }
    result
}
