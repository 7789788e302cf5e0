//! How far something is that takes long: told to whoever asked to be told.

use std::fmt;
use std::sync::Arc;

/// What takes long, and what of it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Kernels of a GPU are compiled, or found among those that were kept: in kernels.
    Kernels,
    /// Weights go to where the device reads them: in bytes. What it reads in the mapped file does not count.
    Weights,
    /// A prompt of several chunks is read: in tokens.
    Prompt,
    /// Operations of a graph are interpreted: in nodes.
    Interpreted,
    /// Kernels are made beside the interpretation of what they stand for: in nodes.
    Checked,
    /// Passes are left out, one by one, and steps are timed without.
    LeftOut,
}

/// Is called with a stage, how much of it is done, and how much that is in all. Within a stage what is done never falls; all of it is
/// done once, at the end of a stage that succeeds. It may be called on any thread, and should return at once.
pub type Observer = dyn Fn(Stage, u64, u64) + Send + Sync;

/// Whom to tell; nobody by default.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<Observer>>);

impl Progress {
    /// Tells `observer`.
    pub fn to(observer: impl Fn(Stage, u64, u64) + Send + Sync + 'static) -> Progress {
        Progress(Some(Arc::new(observer)))
    }

    /// Whether somebody is told.
    pub fn is_watched(&self) -> bool {
        self.0.is_some()
    }

    /// Tells whoever is to be told.
    pub fn tell(&self, stage: Stage, done: u64, all: u64) {
        if let Some(observer) = &self.0 {
            observer(stage, done, all);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_watched() { "Progress(watched)" } else { "Progress(unwatched)" })
    }
}
