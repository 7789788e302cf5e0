//! What was measured, as docs/json.md has it.

use super::verdict::{Rate, Roofs, Verdict};
use serde::Serialize;
use sinter::bench::{self, Profile, Test};
use sinter::ir::{StateRole, Syms};
use sinter::plan::{Plan, State};

#[derive(Serialize)]
pub struct Report {
    pub model: String,
    pub target: String,
    pub isa: String,
    /// Bytes per second that the device reads, and how that is known.
    pub read_bandwidth: f64,
    pub read_bandwidth_is: &'static str,
    /// Operations per second.
    pub arithmetic: Arithmetic,
    /// None of what a profiler recorded elsewhere.
    pub load: Option<Load>,
    pub first_token: Option<FirstToken>,
    pub memory: Memory,
    /// The profiler that recorded the times, if not this one.
    pub recorded_by: Option<String>,
    pub steps: Vec<Step>,
}

#[derive(Serialize)]
pub struct Arithmetic {
    pub float: Roof,
    pub integer: Roof,
    pub half: Roof,
}

#[derive(Serialize)]
pub struct Roof {
    pub rate: f64,
    pub is: String,
}

impl Roof {
    fn of(rate: &Rate) -> Roof {
        Roof { rate: rate.per_second, is: rate.source() }
    }
}

impl Arithmetic {
    pub fn of(roofs: &Roofs) -> Arithmetic {
        Arithmetic {
            float: Roof::of(&roofs.float),
            integer: Roof::of(&roofs.integer),
            half: Roof::of(&roofs.half),
        }
    }
}

/// Milliseconds until a step can be made.
#[derive(Clone, Copy, Default, Serialize)]
pub struct Load {
    pub open_ms: f64,
    pub identify_ms: f64,
    /// None of a plan.
    pub compile_ms: Option<f64>,
    pub plan_ms: f64,
    /// Of a GPU's kernels: compiled, or found among those that were kept.
    pub kernels_ms: f64,
    pub weights_ms: f64,
    pub rest_ms: f64,
    /// The sum.
    pub all_ms: f64,
}

impl Load {
    /// In order, each with what happens then.
    pub fn parts(&self) -> Vec<(&'static str, f64, &'static str)> {
        let mut parts = vec![
            ("open", self.open_ms, "the model's file is mapped, its header read"),
            ("identify", self.identify_ms, "samples of the weights tell the file from others"),
            (
                "compile",
                self.compile_ms.unwrap_or(0.0),
                "graph, passes, kernels, and where they lie in memory",
            ),
            ("plan", self.plan_ms, "the plan is read and held to its rules"),
            ("kernels", self.kernels_ms, "a GPU's kernels are compiled, or found among those kept"),
            (
                "weights",
                self.weights_ms,
                "weights go to where the device reads them, repacked where it wants them so",
            ),
            ("rest", self.rest_ms, "memory, threads, and what is between the others"),
        ];
        // A plan is compiled already, and the CPU's kernels are part of the program.
        parts.retain(|(name, ms, _)| *ms > 0.0 || !["compile", "kernels"].contains(name));
        parts
    }
}

/// From the start of the command to the first token after a prompt: [`Load`], then these milliseconds.
#[derive(Clone, Copy, Serialize)]
pub struct FirstToken {
    pub prompt_tokens: u64,
    pub prompt_steps: u64,
    /// None where the prompt's tokens are random.
    pub tokenise_ms: Option<f64>,
    pub upload_ms: f64,
    pub prefill_ms: f64,
    pub download_ms: f64,
    pub choose_ms: f64,
    pub upload_bytes: u64,
    pub download_bytes: u64,
    /// The sum, loading included.
    pub all_ms: f64,
}

impl FirstToken {
    /// In order, each with what happens then.
    pub fn parts(&self) -> Vec<(&'static str, f64, &'static str)> {
        let tokenise = self
            .tokenise_ms
            .map(|ms| ("tokenise", ms, "the vocabulary is read, and the prompt cut into tokens"));
        let rest = [
            ("upload", self.upload_ms, "the inputs of the steps go to the device"),
            (
                "prefill",
                self.prefill_ms,
                "the prompt is read, for the first time: so are weights that lie in a mapped file",
            ),
            ("download", self.download_ms, "the logits of its last token come to the host"),
            ("choose", self.choose_ms, "the best of them is found"),
        ];
        tokenise.into_iter().chain(rest).collect()
    }
}

