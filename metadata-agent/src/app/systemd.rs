//! Notifications to systemd. Without systemd they do nothing.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use tracing::warn;

use crate::datapath::heartbeat::LastBeat;

/// Feeds systemd's watchdog while the heartbeat is recent. The heartbeat runs on the data runtime,
/// so a stalled data runtime is noticed although the control runtime works.
pub(super) async fn feed_watchdog(last_beat: &LastBeat, stale_after: Duration) -> Infallible {
    let mut watchdog = tokio::time::interval(watchdog_period());
    loop {
        watchdog.tick().await;
        if last_beat.is_within(stale_after) {
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

/// Returns half of systemd's time-out, as sd_watchdog_enabled(3) recommends.
fn watchdog_period() -> Duration {
    sd_notify::watchdog_enabled().map_or(Duration::from_hours(1), |granted| granted / 2)
}

/// Notifies systemd, if it listens.
pub(super) fn notify(states: &[sd_notify::NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => warn!(%error, "cannot notify systemd"),
        _ => {}
    }
}
