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

use context::{Context, Found};

/// What a GPU or its driver refused.
#[derive(Debug, thiserror::Error)]
pub enum HipError {
    #[error("no library of a GPU's driver can be loaded: {why}")]
    Library { why: String },
    #[error("{library} has no {symbol}: it is too old, or another library")]
    Symbol { library: String, symbol: &'static str },
    #[error("the GPU's driver answers {name} to {call}")]
    Driver { call: &'static str, name: String },
    #[error("there is no GPU {ordinal}: the driver has {count}")]
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
    #[error("{kernel} of {node:?}, launch {launch}: {source}")]
    Launch { kernel: &'static str, node: String, launch: usize, source: Box<HipError> },
    #[error("{kernel} has a grid of {blocks:?} blocks, which is more than a GPU has")]
    Grid { kernel: &'static str, blocks: Vec<u64> },
}

/// A GPU that is here.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub platform: Platform,
    pub ordinal: usize,
    pub name: String,
    /// The architecture, as compilers name it.
    pub arch: String,
    /// The version of the driver, as it counts them.
    pub driver: i32,
}

impl Gpu {
    /// Bytes of its memory that are free, and all. To ask takes a moment, as the GPU is used for it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn memory(&self) -> Result<(u64, u64), HipError> {
        Context::open(self.platform, self.ordinal)?.memory()
    }
}

/// The GPU of this number, of whatever platform is here: AMD's first.
///
/// # Errors
/// Why there is none.
pub fn gpu(ordinal: usize) -> Result<Gpu, HipError> {
    let found = find(ordinal)?;
    let driver = found.driver()?;
    Ok(Gpu { platform: found.platform, ordinal, name: found.name, arch: found.arch, driver })
}

/// All GPUs that are here.
///
/// # Errors
/// Why there is none.
pub fn gpus() -> Result<Vec<Gpu>, HipError> {
    let mut all = vec![gpu(0)?];
    loop {
        match gpu(all.len()) {
            Ok(gpu) => all.push(gpu),
            Err(HipError::NoDevice { .. }) => return Ok(all),
            Err(e) => return Err(e),
        }
    }
}

fn find(ordinal: usize) -> Result<Found, HipError> {
    Found::open(Platform::Amd, ordinal).or_else(|amd| match Found::open(Platform::Nvidia, ordinal) {
        Err(HipError::Library { .. }) if !matches!(amd, HipError::Library { .. }) => Err(amd),
        other => other,
    })
}
