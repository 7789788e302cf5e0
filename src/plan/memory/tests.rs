use super::*;
use crate::codegen::spec::{Alias, Arg, Code, Computation, CpuCode, Implementation, KernelSpec, LaunchSpec};
use crate::ir::{DType, Op, Syms, TensorType};
use crate::plan::schedule::FlowBuffer;
use proptest::prelude::*;

const BOUNDS: Syms = Syms { t: 1, r: 1 };

fn ty(elements: u64) -> TensorType {
    TensorType::new(DType::F32, [elements])
}

fn kernel(args: &[(Access, u64)], aliases: &[(u16, u16)]) -> Implementation {
    let args = args.iter().map(|(access, n)| Arg::new(*access, ty(*n))).collect();
    Implementation {
        spec: KernelSpec { kernel: None, computes: Computation::Op(Op::Add), args },
        layouts: vec![],
        workspace: vec![],
        precision: DType::F32,
        may_alias: aliases.iter().map(|(write, read)| Alias { write: *write, read: *read }).collect(),
        launches: vec![LaunchSpec { code: Code::Cpu(CpuCode::Whole), grid: vec![] }],
    }
}

fn buffer(name: impl Into<String>, home: Home, elements: u64) -> FlowBuffer {
    FlowBuffer { name: name.into(), home, bytes: 4 * elements, input: false, result: false }
}

/// Buffers of the given sizes; the first is the input, the last the result.
fn buffers(sizes: &[u64]) -> Vec<FlowBuffer> {
    let mut buffers: Vec<_> =
        sizes.iter().enumerate().map(|(i, n)| buffer(format!("b{i}"), Home::Arena, *n)).collect();
    buffers.first_mut().unwrap().input = true;
    buffers.last_mut().unwrap().result = true;
    buffers
}

/// A launch that reads some buffers and writes others.
fn launch(flow: &mut Flow, reads: &[usize], writes: &[usize], alias: bool) {
    let uses = reads.iter().map(|b| (Access::Read, *b)).chain(writes.iter().map(|b| (Access::Write, *b)));
    let (accesses, args): (Vec<_>, Vec<_>) =
        uses.map(|(access, b)| ((access, flow.buffers[b].bytes / 4), b)).unzip();
    let pairs: Vec<(u16, u16)> = (0..reads.len() as u16)
        .flat_map(|r| (0..writes.len() as u16).map(move |w| (w + reads.len() as u16, r)))
        .filter(|_| alias)
        .collect();
    flow.call(&format!("l{}", flow.calls.len()), &kernel(&accesses, &pairs), &args).unwrap();
}

fn planned(flow: &Flow, streams: u32) -> (Vec<Slot>, Placement) {
    let slots = flow.schedule(streams);
    let placement = place(flow, &slots, streams).unwrap();
    check_placement(flow, &slots, streams, &placement.offsets, placement.arena_bytes).unwrap();
    (slots, placement)
}

#[test]
fn a_chain_without_aliases_alternates_between_two_places() {
    let mut flow = Flow::new(buffers(&[16; 5]), BOUNDS);
    for i in 0..4 {
        launch(&mut flow, &[i], &[i + 1], false);
    }
    let (_, placement) = planned(&flow.finish().unwrap(), 1);
    assert_eq!((placement.arena_bytes, placement.lower_bound), (128, 128));
}

#[test]
fn aliases_reduce_the_peak() {
    let mut flow = Flow::new(buffers(&[16; 5]), BOUNDS);
    for i in 0..4 {
        launch(&mut flow, &[i], &[i + 1], true);
    }
    let (_, placement) = planned(&flow.finish().unwrap(), 1);
    assert_eq!((placement.arena_bytes, placement.lower_bound), (64, 64));
    assert!(placement.offsets.iter().all(|o| *o == Some(0)));
}

#[test]
fn an_alias_needs_the_last_use_equal_sizes_and_no_result() {
    // b1 is read again later; b2 is larger; the input is a result.
    for (sizes, input_is_result, extra) in
        [([16, 16, 16], false, true), ([16, 32, 16], false, false), ([16, 16, 16], true, false)]
    {
        let mut buffers = buffers(&sizes);
        buffers[0].result = input_is_result;
        let mut flow = Flow::new(buffers, BOUNDS);
        launch(&mut flow, &[0], &[1], true);
        launch(&mut flow, if extra { &[0, 1] } else { &[1] }, &[2], false);
        let flow = flow.finish().unwrap();
        let (_, placement) = planned(&flow, 1);
        assert_ne!(placement.offsets[0], placement.offsets[1]);
    }
}

