//! Layers: which a node belongs to, and which of them do the same.
//!
//! A graph knows no layers, but the names of its weights and states do (`blk.7.ffn_down.weight`). A node that reads one belongs to that
//! layer, any other to the last of those that it takes values from, so that data flows from layer to layer one way.

use super::graph::{Graph, NodeId, Value};
use super::op::Op;
use super::text::attributes;
use std::collections::HashMap;

/// The number of the layer in a name or a label such as `dequant_matmul blk.7.ffn_down.weight`.
pub fn layer(label: &str) -> Option<u64> {
    let rest = &label[label.find("blk.")? + 4..];
    rest.split('.').next()?.parse().ok()
}

/// A label with another word for the number of each layer that it names.
pub fn rename(label: &str, mut word: impl FnMut(u64) -> String) -> String {
    let mut parts = label.split("blk.");
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        text.push_str("blk.");
        let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        match part[..digits].parse() {
            Ok(layer) => text.push_str(&(word(layer) + &part[digits..])),
            Err(_) => text.push_str(part),
        }
    }
    text
}

/// Numbers as ascending runs: `0-3,7`.
pub fn runs(numbers: &[u64]) -> String {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|a, b| *b == a + 1);
    let text = runs.map(|run| match (run[0], run[run.len() - 1]) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    });
    text.collect::<Vec<_>>().join(",")
}

/// A part of a graph, in the order in which data flows through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Section {
    /// Before the layers.
    Head,
    Layer(u64),
    /// After them.
    Tail,
}

/// A node, a call or whatever else a program is made of, as folding sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The layer that its own weights and states name.
    pub named: Option<u64>,
    /// Whether it reads a leaf, of whatever name.
    pub reads_leaf: bool,
    /// What it does, without the number of its layer: equal for items that do the same.
    pub key: String,
    /// The items that it takes values from and which of their values, all of them earlier.
    pub operands: Vec<(usize, u32)>,
}

/// Sections that do the same, folded.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub section: Section,
    /// The numbers of the layers, ascending; empty for what comes before and after them.
    pub layers: Vec<u64>,
    /// For each layer (or once, where there is none) its items; those of the same place do the same.
    pub items: Vec<Vec<usize>>,
}

impl Group {
    /// As in `blk.0-31 × 32`.
    pub fn title(&self) -> String {
        match (self.section, self.layers.len()) {
            (Section::Head, _) => "before the layers".into(),
            (Section::Tail, _) => "after the layers".into(),
            (Section::Layer(n), 0 | 1) => format!("blk.{n}"),
            (Section::Layer(_), n) => format!("blk.{} × {n}", runs(&self.layers)),
        }
    }

    /// How many sections these are.
    pub fn count(&self) -> u64 {
        self.items.len() as u64
    }
}

/// The section of each item.
pub fn sections(items: &[Item]) -> Vec<Section> {
    let mut users: Vec<Vec<usize>> = vec![vec![]; items.len()];
    for (i, item) in items.iter().enumerate() {
        for &(from, _) in item.operands.iter().filter(|(from, _)| *from < i) {
            users[from].push(i);
        }
    }
    // Whether a layer is still to come: the last norm takes values from the last layer, and is none of it.
    let mut leads = vec![false; items.len()];
    for i in (0..items.len()).rev() {
        leads[i] = users[i].iter().any(|&user| leads[user] || items[user].named.is_some());
    }
    let mut sections: Vec<Section> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let before = item.operands.iter().filter_map(|(from, _)| sections.get(*from).copied()).max();
        let before = before.unwrap_or(Section::Head);
        sections.push(match item.named {
            Some(layer) => before.max(Section::Layer(layer)),
            None if item.reads_leaf && !leads[i] => Section::Tail,
            None => before,
        });
    }
    // What picks rows out of a layer's result for a later one alone belongs to that.
    for i in (0..items.len()).rev() {
        if items[i].named.is_none() && items[i].reads_leaf && sections[i] != Section::Head {
            let first = users[i].iter().map(|&user| sections[user]).min();
            sections[i] = first.map_or(sections[i], |first| first.max(sections[i]));
        }
    }
    sections
}

