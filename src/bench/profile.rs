//! Where the time of a step goes, kernel by kernel and node by node.

use super::measurement;
use super::{Bench, BenchError, Output, Test, Work, check_context};
use crate::codegen::spec::{Computation, KernelSpec};
use crate::ir::layers::{layer, rename, runs};
use crate::ir::{DType, Syms};
use crate::plan::{CallWork, Plan, PlannedCall};
use crate::runtime::{BatchError, SequenceId};
use std::collections::BTreeMap;

/// The time of a step, and how its kernels share it.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// The program that the step ran in, and at what.
    pub program: String,
    pub at: Syms,
    /// Steps that were timed, of each kind.
    pub steps: u64,
    /// Nanoseconds of a step as it is outside of a profile, until the host has its result: the median. None where that is not known.
    pub step_ns: Option<u64>,
    /// By time, most first.
    pub kernels: Vec<KernelTime>,
    /// Every call, in order.
    pub nodes: Vec<NodeTime>,
    /// One step as it was: that of median time.
    pub launches: Vec<LaunchTime>,
}

/// The calls of one kernel that do the same in different layers.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// As [`crate::codegen::spec::KernelSpec::name`] has it.
    pub kernel: &'static str,
    /// Which nodes of the graph they are, layers folded: `blk.0-31.ffn_down.weight`.
    pub node: String,
    /// Of a step.
    pub calls: u64,
    pub launches: u64,
    /// Nanoseconds of all of them together: the median over the steps.
    pub ns: u64,
    /// What they have to do at least.
    pub work: CallWork,
    /// Of what its operations are.
    pub arithmetic: Arithmetic,
}

/// Of what a kernel's operations are: a rate of the target each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    Float,
    /// 8-bit integers: quantised activations times quantised weights.
    Integer,
    /// Numbers that may be rounded to 16 bits, on matrix units.
    Half,
}

/// One call.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeTime {
    /// Its place in the program.
    pub call: usize,
    pub kernel: &'static str,
    pub node: String,
    /// On which the plan has it.
    pub stream: u32,
    pub launches: u64,
    /// Nanoseconds: the median over the steps.
    pub ns: u64,
    pub work: CallWork,
    pub arithmetic: Arithmetic,
}

/// One launch of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchTime {
    /// The place of its call in the program, and its own in the call.
    pub call: usize,
    pub launch: usize,
    /// Nanoseconds from the start of the step.
    pub start_ns: u64,
    pub ns: u64,
}

/// Nanoseconds of some work, in which its bytes and operations went by.
fn rate(amount: u64, ns: u64) -> f64 {
    amount as f64 * 1e9 / ns.max(1) as f64
}

impl KernelTime {
    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        rate(self.work.bytes, self.ns)
    }

    /// Operations per second.
    pub fn arithmetic(&self) -> f64 {
        rate(self.work.operations, self.ns)
    }
}

impl NodeTime {
    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        rate(self.work.bytes, self.ns)
    }
}

impl Profile {
    /// What the launches of some steps of a program say, at whose end sequences have `filled` rows of the caches, all together.
    pub fn of(plan: &Plan, program: usize, at: Syms, filled: u64, steps: &[Vec<LaunchTime>]) -> Profile {
        let planned = &plan.programs[program];
        let times: Vec<Vec<(u64, u64)>> =
            steps.iter().map(|step| of_calls(step, planned.calls.len())).collect();
        let node = |(i, call): (usize, &PlannedCall)| {
            let spec = &plan.kernels[call.kernel as usize].spec;
            NodeTime {
                call: i,
                kernel: spec.name(),
                node: without(spec.name(), &call.label),
                stream: call.slot.stream,
                launches: times.first().map_or(0, |step| step[i].1),
                ns: median(times.iter().map(|step| step[i].0)),
                work: plan.work_of_call(program, i, &at, filled).unwrap_or_default(),
                arithmetic: arithmetic(spec),
            }
        };
        let nodes: Vec<NodeTime> = planned.calls.iter().enumerate().map(node).collect();
        let mut ordered: Vec<&Vec<LaunchTime>> = steps.iter().collect();
        ordered.sort_by_key(|step| step.iter().map(|launch| launch.ns).sum::<u64>());
        Profile {
            program: planned.name.clone(),
            at,
            steps: steps.len() as u64,
            step_ns: None,
            kernels: kernels(&planned.calls, &nodes, &times),
            launches: ordered.get(ordered.len() / 2).map_or(vec![], |step| step.to_vec()),
            nodes,
        }
    }

    /// Microseconds of a launch of the kernel whose launches take least.
    pub fn least_launch_us(&self) -> Option<f64> {
        let launched = self.nodes.iter().filter(|node| node.launches > 0);
        launched.map(|node| node.ns as f64 / 1e3 / node.launches as f64).min_by(f64::total_cmp)
    }

    /// Nanoseconds of all kernels.
    pub fn kernels_ns(&self) -> u64 {
        self.kernels.iter().map(|kernel| kernel.ns).sum()
    }
}

impl Bench {
    /// Times the launches of a test of one step, so many times, after as many steps as they are outside of a profile.
    ///
    /// # Errors
    /// If the test takes more than one step, the plan has no program for it, the context is too small, or the device fails.
    pub fn profile(&mut self, test: &Test, steps: u64) -> Result<Profile, BenchError> {
        check_context(&[*test], self.sequences.context())?;
        step_of(self.executor().plan(), test)?;
        let mut ids: Vec<SequenceId> =
            (0..test.sequences).map(|_| self.sequences.begin()).collect::<Result<_, _>>()?;
        self.read(&ids, test.depth)?;
        let steps = steps.max(1);
        // The first may load code, and the second make a graph of it.
        for _ in 0..3 {
            self.repetition(test, &mut ids)?;
        }
        let mut whole = vec![];
        for _ in 0..steps {
            whole.push(self.repetition(test, &mut ids)?.into_iter().sum());
        }
        let (program, at, times) = self.timed(test, &mut ids, steps)?;
        ids.into_iter().try_for_each(|id| self.sequences.end(id))?;
        let plan = self.executor().plan();
        let profile = Profile::of(plan, program, at, filled(plan, test), &times);
        Ok(Profile { step_ns: Some(median(whole.into_iter())), ..profile })
    }

