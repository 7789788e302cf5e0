//! A graph under construction over the tensors of a file.

use super::LowerError;
use crate::gguf::Gguf;
use crate::ir::{DType, Dim, Graph, Op, Slice, StateRole, StepInput, Syms, TensorType, Value};
use indexmap::IndexMap;
use std::collections::BTreeSet;

/// Builds a graph; weights are created on first use, and what is not used in the end is an error.
pub struct Builder<'a> {
    gguf: &'a Gguf,
    g: Graph,
    weights: IndexMap<(String, Option<Slice>), Value>,
    states: Vec<Value>,
}

/// The tensors `{name}.weight [rows,cols]` and, where the file has it, `{name}.bias [rows]`; or some rows of both.
pub struct Matrix {
    name: String,
    rows: u64,
    slice: Option<Slice>,
    cols: u64,
}

impl Matrix {
    pub fn whole(name: impl Into<String>, rows: u64, cols: u64) -> Matrix {
        Matrix { name: name.into(), rows, slice: None, cols }
    }

    /// `rows` of `of`, from row `first` on.
    pub fn rows(name: &str, first: u64, rows: u64, of: u64, cols: u64) -> Matrix {
        Matrix { name: name.into(), rows, slice: Some(Slice { first, of }), cols }
    }
}

impl<'a> Builder<'a> {
    pub fn new(gguf: &'a Gguf, name: &str, bounds: Syms) -> Builder<'a> {
        Builder { gguf, g: Graph::new(name, bounds), weights: IndexMap::new(), states: vec![] }
    }

    /// A parameter of the graph.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<Value, LowerError> {
        self.g.leaf(Op::input(name), ty).map_err(LowerError::Graph)
    }

    /// A node whose type follows from its operands.
    pub fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, LowerError> {
        self.g.add(op, operands).map(Value::from).map_err(LowerError::Graph)
    }

    /// `x` in another shape.
    pub fn reshape(&mut self, x: Value, shape: &[Dim]) -> Result<Value, LowerError> {
        let ty = TensorType { dtype: self.g.ty(x).dtype, shape: shape.to_vec() };
        self.g.add_typed(Op::Reshape, &[x], &[ty]).map(Value::from).map_err(LowerError::Graph)
    }

    /// An input of the step.
    pub fn step_input(&mut self, input: StepInput, shape: &[Dim]) -> Result<Value, LowerError> {
        self.input(input.name(), TensorType::new(DType::I32, shape.iter().copied()))
    }

    /// A first version of a state.
    pub fn state(&mut self, name: String, role: StateRole, ty: TensorType) -> Result<Value, LowerError> {
        self.g.leaf(Op::State { name, role }, ty).map_err(LowerError::Graph)
    }

    /// Notes the last version of a state, in the order they are returned.
    pub fn last_version(&mut self, state: Value) {
        self.states.push(state);
    }

    /// Rows of the tensor, if the file has it.
    pub fn rows(&self, name: &str) -> Result<u64, LowerError> {
        Ok(self.gguf.tensor(name)?.shape.first().copied().unwrap_or(1))
    }

    pub fn has(&self, name: &str) -> bool {
        self.gguf.tensors.contains_key(name)
    }

    /// The tensor as it is stored, which must have this shape.
    pub fn weight(&mut self, name: &str, shape: &[u64]) -> Result<Value, LowerError> {
        self.stored(name, shape, None)
    }

    /// A tensor of this shape, or some of its rows.
    fn stored(&mut self, name: &str, shape: &[u64], rows: Option<(Slice, u64)>) -> Result<Value, LowerError> {
        let key = (name.to_owned(), rows.map(|(rows, _)| rows));
        if let Some(&v) = self.weights.get(&key) {
            return Ok(v);
        }
        let info = self.gguf.tensor(name)?;
        let dtype = info.dtype()?;
        if info.shape != shape {
            let list =
                |s: &[u64]| format!("[{}]", s.iter().map(u64::to_string).collect::<Vec<_>>().join(","));
            return Err(LowerError::Tensor {
                name: name.into(),
                found: list(&info.shape),
                wanted: list(shape),
            });
        }
        let mut ty = TensorType::new(dtype, shape.iter().copied());
        if let (Some((_, n)), Some(all)) = (rows, ty.shape.first_mut()) {
            *all = Dim::n(n);
        }
        let op = Op::Weight { name: name.into(), rows: key.1 };
        let v = self.g.leaf(op, ty).map_err(LowerError::Graph)?;
        self.weights.insert(key, v);
        Ok(v)
    }

    /// The tensor as f32: dequantised unless it is stored so.
    pub fn float(&mut self, name: &str, shape: &[u64]) -> Result<Value, LowerError> {
        let w = self.weight(name, shape)?;
        self.dequant(w)
    }

    /// `x` as f32.
    pub fn dequant(&mut self, x: Value) -> Result<Value, LowerError> {
        if self.g.ty(x).dtype == DType::F32 { Ok(x) } else { self.op(Op::Dequant, &[x]) }
    }

    /// `x · wᵀ (+ bias)`.
    pub fn linear(&mut self, x: Value, matrix: &Matrix) -> Result<Value, LowerError> {
        let Matrix { name, rows, slice, cols } = matrix;
        let (all, slice) = (slice.map_or(*rows, |slice| slice.of), slice.map(|slice| (slice, *rows)));
        let w = self.stored(&format!("{name}.weight"), &[all, *cols], slice)?;
        let w = self.dequant(w)?;
        let y = self.op(Op::MatMul { round: None }, &[x, w])?;
        let bias = format!("{name}.bias");
        if !self.has(&bias) {
            return Ok(y);
        }
        let bias = self.stored(&bias, &[all], slice)?;
        let bias = self.dequant(bias)?;
        self.op(Op::Add, &[y, bias])
    }

    /// The graph that returns `results` and the last versions of the states.
    pub fn finish(mut self, architecture: &str, results: &[Value]) -> Result<Graph, LowerError> {
        let used: BTreeSet<&str> = self.weights.keys().map(|(name, _)| name.as_str()).collect();
        if let Some(name) = self.gguf.tensors.keys().find(|name| !used.contains(name.as_str())) {
            return Err(LowerError::Unused { name: name.clone(), architecture: architecture.into() });
        }
        let returned: Vec<Value> = results.iter().chain(&self.states).copied().collect();
        self.g.set_return(&returned);
        Ok(self.g)
    }
}
