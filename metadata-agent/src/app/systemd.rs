//! What systemd is told. Without systemd all of it is nothing.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use tracing::warn;

use crate::datapath::heartbeat::LastBeat;

/// Tells systemd that the agent lives, as long as it does: a data runtime that stands still must not go unnoticed because
/// this one runs.
pub(super) async fn feed_watchdog(last_beat: &LastBeat, patience: Duration) -> Infallible {
    let mut watchdog = tokio::time::interval(watchdog_period());
    loop {
        watchdog.tick().await;
        if last_beat.is_within(patience) {
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

/// Half of what systemd grants, as sd_watchdog_enabled(3) advises.
fn watchdog_period() -> Duration {
    sd_notify::watchdog_enabled().map_or(Duration::from_hours(1), |granted| granted / 2)
}

/// Tells systemd, where it listens.
pub(super) fn notify(states: &[sd_notify::NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => warn!(%error, "systemd cannot be told"),
        _ => {}
    }
}
