//! GPUs: HIP's two platforms behind one table of driver functions (`api.rs`), what lies on a device (`context.rs`), and a plan on it
//! ([`HipDevice`]).
//!
//! A plan for a GPU holds the source of its kernels, or their machine code: run only plans that you trust.

mod api;
mod cache;
mod clang;
mod context;
mod device;
mod kernels;
pub mod planes;
mod weights;

pub use api::Platform;
pub use clang::clang_flags;
pub use device::HipDevice;
pub use kernels::{Compiler, HEADERS, compile_ahead};

use crate::target::Target;
use context::Found;

/// What a GPU or its driver refused.
#[derive(Debug, thiserror::Error)]
pub enum HipError {
    #[error("no library of a GPU's driver can be loaded: {why}")]
    Library { why: String },
    #[error("{library} has no {symbol}: it is too old, or another library")]
    Symbol { library: String, symbol: &'static str },
    #[error("the GPU's driver answers {name} to {call}")]
    Driver { call: &'static str, name: String },
    #[error("the GPU's driver answers {name} to {call} of {bytes} bytes")]
    OutOfMemory { call: &'static str, name: String, bytes: u64 },
    #[error("there is no GPU {ordinal}: there {}", how_many(*.count))]
    NoDevice { ordinal: usize, count: usize },
    #[error("{0} bytes are more than can be asked for")]
    Size(u64),
    #[error("a kernel cannot be called {0:?}")]
    Entry(String),
    #[error("the kernel {kernel} does not compile for {arch}:\n{log}")]
    Compile { kernel: String, arch: String, log: String },
    #[error("the compiler answers error {answer} to {call}, for the kernel {kernel} on {arch}")]
    Compiler { kernel: String, arch: String, call: &'static str, answer: i32 },
    #[error(
        "kernels cannot be compiled here, as no library of a compiler can be loaded: {why}; a plan that sinter compile makes for this \
         GPU has them compiled"
    )]
    NoCompiler { why: String },
    #[error(
        "nothing here compiles kernels for {arch}: {looked}. Install {install}; or give --source-only, and the plan's kernels are \
         compiled where it runs"
    )]
    NoCompilerAhead { arch: String, looked: String, install: &'static str },
    #[error("the driver refuses the code of {kernel}, which {compiler} compiled for {arch}: {source}")]
    Object { kernel: String, compiler: String, arch: String, source: Box<HipError> },
    #[error("the plan is for {wants}, and this GPU is {has} ({name})")]
    OtherArch { wants: String, has: String, name: String },
    #[error("{source}, in a step of {program} with T={t} R={r}{}", to_name_the_kernel(source))]
    Step { program: String, t: u64, r: u64, source: Box<HipError> },
    #[error("{kernel} of {node:?}, launch {launch}: {source}")]
    Launch { kernel: &'static str, node: String, launch: usize, source: Box<HipError> },
    #[error("{kernel} has a grid of {blocks:?} blocks, which is more than a GPU has")]
    Grid { kernel: &'static str, blocks: Vec<u64> },
}

/// How many GPUs there are, as one reads who asked for another.
fn how_many(count: usize) -> String {
    match count {
        0 => "are 0".into(),
        1 => "is 1, counted from 0".into(),
        _ => format!("are {count}, counted from 0"),
    }
}

/// How an error of a step comes to name the kernel, if it does not yet.
fn to_name_the_kernel(source: &HipError) -> &'static str {
    match source {
        HipError::Launch { .. } | HipError::Grid { .. } => "",
        _ => {
            "; with --no-graph and the driver told to wait for each launch (CUDA_LAUNCH_BLOCKING=1, AMD_SERIALIZE_KERNEL=3) the error \
             names the kernel"
        }
    }
}

/// A GPU that is here.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub platform: Platform,
    /// Its number among all: AMD's come first, then NVIDIA's.
    pub ordinal: usize,
    pub name: String,
    /// The architecture, as compilers name it.
    pub arch: String,
    /// The version of the driver, as it counts them.
    pub driver: i32,
}

impl Gpu {
    /// The version of the driver for people: AMD's counts the minor by 100000 and the major by 10000000 (`HIP_VERSION`), NVIDIA's by 10
    /// and 1000 (`CUDA_VERSION`).
    pub fn driver_version(&self) -> String {
        let n = self.driver;
        match self.platform {
            Platform::Amd => format!("{}.{}.{}", n / 10_000_000, n / 100_000 % 100, n % 100_000),
            Platform::Nvidia => format!("{}.{}", n / 1000, n / 10 % 100),
        }
    }

