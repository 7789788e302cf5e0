//! How fast this machine reads memory.

use crate::runtime::cpu::{Threads, ThreadsError, prefetch};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Passes over the buffer, of which the fastest counts.
const PASSES: usize = 5;
/// Words that a thread takes at a time: 1 MiB.
const BLOCK: usize = 1 << 17;
/// Sums kept apart, so that a loop over them has no chain of additions to wait for.
const LANES: usize = 32;
/// Bytes ahead that are asked for.
const AHEAD: usize = 4096;

/// Why the bandwidth cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum BandwidthError {
    #[error(transparent)]
    Threads(#[from] ThreadsError),
    #[error("there is no memory for {bytes} bytes to read; leave the bandwidth out (--no-bandwidth)")]
    Memory { bytes: usize },
}

/// Bytes per second at which `threads` threads sum a buffer of `bytes` bytes (rounded up to whole blocks of 1 MiB), in
/// the best of a few passes. It is memory that they read if the buffer is much larger than the processor's caches.
///
/// # Errors
/// If there are no such threads, or not as much memory.
pub fn read_bandwidth(bytes: usize, threads: usize) -> Result<f64, BandwidthError> {
    let threads = Threads::new(Some(threads))?;
    let blocks = bytes.div_ceil(BLOCK * size_of::<u64>()).max(1);
    let memory = |_| BandwidthError::Memory { bytes };
    let words = blocks.checked_mul(BLOCK).ok_or(BandwidthError::Memory { bytes })?;
    let mut buffer: Vec<u64> = vec![];
    buffer.try_reserve_exact(words).map_err(memory)?;
    // Anything but untouched zeros, which the system may map to one page.
    buffer.resize(words, 1);
    let timed = |_| {
        let start = Instant::now();
        black_box(pass(&buffer, &threads));
        start.elapsed()
    };
    Ok(speed(words * size_of::<u64>(), (0..PASSES).map(timed)))
}

/// Bytes per second, if the shortest of these times is that of `bytes`.
fn speed(bytes: usize, times: impl Iterator<Item = Duration>) -> f64 {
    let best = times.min().unwrap_or(Duration::MAX);
    bytes as f64 / best.max(Duration::from_nanos(1)).as_secs_f64()
}

/// The sum of whole blocks, read by all threads of the threads.
fn pass(buffer: &[u64], threads: &Threads) -> u64 {
    let total = AtomicU64::new(0);
    threads.run(&|worker| {
        let read = |blocks: std::ops::Range<usize>| {
            total.fetch_add(sum(&buffer[blocks.start * BLOCK..blocks.end * BLOCK]), Ordering::Relaxed);
        };
        worker.share(buffer.len() / BLOCK, |items| items.for_each(&read), || ());
    });
    total.into_inner()
}

/// The wrapping sum.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; LANES];
    let (lanes, rest) = words.as_chunks::<LANES>();
    for lane in lanes {
        // As the kernels do: it takes that to read as fast as memory allows.
        for line in (0..size_of_val(lane)).step_by(64) {
            prefetch(lane.as_ptr().cast::<u8>().wrapping_add(AHEAD + line));
        }
        for (sum, word) in sums.iter_mut().zip(lane) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_right_at_any_length() {
        for n in [0, 1, 31, 32, 33, 1000] {
            let words: Vec<u64> = (0..n).map(|i| u64::MAX - i).collect();
            assert_eq!(sum(&words), words.iter().fold(0, |a: u64, b| a.wrapping_add(*b)));
        }
    }

    #[test]
    fn every_word_is_read_once() {
        let buffer: Vec<u64> = (0..7 * BLOCK as u64).map(|i| i * i).collect();
        let all = buffer.iter().fold(0, |a: u64, b| a.wrapping_add(*b));
        for threads in [1, 2, 3] {
            assert_eq!(pass(&buffer, &Threads::new(Some(threads)).unwrap()), all, "{threads} threads");
        }
    }

    #[test]
    fn the_speed_is_that_of_the_fastest_pass() {
        let times = [30, 20, 25].map(Duration::from_millis);
        assert_eq!(speed(1 << 30, times.into_iter()), f64::from(1 << 30) / 0.02);
        assert!((speed(1, std::iter::once(Duration::ZERO)) - 1e9).abs() < 1.0);
        assert!(read_bandwidth(1, 1).unwrap() > 0.0, "at least a block");
    }

    #[test]
    fn what_is_impossible_is_refused() {
        assert!(matches!(read_bandwidth(1 << 20, 0), Err(BandwidthError::Threads(_))));
        let error = read_bandwidth(usize::MAX, 1).unwrap_err().to_string();
        assert!(error.contains(&format!("no memory for {} bytes", usize::MAX)), "{error}");
    }
}
