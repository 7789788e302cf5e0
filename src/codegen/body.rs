//! Reads template and parameters off the body of a fused node.
//!
//! Each kernel has one function here that walks the body from its results to its inputs. It accepts exactly what the
//! kernel computes; anything else is an error, so a rule cannot make a kernel claim more than it does.

use super::args::Args;
use super::spec::{
    Alias, ArgId, AttentionSpec, CacheRows, Epilogue, GatedScanSpec, HeadNorm, MatmulPart, MatmulSpec,
    NormSource, NormSpec, RopeK, RopeKvSpec, RopeQ, SwigluSpec, Template,
};
use crate::ir::{DType, Fused, Graph, Kernel, Op, TensorType, Value};

/// The template of a fused node and which of its arguments may share memory.
pub fn template(fused: &Fused, args: &mut Args) -> Result<(Template, Vec<Alias>), String> {
    let body = Body { g: &fused.body };
    match fused.kernel {
        Kernel::DequantMatmul | Kernel::Merge => body.matmul(args),
        Kernel::MatmulSwiglu => body.matmul_swiglu(args),
        Kernel::SampleHead => body.sample_head(args),
        Kernel::DequantRmsnorm | Kernel::AddRmsnorm => body.norm(args),
        Kernel::RopeKv => body.rope_kv(args),
        Kernel::Swiglu => body.swiglu(args),
        Kernel::Attention => body.attention(args),
        Kernel::GatedScan => body.gated_scan(args),
    }
}

type Parsed<T> = Result<T, String>;

struct Body<'a> {
    g: &'a Graph,
}

/// What one matmul of a body consists of, as slots of the fused node.
struct Part {
    x: usize,
    weight: usize,
    bias: Option<usize>,
    residual: Option<usize>,
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

    /// The slot of the fused node that an input of the body stands for.
    fn slot(&self, v: Value) -> Parsed<usize> {
        let found = self.g.inputs().iter().position(|&i| i == v.node);
        found.ok_or_else(|| format!("{} where an input should be", self.op(v).name()))
    }

