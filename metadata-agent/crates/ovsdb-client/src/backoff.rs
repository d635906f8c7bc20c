//! Exponential backoff with jitter between rounds of connection attempts.

use std::time::Duration;

use uuid::Uuid;

/// Pause after the first failure.
pub const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Pause before the next round of attempts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn new(longest: Duration) -> Self {
        Self { next: FIRST_PAUSE.min(longest), longest }
    }

    /// Starts again with the first pause if the last connection was stable: it lasted for longer
    /// than the longest pause. Returns whether it was.
    pub(crate) fn reset_if_stable(&mut self, lasted: Duration) -> bool {
        let stable = lasted > self.longest;
        if stable {
            *self = Self::new(self.longest);
        }
        stable
    }

    /// Returns the pause that is due now, and doubles the next one. The result is between half and
    /// all of the nominal pause, so that the clients of a failed server do not all return at once.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = self.longest.min(2 * pause);
        let [octet, ..] = *Uuid::new_v4().as_bytes();
        pause.mul_f64(0.5 + f64::from(octet) / 512.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_a_stable_connection_resets_them() {
        let longest = Duration::from_secs(1);
        let mut backoff = Backoff::new(longest);
        let mut due = FIRST_PAUSE;
        for _ in 0..10 {
            let pause = backoff.pause();
            assert!(pause >= due / 2 && pause <= due, "{pause:?} of {due:?}");
            due = longest.min(2 * due);
        }
        assert!(!backoff.reset_if_stable(longest));
        assert!(backoff.pause() >= longest / 2);
        assert!(backoff.reset_if_stable(longest + FIRST_PAUSE));
        assert!(backoff.pause() <= FIRST_PAUSE);
    }
}
