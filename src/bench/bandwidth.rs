//! How fast this machine reads memory.

use crate::runtime::cpu::{Pool, PoolError, prefetch};
use std::hint::black_box;
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
    Threads(#[from] PoolError),
    #[error("there is no memory for {bytes} bytes to read; leave the bandwidth out (--no-bandwidth)")]
    Memory { bytes: usize },
}

/// Bytes per second at which `threads` threads sum a buffer of `bytes` bytes (rounded up to whole blocks of 1 MiB), in
/// the best of a few passes. It is memory that they read if the buffer is much larger than the processor's caches.
///
/// # Errors
/// If there are no such threads, or not as much memory.
pub fn read_bandwidth(bytes: usize, threads: usize) -> Result<f64, BandwidthError> {
    let pool = Pool::new(Some(threads))?;
    let blocks = bytes.div_ceil(BLOCK * size_of::<u64>()).max(1);
    let memory = |_| BandwidthError::Memory { bytes };
    let words = blocks.checked_mul(BLOCK).ok_or(BandwidthError::Memory { bytes })?;
    let mut buffer: Vec<u64> = vec![];
    buffer.try_reserve_exact(words).map_err(memory)?;
    // Anything but untouched zeros, which the system may map to one page.
    buffer.resize(words, 1);
    let pass = || {
        let start = Instant::now();
        pool.run(&|worker| {
            let read = |blocks: std::ops::Range<usize>| {
                black_box(sum(&buffer[blocks.start * BLOCK..blocks.end * BLOCK]));
            };
            worker.share(blocks, |items| items.for_each(&read), || ());
        });
        start.elapsed()
    };
    let best = (0..PASSES).map(|_| pass()).min().unwrap_or(Duration::MAX);
    Ok((words * size_of::<u64>()) as f64 / best.max(Duration::from_nanos(1)).as_secs_f64())
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
    fn a_machine_reads_at_a_speed_that_machines_have() {
        for threads in [1, 2] {
            let speed = read_bandwidth(4 << 20, threads).unwrap();
            assert!((1e7..1e14).contains(&speed), "{speed}");
        }
    }

    #[test]
    fn what_is_impossible_is_refused() {
        assert!(matches!(read_bandwidth(1 << 20, 0), Err(BandwidthError::Threads(_))));
        let error = read_bandwidth(usize::MAX, 1).unwrap_err().to_string();
        assert!(error.contains(&format!("no memory for {} bytes", usize::MAX)), "{error}");
    }
}
