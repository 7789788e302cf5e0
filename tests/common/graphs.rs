//! Random graphs as models: what they hold, as files and as steps.
#![allow(dead_code, reason = "each test file uses a part")]

use sinter::gguf::{GgmlType, GgufFile, GgufWriter};
use sinter::ir::arbitrary::{RandomStep, random_bytes};
use sinter::ir::{Graph, Op, Slice, StepInput, Syms, TensorType};
use sinter::runtime::interp::Tensor;
use std::sync::Arc;

fn hash(name: &str) -> u64 {
    name.bytes().fold(1, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)))
}

/// A tensor of random content that depends on its name alone.
pub fn named(name: &str, ty: &TensorType, syms: &Syms) -> Tensor {
    let dims = ty.dims(syms).into_iter().map(|d| d as usize).collect();
    Tensor::new(ty.dtype, dims, random_bytes(ty, syms, hash(name))).unwrap()
}

/// The type of a whole tensor, of which some rows may be a weight.
pub fn whole(ty: &TensorType, rows: Option<Slice>) -> TensorType {
    rows.map_or_else(|| ty.clone(), |rows| rows.whole(ty))
}

/// A weight of random content that depends on its tensor's name alone.
pub fn weight(name: &str, rows: Option<Slice>, ty: &TensorType, syms: &Syms) -> Tensor {
    let tensor = named(name, &whole(ty, rows), syms);
    rows.map_or_else(|| tensor.clone(), |rows| tensor.slice(name, &rows, ty).unwrap())
}

/// The inputs of a graph in a step, by name.
pub fn inputs(g: &Graph, step: &RandomStep) -> Vec<(String, Tensor)> {
    let one = |&id: &_| {
        let Op::Input { name, .. } = g.op(id) else { unreachable!("inputs are inputs") };
        let dims: Vec<usize> = g.ty(id.into()).dims(&step.syms).into_iter().map(|d| d as usize).collect();
        let values = step.values(StepInput::from_name(name).unwrap());
        (name.clone(), Tensor::from_i32(&dims, values).unwrap())
    };
    g.inputs().iter().map(one).collect()
}

/// The weights of a graph as a model file, each with the content of [`named`].
pub fn weights(g: &Graph) -> Arc<GgufFile> {
    let mut writer = GgufWriter::new();
    for id in g.ids() {
        let Op::Weight { name, rows } = g.op(id) else { continue };
        let ty = &whole(g.ty(id.into()), *rows);
        let shape: Vec<u64> = ty.shape.iter().map(|d| d.as_const().unwrap()).collect();
        let content = named(name, ty, &g.bounds).bytes().to_vec();
        writer.tensor(name, GgmlType::of(ty.dtype).unwrap(), &shape, content).unwrap();
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    Arc::new(GgufFile::from_bytes(bytes).unwrap())
}
