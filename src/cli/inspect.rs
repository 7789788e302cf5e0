//! `sinter inspect`: what is in a model file.

use super::args::ModelArgs;
use serde_json::json;
use sinter::gguf::{Gguf, Value};
use std::collections::BTreeMap;
use std::io::Write;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// As JSON (see docs/json.md).
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> super::Outcome {
    let file = args.model.open()?;
    let gguf = file.gguf();
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &as_json(gguf))?;
        writeln!(out)?;
        return Ok(());
    }
    let parameters: u64 = gguf.tensors.values().map(|t| t.elements()).sum();
    let bytes: u64 = gguf.tensors.values().map(|t| t.bytes).sum();
    writeln!(
        out,
        "GGUF version {}, {} bytes, tensors aligned to {}",
        gguf.version, gguf.file_len, gguf.alignment
    )?;
    writeln!(
        out,
        "{} tensors, {:.1} M parameters, {:.1} MB",
        gguf.tensors.len(),
        parameters as f64 / 1e6,
        bytes as f64 / 1e6
    )?;
    writeln!(out, "\nformats")?;
    for (name, (count, parameters, bytes)) in formats(gguf) {
        writeln!(
            out,
            "  {name:8} {count:4} tensors  {:10.1} M parameters  {:10.1} MB",
            parameters as f64 / 1e6,
            bytes as f64 / 1e6
        )?;
    }
    writeln!(out, "\nmetadata")?;
    for (key, value) in &gguf.metadata {
        writeln!(out, "  {key} = {value}")?;
    }
    if args.tensors {
        writeln!(out, "\ntensors (rows first)")?;
        for t in gguf.tensors.values() {
            let shape = t.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
            writeln!(out, "  {:40} {:>8} [{shape}] at {}", t.name, t.ggml_type.name(), t.offset)?;
        }
    }
    Ok(())
}

/// Tensors, parameters and bytes by format.
fn formats(gguf: &Gguf) -> BTreeMap<&'static str, (u64, u64, u64)> {
    let mut formats = BTreeMap::new();
    for t in gguf.tensors.values() {
        let (count, parameters, bytes) = formats.entry(t.ggml_type.name()).or_insert((0, 0, 0));
        *count += 1;
        *parameters += t.elements();
        *bytes += t.bytes;
    }
    formats
}

/// Numbers, booleans and strings as themselves; an array, which may be a whole vocabulary, as it is listed.
fn metadata_json(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        // JSON has no other floats; the rest is null.
        Value::F32(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::Array(_) => json!(value.to_string()),
    }
}

fn as_json(gguf: &Gguf) -> serde_json::Value {
    let tensors: Vec<_> = gguf
        .tensors
        .values()
        .map(|t| {
            json!({ "name": t.name, "type": t.ggml_type.name(), "shape": t.shape, "offset": t.offset, "bytes": t.bytes })
        })
        .collect();
    let metadata: serde_json::Map<_, _> =
        gguf.metadata.iter().map(|(k, v)| (k.clone(), metadata_json(v))).collect();
    json!({
        "version": gguf.version, "file_bytes": gguf.file_len, "alignment": gguf.alignment,
        "metadata": metadata, "tensors": tensors,
    })
}
