//! Graphviz.
//!
//! What fans out to every layer (positions, tables of pages) stands in the nodes that read it, as weights do: edges from one node to all
//! others are what `dot` spends its time on.

use super::diagram::{Diagram, Node};
use crate::ir::Micros;
use crate::ir::layers::{Group, rename};
use crate::runtime::Size;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// A diagram as a Graphviz digraph with a cluster for each group of layers.
pub fn dot(diagram: &Diagram) -> String {
    let mut text = format!("digraph {} {{\n", quoted(&diagram.name));
    text += "  graph [fontname=monospace, style=rounded, color=gray60];\n";
    text += "  node [shape=box, fontname=monospace, fontsize=11];\n";
    text += "  edge [fontname=monospace, fontsize=9, color=gray40];\n";
    for (at, group) in diagram.groups.iter().enumerate() {
        let indent = if group.layers.is_empty() { "  " } else { "    " };
        if !group.layers.is_empty() {
            let us = diagram.us_of(group);
            let time = if us > 0.0 { format!("\n{}", Micros(us)) } else { String::new() };
            _ = writeln!(text, "  subgraph cluster_{at} {{\n    label={};", quoted(&(group.title() + &time)));
        }
        for &item in group.items.first().into_iter().flatten() {
            let node = &diagram.nodes[item];
            let style = if node.fused { ", style=filled, fillcolor=lightblue" } else { "" };
            _ = writeln!(text, "{indent}n{item} [label={}{style}];", quoted(&label(node, group)));
        }
        if !group.layers.is_empty() {
            text += "  }\n";
        }
    }
    for ((from, to), edge) in edges(diagram) {
        let style = if edge.back { ", style=dashed, constraint=false" } else { "" };
        _ = writeln!(text, "  n{from} -> n{to} [label={}{style}];", quoted(&edge.types.join("\n")));
    }
    text + "}\n"
}

struct Edge {
    types: Vec<String>,
    /// From a layer of the group to its next.
    back: bool,
}

/// The edges between what is shown: an item of a folded layer is shown by that of the first layer.
fn edges(diagram: &Diagram) -> BTreeMap<(usize, usize), Edge> {
    let mut shown: HashMap<usize, (usize, usize)> = HashMap::new();
    for (at, group) in diagram.groups.iter().enumerate() {
        let first = group.items.first();
        for layer in &group.items {
            let alike = layer.iter().zip(first.into_iter().flatten());
            shown.extend(alike.map(|(item, first)| (*item, (at, *first))));
        }
    }
    let mut edges: BTreeMap<(usize, usize), Edge> = BTreeMap::new();
    for (item, node) in diagram.nodes.iter().enumerate() {
        let Some(&(group, to)) = shown.get(&item) else { continue };
        for operand in &node.operands {
            let Some(&(from_group, from)) = shown.get(&operand.from) else { continue };
            // To the layer itself from one before, or to an earlier group, which is drawn above.
            let back = from_group > group || from_group == group && from >= to;
            let edge = edges.entry((from, to)).or_insert(Edge { types: vec![], back });
            let ty = operand.ty.to_string();
            if !edge.types.contains(&ty) {
                edge.types.push(ty);
            }
        }
    }
    edges
}

fn label(node: &Node, group: &Group) -> String {
    let mut lines = vec![node.name.clone()];
    let folded = group.layers.len() > 1;
    let shown = |name: &str| if folded { rename(name, |_| "*".into()) } else { name.to_string() };
    lines.extend(node.notes.iter().map(|note| shown(note)));
    if !node.replaces.is_empty() {
        lines.extend(wrapped(&format!("replaces {}", counted(&node.replaces)), 48));
    }
    let tensors = node.reads.iter().filter(|read| !read.is_input);
    lines.extend(tensors.map(|read| format!("{} : {}", shown(&read.name), read.ty)));
    let inputs: Vec<&str> =
        node.reads.iter().filter(|read| read.is_input).map(|read| read.name.as_str()).collect();
    if !inputs.is_empty() {
        lines.extend(wrapped(&format!("reads {}", inputs.join(", ")), 48));
    }
    if let Some(limit) = node.limit {
        let cost = &node.cost;
        lines.push(format!("{}, {}, {}", Micros(cost.us), Size(cost.bytes), limit.name()));
    }
    lines.join("\n")
}

/// As in `dequant × 2, matmul`.
pub(super) fn counted(names: &[(String, usize)]) -> String {
    let one = |(name, count): &(String, usize)| match count {
        1 => name.clone(),
        n => format!("{name} × {n}"),
    };
    names.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Lines of about so many characters, broken after commas.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for part in text.split_inclusive(", ") {
        match lines.last_mut() {
            Some(line) if line.chars().count() + part.trim_end().chars().count() <= width => {
                line.push_str(part)
            }
            _ => lines.push(part.into()),
        }
    }
    lines.into_iter().map(|line| line.trim_end().to_string()).collect()
}

/// A string as Graphviz reads it: line breaks end a centred line.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            c if c.is_control() => quoted.push(' '),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}
