//! Runs any plan that is small, on a model made to fit it.

use sinter::gguf::{GgmlType, GgufFile, GgufWriter};
use sinter::ir::{DType, StateRole, Syms};
use sinter::plan::{KERNELS_HASH, LoadedPlan, Plan, PlannedProgram};
use sinter::runtime::{DeviceOptions, Executor};
use std::sync::Arc;

/// The most bytes of pool, and of weights, that a plan may take to be run; they bound its arithmetic too.
const MOST: u64 = 64 << 10;

/// Runs every program of a plan that could be loaded, and tells whether it did: the plan may be too large, for another
/// device, or need weights that no file has or kernels that there are not.
pub fn execute(plan: &Plan) -> bool {
    if plan.pool_bytes() > MOST || plan.weight_bytes() > MOST {
        return false;
    }
    let Some(model) = model(plan) else { return false };
    let mut plan = plan.clone();
    plan.kernels_hash = KERNELS_HASH.into();
    plan.model.identity = model.identity();
    let plan = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
    let programs = plan.programs.clone();
    let options = DeviceOptions { threads: Some(1), ..DeviceOptions::default() };
    let mut executor = match Executor::new(plan, Arc::new(model), &options) {
        Ok(executor) => executor,
        Err(e) => {
            _ = e.to_string();
            return false;
        }
    };
    for (index, program) in programs.iter().enumerate() {
        let Syms { t, r } = program.bounds;
        for at in [(1, 0), (t, 0), (1, r.min(1)), (t, r)].map(|(t, r)| Syms { t, r }) {
            step(&mut executor, index, program, at);
        }
    }
    for role in [StateRole::Appended, StateRole::Replaced] {
        _ = executor.copy_rows(role, 0, 1, 1).map_err(|e| e.to_string());
        _ = executor.fill_rows(role, 0, 2, 0xff).map_err(|e| e.to_string());
    }
    true
}

/// One step on made-up inputs, all results of which are read.
fn step(executor: &mut Executor, index: usize, program: &PlannedProgram, at: Syms) {
    let made = program.inputs.iter().map(|input| {
        let ty = &program.buffers[input.buffer as usize].ty;
        let bytes = ty.bytes(&at) as usize;
        match input.below {
            Some(below) => {
                let values = (0..bytes as u64 / 4).map(|i| (i * 7 + 3) % below.eval(&at).clamp(1, 1 << 31));
                values.flat_map(|v| (v as i32).to_le_bytes()).collect()
            }
            None => pattern(&input.name, bytes),
        }
    });
    let made: Vec<Vec<u8>> = made.collect();
    let inputs = program.inputs.iter().zip(&made).map(|(input, bytes)| (input.name.as_str(), &bytes[..]));
    let inputs: Vec<(&str, &[u8])> = inputs.collect();
    match executor.step(index, &at, &inputs) {
        Ok(()) => {
            for (i, result) in program.results.iter().enumerate() {
                let ty = &program.buffers[*result as usize].ty;
                let bytes = executor.result(i).unwrap();
                assert_eq!(bytes.len() as u64, ty.bytes(&at));
                let rows = 0..ty.first().eval(&at);
                match ty.dtype {
                    DType::F32 => executor.read_f32(i, rows, &mut vec![]).unwrap(),
                    DType::I32 => executor.read_i32(i, rows, &mut vec![]).unwrap(),
                    _ => {}
                }
            }
        }
        Err(e) => _ = e.to_string(),
    }
}

/// A file with every weight of the plan, unless there is no such file.
fn model(plan: &Plan) -> Option<GgufFile> {
    let mut writer = GgufWriter::new();
    for weight in &plan.weights {
        let shape: Vec<u64> = weight.ty.shape.iter().map(|d| d.as_const()).collect::<Option<_>>()?;
        let bytes = weight.ty.bytes(&Syms { t: 0, r: 0 }) as usize;
        writer
            .tensor(&weight.name, GgmlType::of(weight.ty.dtype)?, &shape, pattern(&weight.name, bytes))
            .ok()?;
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    Some(GgufFile::from_bytes(bytes).unwrap())
}

/// Bytes that differ from name to name.
fn pattern(name: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
