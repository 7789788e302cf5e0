//! The memory planner: one pool, `states | arena`, for all programs.
//!
//! A buffer lives from its first write (an input from the start) to its last use (a result to the end), a
//! scratch buffer during its call. Two buffers may share bytes only if every use of one happens before
//! every use of the other, on whatever streams. Beyond that, a buffer may be donated: a written one takes the place of one that
//! the same call reads for the last time, where the kernel allows it: such buffers form a chain that is
//! placed as one. An input may be overwritten once it was read for the last time, as it is written anew
//! before every step; a result never is.
//!
//! Placing chains is dynamic storage allocation, which is NP-hard; greedy placement in a few orders, of which the
//! best is kept, comes close to the lower bound, the peak of live bytes.

#[cfg(test)]
mod tests;

use super::schedule::{Clocks, Flow, FlowCall, FlowError, Home, LiveRange, Slot};
use crate::codegen::spec::Access;
use std::cmp::Reverse;

/// Every offset is a multiple of this many bytes: a cache line, and the widest vector.
pub const ALIGN: u64 = 64;

/// Where the buffers of one program lie in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// By buffer of the flow; none for buffers outside the arena or without any use.
    pub offsets: Vec<Option<u64>>,
    pub arena_bytes: u64,
    /// The most bytes that live at once, along the order of calls.
    pub lower_bound: u64,
}

/// A placement that cannot be made, or is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
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
    #[error("calls {first:?} and {second:?} both use {buffer}, and nothing orders them")]
    Race { first: String, second: String, buffer: String },
}

/// `n` rounded up to [`ALIGN`].
pub fn align_up(n: u64) -> Option<u64> {
    n.checked_next_multiple_of(ALIGN)
}

/// Buffers that share one place, each taken over from the last.
struct Chain {
    bytes: u64,
    live: LiveRange,
    /// First and last moment of use along the order: 0 the start, `l + 1` call `l`.
    span: (usize, usize),
}

/// Places the arena buffers of `flow`, whose calls run at `slots` (see [`Flow::schedule`]).
///
/// # Errors
/// If the slots are not valid for the flow, or sizes overflow.
pub fn place(flow: &Flow, slots: &[Slot], streams: u32) -> Result<Placement, MemoryError> {
    let clocks = flow.clocks(slots, streams)?;
    let users = flow.users();
    let (chains, chain_of) = chains(flow, &clocks, &users);
    let sizes: Option<Vec<u64>> = chains.iter().map(|c| align_up(c.bytes)).collect();
    let sizes = sizes.ok_or(MemoryError::TooLarge)?;
    let sum = sizes.iter().try_fold(0u64, |sum, n| sum.checked_add(*n));
    sum.filter(|sum| i64::try_from(*sum).is_ok()).ok_or(MemoryError::TooLarge)?;

    let lower_bound = peak(&chains, flow.calls.len(), |c| chains[c].bytes);
    let limit = peak(&chains, flow.calls.len(), |c| sizes[c]);
    let conflicts = conflicts(&chains);
    let mut best = by_moment(&chains, &sizes, &conflicts, limit);
    for order in orders(&chains) {
        for fit in [Fit::Best, Fit::Lowest] {
            let placed = in_order(&sizes, &conflicts, &order, fit);
            if placed.1 < best.1 {
                best = placed;
            }
        }
    }
    let (places, arena_bytes) = best;
    let offsets = chain_of.into_iter().map(|c| c.map(|c| places[c])).collect();
    Ok(Placement { offsets, arena_bytes, lower_bound })
}

/// Joins buffers into chains. Returns the chain of each arena buffer that has a use.
fn chains(flow: &Flow, clocks: &Clocks, users: &[Vec<usize>]) -> (Vec<Chain>, Vec<Option<usize>>) {
    let n = flow.buffers.len();
    let mut donated_to: Vec<Option<usize>> = vec![None; n];
    let mut donor: Vec<Option<usize>> = vec![None; n];
    for (l, call) in flow.calls.iter().enumerate() {
        for &(to, from) in &call.aliases {
            let free = donated_to[from].is_none() && donor[to].is_none();
            if free && donates(flow, clocks, users, l, from, to) {
                (donated_to[from], donor[to]) = (Some(to), Some(from));
            }
        }
    }
    let mut chains = vec![];
    let mut chain_of = vec![None; n];
    for first in 0..n {
        let buffer = &flow.buffers[first];
        let unused = users[first].is_empty() && !buffer.input && !buffer.result;
        if buffer.home != Home::Arena || unused || donor[first].is_some() {
            continue;
        }
        let mut chain: Option<Chain> = None;
        let mut next = Some(first);
        while let Some(b) = next {
            let (uses, buffer) = (&users[b], &flow.buffers[b]);
            let live = clocks.live_range(uses, buffer.input, buffer.result);
            let end = flow.calls.len() + 1;
            let start = if buffer.input { 0 } else { uses.first().map_or(end, |l| l + 1) };
            let stop = if buffer.result { end } else { uses.last().map_or(0, |l| l + 1) };
            match &mut chain {
                None => chain = Some(Chain { bytes: buffer.bytes, live, span: (start, stop) }),
                Some(c) => {
                    c.live.join(&live);
                    c.span = (c.span.0.min(start), c.span.1.max(stop));
                }
            }
            chain_of[b] = Some(chains.len());
            next = donated_to[b];
        }
        chains.extend(chain);
    }
    (chains, chain_of)
}

