//! Scopes whose time is summed up by name.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Sums up the time that passes in scopes, by their name. Clones share the sums, so any thread may open a scope.
///
/// Work that was given to a GPU goes on while its scope ends: wait for it within, or time its launches by the device's own events
/// ([`Executor::time_launches`](crate::runtime::Executor::time_launches)).
///
/// ```
/// let timer = sinter::bench::Timer::default();
/// {
///     let _open = timer.scope("open");
///     // ...
/// }
/// let four = timer.time("add", || 2 + 2);
/// assert_eq!(four, 4);
/// assert_eq!(timer.parts().iter().map(|part| part.name).collect::<Vec<_>>(), ["open", "add"]);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Timer(Arc<Mutex<Vec<Timed>>>);

/// What passed in the scopes of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timed {
    pub name: &'static str,
    /// Scopes that ended.
    pub times: u64,
    pub time: Duration,
}

/// A scope of a [`Timer`], which ends where this is dropped.
#[derive(Debug)]
pub struct Scope {
    timer: Timer,
    name: &'static str,
    start: Instant,
}

impl Timer {
    /// Opens a scope. Scopes may lie within each other: the time of the inner is the outer's too.
    #[must_use = "the scope ends where this is dropped"]
    pub fn scope(&self, name: &'static str) -> Scope {
        self.with(name, |_| ());
        Scope { timer: self.clone(), name, start: Instant::now() }
    }

    /// Does something in a scope.
    pub fn time<T>(&self, name: &'static str, run: impl FnOnce() -> T) -> T {
        let _scope = self.scope(name);
        run()
    }

    /// The time of all scopes of a name that ended.
    pub fn of(&self, name: &str) -> Duration {
        self.parts().iter().find(|part| part.name == name).map_or(Duration::ZERO, |part| part.time)
    }

    /// Of all names, in the order in which their first scopes were opened.
    pub fn parts(&self) -> Vec<Timed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn with(&self, name: &'static str, change: impl FnOnce(&mut Timed)) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = parts.iter().position(|part| part.name == name).unwrap_or(parts.len());
        if at == parts.len() {
            parts.push(Timed { name, times: 0, time: Duration::ZERO });
        }
        change(&mut parts[at]);
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let time = self.start.elapsed();
        self.timer.with(self.name, |part| (part.times, part.time) = (part.times + 1, part.time + time));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_sum_up_by_name_and_hold_each_other() {
        let (timer, rest) = (Timer::default(), Duration::from_millis(3));
        let outer = timer.scope("outer");
        for _ in 0..2 {
            timer.time("inner", || std::thread::sleep(rest));
        }
        std::thread::scope(|scope| _ = scope.spawn(|| timer.time("inner", || std::thread::sleep(rest))));
        assert_eq!((timer.of("outer"), timer.of("none")), (Duration::ZERO, Duration::ZERO));
        drop(outer);
        let parts = timer.parts();
        assert_eq!(
            parts.iter().map(|part| (part.name, part.times)).collect::<Vec<_>>(),
            [("outer", 1), ("inner", 3)]
        );
        assert!(parts[1].time >= 3 * rest && parts[0].time >= parts[1].time, "{parts:?}");
    }

    #[test]
    fn what_leaves_a_scope_early_ends_it() {
        let timer = Timer::default();
        let early = || -> Option<()> {
            let _scope = timer.scope("early");
            None?;
            Some(())
        };
        assert_eq!((early(), timer.parts()[0].times), (None, 1));
    }
}
