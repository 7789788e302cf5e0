//! Measuring speed with llama-bench's habits: prompts (`pp512`) and generation (`tg128`), at a depth, repeated.
//!
//! Only steps are timed. Tokens are random and drawn before; nothing is tokenised or sampled. A step ends when the host has
//! what it asked for: a copy of the logits, or the chosen token. Each sequence is filled up to the depth before the first
//! repetition, and truncated to it after each.

mod bandwidth;
pub mod compare;
mod first_token;
mod machine;
pub(crate) mod measurement;
mod profile;
pub mod recorded;
pub mod run;
mod timer;
mod trend;

pub use bandwidth::{BandwidthError, read_bandwidth};
pub use first_token::FirstToken;
pub use machine::{cores, cpu_name};
pub use measurement::Measurement;
pub use profile::{Arithmetic, KernelTime, LaunchTime, NodeTime, Profile, filled, step_of};
pub use timer::{Scope, Timed, Timer};
pub use trend::trend;

use crate::ir::Syms;
use crate::plan::Output;
use crate::runtime::{BatchError, Executor, Part, SequenceId, Sequences, Wanted};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

#[cfg(doc)]
use crate::compile::Purpose;

/// The seed of the tokens: every run reads the same ones.
const SEED: u64 = 0x5147;

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// What each sequence does.
    pub work: Work,
    /// Tokens that each sequence has before.
    pub depth: u64,
    /// Sequences at once.
    pub sequences: u64,
}

/// What is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reading a prompt of so many tokens in chunks, with the logits of the last.
    Prompt(u64),
    /// Generating token by token, each with its logits or, without, chosen on the device.
    Generate { tokens: u64, logits: bool },
}

impl Test {
    /// Tokens of one repetition, of all sequences together.
    pub fn tokens(&self) -> u64 {
        self.length().saturating_mul(self.sequences)
    }

    /// Tokens of each sequence.
    fn length(&self) -> u64 {
        match self.work {
            Work::Prompt(tokens) | Work::Generate { tokens, .. } => tokens,
        }
    }

    /// Tokens that each sequence must hold, saturating.
    pub fn context(&self) -> u64 {
        self.depth.saturating_add(self.length())
    }

    /// Whether logits are copied to the host within the time.
    pub fn logits(&self) -> bool {
        !matches!(self.work, Work::Generate { logits: false, .. })
    }
}

/// llama-bench's name, such as `tg128 @ d4096`, and how many sequences if not one: `tg128 b8`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.work {
            Work::Prompt(n) => write!(f, "pp{n}")?,
            Work::Generate { tokens, .. } => write!(f, "tg{tokens}")?,
        }
        if self.depth > 0 {
            write!(f, " @ d{}", self.depth)?;
        }
        if self.sequences != 1 {
            write!(f, " b{}", self.sequences)?;
        }
        if !self.logits() {
            f.write_str(" (no logits)")?;
        }
        Ok(())
    }
}

/// The tests that llama-bench makes of these lists, in its order, generation also without logits: for each depth and number
/// of sequences the prompts, then generation. A length of 0 stands for no test.
pub fn tests(prompts: &[u64], generations: &[u64], depths: &[u64], sequences: &[u64]) -> Vec<Test> {
    let mut tests = vec![];
    for (&depth, &sequences) in depths.iter().flat_map(|d| sequences.iter().map(move |b| (d, b))) {
        let prompts = prompts.iter().map(|&n| Work::Prompt(n));
        let generations = generations
            .iter()
            .flat_map(|&tokens| [true, false].map(|logits| Work::Generate { tokens, logits }));
        tests.extend(prompts.chain(generations).map(|work| Test { work, depth, sequences }));
    }
    tests.retain(|test| test.tokens() > 0);
    tests
}

/// A test that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(
        "the plan was compiled for greedy decoding and returns no logits; compile it again without --greedy"
    )]
    NoLogits,
    #[error("{test} takes {} sequences, and the plan was compiled for {most}", .test.sequences)]
    Sequences { test: Test, most: u64 },
    #[error("{test} is more than one step, which takes up to {most} tokens")]
    Step { test: Test, most: u64 },
    #[error("{test} needs a context of {needs}, not {context}; give a larger one (-c), or none")]
    Context { test: Test, needs: u64, context: u64 },
}

