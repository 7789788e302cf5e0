//! Where the time of a step goes, kernel by kernel.

use super::{Bench, BenchError, Test, Work, check_context};
use crate::ir::Syms;
use crate::ir::labels::{fold, layer, runs};
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
    /// Nanoseconds of a step as it is outside of a profile, until the host has its result: the median.
    pub step_ns: u64,
    /// By time, most first.
    pub kernels: Vec<KernelTime>,
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
    /// What they have to do at least: see [`crate::plan::CallWork`].
    pub bytes: u64,
    pub operations: u64,
}

impl Profile {
    /// Nanoseconds of all kernels.
    pub fn kernels_ns(&self) -> u64 {
        self.kernels.iter().map(|kernel| kernel.ns).sum()
    }
}

impl KernelTime {
    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.bytes as f64 * 1e9 / self.ns.max(1) as f64
    }
}

impl Bench {
    /// Times the launches of a test of one step, so many times, after as many steps as they are outside of a profile.
    ///
    /// # Errors
    /// If the test takes more than one step, the context is too small, or the device fails.
    pub fn profile(&mut self, test: &Test, steps: u64) -> Result<Profile, BenchError> {
        check_context(&[*test], self.sequences.context())?;
        let most = match test.work {
            Work::Prompt(_) => self.chunk() as u64,
            Work::Generate { .. } => test.sequences,
        };
        if test.tokens() > most {
            return Err(BenchError::Step { test: *test, most });
        }
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
        let kernels = self.kernels(program, &at, test, &times);
        let program = self.executor().plan().programs[program].name.clone();
        Ok(Profile { program, at, steps, step_ns: median(&mut whole), kernels })
    }

    /// The program of a step, at what it ran, and for each step the nanoseconds and launches of each call.
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
            let mut calls = vec![(0u64, 0u64); self.executor().plan().programs[program].calls.len()];
            for timing in timings {
                let (ns, launches) = &mut calls[timing.call];
                *ns += u64::try_from(timing.time.as_nanos()).unwrap_or(u64::MAX);
                *launches += 1;
            }
            times.push(calls);
        }
        Ok((found.0, found.1, times))
    }

    fn kernels(&self, program: usize, at: &Syms, test: &Test, times: &[Vec<(u64, u64)>]) -> Vec<KernelTime> {
        let plan = self.executor().plan();
        let filled = test.context().min(self.window()).saturating_mul(test.sequences);
        let calls = &plan.programs[program].calls;
        let mut groups: BTreeMap<(u32, String), Vec<usize>> = BTreeMap::new();
        for (i, call) in calls.iter().enumerate() {
            groups.entry((call.kernel, fold(&call.label, |_| "*".into()))).or_default().push(i);
        }
        let mut kernels = vec![];
        for ((kernel, _), members) in groups {
            let sum = |of: &dyn Fn(usize) -> u64| members.iter().map(|i| of(*i)).sum::<u64>();
            let mut of_steps: Vec<u64> = times.iter().map(|step| sum(&|i| step[i].0)).collect();
            let work = |i: usize| plan.work_of_call(program, i, at, filled).unwrap_or_default();
            let layers: Vec<u64> = members.iter().filter_map(|i| layer(&calls[*i].label)).collect();
            let name = plan.kernels[kernel as usize].spec.name();
            let node = fold(&calls[members[0]].label, |_| runs(&layers));
            kernels.push(KernelTime {
                kernel: name,
                node: node.strip_prefix(name).unwrap_or(&node).trim_start().to_string(),
                calls: members.len() as u64,
                launches: times.first().map_or(0, |step| sum(&|i| step[i].1)),
                ns: median(&mut of_steps),
                bytes: sum(&|i| work(i).bytes),
                operations: sum(&|i| work(i).operations),
            });
        }
        kernels.sort_by(|a, b| b.ns.cmp(&a.ns).then_with(|| a.node.cmp(&b.node)));
        kernels
    }
}

/// A program, at what it ran, and for each step the nanoseconds and launches of each of its calls.
type Timed = (usize, Syms, Vec<Vec<(u64, u64)>>);

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}
