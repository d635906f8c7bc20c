//! Rate-limits background requests to Neutron, and backs off exponentially after failures.
//!
//! One pacer is shared by all requests of this host. So the number of unknown ports and of waiting
//! guests does not increase the load on a failing Neutron or Keystone.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

/// Average interval between requests.
const INTERVAL: Duration = Duration::from_millis(50);
/// Number of requests that may be sent at once after a pause.
const BURST: u32 = 40;
/// Backoff after the first failure. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Minimum backoff, after jitter.
pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(250);
/// Maximum backoff.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Pacer, with the last error while requests are blocked.
#[derive(Debug)]
pub(super) struct RequestPacer<E>(Mutex<PacerState<E>>);

#[derive(Debug)]
struct PacerState<E> {
    /// Time of the next request at an even pace.
    next_slot: Option<Instant>,
    pause: Duration,
    blocked: Option<(Instant, E)>,
}

impl<E: Clone> RequestPacer<E> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(PacerState { next_slot: None, pause: FIRST_PAUSE, blocked: None }))
    }

    /// Returns the time at which a request may be sent, or the error that blocks it.
    pub(super) fn reserve(&self, now: Instant) -> Result<Instant, E> {
        self.with(|state| {
            state.check(now)?;
            let earliest = now.checked_sub(INTERVAL * BURST).unwrap_or(now);
            let turn = state.next_slot.map_or(earliest, |slot| slot.max(earliest));
            state.next_slot = Some(turn + INTERVAL);
            Ok(turn.max(now))
        })
    }

    /// Checks that requests are not blocked. For requests that have waited for their turn.
    pub(super) fn check(&self, now: Instant) -> Result<(), E> {
        self.with(|state| state.check(now))
    }

    /// Returns the end of the backoff, if requests are blocked.
    pub(super) fn blocked_until(&self) -> Option<Instant> {
        self.with(|state| state.blocked.as_ref().map(|(until, _)| *until))
    }

    /// Records a successful request.
    pub(super) fn succeeded(&self) {
        self.with(|state| {
            state.pause = FIRST_PAUSE;
            state.blocked = None;
        });
    }

    /// Records a failed request. Requests in progress at the last failure do not extend the
    /// backoff.
    pub(super) fn failed(&self, error: E, now: Instant) {
        self.with(|state| {
            if state.blocked.as_ref().is_some_and(|(until, _)| now < *until) {
                return;
            }
            state.blocked = Some((now + jittered(state.pause), error));
            state.pause = LONGEST_PAUSE.min(2 * state.pause);
        });
    }

    fn with<T>(&self, work: impl FnOnce(&mut PacerState<E>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<E: Clone> PacerState<E> {
    fn check(&self, now: Instant) -> Result<(), E> {
        match &self.blocked {
            Some((until, error)) if now < *until => Err(error.clone()),
            Some(_) | None => Ok(()),
        }
    }
}

/// Returns between half and all of a pause, so that the hosts of a failed server do not all return
/// at once.
fn jittered(pause: Duration) -> Duration {
    let [octet, ..] = *Uuid::new_v4().as_bytes();
    pause.mul_f64(0.5 + f64::from(octet) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_sent_at_once_and_the_rest_at_an_even_pace() {
        let pacer = RequestPacer::<()>::new();
        let now = Instant::now() + Duration::from_mins(1);
        for _ in 0..BURST {
            assert_eq!(pacer.reserve(now), Ok(now));
        }
        let turns: Vec<_> = (0..3).map(|_| pacer.reserve(now).unwrap()).collect();
        assert_eq!(turns, [now, now + INTERVAL, now + 2 * INTERVAL]);
    }

    #[test]
    fn failures_increase_the_backoff_until_a_success() {
        let pacer = RequestPacer::new();
        let mut now = Instant::now() + Duration::from_mins(1);
        let mut pause = FIRST_PAUSE;
        for fault in 0..10 {
            assert_eq!(pacer.reserve(now), Ok(now));
            pacer.failed(fault, now);
            // Other requests in progress fail as well.
            pacer.failed(99, now);
            assert_eq!(pacer.reserve(now), Err(fault));
            assert_eq!(pacer.check(now), Err(fault), "waiting requests get the error, too");
            let until = pacer.blocked_until().unwrap();
            assert!(until >= now + pause / 2 && until <= now + pause, "{fault}");
            pause = LONGEST_PAUSE.min(2 * pause);
            assert!(until >= now + SHORTEST_PAUSE);
            now = until;
            assert_eq!(pacer.check(now), Ok(()));
        }
        pacer.succeeded();
        pacer.failed(0, now);
        assert!(pacer.blocked_until().unwrap() <= now + FIRST_PAUSE);
    }
}
