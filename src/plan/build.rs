//! Building plans, from what codegen produced: the last step of compiling, which nothing that runs a plan may call.

use super::flow::{Tables, View, flow};
use super::memory::{MemoryError, align_up, place};
use super::{
    BufRef, Input, KERNELS_HASH, Model, Options, Plan, PlanError, PlannedBuffer, PlannedCall, PlannedProgram,
    State, Tensor, state_bytes,
};
use crate::codegen::spec::{Implementation, Index, IndexSource, Layout, Place, Program};
use crate::ir::{Dim, Report, Slice, StateRole, Syms, TensorType};
use crate::target::Target;
use indexmap::IndexMap;
use indexmap::map::Entry;
use std::hash::Hash;

/// What [`Plan::build`] makes a plan from.
#[derive(Clone, Debug)]
pub struct Parts {
    pub model: Model,
    pub target: Target,
    pub options: Options,
    /// Each with what the passes decided for it. All share their states, weights and context size.
    pub programs: Vec<(Program, Report)>,
}

impl Plan {
    /// Places the programs' calls on the target's streams and their buffers in one pool.
    ///
    /// # Errors
    /// If a program breaks a rule of this module, or two do not go together.
    pub fn build(parts: Parts) -> Result<Plan, PlanError> {
        let Parts { model, target, options, programs } = parts;
        target.validate().map_err(PlanError::Target)?;
        let mut shared = Shared::default();
        let programs = programs.into_iter().map(|(program, report)| shared.take(program, report));
        let programs = programs.collect::<Result<Vec<_>, _>>()?;
        let weights: Vec<Tensor> = shared
            .weights
            .into_iter()
            .map(|((name, rows), (ty, layout))| Tensor { name, ty, rows, layout })
            .collect();
        let mut arena_offset = 0u64;
        let mut states = vec![];
        for (name, (ty, role)) in shared.states {
            let bytes = state_bytes(&name, &ty)?;
            states.push(State { name, ty, role, offset: arena_offset });
            arena_offset = arena_offset.checked_add(bytes).and_then(align_up).ok_or(MemoryError::TooLarge)?;
        }
        let kernels: Vec<Implementation> = shared.kernels.into_values().collect();
        let tables = Tables { kernels: &kernels, states: &states, weights: &weights };
        let place = |program: Numbered| {
            let of = |source| PlanError::Program { program: program.name.clone(), source };
            place_program(&tables, &program, target.streams).map_err(of)
        };
        let programs = programs.into_iter().map(place).collect::<Result<Vec<_>, _>>()?;
        let arena_bytes = programs.iter().map(|program| program.arena_bytes).max().unwrap_or_default();
        let plan = Plan {
            engine: env!("CARGO_PKG_VERSION").into(),
            kernels_hash: KERNELS_HASH.into(),
            model,
            target,
            options,
            weights,
            states,
            kernels,
            objects: vec![],
            programs,
            arena_offset,
            arena_bytes,
        };
        plan.validate()?;
        Ok(plan)
    }
}

/// Gives every call its slot and every buffer its offset.
fn place_program(tables: &Tables, program: &Numbered, streams: u32) -> Result<PlannedProgram, MemoryError> {
    let view = View {
        bounds: program.bounds,
        buffers: program.buffers.iter().collect(),
        inputs: &program.inputs,
        results: &program.results,
        calls: program.calls.iter().map(|call| (call.kernel, &call.args[..], &call.label[..])).collect(),
    };
    let flow = flow(tables, &view)?;
    let slots = flow.schedule(streams);
    let placement = place(&flow, &slots, streams)?;
    let calls = program.calls.iter().zip(slots).map(|(call, slot)| {
        let NumberedCall { kernel, args, label } = call.clone();
        PlannedCall { kernel, args, slot, label }
    });
    let buffers = program.buffers.iter().zip(placement.offsets);
    let buffers = buffers.map(|(ty, offset)| PlannedBuffer { ty: ty.clone(), offset: offset.unwrap_or(0) });
    Ok(PlannedProgram {
        name: program.name.clone(),
        bounds: program.bounds,
        calls: calls.collect(),
        buffers: buffers.collect(),
        inputs: program.inputs.clone(),
        results: program.results.clone(),
        lower_bound: placement.lower_bound,
        arena_bytes: placement.arena_bytes,
        report: program.report.clone(),
    })
}

/// A program whose kernels and buffers are those of the plan; nothing is placed yet.
struct Numbered {
    name: String,
    bounds: Syms,
    calls: Vec<NumberedCall>,
    buffers: Vec<TensorType>,
    inputs: Vec<Input>,
    results: Vec<u32>,
    report: Report,
}

#[derive(Clone)]
struct NumberedCall {
    kernel: u32,
    args: Vec<BufRef>,
    label: String,
}

/// The tables of a plan while it is built.
#[derive(Default)]
struct Shared {
    weights: IndexMap<(String, Option<Slice>), (TensorType, Layout)>,
    states: IndexMap<String, (TensorType, StateRole)>,
    /// By their byte form, as floats have no total equality.
    kernels: IndexMap<Vec<u8>, Implementation>,
}

