//! What a step must move: the bytes that its speed is held against.

use super::{BufRef, Plan, State, lookups};
use crate::codegen::spec::{Access, AttentionSpec, Computation, KernelSpec};
use crate::ir::{StateRole, Syms, TensorType};
use std::collections::{BTreeMap, BTreeSet};

impl Plan {
    /// The bytes of weights and states that one step of the program of this index reads and writes at `at`, each counted
    /// once however many calls touch it. None if there is no such program.
    ///
    /// A weight counts whole, but by the rows looked up if it is a table that is only looked up in. A cache counts by
    /// the rows that are `filled` after the step, of all its sequences, where calls read it, and again by the `T` new
    /// ones where they write it; a replaced state counts whole, read and written. Activations do not count: a step leaves
    /// them in the caches of the processor.
    pub fn bytes_per_step(&self, program: usize, at: &Syms, filled: u64) -> Option<u64> {
        let mut whole = BTreeSet::new();
        let mut rows: BTreeMap<u32, u64> = BTreeMap::new();
        let mut read = BTreeSet::new();
        let mut written = BTreeSet::new();
        for call in &self.programs.get(program)?.calls {
            let kernel = &self.kernels[call.kernel as usize];
            let lookup = lookups(&kernel.spec);
            for (i, (buffer, arg)) in call.args.iter().zip(kernel.args()).enumerate() {
                match (*buffer, lookup) {
                    (BufRef::Arena(_), _) => {}
                    (BufRef::State(s), _) => {
                        let replaced = self.states[s as usize].role == StateRole::Replaced;
                        if arg.access == Access::Update {
                            written.insert(s);
                        }
                        if replaced || arg.access != Access::Update {
                            read.insert(s);
                        }
                    }
                    (BufRef::Weight(w), Some((table, ids))) if usize::from(table) == i => {
                        *rows.entry(w).or_default() += kernel.arg(ids).map_or(0, |ids| ids.ty.elements(at));
                    }
                    (BufRef::Weight(w), _) => _ = whole.insert(w),
                }
            }
        }
        rows.retain(|w, _| !whole.contains(w));
        let weight = |w: u32| &self.weights[w as usize].ty;
        let state = |s: u32, rows: u64| match self.states[s as usize].role {
            StateRole::Appended => row_bytes(&self.states[s as usize].ty, at).saturating_mul(rows),
            StateRole::Replaced => self.states[s as usize].ty.bytes(at),
        };
        let terms = (whole.iter().map(|w| weight(*w).bytes(at)))
            .chain(rows.iter().map(|(w, n)| row_bytes(weight(*w), at).saturating_mul(*n)))
            .chain(read.iter().map(|s| state(*s, filled)))
            .chain(written.iter().map(|s| state(*s, at.t)));
        Some(terms.fold(0, u64::saturating_add))
    }
}

/// What one call has to do at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallWork {
    /// Bytes of weights, states and activations that it reads or writes, each argument once.
    pub bytes: u64,
    /// Of them, those of weights.
    pub weights: u64,
    /// And those of states.
    pub states: u64,
    /// Operations of its matmuls and its attention, two for each product that is added.
    pub operations: u64,
}

impl CallWork {
    /// What both have to do.
    #[must_use]
    pub fn and(self, other: CallWork) -> CallWork {
        CallWork {
            bytes: self.bytes.saturating_add(other.bytes),
            weights: self.weights.saturating_add(other.weights),
            states: self.states.saturating_add(other.states),
            operations: self.operations.saturating_add(other.operations),
        }
    }
}

impl Plan {
    /// What a call of a program has to do at `at`, where sequences have `filled` rows of the caches after the step, all together. A table
    /// counts by the rows looked up, a cache by the rows filled where it is read and by the new ones where it is written. None if there
    /// is no such call.
    pub fn work_of_call(&self, program: usize, call: usize, at: &Syms, filled: u64) -> Option<CallWork> {
        let call = self.programs.get(program)?.calls.get(call)?;
        let kernel = &self.kernels[call.kernel as usize];
        let lookup = lookups(&kernel.spec);
        let mut work = CallWork::default();
        for (i, (buffer, arg)) in call.args.iter().zip(kernel.args()).enumerate() {
            let bytes = match (*buffer, lookup) {
                (BufRef::State(s), _) => {
                    let State { ty, role, .. } = &self.states[s as usize];
                    match (role, arg.access) {
                        (StateRole::Replaced, _) => ty.bytes(at).saturating_mul(2),
                        (StateRole::Appended, Access::Update) if attends(&kernel.spec) => {
                            row_bytes(ty, at).saturating_mul(filled)
                        }
                        (StateRole::Appended, Access::Update) => row_bytes(ty, at).saturating_mul(at.t),
                        (StateRole::Appended, _) => row_bytes(ty, at).saturating_mul(filled),
                    }
                }
                (_, Some((table, ids))) if usize::from(table) == i => {
                    let rows = kernel.arg(ids).map_or(0, |ids| ids.ty.elements(at));
                    row_bytes(&arg.ty, at).saturating_mul(rows)
                }
                (BufRef::Weight(w), _) => self.weights[w as usize].ty.bytes(at),
                (BufRef::Arena(_), _) if arg.access == Access::Scratch => 0,
                (BufRef::Arena(_), _) => arg.ty.bytes(at),
            };
            let (weights, states) = match buffer {
                BufRef::Weight(_) => (bytes, 0),
                BufRef::State(_) => (0, bytes),
                BufRef::Arena(_) => (0, 0),
            };
            work = work.and(CallWork { bytes, weights, states, operations: 0 });
        }
        let tokens = |arg: u16| kernel.arg(arg).map_or(at.t, |arg| arg.ty.first().eval(at));
        let operations = match &kernel.spec.computes {
            Computation::Matmul(m) => {
                let rows: u64 = m.parts.iter().map(|part| part.rows).sum();
                2 * rows.saturating_mul(m.k).saturating_mul(tokens(m.x))
            }
            Computation::Attention(m) => of_attention(m, at, filled),
            Computation::RopeAttention(m) => of_attention(&m.attention, at, filled),
            Computation::Norm(_)
            | Computation::RopeKv(_)
            | Computation::Swiglu(_)
            | Computation::GatedScan(_)
            | Computation::Op(_) => 0,
        };
        Some(CallWork { operations, ..work })
    }
}

