//! The back end of the CPU: how much of a kernel one work item computes, and what may lie in place.

use super::Backend;
use super::in_place::{residuals, summands};
use super::spec::{
    Access, Alias, Arg, ArgId, Code, Computation, CpuCode, Epilogue, Extent, Implementation, KernelSpec,
    LaunchSpec, Layout, MatmulSpec, NormSource, NormSpec,
};
use crate::ir::{DType, Dim, Op, Syms, TensorType};
use crate::target::Target;

/// Weight rows of a matmul per work item: one block of quantised results, and enough to amortise its start.
const MATMUL_ROWS: u32 = 32;
/// Queries (of one token and head each) per work item of attention.
const ATTENTION_QUERIES: u64 = 32;
/// Work items that attention of one token has at least, where there are as many heads: fewer would share more, and keep fewer
/// threads busy.
const ATTENTION_ITEMS: u64 = 8;
/// Columns per work item of SwiGLU.
const SWIGLU_COLUMNS: u32 = 1024;
/// Columns per work item of a gated recurrence, which goes over all tokens.
const SCAN_COLUMNS: u32 = 256;

/// The kernels of `src/runtime/cpu`.
pub struct Cpu;

impl Backend for Cpu {
    /// Sixteen rows at a time where quantised activations meet them; a table may be looked up in so, too.
    fn layout(&self, weight: &TensorType, uses: &[(KernelSpec, ArgId)]) -> Layout {
        let is_product = |(spec, arg): &(KernelSpec, ArgId)| {
            let Computation::Matmul(m) = &spec.computes else { return false };
            let x = spec.args.get(usize::from(m.x));
            m.parts.iter().any(|part| part.weight == *arg) && x.is_some_and(|x| x.ty.dtype == DType::Q8Act)
        };
        let is_lookup = |(spec, arg): &(KernelSpec, ArgId)| {
            let Computation::Norm(NormSpec { source, .. }) = &spec.computes else { return false };
            matches!(source, NormSource::Embedding { table, .. } if table == arg)
        };
        let pays = uses.iter().any(is_product) && uses.iter().all(|u| is_product(u) || is_lookup(u));
        if pays && Layout::Interleaved16.fits(weight) { Layout::Interleaved16 } else { Layout::RowMajor }
    }

    fn emit(
        &self,
        spec: KernelSpec,
        layouts: Vec<(ArgId, Layout)>,
        _: &[ArgId],
        _: &[String],
        bounds: &Syms,
        _: &Target,
    ) -> Result<Implementation, String> {
        let whole = |grid| vec![LaunchSpec { code: Code::Cpu(CpuCode::Whole), grid }];
        let rows = |arg: ArgId| spec.args[usize::from(arg)].ty.first();
        let mut workspace = vec![];
        let (launches, may_alias) = match &spec.computes {
            Computation::Matmul(m) => {
                let tokens = rows(m.x);
                let launches = matmul(m, tokens);
                if let Epilogue::ArgMax { .. } = m.epilogue {
                    let shape = [tokens, Dim::n(items(m))];
                    workspace = [DType::F32, DType::I32]
                        .map(|dtype| Arg::new(Access::Scratch, TensorType::new(dtype, shape)))
                        .into();
                }
                (launches, residuals(m))
            }
            Computation::Norm(m) => {
                let out = m.rows_out.or(m.norm_out).or(m.quant_out).ok_or("a norm without a result")?;
                let (_, outer) =
                    spec.args[usize::from(out)].ty.shape.split_last().ok_or("a norm of a scalar")?;
                (whole(outer.iter().copied().map(Extent::each).collect()), summands(m))
            }
            Computation::RopeKv(m) => (whole(vec![Extent::each(rows(m.positions))]), vec![]),
            Computation::Swiglu(m) => {
                let in_place = spec.args[usize::from(m.out)].ty.dtype == DType::F32;
                let aliases = [m.gate, m.up].map(|read| Alias { write: m.out, read });
                let columns = Extent { dim: Dim::n(m.n), per: SWIGLU_COLUMNS };
                let grid = vec![Extent::each(rows(m.gate)), columns];
                (whole(grid), if in_place { aliases.to_vec() } else { vec![] })
            }
            Computation::Attention(m) => {
                let (heads, tokens) = attention_tile(m.heads, m.heads / m.kv_heads.max(1), bounds);
                let per = |n: u64| u32::try_from(n).unwrap_or(1);
                let heads = Extent { dim: Dim::n(m.heads), per: per(heads) };
                (whole(vec![heads, Extent { dim: rows(m.q), per: per(tokens) }]), vec![])
            }
            Computation::RopeAttention(_) => return Err("the CPU turns before it attends".into()),
            Computation::GatedScan(m) => {
                (whole(vec![Extent { dim: Dim::n(m.n), per: SCAN_COLUMNS }]), vec![])
            }
            Computation::Op(op) => (whole(primitive_grid(op, &spec)), in_place(op, &spec)),
        };
        Ok(Implementation { workspace, may_alias, precision: DType::F32, launches, layouts, spec })
    }
}

