//! A graph for other tools, as JSON.

use super::attributes::Slice;
use super::graph::{Graph, Value};
use super::op::Op;
use super::text::names;
use serde_json::{Value as Json, json};
use std::collections::HashMap;

impl Graph {
    /// The graph as JSON (see docs/json.md): nodes in printing order, values by the names of the text form.
    pub fn to_json(&self) -> Json {
        let names = names(self);
        let name = |v: &Value| names.get(v).cloned().unwrap_or_default();
        let nodes: Vec<Json> = self
            .order()
            .into_iter()
            .filter(|&id| id != self.ret())
            .map(|id| self.node_json(id, &names))
            .collect();
        json!({
            "name": self.name,
            "bounds": { "T": self.bounds.t, "R": self.bounds.r },
            "inputs": self.inputs().iter().map(|&id| name(&id.into())).collect::<Vec<_>>(),
            "nodes": nodes,
            "results": self.results().iter().map(name).collect::<Vec<_>>(),
        })
    }

    fn node_json(&self, id: super::graph::NodeId, names: &HashMap<Value, String>) -> Json {
        let name = |v: &Value| names.get(v).cloned().unwrap_or_default();
        let node = self.node(id);
        let results: Vec<Json> = (0u32..)
            .zip(&node.outs)
            .map(|(out, ty)| {
                let shape: Vec<String> = ty.shape.iter().map(ToString::to_string).collect();
                json!({ "name": name(&Value { node: id, out }), "dtype": ty.dtype.name(), "shape": shape })
            })
            .collect();
        let mut json = json!({
            "op": node.op.name(),
            "operands": self.operands(id).iter().map(name).collect::<Vec<_>>(),
            "results": results,
        });
        match &node.op {
            Op::Weight { name, rows } => {
                json["name"] = json!(name);
                if let Some(Slice { first, of }) = rows {
                    json["rows"] = json!({ "first": first, "of": of });
                }
            }
            Op::State { name, role } => {
                json["name"] = json!(name);
                json["role"] = json!(role.name());
            }
            Op::Const { value } => json["value"] = json!(value),
            Op::RmsNorm { eps } => json["attributes"] = json!({ "eps": eps }),
            Op::Scores { scale } => json["attributes"] = json!({ "scale": scale }),
            Op::MatMul { round: Some(dtype) } => json["attributes"] = json!({ "round": dtype.to_string() }),
            Op::KvRead { page } => json["attributes"] = json!({ "page": page }),
            Op::CausalMask { window: Some(window) } => json["attributes"] = json!({ "window": window }),
            Op::Rope(rope) => {
                json["attributes"] =
                    json!({ "base": rope.base, "dims": rope.dims, "style": rope.style.name() });
            }
            Op::Fused(fused) => {
                json["kernel"] = json!(fused.kernel.name());
                json["body"] = fused.body.to_json();
            }
            Op::Input { .. }
            | Op::GetRows
            | Op::Dequant
            | Op::QuantAct
            | Op::MatMul { round: None }
            | Op::MatMulId
            | Op::Add
            | Op::Mul
            | Op::Silu
            | Op::Reshape
            | Op::KvAppend
            | Op::CausalMask { window: None }
            | Op::Softmax
            | Op::WeightedSum
            | Op::GatedScan
            | Op::ArgMax
            | Op::Return => {}
        }
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_told_by_their_symbols() {
        let g = Graph::parse("graph @g(%x: f32[T,4]) sym T<=7, R<=2 { return %x }").unwrap();
        assert_eq!(g.to_json()["bounds"], json!({ "T": 7, "R": 2 }));
    }
}
