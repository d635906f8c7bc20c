//! Notifications to systemd. Without systemd they do nothing.

use std::convert::Infallible;
use std::io;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::admin::readiness::Readiness;
use crate::data_plane::LastBeat;

/// Interval at which readiness is looked at until the agent is ready.
const READINESS_POLL: Duration = Duration::from_millis(100);
/// Interval at which systemd is told that the start goes on, and the time that it then allows.
const START_REPORT: Duration = Duration::from_secs(5);
const START_EXTENSION: Duration = Duration::from_secs(30);

/// Waits until the agent is ready, and notifies systemd.
///
/// A source may be away for long, and guests that others know are served meanwhile. So systemd's
/// start time-out is extended while the heartbeat is recent, and the status names what is missing.
pub(super) async fn announce_ready(readiness: &Readiness, last_beat: &LastBeat, stale_after: Duration) {
    let mut reported: Option<(Vec<String>, Instant)> = None;
    loop {
        let waiting = readiness.waiting_for();
        if waiting.is_empty() {
            break;
        }
        let is_told =
            reported.as_ref().is_some_and(|(told, at)| *told == waiting && at.elapsed() < START_REPORT);
        if !is_told && last_beat.is_within(stale_after) {
            let status = format!("waiting for {}", waiting.join(", "));
            let extension = u32::try_from(START_EXTENSION.as_micros()).unwrap_or(u32::MAX);
            notify(&[NotifyState::Status(&status), NotifyState::ExtendTimeoutUsec(extension)]);
            reported = Some((waiting, Instant::now()));
        }
        sleep(READINESS_POLL).await;
    }
    info!("ready");
    if reported.is_some() {
        notify(&[NotifyState::Status("ready")]);
    }
    notify(&[NotifyState::Ready]);
}

/// Feeds systemd's watchdog while the heartbeat is recent. The heartbeat runs on the data runtime,
/// so a stalled data runtime is noticed although the control runtime works.
pub(super) async fn feed_watchdog(last_beat: &LastBeat, stale_after: Duration) -> Infallible {
    let mut watchdog = tokio::time::interval(watchdog_period());
    loop {
        watchdog.tick().await;
        if last_beat.is_within(stale_after) {
            notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Returns half of systemd's time-out, as sd_watchdog_enabled(3) recommends.
fn watchdog_period() -> Duration {
    sd_notify::watchdog_enabled().map_or(Duration::from_hours(1), |granted| granted / 2)
}

/// Notifies systemd, if it listens.
pub(super) fn notify(states: &[NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => warn!(%error, "cannot notify systemd"),
        _ => {}
    }
}