/// The sections of a program; layers that do the same are one group, unless all are to be shown.
pub fn fold(items: &[Item], unfold: bool) -> Vec<Group> {
    let mut members: Vec<(Section, Vec<usize>)> = vec![];
    let mut place: HashMap<Section, usize> = HashMap::new();
    for (i, section) in sections(items).into_iter().enumerate() {
        let at = *place.entry(section).or_insert_with(|| {
            members.push((section, vec![]));
            members.len() - 1
        });
        members[at].1.push(i);
    }
    members.sort();
    let mut groups: Vec<Group> = vec![];
    let mut known: HashMap<String, usize> = HashMap::new();
    for (section, list) in members {
        let Section::Layer(layer) = section else {
            groups.push(Group { section, layers: vec![], items: vec![list] });
            continue;
        };
        let key = if unfold { layer.to_string() } else { structure(items, &list) };
        let at = *known.entry(key).or_insert_with(|| {
            groups.push(Group { section, layers: vec![], items: vec![] });
            groups.len() - 1
        });
        groups[at].layers.push(layer);
        groups[at].items.push(list);
    }
    groups
}

/// What the items of a section do and how they hang together: values from outside count by the order in which they are met.
fn structure(items: &[Item], members: &[usize]) -> String {
    let local: HashMap<usize, usize> = members.iter().enumerate().map(|(at, item)| (*item, at)).collect();
    let mut outside: HashMap<(usize, u32), usize> = HashMap::new();
    let mut text = String::new();
    for &member in members {
        text += &items[member].key;
        for operand in &items[member].operands {
            text += &match local.get(&operand.0) {
                Some(at) => format!(" {at}.{}", operand.1),
                None => {
                    let met = outside.len();
                    format!(" outside {}", outside.entry(*operand).or_insert(met))
                }
            };
        }
        text.push('\n');
    }
    text
}

/// Whether nodes of this operation are shown within those that use them.
pub fn is_detail(op: &Op) -> bool {
    op.is_leaf() || matches!(op, Op::Return)
}

/// The nodes of a graph that are no leaves, in its order, as folding sees them.
pub fn items(g: &Graph) -> (Vec<NodeId>, Vec<Item>) {
    let nodes: Vec<NodeId> = g.order().into_iter().filter(|id| !is_detail(g.op(*id))).collect();
    let place: HashMap<NodeId, usize> = nodes.iter().enumerate().map(|(at, id)| (*id, at)).collect();
    let item = |(at, id): (usize, &NodeId)| {
        let operands = g.operands(*id);
        let leaves: Vec<&Value> = operands.iter().filter(|v| is_detail(g.op(v.node))).collect();
        let named = leaves.iter().filter_map(|v| leaf_name(g.op(v.node)).and_then(layer)).max();
        Item {
            named,
            reads_leaf: !leaves.is_empty(),
            key: key(g, *id, &leaves),
            // In a graph with a cycle, which the verifier refuses, some come later.
            operands: operands
                .iter()
                .filter_map(|v| Some((*place.get(&v.node).filter(|p| **p < at)?, v.out)))
                .collect(),
        }
    };
    let items = nodes.iter().enumerate().map(item).collect();
    (nodes, items)
}

/// The name of a leaf that has one.
fn leaf_name(op: &Op) -> Option<&str> {
    match op {
        Op::Weight { name, .. } | Op::State { name, .. } | Op::Input { name, .. } => Some(name),
        _ => None,
    }
}

