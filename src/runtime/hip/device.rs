//! A plan on a GPU.

use super::context::{Buffer, Context, Event, Function, Graph, LaunchArgs, Module, Pinned, Stream};
use super::kernels::Compiler;
use super::planes::{activations_from_planes, activations_to_planes};
use super::weights::Weights;
use super::{HipError, find};
use crate::codegen::spec::{Code, Extent, HipCode, Implementation};
use crate::gguf::GgufFile;
use crate::ir::{StateRole, StepInput, Syms, TensorType};
use crate::plan::memory::ALIGN;
use crate::plan::schedule::{EventId, Slot};
use crate::plan::{BufRef, Input, LoadedPlan, PlannedProgram, State};
use crate::runtime::device::{Device, DeviceError, DeviceOptions, Submission, Ticket, Timing, room_for};
use crate::runtime::progress::Progress;
use crate::runtime::weights::find_weights;
use crate::target::{FEW_TOKENS, TargetKind};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of pinned memory for what is written and read.
const STAGING: usize = 4 << 20;
/// The most bytes of a write that may wait for others.
const SMALL: usize = 16 << 10;
/// The fewest bytes of a part that is read.
const LEAST_READ: usize = 64 << 10;

/// Runs a plan on a GPU: its launches on the streams that the plan has for them, those of small programs as graphs.
///
/// What is dropped first stands first: streams, which wait for their work, before graphs and memory; graphs before the code of their
/// kernels.
pub struct HipDevice {
    /// Goes first, and waits for its work, which may be a graph's and touches memory. The plan's first, on which copies are too.
    stream: Stream,
    /// The plan's others. They have work only within a step, which begins and ends on the first.
    beside: Vec<Beside>,
    /// What calls signal. Programs share them, as one is joined before the next begins.
    signals: HashMap<EventId, Event>,
    graphs: HashMap<(usize, Syms), Captured>,
    /// What each input of programs that become graphs was given last, by program and buffer.
    given: HashMap<(usize, u32), Vec<u8>>,
    kernels: Vec<Vec<Launch>>,
    programs: Vec<Vec<PlacedCall>>,
    _modules: Vec<Module>,
    pool: Buffer,
    _weights: Weights,
    staging: Pinned,
    /// Where results are viewed.
    viewed: Pinned,
    /// Bytes of it that work under way may still read.
    staged: usize,
    /// When each part of what is read is there.
    parts_read: [Event; 4],
    /// Small writes that are not on the stream yet: those of a step go together.
    pending: Vec<(u64, Vec<u8>)>,
    launches: Vec<u64>,
    replays: u64,
    submitted: u64,
    /// The step that was given to the GPU last.
    last: Option<(usize, Syms)>,
    /// Whether nothing is captured.
    eager: bool,
    /// Whether everything that was submitted is done.
    idle: bool,
    timed: Vec<(usize, usize, Event)>,
    began: Option<Event>,
    plan: Arc<LoadedPlan>,
    context: Arc<Context>,
}

/// What a step became.
enum Captured {
    /// It ran once, launch by launch.
    Seen,
    Graph(Graph),
}

/// A stream beside the first, and the event by which it forks from that and joins it.
struct Beside {
    stream: Stream,
    event: Event,
}

/// A launch of a kernel.
struct Launch {
    function: Function,
    threads: u32,
    grid: Vec<Extent>,
}

/// A call with its arguments found.
struct PlacedCall {
    kernel: usize,
    addresses: Vec<u64>,
}

