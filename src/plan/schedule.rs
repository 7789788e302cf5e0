//! The order of calls: what each does to memory, which stream it runs on, and what waits for what.
//!
//! Hazards between calls (read after write, write after read, write after write, over whole buffers)
//! are its dependencies. One call happens before another by the order of a stream or through an event;
//! vector clocks (Mattern, 1989) answer which do.

use crate::codegen::spec::{Access, Arg, Implementation};
use crate::ir::{Syms, TensorType};
use serde::{Deserialize, Serialize};

/// An event: signalled by one call, waited for by calls of other streams.
pub type EventId = u32;

/// Where and when a call runs: after all before it on `stream`, and after its waits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    pub stream: u32,
    pub waits: Vec<EventId>,
    pub signals: Option<EventId>,
}

/// Whose memory a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    Arena,
    State,
    Weight,
}

/// A buffer as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowBuffer {
    /// For messages.
    pub name: String,
    pub home: Home,
    /// Size at the program's bounds.
    pub bytes: u64,
    /// Written before the first call.
    pub input: bool,
    /// Read after the last call.
    pub result: bool,
}

/// One use of a buffer by a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    pub buffer: usize,
    pub access: Access,
}

/// What one call does to memory; weights, which never change, are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowCall {
    pub label: String,
    pub uses: Vec<Use>,
    /// `(written, read)`: buffers of which the first may lie where the second lies.
    pub aliases: Vec<(usize, usize)>,
}

/// What a program does to memory, checked call by call.
#[derive(Clone, Debug)]
pub struct Flow {
    pub buffers: Vec<FlowBuffer>,
    pub calls: Vec<FlowCall>,
    bounds: Syms,
    written: Vec<bool>,
}

/// A program that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    #[error("call {call:?} has {have} arguments, its kernel {kernel} takes {want}")]
    Arity { call: String, kernel: String, want: usize, have: usize },
    #[error("call {call:?} names buffer {index}, but there are {len}")]
    NoBuffer { call: String, index: usize, len: usize },
    #[error("call {call:?} uses {bytes} bytes as {ty}, but {buffer} has {have}")]
    TooSmall { call: String, buffer: String, ty: TensorType, bytes: u64, have: u64 },
    #[error("{what}: rows of {ty} are not whole blocks")]
    Unblocked { what: String, ty: TensorType },
    #[error("{what}: {ty} is larger than any memory")]
    TooLarge { what: String, ty: TensorType },
    #[error("call {call:?} may not {access} {buffer}")]
    Access { call: String, access: &'static str, buffer: String },
    #[error("call {call:?} changes {buffer} and uses it for another argument too")]
    Shared { call: String, buffer: String },
    #[error("call {call:?} reads {buffer} before anything wrote it")]
    ReadBeforeWrite { call: String, buffer: String },
    #[error("nothing writes the result {buffer}")]
    NoResult { buffer: String },
    #[error("call {call:?} runs on stream {stream}, but there are {streams}")]
    NoStream { call: String, stream: u32, streams: u32 },
    #[error("call {call:?} waits for event {event}, which nothing before it signals")]
    NoEvent { call: String, event: EventId },
    #[error("call {call:?} signals event {event} a second time")]
    EventTwice { call: String, event: EventId },
    #[error("a program of {calls} calls has {slots} places in streams")]
    Slots { calls: usize, slots: usize },
}

/// The size of `ty` at `bounds`.
///
/// # Errors
/// If rows are not whole blocks, or the size is beyond `i64`.
pub fn size_of(what: &str, ty: &TensorType, bounds: &Syms) -> Result<u64, FlowError> {
    if !ty.is_blocked() {
        return Err(FlowError::Unblocked { what: what.to_owned(), ty: ty.clone() });
    }
    // Sizes saturate where they overflow, and even a saturated count of elements has more bytes than this.
    match ty.bytes(bounds) {
        bytes if i64::try_from(bytes).is_ok() => Ok(bytes),
        _ => Err(FlowError::TooLarge { what: what.to_owned(), ty: ty.clone() }),
    }
}

