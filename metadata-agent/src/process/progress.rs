//! Progress of work that takes long on a host with many guests.

use std::fmt;

use tokio::sync::watch;

/// The number of guest interfaces that are done, and of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Steps {
    done: usize,
    all: usize,
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} guest interfaces", self.done, self.all)
    }
}

/// A counter of guest interfaces. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress(watch::Sender<Steps>);

impl Progress {
    /// Begins with this number of interfaces.
    pub(crate) fn begin(&self, all: usize) {
        self.0.send_replace(Steps { done: 0, all });
    }

    /// Counts one interface.
    pub(crate) fn step(&self) {
        self.0.send_modify(|steps| steps.done += 1);
    }

    pub(crate) fn now(&self) -> Steps {
        *self.0.borrow()
    }
}