impl HipDevice {
    /// Compiles the kernels, loads the weights, reserves the memory.
    ///
    /// # Errors
    /// If there is no such GPU, a kernel does not compile, memory is short, or the model's tensors are not those of the plan.
    pub fn new(
        plan: &Arc<LoadedPlan>,
        model: Arc<GgufFile>,
        options: &DeviceOptions,
    ) -> Result<HipDevice, DeviceError> {
        let kind = plan.target.kind;
        let context =
            find(options.gpu).and_then(|(_, found)| found.into_context()).map_err(|why| match why {
                HipError::Library { .. } | HipError::NoDevice { count: 0, .. } => {
                    DeviceError::Absent { kind, why }
                }
                other => other.into(),
            })?;
        if context.arch != plan.target.arch {
            let (wants, has) = (plan.target.arch.clone(), context.arch.clone());
            return Err(HipError::OtherArch { wants, has, name: context.name.clone() }.into());
        }
        let found = find_weights(plan, &model)?;
        let needs = Needs::of(plan, &found);
        needs.fit(&context)?;
        let (modules, kernels) = load_kernels(plan, &context, &options.progress)?;
        let stream = Stream::new(&context)?;
        let count = plan.programs.iter().map(streams_beside).max().unwrap_or(0);
        let another = |_| Ok(Beside { stream: Stream::new(&context)?, event: Event::untimed(&context)? });
        let beside = (0..count).map(another).collect::<Result<Vec<_>, HipError>>()?;
        let spread = plan.programs.iter().filter(|program| streams_beside(program) > 0);
        let signalled: BTreeSet<EventId> =
            spread.flat_map(|program| program.calls.iter().filter_map(|call| call.slot.signals)).collect();
        let signal = |id| Ok((id, Event::untimed(&context)?));
        let signals = signalled.into_iter().map(signal).collect::<Result<_, HipError>>()?;
        let pool = Buffer::new(&context, plan.pool_bytes()).map_err(|e| needs.refused(e, &context, 0))?;
        // SAFETY: all of the pool.
        unsafe { stream.fill(pool.at, 0, pool.bytes as usize) }?;
        let staging = Pinned::new(&context, STAGING)?;
        let viewed = Pinned::new(&context, STAGING)?;
        let event = || Event::new(&context);
        let parts_read = [event()?, event()?, event()?, event()?];
        let weights = Weights::load(&context, &plan.weights, &found, &options.progress)
            .map_err(|e| needs.refused(e, &context, pool.bytes))?;
        let at = |arg: &BufRef, program: &PlannedProgram| match *arg {
            BufRef::Arena(i) => pool.at + plan.arena_offset + program.buffers[i as usize].offset,
            BufRef::State(i) => pool.at + plan.states[i as usize].offset,
            BufRef::Weight(i) => weights.at(i),
        };
        let placed = |program: &PlannedProgram| {
            let calls = program.calls.iter().map(|call| PlacedCall {
                kernel: call.kernel as usize,
                addresses: call.args.iter().map(|arg| at(arg, program)).collect(),
            });
            calls.collect()
        };
        let programs = plan.programs.iter().map(placed).collect();
        tracing::debug!(gpu = context.name, arch = context.arch, "hip device");
        Ok(HipDevice {
            graphs: HashMap::new(),
            given: HashMap::new(),
            stream,
            beside,
            signals,
            kernels,
            programs,
            _modules: modules,
            pool,
            _weights: weights,
            staging,
            viewed,
            staged: 0,
            parts_read,
            pending: vec![],
            launches: vec![0; plan.kernels.len()],
            replays: 0,
            submitted: 0,
            last: None,
            eager: options.eager,
            idle: false,
            timed: vec![],
            began: None,
            plan: Arc::clone(plan),
            context,
        })
    }

    /// Puts the launches of some calls on the streams that the plan has for them: the others fork from the first, and are joined to it.
    ///
    /// A part of a program goes on the first in its order, as what its calls wait for need not be signalled within it; and so do launches
    /// that are timed, each of which is timed from the one before it. That order is one of those that the plan allows.
    ///
    /// `args` gets the arguments of the launches: those of a graph live as long as that.
    fn launch(&mut self, work: &Submission, args: &mut Vec<LaunchArgs>) -> Result<(), HipError> {
        let planned = &self.plan.programs[work.program];
        let whole = work.calls.len() == planned.calls.len();
        let beside = if whole && !work.timed { streams_beside(planned) } else { 0 };
        let mut others = self.beside[..beside].iter();
        let forked = others.try_for_each(|other| other.stream.follow(&self.stream, &other.event));
        let launched = forked.and_then(|()| self.launch_calls(work, beside > 0, args));
        // They are joined whatever came of it, as what is next on the first stream comes after all that was begun.
        let others = self.beside[..beside].iter();
        let joined = others.map(|other| self.stream.follow(&other.stream, &other.event));
        launched.and(joined.fold(Ok(()), Result::and))
    }

