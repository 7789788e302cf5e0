//! The memory planner: one pool, `states | arena`, for all programs.
//!
//! A buffer lives from its first write (an input from the start) to its last use (a result to the end), a
//! scratch buffer during its launch. Two buffers may share bytes only if every use of one happens before
//! every use of the other, on whatever streams. Beyond that, a written buffer takes the place of one that
//! the same launch reads for the last time, where the kernel allows it: such buffers form a chain that is
//! placed as one. An input may be overwritten once it was read for the last time, as it is written anew
//! before every step; a result never is.
//!
//! Placing chains is dynamic storage allocation, which is NP-hard; greedy placement in a few orders, best
//! kept, comes close to the lower bound, the peak of live bytes.

#[cfg(test)]
mod tests;

use super::schedule::{Clocks, Flow, FlowError, FlowLaunch, Home, Life, Slot};
use crate::codegen::spec::Access;

/// Every offset is a multiple of this many bytes: a cache line, and the widest vector.
pub const ALIGN: u64 = 64;

/// Where the buffers of one program lie in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// By buffer of the flow; none for buffers outside the arena or without any use.
    pub offsets: Vec<Option<u64>>,
    pub arena_bytes: u64,
    /// The most bytes that live at once, along the order of launches.
    pub lower_bound: u64,
}

/// A placement that cannot be made, or is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error(transparent)]
    Flow(#[from] FlowError),
    #[error("the sizes of all buffers add up to more than any memory")]
    TooLarge,
    #[error("{buffer} is used, but lies nowhere")]
    Unplaced { buffer: String },
    #[error("{buffer} lies at {offset}, which is not a multiple of {ALIGN}")]
    Misaligned { buffer: String, offset: u64 },
    #[error("{buffer} lies at {offset} with {bytes} bytes, beyond the {room} bytes of its region")]
    Outside { buffer: String, offset: u64, bytes: u64, room: u64 },
    #[error("{a} and {b} share bytes while both are in use")]
    Overlap { a: String, b: String },
    #[error("launches {first:?} and {second:?} both use {buffer}, and nothing orders them")]
    Race { first: String, second: String, buffer: String },
}

/// `n` rounded up to [`ALIGN`].
pub fn align_up(n: u64) -> Option<u64> {
    n.checked_next_multiple_of(ALIGN)
}

/// Buffers that share one place, each taken over from the last.
struct Chain {
    bytes: u64,
    life: Life,
    /// First and last moment of use along the order: 0 the start, `l + 1` launch `l`.
    span: (usize, usize),
}

/// Places the arena buffers of `flow`, whose launches run at `slots` (see [`Flow::schedule`]).
///
/// # Errors
/// If the slots are not valid for the flow, or sizes overflow.
pub fn place(flow: &Flow, slots: &[Slot], streams: u32) -> Result<Placement, PoolError> {
    let clocks = flow.clocks(slots, streams)?;
    let users = flow.users();
    let (chains, chain_of) = chains(flow, &clocks, &users);
    let padded: Option<u64> = chains.iter().try_fold(0u64, |sum, c| sum.checked_add(align_up(c.bytes)?));
    padded.filter(|sum| i64::try_from(*sum).is_ok()).ok_or(PoolError::TooLarge)?;

    let lower_bound = peak(&chains, flow.launches.len());
    let conflicts = conflicts(&chains);
    let mut best: Option<(Vec<u64>, u64)> = None;
    for order in orders(&chains) {
        for fit in [Fit::Best, Fit::Lowest] {
            let (offsets, bytes) = greedy(&chains, &conflicts, &order, fit);
            if best.as_ref().is_none_or(|(_, least)| bytes < *least) {
                best = Some((offsets, bytes));
            }
        }
    }
    let (places, arena_bytes) = best.unwrap_or_default();
    let offsets = chain_of.into_iter().map(|c| c.map(|c| places[c])).collect();
    Ok(Placement { offsets, arena_bytes, lower_bound })
}