#[test]
fn an_alias_must_be_allowed_for_every_argument_that_reads_the_buffer() {
    let spec = kernel(&[(Access::Read, 16), (Access::Read, 16), (Access::Write, 16)], &[(2, 0)]);
    let mut flow = Flow::new(buffers(&[16, 16]), BOUNDS);
    flow.call("l0", &spec, &[0, 0, 1]).unwrap();
    let (_, placement) = planned(&flow.finish().unwrap(), 1);
    assert_eq!(placement.arena_bytes, 128);
}

#[test]
fn scratch_lives_only_during_its_launch() {
    let mut all = buffers(&[16, 16, 16]);
    all.push(buffer("scratch 0", Home::Arena, 64));
    all.push(buffer("scratch 1", Home::Arena, 64));
    let spec = kernel(&[(Access::Read, 16), (Access::Write, 16), (Access::Scratch, 64)], &[]);
    let mut flow = Flow::new(all, BOUNDS);
    flow.call("l0", &spec, &[0, 1, 3]).unwrap();
    flow.call("l1", &spec, &[1, 2, 4]).unwrap();
    let (_, placement) = planned(&flow.finish().unwrap(), 1);
    assert_eq!(placement.lower_bound, 64 + 64 + 256);
    assert_eq!(placement.offsets[3], placement.offsets[4]);
}

#[test]
fn independent_branches_go_to_two_streams_and_join_by_an_event() {
    // b0 -> b1 -> b3, b0 -> b2 -> b4, (b3, b4) -> b5
    let mut flow = Flow::new(buffers(&[16; 6]), BOUNDS);
    launch(&mut flow, &[0], &[1], false);
    launch(&mut flow, &[0], &[2], false);
    launch(&mut flow, &[1], &[3], false);
    launch(&mut flow, &[2], &[4], false);
    launch(&mut flow, &[3, 4], &[5], false);
    let flow = flow.finish().unwrap();
    let (slots, _) = planned(&flow, 2);
    let streams: Vec<u32> = slots.iter().map(|s| s.stream).collect();
    assert_eq!(streams, [0, 1, 0, 1, 1]);
    assert_eq!(slots[2].signals, Some(0));
    assert_eq!(slots[4].waits, [0]);
    assert_eq!(slots.iter().filter(|s| s.signals.is_some()).count(), 1);
    let (slots, placement) = planned(&flow, 1);
    assert!(slots.iter().all(|s| *s == Slot::default()));
    assert_eq!(placement.lower_bound, 192);
}

#[test]
fn streams_keep_apart_what_one_stream_would_overlap() {
    // Two chains that could reuse each other's memory in order, but not side by side.
    let mut flow = Flow::new(buffers(&[16, 64, 16, 64, 16]), BOUNDS);
    launch(&mut flow, &[0], &[1], false);
    launch(&mut flow, &[1], &[2], false);
    launch(&mut flow, &[0], &[3], false);
    launch(&mut flow, &[3], &[4], false);
    let flow = flow.finish().unwrap();
    let (_, one) = planned(&flow, 1);
    assert_eq!(one.offsets[1], one.offsets[3]);
    let (_, two) = planned(&flow, 2);
    assert_ne!(two.offsets[1], two.offsets[3]);
}