    /// Puts the launches of some calls on their streams, or all on the first.
    fn launch_calls(
        &mut self,
        work: &Submission,
        spread: bool,
        all: &mut Vec<LaunchArgs>,
    ) -> Result<(), HipError> {
        let (timed, in_order) = (work.timed, Slot::default());
        if timed {
            self.timed.clear();
            self.began = Some(self.stream.moment()?);
        }
        let calls = &self.programs[work.program][work.calls.clone()];
        let planned = &self.plan.programs[work.program].calls[work.calls.clone()];
        for ((index, call), planned) in work.calls.clone().zip(calls).zip(planned) {
            let slot = if spread { &planned.slot } else { &in_order };
            let stream = match slot.stream {
                0 => &self.stream,
                n => &self.beside[n as usize - 1].stream,
            };
            slot.waits.iter().try_for_each(|event| stream.wait_for(&self.signals[event]))?;
            let args = all.push_mut(LaunchArgs::new(&call.addresses, [work.at.t as i32, work.at.r as i32]));
            for (i, launch) in self.kernels[call.kernel].iter().enumerate() {
                let kernel = self.plan.kernels[call.kernel].spec.name();
                let Some(grid) = blocks(&launch.grid, &work.at, kernel)? else { continue };
                // SAFETY: the plan is validated: within its bounds every argument fits its buffer. What a kernel touches of those is
                // held by tests of what codegen emits.
                let launched = unsafe { stream.launch(&launch.function, grid, launch.threads, args) };
                launched.map_err(|e| HipError::Launch {
                    kernel,
                    node: planned.label.clone(),
                    launch: i,
                    source: Box::new(e),
                })?;
                if timed {
                    self.timed.push((index, i, stream.moment()?));
                }
            }
            slot.signals.iter().try_for_each(|event| stream.record(&self.signals[event]))?;
        }
        Ok(())
    }

    /// Gives up on graphs, and says why. One of another program may still run.
    fn launch_from_here_on(&mut self, work: &Submission, why: &str) -> Result<(), HipError> {
        let (gpu, program) = (&self.context.name, &self.plan.programs[work.program].name);
        tracing::warn!(
            "on {gpu} a graph of {program} {why}, so from here on each launch is made by itself (as with --no-graph)"
        );
        self.eager = true;
        self.stream.wait()?;
        self.graphs.clear();
        Ok(())
    }

    /// Counts the launches of some calls.
    fn count(&mut self, work: &Submission) {
        for call in &self.programs[work.program][work.calls.clone()] {
            let made =
                self.kernels[call.kernel].iter().filter(|l| l.grid.iter().all(|e| e.eval(&work.at) > 0));
            self.launches[call.kernel] += made.count() as u64;
        }
    }

    fn wait_for_all(&mut self) -> Result<(), HipError> {
        self.send_pending()?;
        if !self.idle {
            self.stream.wait()?;
            (self.idle, self.staged) = (true, 0);
        }
        Ok(())
    }

    /// An error of work under way, with the step that was last given.
    fn in_step(&self, source: HipError) -> HipError {
        let Some((program, Syms { t, r })) = self.last else { return source };
        let program = self.plan.programs[program].name.clone();
        HipError::Step { program, t, r, source: Box::new(source) }
    }

    /// Where a buffer of a program, or a state, lies, and its type.
    ///
    /// # Panics
    /// If it is a weight, which is never written or read.
    fn place(&self, program: usize, buffer: BufRef) -> (u64, &TensorType, Syms) {
        let planned = &self.plan.programs[program];
        let (offset, ty) = match buffer {
            BufRef::Arena(i) => {
                let buffer = &planned.buffers[i as usize];
                (self.plan.arena_offset + buffer.offset, &buffer.ty)
            }
            BufRef::State(i) => (self.plan.states[i as usize].offset, &self.plan.states[i as usize].ty),
            BufRef::Weight(i) => panic!("weight {i} is no memory of the pool"),
        };
        (self.pool.at + offset, ty, planned.bounds)
    }