/// Makes sure that `context` suffices for all of `tests`.
///
/// # Errors
/// Names the first test that needs more.
pub fn check_context(tests: &[Test], context: u64) -> Result<(), BenchError> {
    match tests.iter().find(|test| test.context() > context) {
        Some(&test) => Err(BenchError::Context { test, needs: test.context(), context }),
        None => Ok(()),
    }
}

/// Runs tests on a plan.
pub struct Bench {
    sequences: Sequences,
    rng: ChaCha8Rng,
    /// Token ids lie below.
    vocabulary: u32,
    clock: Clock,
}

/// The time since some moment.
type Clock = Box<dyn FnMut() -> Duration>;

impl Bench {
    /// `executor` holds a plan of [`Purpose::Bench`].
    ///
    /// # Errors
    /// If its kernels do not agree on the pages of the caches.
    pub fn new(executor: Executor) -> Result<Bench, BenchError> {
        let vocabulary = u32::try_from(executor.plan().vocabulary().unwrap_or(1)).unwrap_or(u32::MAX).max(1);
        let start = Instant::now();
        let clock = Box::new(move || start.elapsed());
        let sequences = Sequences::new(executor)?;
        Ok(Bench { sequences, rng: ChaCha8Rng::seed_from_u64(SEED), vocabulary, clock })
    }

    /// The executor underneath.
    pub fn executor(&self) -> &Executor {
        self.sequences.executor()
    }

    /// Measures `test`, after one repetition that does not count if `warm_up`.
    ///
    /// # Errors
    /// If the context is too small or the device fails.
    pub fn measure(
        &mut self,
        test: &Test,
        repetitions: u64,
        warm_up: bool,
    ) -> Result<Measurement, BenchError> {
        check_context(&[*test], self.sequences.context())?;
        let mut ids: Vec<SequenceId> =
            (0..test.sequences).map(|_| self.sequences.begin()).collect::<Result<_, _>>()?;
        self.read(&ids, test.depth)?;
        if warm_up {
            self.repetition(test, &mut ids)?;
        }
        let mut measurement = Measurement::new(test.tokens());
        for _ in 0..repetitions {
            measurement.add(&self.repetition(test, &mut ids)?);
        }
        ids.into_iter().try_for_each(|id| self.sequences.end(id))?;
        Ok(measurement)
    }

    /// The bytes of weights and cache that a step of generation moves, on average over a repetition; none for prompts, whose
    /// speed is one of arithmetic. See [`crate::plan::Plan::bytes_per_step`].
    pub fn bytes_per_step(&self, test: &Test) -> Option<u64> {
        let Work::Generate { logits, .. } = test.work else { return None };
        let (plan, b) = (self.executor().plan(), test.sequences);
        let program = plan.program_for(b, b, output(logits))?;
        let window = self.window();
        let at = |length: u64| plan.bytes_per_step(program, &Syms { t: b, r: b }, b.saturating_mul(length));
        // The bytes grow by the same amount from step to step, until the window is full.
        let (first, last) = (test.depth.saturating_add(1), test.context());
        if window < last {
            let growing = window.max(first) - first;
            let steps = (last + 1).saturating_sub(first).max(1);
            let grown = u128::from(at(first)?.midpoint(at(window.max(first + 1) - 1)?)) * u128::from(growing);
            let full = u128::from(at(window)?) * u128::from(steps - growing);
            return u64::try_from((grown + full) / u128::from(steps)).ok();
        }
        Some(at(first)?.midpoint(at(last)?))
    }

    /// Positions that a token sees at most: of rows that a window hides, nothing is read.
    fn window(&self) -> u64 {
        let paging = self.executor().plan().paging().ok().flatten();
        paging.and_then(|paging| paging.window).unwrap_or(u64::MAX)
    }

    /// Reads `length` random tokens into each sequence.
    fn read(&mut self, ids: &[SequenceId], length: u64) -> Result<(), BatchError> {
        let (tokens, wanted) = (self.random(length), Wanted::None);
        for &sequence in ids {
            for tokens in tokens.chunks(self.chunk()) {
                self.sequences.step(&[Part { sequence, tokens, wanted }], Output::Logits)?;
            }
        }
        Ok(())
    }

    /// The time of each step of one repetition in nanoseconds. It leaves the sequences as they were.
    fn repetition(&mut self, test: &Test, ids: &mut [SequenceId]) -> Result<Vec<u64>, BatchError> {
        let times = self.steps(test, ids)?;
        self.rewind(test, ids)?;
        Ok(times)
    }

