//! Printing.

use super::super::attributes::{RopeStyle, Slice};
use super::super::graph::{Graph, NodeId, Value};
use super::super::op::Op;
use super::is_plain;
use std::collections::{HashMap, HashSet};
use std::fmt;

/// A place in a graph: a node, or a node in the body of a fused node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct At {
    pub node: NodeId,
    /// The node in the body of `node`.
    pub inner: Option<NodeId>,
}

/// A line of the text and what it shows.
pub struct Line {
    pub at: Option<At>,
    pub text: String,
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, line) in lines(self).iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{}", line.text)?;
        }
        Ok(())
    }
}

impl Graph {
    /// The lines of the text between its braces, without indent: one for each node that is no input.
    pub fn statements(&self) -> Vec<String> {
        let mut lines = vec![];
        block(self, None, &names(self), &mut lines);
        lines.iter().map(|line| line.text.trim_start().to_string()).collect()
    }
}

/// The text of a graph by lines. Any graph can be printed, broken ones too.
pub fn lines(graph: &Graph) -> Vec<Line> {
    let inputs = graph.inputs().iter().map(|&id| {
        let Op::Input { name, .. } = graph.op(id) else { return String::new() };
        format!("{}: {}", sigil('%', name), list(&graph.node(id).outs))
    });
    let (inputs, bounds) = (list(inputs), graph.bounds);
    let mut lines = vec![Line {
        at: None,
        text: format!("graph {}({inputs}) sym T<={}, R<={} {{", sigil('@', &graph.name), bounds.t, bounds.r),
    }];
    block(graph, None, &names(graph), &mut lines);
    lines.push(Line { at: None, text: "}".into() });
    lines
}

/// The statements of a graph, or of the body of `outer`, with values called as `names` has it.
pub(super) fn block(
    graph: &Graph,
    outer: Option<NodeId>,
    names: &HashMap<Value, String>,
    lines: &mut Vec<Line>,
) {
    let indent = if outer.is_none() { "  " } else { "    " };
    let name = |v: &Value| names.get(v).cloned().unwrap_or_else(|| "%?".into());
    for id in graph.order() {
        let at = Some(outer.map_or(At { node: id, inner: None }, |node| At { node, inner: Some(id) }));
        let node = graph.node(id);
        let operands = graph.operands(id);
        let values = list(operands.iter().map(name));
        let detail = match &node.op {
            Op::Input { .. } => continue,
            Op::Return => {
                let space = if values.is_empty() { "" } else { " " };
                lines.push(Line { at, text: format!("{indent}return{space}{values}") });
                continue;
            }
            Op::Weight { name, rows: Some(Slice { first, of }) } => {
                format!(" {} from {first} of {of}", quoted(name))
            }
            Op::Weight { name, rows: None } | Op::State { name, .. } => format!(" {}", quoted(name)),
            Op::Const { value } => format!(" {}", float(*value)),
            Op::Fused(fused) => {
                let params = fused.body.inputs().iter().map(|&id| match fused.body.op(id) {
                    Op::Input { name, .. } => sigil('%', name),
                    _ => "%?".into(),
                });
                let bound = params.zip(&operands).map(|(p, v)| format!("{p} = {}", name(v)));
                format!(" {}({})", fused.kernel.name(), list(bound))
            }
            _ if values.is_empty() => attributes(&node.op),
            _ => format!(" {values}{}", attributes(&node.op)),
        };
        let results = list((0..node.outs.len() as u32).map(|out| name(&Value { node: id, out })));
        let mut text = format!("{indent}{results} = {}{detail} : {}", node.op.name(), list(&node.outs));
        match &node.op {
            Op::State { role, .. } => {
                text += &format!(" {}", role.name());
                lines.push(Line { at, text });
            }
            Op::Fused(fused) if outer.is_none() => {
                text.push_str(" {");
                lines.push(Line { at, text });
                block(&fused.body, Some(id), &self::names(&fused.body), lines);
                lines.push(Line { at: None, text: format!("{indent}}}") });
            }
            _ => lines.push(Line { at, text }),
        }
    }
}

/// What every value of a graph is called, with its `%`.
pub fn names(graph: &Graph) -> HashMap<Value, String> {
    let mut names = HashMap::new();
    let mut taken = HashSet::new();
    for &id in graph.inputs() {
        if let Op::Input { name, .. } = graph.op(id) {
            taken.insert(name.as_str());
            names.insert(Value::from(id), sigil('%', name));
        }
    }
    let mut counts = HashMap::<&str, usize>::new();
    for id in graph.order() {
        let prefix = match graph.op(id) {
            Op::Input { .. } => continue,
            Op::Weight { .. } => "w",
            Op::State { .. } => "s",
            Op::Const { .. } => "c",
            _ => "",
        };
        for out in 0..graph.node(id).outs.len() as u32 {
            let count = counts.entry(prefix).or_default();
            let mut name = format!("{prefix}{count}");
            while taken.contains(name.as_str()) {
                *count += 1;
                name = format!("{prefix}{count}");
            }
            *count += 1;
            names.insert(Value { node: id, out }, format!("%{name}"));
        }
    }
    names
}

/// The attributes as ` {key=value, …}`, or nothing.
pub fn attributes(op: &Op) -> String {
    match op {
        Op::RmsNorm { eps } => format!(" {{eps={}}}", float(*eps)),
        Op::Scores { scale } => format!(" {{scale={}}}", float(*scale)),
        Op::MatMul { round: Some(dtype) } => format!(" {{round={dtype}}}"),
        Op::KvRead { page } => format!(" {{page={page}}}"),
        Op::CausalMask { window: Some(window) } => format!(" {{window={window}}}"),
        Op::Rope(rope) => {
            let (base, dims, style) = (float(rope.base), rope.dims, rope.style.name());
            format!(" {{base={base}, dims={dims}, style={style}}}")
        }
        Op::Input { .. }
        | Op::Weight { .. }
        | Op::State { .. }
        | Op::Const { .. }
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
        | Op::Fused(_)
        | Op::Return => String::new(),
    }
}

impl RopeStyle {
    /// The name used in the text form.
    pub const fn name(self) -> &'static str {
        match self {
            RopeStyle::Interleaved => "interleaved",
            RopeStyle::NeoX => "neox",
        }
    }
}

/// The shortest decimal that reads back to the same bits; what is not finite, as its bits.
fn float(x: f32) -> String {
    match x.abs() {
        a if !a.is_finite() => format!("{:#010x}", x.to_bits()),
        a if a == 0.0 || (1e-7..1e16).contains(&a) => x.to_string(),
        _ => format!("{x:e}"),
    }
}

fn sigil(sign: char, name: &str) -> String {
    if is_plain(name) { format!("{sign}{name}") } else { format!("{sign}{}", quoted(name)) }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '\'' => quoted.push(c),
            _ => quoted.extend(c.escape_debug()),
        }
    }
    quoted + "\""
}

fn list(items: impl IntoIterator<Item = impl ToString>) -> String {
    items.into_iter().map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
}