    /// Bytes of its memory that are free, and all. To ask takes a moment, as the GPU is used for it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn memory(&self) -> Result<(u64, u64), HipError> {
        find_nth(self.ordinal)?.into_context()?.memory()
    }
}

/// The GPU of this number, of which AMD's come first, then NVIDIA's; or the first that there are kernels for.
///
/// # Errors
/// Why there is none.
pub fn gpu(number: Option<usize>) -> Result<Gpu, HipError> {
    let (ordinal, found) = find(number)?;
    let driver = found.driver()?;
    Ok(Gpu { platform: found.platform, ordinal, name: found.name, arch: found.arch, driver })
}

/// All GPUs that are here, and what went wrong behind the last of them, if something did.
///
/// # Errors
/// Why there is none.
pub fn gpus() -> Result<(Vec<Gpu>, Option<HipError>), HipError> {
    let mut all = vec![gpu(Some(0))?];
    loop {
        match gpu(Some(all.len())) {
            Ok(gpu) => all.push(gpu),
            Err(HipError::NoDevice { .. }) => return Ok((all, None)),
            Err(e) => return Ok((all, Some(e))),
        }
    }
}

/// A GPU as [`gpu`] has it, and its number.
fn find(number: Option<usize>) -> Result<(usize, Found), HipError> {
    if let Some(number) = number {
        return Ok((number, find_nth(number)?));
    }
    let mut first = None;
    for number in 0.. {
        match find_nth(number) {
            Ok(found) if Target::gpu(&found.arch).is_some() => return Ok((number, found)),
            Ok(found) => first = first.or(Some((number, found))),
            // One that has no kernels can be told so.
            Err(HipError::NoDevice { .. }) if first.is_some() => break,
            Err(e) => return Err(e),
        }
    }
    first.ok_or(HipError::NoDevice { ordinal: 0, count: 0 })
}

fn find_nth(ordinal: usize) -> Result<Found, HipError> {
    let (mut before, mut errors) = (0, vec![]);
    for platform in [Platform::Amd, Platform::Nvidia] {
        match Found::open(platform, ordinal - before) {
            Ok(found) => return Ok(found),
            Err(HipError::NoDevice { count, .. }) => {
                before += count;
                errors.push(HipError::NoDevice { ordinal, count: before });
            }
            Err(e) => errors.push(e),
        }
    }
    // None is here: each is said.
    if errors.iter().all(|e| matches!(e, HipError::Library { .. })) {
        let why = |e: HipError| match e {
            HipError::Library { why } => why,
            other => other.to_string(),
        };
        return Err(HipError::Library { why: errors.into_iter().map(why).collect::<Vec<_>>().join("; ") });
    }
    // That there are other GPUs tells most, then what goes wrong, then a driver without a GPU.
    let weight = |e: &HipError| match e {
        HipError::Library { .. } => 0,
        HipError::NoDevice { count: 0, .. } => 1,
        HipError::NoDevice { .. } => 3,
        _ => 2,
    };
    Err(errors.into_iter().max_by_key(weight).unwrap_or(HipError::NoDevice { ordinal, count: before }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_drivers_read_as_their_vendors_have_them() {
        let version = |platform, driver| {
            let gpu = Gpu { platform, ordinal: 0, name: String::new(), arch: String::new(), driver };
            gpu.driver_version()
        };
        let amd = [60_443_484, 70_051_831, 50_000_000].map(|n| version(Platform::Amd, n));
        assert_eq!(amd, ["6.4.43484", "7.0.51831", "5.0.0"]);
        assert_eq!([13_000, 12_080].map(|n| version(Platform::Nvidia, n)), ["13.0", "12.8"]);
    }
}