/// Joins buffers into chains. Returns the chain of each arena buffer that has a use.
fn chains(flow: &Flow, clocks: &Clocks, users: &[Vec<usize>]) -> (Vec<Chain>, Vec<Option<usize>>) {
    let n = flow.buffers.len();
    let mut heir: Vec<Option<usize>> = vec![None; n];
    let mut taken_from: Vec<Option<usize>> = vec![None; n];
    for (l, launch) in flow.launches.iter().enumerate() {
        for &(to, from) in &launch.aliases {
            let free = heir[from].is_none() && taken_from[to].is_none();
            if free && hands_over(flow, clocks, users, l, from, to) {
                (heir[from], taken_from[to]) = (Some(to), Some(from));
            }
        }
    }
    let mut chains = vec![];
    let mut chain_of = vec![None; n];
    for first in 0..n {
        let buffer = &flow.buffers[first];
        let unused = users[first].is_empty() && !buffer.input && !buffer.result;
        if buffer.home != Home::Arena || unused || taken_from[first].is_some() {
            continue;
        }
        let mut chain: Option<Chain> = None;
        let mut next = Some(first);
        while let Some(b) = next {
            let (uses, buffer) = (&users[b], &flow.buffers[b]);
            let life = clocks.life(uses, buffer.input, buffer.result);
            let end = flow.launches.len() + 1;
            let start = if buffer.input { 0 } else { uses.first().map_or(end, |l| l + 1) };
            let stop = if buffer.result { end } else { uses.last().map_or(0, |l| l + 1) };
            match &mut chain {
                None => chain = Some(Chain { bytes: buffer.bytes, life, span: (start, stop) }),
                Some(c) => {
                    c.life.join(&life);
                    c.span = (c.span.0.min(start), c.span.1.max(stop));
                }
            }
            chain_of[b] = Some(chains.len());
            next = heir[b];
        }
        chains.extend(chain);
    }
    (chains, chain_of)
}

/// Whether, by the lives of both, `to` may lie where `from` lies: `from` is not used after launch `l`, nor
/// `to` before.
fn hands_over(flow: &Flow, clocks: &Clocks, users: &[Vec<usize>], l: usize, from: usize, to: usize) -> bool {
    let last = users[from].iter().all(|u| *u == l || clocks.before(*u, l));
    let first = users[to].iter().all(|u| *u == l || clocks.before(l, *u));
    last && first && !flow.buffers[from].result && !flow.buffers[to].input
}

/// The most bytes in use at one moment of the order.
fn peak(chains: &[Chain], launches: usize) -> u64 {
    let mut change = vec![(0u64, 0u64); launches + 3];
    for c in chains {
        change[c.span.0].0 += c.bytes;
        change[c.span.1 + 1].1 += c.bytes;
    }
    let mut live = 0;
    change.into_iter().fold(0, |most, (starts, ends)| {
        live = live + starts - ends;
        most.max(live)
    })
}

fn conflicts(chains: &[Chain]) -> Vec<Vec<usize>> {
    let mut with = vec![vec![]; chains.len()];
    for (a, x) in chains.iter().enumerate() {
        for (b, y) in chains.iter().enumerate().skip(a + 1) {
            if !x.life.precedes(&y.life) && !y.life.precedes(&x.life) {
                with[a].push(b);
                with[b].push(a);
            }
        }
    }
    with
}

