//! Opening models, and running plans that were compiled before. Nothing here can compile: a test holds all that it reaches
//! to that.

use crate::generate::{Session, SessionError};
use crate::gguf::{GgufError, GgufFile};
use crate::plan::{LoadedPlan, PlanError};
use crate::runtime::{DeviceError, DeviceOptions, ExecError, Executor, On, choose};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model that cannot be opened, or a plan that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("{0} is a compiled plan, and a model is wanted; only run, profile, dump and explain take plans")]
    IsPlan(PathBuf),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    InPlan { path: PathBuf, source: PlanError },
    #[error("{path}: {source}")]
    NotHere { path: PathBuf, source: DeviceError },
    #[error(
        "{model}: the model file that the plan {plan} names cannot be used; give its place now with --model"
    )]
    Weights { plan: PathBuf, model: PathBuf, source: Box<LoadError> },
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
pub fn open(path: Option<&Path>) -> Result<GgufFile, LoadError> {
    match path {
        Some(path) if is_plan(path) => Err(LoadError::IsPlan(path.into())),
        Some(path) => Ok(GgufFile::open(path)?),
        None => Ok(embedded()?),
    }
}

/// Whether the file at `path` begins as a plan does.
pub fn is_plan(path: &Path) -> bool {
    let mut start = [0; 8];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut start)).is_ok()
        && LoadedPlan::is_plan(&start)
}

/// The plan of a file that runs on the device ([`choose`]).
///
/// # Errors
/// A file that is damaged, or holds no plan that runs there.
pub fn read_plan(path: &Path, on: Option<On>, device: &DeviceOptions) -> Result<LoadedPlan, LoadError> {
    choose(read_plans(path)?, on, device).map_err(|source| LoadError::NotHere { path: path.into(), source })
}

/// All plans of a file.
///
/// # Errors
/// A file that cannot be read, or is damaged.
pub fn read_plans(path: &Path) -> Result<Vec<LoadedPlan>, LoadError> {
    let bytes = std::fs::read(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
    LoadedPlan::all_from_bytes(&bytes).map_err(|source| LoadError::InPlan { path: path.into(), source })
}

/// The weights that the plan of the file at `path` names, or those at `model`.
///
/// # Errors
/// A model that is not there, or is another than the plan was compiled from.
pub fn open_weights(plan: &LoadedPlan, path: &Path, model: Option<&Path>) -> Result<GgufFile, LoadError> {
    let named = model.map(PathBuf::from).or(plan.model.source.as_ref().map(PathBuf::from));
    // Plan and model may have moved together.
    let beside = || {
        let beside = path.with_file_name(named.as_ref()?.file_name()?);
        (model.is_none() && beside.is_file()).then_some(beside)
    };
    let place = named.clone().filter(|p| p.exists()).or_else(beside).or(named);
    let file = open(place.as_deref()).map_err(|source| LoadError::Weights {
        plan: path.into(),
        model: place.clone().unwrap_or_default(),
        source: Box::new(source),
    })?;
    let other = |source| LoadError::InPlan { path: path.into(), source };
    plan.require_model(&file.identity()).map_err(other)?;
    Ok(file)
}

/// Loads the plan of a file that runs on the device ([`choose`]), and the weights it names, or those at `model`. `verify` hashes the
/// whole model file, not samples of it.
///
/// # Errors
/// A plan that is damaged or was compiled for something else, each with what differs.
pub fn load_plan(
    path: &Path,
    model: Option<&Path>,
    verify: bool,
    on: Option<On>,
    device: &DeviceOptions,
) -> Result<(Arc<GgufFile>, Session), LoadError> {
    let plan = read_plan(path, on, device)?;
    let file = open_weights(&plan, path, model)?;
    if verify {
        let other = |source| LoadError::InPlan { path: path.into(), source };
        plan.require_full_hash(file.full_hash()).map_err(other)?;
    }
    let file = Arc::new(file);
    let session = Session::new(Executor::new(plan, Arc::clone(&file), device)?)?;
    Ok((file, session))
}
