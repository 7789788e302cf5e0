//! A persistent set of threads with cheap barriers.
//!
//! A step of a model is one [`Threads::run`]: all threads enter the job together and walk over the launches, sharing each with
//! [`Worker::share`], which ends in a barrier. So threads are woken once a step, and between launches they spin.

use std::any::Any;
use std::cell::UnsafeCell;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// More threads than any machine has use for.
const MAX_THREADS: usize = 1024;
/// Bytes of stack of a thread: far more than a kernel uses, as a panic takes much to say where it came from.
const STACK: usize = 2 << 20;
const _: () = assert!(STACK >= 4 * super::STACK);
/// How long an idle thread spins for the next job before it sleeps.
const LINGER: Duration = Duration::from_micros(50);
/// Turns of a barrier's spin before each further one gives up the core: some 10 µs.
const SPINS: u32 = 400;

/// Why there are no threads.
#[derive(Debug, Error)]
pub enum ThreadsError {
    #[error("the number of threads must lie in 1..={MAX_THREADS}, not {0}")]
    Threads(usize),
    #[error("cannot start a thread: {0}")]
    Spawn(#[from] std::io::Error),
}

/// Threads that run one job at a time, together.
pub struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    /// Held while a job runs.
    turn: Mutex<()>,
}

/// A thread's view of the job it is in.
pub struct Worker<'a> {
    index: usize,
    shared: &'a Shared,
}

type Job<'a> = dyn Fn(&Worker<'_>) + Sync + 'a;
type Payload = Box<dyn Any + Send>;

/// Keeps what different threads write off each other's cache lines.
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

struct Shared {
    threads: usize,
    /// The current job; written between jobs only, by the thread that holds the turn.
    job: UnsafeCell<Option<&'static Job<'static>>>,
    /// Counts jobs; a change of it starts one.
    epoch: Line<AtomicUsize>,
    /// Threads still in the job.
    inside: Line<AtomicUsize>,
    /// Threads waiting at the barrier, barriers passed, and the next unclaimed item of what is shared.
    arrived: Line<AtomicUsize>,
    passed: Line<AtomicUsize>,
    next: Line<AtomicUsize>,
    /// Threads asleep, for which the condition is signalled.
    sleepers: Mutex<usize>,
    wake: Condvar,
    stop: AtomicBool,
    /// A thread panicked: nobody may wait for it.
    failed: AtomicBool,
    payload: Mutex<Option<Payload>>,
}

// SAFETY: `job` is written by the thread that holds the turn, while no other thread is in a job; the release of `epoch`
// publishes it. Everything else is `Sync` by itself.
unsafe impl Sync for Shared {}
// SAFETY: the job is a shared reference to a `Sync` function.
unsafe impl Send for Shared {}

