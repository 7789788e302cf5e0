//! One step on one target, before and after fusion: all that the page and the still picture show of it.

use super::about::{about, measured};
use super::chart::{Chart, Share, bar, memory_plan, not_fused};
use super::diagram::{Diagram, Node, class_of};
use super::dot::counted;
use super::layout::{Marks, Picture, picture};
use super::memory::{Memory, memory};
use super::roofline::{Dot, roofline};
use super::svg::{Frame, document, fragment, heading};
use super::tried::{Rejected, Tried};
use super::watch::{Step, Watch};
use crate::ir::layers::{Group, Section, runs};
use crate::ir::{Graph, Kernel, NodeId, Value};
use crate::passes::{PassError, Pipeline, Totals};
use crate::plan::{Plan, PlannedProgram};
use crate::target::Target;
use serde::Serialize;
use std::collections::BTreeMap;

/// A step of a model on a target.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    pub model: String,
    pub target: String,
    /// Decode, prefill or score.
    pub step: String,
    pub program: String,
    #[serde(rename = "T")]
    pub t: u64,
    #[serde(rename = "R")]
    pub r: u64,
    /// The step, what it costs, and whose the rates are, in the words of `explain`: a line each.
    pub about: Vec<String>,
    /// The graph as the model was lowered to it.
    pub lowered: Totals,
    /// As the picture has it before fusion: with what quantise_acts put in.
    pub before: Totals,
    pub after: Totals,
    pub groups: Vec<PageGroup>,
    /// The nodes of the fused graph in order.
    pub kernels: Vec<KernelNode>,
    /// The nodes of the graph before fusion in order.
    pub primitives: Vec<Primitive>,
    pub steps: Vec<Step>,
    /// What would turn a step over: each of them once.
    pub turns: Vec<String>,
    pub rejected: Vec<Rejected>,
    pub memory: Option<Memory>,
    pub roof: Roof,
    #[serde(skip)]
    pictures: Vec<(String, Picture, Picture)>,
}

/// What the target can do at best.
#[derive(Clone, Debug, Serialize)]
pub struct Roof {
    pub bandwidth_gbs: f64,
    pub f32_gflops: f64,
    pub dot4_gops: Option<f64>,
    pub f16_gflops: Option<f64>,
    pub launch_us: f64,
}

/// Layers that do the same, before and after.
#[derive(Clone, Debug, Serialize)]
pub struct PageGroup {
    pub title: String,
    /// For each layer its number, and the indices of its primitives and of its kernels, in the order of the pictures.
    pub members: Vec<Member>,
    pub before: Drawn,
    pub after: Drawn,
}

/// A layer, or what comes before or after all.
#[derive(Clone, Debug, Serialize)]
pub struct Member {
    pub title: String,
    pub primitives: Vec<usize>,
    pub kernels: Vec<usize>,
}

/// A picture: what an `svg` element of that size holds.
#[derive(Clone, Debug, Serialize)]
pub struct Drawn {
    pub width: f64,
    pub height: f64,
    pub svg: String,
}

/// A node of the fused graph.
#[derive(Clone, Debug, Serialize)]
pub struct KernelNode {
    pub name: String,
    /// Its colour.
    pub class: String,
    /// Tensors, states and inputs that it reads, with their types.
    pub reads: Vec<(String, String)>,
    /// The primitives that it stands for, in words.
    pub replaces: String,
    /// Type and bytes of each result.
    pub results: Vec<(String, u64)>,
    pub us: f64,
    /// As `sinter tune` measured it, where it did.
    pub measured_us: Option<f64>,
    pub bytes: u64,
    pub operations: u64,
    pub launches: u64,
    pub limit: &'static str,
    /// Indices of the primitives.
    pub primitives: Vec<usize>,
    /// The steps that made it, from 1 on, and indices of what was not made of it.
    pub steps: Vec<usize>,
    pub rejected: Vec<usize>,
}

/// A node of the graph before fusion.
#[derive(Clone, Debug, Serialize)]
pub struct Primitive {
    pub name: String,
    pub reads: Vec<(String, String)>,
    /// Weights that it reads through the node that dequantises them.
    pub weights: Vec<String>,
    /// Type and bytes of each result, and after how many rewrites it is no longer written.
    pub results: Vec<(String, u64, Option<usize>)>,
    pub us: f64,
    pub bytes: u64,
    /// The index of the kernel that does it now.
    pub kernel: Option<usize>,
}

