//! Measuring speed with llama-bench's habits: prompts (`pp512`) and generation (`tg128`), at a depth, repeated.
//!
//! Only steps are timed. Tokens are random and drawn before; nothing is tokenised or sampled. A step ends when the host has
//! what it asked for: a copy of the logits, or the chosen token. The cache is filled up to the depth before the first
//! repetition; as a step reads no row beyond its own, every repetition then begins from the same cache.

mod bandwidth;
mod measurement;

pub use bandwidth::{BandwidthError, read_bandwidth};
pub use measurement::Measurement;

use crate::ir::Syms;
use crate::runtime::{ExecError, Executor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

#[cfg(doc)]
use crate::compile::Purpose;

/// The seed of the tokens: every run reads the same ones.
const SEED: u64 = 0x5147;

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    pub work: Work,
    /// Tokens in the cache before.
    pub depth: u64,
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
    /// Tokens of one repetition.
    pub fn tokens(&self) -> u64 {
        match self.work {
            Work::Prompt(tokens) | Work::Generate { tokens, .. } => tokens,
        }
    }

    /// Tokens that the cache must hold, saturating.
    pub fn context(&self) -> u64 {
        self.depth.saturating_add(self.tokens())
    }

    /// Whether logits are copied to the host within the time.
    pub fn logits(&self) -> bool {
        !matches!(self.work, Work::Generate { logits: false, .. })
    }
}

/// llama-bench's name, such as `tg128 @ d4096`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.work {
            Work::Prompt(n) => write!(f, "pp{n}")?,
            Work::Generate { tokens, .. } => write!(f, "tg{tokens}")?,
        }
        if self.depth > 0 {
            write!(f, " @ d{}", self.depth)?;
        }
        if !self.logits() {
            f.write_str(" (no logits)")?;
        }
        Ok(())
    }
}

/// The tests that llama-bench makes of these lists, in its order, generation also without logits: for each depth the
/// prompts, then generation. A length of 0 stands for no test.
pub fn tests(prompts: &[u64], generations: &[u64], depths: &[u64]) -> Vec<Test> {
    let mut tests = vec![];
    for &depth in depths {
        let prompts = prompts.iter().map(|&n| Work::Prompt(n));
        let generations = generations
            .iter()
            .flat_map(|&tokens| [true, false].map(|logits| Work::Generate { tokens, logits }));
        tests.extend(prompts.chain(generations).map(|work| Test { work, depth }));
    }
    tests.retain(|test| test.tokens() > 0);
    tests
}

/// A test that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Exec(#[from] ExecError),
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
    executor: Executor,
    rng: ChaCha8Rng,
    /// Token ids lie below.
    vocabulary: i32,
    logits: Vec<f32>,
    clock: Clock,
}

/// The time since some moment.
type Clock = Box<dyn FnMut() -> Duration>;

impl Bench {
    /// `executor` holds a plan of [`Purpose::Bench`].
    pub fn new(executor: Executor) -> Bench {
        let inputs = executor.plan().programs.values().flat_map(|program| &program.inputs);
        let below = inputs.filter_map(|input| input.below).min().unwrap_or(1);
        let vocabulary = i32::try_from(below).unwrap_or(i32::MAX).max(1);
        let start = Instant::now();
        let clock = Box::new(move || start.elapsed());
        Bench { executor, rng: ChaCha8Rng::seed_from_u64(SEED), vocabulary, logits: vec![], clock }
    }

    /// The executor underneath.
    pub fn executor(&self) -> &Executor {
        &self.executor
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
        check_context(&[*test], self.executor.plan().options.context)?;
        self.fill(test.depth)?;
        if warm_up {
            self.repetition(test)?;
        }
        let mut measurement = Measurement::new(test.tokens());
        for _ in 0..repetitions {
            measurement.add(&self.repetition(test)?);
        }
        Ok(measurement)
    }

    /// The bytes of weights and cache that a step of generation moves, on average over a repetition; none for prompts, whose
    /// speed is one of arithmetic. See [`crate::runtime::plan::Plan::bytes_per_step`].
    pub fn bytes_per_step(&self, test: &Test) -> Option<u64> {
        let Work::Generate { logits, .. } = test.work else { return None };
        let plan = self.executor.plan();
        let at = |p| plan.bytes_per_step(decode(logits), &Syms { t: 1, p, s: plan.options.context });
        // The bytes grow by the same amount from step to step, so the average is that of the ends.
        let (first, last) = (at(test.depth)?, at(test.context().saturating_sub(1))?);
        Some(first.midpoint(last))
    }

    /// Empties the cache and reads `depth` tokens into it.
    fn fill(&mut self, depth: u64) -> Result<(), ExecError> {
        self.executor.reset()?;
        let tokens = self.random(depth);
        let mut cached = 0;
        for chunk in tokens.chunks(self.chunk()) {
            self.executor.forward("chunk", chunk, cached)?;
            cached += chunk.len() as u64;
        }
        Ok(())
    }

