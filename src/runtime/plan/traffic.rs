//! What a step must move: the bytes that its speed is held against.

use super::{BufRef, Plan, lookups};
use crate::codegen::spec::Access;
use crate::ir::{Syms, TensorType};
use std::collections::{BTreeMap, BTreeSet};

impl Plan {
    /// The bytes of weights and states that one step of `program` reads and writes at `at`, each counted once however
    /// many launches touch it. None if there is no such program.
    ///
    /// A weight counts whole, but by the rows looked up if it is a table that is only looked up in. A state counts by
    /// the filled rows `0..P+T` where launches read it, and again by the new rows `P..P+T` where they write it.
    /// Activations do not count: a step leaves them in the caches of the processor.
    pub fn bytes_per_step(&self, program: &str, at: &Syms) -> Option<u64> {
        let mut whole = BTreeSet::new();
        let mut rows: BTreeMap<u32, u64> = BTreeMap::new();
        let mut filled = BTreeSet::new();
        let mut appended = BTreeSet::new();
        for launch in &self.programs.get(program)?.launches {
            let kernel = &self.kernels[launch.kernel as usize];
            let lookup = lookups(kernel);
            for (i, (buffer, arg)) in launch.args.iter().zip(&kernel.args).enumerate() {
                match (*buffer, lookup) {
                    (BufRef::Arena(_), _) => {}
                    (BufRef::State(s), _) if arg.access == Access::Update => _ = appended.insert(s),
                    (BufRef::State(s), _) => _ = filled.insert(s),
                    (BufRef::Weight(w), Some((table, ids))) if usize::from(table) == i => {
                        *rows.entry(w).or_default() += kernel.args[usize::from(ids)].ty.elements(at);
                    }
                    (BufRef::Weight(w), _) => _ = whole.insert(w),
                }
            }
        }
        rows.retain(|w, _| !whole.contains(w));
        let weight = |w: u32| &self.weights[w as usize].ty;
        let state = |s: u32| row_bytes(&self.states[s as usize].ty, at);
        let terms = (whole.iter().map(|w| weight(*w).bytes(at)))
            .chain(rows.iter().map(|(w, n)| row_bytes(weight(*w), at).saturating_mul(*n)))
            .chain(filled.iter().map(|s| state(*s).saturating_mul(at.p.saturating_add(at.t))))
            .chain(appended.iter().map(|s| state(*s).saturating_mul(at.t)));
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
        let bytes = |program, t, p| plan.bytes_per_step(program, &Syms { t, p, s: 16 });
        // A row of the table per token, the bias, the rows that are filled then, and the new ones: 32 bytes each.
        assert_eq!(bytes("decode", 1, 0), Some(32 + 32 + 32 + 32));
        assert_eq!(bytes("decode", 1, 9), Some(32 + 32 + 10 * 32 + 32));
        assert_eq!(bytes("prefill", 4, 3), Some(4 * 32 + 32 + 7 * 32 + 4 * 32));
        assert_eq!(bytes("score", 1, 0), None);
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
        reader.args = vec![
            Arg { access: Access::Read, ty: table.ty.clone() },
            Arg { access: Access::Write, ty: table.ty.clone() },
        ];
        decode.kernels.push(reader);
        decode.buffers.push(Buffer { ty: table.ty.clone(), place: Place::Arena });
        let args = vec![1, decode.buffers.len() as u32 - 1];
        let launch = Launch { kernel: 4, args, label: "whole".into() };
        decode.launches.extend([launch.clone(), launch]);
        let plan = Plan::build(parts).unwrap();
        let bytes = plan.bytes_per_step("decode", &Syms { t: 1, p: 0, s: 16 });
        assert_eq!(bytes, Some(5 * 32 + 32 + 32 + 32));
    }
}