/// The buffers of a transformer of many layers, by and large, with and without aliases.
#[test]
fn a_transformer_comes_close_to_the_lower_bound() {
    for (tokens, alias) in [(512, false), (512, true), (1, false), (1, true), (7, false)] {
        let (hidden, heads, kv, inner, vocab) = (4096, 4096, 1024, 14336, 128_256);
        let mut all = vec![buffer("x", Home::Arena, tokens * hidden), buffer("pos", Home::Arena, tokens)];
        all.iter_mut().for_each(|b| b.input = true);
        let mut calls: Vec<(Vec<usize>, Vec<usize>)> = vec![];
        let mut x = 0;
        for _ in 0..32 {
            let mut new = |columns: u64| {
                all.push(buffer(format!("b{}", all.len()), Home::Arena, tokens * columns));
                all.len() - 1
            };
            let [norm, q, k, v, turned] = [hidden, heads, kv, kv, heads].map(&mut new);
            let [attended, out, sum] = [heads, hidden, hidden].map(&mut new);
            let [norm2, gate, up, act, down, next] =
                [hidden, inner, inner, inner, hidden, hidden].map(&mut new);
            calls.extend([
                (vec![x], vec![norm]),
                (vec![norm], vec![q, k, v]),
                (vec![q, k, v, 1], vec![turned]),
                (vec![turned], vec![attended]),
                (vec![attended], vec![out]),
                (vec![x, out], vec![sum, norm2]),
                (vec![norm2], vec![gate, up]),
                (vec![gate, up], vec![act]),
                (vec![act], vec![down]),
                (vec![sum, down], vec![next]),
            ]);
            x = next;
        }
        all.push(FlowBuffer { result: true, ..buffer("logits", Home::Arena, vocab) });
        calls.push((vec![x], vec![all.len() - 1]));
        let mut flow = Flow::new(all, BOUNDS);
        for (reads, writes) in &calls {
            launch(&mut flow, reads, writes, alias && writes.len() == 1 && reads.len() == 2);
        }
        let (_, placement) = planned(&flow.finish().unwrap(), 1);
        let Placement { arena_bytes, lower_bound, .. } = placement;
        assert!(arena_bytes as f64 <= 1.05 * lower_bound as f64, "{arena_bytes} of {lower_bound}");
    }
}

#[test]
fn a_broken_placement_is_found() {
    let mut flow = Flow::new(buffers(&[16, 16, 16]), BOUNDS);
    launch(&mut flow, &[0], &[1], false);
    launch(&mut flow, &[0, 1], &[2], false);
    let flow = flow.finish().unwrap();
    let (slots, placement) = planned(&flow, 1);
    let says = |slots: &[Slot], streams, offsets: &[u64], arena| {
        let offsets: Vec<_> = offsets.iter().map(|o| Some(*o)).collect();
        check_placement(&flow, slots, streams, &offsets, arena).unwrap_err().to_string()
    };
    assert_eq!(placement.arena_bytes, 192);
    assert_eq!(says(&slots, 1, &[0, 64, 64], 192), "b1 and b2 share bytes while both are in use");
    assert_eq!(says(&slots, 1, &[0, 8, 128], 192), "b1 lies at 8, which is not a multiple of 64");
    assert_eq!(
        says(&slots, 1, &[0, 64, 192], 192),
        "b2 lies at 192 with 64 bytes, beyond the 192 bytes of its region"
    );
    assert!(says(&slots, 1, &[0, 64, u64::MAX - 63], 192).contains("beyond"));
    let mut wrong = slots.clone();
    wrong[1].stream = 1;
    assert_eq!(
        says(&wrong, 2, &[0, 64, 128], 192),
        "calls \"l0\" and \"l1\" both use b1, and nothing orders them"
    );
    assert_eq!(says(&wrong, 1, &[0, 64, 128], 192), "call \"l1\" runs on stream 1, but there are 1");
    wrong[1].waits = vec![7];
    assert!(says(&wrong, 2, &[0, 64, 128], 192).contains("waits for event 7"));
    wrong[0].signals = Some(7);
    let offsets: Vec<_> = [0, 64, 128].map(Some).into();
    check_placement(&flow, &wrong, 2, &offsets, 192).unwrap();
    wrong[1].signals = Some(7);
    assert!(says(&wrong, 2, &[0, 64, 128], 192).contains("event 7 a second time"));
    assert!(says(&slots[..1], 1, &[0, 64, 128], 192).contains("2 calls has 1 places"));
}