/// Bytes.
#[derive(Serialize)]
pub struct Memory {
    pub weights: u64,
    /// Of them, those that do not lie as in the file, so are copied.
    pub repacked: u64,
    pub cache: u64,
    pub cache_per_token: u64,
    /// As planned: the arena that all programs share.
    pub activations: u64,
    /// The most of the host's that the process had until all steps were timed; none where the system does not say.
    pub peak: Option<u64>,
    /// Of the GPU: what is in use then, by whomever, and what there is.
    pub device_used: Option<u64>,
    pub device_all: Option<u64>,
}

impl Memory {
    pub fn of(plan: &Plan) -> Memory {
        let none = Syms { t: 0, r: 0 };
        let rows = |state: &State| state.ty.first().eval(&none).max(1);
        let appended = plan.states.iter().filter(|state| state.role == StateRole::Appended);
        Memory {
            weights: plan.weight_bytes(),
            repacked: plan.repacked_bytes(),
            cache: plan.state_bytes(),
            cache_per_token: appended.map(|state| state.ty.bytes(&none) / rows(state)).sum(),
            activations: plan.arena_bytes,
            peak: None,
            device_used: None,
            device_all: None,
        }
    }
}

/// The most memory that this process had, in bytes.
pub fn peak() -> Option<u64> {
    peak_in(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The same, as Linux has it.
fn peak_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[derive(Serialize)]
pub struct Step {
    pub test: String,
    pub program: String,
    #[serde(rename = "T")]
    pub t: u64,
    #[serde(rename = "R")]
    pub r: u64,
    pub steps: u64,
    pub step_us: Option<f64>,
    pub kernels_us: f64,
    /// Bytes of the program's activations: as placed, and the most that are wanted at once.
    pub arena_bytes: u64,
    pub live_bytes: u64,
    pub kernels: Vec<Kernel>,
    pub nodes: Vec<Node>,
}

#[derive(Serialize)]
pub struct Kernel {
    pub kernel: &'static str,
    pub node: String,
    pub calls: u64,
    pub launches: u64,
    pub us: f64,
    /// Of the time of all kernels.
    pub share: f64,
    pub bytes: u64,
    pub operations: u64,
    pub gbs: f64,
    pub bandwidth_share: f64,
    pub gops: f64,
    pub roofline_share: f64,
    pub limit: &'static str,
    pub verdict: String,
}

#[derive(Serialize)]
pub struct Node {
    pub call: usize,
    pub kernel: &'static str,
    pub node: String,
    pub stream: u32,
    pub launches: u64,
    pub us: f64,
    pub bytes: u64,
    pub operations: u64,
    pub gbs: f64,
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1e3
}

impl Step {
    pub fn of(plan: &Plan, test: &Test, profile: &Profile, roofs: &Roofs) -> Step {
        let all = profile.kernels_ns().max(1) as f64;
        let kernel = |k: &bench::KernelTime| {
            let Verdict { limit, roofline_share, words } = Verdict::of(k, roofs);
            Kernel {
                kernel: k.kernel,
                node: k.node.clone(),
                calls: k.calls,
                launches: k.launches,
                us: us(k.ns),
                share: k.ns as f64 / all,
                bytes: k.work.bytes,
                operations: k.work.operations,
                gbs: k.bandwidth() / 1e9,
                bandwidth_share: k.bandwidth() / roofs.bandwidth,
                gops: k.arithmetic() / 1e9,
                roofline_share,
                limit,
                verdict: words,
            }
        };
        let node = |n: &bench::NodeTime| Node {
            call: n.call,
            kernel: n.kernel,
            node: n.node.clone(),
            stream: n.stream,
            launches: n.launches,
            us: us(n.ns),
            bytes: n.work.bytes,
            operations: n.work.operations,
            gbs: n.bandwidth() / 1e9,
        };
        let planned = plan.programs.iter().find(|program| program.name == profile.program);
        Step {
            test: test.to_string(),
            program: profile.program.clone(),
            t: profile.at.t,
            r: profile.at.r,
            steps: profile.steps,
            step_us: profile.step_ns.map(us),
            kernels_us: us(profile.kernels_ns()),
            arena_bytes: planned.map_or(0, |program| program.arena_bytes),
            live_bytes: planned.map_or(0, |program| program.lower_bound),
            kernels: profile.kernels.iter().map(kernel).collect(),
            nodes: profile.nodes.iter().map(node).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_told_in_kibibytes() {
        assert_eq!(peak_in("VmPeak:\t 9 kB\nVmHWM:\t   12345 kB\nVmRSS:\t 1 kB\n"), Some(12_345 << 10));
        for none in ["", "VmRSS: 5 kB\n", "VmHWM: x kB\n", "VmHWM: 5\n"] {
            assert_eq!(peak_in(none), None, "{none:?}");
        }
    }
}
