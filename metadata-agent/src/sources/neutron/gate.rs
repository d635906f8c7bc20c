//! When Neutron may be asked: by those whom nobody waits for at most so often, and after a fault by nobody before a pause that
//! grows with each further one.
//!
//! One gate stands before everything that this host asks, so that however many ports are unknown and however many guests
//! knock, a Neutron or a Keystone in trouble hears from it as if it had one question.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

/// Between two questions, on the average.
const INTERVAL: Duration = Duration::from_millis(50);
/// Questions that may be asked at once after a silence.
const BURST: u32 = 40;
/// The pause after the first fault. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// No pause is shorter.
pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The gate, with what is wrong while it is closed.
#[derive(Debug)]
pub(super) struct Gate<E>(Mutex<State<E>>);

#[derive(Debug)]
struct State<E> {
    /// When the next question would be due if all were asked at an even pace.
    even: Option<Instant>,
    pause: Duration,
    closed: Option<(Instant, E)>,
}

impl<E: Clone> Gate<E> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State { even: None, pause: FIRST_PAUSE, closed: None }))
    }

    /// When a question may be asked, or what is wrong so that it may not.
    pub(super) fn enter(&self, now: Instant) -> Result<Instant, E> {
        self.with(|state| {
            state.look(now)?;
            let earliest = now.checked_sub(INTERVAL * BURST).unwrap_or(now);
            let turn = state.even.map_or(earliest, |even| even.max(earliest));
            state.even = Some(turn + INTERVAL);
            Ok(turn.max(now))
        })
    }

    /// What is wrong, if it was closed on those who wait for their turn.
    pub(super) fn look(&self, now: Instant) -> Result<(), E> {
        self.with(|state| state.look(now))
    }

    /// When it opens, if it is closed.
    pub(super) fn opens(&self) -> Option<Instant> {
        self.with(|state| state.closed.as_ref().map(|(until, _)| *until))
    }

    /// A question was answered.
    pub(super) fn passed(&self) {
        self.with(|state| {
            state.pause = FIRST_PAUSE;
            state.closed = None;
        });
    }

    /// A question was not. What was asked before the last fault showed is no further fault.
    pub(super) fn failed(&self, error: E, now: Instant) {
        self.with(|state| {
            if state.closed.as_ref().is_some_and(|(until, _)| now < *until) {
                return;
            }
            state.closed = Some((now + jittered(state.pause), error));
            state.pause = LONGEST_PAUSE.min(2 * state.pause);
        });
    }

    fn with<T>(&self, work: impl FnOnce(&mut State<E>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<E: Clone> State<E> {
    fn look(&self, now: Instant) -> Result<(), E> {
        match &self.closed {
            Some((until, error)) if now < *until => Err(error.clone()),
            Some(_) | None => Ok(()),
        }
    }
}

/// Between half of it and all of it, so that hosts that lost one server do not come back as one.
fn jittered(pause: Duration) -> Duration {
    let [octet, ..] = *Uuid::new_v4().as_bytes();
    pause.mul_f64(0.5 + f64::from(octet) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_at_once_and_what_follows_at_an_even_pace() {
        let gate = Gate::<()>::new();
        let now = Instant::now() + Duration::from_mins(1);
        for _ in 0..BURST {
            assert_eq!(gate.enter(now), Ok(now));
        }
        let turns: Vec<_> = (0..3).map(|_| gate.enter(now).unwrap()).collect();
        assert_eq!(turns, [now, now + INTERVAL, now + 2 * INTERVAL]);
    }

    #[test]
    fn each_fault_closes_it_for_longer_up_to_a_limit_and_an_answer_opens_it() {
        let gate = Gate::new();
        let mut now = Instant::now() + Duration::from_mins(1);
        let mut pause = FIRST_PAUSE;
        for fault in 0..10 {
            assert_eq!(gate.enter(now), Ok(now));
            gate.failed(fault, now);
            // Others that were under way fail as well.
            gate.failed(99, now);
            assert_eq!(gate.enter(now), Err(fault));
            assert_eq!(gate.look(now), Err(fault), "who waits for a turn is told as well");
            let until = gate.opens().unwrap();
            assert!(until >= now + pause / 2 && until <= now + pause, "{fault}");
            pause = LONGEST_PAUSE.min(2 * pause);
            assert!(until >= now + SHORTEST_PAUSE);
            now = until;
            assert_eq!(gate.look(now), Ok(()));
        }
        gate.passed();
        gate.failed(0, now);
        assert!(gate.opens().unwrap() <= now + FIRST_PAUSE);
    }
}
