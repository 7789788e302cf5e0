//! Where tests run that run kernels: on the CPU and, where there is one, on a GPU.

use sinter::runtime::hip::{HipError, gpu};
use sinter::target::Target;
use std::cell::RefCell;
use std::io::Write;
use std::sync::Once;

thread_local! {
    static TARGET: RefCell<Target> = RefCell::new(Target::cpu());
}

/// The target of what the test runs now.
pub fn target() -> Target {
    TARGET.with_borrow(Clone::clone)
}

/// The target of the first GPU here; where there is none, a line says so once.
pub fn gpu_target() -> Option<Target> {
    static SAID: Once = Once::new();
    let target = match gpu(None) {
        Ok(gpu) => {
            let none = || format!("there are no kernels for {} ({})", gpu.name, gpu.arch);
            Target::gpu(&gpu.arch).ok_or_else(none)
        }
        Err(e @ (HipError::Library { .. } | HipError::NoDevice { count: 0, .. })) => Err(e.to_string()),
        // One that is there and does not work is no reason to skip.
        Err(e) => panic!("{e}"),
    };
    if let Err(why) = &target {
        // Not println, which a test that passes keeps to itself.
        SAID.call_once(|| _ = writeln!(std::io::stderr(), "skipped on GPUs: {why}"));
    }
    target.ok()
}

/// How many of so many cases are run: all, but at most as many as `SINTER_TEST_CASES` says, as under a sanitizer each takes minutes.
pub fn cases(all: usize) -> usize {
    let most = std::env::var("SINTER_TEST_CASES").ok().and_then(|most| most.parse().ok());
    all.min(most.unwrap_or(usize::MAX))
}

/// Does all of this at once; one by one where `SINTER_TEST_CASES` says how many, as then a sanitizer looks on, which loses its way between launches
/// of several threads. Several processes share such work: `SINTER_TEST_PART=2/8` is what the third of eight does.
pub fn at_once<T: Sync>(these: &[T], of_each: impl Fn(&T) + Sync) {
    if std::env::var_os("SINTER_TEST_CASES").is_some() {
        let (part, parts) = part();
        return these.iter().skip(part).step_by(parts).for_each(of_each);
    }
    std::thread::scope(|scope| {
        for this in these {
            scope.spawn(|| of_each(this));
        }
    });
}

/// The part of `SINTER_TEST_PART`, from 0, and how many there are.
fn part() -> (usize, usize) {
    let Ok(part) = std::env::var("SINTER_TEST_PART") else { return (0, 1) };
    let numbers =
        part.split_once('/').and_then(|(part, parts)| Some((part.parse().ok()?, parts.parse().ok()?)));
    numbers.filter(|(part, parts)| part < parts).expect("SINTER_TEST_PART is as 2/8")
}

/// Runs a test on the CPU, then on a GPU; with `SINTER_TEST_ON=gpu` there alone, as a sanitizer of GPUs has nothing to see on the CPU.
pub fn everywhere(test: impl Fn()) {
    if std::env::var("SINTER_TEST_ON").as_deref() != Ok("gpu") {
        test();
    }
    if let Some(gpu) = gpu_target() {
        TARGET.set(gpu);
        test();
        TARGET.set(Target::cpu());
    }
}
