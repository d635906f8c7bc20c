//! Limits how often a log line is written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

const PAUSE: Duration = Duration::from_secs(30);

/// Allows one event in 30 seconds.
#[derive(Debug)]
pub(super) struct LogThrottle {
    epoch: Instant,
    /// Milliseconds after `epoch` from which the next event is allowed.
    next: AtomicU64,
}

impl LogThrottle {
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now(), next: AtomicU64::new(0) }
    }

    pub(super) fn allow(&self) -> bool {
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
    async fn one_event_is_allowed_per_pause() {
        let throttle = LogThrottle::new();
        assert!(throttle.allow());
        assert!(!throttle.allow());
        tokio::time::advance(PAUSE).await;
        assert!(throttle.allow());
        assert!(!throttle.allow());
    }
}