/// Whether, by the live ranges of both, `to` may lie where `from` lies: `from` is not used after call `l`, nor
/// `to` before.
fn donates(flow: &Flow, clocks: &Clocks, users: &[Vec<usize>], l: usize, from: usize, to: usize) -> bool {
    let last = users[from].iter().all(|u| *u == l || clocks.before(*u, l));
    let first = users[to].iter().all(|u| *u == l || clocks.before(l, *u));
    last && first && !flow.buffers[from].result && !flow.buffers[to].input
}

/// The most bytes in use at one moment of the order, if chain `c` has `size(c)`.
fn peak(chains: &[Chain], calls: usize, size: impl Fn(usize) -> u64) -> u64 {
    let mut change = vec![(0u64, 0u64); calls + 3];
    for (c, chain) in chains.iter().enumerate() {
        change[chain.span.0].0 += size(c);
        change[chain.span.1 + 1].1 += size(c);
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
            if !x.live.precedes(&y.live) && !y.live.precedes(&x.live) {
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
        order.sort_by_key(|c| (Reverse(key(&chains[*c])), *c));
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

/// Chains that are being placed. Sizes are padded to [`ALIGN`]; their sum was checked to fit.
struct Packing<'a> {
    sizes: &'a [u64],
    conflicts: &'a [Vec<usize>],
    at: Vec<Option<u64>>,
}

impl<'a> Packing<'a> {
    fn new(sizes: &'a [u64], conflicts: &'a [Vec<usize>]) -> Packing<'a> {
        Packing { sizes, conflicts, at: vec![None; sizes.len()] }
    }

    /// Where chain `c` fits between those placed, from below: the starts and ends of the gaps, the last endless.
    fn gaps(&self, c: usize) -> Vec<(u64, u64)> {
        let taken = |o: &usize| self.at[*o].map(|start| (start, start + self.sizes[*o]));
        let mut taken: Vec<(u64, u64)> = self.conflicts[c].iter().filter_map(taken).collect();
        taken.sort_unstable();
        taken.push((u64::MAX, u64::MAX));
        let mut end = 0;
        let mut gaps = vec![];
        for (start, stop) in taken {
            if start.saturating_sub(end) >= self.sizes[c] && start >= end {
                gaps.push((end, start));
            }
            end = end.max(stop);
        }
        gaps
    }

    fn place(&mut self, c: usize, fit: Fit) {
        let gaps = self.gaps(c);
        let gap = match fit {
            Fit::Lowest => gaps.first(),
            Fit::Best => gaps.iter().min_by_key(|(start, stop)| (stop - start, *start)),
        };
        self.at[c] = gap.map(|(start, _)| *start);
    }

    /// Places all of `todo` below `limit`, at either end of some gap each, if a search of `budget` steps finds how.
    fn fit_all(&mut self, todo: &[usize], limit: u64, budget: &mut u32) -> bool {
        let Some((&c, rest)) = todo.split_first() else { return true };
        for (start, stop) in self.gaps(c) {
            let Some(high) = stop.min(limit).checked_sub(self.sizes[c]).filter(|high| *high >= start) else {
                continue;
            };
            for offset in [start, high] {
                if *budget == 0 {
                    break;
                }
                *budget -= 1;
                self.at[c] = Some(offset);
                if self.fit_all(rest, limit, budget) {
                    return true;
                }
            }
        }
        self.at[c] = None;
        false
    }

    /// The offsets and the size of the arena.
    fn finish(self) -> (Vec<u64>, u64) {
        let at: Vec<u64> = self.at.into_iter().map(Option::unwrap_or_default).collect();
        let end = at.iter().zip(self.sizes).map(|(start, size)| start + size).max();
        (at, end.unwrap_or(0))
    }
}

/// Places the chains one by one.
fn in_order(sizes: &[u64], conflicts: &[Vec<usize>], order: &[usize], fit: Fit) -> (Vec<u64>, u64) {
    let mut packing = Packing::new(sizes, conflicts);
    order.iter().for_each(|c| packing.place(*c, fit));
    packing.finish()
}

/// Places all that lives at one moment together, the fullest moment first, so that each stays below `limit` (by
/// breadth, as Pisarchyk and Lee, 2020, arXiv:2001.03288, with a search where they take the lowest gap).
fn by_moment(chains: &[Chain], sizes: &[u64], conflicts: &[Vec<usize>], limit: u64) -> (Vec<u64>, u64) {
    let end = chains.iter().map(|c| c.span.1 + 1).max().unwrap_or(0);
    let mut moments = vec![(0u64, vec![]); end];
    let mut by_size: Vec<usize> = (0..chains.len()).collect();
    by_size.sort_by_key(|c| (Reverse(sizes[*c]), *c));
    for c in by_size {
        for (live, all) in moments.get_mut(chains[c].span.0..=chains[c].span.1).unwrap_or_default() {
            *live += sizes[c];
            all.push(c);
        }
    }
    moments.sort_by_key(|(live, _)| Reverse(*live));
    let mut packing = Packing::new(sizes, conflicts);
    for (_, mut todo) in moments {
        todo.retain(|c| packing.at[*c].is_none());
        if !packing.fit_all(&todo, limit, &mut 500) {
            todo.iter().for_each(|c| packing.place(*c, Fit::Lowest));
        }
    }
    packing.finish()
}

/// Checks a placement without trusting who made it: calls that use the same bytes are ordered, no two
/// buffers share bytes while both are in use (save where a call hands one over to the other), and each
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
) -> Result<(), MemoryError> {
    let clocks = flow.clocks(slots, streams)?;
    check_races(flow, &clocks)?;
    let users = flow.users();
    let mut placed: Vec<(u64, u64, usize, LiveRange)> = vec![];
    for (b, buffer) in flow.buffers.iter().enumerate().filter(|(_, b)| b.home == Home::Arena) {
        let name = || buffer.name.clone();
        let Some(offset) = offsets.get(b).copied().flatten() else {
            if users[b].is_empty() && !buffer.input && !buffer.result {
                continue;
            }
            return Err(MemoryError::Unplaced { buffer: name() });
        };
        check_region(&buffer.name, offset, buffer.bytes, arena_bytes)?;
        if buffer.bytes > 0 {
            let live = clocks.live_range(&users[b], buffer.input, buffer.result);
            placed.push((offset, offset + buffer.bytes, b, live));
        }
    }
    placed.sort_unstable_by_key(|(start, _, b, _)| (*start, *b));
    let donated_to = |a: usize, b: usize| {
        let donated = |(l, call): (usize, &FlowCall)| {
            let pair =
                |to, from| call.aliases.contains(&(to, from)) && donates(flow, &clocks, &users, l, from, to);
            pair(a, b) || pair(b, a)
        };
        offsets[a] == offsets[b] && flow.calls.iter().enumerate().any(donated)
    };
    for (i, (_, stop, a, live)) in placed.iter().enumerate() {
        for (_, _, b, other) in placed[i + 1..].iter().take_while(|(start, ..)| start < stop) {
            if !live.precedes(other) && !other.precedes(live) && !donated_to(*a, *b) {
                let (a, b) = (flow.buffers[*a].name.clone(), flow.buffers[*b].name.clone());
                return Err(MemoryError::Overlap { a, b });
            }
        }
    }
    Ok(())
}