    /// The program of a step, at what it ran, and the launches of each step.
    fn timed(&mut self, test: &Test, ids: &mut [SequenceId], steps: u64) -> Result<Timed, BenchError> {
        let (mut found, mut times) = ((0, Syms { t: 0, r: 0 }), vec![]);
        for _ in 0..steps {
            self.sequences.executor_mut().time_launches(true);
            self.steps(test, ids)?;
            let timings = self.sequences.executor_mut().timings().map_err(BatchError::from)?;
            // What brings the sequences back may be steps too.
            self.sequences.executor_mut().time_launches(false);
            self.rewind(test, ids)?;
            let Some((program, at, timings)) = timings else { continue };
            found = (program, at);
            let mut start_ns = 0;
            // Each is timed from the end of the one before.
            let launches = timings.into_iter().map(|timing| {
                let ns = u64::try_from(timing.time.as_nanos()).unwrap_or(u64::MAX);
                let launch = LaunchTime { call: timing.call, launch: timing.launch, start_ns, ns };
                start_ns = start_ns.saturating_add(ns);
                launch
            });
            times.push(launches.collect());
        }
        Ok((found.0, found.1, times))
    }
}

/// A program, at what it ran, and the launches of each step.
type Timed = (usize, Syms, Vec<Vec<LaunchTime>>);

/// The program in which a test of one step runs, and at what.
///
/// # Errors
/// If the plan has none, or not as many sequences, or the test takes more than one step.
pub fn step_of(plan: &Plan, test: &Test) -> Result<(usize, Syms), BenchError> {
    let (test, largest) = (*test, plan.largest(Output::Logits));
    if largest.t == 0 {
        return Err(BenchError::NoLogits);
    }
    if test.sequences > plan.options.sequences {
        return Err(BenchError::Sequences { test, most: plan.options.sequences });
    }
    let most = match test.work {
        Work::Prompt(_) => largest.t,
        Work::Generate { .. } => test.sequences,
    };
    let at = Syms { t: test.tokens(), r: test.sequences };
    let program = plan.program_for(at.t, at.r, super::output(test.logits())).filter(|_| at.t <= most);
    Ok((program.ok_or(BenchError::Step { test, most })?, at))
}

/// Rows of the caches that the sequences of a test have after a step, as far as a window shows them.
pub fn filled(plan: &Plan, test: &Test) -> u64 {
    let window = plan.paging().ok().flatten().and_then(|paging| paging.window).unwrap_or(u64::MAX);
    test.context().min(window).saturating_mul(test.sequences)
}

/// Nanoseconds and launches of each call of a step.
fn of_calls(launches: &[LaunchTime], calls: usize) -> Vec<(u64, u64)> {
    let mut of = vec![(0u64, 0u64); calls];
    for launch in launches {
        let (ns, count) = &mut of[launch.call];
        *ns = ns.saturating_add(launch.ns);
        *count += 1;
    }
    of
}

/// Folds calls of one kernel that do the same in different layers.
fn kernels(calls: &[PlannedCall], nodes: &[NodeTime], times: &[Vec<(u64, u64)>]) -> Vec<KernelTime> {
    let mut groups: BTreeMap<(u32, String), Vec<usize>> = BTreeMap::new();
    for (i, call) in calls.iter().enumerate() {
        groups.entry((call.kernel, rename(&call.label, |_| "*".into()))).or_default().push(i);
    }
    let folded = groups.into_values().map(|members| {
        let layers: Vec<u64> = members.iter().filter_map(|i| layer(&calls[*i].label)).collect();
        let first = &nodes[members[0]];
        KernelTime {
            kernel: first.kernel,
            node: rename(&first.node, |_| runs(&layers)),
            calls: members.len() as u64,
            launches: members.iter().map(|i| nodes[*i].launches).sum(),
            ns: median(times.iter().map(|step| members.iter().map(|i| step[*i].0).sum())),
            work: members.iter().map(|i| nodes[*i].work).fold(CallWork::default(), CallWork::and),
            arithmetic: first.arithmetic,
        }
    });
    let mut kernels: Vec<KernelTime> = folded.collect();
    kernels.sort_by(|a, b| b.ns.cmp(&a.ns).then_with(|| a.node.cmp(&b.node)));
    kernels
}

/// A label without the name of its kernel.
fn without(kernel: &str, label: &str) -> String {
    label.strip_prefix(kernel).unwrap_or(label).trim_start().to_string()
}

/// Of all parts of a matmul alike; else of floats.
fn arithmetic(spec: &KernelSpec) -> Arithmetic {
    let Computation::Matmul(m) = &spec.computes else { return Arithmetic::Float };
    let x = spec.args.get(usize::from(m.x)).map(|arg| arg.ty.dtype);
    match x {
        Some(DType::Q8Act | DType::Q16Act) if m.parts.iter().all(|part| part.format.is_quantised()) => {
            Arithmetic::Integer
        }
        Some(DType::F32) if m.parts.iter().all(|part| part.round.is_some()) => Arithmetic::Half,
        _ => Arithmetic::Float,
    }
}

fn median(values: impl Iterator<Item = u64>) -> u64 {
    measurement::median(values.map(|ns| ns as f64).collect()).round() as u64
}