    /// The time of each step of one repetition in nanoseconds.
    fn steps(&mut self, test: &Test, ids: &[SequenceId]) -> Result<Vec<u64>, BatchError> {
        let steps = match test.work {
            Work::Prompt(tokens) => self.prompts(ids, tokens),
            Work::Generate { tokens, .. } => generations(ids, tokens),
        };
        let tokens = self.random(test.length());
        let output = output(test.logits());
        let mut times = Vec::with_capacity(steps.len());
        let mut before = (self.clock)();
        for step in &steps {
            let part = |(sequence, range, wanted): &(SequenceId, Range<usize>, Wanted)| Part {
                sequence: *sequence,
                tokens: &tokens[range.clone()],
                wanted: *wanted,
            };
            let parts: Vec<Part<'_>> = step.iter().map(part).collect();
            self.sequences.step(&parts, output)?;
            match (parts.iter().any(|part| part.wanted != Wanted::None), output) {
                (true, Output::Logits) => {
                    let wanted = self.sequences.last_rows().wanted.len();
                    black_box(self.sequences.view_logits(0..wanted)?);
                }
                (true, Output::Token) => _ = black_box(self.sequences.best_tokens()?.first().copied()),
                (false, _) => self.sequences.wait()?,
            }
            let now = (self.clock)();
            times.push(u64::try_from((now - before).as_nanos()).unwrap_or(u64::MAX));
            before = now;
        }
        Ok(times)
    }

    /// Leaves the sequences as they were before a repetition.
    fn rewind(&mut self, test: &Test, ids: &mut [SequenceId]) -> Result<(), BatchError> {
        for id in ids.iter_mut() {
            match self.sequences.truncate(*id, test.depth) {
                // A window has left behind what is to be seen again.
                Err(BatchError::Truncate { .. }) => {
                    self.sequences.end(*id)?;
                    *id = self.sequences.begin()?;
                    self.read(&[*id], test.depth)?;
                }
                done => done?,
            }
        }
        Ok(())
    }

    /// The steps in which each sequence reads a prompt: as many tokens in each as fit, one sequence after the other.
    fn prompts(&self, ids: &[SequenceId], length: u64) -> Vec<Step> {
        let (chunk, length) = (self.chunk(), length as usize);
        let (mut steps, mut room) = (vec![], 0);
        for &sequence in ids {
            let mut read = 0;
            while read < length {
                if room == 0 {
                    steps.push(vec![]);
                    room = chunk;
                }
                let n = room.min(length - read);
                let wanted = if read + n == length { Wanted::Last } else { Wanted::None };
                if let Some(step) = steps.last_mut() {
                    step.push((sequence, read..read + n, wanted));
                }
                (read, room) = (read + n, room - n);
            }
        }
        steps
    }

    fn chunk(&self) -> usize {
        self.executor().plan().largest(Output::Logits).t.max(1) as usize
    }

    /// So many random tokens.
    pub fn random(&mut self, n: u64) -> Vec<u32> {
        (0..n).map(|_| self.rng.random_range(0..self.vocabulary)).collect()
    }
}

/// Of each sequence, which of its tokens it reads, and which rows are wanted.
type Step = Vec<(SequenceId, Range<usize>, Wanted)>;

/// The steps in which each sequence goes on by one token.
fn generations(ids: &[SequenceId], tokens: u64) -> Vec<Step> {
    let step = |i: usize| ids.iter().map(|&id| (id, i..i + 1, Wanted::Last)).collect();
    (0..tokens as usize).map(step).collect()
}

