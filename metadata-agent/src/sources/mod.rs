//! Feeders of the inventory: each watches one place and sends what that place says now.
//!
//! A source never answers a request, and no request waits for one. It runs until it is cancelled; whatever goes
//! wrong is a fault that it reports, keeps trying to get over, and that leaves its other ports alone.

pub mod libvirt;
pub mod neutron;
pub mod ovn;
pub mod ovsdb;
pub mod static_file;

mod file;
mod rows;
mod watch;

use std::collections::BTreeMap;
use std::panic;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use tokio::sync::watch as channel;
use tokio::task;
use tracing::{info, warn};

use crate::inventory::SourceKind;

/// How often a source looks again though nothing told it to: inotify sees neither what happens behind a symlink
/// nor a directory further up that is replaced.
const RECHECK: Duration = Duration::from_mins(1);
/// The same while something is wrong.
const RECHECK_FAULTY: Duration = Duration::from_secs(5);

/// How a source is, for `status` and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceState {
    /// Which source.
    pub source: SourceKind,
    /// It has once sent all that it knows; the inventory may be a moment behind.
    pub ready: bool,
    /// Ports that it speaks of now.
    pub ports: usize,
    /// Files or rows that are none of its business, such as domains that are not Nova's.
    pub ignored: usize,
    /// What is wrong now, by file, directory, server or interface.
    pub faults: BTreeMap<String, String>,
    /// Since when it is ready or not, and faulty or not, as it is now.
    #[serde(serialize_with = "unix_seconds")]
    pub since: SystemTime,
}

impl SourceState {
    /// One of the present faults, or nothing.
    pub fn fault(&self) -> Option<(&str, &str)> {
        self.faults.first_key_value().map(|(place, error)| (place.as_str(), error.as_str()))
    }
}

/// By which a source tells how it is.
#[derive(Debug)]
pub struct Reporter {
    state: channel::Sender<SourceState>,
}

impl Reporter {
    /// A source that has not begun, and where its state can be read.
    #[must_use]
    pub fn new(source: SourceKind) -> (Self, channel::Receiver<SourceState>) {
        let state = SourceState {
            source,
            ready: false,
            ports: 0,
            ignored: 0,
            faults: BTreeMap::new(),
            since: SystemTime::now(),
        };
        let (sender, receiver) = channel::channel(state);
        (Self { state: sender }, receiver)
    }

    /// Sets the present state, and logs each fault once when it comes, changes and goes.
    fn report(&self, ready: bool, ports: usize, ignored: usize, faults: BTreeMap<String, String>) {
        self.state.send_if_modified(|state| {
            let source = state.source;
            for (place, error) in &faults {
                if state.faults.get(place) != Some(error) {
                    warn!(%source, place = ?place, error = ?error, "source has a fault");
                }
            }
            for place in state.faults.keys().filter(|place| !faults.contains_key(*place)) {
                info!(%source, place = ?place, "source is over a fault");
            }
            let turned = (state.ready, state.faults.is_empty()) != (ready, faults.is_empty());
            let since = if turned { SystemTime::now() } else { state.since };
            let now = SourceState { source, ready, ports, ignored, faults, since };
            let changed = *state != now;
            *state = now;
            changed
        });
    }

    fn recheck(&self) -> Duration {
        if self.state.borrow().faults.is_empty() { RECHECK } else { RECHECK_FAULTY }
    }
}

/// Does file work where it may block. `None` only when the runtime is shutting down.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(lost) => match lost.try_into_panic() {
            Ok(cause) => panic::resume_unwind(cause),
            Err(_cancelled) => None,
        },
    }
}

fn unix_seconds<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().serialize(serializer)
}
