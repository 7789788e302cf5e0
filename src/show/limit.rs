//! What limits a node, by the cost model.

use crate::ir::{Graph, NodeId};
use crate::passes::cost;
use crate::target::Target;
use serde::Serialize;

/// Where most of the estimated time of a node goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Moving its bytes.
    Memory,
    Arithmetic,
    /// Being launched.
    Launch,
}

impl Limit {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Limit::Memory => "memory",
            Limit::Arithmetic => "arithmetic",
            Limit::Launch => "launch",
        }
    }
}

/// Targets on which one of the three takes time alone.
pub(super) struct Limits {
    memory: Target,
    arithmetic: Target,
    launch: Target,
}

impl Limits {
    pub fn of(target: &Target) -> Limits {
        let free = Target { launch_us: 0.0, ..target.clone() };
        let at_once = f64::INFINITY;
        let no_memory = Target { bandwidth_gbs: at_once, ..target.clone() };
        let without = |target: &Target| Target {
            f32_gflops: at_once,
            dot4_gops: Some(at_once),
            f16_gflops: Some(at_once),
            ..target.clone()
        };
        Limits {
            memory: without(&free),
            arithmetic: Target { launch_us: 0.0, ..no_memory.clone() },
            launch: without(&no_memory),
        }
    }

    /// What takes most of a node's time; none if it takes none.
    pub fn of_node(&self, g: &Graph, id: NodeId) -> Option<Limit> {
        let us = |target: &Target| cost::of_node(g, id, target).us;
        let parts = [
            (us(&self.memory), Limit::Memory),
            (us(&self.arithmetic), Limit::Arithmetic),
            (us(&self.launch), Limit::Launch),
        ];
        let most = parts.into_iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        (most.0 > 0.0).then_some(most.1)
    }
}
