//! Keeps a log line from being written more often than an operator can read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

const PAUSE: Duration = Duration::from_secs(30);

/// Lets one event through in 30 seconds.
#[derive(Debug)]
pub(super) struct Seldom {
    epoch: Instant,
    /// Milliseconds after `epoch` from which on the next event may pass.
    next: AtomicU64,
}

impl Seldom {
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now(), next: AtomicU64::new(0) }
    }

    /// Whether to speak now.
    pub(super) fn may_speak(&self) -> bool {
        let now = millis(self.epoch.elapsed());
        let next = self.next.load(Ordering::Relaxed);
        let later = now.saturating_add(millis(PAUSE));
        now >= next && self.next.compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_event_passes_in_each_pause() {
        let seldom = Seldom::new();
        assert!(seldom.may_speak());
        assert!(!seldom.may_speak());
        tokio::time::advance(PAUSE).await;
        assert!(seldom.may_speak());
        assert!(!seldom.may_speak());
    }
}