impl Flow {
    /// A program without calls.
    pub fn new(buffers: Vec<FlowBuffer>, bounds: Syms) -> Flow {
        let written = buffers.iter().map(|b| b.input || b.home != Home::Arena).collect();
        Flow { buffers, calls: vec![], bounds, written }
    }

    /// Appends a call of `kernel` on the buffers `args`.
    ///
    /// # Errors
    /// If an argument does not fit its buffer, or is used as its home forbids.
    pub fn call(&mut self, label: &str, kernel: &Implementation, args: &[usize]) -> Result<(), FlowError> {
        let call = || label.to_owned();
        let of_kernel: Vec<&Arg> = kernel.args().collect();
        if args.len() != of_kernel.len() {
            let (want, have) = (of_kernel.len(), args.len());
            return Err(FlowError::Arity { call: call(), kernel: kernel.spec.name().into(), want, have });
        }
        let mut uses = vec![];
        for (arg, &index) in of_kernel.into_iter().zip(args) {
            let Some(buffer) = self.buffers.get(index) else {
                return Err(FlowError::NoBuffer { call: call(), index, len: self.buffers.len() });
            };
            let name = || buffer.name.clone();
            let bytes = size_of(label, &arg.ty, &self.bounds)?;
            if bytes > buffer.bytes {
                let (ty, have) = (arg.ty.clone(), buffer.bytes);
                return Err(FlowError::TooSmall { call: call(), buffer: name(), ty, bytes, have });
            }
            let refused = match (buffer.home, arg.access) {
                (_, Access::Read)
                | (Home::State, Access::Update)
                | (Home::Arena, Access::Write | Access::Scratch) => None,
                (_, Access::Write) => Some("write"),
                (_, Access::Update) => Some("update"),
                (_, Access::Scratch) => Some("scribble on"),
            };
            if let Some(access) = refused {
                return Err(FlowError::Access { call: call(), access, buffer: name() });
            }
            if arg.access != Access::Read && args.iter().filter(|a| **a == index).count() > 1 {
                return Err(FlowError::Shared { call: call(), buffer: name() });
            }
            if arg.access == Access::Read && !self.written[index] {
                return Err(FlowError::ReadBeforeWrite { call: call(), buffer: name() });
            }
            if buffer.home != Home::Weight {
                uses.push(Use { buffer: index, access: arg.access });
            }
        }
        for used in uses.iter().filter(|u| u.access == Access::Write) {
            self.written[used.buffer] = true;
        }
        let aliases = self.aliases(kernel, args);
        self.calls.push(FlowCall { label: call(), uses, aliases });
        Ok(())
    }

    /// The pairs of buffers that a call lets lie in one place: the kernel allows it for every argument
    /// that reads the buffer, and both hold as many elements of one type.
    fn aliases(&self, kernel: &Implementation, args: &[usize]) -> Vec<(usize, usize)> {
        let mut pairs = vec![];
        for alias in &kernel.may_alias {
            let (Some(write), Some(read)) = (kernel.arg(alias.write), kernel.arg(alias.read)) else {
                continue;
            };
            let (to, from) = (args[usize::from(alias.write)], args[usize::from(alias.read)]);
            let allowed = |j: usize| {
                kernel.may_alias.iter().any(|a| a.write == alias.write && usize::from(a.read) == j)
            };
            let everywhere = args.iter().enumerate().all(|(j, b)| *b != from || allowed(j));
            let arena = [to, from].iter().all(|b| self.buffers[*b].home == Home::Arena);
            let alike = write.ty.dtype == read.ty.dtype
                && write.ty.elements(&self.bounds) == read.ty.elements(&self.bounds)
                && self.buffers[to].bytes == self.buffers[from].bytes;
            let roles = write.access == Access::Write && read.access == Access::Read;
            if everywhere && arena && alike && roles && !pairs.contains(&(to, from)) {
                pairs.push((to, from));
            }
        }
        pairs
    }