    /// Copies to the device, in order with the work.
    fn write_at(&mut self, to: u64, bytes: &[u8]) -> Result<(), HipError> {
        let overlaps =
            |(at, other): &(u64, Vec<u8>)| *at < to + bytes.len() as u64 && to < at + other.len() as u64;
        if bytes.len() > SMALL || self.pending.iter().any(overlaps) {
            self.send_pending()?;
        }
        if bytes.len() > SMALL {
            return self.send(to, bytes);
        }
        self.pending.push((to, bytes.to_vec()));
        Ok(())
    }

    /// Puts small writes on the stream. Those between which there is but padding become one.
    fn send_pending(&mut self) -> Result<(), HipError> {
        let mut pending = std::mem::take(&mut self.pending);
        pending.sort_by_key(|(at, _)| *at);
        let mut runs: Vec<(u64, Vec<u8>)> = vec![];
        for (at, bytes) in pending {
            match runs.last_mut() {
                // Buffers begin at multiples of `ALIGN`, so nothing else begins in so small a gap.
                Some((first, run)) if at - (*first + run.len() as u64) < ALIGN => {
                    run.resize((at - *first) as usize, 0);
                    run.extend(bytes);
                }
                _ => runs.push((at, bytes)),
            }
        }
        runs.into_iter().try_for_each(|(at, run)| self.send(at, &run))
    }

    /// Copies to the device by way of pinned memory.
    fn send(&mut self, mut to: u64, bytes: &[u8]) -> Result<(), HipError> {
        for bytes in bytes.chunks(STAGING) {
            if self.staged + bytes.len() > STAGING {
                self.stream.wait()?;
                self.staged = 0;
            }
            let room = self.staged..self.staged + bytes.len();
            let room = &mut self.staging.bytes()[room];
            room.copy_from_slice(bytes);
            // SAFETY: the caller's buffer has as many bytes there. The room is used again only when the stream was waited for.
            unsafe { self.stream.write(to, room) }?;
            self.staged += bytes.len();
            self.idle = false;
            to += bytes.len() as u64;
        }
        Ok(())
    }

    /// Copies from the device by way of pinned memory, when all work is done: while a part is copied on, the next is on its way.
    fn read_at(&mut self, mut from: u64, bytes: &mut [u8]) -> Result<(), HipError> {
        for bytes in bytes.chunks_mut(STAGING) {
            self.wait_for_all()?;
            let part = bytes.len().div_ceil(self.parts_read.len()).max(LEAST_READ);
            for (i, room) in self.staging.bytes()[..bytes.len()].chunks_mut(part).enumerate() {
                // SAFETY: the caller's buffer has as many bytes there; the room is touched when this part was waited for.
                unsafe { self.stream.read(from + (i * part) as u64, room) }?;
                self.stream.record(&self.parts_read[i])?;
            }
            for (i, to) in bytes.chunks_mut(part).enumerate() {
                self.parts_read[i].wait()?;
                to.copy_from_slice(&self.staging.bytes()[i * part..][..to.len()]);
            }
            from += bytes.len() as u64;
        }
        Ok(())
    }

    /// Where some rows of a state lie, and how many bytes they are.
    fn rows(&self, state: &State, first: u64, rows: u64) -> (u64, usize) {
        let all = rows_of(state);
        assert!(first.checked_add(rows).is_some_and(|end| end <= all), "rows {first}..+{rows} of {all}");
        let row = state.ty.bytes(&Syms { t: 0, r: 0 }) / all.max(1);
        (self.pool.at + state.offset + first * row, (rows * row) as usize)
    }
}

/// How many streams a program uses beside the first.
fn streams_beside(program: &PlannedProgram) -> usize {
    program.calls.iter().map(|call| call.slot.stream as usize).max().unwrap_or(0)
}

