//! Waiting for events of other processes that do not announce them: polling with a deadline.

use std::thread;
use std::time::{Duration, Instant};

/// The default time limit of the rig. It is long because a wait ends with its event, so that only
/// failures take the full time. It is shorter than the minute after which a source resynchronises
/// by itself, so that a timely result proves that the event was noticed.
pub const PATIENCE: Duration = Duration::from_secs(45);

/// Polls `probe` until it returns a value. Returns `None` after `deadline`.
#[must_use]
pub fn poll<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// Polls like [`poll`] and panics with `what` after the deadline.
pub fn until<T>(what: &str, deadline: Duration, probe: impl FnMut() -> Option<T>) -> T {
    poll(deadline, probe).unwrap_or_else(|| panic!("after {deadline:?} still waiting until {what}"))
}
