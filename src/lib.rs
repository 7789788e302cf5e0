//! Sinter: a compute-graph compiler with operator fusion for GGUF language models.
//!
//! Sintering fuses particles into a solid without melting them. Sinter fuses quantised weights into kernels without
//! melting them to floats in memory: it lowers a model to a graph of tensor operations, rewrites the graph by fusion
//! passes, turns what is left into kernels and calls of them, places everything in one pool of memory, and runs it.
//!
//! # The way of a model
//!
//! ```text
//!  GGUF file ─▶ lower ─▶ graph ─▶ passes ─▶ codegen ─▶ plan ─▶ executor ─▶ tokens
//!    gguf       lower     ir      passes    codegen    plan     runtime    generate
//! ```
//!
//! Data flows one way, and so do the imports; a test holds every path in the source to this list.
//!
//! - [`ir`] imports nothing: types with symbolic dimensions, a closed set of operations, the graph, its text form
//!   ([`ir::text`]) and its verifier ([`mod@ir::verify`]).
//! - [`target`] says what a device can do and what things cost there, as plain data.
//! - [`gguf`] reads and writes model files, and holds the reference dequantiser. What it parses is a *description*; the compiler
//!   never sees tensor data.
//! - [`lower`] turns the description into a graph of primitives, for prefill and decode alike.
//! - [`passes`] rewrite the graph. A rule proposes a patch or a reason why not; both are recorded. Fusing is decided by
//!   the cost model ([`passes::cost`]), on bytes that are those [`mod@bench`] counts. A fused node keeps the primitives it stands
//!   for as its body.
//! - [`codegen`] has what each node computes read off it ([`ir::fused`]), asks the target's [`codegen::Backend`] how that is launched and
//!   how weights are to lie in memory ([`codegen::Layouts`]), and yields a [`codegen::spec::Program`].
//! - [`mod@plan`] puts calls in order ([`plan::schedule`]) and places their memory ([`plan::memory`]); a plan is data, and has
//!   a byte form.
//! - [`runtime`] executes plans that went through that form, on the CPU ([`runtime::cpu`]) or a GPU ([`runtime::hip`], whose kernels are
//!   templates of `kernels/`), on sequences whose rows it batches ([`runtime::Sequences`]). The
//!   interpreter ([`runtime::interp`]) is the oracle of every kernel.
//! - [`generate`] is the loop around it: tokenizer, sampler, sessions, and a scheduler of many texts.
//!
//! [`compile::compile`] reads as the pipeline; [`model`] goes from a file to a session, [`load`] from a plan to one without
//! compiling anything; [`check`] compares every kernel of a
//! model, on a device, with its body; [`mod@bench`] measures how fast it runs; [`show`] draws graphs, plans and what the passes did.
//!
//! # Example
//!
//! ```
//! use sinter::compile::{Options, Purpose};
//! use sinter::generate::{EncodeOptions, Sampler, Sampling, Tokenizer};
//! use sinter::{model, target::Target};
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//!
//! let file = Arc::new(model::embedded()?);
//! let tokenizer = Tokenizer::from_gguf(file.gguf())?;
//! let options = Options::new(Target::cpu());
//! let mut session = model::session(&file, None, &options, Purpose::Generate, &Default::default())?;
//!
//! let prompt = tokenizer.encode("The borrow checker", EncodeOptions::default());
//! let mut sampler = Sampler::new(Sampling::greedy())?;
//! let mut text = String::new();
//! session.generate(&prompt, 4, &mut sampler, |id| tokenizer.is_end(id), |id| {
//!     text += &tokenizer.decode(&[id]);
//!     ControlFlow::Continue(())
//! })?;
//! assert_eq!(text, " (also called");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod bench;
pub mod check;
pub mod codegen;
pub mod compile;
pub mod explain;
pub mod generate;
pub mod gguf;
pub mod ir;
pub mod load;
pub mod lower;
pub mod model;
pub mod passes;
pub mod plan;
pub mod runtime;
pub mod show;
pub mod target;
pub mod tune;