    /// The time of each step of one repetition in nanoseconds.
    fn repetition(&mut self, test: &Test) -> Result<Vec<u64>, ExecError> {
        let tokens = self.random(test.tokens());
        let per_step = if matches!(test.work, Work::Prompt(_)) { self.chunk() } else { 1 };
        let steps = tokens.len().div_ceil(per_step);
        let mut times = Vec::with_capacity(steps);
        let mut cached = test.depth;
        let mut before = (self.clock)();
        for (step, tokens) in tokens.chunks(per_step).enumerate() {
            let (program, logits) = match test.work {
                Work::Prompt(_) if step + 1 < steps => ("chunk", None),
                Work::Prompt(_) => ("prefill", Some(true)),
                Work::Generate { logits, .. } => (decode(logits), Some(logits)),
            };
            self.executor.forward(program, tokens, cached)?;
            match logits {
                Some(true) => {
                    self.logits.clear();
                    self.logits.extend_from_slice(self.executor.result_f32(0)?);
                    black_box(&self.logits);
                }
                Some(false) => _ = black_box(self.executor.result_i32(0)?.first().copied()),
                None => {}
            }
            cached += tokens.len() as u64;
            let now = (self.clock)();
            times.push(u64::try_from((now - before).as_nanos()).unwrap_or(u64::MAX));
            before = now;
        }
        Ok(times)
    }

    fn chunk(&self) -> usize {
        usize::try_from(self.executor.plan().options.chunk).unwrap_or(usize::MAX).max(1)
    }

    fn random(&mut self, n: u64) -> Vec<i32> {
        (0..n).map(|_| self.rng.random_range(0..self.vocabulary)).collect()
    }
}

/// The program that generates with logits or without.
fn decode(logits: bool) -> &'static str {
    if logits { "decode" } else { "decode_greedy" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{Options, Purpose};
    use crate::model;
    use crate::runtime::plan::Plan;
    use crate::target::Target;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    const fn prompt(n: u64, depth: u64) -> Test {
        Test { work: Work::Prompt(n), depth }
    }

    const fn generate(tokens: u64, depth: u64, logits: bool) -> Test {
        Test { work: Work::Generate { tokens, logits }, depth }
    }

    fn bench(context: u64, chunk: u64) -> Bench {
        let file = Arc::new(model::embedded().unwrap());
        let options = Options { context: Some(context), chunk, ..Options::new(Target::cpu()) };
        Bench::new(model::executor(&file, None, &options, Purpose::Bench, Some(1)).unwrap())
    }

    #[test]
    fn tests_are_named_and_ordered_as_others_do() {
        let names = |p: &[u64], n: &[u64], d: &[u64]| -> Vec<String> {
            tests(p, n, d).iter().map(Test::to_string).collect()
        };
        assert_eq!(names(&[512], &[128], &[0]), ["pp512", "tg128", "tg128 (no logits)"]);
        assert_eq!(
            names(&[0, 16], &[8], &[0, 4096]),
            ["pp16", "tg8", "tg8 (no logits)", "pp16 @ d4096", "tg8 @ d4096", "tg8 @ d4096 (no logits)"]
        );
        assert_eq!(tests(&[0], &[0], &[0, 1]), []);
    }

    #[test]
    fn a_context_must_hold_depth_and_tokens() {
        let all = [prompt(16, 0), generate(8, 16, true)];
        check_context(&all, 24).unwrap();
        let error = check_context(&all, 23).unwrap_err().to_string();
        assert_eq!(error, "tg8 @ d16 needs a context of 24, not 23; give a larger one (-c), or none");
        assert!(check_context(&[prompt(u64::MAX, 1)], 1 << 40).is_err());
        assert!(bench(8, 8).measure(&prompt(8, 1), 1, false).is_err());
    }

    /// The launches of one step of each of these programs together, by kernel.
    fn launches(plan: &Plan, programs: &[(&str, u64)]) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for (program, times) in programs.iter().filter(|(_, times)| *times > 0) {
            for launch in &plan.programs[*program].launches {
                *counts.entry(plan.kernels[launch.kernel as usize].name()).or_default() += times;
            }
        }
        counts
    }

    #[test]
    fn every_step_of_every_repetition_is_timed_and_nothing_else() {
        // What the cache is filled by, then what a repetition runs: most chunks without a head, as a session does.
        for (test, fill, steps) in [
            (prompt(20, 0), 0, &[("chunk", 2), ("prefill", 1)][..]),
            (prompt(8, 24), 3, &[("prefill", 1)]),
            (prompt(9, 7), 1, &[("chunk", 1), ("prefill", 1)]),
            (generate(5, 0, true), 0, &[("decode", 5)]),
            (generate(3, 29, false), 4, &[("decode_greedy", 3)]),
        ] {
            for warm_up in [false, true] {
                let mut bench = bench(32, 8);
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
                let last = bench.executor().last().unwrap();
                assert_eq!(last.p + last.t, test.context(), "{test}");

                let repetitions = 2 + u64::from(warm_up);
                let mut ran = vec![("chunk", fill)];
                ran.extend(steps.iter().map(|(program, times)| (*program, times * repetitions)));
                let counts: BTreeMap<_, _> = bench.executor().launch_counts().into_iter().collect();
                assert_eq!(counts, launches(bench.executor().plan(), &ran), "{test}");
            }
        }
    }

    #[test]
    fn the_clock_is_that_of_the_machine() {
        let mut bench = bench(8, 8);
        let before = (bench.clock)();
        std::thread::sleep(Duration::from_millis(2));
        assert!((bench.clock)() - before >= Duration::from_millis(2));
    }

    #[test]
    fn decode_reads_every_weight_once_and_the_filled_cache() {
        let bench = bench(256, 64);
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
    }
}