    /// Checks what can be known only after the last call.
    ///
    /// # Errors
    /// If a result was never written.
    pub fn finish(self) -> Result<Flow, FlowError> {
        match self.buffers.iter().zip(&self.written).find(|(b, written)| b.result && !**written) {
            Some((b, _)) => Err(FlowError::NoResult { buffer: b.name.clone() }),
            None => Ok(self),
        }
    }

    /// The calls that use each buffer, in order.
    pub fn users(&self) -> Vec<Vec<usize>> {
        let mut users = vec![vec![]; self.buffers.len()];
        for (l, call) in self.calls.iter().enumerate() {
            for u in &call.uses {
                if users[u.buffer].last() != Some(&l) {
                    users[u.buffer].push(l);
                }
            }
        }
        users
    }

    /// The calls that each call must come after, by its direct hazards; ascending.
    fn dependencies(&self) -> Vec<Vec<usize>> {
        #[derive(Clone, Default)]
        struct Last {
            writer: Option<usize>,
            readers: Vec<usize>,
        }
        let mut last = vec![Last::default(); self.buffers.len()];
        let depend = |(l, call): (usize, &FlowCall)| {
            let mut on = vec![];
            for u in &call.uses {
                on.extend(last[u.buffer].writer);
                if u.access != Access::Read {
                    on.extend(&last[u.buffer].readers);
                }
            }
            for u in &call.uses {
                match u.access {
                    Access::Read => last[u.buffer].readers.push(l),
                    _ => last[u.buffer] = Last { writer: Some(l), readers: vec![] },
                }
            }
            on.sort_unstable();
            on.dedup();
            on
        };
        self.calls.iter().enumerate().map(depend).collect()
    }

    /// Spreads the calls over `streams`: each goes to a stream that ends in one of its dependencies, or
    /// else to the one with the fewest calls. It waits for the dependencies that nothing else orders.
    pub fn schedule(&self, streams: u32) -> Vec<Slot> {
        let streams = streams.max(1);
        let mut clocks = Clocks::new(streams);
        let mut slots: Vec<Slot> = vec![];
        let mut events = 0;
        for on in self.dependencies() {
            let tail_of = |d: &usize| clocks.tail(slots[*d].stream) == Some(*d);
            let stream = match on.iter().rev().find(|d| tail_of(d)) {
                Some(d) => slots[*d].stream,
                None => (0..streams).min_by_key(|s| clocks.count(*s)).unwrap_or(0),
            };
            let l = clocks.push(stream);
            let mut waits = vec![];
            // The latest first: it may imply the others.
            for d in on.into_iter().rev() {
                if !clocks.before(d, l) {
                    let event = *slots[d].signals.get_or_insert_with(|| {
                        events += 1;
                        events - 1
                    });
                    waits.push(event);
                    clocks.join(l, d);
                }
            }
            slots.push(Slot { stream, waits, signals: None });
        }
        slots
    }

    /// The clocks of calls placed at `slots`.
    ///
    /// # Errors
    /// If a stream or an event does not exist, or is not there yet.
    pub fn clocks(&self, slots: &[Slot], streams: u32) -> Result<Clocks, FlowError> {
        if slots.len() != self.calls.len() {
            return Err(FlowError::Slots { calls: self.calls.len(), slots: slots.len() });
        }
        let mut clocks = Clocks::new(streams);
        let mut signalled = std::collections::BTreeMap::new();
        for (slot, call) in slots.iter().zip(&self.calls) {
            let label = || call.label.clone();
            if slot.stream >= streams {
                return Err(FlowError::NoStream { call: label(), stream: slot.stream, streams });
            }
            let l = clocks.push(slot.stream);
            for event in &slot.waits {
                let Some(by) = signalled.get(event) else {
                    return Err(FlowError::NoEvent { call: label(), event: *event });
                };
                clocks.join(l, *by);
            }
            if let Some(event) = slot.signals
                && signalled.insert(event, l).is_some()
            {
                return Err(FlowError::EventTwice { call: label(), event });
            }
        }
        Ok(clocks)
    }
}