/// Neither a shared line nor a missing one passes.
#[test]
fn a_line_is_not_overlooked() {
    let mut flow = Flow::new(buffers(&[32, 48, 32, 16]), BOUNDS);
    launch(&mut flow, &[0], &[1], false);
    launch(&mut flow, &[0, 1], &[2], false);
    launch(&mut flow, &[0, 1, 2], &[3], false);
    let flow = flow.finish().unwrap();
    let (slots, _) = planned(&flow, 1);
    // 128, 192, 128 and 64 bytes one after the other.
    let offsets = [0u64, 128, 320, 448];
    let check = |offsets: &[u64], room: u64| {
        let offsets: Vec<_> = offsets.iter().map(|o| Some(*o)).collect();
        check_placement(&flow, &slots, 1, &offsets, room).map_err(|e| e.to_string())
    };
    assert_eq!(check(&offsets, 512), Ok(()));
    for b in 0..4 {
        // Each nearer to its neighbour by a line, and the last beyond the arena by one.
        let mut moved = offsets;
        moved[b] = if b == 0 { offsets[0] + ALIGN } else { offsets[b] - ALIGN };
        let (first, second) = if b == 0 { (0, 1) } else { (b - 1, b) };
        let says = format!("b{first} and b{second} share bytes while both are in use");
        assert_eq!(check(&moved, 512), Err(says), "b{b}");
    }
    assert!(check(&offsets, 512 - ALIGN).unwrap_err().contains("beyond the 448 bytes"));
    assert!(check_region("r", 64, 128, 191).is_err() && check_region("r", 64, 128, 192).is_ok());
}

#[test]
fn programs_that_make_no_sense_are_refused() {
    let mut all = buffers(&[16, 16]);
    all.push(buffer("w", Home::Weight, 16));
    all.push(buffer("s", Home::State, 16));
    let says = |args: &[(Access, u64)], on: &[usize]| {
        let mut flow = Flow::new(all.clone(), BOUNDS);
        flow.call("l", &kernel(args, &[]), on).unwrap_err().to_string()
    };
    use Access::*;
    assert!(says(&[(Read, 16)], &[]).contains("0 arguments, its kernel add takes 1"));
    assert!(says(&[(Read, 16)], &[9]).contains("buffer 9, but there are 4"));
    assert!(says(&[(Read, 17)], &[0]).contains("uses 68 bytes as f32[17], but b0 has 64"));
    assert!(says(&[(Write, 16)], &[2]).contains("may not write w"));
    assert!(says(&[(Write, 16)], &[3]).contains("may not write s"));
    assert!(says(&[(Update, 16)], &[1]).contains("may not update b1"));
    assert!(says(&[(Scratch, 16)], &[3]).contains("may not scribble on s"));
    assert!(says(&[(Read, 16), (Write, 16)], &[1, 1]).contains("reads b1 before"));
    assert!(says(&[(Read, 16), (Write, 16)], &[0, 0]).contains("changes b0 and uses it"));
    assert!(says(&[(Read, 1 << 61)], &[0]).contains("larger than any memory"));
    assert!(
        Flow::new(all, BOUNDS).finish().unwrap_err().to_string().contains("nothing writes the result b1")
    );
}

#[test]
fn sizes_that_overflow_are_refused() {
    let huge = i64::MAX as u64 / 4 - 64;
    let mut all = buffers(&[huge, huge]);
    all[0].result = true;
    let mut flow = Flow::new(all, BOUNDS);
    launch(&mut flow, &[0], &[1], false);
    let slots = flow.schedule(1);
    assert_eq!(place(&flow, &slots, 1), Err(MemoryError::TooLarge));
}

/// A random launch: picks of what to read, sizes of what to write, and whether they may alias.
#[derive(Clone, Debug)]
struct Recipe {
    reads: Vec<prop::sample::Index>,
    writes: Vec<u64>,
    rewrite: Option<prop::sample::Index>,
    scratch: Option<u64>,
    state: bool,
    alias: bool,
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let size = prop_oneof![Just(16u64), Just(48), 1..80u64];
    (
        prop::collection::vec(any::<prop::sample::Index>(), 1..4),
        prop::collection::vec(size, 1..3),
        prop::option::weighted(0.15, any::<prop::sample::Index>()),
        prop::option::weighted(0.3, 1..64u64),
        prop::bool::weighted(0.2),
        any::<bool>(),
    )
        .prop_map(|(reads, writes, rewrite, scratch, state, alias)| Recipe {
            reads,
            writes,
            rewrite,
            scratch,
            state,
            alias,
        })
}