fn output(logits: bool) -> Output {
    if logits { Output::Logits } else { Output::Token }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::spec::{Access, Arg};
    use crate::compile::{Options, Purpose};
    use crate::ir::Dim;
    use crate::model;
    use crate::plan::Plan;
    use crate::target::Target;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    const fn prompt(n: u64, depth: u64) -> Test {
        Test { work: Work::Prompt(n), depth, sequences: 1 }
    }

    const fn generate(tokens: u64, depth: u64, logits: bool) -> Test {
        Test { work: Work::Generate { tokens, logits }, depth, sequences: 1 }
    }

    fn bench(context: u64, chunk: u64, sequences: u64) -> Bench {
        let file = Arc::new(model::embedded().unwrap());
        let options = Options { context: Some(context), chunk, sequences, ..Options::new(Target::cpu()) };
        let one_thread = crate::runtime::DeviceOptions { threads: Some(1), ..Default::default() };
        Bench::new(model::executor(&file, None, &options, Purpose::Bench, &one_thread).unwrap()).unwrap()
    }

    #[test]
    fn tests_are_named_and_ordered_as_others_do() {
        let names = |p: &[u64], n: &[u64], d: &[u64], b: &[u64]| -> Vec<String> {
            tests(p, n, d, b).iter().map(Test::to_string).collect()
        };
        assert_eq!(names(&[512], &[128], &[0], &[1]), ["pp512", "tg128", "tg128 (no logits)"]);
        assert_eq!(
            names(&[0, 16], &[8], &[0, 4096], &[1]),
            ["pp16", "tg8", "tg8 (no logits)", "pp16 @ d4096", "tg8 @ d4096", "tg8 @ d4096 (no logits)"]
        );
        assert_eq!(
            names(&[16], &[8], &[2], &[1, 4])[3..],
            ["pp16 @ d2 b4", "tg8 @ d2 b4", "tg8 @ d2 b4 (no logits)"]
        );
        assert_eq!(tests(&[0], &[0], &[0, 1], &[1]), []);
    }

    #[test]
    fn a_context_must_hold_depth_and_tokens() {
        let all = [prompt(16, 0), generate(8, 16, true)];
        check_context(&all, 24).unwrap();
        let error = check_context(&all, 23).unwrap_err().to_string();
        assert_eq!(error, "tg8 @ d16 needs a context of 24, not 23; give a larger one (-c), or none");
        assert!(check_context(&[prompt(u64::MAX, 1)], 1 << 40).is_err());
        assert!(bench(8, 8, 1).measure(&prompt(8, 1), 1, false).is_err());
    }

    /// The launches of one step of each of these programs together, by kernel. Of a step without results, what only they need
    /// is not launched.
    fn launches(plan: &Plan, programs: &[(&str, u64)]) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for (program, times) in programs.iter().filter(|(_, times)| *times > 0) {
            let (name, wanted) = program.split_once(' ').map_or((*program, true), |(name, _)| (name, false));
            let program = plan.programs.iter().find(|p| p.name == name).unwrap();
            for call in &program.calls {
                let kernel = &plan.kernels[call.kernel as usize];
                let of_wanted = |arg: &Arg| arg.access == Access::Read || arg.ty.first() == Dim::R;
                if wanted || !kernel.spec.args.iter().all(of_wanted) {
                    let launches = kernel.launches.len() as u64;
                    *counts.entry(kernel.spec.name()).or_default() += times * launches;
                }
            }
        }
        counts
    }

    #[test]
    fn every_step_of_every_repetition_is_timed_and_nothing_else() {
        // What the cache is filled by, then what a repetition runs: most chunks without a head, as a session does.
        for (test, fill, steps) in [
            (prompt(20, 0), 0, &[("t8 none", 2), ("t8", 1)][..]),
            (prompt(8, 24), 3, &[("t8", 1)]),
            (prompt(9, 7), 1, &[("t8 none", 1), ("t1", 1)]),
            (generate(5, 0, true), 0, &[("t1", 5)]),
            (generate(3, 29, false), 4, &[("t1_greedy", 3)]),
            (Test { sequences: 3, ..prompt(6, 2) }, 3, &[("t8", 3)]),
            (Test { sequences: 3, ..generate(2, 8, true) }, 3, &[("t8", 2)]),
            (Test { sequences: 2, ..generate(2, 8, false) }, 2, &[("t8_greedy", 2)]),
        ] {
            for warm_up in [false, true] {
                let mut bench = bench(32, 8, 3);
                // Between two looks at this clock passes a nanosecond more each time, so that a time tells when it was.
                let (mut looks, mut time) = (0, 0);
                bench.clock = Box::new(move || {
                    looks += 1;
                    time += looks;
                    Duration::from_nanos(time)
                });
                let measured = bench.measure(&test, 2, warm_up).unwrap();
                let n: u64 = steps.iter().map(|(_, times)| times).sum();
                // A repetition looks once as it begins, and after each step.
                let skipped = u64::from(warm_up) * (n + 1);
                let times: Vec<u64> =
                    (0..2).flat_map(|r| (0..n).map(move |step| skipped + r * (n + 1) + step + 2)).collect();
                assert_eq!(measured.steps_ns(), times, "{test}");
                let samples: Vec<u64> = times.chunks(n as usize).map(|steps| steps.iter().sum()).collect();
                assert_eq!(measured.samples_ns(), samples, "{test}");

                // Each repetition begins at the depth.
                let last = bench.sequences.last_rows();
                let positions = last.positions.iter().max().map(|p| *p as u64 + 1);
                assert_eq!(positions, Some(test.context()), "{test}");

                let repetitions = 2 + u64::from(warm_up);
                let mut ran = vec![("t8 none", fill)];
                ran.extend(steps.iter().map(|(program, times)| (*program, times * repetitions)));
                let counts: BTreeMap<_, _> = bench.executor().launch_counts().into_iter().collect();
                assert_eq!(counts, launches(bench.executor().plan(), &ran), "{test}");
            }
        }
    }

    #[test]
    fn the_clock_is_that_of_the_machine() {
        let mut bench = bench(8, 8, 1);
        let before = (bench.clock)();
        std::thread::sleep(Duration::from_millis(2));
        assert!((bench.clock)() - before >= Duration::from_millis(2));
    }

    #[test]
    fn decode_reads_every_weight_once_and_the_filled_cache() {
        let bench = bench(256, 64, 4);
        let gguf = model::embedded().unwrap();
        let gguf = gguf.gguf();
        // The head is the embedding, so every tensor is read whole.
        let weights: u64 = gguf.tensors.values().map(|t| t.bytes).sum();
        let key = |name: &str| gguf.u64(&format!("llama.{name}")).unwrap();
        let head_dim = key("embedding_length") / key("attention.head_count");
        let row = 2 * key("block_count") * key("attention.head_count_kv") * head_dim * 2;
        for logits in [true, false] {
            assert_eq!(bench.bytes_per_step(&generate(1, 0, logits)), Some(weights + 2 * row));
            assert_eq!(bench.bytes_per_step(&generate(1, 100, logits)), Some(weights + 102 * row));
            // Steps at 100, 101, 102: as the middle one.
            assert_eq!(bench.bytes_per_step(&generate(3, 100, logits)), Some(weights + 103 * row));
        }
        assert_eq!(bench.bytes_per_step(&prompt(16, 0)), None);
        // Four rows of the embedding are no more than all of it; each sequence has a cache of its own.
        let four = Test { sequences: 4, ..generate(1, 100, true) };
        assert_eq!(bench.bytes_per_step(&four), Some(weights + 4 * 102 * row));
    }

    /// Kernels share the time of a step, and move what the step does and the activations between them.
    #[test]
    fn a_profile_has_every_call_of_the_step() {
        let mut bench = bench(64, 16, 2);
        for (test, program) in [(prompt(16, 3), "t16"), (prompt(5, 0), "t8"), (generate(1, 20, true), "t1")] {
            let profile = bench.profile(&test, 3).unwrap();
            assert_eq!((profile.program.as_str(), profile.steps), (program, 3));
            let plan = bench.executor().plan();
            let planned = plan.programs.iter().find(|p| p.name == program).unwrap();
            let sum = |of: fn(&KernelTime) -> u64| profile.kernels.iter().map(of).sum::<u64>();
            assert_eq!(sum(|k| k.calls), planned.calls.len() as u64, "{test}");
            assert_eq!(sum(|k| k.launches), planned.calls.len() as u64, "{test}");
            assert!(profile.kernels.is_sorted_by_key(|k| u64::MAX - k.ns));
            assert!(profile.step_ns > Some(0) && profile.kernels_ns() > 0);
            if let Some(bytes) = bench.bytes_per_step(&test) {
                assert!(sum(|k| k.work.bytes) > bytes);
            }
            // Two for each element of a matrix and each token, but those of the last layer and the head, which are of the rows wanted.
            let least = if profile.at.t == 1 { 12_000_000 } else { 6_000_000 };
            let operations = sum(|k| k.work.operations);
            assert!(
                (2 * least * profile.at.t..30_000_000 * profile.at.t).contains(&operations),
                "{test}: {operations}"
            );
        }
        let more = bench.profile(&prompt(17, 0), 1).unwrap_err().to_string();
        assert_eq!(more, "pp17 is more than one step, which takes up to 16 tokens");
        // It leaves sequences and steps as it found them.
        bench.measure(&prompt(16, 0), 1, true).unwrap();
    }
}
