//! What a step must move: the bytes that its speed is held against.

use super::{BufRef, Plan, lookups};
use crate::codegen::spec::Access;
use crate::ir::{StateRole, Syms, TensorType};
use std::collections::{BTreeMap, BTreeSet};

impl Plan {
    /// The bytes of weights and states that one step of the program of this index reads and writes at `at`, each counted
    /// once however many launches touch it. None if there is no such program.
    ///
    /// A weight counts whole, but by the rows looked up if it is a table that is only looked up in. A cache counts by
    /// the rows that are `filled` after the step, of all its sequences, where launches read it, and again by the `T` new
    /// ones where they write it; a replaced state counts whole, read and written. Activations do not count: a step leaves
    /// them in the caches of the processor.
    pub fn bytes_per_step(&self, program: usize, at: &Syms, filled: u64) -> Option<u64> {
        let mut whole = BTreeSet::new();
        let mut rows: BTreeMap<u32, u64> = BTreeMap::new();
        let mut read = BTreeSet::new();
        let mut written = BTreeSet::new();
        for launch in &self.programs.get(program)?.launches {
            let kernel = &self.kernels[launch.kernel as usize];
            let lookup = lookups(kernel);
            for (i, (buffer, arg)) in launch.args.iter().zip(&kernel.args).enumerate() {
                match (*buffer, lookup) {
                    (BufRef::Arena(_), _) => {}
                    (BufRef::State(s), _) if arg.access == Access::Update => _ = written.insert(s),
                    (BufRef::State(s), _) => _ = read.insert(s),
                    (BufRef::Weight(w), Some((table, ids))) if usize::from(table) == i => {
                        *rows.entry(w).or_default() += kernel.args[usize::from(ids)].ty.elements(at);
                    }
                    (BufRef::Weight(w), _) => _ = whole.insert(w),
                }
            }
        }
        rows.retain(|w, _| !whole.contains(w));
        let weight = |w: u32| &self.weights[w as usize].ty;
        let state = |s: u32, rows: u64| match self.states[s as usize].role {
            StateRole::Appended => row_bytes(&self.states[s as usize].ty, at).saturating_mul(rows),
            StateRole::Replaced => self.states[s as usize].ty.bytes(at).saturating_mul(2),
        };
        let terms = (whole.iter().map(|w| weight(*w).bytes(at)))
            .chain(rows.iter().map(|(w, n)| row_bytes(weight(*w), at).saturating_mul(*n)))
            .chain(read.iter().map(|s| state(*s, filled)))
            .chain(written.iter().map(|s| state(*s, at.t)));
        Some(terms.fold(0, u64::saturating_add))
    }
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
    use crate::codegen::spec::{Arg, Buffer, Launch, Place, Primitive, Template};

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
    fn a_table_that_is_read_whole_counts_once() {
        let mut parts = parts(identity());
        let (decode, _) = &mut parts.programs[1];
        // Two launches of a kernel that reads the table whole, beside the one that looks rows up.
        let table = decode.buffers[1].clone();
        assert_eq!(table.place, Place::Weight("table".into()));
        let mut reader = decode.kernels[3].clone();
        assert_eq!(reader.template, Template::Primitive(Primitive::Silu));
        reader.args =
            vec![Arg::new(Access::Read, table.ty.clone()), Arg::new(Access::Write, table.ty.clone())];
        decode.kernels.push(reader);
        decode.buffers.push(Buffer { ty: table.ty.clone(), place: Place::Arena });
        let args = vec![1, decode.buffers.len() as u32 - 1];
        let launch = Launch { kernel: 5, args, label: "whole".into() };
        decode.launches.extend([launch.clone(), launch]);
        let plan = Plan::build(parts).unwrap();
        let bytes = plan.bytes_per_step(1, &Syms { t: 1, r: 0 }, 1);
        assert_eq!(bytes, Some(5 * 32 + 32 + 32 + 32));
    }
}
