//! The shape of launches on the CPU: how much of a kernel one work item computes.

use super::args::ArgPlace;
use super::spec::{Access, Arg, Epilogue, Extent, MatmulSpec, Primitive, Template};
use crate::ir::{DType, Dim, Syms, TensorType};

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

/// Fills in the tile and scratch of `template` and returns its grid.
pub fn shape(
    template: &mut Template,
    args: &mut Vec<Arg>,
    places: &mut Vec<ArgPlace>,
    bounds: &Syms,
) -> Vec<Extent> {
    let rows = |args: &[Arg], arg: u16| args[arg as usize].ty.shape.first().copied().unwrap_or(Dim::n(1));
    match template {
        Template::Matmul(spec) => vec![Extent::each(matmul(spec, args, places))],
        Template::Norm(spec) => {
            let out = spec.rows_out.or(spec.norm_out).or(spec.quant_out);
            vec![Extent::each(out.map_or(Dim::ZERO, |out| rows(args, out)))]
        }
        Template::RopeKv(spec) => vec![Extent::each(rows(args, spec.positions))],
        Template::Swiglu(spec) => {
            vec![Extent::each(rows(args, spec.gate)), Extent { dim: Dim::n(spec.n), per: SWIGLU_COLUMNS }]
        }
        Template::Attention(spec) => {
            let (heads, tokens) = attention_tile(spec.heads, spec.heads / spec.kv_heads.max(1), bounds);
            let per = |n: u64| u32::try_from(n).unwrap_or(1);
            vec![
                Extent { dim: Dim::n(spec.heads), per: per(heads) },
                Extent { dim: rows(args, spec.q), per: per(tokens) },
            ]
        }
        Template::GatedScan(spec) => vec![Extent { dim: Dim::n(spec.n), per: SCAN_COLUMNS }],
        Template::Primitive(primitive) => match primitive {
            Primitive::KvAppend => vec![Extent::each(rows(args, 1))],
            Primitive::ArgMax => vec![Extent::each(rows(args, 0))],
            _ => {
                let shape = args.last().map_or(&[][..], |out| &out.ty.shape);
                let (_, outer) = shape.split_last().unwrap_or((&Dim::ZERO, &[]));
                if outer.is_empty() {
                    vec![Extent::each(1)]
                } else {
                    outer.iter().copied().map(Extent::each).collect()
                }
            }
        },
    }
}

/// Heads and tokens of a work item of attention. Heads of a group share the rows of a KV head, but one token alone must
/// leave items for some threads.
fn attention_tile(heads: u64, group: u64, bounds: &Syms) -> (u64, u64) {
    let most = if bounds.t <= 1 { heads / ATTENTION_ITEMS } else { u64::MAX }.min(ATTENTION_QUERIES);
    let divides = |n: &u64| group.is_multiple_of(*n);
    let shared = (1..=group.min(most)).rev().find(divides).unwrap_or(1);
    (shared, ATTENTION_QUERIES / shared)
}

/// Sets the tile, adds the scratch of an argmax, and returns the number of work items.
fn matmul(spec: &mut MatmulSpec, args: &mut Vec<Arg>, places: &mut Vec<ArgPlace>) -> u64 {
    spec.tile = MATMUL_ROWS;
    let items = |rows: u64| rows.div_ceil(u64::from(MATMUL_ROWS));
    let all = match spec.epilogue {
        Epilogue::Swiglu { .. } => spec.parts.first().map_or(0, |p| items(p.rows)),
        _ => spec.parts.iter().map(|p| items(p.rows)).sum(),
    };
    if let Epilogue::ArgMax { best, index, .. } = &mut spec.epilogue {
        let tokens = args[spec.x as usize].ty.shape.first().copied().unwrap_or(Dim::n(1));
        for (arg, dtype) in [(best, DType::F32), (index, DType::I32)] {
            *arg = args.len() as u16;
            args.push(Arg::new(Access::Scratch, TensorType::new(dtype, [tokens, Dim::n(all)])));
            places.push(ArgPlace::Scratch);
        }
    }
    all
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
