//! Both processes of the agent write a heartbeat timestamp to a map. If one of them hangs, packets
//! are left to the host's own path. The same happens while damage from outside keeps answers from
//! guests.
//!
//! The data plane answers guests, so a late heartbeat of its own counts at once. The control
//! process keeps attachments and identities up to date, and may block for seconds in the kernel. So
//! a thread of its own beats for it, as long as its runtime was seen working not long ago.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::datapath::Heartbeat;
use crate::net::damage::DamageState;

/// Heartbeats within the time after which the heartbeat counts as stale, so that one late heartbeat
/// has no effect.
const BEATS_PER_LIMIT: u32 = 8;
/// The longest time between heartbeats.
const BEAT_INTERVAL: Duration = Duration::from_millis(250);

/// Interval at which the control runtime shows that it works, and the time without that after which
/// it counts as hung. One that waits for the kernel's lock of interfaces is late by seconds.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
const PROGRESS_LIMIT: Duration = Duration::from_secs(15);

/// A counter that grows while the control runtime works.
#[derive(Clone, Debug, Default)]
pub(crate) struct ControlProgress(Arc<AtomicU64>);

impl ControlProgress {
    /// Counts until cancelled. Must run on the control runtime.
    pub(crate) async fn count(self, cancel: CancellationToken) {
        let mut tick = ticks(PROGRESS_INTERVAL);
        while cancel.run_until_cancelled(tick.tick()).await.is_some() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes heartbeats of the data plane for ever, and calls `mark` with each. Must run on the
/// runtime that answers guests.
pub(crate) async fn beat_data(
    heartbeat: Heartbeat,
    stale_after: Duration,
    mark: impl Fn(),
    resumed: Arc<Notify>,
) {
    let mut tick = ticks(beat_interval(stale_after));
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = resumed.notified() => {}
        }
        heartbeat.beat_data();
        mark();
    }
}

/// Writes heartbeats of the control runtime while it works and no damage stops the traffic of
/// guests, until cancelled. Must not run on that runtime. Reports when they begin again.
pub(crate) async fn beat_control(
    heartbeat: Arc<Heartbeat>,
    stale_after: Duration,
    progress: ControlProgress,
    mut damage: watch::Receiver<DamageState>,
    resumed: Arc<Notify>,
    cancel: CancellationToken,
) {
    let mut tick = ticks(beat_interval(stale_after));
    // Beats, not time: a process that was stopped as a whole did not miss any.
    let limit = PROGRESS_LIMIT.div_duration_f64(tick.period());
    let (mut last, mut beats_without) = (0, 0_u32);
    let (mut was_hung, mut was_stopped) = (false, false);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = tick.tick() => {
                let count = progress.0.load(Ordering::Relaxed);
                beats_without = if count == last { beats_without.saturating_add(1) } else { 0 };
                last = count;
            }
            Ok(()) = damage.changed() => {}
        }
        let is_hung = f64::from(beats_without) > limit;
        let is_stopped = is_hung || damage.borrow_and_update().stops_traffic();
        if is_stopped {
            heartbeat.stop();
        } else {
            heartbeat.beat_control();
        }
        if was_stopped && !is_stopped {
            resumed.notify_one();
        }
        was_stopped = is_stopped;
        if is_hung && !was_hung {
            error!("control runtime hangs; packets are left to the host's own path");
        } else if was_hung && !is_hung {
            info!("control runtime works again");
        }
        was_hung = is_hung;
    }
}

fn beat_interval(stale_after: Duration) -> Duration {
    BEAT_INTERVAL.min(stale_after / BEATS_PER_LIMIT)
}

fn ticks(period: Duration) -> Interval {
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}