/// What a view is made of.
pub struct Parts<'a> {
    pub model: &'a str,
    pub step: &'a str,
    pub lowered: &'a Graph,
    pub pipeline: &'a Pipeline,
    pub target: &'a Target,
    /// Positions of each sequence, to which caches are taken to be filled, and sequences.
    pub context: u64,
    pub sequences: u64,
    /// The plan that the step is a program of, and that.
    pub plan: Option<(&'a Plan, &'a PlannedProgram)>,
}

impl View {
    /// Runs the passes and watches them.
    ///
    /// # Errors
    /// A rule that breaks the graph.
    pub fn new(parts: &Parts) -> Result<View, PassError> {
        let mut watch = Watch::new(parts.lowered);
        let mut fused = parts.lowered.clone();
        let report = parts.pipeline.run_observed(&mut fused, parts.target, &mut watch)?;
        let before = Diagram::of_graph(&watch.before, parts.target, false);
        let after = Diagram::of_graph(&fused, parts.target, false);
        let kernel_of = kernel_of(&watch, &after);
        let gone = |v: Value| watch.gone.get(&v).copied();
        let primitive_at: BTreeMap<NodeId, usize> = places(&before);
        let (groups, pictures) = groups(&before, &after, &kernel_of, &gone);
        let primitives = before.nodes.iter().map(|node| primitive(node, &before, &kernel_of, &gone));
        let tried = Tried::new(&report, parts.target);
        let measured = measured(&report, parts.target, parts.context);
        let kernels = after.nodes.iter().map(|node| {
            let owned = node.id.map_or(&[][..], |id| watch.owned_by(id));
            let mut owned: Vec<usize> = owned.iter().filter_map(|id| primitive_at.get(id).copied()).collect();
            owned.sort_unstable();
            let number = node.id.map_or(u64::MAX, |id| fused.number(id));
            let (steps, rejected) = tried.of(number);
            let measured_us = measured.get(&number).copied();
            KernelNode { measured_us, primitives: owned, steps, rejected, ..kernel(node, &after) }
        });
        let steps = watch.steps.iter().zip(&tried.turn_of).map(|(seen, &turn)| {
            let primitives = seen.nodes.iter().filter_map(|id| primitive_at.get(id).copied()).collect();
            Step { primitives, turn, ..seen.step.clone() }
        });
        let Target { bandwidth_gbs, f32_gflops, dot4_gops, f16_gflops, launch_us, .. } = *parts.target;
        Ok(View {
            model: parts.model.into(),
            target: parts.target.name.clone(),
            step: parts.step.into(),
            program: after.name.clone(),
            t: after.bounds.t,
            r: after.bounds.r,
            about: about(parts, &report),
            groups,
            kernels: kernels.collect(),
            primitives: primitives.collect(),
            steps: steps.collect(),
            turns: tried.turns,
            rejected: tried.rejected,
            memory: parts.plan.map(|(plan, program)| memory(plan, program, &after)),
            lowered: report.lowered,
            before: report.before,
            after: report.after,
            roof: Roof { bandwidth_gbs, f32_gflops, dot4_gops, f16_gflops, launch_us },
            pictures,
        })
    }

    /// The same as a picture that stands still: time by kernel, the roofline, the memory of the plan if there is one, what was not
    /// fused, and each group before and after.
    pub fn to_svg(&self) -> String {
        let frames: Vec<Frame> = self
            .pictures
            .iter()
            .map(|(title, before, after)| Frame { title: title.clone(), pictures: vec![before, after] })
            .collect();
        let time = |width: f64| bar(&self.shares(), width);
        let class = |call: usize| {
            let kernel = self.memory.as_ref().and_then(|memory| memory.calls.get(call)?.kernel);
            kernel.map_or("plain".into(), |kernel| self.kernels[kernel].class.clone())
        };
        let memory = self.memory.as_ref().map(|memory| |width: f64| memory_plan(memory, &class, width));
        let roof = |width: f64| roofline(&self.roof, &self.dots(), width);
        let mut charts: Vec<&dyn Fn(f64) -> Chart> = vec![&time, &roof];
        charts.extend(memory.as_ref().map(|chart| chart as &dyn Fn(f64) -> Chart));
        let rejected = |width: f64| not_fused(&self.rejected, width);
        charts.push(&rejected);
        document(&heading(self), &charts, &["before: primitives", "after: kernels"], &frames)
    }