/// Checks that `offset..offset+bytes` is aligned and within a region of `room` bytes.
///
/// # Errors
/// If it is not.
pub fn check_region(name: &str, offset: u64, bytes: u64, room: u64) -> Result<(), MemoryError> {
    let buffer = || name.to_owned();
    if !offset.is_multiple_of(ALIGN) {
        return Err(MemoryError::Misaligned { buffer: buffer(), offset });
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= room => Ok(()),
        _ => Err(MemoryError::Outside { buffer: buffer(), offset, bytes, room }),
    }
}

/// Checks that of any two calls that use a buffer, at least one to change it, one happens first.
fn check_races(flow: &Flow, clocks: &Clocks) -> Result<(), MemoryError> {
    let mut uses: Vec<Vec<(usize, Access)>> = vec![vec![]; flow.buffers.len()];
    for (l, call) in flow.calls.iter().enumerate() {
        for u in &call.uses {
            uses[u.buffer].push((l, u.access));
        }
    }
    for (b, uses) in uses.iter().enumerate() {
        for (i, (second, how)) in uses.iter().enumerate() {
            for (first, was) in &uses[..i] {
                let harmless = *how == Access::Read && *was == Access::Read;
                if first != second && !harmless && !clocks.before(*first, *second) {
                    let label = |l: usize| flow.calls[l].label.clone();
                    let buffer = flow.buffers[b].name.clone();
                    return Err(MemoryError::Race { first: label(*first), second: label(*second), buffer });
                }
            }
        }
    }
    Ok(())
}