/// The orders that greedy placement tries; ties go by index, so that plans are reproducible.
fn orders(chains: &[Chain]) -> [Vec<usize>; 5] {
    let by = |key: &dyn Fn(&Chain) -> (u64, u64)| {
        let mut order: Vec<usize> = (0..chains.len()).collect();
        order.sort_by_key(|c| (std::cmp::Reverse(key(&chains[*c])), *c));
        order
    };
    let length = |c: &Chain| c.span.1.saturating_sub(c.span.0) as u64 + 1;
    let early = |c: &Chain| u64::MAX - c.span.0 as u64;
    [
        by(&|c| (c.bytes, length(c))),
        by(&|c| (c.bytes.saturating_mul(length(c)), c.bytes)),
        by(&|c| (length(c), c.bytes)),
        by(&|c| (early(c), c.bytes)),
        by(&|c| (c.span.1 as u64, c.bytes)),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fit {
    /// The lowest gap that is large enough.
    Lowest,
    /// The smallest.
    Best,
}

/// Places the chains in `order`; returns their offsets and the size of the arena.
fn greedy(chains: &[Chain], conflicts: &[Vec<usize>], order: &[usize], fit: Fit) -> (Vec<u64>, u64) {
    // `place` checked that the padded sizes can be added up.
    let padded = |c: usize| chains[c].bytes.next_multiple_of(ALIGN);
    let mut at: Vec<Option<u64>> = vec![None; chains.len()];
    let mut arena = 0;
    for &c in order {
        let size = padded(c);
        let mut taken: Vec<(u64, u64)> =
            conflicts[c].iter().filter_map(|o| at[*o].map(|start| (start, start + padded(*o)))).collect();
        taken.sort_unstable();
        let (mut end, mut chosen) = (0, None);
        for (start, stop) in taken {
            if start > end && start - end >= size {
                let gap = start - end;
                let better = chosen.is_none_or(|(_, least)| fit == Fit::Best && gap < least);
                if better {
                    chosen = Some((end, gap));
                }
            }
            end = end.max(stop);
        }
        let offset = chosen.map_or(end, |(offset, _)| offset);
        at[c] = Some(offset);
        arena = arena.max(offset + size);
    }
    (at.into_iter().map(Option::unwrap_or_default).collect(), arena)
}

/// Checks a placement without trusting who made it: launches that use the same bytes are ordered, no two
/// buffers share bytes while both are in use (save where a launch hands one over to the other), and each
/// lies aligned within the arena.
///
/// # Errors
/// The first rule that is broken, naming the buffers.
pub fn check_placement(
    flow: &Flow,
    slots: &[Slot],
    streams: u32,
    offsets: &[Option<u64>],
    arena_bytes: u64,
) -> Result<(), PoolError> {
    let clocks = flow.clocks(slots, streams)?;
    check_races(flow, &clocks)?;
    let users = flow.users();
    let mut placed: Vec<(u64, u64, usize, Life)> = vec![];
    for (b, buffer) in flow.buffers.iter().enumerate().filter(|(_, b)| b.home == Home::Arena) {
        let name = || buffer.name.clone();
        let Some(offset) = offsets.get(b).copied().flatten() else {
            if users[b].is_empty() && !buffer.input && !buffer.result {
                continue;
            }
            return Err(PoolError::Unplaced { buffer: name() });
        };
        check_region(&buffer.name, offset, buffer.bytes, arena_bytes)?;
        if buffer.bytes > 0 {
            let life = clocks.life(&users[b], buffer.input, buffer.result);
            placed.push((offset, offset + buffer.bytes, b, life));
        }
    }
    placed.sort_unstable_by_key(|(start, _, b, _)| (*start, *b));
    let handed = |a: usize, b: usize| {
        let by_launch = |(l, launch): (usize, &FlowLaunch)| {
            let pair = |to, from| {
                launch.aliases.contains(&(to, from)) && hands_over(flow, &clocks, &users, l, from, to)
            };
            pair(a, b) || pair(b, a)
        };
        offsets[a] == offsets[b] && flow.launches.iter().enumerate().any(by_launch)
    };
    for (i, (_, stop, a, life)) in placed.iter().enumerate() {
        for (_, _, b, other) in placed[i + 1..].iter().take_while(|(start, ..)| start < stop) {
            if !life.precedes(other) && !other.precedes(life) && !handed(*a, *b) {
                let (a, b) = (flow.buffers[*a].name.clone(), flow.buffers[*b].name.clone());
                return Err(PoolError::Overlap { a, b });
            }
        }
    }
    Ok(())
}

/// Checks that `offset..offset+bytes` is aligned and within a region of `room` bytes.
///
/// # Errors
/// If it is not.
pub fn check_region(name: &str, offset: u64, bytes: u64, room: u64) -> Result<(), PoolError> {
    let buffer = || name.to_owned();
    if !offset.is_multiple_of(ALIGN) {
        return Err(PoolError::Misaligned { buffer: buffer(), offset });
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= room => Ok(()),
        _ => Err(PoolError::Outside { buffer: buffer(), offset, bytes, room }),
    }
}

/// Checks that of any two launches that use a buffer, at least one to change it, one happens first.
fn check_races(flow: &Flow, clocks: &Clocks) -> Result<(), PoolError> {
    let mut uses: Vec<Vec<(usize, Access)>> = vec![vec![]; flow.buffers.len()];
    for (l, launch) in flow.launches.iter().enumerate() {
        for u in &launch.uses {
            uses[u.buffer].push((l, u.access));
        }
    }
    for (b, uses) in uses.iter().enumerate() {
        for (i, (second, how)) in uses.iter().enumerate() {
            for (first, was) in &uses[..i] {
                let harmless = *how == Access::Read && *was == Access::Read;
                if first != second && !harmless && !clocks.before(*first, *second) {
                    let label = |l: usize| flow.launches[l].label.clone();
                    let buffer = flow.buffers[b].name.clone();
                    return Err(PoolError::Race { first: label(*first), second: label(*second), buffer });
                }
            }
        }
    }
    Ok(())
}
