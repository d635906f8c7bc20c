//! The pauses between attempts: each up to twice the one before, none longer than a limit, and no two clients' the same.

use std::time::Duration;

use uuid::Uuid;

/// The pause after the first loss.
pub(crate) const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// How long to wait before the next attempt.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// Nothing went wrong yet.
    #[must_use]
    pub fn new(longest: Duration) -> Self {
        Self { next: FIRST_PAUSE.min(longest), longest }
    }

    /// The next loss is the first one again if the last attempt held for longer than the longest pause.
    pub fn held(&mut self, duration: Duration) -> bool {
        let held = duration > self.longest;
        if held {
            *self = Self::new(self.longest);
        }
        held
    }

    /// The pause that is due now: between half and all of what it may be, so that clients that lost one server do not
    /// come back as one.
    pub fn pause(&mut self) -> Duration {
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
    fn pauses_grow_to_their_limit_and_begin_anew_after_a_connection_that_held() {
        let longest = Duration::from_secs(1);
        let mut backoff = Backoff::new(longest);
        let mut due = FIRST_PAUSE;
        for _ in 0..10 {
            let pause = backoff.pause();
            assert!(pause >= due / 2 && pause <= due, "{pause:?} of {due:?}");
            due = longest.min(2 * due);
        }
        assert!(!backoff.held(longest));
        assert!(backoff.pause() >= longest / 2);
        assert!(backoff.held(longest + FIRST_PAUSE));
        assert!(backoff.pause() <= FIRST_PAUSE);
    }
}