    /// The slot behind an optional dequant.
    fn stored_slot(&self, v: Value) -> Parsed<usize> {
        match self.op(v) {
            Op::Dequant => self.slot(self.operand(v, 0)?),
            _ => self.slot(v),
        }
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

    /// `(add (add (matmul x, w), bias), residual)`, with either sum optional.
    fn part(&self, mut v: Value) -> Parsed<Part> {
        let (mut bias, mut residual) = (None, None);
        while matches!(self.op(v), Op::Add) {
            let (a, b) = (self.operand(v, 0)?, self.operand(v, 1)?);
            let is_input = |v| matches!(self.op(v), Op::Input { .. });
            if self.ty(b).shape.len() == 1 && bias.is_none() {
                bias = Some(self.slot(b)?);
                v = a;
            } else if residual.is_none() && bias.is_none() && (is_input(a) || is_input(b)) {
                let (input, rest) = if is_input(a) { (a, b) } else { (b, a) };
                residual = Some(self.slot(input)?);
                v = rest;
            } else {
                return Err("a sum that is neither bias nor residual".into());
            }
        }
        self.expect(v, "matmul")?;
        let (x, weight) = (self.stored_slot(self.operand(v, 0)?)?, self.stored_slot(self.operand(v, 1)?)?);
        Ok(Part { x, weight, bias, residual })
    }

    /// Adds the parts' arguments. All parts multiply the same activations.
    fn parts(&self, args: &mut Args, results: &[Value]) -> Parsed<(ArgId, u64, Vec<MatmulPart>)> {
        let parts = results.iter().map(|v| self.part(*v)).collect::<Parsed<Vec<_>>>()?;
        let first = parts.first().ok_or("no result")?;
        if parts.iter().any(|p| p.x != first.x) {
            return Err("parts with different inputs".into());
        }
        let x = args.read(first.x);
        let k = args.ty(x).last().as_const().ok_or("a symbolic inner dimension")?;
        let mut list = vec![];
        for p in &parts {
            let weight = args.read(p.weight);
            let ty = args.ty(weight);
            let rows = ty.shape.first().and_then(|d| d.as_const()).ok_or("a symbolic number of rows")?;
            let format = ty.dtype;
            if args.ty(x).dtype == DType::Q8Act && !format.is_quantised() {
                return Err(format!("{format} weights with quantised activations"));
            }
            let bias = p.bias.map(|slot| args.read(slot));
            let residual = p.residual.map(|slot| args.read(slot));
            list.push(MatmulPart { weight, format, rows, bias, residual, out: None });
        }
        Ok((x, k, list))
    }

    fn matmul(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let (x, k, mut parts) = self.parts(args, &self.g.results())?;
        let mut aliases = vec![];
        for (i, part) in parts.iter_mut().enumerate() {
            let out = args.write(i);
            part.out = Some(out);
            aliases.extend(part.residual.map(|read| Alias { write: out, read }));
        }
        let spec = MatmulSpec { x, k, parts, epilogue: Epilogue::Store, tile: 0 };
        Ok((Template::Matmul(spec), aliases))
    }

    /// `mul (silu gate), up`, either way round, behind an optional quant_act: gate, up.
    fn gated(&self) -> Parsed<(Value, Value)> {
        let [result] = self.g.results()[..] else { return Err("not one result".into()) };
        let product = match self.op(result) {
            Op::QuantAct => self.operand(result, 0)?,
            _ => result,
        };
        self.expect(product, "mul")?;
        let (a, b) = (self.operand(product, 0)?, self.operand(product, 1)?);
        let (silu, up) = if matches!(self.op(a), Op::Silu) { (a, b) } else { (b, a) };
        self.expect(silu, "silu")?;
        Ok((self.operand(silu, 0)?, up))
    }

    fn matmul_swiglu(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let (gate, up) = self.gated()?;
        let (x, k, parts) = self.parts(args, &[gate, up])?;
        let out = args.write(0);
        let spec = MatmulSpec { x, k, parts, epilogue: Epilogue::Swiglu { out }, tile: 0 };
        Ok((Template::Matmul(spec), vec![]))
    }

    fn sample_head(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let [result] = self.g.results()[..] else { return Err("not one result".into()) };
        self.expect(result, "argmax")?;
        let (x, k, parts) = self.parts(args, &[self.operand(result, 0)?])?;
        let out = args.write(0);
        // The room for each work item's best is added with the shape of the launch.
        let epilogue = Epilogue::ArgMax { best: 0, index: 0, out };
        Ok((Template::Matmul(MatmulSpec { x, k, parts, epilogue, tile: 0 }), vec![]))
    }

    fn norm(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let results = self.g.results();
        let is_norm = |id: &_| matches!(self.g.op(*id), Op::RmsNorm { .. });
        let norm = Value::from(self.g.ids().into_iter().find(is_norm).ok_or("no rms_norm")?);
        let &Op::RmsNorm { eps } = self.op(norm) else { return Err("no rms_norm".into()) };
        let rows = self.operand(norm, 0)?;
        let fetched = if matches!(self.op(rows), Op::Dequant) { self.operand(rows, 0)? } else { rows };
        let mut aliases = vec![];
        let mut source = match (self.op(rows), self.op(fetched)) {
            (_, Op::GetRows) => {
                let (table, ids) =
                    (self.slot(self.operand(fetched, 0)?)?, self.slot(self.operand(fetched, 1)?)?);
                let rows = args.operand_ty(table).first();
                NormSource::Embedding { table: args.read(table), ids: args.index(ids, rows, false) }
            }
            (Op::Add, _) => {
                let (a, b) = (self.slot(self.operand(rows, 0)?)?, self.slot(self.operand(rows, 1)?)?);
                NormSource::Sum { a: args.read(a), b: args.read(b) }
            }
            _ => NormSource::Rows { x: args.read(self.slot(rows)?) },
        };
        let weight = args.read(self.stored_slot(self.operand(norm, 1)?)?);
        let n = self.ty(norm).last().as_const().ok_or("rows of symbolic length")?;
        let (mut rows_out, mut norm_out, mut quant_out) = (None, None, None);
        for (i, v) in results.iter().enumerate() {
            let result = if *v == norm {
                &mut norm_out
            } else if *v == rows && !matches!(self.op(rows), Op::Input { .. }) {
                &mut rows_out
            } else if matches!(self.op(*v), Op::QuantAct) && self.operand(*v, 0)? == norm {
                &mut quant_out
            } else {
                return Err(format!("{} as a result", self.op(*v).name()));
            };
            *result = Some(args.write(i));
        }
        if let (NormSource::Sum { a, b }, Some(write)) = (&mut source, rows_out) {
            aliases.extend([Alias { write, read: *a }, Alias { write, read: *b }]);
        }
        let spec = NormSpec { source, n, weight, eps, rows_out, norm_out, quant_out };
        Ok((Template::Norm(spec), aliases))
    }

    /// The input behind `rms_norm? (reshape x)`, and the norm's weight.
    fn head(&self, v: Value, args: &mut Args) -> Parsed<(usize, Option<HeadNorm>)> {
        let v = self.skip_reshape(v)?;
        let &Op::RmsNorm { eps } = self.op(v) else { return Ok((self.slot(v)?, None)) };
        let weight = args.read(self.slot(self.operand(v, 1)?)?);
        let x = self.slot(self.skip_reshape(self.operand(v, 0)?)?)?;
        Ok((x, Some(HeadNorm { weight, eps })))
    }

    fn rope_kv(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let (mut turn, mut to) = (None, None);
        let (mut q, mut k, mut v) = (None, None, None);
        for (out, result) in self.g.results().into_iter().enumerate() {
            let heads = self.ty(result).shape.get(1).and_then(|d| d.as_const()).ok_or("no heads")?;
            let rows = match self.op(result) {
                Op::KvAppend => self.operand(result, 1)?,
                _ => result,
            };
            if let Op::Rope(rope) = self.op(rows) {
                let positions = self.slot(self.operand(rows, 1)?)?;
                let factors = self.g.operand(rows.node, 2).map(|f| self.slot(f)).transpose()?;
                if *turn.get_or_insert((*rope, positions, factors)) != (*rope, positions, factors) {
                    return Err("queries and keys that turn differently".into());
                }
            }
            if matches!(self.op(result), Op::KvAppend) {
                let slot = self.slot(self.operand(result, 2)?)?;
                if *to.get_or_insert(slot) != slot {
                    return Err("keys and values that go to different rows".into());
                }
            }
            match (self.op(result), self.op(rows)) {
                (Op::Rope(_), _) if q.is_none() => {
                    let (x, norm) = self.head(self.operand(rows, 0)?, args)?;
                    q = Some(RopeQ { x: args.read(x), heads, norm, out: args.write(out) });
                }
                (Op::KvAppend, Op::Rope(_)) if k.is_none() => {
                    let cache = args.update(self.slot(self.operand(result, 0)?)?, out);
                    let (x, norm) = self.head(self.operand(rows, 0)?, args)?;
                    k = Some(RopeK { rows: CacheRows { x: args.read(x), heads, cache }, norm });
                }
                (Op::KvAppend, _) if v.is_none() => {
                    let cache = args.update(self.slot(self.operand(result, 0)?)?, out);
                    let x = self.slot(self.skip_reshape(rows)?)?;
                    v = Some(CacheRows { x: args.read(x), heads, cache });
                }
                (op, _) => return Err(format!("{} as a result", op.name())),
            }
        }
        let k = k.ok_or("no keys")?;
        let (rope, positions, factors) = turn.ok_or("no rope")?;
        let head_dim = args.ty(k.rows.cache).last().as_const().ok_or("heads of symbolic size")?;
        let (positions, factors) = (args.read(positions), factors.map(|slot| args.read(slot)));
        let rows = args.index(to.ok_or("no rows")?, args.ty(k.rows.cache).first(), true);
        Ok((Template::RopeKv(RopeKvSpec { rope, head_dim, positions, rows, factors, q, k, v }), vec![]))
    }

    fn swiglu(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let (gate, up) = self.gated()?;
        let (gate, up) = (args.read(self.slot(gate)?), args.read(self.slot(up)?));
        let out = args.write(0);
        let n = args.ty(gate).last().as_const().ok_or("rows of symbolic length")?;
        let aliases = match args.ty(out).dtype {
            DType::F32 => [gate, up].map(|read| Alias { write: out, read }).to_vec(),
            _ => vec![],
        };
        Ok((Template::Swiglu(SwigluSpec { gate, up, out, n }), aliases))
    }

    fn attention(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let [result] = self.g.results()[..] else { return Err("not one result".into()) };
        let mut v = result;
        if matches!(self.op(v), Op::QuantAct) {
            v = self.skip_reshape(self.operand(v, 0)?)?;
        }
        self.expect(v, "weighted_sum")?;
        let p = self.operand(v, 0)?;
        self.expect(p, "softmax")?;
        let masked = self.operand(p, 0)?;
        let &Op::CausalMask { window } = self.op(masked) else { return Err("no causal_mask".into()) };
        let scores = self.operand(masked, 0)?;
        let &Op::Scores { scale } = self.op(scores) else { return Err("no scores".into()) };
        let cache = |rows: Value| {
            let read = if matches!(self.op(rows), Op::Dequant) { self.operand(rows, 0)? } else { rows };
            let &Op::KvRead { page } = self.op(read) else { return Err("no kv_read".to_string()) };
            let slot = |operand| self.slot(self.operand(read, operand)?);
            Ok((slot(0)?, (page, slot(1)?, slot(2)?)))
        };
        let (k, pages) = cache(self.operand(scores, 1)?)?;
        let (v_slot, v_pages) = cache(self.operand(v, 1)?)?;
        let (page, tables, filled) = pages;
        let sequences = self.slot(self.operand(scores, 2)?)?;
        if pages != v_pages || sequences != self.slot(self.operand(v, 2)?)? {
            return Err("keys and values of different sequences".into());
        }
        let page_count = super::args::pages(args.operand_ty(k), page);
        let longest = super::args::lengths(args.operand_ty(tables), page);
        let b = args.operand_ty(tables).first();
        let q = args.read(self.slot(self.operand(scores, 0)?)?);
        let (k, v) = (args.read(k), args.read(v_slot));
        let tables = args.index(tables, page_count, false);
        let lengths = args.index(filled, longest, false);
        let sequences = args.index(sequences, b, false);
        let positions = args.read(self.slot(self.operand(masked, 1)?)?);
        let out = args.write(0);
        let size = |arg: ArgId, axis: usize| {
            args.ty(arg).shape.get(axis).and_then(|d| d.as_const()).ok_or("heads of symbolic size")
        };
        let (heads, kv_heads, head_dim) = (size(q, 1)?, size(k, 1)?, size(q, 2)?);
        let spec = AttentionSpec {
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
        };
        Ok((Template::Attention(spec), vec![]))
    }

    /// `gated_scan state, decay, (mul (silu gate), x), sequences, positions`, with or without the gate.
    fn gated_scan(&self, args: &mut Args) -> Parsed<(Template, Vec<Alias>)> {
        let [y, next] = self.g.results()[..] else { return Err("not two results".into()) };
        self.expect(y, "gated_scan")?;
        if y.out != 0 || next != (Value { node: y.node, out: 1 }) {
            return Err("results of different recurrences".into());
        }
        let slot = |operand| self.slot(self.operand(y, operand)?);
        let product = self.operand(y, 2)?;
        let (gate, x) = match self.op(product) {
            Op::Mul => {
                let (a, b) = (self.operand(product, 0)?, self.operand(product, 1)?);
                let (silu, x) = if matches!(self.op(a), Op::Silu) { (a, b) } else { (b, a) };
                self.expect(silu, "silu")?;
                (Some(self.slot(self.operand(silu, 0)?)?), self.slot(x)?)
            }
            _ => (None, self.slot(product)?),
        };
        scan(args, [slot(0)?, slot(1)?, x, slot(3)?, slot(4)?], gate)
    }
}

/// The arguments of a gated recurrence whose operands (state, decay, input, sequences, positions) are in these slots.
pub fn scan(args: &mut Args, slots: [usize; 5], gate: Option<usize>) -> Parsed<(Template, Vec<Alias>)> {
    let [state, decay, x, sequences, positions] = slots;
    let n = args.operand_ty(state).last().as_const().ok_or("a state of symbolic size")?;
    let b = args.operand_ty(state).first();
    let state = args.update(state, 1);
    let (decay, x) = (args.read(decay), args.read(x));
    let gate = gate.map(|slot| args.read(slot));
    let (sequences, positions) = (args.index(sequences, b, false), args.read(positions));
    let out = args.write(0);
    Ok((Template::GatedScan(GatedScanSpec { state, decay, x, gate, sequences, positions, out, n }), vec![]))
}
