//! The age of the data plane's last heartbeat.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;

use super::shared_state::SharedState;
use crate::datapath::Clock;

/// The last heartbeat of the data plane that runs, including those that damage makes void.
#[derive(Clone, Debug, Default)]
pub(crate) struct LastBeat(Arc<ArcSwapOption<SharedState>>);

impl LastBeat {
    /// Returns true if the last heartbeat is at most `limit` old.
    #[must_use]
    pub(crate) fn is_within(&self, limit: Duration) -> bool {
        self.age().is_some_and(|age| age <= limit)
    }

    /// Returns its age; `None` before the first one.
    #[must_use]
    pub(crate) fn age(&self) -> Option<Duration> {
        let last = self.0.load().as_ref().map_or(0, |state| state.last_beat());
        // A time in the future is none that the data plane has seen.
        let age = Clock::now_ns().checked_sub(last).map(Duration::from_nanos);
        age.filter(|_| last > 0)
    }

    /// Follows another data plane.
    pub(super) fn follow(&self, state: Arc<SharedState>) {
        self.0.store(Some(state));
    }
}