fn random_flow(inputs: &[u64], recipes: &[Recipe], results: &[prop::sample::Index]) -> Flow {
    let mut buffers = vec![buffer("state", Home::State, 16)];
    let mut readable = vec![];
    for n in inputs {
        readable.push(buffers.len());
        buffers.push(FlowBuffer { input: true, ..buffer(format!("b{}", buffers.len()), Home::Arena, *n) });
    }
    let mut calls = vec![];
    for recipe in recipes {
        let (mut args, mut on) = (vec![], vec![]);
        for r in &recipe.reads {
            on.push(*r.get(&readable));
        }
        args.extend(on.iter().map(|b| (Access::Read, buffers[*b].bytes / 4)));
        let reads = on.len() as u16;
        let mut fresh = vec![];
        for n in &recipe.writes {
            fresh.push(buffers.len());
            buffers.push(buffer(format!("b{}", buffers.len()), Home::Arena, *n));
        }
        // Sometimes a buffer is written a second time.
        if let Some(b) = recipe.rewrite.map(|r| *r.get(&readable))
            && !on.contains(&b)
        {
            fresh[0] = b;
        }
        for b in &fresh {
            args.push((Access::Write, buffers[*b].bytes / 4));
            on.push(*b);
            readable.extend((!readable.contains(b)).then_some(*b));
        }
        let writes = fresh.len() as u16;
        if let Some(n) = recipe.scratch {
            args.push((Access::Scratch, n));
            on.push(buffers.len());
            buffers.push(buffer(format!("b{}", buffers.len()), Home::Arena, n));
        }
        if recipe.state {
            args.push((Access::Update, 16));
            on.push(0);
        }
        let pairs = (0..writes).flat_map(|w| (0..reads).map(move |r| (reads + w, r)));
        let pairs: Vec<_> = pairs.filter(|_| recipe.alias).collect();
        calls.push((kernel(&args, &pairs), on));
    }
    for r in results {
        buffers[*r.get(&readable)].result = true;
    }
    let mut flow = Flow::new(buffers, BOUNDS);
    for (i, (spec, on)) in calls.iter().enumerate() {
        flow.call(&format!("l{i}"), spec, on).unwrap();
    }
    flow.finish().unwrap()
}

/// Runs the calls in random orders that streams and events allow. Each write tags every byte with its writer,
/// as a launch starts; reads are checked as it starts and as it ends, for what was not handed over.
struct Machine<'a> {
    flow: &'a Flow,
    slots: &'a [Slot],
    offsets: &'a [Option<u64>],
    memory: Vec<u32>,
    states: Vec<u32>,
}

