//! A model file: read, described, written again, compiled with small limits and run.

use crate::execute::execute;
use sinter::compile::{CompileError, Options, Purpose};
use sinter::gguf::dequant::dequantise;
use sinter::gguf::{Gguf, GgufFile, GgufWriter};
use sinter::model::{self, ModelError};
use sinter::target::Target;

/// What [`run`] returns of a model that runs.
#[allow(dead_code, reason = "a fuzz target does not ask")]
pub const DEEPEST: usize = 3;

/// Returns how far the file got: refused, read, planned, executed.
pub fn run(data: &[u8]) -> usize {
    let file = match GgufFile::from_bytes(data.to_vec()) {
        Ok(file) => file,
        Err(e) => {
            _ = e.to_string();
            return 0;
        }
    };
    let gguf = file.gguf();
    for info in gguf.tensors.values() {
        let bytes = file.tensor_bytes(info);
        assert_eq!(bytes.len() as u64, info.bytes);
        if let Ok(dtype) = info.dtype() {
            // As many as the bytes, which are part of `data`, can hold.
            let mut values = vec![0.0; info.elements() as usize];
            dequantise(dtype, bytes, &mut values).unwrap();
        }
    }
    assert_eq!(file.identity(), file.identity());
    reads_as_written(&file);

    let options = Options { context: Some(8), chunk: 4, ..Options::new(Target::cpu()) };
    let exact = options.clone().exact();
    let mut reached = 1;
    for (mut options, purpose) in [(options, Purpose::Generate), (exact, Purpose::Score)] {
        // The fused graph is verified, which is enough here: that a pass breaks none is what `ir_text` is for.
        options.pipeline.verify_each = false;
        match model::plan(&file, None, &options, purpose) {
            Ok(plan) => reached = reached.max(2 + usize::from(execute(&plan))),
            Err(ModelError::Compile(e @ (CompileError::Verify { .. } | CompileError::Pass(_)))) => {
                panic!("{e}")
            }
            Err(e) => {
                _ = e.to_string();
                break;
            }
        }
    }
    reached
}

/// Writes the file anew, and reads that.
fn reads_as_written(file: &GgufFile) {
    let gguf = file.gguf();
    if gguf.alignment * (1 + gguf.tensors.len() as u64) > 1 << 20 {
        return;
    }
    let mut writer = GgufWriter::new();
    for (key, value) in &gguf.metadata {
        writer.metadata(key, value.clone());
        _ = value.to_string();
    }
    for (name, info) in &gguf.tensors {
        writer.tensor(name, info.ggml_type, &info.shape, file.tensor_bytes(info)).unwrap();
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    let again = GgufFile::from_bytes(bytes).unwrap();
    // As text, for a NaN is not equal to itself.
    let metadata = |gguf: &Gguf| format!("{:?}", gguf.metadata);
    assert_eq!(metadata(gguf), metadata(again.gguf()));
    assert!(gguf.tensors.keys().eq(again.gguf().tensors.keys()));
    for (a, b) in gguf.tensors.values().zip(again.gguf().tensors.values()) {
        assert_eq!(
            (a.ggml_type, &a.shape, file.tensor_bytes(a)),
            (b.ggml_type, &b.shape, again.tensor_bytes(b))
        );
    }
}
