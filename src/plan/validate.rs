//! The rules of a plan, checked.

use super::flow::{Tables, View, flow};
use super::memory::{MemoryError, check_placement, check_region};
use super::schedule::{Flow, Slot};
use super::{BufRef, Input, Plan, PlanError, PlannedProgram, Tensor, state_bytes};
use crate::codegen::spec::{Access, Index, IndexSource, Layout};
use crate::ir::{DType, MAX_SEQUENCES};
use std::collections::BTreeSet;

impl Plan {
    /// What `program` does to memory.
    fn flow(&self, program: &PlannedProgram) -> Result<Flow, MemoryError> {
        let tables = Tables { kernels: &self.kernels, states: &self.states, weights: &self.weights };
        let view = View {
            bounds: program.bounds,
            buffers: program.buffers.iter().map(|buffer| &buffer.ty).collect(),
            inputs: &program.inputs,
            results: &program.results,
            calls: program.calls.iter().map(|call| (call.kernel, &call.args[..], &call.label[..])).collect(),
        };
        flow(&tables, &view)
    }

    /// Holds the plan to the rules of this module.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn validate(&self) -> Result<(), PlanError> {
        self.target.validate().map_err(PlanError::Target)?;
        let super::Options { context, sequences, chunk, kv, .. } = self.options;
        // Tokens are counted in i32 wherever they are positions or rows.
        let all = context.checked_mul(sequences).filter(|n| i32::try_from(*n).is_ok());
        let sane = 1 <= chunk && all.is_some_and(|all| chunk <= all) && sequences <= MAX_SEQUENCES;
        if !sane || [kv.k, kv.v].iter().any(|kv| !matches!(kv, DType::F32 | DType::F16)) {
            return Err(PlanError::Options { context, sequences, chunk, kv });
        }
        let mut seen = BTreeSet::new();
        if let Some(weight) = self.weights.iter().find(|w| !seen.insert((&w.name, w.rows))) {
            return Err(PlanError::Duplicate { what: "weights", name: weight.name.clone() });
        }
        unique("states", self.states.iter().map(|s| &s.name))?;
        for weight in &self.weights {
            if weight.ty.shape.iter().any(|d| d.as_const().is_none()) {
                let (name, ty) = (weight.name.clone(), weight.ty.clone());
                return Err(PlanError::Varies { what: "weight", name, ty });
            }
            if let Some(why) = weight.rows.and_then(|rows| rows.fits(&weight.ty).err()) {
                return Err(PlanError::Rows { name: weight.name.clone(), why });
            }
            if !weight.layout.fits(&weight.ty) {
                let why = format!("{} cannot lie {}", weight.ty, weight.layout.name());
                return Err(PlanError::Rows { name: weight.name.clone(), why });
            }
        }
        self.validate_repacked()?;
        self.validate_pool()?;
        for program in &self.programs {
            self.validate_program(&program.name, program)?;
        }
        self.paging()?;
        self.validate_objects()
    }

    /// Rows that are repacked are there but once.
    fn validate_repacked(&self) -> Result<(), PlanError> {
        let rows = |weight: &Tensor| {
            let first = weight.rows.map_or(0, |rows| rows.first);
            (first, first.saturating_add(weight.ty.first().c))
        };
        let mut sorted: Vec<&Tensor> = self.weights.iter().collect();
        sorted.sort_by_key(|weight| (&weight.name, rows(weight)));
        // Of the weights of a tensor so far, how far the rows go of all, and of those that are repacked.
        let mut ends = ("", 0, 0);
        for weight in sorted {
            let (first, end) = rows(weight);
            if ends.0 != weight.name {
                ends = (&weight.name, 0, 0);
            }
            let repacked = weight.layout != Layout::RowMajor;
            if first < ends.2 || repacked && first < ends.1 {
                let why = format!("row {first} is repacked, and in another weight too");
                return Err(PlanError::Rows { name: weight.name.clone(), why });
            }
            ends.1 = end.max(ends.1);
            if repacked {
                ends.2 = end.max(ends.2);
            }
        }
        Ok(())
    }

    /// States first, one after the other, then the arena.
    fn validate_pool(&self) -> Result<(), PlanError> {
        let mut regions = vec![];
        for state in &self.states {
            let bytes = state_bytes(&state.name, &state.ty)?;
            let name = format!("state {:?}", state.name);
            check_region(&name, state.offset, bytes, self.arena_offset)?;
            regions.push((state.offset, bytes, name));
        }
        regions.sort();
        for pair in regions.windows(2) {
            let [(offset, bytes, a), (next, _, b)] = pair else { continue };
            if offset + bytes > *next {
                return Err(MemoryError::Overlap { a: a.clone(), b: b.clone() }.into());
            }
        }
        let room = i64::MAX as u64;
        Ok(check_region("the arena", self.arena_offset, self.arena_bytes, room)?)
    }

    fn validate_program(&self, name: &str, program: &PlannedProgram) -> Result<(), PlanError> {
        let bounds = program.bounds;
        if bounds.t < 1 || bounds.r > bounds.t || i32::try_from(bounds.t).is_err() {
            return Err(PlanError::Bounds { program: name.to_owned(), bounds });
        }
        self.validate_indices(program)?;
        unique("inputs", program.inputs.iter().map(|i| &i.name))?;
        self.validate_lookups(name, program)?;

        let of = |source: MemoryError| PlanError::Program { program: name.to_owned(), source };
        let flow = self.flow(program).map_err(of)?;
        self.validate_layouts(name, program)?;
        let slots: Vec<Slot> = program.calls.iter().map(|call| call.slot.clone()).collect();
        let offsets: Vec<Option<u64>> = program.buffers.iter().map(|b| Some(b.offset)).collect();
        check_placement(&flow, &slots, self.target.streams, &offsets, program.arena_bytes).map_err(of)?;
        if program.arena_bytes > self.arena_bytes {
            let (needs, have) = (program.arena_bytes, self.arena_bytes);
            return Err(PlanError::Arena { program: name.to_owned(), needs, have });
        }
        if program.lower_bound > program.arena_bytes {
            let (claimed, lower_bound) = (program.arena_bytes, program.lower_bound);
            return Err(PlanError::LowerBound { program: name.to_owned(), claimed, lower_bound });
        }
        Ok(())
    }

    fn validate_indices(&self, program: &PlannedProgram) -> Result<(), PlanError> {
        let within = |what, index: u32, len: usize| {
            let missing = PlanError::Index { what, index: index.into(), len };
            if (index as usize) < len { Ok(()) } else { Err(missing) }
        };
        for input in &program.inputs {
            within("buffer", input.buffer, program.buffers.len())?;
        }
        for result in &program.results {
            within("buffer", *result, program.buffers.len())?;
        }
        for call in &program.calls {
            within("kernel", call.kernel, self.kernels.len())?;
            for arg in &call.args {
                match *arg {
                    BufRef::Arena(i) => within("buffer", i, program.buffers.len())?,
                    BufRef::State(i) => within("state", i, self.states.len())?,
                    BufRef::Weight(i) => within("weight", i, self.weights.len())?,
                }
            }
        }
        Ok(())
    }

    /// The second half of rule 6. Only weights lie otherwise than row after row.
    fn validate_layouts(&self, name: &str, program: &PlannedProgram) -> Result<(), PlanError> {
        for call in &program.calls {
            let kernel = &self.kernels[call.kernel as usize];
            for (arg, at) in (0..).zip(&call.args) {
                let lies = match *at {
                    BufRef::Weight(i) => self.weights[i as usize].layout,
                    BufRef::Arena(_) | BufRef::State(_) => Layout::RowMajor,
                };
                if kernel.layout(arg) != lies {
                    let (program, call) = (name.to_owned(), call.label.clone());
                    return Err(PlanError::Layout { program, call, arg });
                }
            }
        }
        Ok(())
    }

    /// Rule 5: what a kernel follows exists. Every index of the plan is known to be in range.
    fn validate_lookups(&self, name: &str, program: &PlannedProgram) -> Result<(), PlanError> {
        let mut written = BTreeSet::new();
        for call in &program.calls {
            for (arg, at) in self.kernels[call.kernel as usize].args().zip(&call.args) {
                if arg.access != Access::Read {
                    written.insert(*at);
                }
            }
        }
        for call in &program.calls {
            let kernel = &self.kernels[call.kernel as usize];
            for (arg, at) in kernel.args().zip(&call.args) {
                let Some(index) = arg.index.filter(|index| index.source == IndexSource::Input) else {
                    continue;
                };
                let unchecked =
                    || PlanError::Unchecked { program: name.to_owned(), call: call.label.clone() };
                let BufRef::Arena(buffer) = *at else { return Err(unchecked()) };
                let mut inputs = program.inputs.iter().filter(|i| i.buffer == buffer);
                let (Some(input), None) = (inputs.next(), inputs.next()) else { return Err(unchecked()) };
                // All values that the kernel follows are values of the input, at every size of a step.
                let whole = arg.ty.dtype == DType::I32 && program.buffers[buffer as usize].ty == arg.ty;
                if !whole || written.contains(at) || input.below.is_none() {
                    return Err(unchecked());
                }
                if !input.suits(&index) {
                    let (input, call) = (input.name.clone(), call.label.clone());
                    return Err(PlanError::Below { program: name.to_owned(), input, call });
                }
            }
        }
        Ok(())
    }
}

impl Input {
    /// Whether every value that the input may have suits a kernel.
    fn suits(&self, index: &Index) -> bool {
        let within = self.below.is_some_and(|below| match (below.as_const(), index.below.as_const()) {
            (Some(have), Some(most)) => have <= most,
            _ => below == index.below,
        });
        within && (self.distinct || !index.distinct)
    }
}

fn unique<'a>(what: &'static str, names: impl Iterator<Item = &'a String>) -> Result<(), PlanError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(PlanError::Duplicate { what, name: name.clone() });
        }
    }
    Ok(())
}
