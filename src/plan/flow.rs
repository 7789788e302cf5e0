//! What a program of a plan does to memory, whether it is placed already or not.

use super::memory::MemoryError;
use super::schedule::{Flow, FlowBuffer, Home, size_of};
use super::{BufRef, Input, State, Tensor};
use crate::codegen::spec::Implementation;
use crate::ir::{Syms, TensorType};

/// What the programs of a plan share.
pub struct Tables<'a> {
    pub kernels: &'a [Implementation],
    pub states: &'a [State],
    pub weights: &'a [Tensor],
}

/// A program as its flow is found from, placed or not.
pub struct View<'a> {
    pub bounds: Syms,
    pub buffers: Vec<&'a TensorType>,
    pub inputs: &'a [Input],
    pub results: &'a [u32],
    /// Kernel, arguments and label of each call.
    pub calls: Vec<(u32, &'a [BufRef], &'a str)>,
}

/// What a program does to memory: its buffers, then the states, then the weights.
pub fn flow(tables: &Tables, program: &View) -> Result<Flow, MemoryError> {
    let bounds = program.bounds;
    let mut buffers = vec![];
    let mut push = |name: String, home, ty: &TensorType| -> Result<(), MemoryError> {
        let bytes = size_of(&name, ty, &bounds)?;
        buffers.push(FlowBuffer { name, home, bytes, input: false, result: false });
        Ok(())
    };
    for (i, ty) in program.buffers.iter().enumerate() {
        push(format!("buffer b{i} {ty}"), Home::Arena, ty)?;
    }
    for state in tables.states {
        push(format!("state {:?}", state.name), Home::State, &state.ty)?;
    }
    for weight in tables.weights {
        push(format!("weight {:?}", weight.name), Home::Weight, &weight.ty)?;
    }
    for input in program.inputs {
        buffers[input.buffer as usize].input = true;
    }
    for result in program.results {
        buffers[*result as usize].result = true;
    }
    let states = program.buffers.len();
    let weights = states + tables.states.len();
    let mut flow = Flow::new(buffers, bounds);
    for (kernel, args, label) in &program.calls {
        let at = |arg: &BufRef| match *arg {
            BufRef::Arena(i) => i as usize,
            BufRef::State(i) => states + i as usize,
            BufRef::Weight(i) => weights + i as usize,
        };
        let args: Vec<usize> = args.iter().map(at).collect();
        flow.call(label, &tables.kernels[*kernel as usize], &args)?;
    }
    Ok(flow.finish()?)
}
