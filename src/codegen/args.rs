//! The argument list of a kernel under construction.

use super::spec::{Access, Alias, Arg, ArgId, Index, IndexSource, Primitive};
use crate::ir::{DType, Dim, Graph, NodeId, Op, TensorType, Value};

/// Which value an argument holds.
pub enum ArgPlace {
    /// An operand of the node; the value before a view for a cache.
    Operand(Value),
    Result(Value),
    Scratch,
}

/// Arguments in the order they were asked for, and where each comes from.
pub struct Args<'a> {
    g: &'a Graph,
    node: NodeId,
    operands: &'a [Value],
    pub args: Vec<Arg>,
    pub places: Vec<ArgPlace>,
    /// Caches updated in place: the operand and the result that is its next version.
    pub versions: Vec<(Value, Value)>,
}

impl<'a> Args<'a> {
    pub fn new(g: &'a Graph, node: NodeId, operands: &'a [Value]) -> Args<'a> {
        Args { g, node, operands, args: vec![], places: vec![], versions: vec![] }
    }

    fn push(&mut self, access: Access, ty: TensorType, place: ArgPlace) -> ArgId {
        self.args.push(Arg::new(access, ty));
        self.places.push(place);
        (self.args.len() - 1) as ArgId
    }

    /// Operand `slot` of the node, read.
    pub fn read(&mut self, slot: usize) -> ArgId {
        let v = self.operands[slot];
        self.push(Access::Read, self.g.ty(v).clone(), ArgPlace::Operand(v))
    }

    /// Operand `slot`, values in `0..below` that the kernel follows; it writes by them if they are `distinct`.
    pub fn index(&mut self, slot: usize, below: Dim, distinct: bool) -> ArgId {
        let source = match self.g.op(self.operands[slot].node) {
            Op::Input { .. } => IndexSource::Input,
            _ => IndexSource::Device,
        };
        let arg = self.read(slot);
        self.args[usize::from(arg)].index = Some(Index { below, distinct, source });
        arg
    }

    /// The type of operand `slot`.
    pub fn operand_ty(&self, slot: usize) -> &TensorType {
        self.g.ty(self.operands[slot])
    }

    /// Result `out` of the node, written.
    pub fn write(&mut self, out: usize) -> ArgId {
        let v = Value { node: self.node, out: out as u32 };
        self.push(Access::Write, self.g.ty(v).clone(), ArgPlace::Result(v))
    }

    /// Operand `slot`, a cache, updated; result `out` is its next version.
    pub fn update(&mut self, slot: usize, out: usize) -> ArgId {
        let v = self.operands[slot];
        self.versions.push((v, Value { node: self.node, out: out as u32 }));
        self.push(Access::Update, self.g.ty(v).clone(), ArgPlace::Operand(v))
    }

    /// The type of an argument.
    pub fn ty(&self, arg: ArgId) -> &TensorType {
        &self.args[arg as usize].ty
    }
}

/// Below what the values of operand `slot` must lie, where they are rows, pages, lengths or sequences.
pub fn index_below(op: &Op, slot: usize, args: &Args) -> Option<Dim> {
    match (op, slot) {
        (Op::GetRows, 1) => Some(args.operand_ty(0).first()),
        (Op::KvRead { page }, 1) => Some(pages(args.operand_ty(0), *page)),
        (Op::KvRead { page }, 2) => Some(lengths(args.operand_ty(1), *page)),
        (Op::Scores { .. } | Op::WeightedSum, 2) => Some(args.operand_ty(1).first()),
        _ => None,
    }
}

/// The pages of a cache `[S,..]`.
pub fn pages(cache: &TensorType, page: u32) -> Dim {
    Dim::n(cache.first().c / u64::from(page.max(1)))
}

/// What is more than any length of a sequence with block tables `[B,M]`.
pub fn lengths(tables: &TensorType, page: u32) -> Dim {
    Dim::n(tables.last().c.saturating_mul(u64::from(page)).saturating_add(1))
}

/// The kernel of a primitive operation: its operands, then its result.
pub fn primitive(op: &Op, args: &mut Args) -> Result<(Primitive, Vec<Alias>), String> {
    let primitive = super::primitive_of(op).ok_or("it is no primitive with a kernel")?;
    if matches!(op, Op::KvAppend) {
        args.update(0, 0);
        args.read(1);
        args.index(2, args.operand_ty(0).first(), true);
        return Ok((primitive, vec![]));
    }
    for slot in 0..args.operands.len() {
        match index_below(op, slot, args) {
            Some(below) => args.index(slot, below, false),
            None => args.read(slot),
        };
    }
    let out = args.write(0);
    let elementwise = match op {
        Op::Add | Op::Mul if args.ty(0) == args.ty(1) => 2,
        Op::Add | Op::Mul | Op::Silu | Op::CausalMask { .. } => 1,
        _ => 0,
    };
    debug_assert!(elementwise == 0 || args.ty(out).dtype == DType::F32);
    Ok((primitive, (0..elementwise).map(|read| Alias { write: out, read }).collect()))
}
