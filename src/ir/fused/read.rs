//! Reads what a kernel computes off its body.

use super::{
    ArgId, AttentionSpec, CacheRows, Computation, Epilogue, GatedScanSpec, HeadNorm, MatmulPart, MatmulSpec,
    NormSource, NormSpec, RopeAttentionSpec, RopeK, RopeKvSpec, RopeQ, SwigluSpec,
};
use crate::ir::{Dim, Fused, Graph, Kernel, Op, TensorType, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

impl Fused {
    /// What the node computes.
    ///
    /// # Errors
    /// What in the body is not what the kernel computes.
    pub fn read(&self) -> Result<Computation, String> {
        let body = Body { g: &self.body, writes: self.writes(), found: RefCell::default() };
        let read = match self.kernel {
            Kernel::DequantMatmul | Kernel::Merge => body.matmul(),
            Kernel::MatmulSwiglu => body.matmul_swiglu(),
            Kernel::SampleHead => body.sample_head(),
            Kernel::DequantRmsnorm | Kernel::AddRmsnorm => body.norm(),
            Kernel::RopeKv => body.rope_kv(),
            Kernel::Swiglu => body.swiglu(),
            Kernel::Attention => body.attention(),
            Kernel::RopeAttention => body.rope_attention(),
            Kernel::GatedScan => body.gated_scan(),
        }?;
        let found = body.found.into_inner();
        match (0..self.body.inputs().len()).find(|i| !found.contains(i)) {
            Some(unused) => Err(format!("input {unused} has no part in it")),
            None => Ok(read),
        }
    }
}

type Parsed<T> = Result<T, String>;

struct Body<'a> {
    g: &'a Graph,
    /// See [`Op::writes`].
    writes: Vec<(u32, u32)>,
    /// The inputs that were met.
    found: RefCell<BTreeSet<usize>>,
}