impl Shared {
    /// Moves a program's kernels, weights and states to the tables. Buffers that nothing uses are dropped.
    fn take(&mut self, program: Program, report: Report) -> Result<Numbered, PlanError> {
        let Program { name, bounds, kernels, calls, buffers, inputs, results } = program;
        let mut kernel_index = vec![];
        for kernel in kernels {
            let key = postcard::to_stdvec(&kernel).map_err(PlanError::Encode)?;
            let entry = self.kernels.entry(key);
            kernel_index.push(entry.index() as u32);
            entry.or_insert(kernel);
        }
        let mut arena: IndexMap<u32, TensorType> = IndexMap::new();
        let mut resolve = |id: u32| -> Result<BufRef, PlanError> {
            let len = buffers.len();
            let buffer = buffers.get(id as usize);
            let buffer = buffer.ok_or(PlanError::Index { what: "buffer", index: id.into(), len })?;
            Ok(match &buffer.place {
                Place::Arena => {
                    let entry = arena.entry(id);
                    let index = entry.index() as u32;
                    entry.or_insert_with(|| buffer.ty.clone());
                    BufRef::Arena(index)
                }
                Place::State { name, role } => {
                    let show = |(ty, role): &(TensorType, StateRole)| format!("{ty} {}", role.name());
                    let state = (buffer.ty.clone(), *role);
                    BufRef::State(one("state", &mut self.states, name.clone(), name, state, show)?)
                }
                Place::Weight { name, rows, layout } => {
                    let show = |(ty, layout): &(TensorType, Layout)| match layout {
                        Layout::RowMajor => ty.to_string(),
                        layout => format!("{ty} {}", layout.name()),
                    };
                    let (key, weight) = ((name.clone(), *rows), (buffer.ty.clone(), *layout));
                    BufRef::Weight(one("weight", &mut self.weights, key, name, weight, show)?)
                }
            })
        };
        let home = |what, name: &str, program: &str| PlanError::Home {
            program: program.to_owned(),
            what,
            name: name.to_owned(),
        };
        let mut planned_inputs = vec![];
        for (input, id) in inputs {
            let BufRef::Arena(buffer) = resolve(id)? else { return Err(home("input", &input, &name)) };
            planned_inputs.push(Input { name: input, buffer, below: None, distinct: false });
        }
        let mut numbered = vec![];
        for call in calls {
            let index = kernel_index.get(call.kernel as usize);
            let len = kernel_index.len();
            let missing = PlanError::Index { what: "kernel", index: call.kernel.into(), len };
            let kernel = *index.ok_or(missing)?;
            let args = call.args.into_iter().map(&mut resolve).collect::<Result<Vec<_>, _>>()?;
            for (arg, at) in self.kernels[kernel as usize].args().zip(&args) {
                let (Some(index), BufRef::Arena(buffer)) = (arg.index, at) else { continue };
                if index.source == IndexSource::Input {
                    let mut inputs = planned_inputs.iter_mut().filter(|i| i.buffer == *buffer);
                    inputs.try_for_each(|input| input.hold_to(&index))?;
                }
            }
            numbered.push(NumberedCall { kernel, args, label: call.label });
        }
        let mut planned_results = vec![];
        for (i, id) in results.into_iter().enumerate() {
            let BufRef::Arena(buffer) = resolve(id)? else {
                return Err(home("result", &i.to_string(), &name));
            };
            planned_results.push(buffer);
        }
        Ok(Numbered {
            name,
            bounds,
            calls: numbered,
            buffers: arena.into_values().collect(),
            inputs: planned_inputs,
            results: planned_results,
            report,
        })
    }
}

impl Input {
    /// Holds the values to what a kernel asks for, too.
    fn hold_to(&mut self, index: &Index) -> Result<(), PlanError> {
        let below = match self.below {
            None => index.below,
            Some(below) if below == index.below => below,
            // A sum of symbols is no less than another only for some steps.
            Some(below) => match (below.as_const(), index.below.as_const()) {
                (Some(a), Some(b)) => Dim::n(a.min(b)),
                (a, b) => {
                    let (a, b) = (a.map_or(below, Dim::n), b.map_or(index.below, Dim::n));
                    return Err(PlanError::Limits { input: self.name.clone(), a, b });
                }
            },
        };
        self.below = Some(below);
        self.distinct |= index.distinct;
        Ok(())
    }
}

/// The index of `key` in `table`, which has or gets `new` there.
fn one<K: Eq + Hash, T: PartialEq>(
    what: &'static str,
    table: &mut IndexMap<K, T>,
    key: K,
    name: &str,
    new: T,
    show: impl Fn(&T) -> String,
) -> Result<u32, PlanError> {
    match table.entry(key) {
        Entry::Vacant(entry) => {
            let index = entry.index();
            entry.insert(new);
            Ok(index as u32)
        }
        Entry::Occupied(entry) if *entry.get() == new => Ok(entry.index() as u32),
        Entry::Occupied(entry) => {
            let (a, b) = (show(entry.get()), show(&new));
            Err(PlanError::Types { what, name: name.to_owned(), a, b })
        }
    }
}