fn key(g: &Graph, id: NodeId, leaves: &[&Value]) -> String {
    let node = g.node(id);
    let mut key = match &node.op {
        Op::Fused(fused) => format!("{} {}", fused.kernel.name(), fused.body),
        op => format!("{}{}", op.name(), attributes(op)),
    };
    for ty in &node.outs {
        key += &format!(" {ty}");
    }
    for leaf in leaves {
        let name = match g.op(leaf.node) {
            Op::Weight { rows: Some(rows), name } => format!("{name}[{}..]", rows.first),
            Op::Const { value } => value.to_string(),
            op => leaf_name(op).unwrap_or_default().to_string(),
        };
        key += &format!(" {} : {}", rename(&name, |_| "*".into()), g.ty(**leaf));
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_fold_to_runs() {
        let label = "merge blk.12.attn_q.weight, blk.12.attn_k.weight";
        assert_eq!(layer(label), Some(12));
        assert_eq!(
            rename(label, |_| runs(&[3, 0, 1, 2, 7, 7])),
            "merge blk.0-3,7.attn_q.weight, blk.0-3,7.attn_k.weight"
        );
        for same in ["sample_head output.weight", "blk.", "blk.x.y", ""] {
            assert_eq!((layer(same), rename(same, |_| "*".into())), (None, same.to_string()));
        }
    }

    /// A table, so many layers of a norm and a sum, of which one may have another type of norm, and what comes after.
    fn graph(layers: usize, odd: Option<usize>) -> Graph {
        let mut text = String::from(
            "graph @g(%tokens: i32[T], %wanted: i32[R]) sym T<=2, R<=2 {\n %table = weight \"t\" : f32[9,4]\n\
             %x0 = get_rows %table, %tokens : f32[T,4]\n",
        );
        for i in 0..layers {
            let dtype = if odd == Some(i) { "f16" } else { "f32" };
            text += &format!("%w{i} = weight \"blk.{i}.norm\" : {dtype}[4]\n");
            let mut norm = format!("%w{i}");
            if odd == Some(i) {
                text += &format!("%d{i} = dequant %w{i} : f32[4]\n");
                norm = format!("%d{i}");
            }
            text += &format!("%n{i} = rms_norm %x{i}, {norm} {{eps=0.1}} : f32[T,4]\n");
            text += &format!("%a{i} = silu %n{i} : f32[T,4]\n%x{} = add %x{i}, %a{i} : f32[T,4]\n", i + 1);
        }
        text += &format!("%p = get_rows %x{layers}, %wanted : f32[R,4]\n%last = weight \"norm\" : f32[4]\n");
        text += "%y = rms_norm %p, %last {eps=0.1} : f32[R,4]\nreturn %y }";
        Graph::parse(&text).unwrap()
    }

    fn titles(g: &Graph, unfold: bool) -> Vec<String> {
        fold(&items(g).1, unfold).iter().map(Group::title).collect()
    }

    #[test]
    fn equal_layers_are_one_group() {
        let all = ["before the layers", "blk.0-4 × 5", "after the layers"];
        assert_eq!(titles(&graph(5, None), false), all);
        let odd = ["before the layers", "blk.0-1,3-4 × 4", "blk.2", "after the layers"];
        assert_eq!(titles(&graph(5, Some(2)), false), odd);
        let apart = ["before the layers", "blk.0", "blk.1", "after the layers"];
        assert_eq!(titles(&graph(2, None), true), apart);
    }

    /// The sum that ends a layer has no weight; what comes after it picks rows, and is no part of it.
    #[test]
    fn nodes_without_weights_belong_where_their_values_come_from() {
        let g = graph(2, None);
        let (nodes, items) = items(&g);
        let sections: Vec<(&str, Section)> =
            nodes.iter().map(|id| g.op(*id).name()).zip(sections(&items)).collect();
        let layer =
            |n| [("rms_norm", Section::Layer(n)), ("silu", Section::Layer(n)), ("add", Section::Layer(n))];
        let after = [("get_rows", Section::Tail), ("rms_norm", Section::Tail)];
        let all = [&[("get_rows", Section::Head)][..], &layer(0), &layer(1), &after].concat();
        assert_eq!(sections, all);
    }
}