/// The blocks of a grid along x, y and z; none if there are none.
fn blocks(grid: &[Extent], at: &Syms, kernel: &'static str) -> Result<Option<[u32; 3]>, HipError> {
    let counts: Vec<u64> = grid.iter().map(|extent| extent.eval(at)).collect();
    let mut blocks = [1; 3];
    let fits = counts.len() <= 3
        && counts.iter().rev().zip(&mut blocks).zip([i32::MAX as u64, 65_535, 65_535]).all(
            |((count, to), most)| {
                *to = *count as u32;
                *count <= most
            },
        );
    match fits {
        true => Ok(Some(blocks).filter(|blocks| !blocks.contains(&0))),
        false => Err(HipError::Grid { kernel, blocks: counts }),
    }
}

/// Bytes of memory that a plan needs.
struct Needs<'a> {
    plan: &'a LoadedPlan,
    weights: u64,
}

impl Needs<'_> {
    fn of<'a>(plan: &'a LoadedPlan, found: &[&[u8]]) -> Needs<'a> {
        Needs { plan, weights: Weights::bytes(found.iter().map(|bytes| bytes.len() as u64)) }
    }

    /// Whether weights and pool fit the memory that is free.
    fn fit(&self, context: &Context) -> Result<(), DeviceError> {
        let (free, _) = context.memory()?;
        match self.weights.saturating_add(self.plan.pool_bytes()) <= free {
            true => Ok(()),
            false => Err(self.error(free)),
        }
    }

    /// What is said when the driver fails at a part of it. Where it has no memory, the cause is what else took some meanwhile, or that
    /// what is free lies in pieces; `taken` of it this plan has already.
    fn refused(&self, why: HipError, context: &Context, taken: u64) -> DeviceError {
        match (why, context.memory()) {
            (HipError::OutOfMemory { .. }, Ok((free, _))) => self.error(free.saturating_add(taken)),
            (other, _) => other.into(),
        }
    }

    fn error(&self, free: u64) -> DeviceError {
        let (states, arena) = (self.plan.state_bytes(), self.plan.arena_bytes);
        let context = self.plan.options.context;
        DeviceError::Memory { context, weights: self.weights, states, arena, available: Some(free) }
    }
}

/// The launches of each kernel of a plan, and the modules that they are in.
fn load_kernels(
    plan: &LoadedPlan,
    context: &Arc<Context>,
    progress: &Progress,
) -> Result<(Vec<Module>, Vec<Vec<Launch>>), DeviceError> {
    let code_of = |kernel: &Implementation| -> Result<Vec<HipCode>, DeviceError> {
        let codes = kernel.launches.iter().map(|launch| match &launch.code {
            Code::Hip(code) => Ok(code.clone()),
            Code::Cpu(_) => Err(DeviceError::Kernel {
                device: "hip",
                kernel: kernel.spec.name(),
                why: "it is one of the CPU's".into(),
            }),
        });
        codes.collect()
    };
    let codes = plan.kernels.iter().map(code_of).collect::<Result<Vec<_>, _>>()?;
    // A driver may come without a compiler, so that is looked for only where there is something to compile.
    let objects = plan.objects_by_source();
    let object =
        |code: &HipCode| objects.get(code.source.as_str()).filter(|object| object.arch == context.arch);
    let mut rest = codes.iter().flatten().filter(|code| object(code).is_none()).peekable();
    let compiled = match rest.peek() {
        None => HashMap::new(),
        Some(_) => Compiler::of_platform(context.platform)?.compile(&context.arch, rest, progress)?,
    };
    let load = |code: &HipCode| match object(code) {
        None => Module::new(context, &compiled[code.source.as_str()]),
        Some(object) => Module::new(context, &object.code),
    };
    // What is wrong with code that came with the plan, the plan is named for.
    let of_plan = |name: &str, code: &HipCode, source: HipError| match object(code) {
        None => source,
        Some(object) => HipError::Object {
            kernel: format!("{name} ({})", code.entry),
            compiler: object.compiler.clone(),
            arch: object.arch.clone(),
            source: source.into(),
        },
    };
    let mut modules: Vec<Module> = vec![];
    let mut known: HashMap<&str, usize> = HashMap::new();
    let mut kernels = vec![];
    for (kernel, codes) in plan.kernels.iter().zip(&codes) {
        let mut launches = vec![];
        let name = kernel.spec.name();
        for (launch, code) in kernel.launches.iter().zip(codes) {
            let module = match known.get(code.source.as_str()) {
                Some(module) => *module,
                None => {
                    modules.push(load(code).map_err(|e| of_plan(name, code, e))?);
                    known.insert(&code.source, modules.len() - 1);
                    modules.len() - 1
                }
            };
            let function = modules[module].function(&code.entry).map_err(|e| of_plan(name, code, e))?;
            launches.push(Launch { function, threads: code.threads, grid: launch.grid.clone() });
        }
        kernels.push(launches);
    }
    Ok((modules, kernels))
}

