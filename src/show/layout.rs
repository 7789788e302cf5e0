//! Where the boxes and lines of a picture lie, by dagre's layered layout.
//!
//! Each group of layers is a picture of its own: what it takes from others and gives to them ends in a small box, so layers can be folded
//! and unfolded without a new layout, and 80 layers take no longer than one.

use super::diagram::{Diagram, Node, Operand};
use super::dot::{counted, wrapped};
use crate::ir::layers::{Group, Section};
use crate::ir::{Micros, Syms, Value};
use crate::runtime::Size;
use dagre::graph::{Graph as Layout, GraphOptions};
use dagre::{EdgeLabel, LayoutOptions, NodeLabel};
use std::collections::BTreeMap;

/// Width of a character and height of a line, in the font of `picture.css`.
const CHARACTER: f64 = 6.65;
const LINE: f64 = 14.0;

/// What is drawn of a group.
#[derive(Clone, Debug, Default)]
pub(super) struct Picture {
    pub width: f64,
    pub height: f64,
    pub boxes: Vec<Placed>,
    pub lines: Vec<Line>,
}

/// A node, or an end of what goes to another group.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    /// Its place in the group; none for an end.
    pub item: Option<usize>,
    /// Of CSS.
    pub class: String,
    pub text: Vec<String>,
    /// The upper left corner.
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

/// A value on its way.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub points: Vec<(f64, f64)>,
    /// Its bytes, and where they stand.
    pub label: String,
    pub at: (f64, f64),
    /// After which rewrite it is no longer written, if after any.
    pub gone: Option<usize>,
    /// The place of the node that it is of in the group, if that is there.
    pub of: Option<usize>,
}

/// What marks nodes and values of a diagram.
pub(super) struct Marks<'a> {
    /// The CSS class of a node, which is its colour.
    pub class: &'a dyn Fn(usize) -> String,
    /// After which rewrite a value is no longer written, if after any.
    pub gone: &'a dyn Fn(Value) -> Option<usize>,
}

/// The picture of a group, which is that of its first layer.
pub(super) fn picture(diagram: &Diagram, group: &Group, marks: &Marks) -> Picture {
    let Some(items) = group.items.first().filter(|items| !items.is_empty()) else {
        return Picture::default();
    };
    let mut sketch = Sketch::default();
    for (at, &item) in items.iter().enumerate() {
        let node = &diagram.nodes[item];
        sketch.add(Some(at), (marks.class)(item), text(node));
    }
    let place: BTreeMap<usize, usize> = items.iter().enumerate().map(|(at, item)| (*item, at)).collect();
    let sections = sections(diagram);
    let here = group.section;
    let mut ends: BTreeMap<(usize, u32), usize> = BTreeMap::new();
    for (to, &item) in items.iter().enumerate() {
        for operand in &diagram.nodes[item].operands {
            let producer = &diagram.nodes[operand.from];
            let gone = producer.id.and_then(|node| (marks.gone)(Value { node, out: operand.out }));
            let label = label(operand, &diagram.bounds);
            let from = place.get(&operand.from).copied().unwrap_or_else(|| {
                *ends.entry((operand.from, operand.out)).or_insert_with(|| {
                    let whence = whence(here, sections[operand.from]);
                    sketch.add(None, "end".into(), vec![format!("{}{whence}", producer.name)])
                })
            });
            sketch.join(from, to, label, gone);
        }
    }
    // What other sections use.
    let mut leaving: BTreeMap<(usize, u32), (Section, &Operand)> = BTreeMap::new();
    for (user, node) in diagram.nodes.iter().enumerate() {
        for operand in node.operands.iter().filter(|operand| place.contains_key(&operand.from)) {
            if !place.contains_key(&user) {
                let to = leaving.entry((operand.from, operand.out)).or_insert((sections[user], operand));
                to.0 = sections[user].min(to.0);
            }
        }
    }
    for ((item, out), (to, operand)) in leaving {
        let node = &diagram.nodes[item];
        let gone = node.id.and_then(|node| (marks.gone)(Value { node, out }));
        let end = sketch.add(None, "end".into(), vec![whither(here, to)]);
        sketch.join(place[&item], end, label(operand, &diagram.bounds), gone);
    }
    sketch.placed()
}

/// What stands at a value: its bytes, but of a state, of which rows alone are moved.
fn label(operand: &Operand, bounds: &Syms) -> String {
    if operand.is_state { "state".into() } else { Size(operand.ty.bytes(bounds)).to_string() }
}

/// The section that each node is in.
fn sections(diagram: &Diagram) -> Vec<Section> {
    let mut sections = vec![Section::Head; diagram.nodes.len()];
    for group in &diagram.groups {
        for (at, items) in group.items.iter().enumerate() {
            let section = group.layers.get(at).map_or(group.section, |layer| Section::Layer(*layer));
            for item in items {
                sections[*item] = section;
            }
        }
    }
    sections
}