    /// A dot for each kernel of a layer that computes: all layers that do the same are one.
    fn dots(&self) -> Vec<Dot> {
        let of_group = |group: &PageGroup| {
            let layers = group.members.len() as f64;
            let kernels = group.members.first().map_or(&[][..], |member| &member.kernels);
            kernels.iter().map(|at| (&self.kernels[*at], layers)).collect::<Vec<_>>()
        };
        let dot = |(kernel, layers): (&KernelNode, f64)| Dot {
            class: kernel.class.clone(),
            intensity: kernel.operations as f64 / kernel.bytes as f64,
            rate: kernel.operations as f64 / (kernel.us * 1e-6),
            share: kernel.us * layers / self.after.us,
        };
        let computes = |dot: &Dot| dot.intensity > 0.0 && dot.intensity.is_finite() && dot.rate.is_finite();
        self.groups.iter().flat_map(of_group).map(dot).filter(computes).collect()
    }

    /// The time of each kernel by name, all its launches together.
    fn shares(&self) -> Vec<Share> {
        let mut shares: Vec<Share> = vec![];
        for KernelNode { name, class, us, .. } in &self.kernels {
            let name = name.split(" {").next().unwrap_or_default();
            match shares.iter_mut().find(|share| share.name == name) {
                Some(share) => share.us += us,
                None => shares.push(Share { name: name.into(), class: class.clone(), us: *us }),
            }
        }
        shares
    }
}

/// A diagram as a picture of its own.
pub fn svg(diagram: &Diagram) -> String {
    alone(diagram, &[])
}

/// A program of a plan: its memory over its calls, its streams, and the calls.
pub fn svg_of_plan(plan: &Plan, program: &PlannedProgram, unfold: bool) -> String {
    let diagram = Diagram::of_plan(plan, program, unfold);
    // Of calls, not of the nodes of a graph.
    let no_nodes = Diagram { nodes: vec![], groups: vec![], ..diagram.clone() };
    let memory = memory(plan, program, &no_nodes);
    let class = |call: usize| diagram.nodes.get(call).map_or("plain".into(), node_class);
    alone(&diagram, &[&|width| memory_plan(&memory, &class, width)])
}

fn alone(diagram: &Diagram, charts: &[&dyn Fn(f64) -> Chart]) -> String {
    let class = |item: usize| node_class(&diagram.nodes[item]);
    let marks = Marks { class: &class, gone: &|_| None };
    let drawn: Vec<(String, Picture)> =
        diagram.groups.iter().map(|group| (group.title(), picture(diagram, group, &marks))).collect();
    let frames: Vec<Frame> = drawn
        .iter()
        .map(|(title, picture)| Frame { title: title.clone(), pictures: vec![picture] })
        .collect();
    let at = diagram.bounds;
    document(&[format!("{}, T ≤ {}, R ≤ {}", diagram.name, at.t, at.r)], charts, &[""], &frames)
}

fn places(diagram: &Diagram) -> BTreeMap<NodeId, usize> {
    diagram.nodes.iter().enumerate().filter_map(|(at, node)| Some((node.id?, at))).collect()
}

/// The kernel that each primitive went into.
fn kernel_of(watch: &Watch, after: &Diagram) -> BTreeMap<NodeId, (usize, String)> {
    let mut of = BTreeMap::new();
    for (at, node) in after.nodes.iter().enumerate() {
        for &primitive in node.id.map_or(&[][..], |id| watch.owned_by(id)) {
            of.insert(primitive, (at, node_class(node)));
        }
    }
    of
}

fn node_class(node: &Node) -> String {
    class_of(node.fused.then(|| Kernel::from_name(&node.name)).flatten())
}

fn reads(node: &Node) -> Vec<(String, String)> {
    node.reads.iter().map(|read| (read.name.clone(), read.ty.to_string())).collect()
}

/// The weights of the nodes that do nothing but dequantise them for this one.
fn weights(node: &Node, before: &Diagram) -> Vec<String> {
    let loads =
        node.operands.iter().map(|operand| &before.nodes[operand.from]).filter(|n| n.name == "dequant");
    loads.flat_map(|load| &load.reads).filter(|read| !read.is_input).map(|read| read.name.clone()).collect()
}

fn primitive(
    node: &Node,
    before: &Diagram,
    kernel_of: &BTreeMap<NodeId, (usize, String)>,
    gone: &dyn Fn(Value) -> Option<usize>,
) -> Primitive {
    let gone = |out: u32| node.id.and_then(|node| gone(Value { node, out }));
    let results = (0u32..).zip(&node.results);
    Primitive {
        name: node.name.clone(),
        reads: reads(node),
        weights: weights(node, before),
        results: results.map(|(out, ty)| (ty.to_string(), ty.bytes(&before.bounds), gone(out))).collect(),
        us: node.cost.us,
        bytes: node.cost.bytes,
        kernel: node.id.and_then(|id| kernel_of.get(&id)).map(|(at, _)| *at),
    }
}

