//! The kernels of GPUs, without a GPU: what codegen emits is compiled for all targets.

mod common;

use sinter::codegen::spec::Code;
use sinter::compile::{Options, Purpose, compile};
use sinter::gguf::Gguf;
use sinter::target::Target;
use std::collections::BTreeSet;

/// The sources of all kernels of a model, once each.
fn sources(gguf: &Gguf, arch: &str, exact: bool) -> BTreeSet<String> {
    let options = Options::new(Target::named(arch).unwrap());
    let options = if exact { options.exact() } else { options };
    let mut sources = BTreeSet::new();
    for compiled in compile(gguf, &options, Purpose::Bench).unwrap() {
        for launch in compiled.program.kernels.iter().flat_map(|kernel| &kernel.launches) {
            if let Code::Hip(code) = &launch.code {
                sources.insert(code.source.clone());
            }
        }
    }
    sources
}

#[test]
fn kernels_of_the_default_model() {
    let file = sinter::model::embedded().unwrap();
    for exact in [false, true] {
        let sources = sources(file.gguf(), "sm_90", exact);
        assert!(sources.len() > 10);
        if let Ok(dir) = std::env::var("SINTER_KERNELS_TO") {
            for (i, source) in sources.iter().enumerate() {
                std::fs::write(format!("{dir}/{}{i}.hip", if exact { "exact" } else { "k" }), source)
                    .unwrap();
            }
        }
    }
}