fn whence(here: Section, from: Section) -> String {
    match (here, from) {
        (Section::Layer(n), Section::Layer(m)) if n == m + 1 => " of the layer before".into(),
        (_, Section::Layer(m)) => format!(" of blk.{m}"),
        (_, Section::Head | Section::Tail) => String::new(),
    }
}

fn whither(here: Section, to: Section) -> String {
    match (here, to) {
        (Section::Layer(n), Section::Layer(m)) if m == n + 1 => "to the next layer".into(),
        (_, Section::Layer(m)) => format!("to blk.{m}"),
        (_, Section::Head | Section::Tail) => "to what follows".into(),
    }
}

/// What a box says. Names lose their layer, which the group has.
fn text(node: &Node) -> Vec<String> {
    let mut lines = vec![node.name.split(" {").next().unwrap_or_default().to_string()];
    let short = |name: &str| match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((_, rest)) => rest.to_string(),
        None => name.to_string(),
    };
    lines.extend(node.notes.iter().map(|note| short(note)));
    lines.extend(node.reads.iter().filter(|read| !read.is_input).map(|read| match node.fused {
        true => format!("{} {}", short(&read.name), read.ty.dtype),
        false => short(&read.name),
    }));
    if node.fused {
        if !node.replaces.is_empty() {
            lines.extend(wrapped(&format!("for {}", counted(&node.replaces)), 40));
        }
    } else {
        let inputs: Vec<&str> = node.reads.iter().filter(|r| r.is_input).map(|r| r.name.as_str()).collect();
        lines.extend(inputs.iter().map(|name| name.to_string()));
    }
    if let Some(limit) = node.limit.filter(|_| node.fused) {
        lines.push(format!("{} · {} · {}", Micros(node.cost.us), Size(node.cost.bytes), limit.name()));
    }
    lines
}

/// Boxes and joints before they have places.
#[derive(Default)]
struct Sketch {
    boxes: Vec<Placed>,
    /// From, to, and what it is.
    joints: Vec<(usize, usize, Line)>,
}

impl Sketch {
    fn add(&mut self, item: Option<usize>, class: String, text: Vec<String>) -> usize {
        let longest = text.iter().map(|line| line.chars().count()).max().unwrap_or(0);
        let (width, height) = (longest as f64 * CHARACTER + 18.0, text.len() as f64 * LINE + 8.0);
        self.boxes.push(Placed { item, class, text, x: 0.0, y: 0.0, width, height });
        self.boxes.len() - 1
    }

    fn join(&mut self, from: usize, to: usize, label: String, gone: Option<usize>) {
        // A value that is used twice by a node is drawn once.
        if !self.joints.iter().any(|(a, b, line)| (*a, *b) == (from, to) && line.label == label) {
            let line = Line { points: vec![], label, at: (0.0, 0.0), gone, of: self.boxes[from].item };
            self.joints.push((from, to, line));
        }
    }

    fn placed(mut self) -> Picture {
        let mut graph = Layout::<NodeLabel, EdgeLabel>::with_options(GraphOptions {
            directed: true,
            multigraph: true,
            compound: false,
        });
        for (at, placed) in self.boxes.iter().enumerate() {
            let label = NodeLabel { width: placed.width, height: placed.height, ..NodeLabel::default() };
            graph.set_node(at.to_string(), Some(label));
        }
        for (at, (from, to, line)) in self.joints.iter().enumerate() {
            let label = EdgeLabel {
                width: line.label.chars().count() as f64 * CHARACTER * 0.85,
                height: LINE - 3.0,
                ..EdgeLabel::default()
            };
            graph.set_edge(from.to_string(), to.to_string(), Some(label), Some(&at.to_string()));
        }
        let options = LayoutOptions {
            nodesep: 16.0,
            edgesep: 10.0,
            ranksep: 20.0,
            marginx: 8.0,
            marginy: 8.0,
            ..LayoutOptions::default()
        };
        dagre::layout(&mut graph, Some(options));
        let mut picture = Picture::default();
        for (at, placed) in self.boxes.iter_mut().enumerate() {
            let Some(node) = graph.node(&at.to_string()) else { continue };
            placed.x = node.x.unwrap_or_default() - placed.width / 2.0;
            placed.y = node.y.unwrap_or_default() - placed.height / 2.0;
            picture.width = picture.width.max(placed.x + placed.width + 8.0);
            picture.height = picture.height.max(placed.y + placed.height + 8.0);
        }
        for (at, (from, to, mut line)) in self.joints.into_iter().enumerate() {
            let Some(edge) = graph.edge(&from.to_string(), &to.to_string(), Some(&at.to_string())) else {
                continue;
            };
            line.points = edge.points.iter().map(|p| (p.x, p.y)).collect();
            line.at = (edge.x.unwrap_or_default(), edge.y.unwrap_or_default());
            let right = line.points.iter().map(|p| p.0).fold(line.at.0 + 40.0, f64::max);
            picture.width = picture.width.max(right);
            picture.lines.push(line);
        }
        picture.boxes = self.boxes;
        picture
    }
}
