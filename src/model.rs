//! From a model file to a session that runs: what the commands share. Everything here compiles; what does not is in
//! [`crate::load`].

use crate::codegen::spec::Program;
use crate::compile::{self, CompileError, Options, Purpose};
use crate::generate::{Session, SessionError};
use crate::gguf::GgufFile;
use crate::ir::Report;
use crate::plan::{self, LoadedPlan, Parts, Plan, PlanError};
use crate::runtime::{DeviceOptions, ExecError, Executor};
use std::path::Path;
use std::sync::Arc;

pub use crate::load::{LoadError, embedded, is_plan, load_plan, open, open_weights, read_plan, read_plans};

/// A model that cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Session(#[from] SessionError),
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
    let compiled = compile::compile(file.gguf(), options, purpose)?;
    let programs = compiled.into_iter().map(|c| (c.program, c.report)).collect();
    Ok(Plan::build(parts(file, path, options, programs)?)?)
}

/// What a plan of these programs of a model is built from.
pub(crate) fn parts(
    file: &GgufFile,
    path: Option<&Path>,
    options: &Options,
    programs: Vec<(Program, Report)>,
) -> Result<Parts, CompileError> {
    let gguf = file.gguf();
    let config = crate::lower::Config::from_gguf(gguf)?;
    Ok(Parts {
        model: plan::Model {
            // The plan may be run from another folder.
            source: path
                .map(|p| std::path::absolute(p).unwrap_or_else(|_| p.into()).to_string_lossy().into_owned()),
            identity: file.identity(),
            full_hash: None,
            architecture: config.architecture.name().into(),
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
        programs,
    })
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
    device: &DeviceOptions,
) -> Result<Executor, ModelError> {
    let bytes = plan(file, path, options, purpose)?.to_bytes()?;
    let plan = LoadedPlan::from_bytes(&bytes)?;
    Ok(Executor::new(plan, Arc::clone(file), device)?)
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
    device: &DeviceOptions,
) -> Result<Session, ModelError> {
    Ok(Session::new(executor(file, path, options, purpose, device)?)?)
}