/// The work items of a matmul.
fn items(m: &MatmulSpec) -> u64 {
    let items = |rows: u64| rows.div_ceil(u64::from(MATMUL_ROWS));
    match m.epilogue {
        Epilogue::Swiglu { .. } => m.parts.first().map_or(0, |p| items(p.rows)),
        Epilogue::Store | Epilogue::ArgMax { .. } => m.parts.iter().map(|p| items(p.rows)).sum(),
    }
}

fn matmul(m: &MatmulSpec, tokens: Dim) -> Vec<LaunchSpec> {
    let code = Code::Cpu(CpuCode::Matmul { tile: MATMUL_ROWS });
    let first = LaunchSpec { code, grid: vec![Extent::each(items(m))] };
    match m.epilogue {
        Epilogue::Store | Epilogue::Swiglu { .. } => vec![first],
        Epilogue::ArgMax { .. } => {
            let grid = vec![Extent::each(tokens)];
            vec![first, LaunchSpec { code: Code::Cpu(CpuCode::BestOfItems), grid }]
        }
    }
}

/// The grid of a primitive operation: the rows of its result, but for those that go over rows of something else.
fn primitive_grid(op: &Op, spec: &KernelSpec) -> Vec<Extent> {
    let shape = |arg: Option<&Arg>| arg.map_or(vec![], |arg| arg.ty.shape.clone());
    let rows_of = match op {
        Op::KvAppend => {
            return shape(spec.args.get(1)).first().copied().map(Extent::each).into_iter().collect();
        }
        Op::ArgMax => shape(spec.args.first()),
        // A kernel that goes over anything else is not bound to this.
        _ => shape(spec.args.last()),
    };
    match rows_of.split_last() {
        Some((_, outer)) if !outer.is_empty() => outer.iter().copied().map(Extent::each).collect(),
        _ => vec![Extent::each(1)],
    }
}

/// Where the result of a primitive operation may lie on an operand.
fn in_place(op: &Op, spec: &KernelSpec) -> Vec<Alias> {
    let ty = |arg: usize| spec.args.get(arg).map(|arg| &arg.ty);
    let operands = match op {
        Op::Add | Op::Mul if ty(0) == ty(1) => 2,
        Op::Add | Op::Mul | Op::Silu | Op::CausalMask { .. } => 1,
        // Apart from all of them is always right.
        _ => 0,
    };
    let write = spec.args.len().saturating_sub(1) as ArgId;
    (0..operands).map(|read| Alias { write, read }).collect()
}

/// Heads and tokens of a work item of attention. Heads of a group share the rows of a KV head, but one token alone must
/// leave items for some threads.
fn attention_tile(heads: u64, group: u64, bounds: &Syms) -> (u64, u64) {
    let most = if bounds.t <= 1 { heads / ATTENTION_ITEMS } else { u64::MAX }.min(ATTENTION_QUERIES);
    let divides = |n: &u64| group.is_multiple_of(*n);
    let shared = (1..=group.min(most)).rev().find(divides).unwrap_or(1);
    (shared, ATTENTION_QUERIES / shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_of_attention_hold_some_queries_and_no_more_than_fit() {
        for (heads, kv_heads) in [(1, 1), (8, 4), (28, 4), (32, 8), (160, 1), (192, 1), (256, 4), (37, 37)] {
            for t in [1, 2, 512] {
                let group = heads / kv_heads;
                let (a, b) = attention_tile(heads, group, &Syms { t, r: t });
                assert!(
                    group % a == 0 && b > 0 && a * b <= ATTENTION_QUERIES,
                    "{heads}/{kv_heads}: {a} by {b}"
                );
                assert!(t > 1 || heads / a >= ATTENTION_ITEMS.min(heads), "{heads}/{kv_heads}: {a}");
            }
        }
    }
}