fn kernel(node: &Node, after: &Diagram) -> KernelNode {
    KernelNode {
        name: node.name.clone(),
        class: node_class(node),
        reads: reads(node),
        replaces: counted(&node.replaces),
        results: node.results.iter().map(|ty| (ty.to_string(), ty.bytes(&after.bounds))).collect(),
        us: node.cost.us,
        measured_us: None,
        bytes: node.cost.bytes,
        operations: node.cost.operations,
        launches: node.cost.launches,
        limit: node.limit.map_or("", |limit| limit.name()),
        primitives: vec![],
        steps: vec![],
        rejected: vec![],
    }
}

type Pictures = Vec<(String, Picture, Picture)>;

/// Groups of layers that are alike before and after, with their pictures.
fn groups(
    before: &Diagram,
    after: &Diagram,
    kernel_of: &BTreeMap<NodeId, (usize, String)>,
    gone: &dyn Fn(Value) -> Option<usize>,
) -> (Vec<PageGroup>, Pictures) {
    // Which group a section is in, and where in it, before and after.
    let mut pairs: BTreeMap<Section, [Option<(usize, usize)>; 2]> = BTreeMap::new();
    for (side, diagram) in [before, after].into_iter().enumerate() {
        for (at, group) in diagram.groups.iter().enumerate() {
            for place in 0..group.items.len() {
                let section = group.layers.get(place).map_or(group.section, |layer| Section::Layer(*layer));
                pairs.entry(section).or_default()[side] = Some((at, place));
            }
        }
    }
    let mut alike: Vec<([Option<usize>; 2], Vec<Section>)> = vec![];
    for (section, sides) in &pairs {
        let key = sides.map(|side| side.map(|(group, _)| group));
        match alike.iter_mut().find(|(known, _)| *known == key) {
            Some((_, sections)) => sections.push(*section),
            None => alike.push((key, vec![*section])),
        }
    }
    let marks_before = |item: usize| {
        let went = before.nodes[item].id.and_then(|id| kernel_of.get(&id));
        format!("part {}", went.map_or("plain", |(_, class)| class.trim_start_matches("fused ")))
    };
    let marks_before = Marks { class: &marks_before, gone };
    let marks_after = |item: usize| node_class(&after.nodes[item]);
    let marks_after = Marks { class: &marks_after, gone: &|_| None };
    let (mut all, mut pictures) = (vec![], vec![]);
    for (_, sections) in alike {
        let side = |side: usize, diagram: &Diagram, marks: &Marks| {
            let first = pairs[&sections[0]][side].map(|(at, place)| {
                // As a group of this layer alone, so that its picture has its names.
                let group = &diagram.groups[at];
                let layers = group.layers.get(place).copied().into_iter().collect();
                picture(
                    diagram,
                    &Group { section: sections[0], layers, items: vec![group.items[place].clone()] },
                    marks,
                )
            });
            first.unwrap_or_default()
        };
        let drawn = [side(0, before, &marks_before), side(1, after, &marks_after)];
        let items = |section: &Section, side: usize, diagram: &Diagram| {
            pairs[section][side].map_or(vec![], |(at, place)| diagram.groups[at].items[place].clone())
        };
        let of_section = |section: &Section| Group { section: *section, layers: vec![], items: vec![] };
        let layers: Vec<u64> =
            sections.iter().filter_map(|s| if let Section::Layer(n) = s { Some(*n) } else { None }).collect();
        let title = match layers.len() {
            0 | 1 => of_section(&sections[0]).title(),
            n => format!("blk.{} × {n}", runs(&layers)),
        };
        let title = title.replace('-', "–");
        let svg = |picture: &Picture| Drawn {
            width: picture.width.ceil(),
            height: picture.height.ceil(),
            svg: fragment(picture),
        };
        all.push(PageGroup {
            title: title.clone(),
            members: sections
                .iter()
                .map(|section| Member {
                    title: of_section(section).title(),
                    primitives: items(section, 0, before),
                    kernels: items(section, 1, after),
                })
                .collect(),
            before: svg(&drawn[0]),
            after: svg(&drawn[1]),
        });
        let [first, second] = drawn;
        pictures.push((title, first, second));
    }
    (all, pictures)
}
