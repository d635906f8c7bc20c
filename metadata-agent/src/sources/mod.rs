//! Sources of the inventory: each watches a file, directory, database or API and sends [`Event`]s.
//!
//! [`Event`]: crate::inventory::Event
//!
//! A source never answers a request, and no request waits for a source. It runs until it is
//! cancelled. It reports errors and keeps retrying; an error about one port does not affect the
//! others.

pub(crate) mod libvirt;
pub(crate) mod neutron;
pub(crate) mod ovn;
pub(crate) mod ovsdb;
pub(crate) mod static_file;

mod directory_watch;
mod row_tracker;
mod text_file;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::inventory::SourceKind;

/// Interval at which files are read again without an event: inotify reports neither changes behind
/// a symlink nor the replacement of a parent directory.
const RECHECK: Duration = Duration::from_mins(1);
/// Interval while there is an error.
const RECHECK_AFTER_ERROR: Duration = Duration::from_secs(5);

/// Longest error text that is logged and kept. An error may quote text of its source.
const MAX_FAULT_BYTES: usize = 1_000;

/// State of a source, for `status` and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SourceState {
    pub source: SourceKind,
    /// The source has sent everything it knows at least once. The inventory may lag slightly
    /// behind.
    pub ready: bool,
    /// Number of reported ports.
    pub ports: usize,
    /// Number of ignored files or rows, such as domains not created by Nova.
    pub ignored: usize,
    /// Current errors by file, directory, server or interface.
    pub faults: BTreeMap<String, String>,
    /// Time of the last change between ready and not ready, or between errors and none.
    #[serde(serialize_with = "unix_seconds")]
    pub since: SystemTime,
}

#[cfg(test)]
impl SourceState {
    /// Returns the first current error and its location.
    pub(crate) fn fault(&self) -> Option<(&str, &str)> {
        self.faults.first_key_value().map(|(place, error)| (place.as_str(), error.as_str()))
    }
}

/// Reports the state of a source.
#[derive(Debug)]
pub(crate) struct Reporter {
    state: watch::Sender<SourceState>,
}

impl Reporter {
    /// Creates a reporter for a source that has not started, and the receiver of its state.
    #[must_use]
    pub(crate) fn new(source: SourceKind) -> (Self, watch::Receiver<SourceState>) {
        let state = SourceState {
            source,
            ready: false,
            ports: 0,
            ignored: 0,
            faults: BTreeMap::new(),
            since: SystemTime::now(),
        };
        let (sender, receiver) = watch::channel(state);
        (Self { state: sender }, receiver)
    }

    /// Sets the current state. Logs each error once when it appears, changes and disappears.
    fn report(&self, ready: bool, ports: usize, ignored: usize, faults: BTreeMap<String, String>) {
        let faults: BTreeMap<_, _> =
            faults.into_iter().map(|(place, error)| (place, shortened(error))).collect();
        self.state.send_if_modified(|state| {
            let source = state.source;
            for (place, error) in &faults {
                if state.faults.get(place) != Some(error) {
                    warn!(%source, place = ?place, error = ?error, "source error");
                }
            }
            for place in state.faults.keys().filter(|place| !faults.contains_key(*place)) {
                info!(%source, place = ?place, "source recovered");
            }
            let since_changed = (state.ready, state.faults.is_empty()) != (ready, faults.is_empty());
            let since = if since_changed { SystemTime::now() } else { state.since };
            let now = SourceState { source, ready, ports, ignored, faults, since };
            let changed = *state != now;
            *state = now;
            changed
        });
    }

    fn recheck(&self) -> Duration {
        if self.state.borrow().faults.is_empty() { RECHECK } else { RECHECK_AFTER_ERROR }
    }
}

fn shortened(mut error: String) -> String {
    if error.len() > MAX_FAULT_BYTES {
        error.truncate(error.floor_char_boundary(MAX_FAULT_BYTES));
        error.push_str(" ...");
    }
    error
}

fn unix_seconds<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_error_is_shortened() {
        let (reporter, state) = Reporter::new(SourceKind::Libvirt);
        let fits = "x".repeat(MAX_FAULT_BYTES);
        let long = format!("{}ü{}", "x".repeat(MAX_FAULT_BYTES - 1), "y".repeat(4 * 1024 * 1024));
        reporter.report(true, 0, 0, [("a".to_owned(), fits.clone()), ("b".to_owned(), long)].into());
        let faults = &state.borrow().faults;
        assert_eq!(faults["a"], fits);
        assert_eq!(faults["b"], format!("{} ...", "x".repeat(MAX_FAULT_BYTES - 1)));
    }
}