/// Whether a kernel attends to what it appends to.
fn attends(kernel: &KernelSpec) -> bool {
    matches!(kernel.computes, Computation::RopeAttention(_))
}

/// Scores and weighted values, of queries that see half of the new rows in the mean, as if all sequences were one.
fn of_attention(m: &AttentionSpec, at: &Syms, filled: u64) -> u64 {
    let seen = filled.saturating_sub(at.t / 2);
    (4 * m.heads * m.head_dim).saturating_mul(seen).saturating_mul(at.t)
}

/// Bytes of one step along the first dimension.
fn row_bytes(ty: &TensorType, at: &Syms) -> u64 {
    let rows = ty.shape.first().map_or(1, |dim| dim.eval(at));
    ty.bytes(at) / rows.max(1)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{identity, parts};
    use super::*;
    use crate::codegen::spec::{Arg, Buffer, Call, Place};
    use crate::ir::Op;

    #[test]
    fn tables_and_caches_count_by_rows() {
        let plan = Plan::build(parts(identity())).unwrap();
        let bytes = |program, t, p| plan.bytes_per_step(program, &Syms { t, r: 0 }, t + p);
        // A row of the table per token, the bias, the rows that are filled then, and the new ones: 32 bytes each.
        assert_eq!(bytes(1, 1, 0), Some(32 + 32 + 32 + 32));
        assert_eq!(bytes(1, 1, 9), Some(32 + 32 + 10 * 32 + 32));
        assert_eq!(bytes(0, 4, 3), Some(4 * 32 + 32 + 7 * 32 + 4 * 32));
        assert_eq!(bytes(2, 1, 0), None);
    }

    #[test]
    fn a_replaced_state_counts_whole_read_and_written() {
        let mut parts = parts(identity());
        for (program, _) in &mut parts.programs {
            let state = program.buffers.iter_mut().find(|b| matches!(b.place, Place::State { .. })).unwrap();
            state.place = Place::State { name: "state".into(), role: StateRole::Replaced };
            // Nothing but what replaces it reads it.
            program.calls.truncate(3);
            program.results = vec![4];
        }
        let plan = Plan::build(parts).unwrap();
        // 16 rows of 32 bytes, twice, beside a row of the table and the bias.
        assert_eq!(plan.bytes_per_step(1, &Syms { t: 1, r: 0 }, 1), Some(2 * 16 * 32 + 32 + 32));
    }

    /// What calls do sums up to what the step does, and the activations between them.
    #[test]
    fn calls_count_each_for_itself() {
        let plan = Plan::build(parts(identity())).unwrap();
        let at = Syms { t: 1, r: 0 };
        let program = &plan.programs[1];
        let works: Vec<CallWork> =
            (0..program.calls.len()).map(|call| plan.work_of_call(1, call, &at, 10).unwrap()).collect();
        let between: u64 = (program
            .calls
            .iter()
            .flat_map(|call| plan.kernels[call.kernel as usize].args().zip(&call.args).collect::<Vec<_>>()))
        .filter(|(_, place)| matches!(place, BufRef::Arena(_)))
        .map(|(arg, _)| arg.ty.bytes(&at))
        .sum();
        let step = plan.bytes_per_step(1, &at, 10).unwrap();
        assert_eq!(works.iter().map(|work| work.bytes).sum::<u64>(), step + between);
        assert!(works.iter().all(|work| work.operations == 0), "there is no matmul");
        let all = works.into_iter().reduce(CallWork::and).unwrap();
        // A row of the table and the bias; the rows that are filled, and the new one. The rest is between calls.
        assert_eq!((all.weights, all.states, all.bytes - between), (32 + 32, 10 * 32 + 32, step));
        assert_eq!(plan.work_of_call(1, program.calls.len(), &at, 10), None);
    }

    #[test]
    fn a_table_that_is_read_whole_counts_once() {
        let mut parts = parts(identity());
        let (decode, _) = &mut parts.programs[1];
        // Two calls of a kernel that reads the table whole, beside the one that looks rows up.
        let table = decode.buffers[1].clone();
        assert_eq!(table.place, Place::weight("table"));
        let mut reader = decode.kernels[3].clone();
        assert_eq!(reader.spec.computes, Computation::Op(Op::Silu));
        reader.spec.args =
            vec![Arg::new(Access::Read, table.ty.clone()), Arg::new(Access::Write, table.ty.clone())];
        decode.kernels.push(reader);
        decode.buffers.push(Buffer { ty: table.ty.clone(), place: Place::Arena });
        let args = vec![1, decode.buffers.len() as u32 - 1];
        let call = Call { kernel: 5, args, label: "whole".into() };
        decode.calls.extend([call.clone(), call]);
        let plan = Plan::build(parts).unwrap();
        let bytes = plan.bytes_per_step(1, &Syms { t: 1, r: 0 }, 1);
        assert_eq!(bytes, Some(5 * 32 + 32 + 32 + 32));
    }
}
