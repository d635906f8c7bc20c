//! The data runtime writes a heartbeat timestamp to a map. If that runtime stalls, the heartbeat
//! stops, and packets are left to the host's own path. The same happens while damage from outside
//! keeps answers from guests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::datapath::{Clock, Heartbeat};
use crate::net::damage::DamageState;

/// Heartbeats within the time after which the heartbeat counts as stale, so that one late heartbeat
/// has no effect.
const BEATS_PER_LIMIT: u32 = 8;

/// Time of the last heartbeat, or of the last tick without one because of damage: the data runtime
/// works in either case.
#[derive(Clone, Debug, Default)]
pub(crate) struct LastBeat(Arc<AtomicU64>);

impl LastBeat {
    /// Returns true if the last heartbeat is at most `limit` old.
    #[must_use]
    pub(crate) fn is_within(&self, limit: Duration) -> bool {
        let age = Clock::now_ns().saturating_sub(self.0.load(Ordering::Relaxed));
        Duration::from_nanos(age) <= limit
    }

    fn mark(&self) {
        self.0.store(Clock::now_ns(), Ordering::Relaxed);
    }
}

/// Writes heartbeats until cancelled, then marks the agent as absent.
pub(crate) async fn run(
    mut heartbeat: Heartbeat,
    stale_after: Duration,
    last_beat: LastBeat,
    mut damage: watch::Receiver<DamageState>,
    cancel: CancellationToken,
) {
    let mut tick = interval(stale_after / BEATS_PER_LIMIT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            _ = tick.tick() => {}
            Ok(()) = damage.changed() => {}
        }
        let is_stopped = damage.borrow_and_update().stops_traffic();
        let written = if is_stopped { heartbeat.stop() } else { heartbeat.beat() };
        match written {
            Ok(()) => last_beat.mark(),
            Err(error) => error!(%error, "cannot write heartbeat; packets are left to the host's own path"),
        }
    }
    if let Err(error) = heartbeat.stop() {
        error!(%error, "cannot clear heartbeat; programs will treat it as stale");
    }
}
