//! Waiting for what another process does and cannot announce: ask again until a deadline.

use std::thread;
use std::time::{Duration, Instant};

/// How long the rig waits for anything before it gives up, unless a caller says otherwise. Generous, as a wait ends with
/// what it waits for and only a failure takes all of it; and shorter than the minute after which a source looks again by
/// itself, so that what is seen in time was noticed.
pub const PATIENCE: Duration = Duration::from_secs(45);

/// Asks `probe` until it has an answer. `None` once `deadline` has passed.
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

/// Like [`poll`], and panics with `what` when the deadline passes.
pub fn until<T>(what: &str, deadline: Duration, probe: impl FnMut() -> Option<T>) -> T {
    poll(deadline, probe).unwrap_or_else(|| panic!("after {deadline:?} still waiting until {what}"))
}
