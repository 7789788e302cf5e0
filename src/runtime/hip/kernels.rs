//! Kernels from their sources: compiled at run time, on all cores, and kept for the next time.

use super::HipError;
use super::api::{Platform, Rtc};
use super::cache::{KernelCache, Key};
use crate::codegen::spec::HipCode;
use crate::runtime::progress::{Progress, Stage};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The headers that sources include, by name.
pub const HEADERS: [(&str, &str); 14] = [
    ("attention.h", include_str!("../../../kernels/attention.h")),
    ("device.h", include_str!("../../../kernels/device.h")),
    ("elementwise.h", include_str!("../../../kernels/elementwise.h")),
    ("embed.h", include_str!("../../../kernels/embed.h")),
    ("matmul.h", include_str!("../../../kernels/matmul.h")),
    ("matvec.h", include_str!("../../../kernels/matvec.h")),
    ("prefill_attention.h", include_str!("../../../kernels/prefill_attention.h")),
    ("primitive.h", include_str!("../../../kernels/primitive.h")),
    ("quant.h", include_str!("../../../kernels/quant.h")),
    ("reduce.h", include_str!("../../../kernels/reduce.h")),
    ("rmsnorm.h", include_str!("../../../kernels/rmsnorm.h")),
    ("rope_attention.h", include_str!("../../../kernels/rope_attention.h")),
    ("rope_kv.h", include_str!("../../../kernels/rope_kv.h")),
    ("sample.h", include_str!("../../../kernels/sample.h")),
];

/// Machine code for each source, which is compiled once.
///
/// # Errors
/// If the platform has no compiler here, or a source does not compile.
pub fn compile<'a>(
    platform: Platform,
    arch: &str,
    codes: impl IntoIterator<Item = &'a HipCode>,
    progress: &Progress,
) -> Result<HashMap<&'a str, Vec<u8>>, HipError> {
    let mut sources: Vec<&HipCode> = vec![];
    for code in codes {
        if !sources.iter().any(|other| other.source == code.source) {
            sources.push(code);
        }
    }
    let rtc = Rtc::open(platform)?;
    let cache = KernelCache::of_user();
    let version = rtc.version()?;
    let next = AtomicUsize::new(0);
    let done = Mutex::new(HashMap::new());
    let made_some = AtomicBool::new(false);
    let failed = Mutex::new(None);
    let work = || {
        while let Some(code) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            let key = key(platform, arch, version, code);
            let kept = cache.as_ref().and_then(|cache| cache.get(&key));
            let made = kept.map_or_else(
                || {
                    let binary = one(&rtc, platform, arch, code)?;
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

/// Everything that the machine code of a source follows from.
fn key(platform: Platform, arch: &str, version: [i32; 2], code: &HipCode) -> Key {
    let version = format!("{} {} {version:?}", env!("CARGO_PKG_VERSION"), platform.name());
    let mut parts = vec![version, code.entry.clone(), code.source.clone()];
    parts.extend(options(platform, arch));
    let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
    Key::of(parts.iter().map(String::as_str).chain(headers).map(str::as_bytes))
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
