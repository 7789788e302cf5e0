//! A graph under construction over the tensors of a file.

use super::LowerError;
use crate::gguf::Gguf;
use crate::ir::{DType, Dim, Graph, Op, StateRole, StepInput, Syms, TensorType, Value};
use indexmap::IndexMap;

/// Builds a graph; weights are created on first use, and what is not used in the end is an error.
pub struct Builder<'a> {
    gguf: &'a Gguf,
    g: Graph,
    weights: IndexMap<String, Value>,
    states: Vec<Value>,
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
        if let Some(&v) = self.weights.get(name) {
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
        let ty = TensorType::new(dtype, shape.iter().copied());
        let v = self.g.leaf(Op::Weight { name: name.into() }, ty).map_err(LowerError::Graph)?;
        self.weights.insert(name.into(), v);
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

    /// `x · wᵀ (+ bias)` for the tensors `{name}.weight [rows,cols]` and, where the file has it, `{name}.bias [rows]`.
    pub fn linear(&mut self, x: Value, name: &str, rows: u64, cols: u64) -> Result<Value, LowerError> {
        let w = self.float(&format!("{name}.weight"), &[rows, cols])?;
        let y = self.op(Op::MatMul, &[x, w])?;
        let bias = format!("{name}.bias");
        if !self.has(&bias) {
            return Ok(y);
        }
        let bias = self.float(&bias, &[rows])?;
        self.op(Op::Add, &[y, bias])
    }

    /// The graph that returns `results` and the last versions of the states.
    pub fn finish(mut self, architecture: &str, results: &[Value]) -> Result<Graph, LowerError> {
        if let Some(name) = self.gguf.tensors.keys().find(|name| !self.weights.contains_key(*name)) {
            return Err(LowerError::Unused { name: name.clone(), architecture: architecture.into() });
        }
        let returned: Vec<Value> = results.iter().chain(&self.states).copied().collect();
        self.g.set_return(&returned);
        Ok(self.g)
    }
}