impl Device for HipDevice {
    fn kind(&self) -> TargetKind {
        self.plan.target.kind
    }

    fn isa(&self) -> &str {
        &self.context.arch
    }

    fn submit(&mut self, work: &Submission) -> Result<Ticket, DeviceError> {
        let bounds = self.plan.programs[work.program].bounds;
        let at = work.at;
        let inside = 1 <= at.t && at.t <= bounds.t && at.r <= bounds.r && at.r <= at.t;
        assert!(inside, "{at:?} is out of {bounds:?}");
        self.last = Some((work.program, at));
        self.begin(work).map_err(|e| self.in_step(e))?;
        self.count(work);
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<(), DeviceError> {
        assert!(ticket.0 <= self.submitted, "{ticket:?} is of another device");
        self.wait_for_all().map_err(|e| self.in_step(e).into())
    }

    fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError> {
        let (at, ty, bounds) = self.place(program, to);
        let (dtype, room) = (ty.dtype, ty.bytes(&bounds));
        assert!(bytes.len() as u64 <= room, "{to:?} has {room} bytes, not {}", bytes.len());
        if dtype.is_activations() {
            let mut planes = vec![0; room as usize];
            self.read_at(at, &mut planes).map_err(|e| self.in_step(e))?;
            activations_to_planes(bytes, dtype, &mut planes);
            return self.write_at(at, &planes).map_err(|e| self.in_step(e).into());
        }
        if !self.eager && bounds.t <= FEW_TOKENS {
            self.keep_input(program, to, bytes);
        }
        self.write_at(at, bytes).map_err(|e| self.in_step(e).into())
    }

    fn read(
        &mut self,
        program: usize,
        from: BufRef,
        first: u64,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        let (at, ty, bounds) = self.place(program, from);
        let (dtype, room) = (ty.dtype, ty.bytes(&bounds));
        let end = first.checked_add(bytes.len() as u64).filter(|end| *end <= room);
        let end =
            end.unwrap_or_else(|| panic!("{from:?} has {room} bytes, so none at {first}..+{}", bytes.len()));
        if dtype.is_activations() {
            let (mut planes, mut all) = (vec![0; room as usize], vec![0; room as usize]);
            self.read_at(at, &mut planes).map_err(|e| self.in_step(e))?;
            activations_from_planes(&planes, dtype, &mut all);
            bytes.copy_from_slice(&all[first as usize..end as usize]);
            return Ok(());
        }
        self.read_at(at + first, bytes).map_err(|e| self.in_step(e).into())
    }

    /// The copy follows the work on the stream, and both are waited for at once.
    fn view<'a>(
        &'a mut self,
        work: Ticket,
        (program, from): (usize, BufRef),
        first: u64,
        len: usize,
        room: &'a mut Vec<u32>,
    ) -> Result<&'a mut [u8], DeviceError> {
        assert!(work.0 <= self.submitted, "{work:?} is of another device");
        let (at, ty, bounds) = self.place(program, from);
        let inside = first.checked_add(len as u64).is_some_and(|end| end <= ty.bytes(&bounds));
        assert!(inside, "{from:?} has no bytes at {first}..+{len}");
        if len > STAGING || ty.dtype.is_activations() {
            let bytes = room_for(len, room);
            self.read(program, from, first, bytes)?;
            return Ok(bytes);
        }
        let copied = self.send_pending().and_then(|()| {
            self.idle = false;
            // SAFETY: the buffer has as many bytes there. Nothing else touches the room, which is looked at when the stream was waited
            // for.
            unsafe { self.stream.read(at + first, &mut self.viewed.bytes()[..len]) }?;
            self.wait_for_all()
        });
        copied.map_err(|e| self.in_step(e))?;
        Ok(&mut self.viewed.bytes()[..len])
    }

    fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError> {
        let plan = Arc::clone(&self.plan);
        for state in plan.states.iter().filter(|s| s.role == role) {
            let apart = from.saturating_add(rows) <= to || to.saturating_add(rows) <= from;
            assert!(apart, "rows {from}.. and {to}.. overlap");
            let ((source, len), (target, _)) = (self.rows(state, from, rows), self.rows(state, to, rows));
            self.send_pending().map_err(|e| self.in_step(e))?;
            self.idle = false;
            // SAFETY: both lie within the state, and apart, as asserted.
            unsafe { self.stream.copy(source, target, len) }.map_err(|e| self.in_step(e))?;
        }
        Ok(())
    }

    fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), DeviceError> {
        let plan = Arc::clone(&self.plan);
        for state in plan.states.iter().filter(|s| s.role == role) {
            let (start, len) = self.rows(state, first, rows);
            self.send_pending().map_err(|e| self.in_step(e))?;
            self.idle = false;
            // SAFETY: within the state, as asserted there.
            unsafe { self.stream.fill(start, byte, len) }.map_err(|e| self.in_step(e))?;
        }
        Ok(())
    }

    fn launch_counts(&self) -> Vec<u64> {
        self.launches.clone()
    }

    fn replays(&self) -> u64 {
        self.replays
    }

    fn timings(&mut self) -> Result<Vec<Timing>, DeviceError> {
        self.wait_for_all().map_err(|e| self.in_step(e))?;
        let mut before = self.began.as_ref();
        let mut timings = vec![];
        for (call, launch, moment) in &self.timed {
            let ms = before.map_or(Ok(0.0), |before| before.until(moment)).map_err(|e| self.in_step(e))?;
            let time = Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3);
            timings.push(Timing { call: *call, launch: *launch, time });
            before = Some(moment);
        }
        Ok(timings)
    }
}

