//! The agent's sign of life, beaten from the runtime that serves guests: if that stands still, so does the heart, and
//! packets go where they would go without us.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::datapath::{Clock, Heartbeat};

/// Beats within the time after which a heart counts as still. One late beat is no reason to step aside.
const BEATS: u32 = 8;

/// When the heart beat last.
#[derive(Clone, Debug, Default)]
pub struct LastBeat(Arc<AtomicU64>);

impl LastBeat {
    /// Whether it beat within `patience`.
    #[must_use]
    pub fn is_within(&self, patience: Duration) -> bool {
        let age = Clock::now_ns().saturating_sub(self.0.load(Ordering::Relaxed));
        Duration::from_nanos(age) <= patience
    }

    fn mark(&self) {
        self.0.store(Clock::now_ns(), Ordering::Relaxed);
    }
}

/// Beats until cancelled, then says that the agent leaves.
pub async fn run(mut heartbeat: Heartbeat, stale_after: Duration, last: LastBeat, cancel: CancellationToken) {
    let mut tick = interval(stale_after / BEATS);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while cancel.run_until_cancelled(tick.tick()).await.is_some() {
        match heartbeat.beat() {
            Ok(()) => last.mark(),
            Err(error) => error!(%error, "no heartbeat; guests will be left to the host's own path"),
        }
    }
    if let Err(error) = heartbeat.stop() {
        error!(%error, "cannot tell the programs that the agent leaves; they will notice by the clock");
    }
}
