//! The memory of a program and its streams, as a picture has them: which call holds what, where and how long.

use super::diagram::Diagram;
use crate::plan::{BufRef, Plan, PlannedProgram};
use serde::Serialize;

/// Buffers over calls, and calls on streams.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    pub arena_bytes: u64,
    /// The most bytes that live at once.
    pub lower_bound: u64,
    pub streams: u32,
    pub buffers: Vec<Held>,
    pub calls: Vec<Lane>,
}

/// A buffer of the arena.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Held {
    pub ty: String,
    pub offset: u64,
    pub bytes: u64,
    /// The first and the last call that use it. Inputs are there before the first call, results after the last.
    pub from: usize,
    pub to: usize,
    /// As an input or a result is called; empty for what lies between.
    pub role: String,
}

/// A call on its stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lane {
    pub label: String,
    pub stream: u32,
    /// Calls of other streams that it waits for.
    pub waits: Vec<usize>,
    /// The index of the node of the fused graph.
    pub kernel: Option<usize>,
}

pub(super) fn memory(plan: &Plan, program: &PlannedProgram, fused: &Diagram) -> Memory {
    let last = program.calls.len().saturating_sub(1);
    let mut buffers: Vec<Option<Held>> = vec![None; program.buffers.len()];
    let mut hold = |buffer: usize, call: usize, role: &str| {
        let Some(planned) = program.buffers.get(buffer) else { return };
        let held = buffers[buffer].get_or_insert_with(|| Held {
            ty: planned.ty.to_string(),
            offset: planned.offset,
            bytes: planned.ty.bytes(&program.bounds),
            from: call,
            to: call,
            role: String::new(),
        });
        (held.from, held.to) = (held.from.min(call), held.to.max(call));
        if !role.is_empty() {
            held.role = role.to_string();
        }
    };
    for input in &program.inputs {
        hold(input.buffer as usize, 0, &format!("input %{}", input.name));
    }
    for (at, call) in program.calls.iter().enumerate() {
        for arg in &call.args {
            if let BufRef::Arena(buffer) = *arg {
                hold(buffer as usize, at, "");
            }
        }
    }
    for &result in &program.results {
        hold(result as usize, last, "result");
    }
    let signalled = |event: u32| program.calls.iter().position(|call| call.slot.signals == Some(event));
    let kernels = kernels_of_calls(plan, program, fused);
    let lane = |(at, call): (usize, &crate::plan::PlannedCall)| Lane {
        label: call.label.clone(),
        stream: call.slot.stream,
        waits: call.slot.waits.iter().filter_map(|event| signalled(*event)).collect(),
        kernel: kernels[at],
    };
    Memory {
        arena_bytes: program.arena_bytes,
        lower_bound: program.lower_bound,
        streams: plan.target.streams.max(1),
        buffers: buffers.into_iter().flatten().collect(),
        calls: program.calls.iter().enumerate().map(lane).collect(),
    }
}

/// The node that each call came from. Calls are made in the order of the nodes, but those that fill in constants.
fn kernels_of_calls(plan: &Plan, program: &PlannedProgram, fused: &Diagram) -> Vec<Option<usize>> {
    let mut nodes = fused.nodes.iter().enumerate().filter(|(_, node)| node.cost.launches > 0).peekable();
    let one = |call: &crate::plan::PlannedCall| {
        let name = plan.kernels.get(call.kernel as usize)?.spec.name();
        let same = |(_, node): &(usize, &super::Node)| node.name.split(" {").next() == Some(name);
        Some(nodes.next_if(same)?.0)
    };
    program.calls.iter().map(one).collect()
}
