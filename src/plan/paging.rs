//! The pages of the caches, as the kernels of a plan have them.

use super::{Plan, PlanError};
use crate::codegen::spec::{ArgId, Computation, Implementation, RopeAttentionSpec};
use crate::ir::{MAX_SEQUENCES, Op, StateRole};

/// How the rows of the appended states are handed out: in pages, which every sequence finds by its block table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Rows of a page.
    pub page: u64,
    /// Pages there are.
    pub pages: u64,
    /// Pages that one sequence may have.
    pub table: u64,
    /// Sequences at once.
    pub sequences: u64,
    /// Positions that any token sees, itself included; none if some mask has no window. What lies further back is not kept.
    pub window: Option<u64>,
}

impl Plan {
    /// The pages of the caches; none if no kernel goes over them.
    ///
    /// # Errors
    /// If two kernels, or a kernel and the caches, do not agree.
    pub fn paging(&self) -> Result<Option<Paging>, PlanError> {
        let mut found: Option<Paging> = None;
        let mut windows = vec![];
        for kernel in &self.kernels {
            let paging = match &kernel.spec.computes {
                Computation::Attention(a)
                | Computation::RopeAttention(RopeAttentionSpec { attention: a, .. }) => {
                    windows.push(a.window);
                    of_kernel(kernel, a.k, a.tables, a.page)?
                }
                Computation::Op(Op::KvRead { page }) => of_kernel(kernel, 0, 1, *page)?,
                Computation::Op(Op::CausalMask { window }) => {
                    windows.push(*window);
                    continue;
                }
                Computation::Op(
                    Op::Input { .. }
                    | Op::Weight { .. }
                    | Op::State { .. }
                    | Op::Const { .. }
                    | Op::GetRows
                    | Op::Dequant
                    | Op::QuantAct
                    | Op::MatMul { .. }
                    | Op::MatMulId
                    | Op::Add
                    | Op::Mul
                    | Op::Silu
                    | Op::RmsNorm { .. }
                    | Op::Rope(_)
                    | Op::Reshape
                    | Op::KvAppend
                    | Op::Scores { .. }
                    | Op::Softmax
                    | Op::WeightedSum
                    | Op::GatedScan
                    | Op::ArgMax
                    | Op::Fused(_)
                    | Op::Return,
                )
                | Computation::Matmul(_)
                | Computation::Norm(_)
                | Computation::RopeKv(_)
                | Computation::Swiglu(_)
                | Computation::GatedScan(_) => continue,
            };
            let found = found.get_or_insert(paging);
            if paging != *found {
                return Err(PlanError::Paging(format!("{paging:?} and {found:?}")));
            }
        }
        // One mask without a window sees everything.
        let window = windows.into_iter().collect::<Option<Vec<u32>>>().and_then(|w| w.into_iter().max());
        let found = found.map(|paging| Paging { window: window.map(u64::from), ..paging });
        if let Some(paging) = found {
            let rows = paging.pages * paging.page;
            // Rows and positions are counted in i32.
            let counted = |n: Option<u64>| n.is_some_and(|n| i32::try_from(n).is_ok());
            if !counted(Some(rows)) || !counted(paging.table.checked_mul(paging.page)) {
                return Err(PlanError::Paging(format!("{paging:?} is more than can be counted")));
            }
            if paging.sequences > MAX_SEQUENCES {
                return Err(PlanError::Paging(format!("{} sequences are too many", paging.sequences)));
            }
            let appended = self.states.iter().filter(|s| s.role == StateRole::Appended);
            if let Some(state) = appended.into_iter().find(|s| s.ty.first().as_const() != Some(rows)) {
                return Err(PlanError::Paging(format!("{} has not {rows} rows", state.name)));
            }
        }
        Ok(found)
    }
}

/// The pages of a kernel that reads a cache by block tables.
fn of_kernel(kernel: &Implementation, cache: ArgId, tables: ArgId, page: u32) -> Result<Paging, PlanError> {
    let dim = |arg: ArgId, axis: usize| {
        kernel.arg(arg).and_then(|arg| arg.ty.shape.get(axis)?.as_const()).filter(|&n| n > 0)
    };
    match (dim(cache, 0), dim(tables, 0), dim(tables, 1), u64::from(page)) {
        (Some(rows), Some(sequences), Some(table), page) if page > 0 && rows % page == 0 => {
            Ok(Paging { page, pages: rows / page, table, sequences, window: None })
        }
        _ => Err(PlanError::Paging(format!("{kernel} has no whole pages"))),
    }
}