/// What threads unwind with when another one panicked.
struct Abandoned;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Threads {
    /// A set of `threads`, counting the one that calls [`Threads::run`]; as many as there are cores unless told.
    ///
    /// # Errors
    /// If `threads` is 0 or above 1024, or the system starts no more threads.
    pub fn new(threads: Option<usize>) -> Result<Threads, ThreadsError> {
        let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_THREADS);
        let threads = threads.unwrap_or_else(&cores);
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(ThreadsError::Threads(threads));
        }
        if threads > cores() {
            tracing::warn!(
                "{threads} threads share {} cores; they wait for each other, which is slow",
                cores()
            );
        }
        let shared = Arc::new(Shared {
            threads,
            job: UnsafeCell::new(None),
            epoch: Line::default(),
            inside: Line::default(),
            arrived: Line::default(),
            passed: Line::default(),
            next: Line::default(),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            payload: Mutex::new(None),
        });
        let mut team = Threads { shared, handles: vec![], turn: Mutex::new(()) };
        for index in 1..threads {
            let shared = team.shared.clone();
            let thread = std::thread::Builder::new().name(format!("sinter-{index}")).stack_size(STACK);
            team.handles.push(thread.spawn(move || shared.serve(index))?);
        }
        Ok(team)
    }

    /// How many threads a job runs on.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs `job` on every thread, the calling one being worker 0, and returns when all are done. Jobs of several callers take turns.
    ///
    /// All workers must make the same calls of [`Worker::share`] and [`Worker::barrier`] in the same order. A job must not run another
    /// on the same threads: it would wait for itself.
    ///
    /// # Panics
    /// If `job` does on any thread; the others leave it at their next barrier. They remain usable.
    pub fn run(&self, job: &(dyn Fn(&Worker<'_>) + Sync)) {
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        shared.arrived.0.store(0, Ordering::Relaxed);
        shared.next.0.store(0, Ordering::Relaxed);
        shared.failed.store(false, Ordering::Relaxed);
        shared.inside.0.store(shared.threads, Ordering::Relaxed);
        // SAFETY: only the lifetime changes. No thread is in a job, as the turn is held and the last one was waited for; all
        // are done with this one when `run` returns.
        unsafe { *shared.job.get() = Some(std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job)) };
        shared.start();
        shared.enter(0, job);
        let mut backoff = Backoff::default();
        while shared.inside.0.load(Ordering::Acquire) > 0 {
            backoff.wait();
        }
        let payload = lock(&shared.payload).take();
        drop(turn);
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.start();
        for handle in self.handles.drain(..) {
            // A thread catches what its jobs throw, so this cannot fail.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// Starts a new epoch and wakes who sleeps.
    fn start(&self) {
        let sleepers = lock(&self.sleepers);
        self.epoch.0.fetch_add(1, Ordering::Release);
        if *sleepers > 0 {
            self.wake.notify_all();
        }
    }

    /// The life of a thread: waits for epochs and runs their jobs.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.await_epoch(seen);
            seen += 1;
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the epoch published the job, which is left alone until this thread leaves it.
            if let Some(job) = unsafe { *self.job.get() } {
                self.enter(index, job);
            }
        }
    }

    /// Waits until the epoch is no longer `seen`: spinning first, then asleep.
    fn await_epoch(&self, seen: usize) {
        let changed = || self.epoch.0.load(Ordering::Acquire) != seen;
        let start = Instant::now();
        while start.elapsed() < LINGER {
            for _ in 0..16 {
                if changed() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        let mut sleepers = lock(&self.sleepers);
        *sleepers += 1;
        while !changed() {
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
    }

    /// Runs the job on this thread and leaves it, whatever happens.
    fn enter(&self, index: usize, job: &Job<'_>) {
        let result = catch_unwind(AssertUnwindSafe(|| job(&Worker { index, shared: self })));
        if let Err(payload) = result
            && !payload.is::<Abandoned>()
        {
            lock(&self.payload).get_or_insert(payload);
            self.failed.store(true, Ordering::Release);
        }
        self.inside.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Worker<'_> {
    /// Which worker this is, below [`Worker::threads`].
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many workers are in the job.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Splits `items` over the workers, whoever is free taking the next few from the iterator that `work` gets and must
    /// exhaust; when all are done, `after` runs on one thread, and then everybody goes on.
    pub fn share(
        &self,
        items: usize,
        work: impl FnOnce(&mut dyn Iterator<Item = Range<usize>>),
        after: impl FnOnce(),
    ) {
        // Large enough for the counter to cost nothing, small enough for a slow thread to be waited for shortly.
        let some = (items / (8 * self.shared.threads)).max(1);
        work(&mut std::iter::from_fn(|| {
            let start = self.shared.next.0.fetch_add(some, Ordering::Relaxed);
            (start < items).then(|| start..items.min(start + some))
        }));
        self.meet(after);
    }

    /// Waits until all workers are here; what they wrote before is seen by all after.
    pub fn barrier(&self) {
        self.meet(|| ());
    }

    /// A barrier whose last arrival runs `last` before the others go on.
    fn meet(&self, last: impl FnOnce()) {
        let shared = self.shared;
        let passed = shared.passed.0.load(Ordering::Relaxed);
        if shared.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == shared.threads {
            last();
            shared.next.0.store(0, Ordering::Relaxed);
            shared.arrived.0.store(0, Ordering::Relaxed);
            shared.passed.0.store(passed.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut backoff = Backoff::default();
        while shared.passed.0.load(Ordering::Acquire) == passed {
            // A worker that has left is never coming; one that left after this barrier has passed it.
            let left = shared.inside.0.load(Ordering::Acquire) < shared.threads;
            if left && shared.passed.0.load(Ordering::Acquire) == passed {
                if shared.failed.load(Ordering::Acquire) {
                    resume_unwind(Box::new(Abandoned));
                }
                panic!("a worker left the job while others wait for it at a barrier");
            }
            backoff.wait();
        }
    }
}

/// Spins for a while, then gives up the core between looks.
#[derive(Default)]
struct Backoff {
    turns: u32,
}

impl Backoff {
    fn wait(&mut self) {
        if self.turns < SPINS {
            self.turns += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    fn team(threads: usize) -> Threads {
        Threads::new(Some(threads)).unwrap()
    }

    #[test]
    fn every_item_is_done_once_and_stages_are_apart() {
        for threads in [1, 2, 3, 8, 13] {
            let team = team(threads);
            assert_eq!(team.threads(), threads);
            for items in [0, 1, 2, 7, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                let afters = AtomicUsize::new(0);
                team.run(&|worker| {
                    for stage in 0..20 {
                        let each = |range: Range<usize>| {
                            for c in &counts[range] {
                                assert_eq!(c.fetch_add(1, Ordering::Relaxed), stage);
                            }
                        };
                        worker.share(
                            items,
                            |items| items.for_each(each),
                            || {
                                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == stage + 1));
                                afters.fetch_add(1, Ordering::Relaxed);
                            },
                        );
                        assert_eq!(afters.load(Ordering::Relaxed) / (stage + 1), 1);
                        worker.barrier();
                    }
                });
                assert_eq!(afters.into_inner(), 20);
            }
        }
    }

    #[test]
    fn workers_have_indices_and_jobs_borrow() {
        let team = team(4);
        let seen: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..1000 {
            team.run(&|worker| {
                assert_eq!(worker.threads(), 4);
                seen[worker.index()].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1000));
    }

    #[test]
    fn sleepers_wake() {
        let team = team(3);
        for _ in 0..20 {
            std::thread::sleep(LINGER * 4);
            let count = AtomicUsize::new(0);
            team.run(&|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_spares_the_others() {
        let team = team(3);
        for culprit in [0, 1, 2] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|worker| {
                    worker.barrier();
                    if worker.index() == culprit {
                        std::panic::resume_unwind(Box::new("broken"));
                    }
                    worker.share(10, |items| items.for_each(drop), || ());
                    worker.barrier();
                });
            }));
            assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"broken"));
            let sum = AtomicU64::new(0);
            team.run(&|worker| {
                let add = |r: Range<usize>| {
                    sum.fetch_add(r.map(|i| i as u64).sum(), Ordering::Relaxed);
                };
                worker.share(100, |items| items.for_each(add), || ());
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn unequal_barriers_fail_instead_of_hanging() {
        let team = team(2);
        let job = |worker: &Worker<'_>| {
            if worker.index() == 0 {
                worker.barrier();
            }
        };
        let result = catch_unwind(AssertUnwindSafe(|| team.run(&job)));
        let message = *result.unwrap_err().downcast::<&str>().unwrap();
        assert!(message.contains("left the job"), "{message}");
    }

    #[test]
    fn callers_take_turns() {
        let team = team(2);
        let busy = AtomicBool::new(false);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..100 {
                        team.run(&|worker| {
                            if worker.index() == 0 {
                                assert!(!busy.swap(true, Ordering::AcqRel));
                            }
                            worker.share(
                                5,
                                |items| items.for_each(drop),
                                || busy.store(false, Ordering::Release),
                            );
                        });
                    }
                });
            }
        });
    }

    #[test]
    fn refuses_absurd_numbers_of_threads() {
        assert!(matches!(Threads::new(Some(0)), Err(ThreadsError::Threads(0))));
        assert!(matches!(Threads::new(Some(5000)), Err(ThreadsError::Threads(5000))));
        assert!(Threads::new(None).unwrap().threads() >= 1);
    }
}