impl Machine<'_> {
    fn bytes(&self, b: usize) -> std::ops::Range<usize> {
        let start = self.offsets[b].unwrap() as usize;
        start..start + self.flow.buffers[b].bytes as usize
    }

    fn expect(&self, b: usize, tag: u32, when: &str) -> Result<(), TestCaseError> {
        let right = match self.flow.buffers[b].home {
            Home::Arena => self.memory[self.bytes(b)].iter().all(|t| *t == tag),
            _ => self.states[b] == tag,
        };
        prop_assert!(right, "{} {when}: not what tag {tag} wrote", self.flow.buffers[b].name);
        Ok(())
    }

    fn write(&mut self, b: usize, tag: u32) {
        match self.flow.buffers[b].home {
            Home::Arena => {
                let bytes = self.bytes(b);
                self.memory[bytes].fill(tag);
            }
            _ => self.states[b] = tag,
        }
    }

    fn run(&mut self, choose: &mut impl FnMut(usize) -> usize) -> Result<(), TestCaseError> {
        let n = self.flow.calls.len();
        let tag = |l: usize, b: usize| ((l + 1) * self.flow.buffers.len() + b) as u32;
        // What each launch must see, and what the end must: by the order of the list.
        let mut version: Vec<u32> = (0..self.flow.buffers.len() as u32).collect();
        let mut sees = vec![];
        for (l, launch) in self.flow.calls.iter().enumerate() {
            sees.push(version.clone());
            for u in launch.uses.iter().filter(|u| u.access != Access::Read) {
                version[u.buffer] = tag(l, u.buffer);
            }
        }
        for (b, buffer) in self.flow.buffers.iter().enumerate() {
            if buffer.input || buffer.home == Home::State {
                self.write(b, b as u32);
            }
        }
        // 0 waiting, 1 running, 2 over
        let mut phase = vec![0u8; n];
        while phase.iter().any(|p| *p < 2) {
            let over = |e: u32| (0..n).any(|l| self.slots[l].signals == Some(e) && phase[l] == 2);
            let ready = |l: usize| {
                let slot = &self.slots[l];
                let first = (0..l).all(|k| self.slots[k].stream != slot.stream || phase[k] == 2);
                phase[l] == 1 || phase[l] == 0 && first && slot.waits.iter().all(|e| over(*e))
            };
            let able: Vec<usize> = (0..n).filter(|l| ready(*l)).collect();
            prop_assert!(!able.is_empty(), "deadlock");
            let l = able[choose(able.len())];
            let uses = &self.flow.calls[l].uses;
            let written: Vec<usize> =
                uses.iter().filter(|u| u.access != Access::Read).map(|u| u.buffer).collect();
            let reads = uses.iter().filter(|u| matches!(u.access, Access::Read | Access::Update));
            let donated_to = |r: usize| {
                self.flow.calls[l]
                    .aliases
                    .iter()
                    .any(|(w, from)| *from == r && self.offsets[*w] == self.offsets[r])
            };
            if phase[l] == 0 {
                for u in reads {
                    self.expect(u.buffer, sees[l][u.buffer], "as its reader starts")?;
                }
                for b in written {
                    self.write(b, tag(l, b));
                }
            } else {
                for u in reads.filter(|u| u.access == Access::Read && !donated_to(u.buffer)) {
                    self.expect(u.buffer, sees[l][u.buffer], "as its reader ends")?;
                }
                for b in written {
                    self.expect(b, tag(l, b), "as its writer ends")?;
                }
            }
            phase[l] += 1;
        }
        for (b, buffer) in self.flow.buffers.iter().enumerate() {
            if buffer.result {
                self.expect(b, version[b], "at the end")?;
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn no_buffer_is_overwritten_while_it_lives(
        inputs in prop::collection::vec(1..80u64, 1..4),
        recipes in prop::collection::vec(recipe(), 1..14),
        results in prop::collection::vec(any::<prop::sample::Index>(), 1..3),
        streams in 1..4u32,
        choices in prop::collection::vec(any::<prop::sample::Index>(), 200),
    ) {
        let flow = random_flow(&inputs, &recipes, &results);
        let slots = flow.schedule(streams);
        let placement = place(&flow, &slots, streams).unwrap();
        prop_assert!(placement.lower_bound <= placement.arena_bytes);
        let Placement { offsets, arena_bytes, .. } = &placement;
        check_placement(&flow, &slots, streams, offsets, *arena_bytes).unwrap();
        for shift in 0..8 {
            let mut machine = Machine {
                flow: &flow,
                slots: &slots,
                offsets,
                memory: vec![u32::MAX; *arena_bytes as usize],
                states: vec![u32::MAX; flow.buffers.len()],
            };
            let mut choices = choices.iter().cycle().skip(shift * 23);
            machine.run(&mut |n| choices.next().unwrap().index(n))?;
        }
        prop_assert_eq!(place(&flow, &slots, streams).unwrap(), placement, "placement is reproducible");
    }

    /// What the check allows, the simulation bears out: wherever a buffer is moved to.
    #[test]
    fn the_check_agrees_with_the_simulation(
        inputs in prop::collection::vec(1..40u64, 1..3),
        recipes in prop::collection::vec(recipe(), 1..7),
        results in prop::collection::vec(any::<prop::sample::Index>(), 1..2),
        streams in 1..3u32,
        moved in any::<prop::sample::Index>(),
        to in 0..12u64,
        choices in prop::collection::vec(any::<prop::sample::Index>(), 200),
    ) {
        let flow = random_flow(&inputs, &recipes, &results);
        let slots = flow.schedule(streams);
        let Placement { mut offsets, arena_bytes, .. } = place(&flow, &slots, streams).unwrap();
        let arena_bytes = arena_bytes + 12 * ALIGN;
        let placed: Vec<usize> = (0..offsets.len()).filter(|b| offsets[*b].is_some()).collect();
        offsets[*moved.get(&placed)] = Some(to * ALIGN);
        if check_placement(&flow, &slots, streams, &offsets, arena_bytes).is_ok() {
            for shift in 0..8 {
                let mut machine = Machine {
                    flow: &flow,
                    slots: &slots,
                    offsets: &offsets,
                    memory: vec![u32::MAX; arena_bytes as usize],
                    states: vec![u32::MAX; flow.buffers.len()],
                };
                let mut choices = choices.iter().cycle().skip(shift * 23);
                machine.run(&mut |n| choices.next().unwrap().index(n))?;
            }
        }
    }
}
