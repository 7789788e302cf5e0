//! From a model file, or a plan, to a session that runs: what the commands share.

use crate::compile::{self, CompileError, Options, Purpose};
use crate::generate::{Session, SessionError};
use crate::gguf::{GgufError, GgufFile};
use crate::runtime::plan::{self, LoadedPlan, Parts, Plan, PlanError};
use crate::runtime::{DeviceOptions, ExecError, Executor};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model or plan that cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("{0} is a compiled plan, and a model is wanted; only run takes plans")]
    IsPlan(PathBuf),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    InPlan { path: PathBuf, source: PlanError },
    #[error(
        "{model}: the model file that the plan {plan} names cannot be used; give its place now with --model"
    )]
    Weights { plan: PathBuf, model: PathBuf, source: Box<ModelError> },
}

/// Bytes at an address that suits every element type.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static EMBEDDED: &Aligned<[u8]> = &Aligned(*include_bytes!("../models/rustdoc-13m-q4_k_m.gguf"));

/// The model that is part of the program: rustdoc-13m in Q4_K_M (see `models/README.md`).
///
/// # Errors
/// None in practice: a test opens it.
pub fn embedded() -> Result<GgufFile, GgufError> {
    GgufFile::from_bytes(&EMBEDDED.0)
}

/// The model at `path`, or the embedded one.
///
/// # Errors
/// If the file cannot be read or is no valid GGUF.
pub fn open(path: Option<&Path>) -> Result<GgufFile, ModelError> {
    match path {
        Some(path) if is_plan(path) => Err(ModelError::IsPlan(path.into())),
        Some(path) => Ok(GgufFile::open(path)?),
        None => Ok(embedded()?),
    }
}

/// Compiles and plans a model. `path` is what the plan names as the place of its weights.
///
/// # Errors
/// A model that cannot be compiled, or does not fit together.
pub fn plan(
    file: &GgufFile,
    path: Option<&Path>,
    options: &Options,
    purpose: Purpose,
) -> Result<Plan, ModelError> {
    let gguf = file.gguf();
    let compiled = compile::compile(gguf, options, purpose)?;
    let config = crate::lower::Config::from_gguf(gguf).map_err(CompileError::from)?;
    let parts = Parts {
        model: plan::Model {
            // The plan may be run from another folder.
            source: path
                .map(|p| std::path::absolute(p).unwrap_or_else(|_| p.into()).to_string_lossy().into_owned()),
            identity: file.identity(),
            full_hash: None,
            architecture: config.architecture.name.into(),
            name: gguf.str_opt("general.name").ok().flatten().unwrap_or("unnamed").to_string(),
        },
        target: options.target.clone(),
        options: plan::Options {
            exact: options.is_exact(),
            kv: options.kv,
            context: options.context_of(&config),
            sequences: options.sequences,
            chunk: options.chunk_of(&config),
            greedy: options.greedy,
        },
        programs: compiled.into_iter().map(|c| (c.program, c.report.decisions)).collect(),
    };
    Ok(Plan::build(parts)?)
}

/// Compiles a model and makes it ready. What runs has gone through the plan's byte form.
///
/// # Errors
/// As [`plan()`], or a device that cannot hold it.
pub fn executor(
    file: &Arc<GgufFile>,
    path: Option<&Path>,
    options: &Options,
    purpose: Purpose,
    threads: Option<usize>,
) -> Result<Executor, ModelError> {
    let bytes = plan(file, path, options, purpose)?.to_bytes()?;
    let plan = LoadedPlan::from_bytes(&bytes)?;
    Ok(Executor::new(plan, Arc::clone(file), &DeviceOptions { threads, features: None })?)
}

/// A session on an [`executor`].
///
/// # Errors
/// As [`executor`].
pub fn session(
    file: &Arc<GgufFile>,
    path: Option<&Path>,
    options: &Options,
    purpose: Purpose,
    threads: Option<usize>,
) -> Result<Session, ModelError> {
    Ok(Session::new(executor(file, path, options, purpose, threads)?)?)
}

/// Whether the file at `path` begins as a plan does.
pub fn is_plan(path: &Path) -> bool {
    let mut start = [0; 8];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut start)).is_ok()
        && LoadedPlan::is_plan(&start)
}

/// Loads a plan and the weights it names, or those at `model`. `verify` hashes the whole model file, not samples of it.
///
/// # Errors
/// A plan that is damaged or was compiled for something else, each with what differs.
pub fn load_plan(
    path: &Path,
    model: Option<&Path>,
    verify: bool,
    threads: Option<usize>,
) -> Result<(Arc<GgufFile>, Session), ModelError> {
    let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
    let in_plan = |source| ModelError::InPlan { path: path.into(), source };
    let plan = LoadedPlan::from_bytes(&bytes).map_err(in_plan)?;
    let named = model.map(PathBuf::from).or(plan.model.source.as_ref().map(PathBuf::from));
    // Plan and model may have moved together.
    let beside = || {
        let beside = path.with_file_name(named.as_ref()?.file_name()?);
        (model.is_none() && beside.is_file()).then_some(beside)
    };
    let place = named.clone().filter(|p| p.exists()).or_else(beside).or(named);
    let file = open(place.as_deref()).map_err(|source| ModelError::Weights {
        plan: path.into(),
        model: place.clone().unwrap_or_default(),
        source: Box::new(source),
    })?;
    plan.check_model(&file.identity()).map_err(in_plan)?;
    if verify {
        plan.check_full_hash(file.full_hash()).map_err(in_plan)?;
    }
    let file = Arc::new(file);
    let options = DeviceOptions { threads, features: None };
    let session = Session::new(Executor::new(plan, Arc::clone(&file), &options)?)?;
    Ok((file, session))
}