impl HipDevice {
    /// Puts work on the stream, as launches or as a graph.
    fn begin(&mut self, work: &Submission) -> Result<(), HipError> {
        let bounds = self.plan.programs[work.program].bounds;
        let whole = work.calls == (0..self.programs[work.program].len());
        let key = (work.program, work.at);
        self.send_pending()?;
        self.idle = false;
        // Steps of more tokens come in too many sizes for a graph each, and take longer than launching does.
        if self.eager || !whole || work.timed || bounds.t > FEW_TOKENS {
            self.launch(work, &mut vec![])?;
        } else {
            match self.graphs.remove(&key) {
                // What is seen for the first time may be seen but once, and its modules may not be loaded yet.
                None => {
                    self.launch(work, &mut vec![])?;
                    self.graphs.insert(key, Captured::Seen);
                }
                Some(Captured::Graph(graph)) => {
                    self.stream.replay(&graph)?;
                    self.replays += 1;
                    self.graphs.insert(key, Captured::Graph(graph));
                }
                Some(Captured::Seen) => match self.capture(work) {
                    Ok(graph) if self.replays_as_launched(&graph, work)? => {
                        self.graphs.insert(key, Captured::Graph(graph));
                    }
                    Ok(_) => self.launch_from_here_on(
                        work,
                        "replayed with other results than its launches have one by one",
                    )?,
                    Err(e) => {
                        self.launch_from_here_on(work, &format!("could not be made ({e})"))?;
                        self.launch(work, &mut vec![])?;
                    }
                },
            }
        }
        Ok(())
    }

    /// The launches of a step as a graph.
    fn capture(&mut self, work: &Submission) -> Result<Graph, HipError> {
        self.stream.begin_capture()?;
        let mut args = vec![];
        let launched = self.launch(work, &mut args);
        // A capture is ended whatever came of it.
        let graph = self.stream.end_capture(args);
        launched?;
        graph
    }

