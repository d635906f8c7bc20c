//! Notifications to systemd. Without systemd they do nothing.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{info, warn};

use crate::admin::readiness::Readiness;
use crate::data_plane::LastBeat;
use crate::process::progress::Progress;

/// Interval at which readiness is looked at until the agent is ready.
const READINESS_POLL: Duration = Duration::from_millis(100);
/// Interval at which systemd is told that the start goes on, and the time that it then allows.
const START_REPORT: Duration = Duration::from_secs(5);
/// Interval at which the status shows progress.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
const START_EXTENSION: Duration = Duration::from_secs(30);

/// The state of the service, as systemd knows it.
#[derive(Debug, Default)]
pub(super) struct ServiceManager {
    /// From `READY=1` to the stop. Otherwise the end of a reload would be taken for the end of the
    /// start.
    accepts_reload: AtomicBool,
}

impl ServiceManager {
    /// Shows how many guest interfaces have been attached, and extends the time-out of the start
    /// while there are more each time.
    pub(super) async fn report_start(&self, progress: &Progress) -> Infallible {
        let (mut tick, mut reported) = (interval(STATUS_INTERVAL), progress.now());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let now = progress.now();
            if now != reported {
                notify(&[NotifyState::Status(&format!("attached {now}")), start_extension()]);
                reported = now;
            }
        }
    }

    /// Waits until the agent is ready, and notifies systemd.
    ///
    /// A source may be away for long, and guests that others know are served meanwhile. So
    /// systemd's start time-out is extended while the heartbeat is recent, and the status names
    /// what is missing.
    pub(super) async fn announce_ready(
        &self,
        readiness: &Readiness,
        last_beat: &LastBeat,
        stale_after: Duration,
    ) {
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
                notify(&[NotifyState::Status(&status), start_extension()]);
                reported = Some((waiting, Instant::now()));
            }
            sleep(READINESS_POLL).await;
        }
        info!("ready");
        notify(&[NotifyState::Status("ready")]);
        self.accepts_reload.store(true, Ordering::Relaxed);
        notify(&[NotifyState::Ready]);
    }

    /// Announces a reload of the configuration.
    pub(super) fn reloading(&self) {
        if self.accepts_reload.load(Ordering::Relaxed) {
            // `Type=notify-reload` needs the time.
            match NotifyState::monotonic_usec_now() {
                Ok(now) => notify(&[NotifyState::Reloading, now]),
                Err(error) => warn!(%error, "cannot read the clock for systemd"),
            }
        }
    }

    /// Announces the end of the reload.
    pub(super) fn reloaded(&self) {
        if self.accepts_reload.load(Ordering::Relaxed) {
            notify(&[NotifyState::Ready]);
        }
    }

    /// Announces the stop.
    pub(super) fn stopping(&self) {
        self.accepts_reload.store(false, Ordering::Relaxed);
        notify(&[NotifyState::Stopping]);
    }
}

/// Feeds systemd's watchdog while the heartbeat is recent. The heartbeat runs on the data runtime,
/// so a stalled data runtime is noticed although the control runtime works.
pub(super) async fn feed_watchdog(last_beat: &LastBeat, stale_after: Duration) -> Infallible {
    let mut watchdog = interval(watchdog_period());
    loop {
        watchdog.tick().await;
        if last_beat.is_within(stale_after) {
            notify(&[NotifyState::Watchdog]);
        }
    }
}

fn start_extension() -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(u32::try_from(START_EXTENSION.as_micros()).unwrap_or(u32::MAX))
}

/// Returns half of systemd's time-out, as sd_watchdog_enabled(3) recommends.
fn watchdog_period() -> Duration {
    sd_notify::watchdog_enabled().map_or(Duration::from_hours(1), |granted| granted / 2)
}

/// Notifies systemd, if it listens.
fn notify(states: &[NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => warn!(%error, "cannot notify systemd"),
        _ => {}
    }
}