impl Body<'_> {
    fn op(&self, v: Value) -> &Op {
        self.g.op(v.node)
    }

    fn ty(&self, v: Value) -> &TensorType {
        self.g.ty(v)
    }

    fn operand(&self, v: Value, slot: u32) -> Parsed<Value> {
        self.g.operand(v.node, slot).ok_or_else(|| format!("{} lacks operand {slot}", self.op(v).name()))
    }

    /// The argument that an input of the body stands for.
    fn arg(&self, v: Value) -> Parsed<ArgId> {
        let found = self.g.inputs().iter().position(|&i| v == Value::from(i));
        let found = found.ok_or_else(|| format!("{} where an input should be", self.op(v).name()))?;
        self.found.borrow_mut().insert(found);
        Ok(found as ArgId)
    }

    /// The argument that is an operand of a node.
    fn operand_arg(&self, v: Value, slot: u32) -> Parsed<ArgId> {
        self.arg(self.operand(v, slot)?)
    }

    /// The argument behind an optional dequant.
    fn stored(&self, v: Value) -> Parsed<ArgId> {
        match self.op(v) {
            Op::Dequant => self.operand_arg(v, 0),
            _ => self.arg(v),
        }
    }

    /// The argument that result `i` of the node goes to. A next version of a state goes where the state lies.
    fn result(&self, i: usize) -> ArgId {
        match self.writes.iter().find(|(_, result)| *result as usize == i) {
            Some((state, _)) => *state as ArgId,
            None => {
                let before = self.writes.iter().filter(|(_, result)| (*result as usize) < i).count();
                (self.g.inputs().len() + i - before) as ArgId
            }
        }
    }

    /// The type of an argument that is an operand.
    fn arg_ty(&self, arg: ArgId) -> &TensorType {
        self.ty(self.g.inputs()[usize::from(arg)].into())
    }

    fn skip_reshape(&self, mut v: Value) -> Parsed<Value> {
        while matches!(self.op(v), Op::Reshape) {
            v = self.operand(v, 0)?;
        }
        Ok(v)
    }

    fn expect(&self, v: Value, name: &str) -> Parsed<()> {
        let found = self.op(v).name();
        if found == name { Ok(()) } else { Err(format!("{found} where {name} should be")) }
    }

    /// `(add (add (matmul x, w), bias), residual)`, with either sum optional: the activations and the part.
    fn part(&self, mut v: Value, out: Option<ArgId>) -> Parsed<(ArgId, MatmulPart)> {
        let (mut bias, mut residual) = (None, None);
        while matches!(self.op(v), Op::Add) {
            let (a, b) = (self.operand(v, 0)?, self.operand(v, 1)?);
            let is_input = |v| matches!(self.op(v), Op::Input { .. });
            if self.ty(b).shape.len() == 1 && bias.is_none() {
                bias = Some(self.arg(b)?);
                v = a;
            } else if residual.is_none() && bias.is_none() && (is_input(a) || is_input(b)) {
                let (input, rest) = if is_input(a) { (a, b) } else { (b, a) };
                residual = Some(self.arg(input)?);
                v = rest;
            } else {
                return Err("a sum that is neither bias nor residual".into());
            }
        }
        let &Op::MatMul { round } = self.op(v) else {
            return Err(format!("{} where matmul should be", self.op(v).name()));
        };
        let (x, weight) = (self.stored(self.operand(v, 0)?)?, self.stored(self.operand(v, 1)?)?);
        let ty = self.arg_ty(weight);
        let (rows, format) = (constant(ty.shape.first(), "a symbolic number of rows")?, ty.dtype);
        if self.arg_ty(x).dtype.is_activations() && !format.is_quantised() {
            return Err(format!("{format} weights with quantised activations"));
        }
        // What is in bytes is not rounded again.
        let round = round.filter(|_| !self.arg_ty(x).dtype.is_activations());
        Ok((x, MatmulPart { weight, format, rows, round, bias, residual, out }))
    }

    /// All parts multiply the same activations.
    fn parts(&self, results: &[(Value, Option<ArgId>)], epilogue: Epilogue) -> Parsed<Computation> {
        let parts = results.iter().map(|(v, out)| self.part(*v, *out)).collect::<Parsed<Vec<_>>>()?;
        let x = parts.first().ok_or("no result")?.0;
        if parts.iter().any(|(other, _)| *other != x) {
            return Err("parts with different inputs".into());
        }
        let k = constant(self.arg_ty(x).shape.last(), "a symbolic inner dimension")?;
        let parts = parts.into_iter().map(|(_, part)| part).collect();
        Ok(Computation::Matmul(MatmulSpec { x, k, parts, epilogue }))
    }

    fn matmul(&self) -> Parsed<Computation> {
        let results = self.g.results().into_iter().enumerate();
        let results: Vec<_> = results.map(|(i, v)| (v, Some(self.result(i)))).collect();
        self.parts(&results, Epilogue::Store)
    }

    fn only_result(&self) -> Parsed<Value> {
        match self.g.results()[..] {
            [result] => Ok(result),
            _ => Err("not one result".into()),
        }
    }

    /// `mul (silu gate), up`, either way round: gate, up.
    fn gated(&self, product: Value) -> Parsed<(Value, Value)> {
        self.expect(product, "mul")?;
        let (a, b) = (self.operand(product, 0)?, self.operand(product, 1)?);
        let (silu, up) = if matches!(self.op(a), Op::Silu) { (a, b) } else { (b, a) };
        self.expect(silu, "silu")?;
        Ok((self.operand(silu, 0)?, up))
    }

    /// What an optional quant_act takes.
    fn unquantised(&self, v: Value) -> Parsed<Value> {
        if matches!(self.op(v), Op::QuantAct) { self.operand(v, 0) } else { Ok(v) }
    }

    fn matmul_swiglu(&self) -> Parsed<Computation> {
        let (gate, up) = self.gated(self.unquantised(self.only_result()?)?)?;
        self.parts(&[(gate, None), (up, None)], Epilogue::Swiglu { out: self.result(0) })
    }

    fn sample_head(&self) -> Parsed<Computation> {
        let result = self.only_result()?;
        self.expect(result, "argmax")?;
        self.parts(&[(self.operand(result, 0)?, None)], Epilogue::ArgMax { out: self.result(0) })
    }

    fn norm(&self) -> Parsed<Computation> {
        let is_norm = |id: &_| matches!(self.g.op(*id), Op::RmsNorm { .. });
        let norm = Value::from(self.g.ids().into_iter().find(is_norm).ok_or("no rms_norm")?);
        let &Op::RmsNorm { eps } = self.op(norm) else { return Err("no rms_norm".into()) };
        let rows = self.operand(norm, 0)?;
        let fetched = if matches!(self.op(rows), Op::Dequant) { self.operand(rows, 0)? } else { rows };
        let source = match (self.op(rows), self.op(fetched)) {
            (_, Op::GetRows) => NormSource::Embedding {
                table: self.operand_arg(fetched, 0)?,
                ids: self.operand_arg(fetched, 1)?,
            },
            (Op::Add, _) => NormSource::Sum { a: self.operand_arg(rows, 0)?, b: self.operand_arg(rows, 1)? },
            _ => NormSource::Rows { x: self.arg(rows)? },
        };
        let weight = self.stored(self.operand(norm, 1)?)?;
        let n = constant(self.ty(norm).shape.last(), "rows of symbolic length")?;
        let (mut rows_out, mut norm_out, mut quant_out) = (None, None, None);
        for (i, v) in self.g.results().into_iter().enumerate() {
            let result = if v == norm {
                &mut norm_out
            } else if v == rows && !matches!(self.op(rows), Op::Input { .. }) {
                &mut rows_out
            } else if matches!(self.op(v), Op::QuantAct) && self.operand(v, 0)? == norm {
                &mut quant_out
            } else {
                return Err(format!("{} as a result", self.op(v).name()));
            };
            *result = Some(self.result(i));
        }
        Ok(Computation::Norm(NormSpec { source, n, weight, eps, rows_out, norm_out, quant_out }))
    }

    /// The input behind `rms_norm? (reshape x)`, and the norm's weight.
    fn head(&self, v: Value) -> Parsed<(ArgId, Option<HeadNorm>)> {
        let v = self.skip_reshape(v)?;
        let &Op::RmsNorm { eps } = self.op(v) else { return Ok((self.arg(v)?, None)) };
        let weight = self.operand_arg(v, 1)?;
        let x = self.arg(self.skip_reshape(self.operand(v, 0)?)?)?;
        Ok((x, Some(HeadNorm { weight, eps })))
    }

    fn rope_kv(&self) -> Parsed<Computation> {
        let results = self.g.results().into_iter().enumerate();
        let results: Vec<_> = results.map(|(i, v)| (v, self.result(i))).collect();
        Ok(Computation::RopeKv(self.turned_and_appended(&results)?))
    }

    /// Values that are turned or appended, and where they go.
    fn turned_and_appended(&self, results: &[(Value, ArgId)]) -> Parsed<RopeKvSpec> {
        let (mut turn, mut to) = (None, None);
        let (mut q, mut k, mut v) = (None, None, None);
        for &(result, out) in results {
            let heads = constant(self.ty(result).shape.get(1), "no heads")?;
            let rows = match self.op(result) {
                Op::KvAppend => self.operand(result, 1)?,
                _ => result,
            };
            if let Op::Rope(rope) = self.op(rows) {
                let factors = self.g.operand(rows.node, 2).map(|f| self.arg(f)).transpose()?;
                let turns = (*rope, self.operand_arg(rows, 1)?, factors);
                if *turn.get_or_insert(turns) != turns {
                    return Err("queries and keys that turn differently".into());
                }
            }
            if matches!(self.op(result), Op::KvAppend) {
                // Appended to once: what is overwritten is an input.
                self.operand_arg(result, 0)?;
                let slot = self.operand_arg(result, 2)?;
                if *to.get_or_insert(slot) != slot {
                    return Err("keys and values that go to different rows".into());
                }
            }
            match (self.op(result), self.op(rows)) {
                (Op::Rope(_), _) if q.is_none() => {
                    let (x, norm) = self.head(self.operand(rows, 0)?)?;
                    q = Some(RopeQ { x, heads, norm, out });
                }
                (Op::KvAppend, Op::Rope(_)) if k.is_none() => {
                    let (x, norm) = self.head(self.operand(rows, 0)?)?;
                    k = Some(RopeK { rows: CacheRows { x, heads, cache: out }, norm });
                }
                (Op::KvAppend, _) if v.is_none() => {
                    v = Some(CacheRows { x: self.arg(self.skip_reshape(rows)?)?, heads, cache: out });
                }
                (op, _) => return Err(format!("{} as a result", op.name())),
            }
        }
        let k = k.ok_or("no keys")?;
        let (rope, positions, factors) = turn.ok_or("no rope")?;
        let head_dim = constant(self.arg_ty(k.rows.cache).shape.last(), "heads of symbolic size")?;
        let rows = to.ok_or("no rows")?;
        Ok(RopeKvSpec { rope, head_dim, positions, rows, factors, q, k, v })
    }

    fn swiglu(&self) -> Parsed<Computation> {
        let (gate, up) = self.gated(self.unquantised(self.only_result()?)?)?;
        let (gate, up, out) = (self.arg(gate)?, self.arg(up)?, self.result(0));
        let n = constant(self.arg_ty(gate).shape.last(), "rows of symbolic length")?;
        Ok(Computation::Swiglu(SwigluSpec { gate, up, out, n }))
    }

    fn attention(&self) -> Parsed<Computation> {
        let found = self.attended(self.only_result()?)?;
        let [q, k, v] = [found.q, found.k, found.v].map(|v| self.arg(v));
        Ok(Computation::Attention(found.of(q?, k?, v?, self.result(0))))
    }

    fn rope_attention(&self) -> Parsed<Computation> {
        let results = self.g.results();
        let is_cache = |v: &Value| matches!(self.op(*v), Op::KvAppend);
        let out = results.iter().position(|v| !is_cache(v)).ok_or("nothing but caches")?;
        let found = self.attended(results[out])?;
        let out = self.result(out);
        let cache = |v: Value| match results.iter().position(|result| *result == v) {
            Some(i) if is_cache(&v) => Ok(self.result(i)),
            _ => Err(format!("attention to {}, which is no result", self.op(v).name())),
        };
        let (k, v) = (cache(found.k)?, cache(found.v)?);
        let rope_kv = self.turned_and_appended(&[(found.q, out), (found.k, k), (found.v, v)])?;
        let (Some(q), true) = (&rope_kv.q, results.len() == 3 && rope_kv.k.rows.cache == k) else {
            return Err("queries, keys and values are not all turned or appended".into());
        };
        let attention = found.of(q.x, k, v, out);
        if attention.positions != rope_kv.positions {
            return Err("queries are not where they are turned to".into());
        }
        Ok(Computation::RopeAttention(RopeAttentionSpec { rope_kv, attention }))
    }

    /// Attention whose result is `sum`.
    fn attended(&self, mut sum: Value) -> Parsed<Attended> {
        if matches!(self.op(sum), Op::QuantAct) {
            sum = self.skip_reshape(self.operand(sum, 0)?)?;
        }
        self.expect(sum, "weighted_sum")?;
        let p = self.operand(sum, 0)?;
        self.expect(p, "softmax")?;
        let masked = self.operand(p, 0)?;
        let &Op::CausalMask { window } = self.op(masked) else { return Err("no causal_mask".into()) };
        let scores = self.operand(masked, 0)?;
        let &Op::Scores { scale } = self.op(scores) else { return Err("no scores".into()) };
        let cache = |rows: Value| {
            let read = if matches!(self.op(rows), Op::Dequant) { self.operand(rows, 0)? } else { rows };
            let &Op::KvRead { page } = self.op(read) else { return Err("no kv_read".to_string()) };
            Ok((self.operand(read, 0)?, (page, self.operand_arg(read, 1)?, self.operand_arg(read, 2)?)))
        };
        let (k, pages) = cache(self.operand(scores, 1)?)?;
        let (v, v_pages) = cache(self.operand(sum, 1)?)?;
        let (page, tables, lengths) = pages;
        let sequences = self.operand_arg(scores, 2)?;
        if pages != v_pages || sequences != self.operand_arg(sum, 2)? {
            return Err("keys and values of different sequences".into());
        }
        let q = self.operand(scores, 0)?;
        let positions = self.operand_arg(masked, 1)?;
        let size = |v: Value, axis: usize| constant(self.ty(v).shape.get(axis), "heads of symbolic size");
        let (heads, kv_heads, head_dim) = (size(q, 1)?, size(k, 1)?, size(q, 2)?);
        let sizes = [heads, kv_heads, head_dim];
        Ok(Attended { q, k, v, tables, lengths, sequences, positions, sizes, scale, page, window })
    }

    /// `gated_scan state, decay, (mul (silu gate), x), sequences, positions`, with or without the gate.
    fn gated_scan(&self) -> Parsed<Computation> {
        let [y, next] = self.g.results()[..] else { return Err("not two results".into()) };
        self.expect(y, "gated_scan")?;
        if y.out != 0 || next != (Value { node: y.node, out: 1 }) {
            return Err("results of different recurrences".into());
        }
        let product = self.operand(y, 2)?;
        let (gate, x) = match self.op(product) {
            Op::Mul => {
                let (gate, x) = self.gated(product)?;
                (Some(self.arg(gate)?), self.arg(x)?)
            }
            _ => (None, self.arg(product)?),
        };
        let [state, decay, sequences, positions] = [0, 1, 3, 4].map(|slot| self.operand_arg(y, slot));
        let (state, decay, sequences, positions) = (state?, decay?, sequences?, positions?);
        let n = constant(self.arg_ty(state).shape.last(), "a state of symbolic size")?;
        let out = self.result(0);
        Ok(Computation::GatedScan(GatedScanSpec { state, decay, x, gate, sequences, positions, out, n }))
    }
}

fn constant(dim: Option<&Dim>, or: &str) -> Parsed<u64> {
    dim.and_then(|dim| dim.as_const()).ok_or_else(|| or.to_string())
}

/// Attention to caches that may be arguments or results.
struct Attended {
    q: Value,
    k: Value,
    v: Value,
    tables: ArgId,
    lengths: ArgId,
    sequences: ArgId,
    positions: ArgId,
    /// Heads, those of the caches, and their columns.
    sizes: [u64; 3],
    scale: f32,
    page: u32,
    window: Option<u32>,
}

impl Attended {
    fn of(&self, q: ArgId, k: ArgId, v: ArgId, out: ArgId) -> AttentionSpec {
        let &Attended { tables, lengths, sequences, positions, scale, page, window, .. } = self;
        let [heads, kv_heads, head_dim] = self.sizes;
        AttentionSpec {
            q,
            k,
            v,
            tables,
            lengths,
            sequences,
            positions,
            out,
            heads,
            kv_heads,
            head_dim,
            scale,
            page,
            window,
        }
    }
}