    /// Makes a step twice, as a replay of its graph and launch by launch. Whether it left the same both times, bit for bit: results,
    /// the rows that it appended to caches, the states that it replaced. What the launches left stands, and the step counts once.
    ///
    /// Nothing comes between what the host wrote and the replay, as that is where a replay may see what was there before. Rows that are
    /// appended twice are the same the second time; whatever else a step reads and overwrites is put back before.
    fn replays_as_launched(&mut self, graph: &Graph, work: &Submission) -> Result<bool, HipError> {
        let plan = Arc::clone(&self.plan);
        let planned = &plan.programs[work.program];
        let mut before = vec![];
        for input in &planned.inputs {
            // A caller that gave no inputs knows what the arena holds, and nobody else does.
            let Some(given) = self.given.get(&(work.program, input.buffer)) else {
                self.stream.replay(graph)?;
                return Ok(true);
            };
            let (at, ..) = self.place(work.program, BufRef::Arena(input.buffer));
            before.push((at, given.clone()));
        }
        let left = self.left_by(work);
        let replaced = plan.states.iter().filter(|state| state.role == StateRole::Replaced);
        for (at, len) in replaced.map(|state| self.rows(state, 0, rows_of(state))).collect::<Vec<_>>() {
            before.push((at, self.copy_of(at, len)?));
        }
        self.stream.replay(graph)?;
        self.idle = false;
        let replayed = self.copies_of(&left)?;
        for (at, bytes) in &before {
            self.send(*at, bytes)?;
        }
        self.launch(work, &mut vec![])?;
        self.idle = false;
        Ok(self.copies_of(&left)? == replayed)
    }

    /// Where what a step leaves lies, and how many bytes it is.
    fn left_by(&self, work: &Submission) -> Vec<(u64, usize)> {
        let planned = &self.plan.programs[work.program];
        let results = planned.results.iter().map(|&buffer| {
            let (at, ty, _) = self.place(work.program, BufRef::Arena(buffer));
            (at, ty.bytes(&work.at) as usize)
        });
        let mut left: Vec<(u64, usize)> = results.collect();
        let is_rows = |input: &&Input| input.name == StepInput::Rows.name();
        let given =
            planned.inputs.iter().find(is_rows).and_then(|i| self.given.get(&(work.program, i.buffer)));
        let rows = given.map_or(&[][..], |bytes| bytes.as_chunks().0);
        let mut rows: Vec<u64> = rows.iter().map(|row| u64::from(u32::from_le_bytes(*row))).collect();
        rows.sort_unstable();
        for state in &self.plan.states {
            match state.role {
                StateRole::Replaced => left.push(self.rows(state, 0, rows_of(state))),
                StateRole::Appended => {
                    let runs = rows.chunk_by(|row, next| next - row <= 1);
                    let within = runs.filter(|run| run[run.len() - 1] < rows_of(state));
                    left.extend(within.map(|run| self.rows(state, run[0], run[run.len() - 1] - run[0] + 1)));
                }
            }
        }
        left.retain(|(_, len)| *len > 0);
        left
    }

    /// Keeps what is written to an input.
    fn keep_input(&mut self, program: usize, to: BufRef, bytes: &[u8]) {
        let BufRef::Arena(buffer) = to else { return };
        if self.plan.programs[program].inputs.iter().any(|input| input.buffer == buffer) {
            let given = self.given.entry((program, buffer)).or_default();
            given.clear();
            given.extend_from_slice(bytes);
        }
    }

    fn copies_of(&mut self, parts: &[(u64, usize)]) -> Result<Vec<Vec<u8>>, HipError> {
        parts.iter().map(|&(at, len)| self.copy_of(at, len)).collect()
    }

    fn copy_of(&mut self, at: u64, len: usize) -> Result<Vec<u8>, HipError> {
        let mut bytes = vec![0; len];
        self.read_at(at, &mut bytes)?;
        Ok(bytes)
    }
}

/// Rows that a state has.
fn rows_of(state: &State) -> u64 {
    state.ty.first().as_const().unwrap_or(0)
}