/// Vector clocks of calls: for each, how many calls of every lane happen before it. The lanes are the
/// streams, between a lane for the start (inputs are written) and one for the end (results are read).
#[derive(Clone, Debug)]
pub struct Clocks {
    /// Row by row, one row a call.
    before: Vec<u32>,
    /// The lane of each call.
    lane: Vec<usize>,
    /// The calls on each lane.
    count: Vec<u32>,
    tail: Vec<Option<usize>>,
}

/// When a buffer is in use: by lane, the calls that must be over for it to be free, and those that are
/// over before it is first used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveRange {
    done: Vec<u32>,
    ready: Vec<u32>,
}

impl LiveRange {
    /// Whether this use is over before the other begins, in every order that may happen.
    pub fn precedes(&self, other: &LiveRange) -> bool {
        self.done.iter().zip(&other.ready).all(|(done, ready)| done <= ready)
    }

    /// Both uses as one.
    pub fn join(&mut self, other: &LiveRange) {
        self.done.iter_mut().zip(&other.done).for_each(|(a, b)| *a = (*a).max(*b));
        self.ready.iter_mut().zip(&other.ready).for_each(|(a, b)| *a = (*a).min(*b));
    }
}

impl Clocks {
    fn new(streams: u32) -> Clocks {
        let lanes = streams as usize + 2;
        let mut count = vec![0; lanes];
        count[0] = 1;
        Clocks { before: vec![], lane: vec![], count, tail: vec![None; lanes] }
    }

    fn lanes(&self) -> usize {
        self.count.len()
    }

    fn row(&self, l: usize) -> &[u32] {
        &self.before[l * self.lanes()..][..self.lanes()]
    }

    /// The place of `l` on its own lane.
    fn place(&self, l: usize) -> u32 {
        self.row(l)[self.lane[l]]
    }

    fn tail(&self, stream: u32) -> Option<usize> {
        self.tail[stream as usize + 1]
    }

    fn count(&self, stream: u32) -> u32 {
        self.count[stream as usize + 1]
    }

    /// Appends a call to a stream and returns its index.
    fn push(&mut self, stream: u32) -> usize {
        let (l, lane, lanes) = (self.lane.len(), stream as usize + 1, self.lanes());
        self.before.resize((l + 1) * lanes, 0);
        self.before[l * lanes] = 1;
        self.lane.push(lane);
        self.count[lane] += 1;
        if let Some(tail) = self.tail[lane].replace(l) {
            self.join(l, tail);
        }
        l
    }

    /// Makes `earlier`, and what happens before it, happen before `l`.
    fn join(&mut self, l: usize, earlier: usize) {
        let lanes = self.lanes();
        let (head, tail) = self.before.split_at_mut(l * lanes);
        let (row, from) = (&mut tail[..lanes], &head[earlier * lanes..][..lanes]);
        for (i, (a, b)) in row.iter_mut().zip(from).enumerate() {
            let own = u32::from(i == self.lane[earlier]);
            *a = (*a).max(b + own);
        }
    }

    /// Whether call `a` is over before `b` starts, in every order that may happen.
    pub fn before(&self, a: usize, b: usize) -> bool {
        a != b && self.row(b)[self.lane[a]] > self.place(a)
    }

    /// The live range of a buffer that `users` use, that is written at the start (`input`) or read at the end.
    pub fn live_range(&self, users: &[usize], input: bool, result: bool) -> LiveRange {
        let lanes = self.lanes();
        let mut live = LiveRange { done: vec![0; lanes], ready: vec![u32::MAX; lanes] };
        for &l in users {
            let done = &mut live.done[self.lane[l]];
            *done = (*done).max(self.place(l) + 1);
            live.ready.iter_mut().zip(self.row(l)).for_each(|(a, b)| *a = (*a).min(*b));
        }
        if input {
            live.join(&LiveRange { done: self.count.iter().map(|_| 0).collect(), ready: vec![0; lanes] });
            live.done[0] = 1;
        }
        if result {
            live.join(&LiveRange { done: vec![0; lanes], ready: self.count.clone() });
            live.done[lanes - 1] = 1;
        }
        live
    }
}
