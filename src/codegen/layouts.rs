//! How weights lie in memory: chosen once for each, for all programs that read it and all their uses of it.

use super::spec::{ArgId, KernelSpec, Layout};
use super::{CodegenError, backend, kernel_spec};
use crate::ir::{Graph, Op, Slice, TensorType, Value, Verified};
use crate::target::Target;
use indexmap::IndexMap;
use std::ops::Range;

/// The name of a tensor, and which of its rows.
type Key = (String, Option<Slice>);

/// The weights of some graphs that are not to lie row after row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layouts(IndexMap<Key, Layout>);

impl Layouts {
    /// What the back end of `target` chooses for the weights of all graphs that are to share them.
    ///
    /// # Errors
    /// A node that no kernel computes.
    pub fn choose<'a>(
        graphs: impl IntoIterator<Item = &'a Verified>,
        target: &Target,
    ) -> Result<Layouts, CodegenError> {
        let backend = backend(target.kind);
        let mut weights: IndexMap<Key, Weight> = IndexMap::new();
        for graph in graphs {
            for id in graph.ids() {
                let Op::Weight { name, rows } = graph.op(id) else { continue };
                let ty = graph.ty(id.into());
                let weight = weights.entry((name.clone(), *rows)).or_insert_with(|| Weight::new(ty));
                weight.add_uses(graph, id.into())?;
            }
        }
        let chosen = weights.iter().filter_map(|((name, rows), weight)| {
            // Rows that two weights have would be stored twice.
            let mut others = weights.iter().filter(|((other, of), _)| other == name && of != rows);
            let mine = weight.rows(*rows);
            let shared = others.any(|((_, of), other)| {
                let other = other.rows(*of);
                mine.start < other.end && other.start < mine.end
            });
            let layout = if shared || weight.viewed {
                Layout::RowMajor
            } else {
                backend.layout(&weight.ty, &weight.uses)
            };
            (layout != Layout::RowMajor).then(|| ((name.clone(), *rows), layout))
        });
        Ok(Layouts(chosen.collect()))
    }

    /// How a weight lies.
    pub fn of(&self, name: &str, rows: Option<Slice>) -> Layout {
        self.0.get(&(name.to_owned(), rows)).copied().unwrap_or_default()
    }
}

/// A weight of some graphs.
struct Weight {
    ty: TensorType,
    /// The kernels that read it, each with the argument that it is.
    uses: Vec<(KernelSpec, ArgId)>,
    /// Seen as another shape.
    viewed: bool,
}

impl Weight {
    fn new(ty: &TensorType) -> Weight {
        Weight { ty: ty.clone(), uses: vec![], viewed: false }
    }

    fn add_uses(&mut self, graph: &Graph, weight: Value) -> Result<(), CodegenError> {
        for (user, slot) in graph.uses(weight) {
            if graph.op(user).is_view() || matches!(graph.op(user), Op::Return) {
                self.viewed = true;
                continue;
            }
            let used = (kernel_spec(graph, user)?, slot as ArgId);
            if !self.uses.contains(&used) {
                self.uses.push(used);
            }
        }
        Ok(())
    }

    /// Which rows of its tensor these are.
    fn rows(&self, slice: Option<Slice>) -> Range<u64> {
        let first = slice.map_or(0, |slice| slice.first);
        first..first.saturating_add(self.ty.first().c)
    }
}
