//! Tracks the rows of a database source: sends an event for each changed row and reports the state.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ovsdb_client::{ReceiverDropped, Remote, SessionError};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::Reporter;
use crate::error_chain::error_chain;
use crate::inventory::{Event, PortRecord, SourceKind};

/// Interpretation of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "short-lived, and mostly the large one")]
pub(super) enum RowState<E> {
    Deleted,
    /// The row does not concern a guest.
    Ignored,
    Port(PortRecord),
    /// The row concerns a port but is not valid.
    Invalid {
        /// Name of the row in reports.
        name: String,
        error: E,
    },
}

/// States of all rows, as sent.
#[derive(Debug)]
pub(super) struct RowTracker<E> {
    source: SourceKind,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    /// All rows were read at least once.
    ready: bool,
    /// Errors of servers since the last connection.
    server_errors: BTreeMap<String, String>,
    ports: HashMap<Uuid, PortRecord>,
    ignored: BTreeSet<Uuid>,
    invalid: BTreeMap<Uuid, (String, E)>,
}

impl<E: std::error::Error> RowTracker<E> {
    pub(super) fn new(source: SourceKind, events: mpsc::Sender<Event>, reporter: Reporter) -> Self {
        Self {
            source,
            events,
            reporter,
            ready: false,
            server_errors: BTreeMap::new(),
            ports: HashMap::new(),
            ignored: BTreeSet::new(),
            invalid: BTreeMap::new(),
        }
    }

    /// A server has sent its rows.
    pub(super) fn server_connected(&mut self) {
        self.ready = true;
        self.server_errors.clear();
    }

    pub(super) fn server_failed(&mut self, server: &Remote, error: &SessionError) {
        self.server_errors.insert(server.to_string(), describe(error));
        self.report();
    }

    /// Replaces all rows by these.
    pub(super) async fn replace_all(
        &mut self,
        mut states: BTreeMap<Uuid, RowState<E>>,
    ) -> Result<(), ReceiverDropped> {
        for row in self.ports.keys().chain(&self.ignored).chain(self.invalid.keys()) {
            states.entry(*row).or_insert(RowState::Deleted);
        }
        self.update(states).await
    }

    /// Updates these rows. Sends withdrawals first, so that a port that moves from one row to
    /// another is never reported by both.
    pub(super) async fn update(
        &mut self,
        states: BTreeMap<Uuid, RowState<E>>,
    ) -> Result<(), ReceiverDropped> {
        let mut updates = Vec::new();
        for (row, state) in states {
            let before = self.remove(row);
            let now = match state {
                RowState::Deleted => None,
                RowState::Ignored => {
                    self.ignored.insert(row);
                    None
                }
                RowState::Invalid { name, error } => {
                    self.invalid.insert(row, (name, error));
                    None
                }
                RowState::Port(record) => {
                    self.ports.insert(row, record.clone());
                    Some(record)
                }
            };
            if before == now {
                continue;
            }
            match now {
                None => self.send(row, Vec::new()).await?,
                Some(record) => updates.push((row, record)),
            }
        }
        for (row, record) in updates {
            self.send(row, vec![record]).await?;
        }
        Ok(())
    }

    /// Reports the state of the source: invalid rows and failed servers by name.
    pub(super) fn report(&self) {
        let rows = self.invalid.values().map(|(name, error)| (name.clone(), error.to_string()));
        let faults = rows.chain(self.server_errors.clone()).collect();
        self.reporter.report(self.ready, self.ports.len(), self.ignored.len(), faults);
    }

    /// Reports that there is no server, which is not an error.
    pub(super) fn report_no_server(&self) {
        self.reporter.report(true, 0, 0, BTreeMap::new());
    }

    /// Removes a row and returns the record that was sent.
    fn remove(&mut self, row: Uuid) -> Option<PortRecord> {
        self.ignored.remove(&row);
        self.invalid.remove(&row);
        self.ports.remove(&row)
    }

    async fn send(&self, row: Uuid, ports: Vec<PortRecord>) -> Result<(), ReceiverDropped> {
        let event = Event { source: self.source, key: row.to_string(), ports };
        self.events.send(event).await.map_err(|_| ReceiverDropped)
    }
}

/// Failure of an OVSDB server. The message names the options to check.
#[derive(Debug, thiserror::Error)]
#[error("{}", describe(.0))]
pub(crate) struct ServerError(#[from] SessionError);

fn describe(error: &SessionError) -> String {
    let text = error_chain(error);
    if matches!(error, SessionError::NoCaCertificates) {
        format!("{text} (ovn_sb_ca_cert; ssl_ca_cert_file for the host's Open vSwitch)")
    } else if matches!(error, SessionError::Timeout { .. }) {
        format!("{text} (ovsdb_connection_timeout)")
    } else {
        text
    }
}
