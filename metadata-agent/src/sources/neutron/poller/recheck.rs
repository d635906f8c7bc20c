//! Queries about a port whose guest was refused: its addresses or pairs may have changed.
//!
//! A guest decides what it sends, so it must not decide how often Neutron is asked. The pause
//! between two queries about a port grows while they change nothing, and all of them together are
//! sent at most once per [`HOST_INTERVAL`]. The first one is not delayed, so a changed address is
//! known when the guest repeats its SYN, after a second.

use std::time::Duration;

use tokio::time::Instant;

use super::{FIRST_PAUSE, GATHER, LONGEST_PAUSE};

/// Minimum interval between queries for this reason, each about up to [`super::MAX_IDS`] ports.
pub(super) const HOST_INTERVAL: Duration = Duration::from_secs(1);

/// Schedule of the queries about one interface.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recheck {
    due: Option<Instant>,
    /// Time of the last answer, and the pause that follows it.
    last: Option<Instant>,
    pause: Duration,
}

impl Recheck {
    pub(super) const fn new() -> Self {
        Self { due: None, last: None, pause: FIRST_PAUSE }
    }

    /// Schedules a query after a refusal.
    pub(super) fn request(&mut self, now: Instant) {
        // Refusals that are far apart are not a flood.
        if self.last.is_some_and(|last| now >= last + self.pause + LONGEST_PAUSE) {
            self.pause = FIRST_PAUSE;
        }
        let earliest = self.last.map_or(now, |last| last + self.pause).max(now + GATHER);
        self.due.get_or_insert(earliest);
    }

    /// Returns the time of the query, if one is scheduled.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Records an answer. It covers the refusals until now.
    pub(super) fn answered(&mut self, answer: Answer, now: Instant) -> RecheckState {
        if self.due.take().is_none() {
            return RecheckState::Unscheduled;
        }
        if self.last.is_some() {
            self.pause = match answer {
                Answer::Changed => FIRST_PAUSE,
                Answer::Same => LONGEST_PAUSE.min(2 * self.pause),
            };
        }
        self.last = Some(now);
        RecheckState::Answered
    }
}

/// State of the scheduled query after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecheckState {
    Answered,
    Unscheduled,
}

/// Comparison of an answer with the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Changed,
    Same,
}
