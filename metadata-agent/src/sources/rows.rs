//! What a source has made of each row of a database, how news of rows become events, and what the source says of itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ovsdb_client::{ReceiverDropped, Remote, SessionError};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::Reporter;
use crate::error_chain::error_chain;
use crate::inventory::{Event, PortRecord, SourceKind};

/// What a row says now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "short-lived, and mostly the large one")]
pub(super) enum Reading<E> {
    /// The row is gone.
    Gone,
    /// It is none of ours.
    Nobodys,
    /// It is a port's.
    Port(PortRecord),
    /// It is a port's but cannot be understood.
    Fault {
        /// The row's name for people.
        name: String,
        error: E,
    },
}

/// What was made of each row.
#[derive(Debug)]
pub(super) struct Rows<E> {
    source: SourceKind,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    /// All rows were read once.
    ready: bool,
    /// What is wrong with servers, as long as none does.
    lost: BTreeMap<String, String>,
    ports: HashMap<Uuid, PortRecord>,
    nobodys: BTreeSet<Uuid>,
    faults: BTreeMap<Uuid, (String, E)>,
}

impl<E: std::error::Error> Rows<E> {
    pub(super) fn new(source: SourceKind, events: mpsc::Sender<Event>, reporter: Reporter) -> Self {
        Self {
            source,
            events,
            reporter,
            ready: false,
            lost: BTreeMap::new(),
            ports: HashMap::new(),
            nobodys: BTreeSet::new(),
            faults: BTreeMap::new(),
        }
    }

    /// There is a server, and it has told its rows.
    pub(super) fn found(&mut self) {
        self.ready = true;
        self.lost.clear();
    }

    /// There is nothing to be had from a server.
    pub(super) fn failed(&mut self, server: &Remote, error: &SessionError) {
        self.lost.insert(server.to_string(), describe(error));
        self.report();
    }

    /// Takes these rows for all there are.
    pub(super) async fn become_all(
        &mut self,
        mut readings: BTreeMap<Uuid, Reading<E>>,
    ) -> Result<(), ReceiverDropped> {
        for row in self.ports.keys().chain(&self.nobodys).chain(self.faults.keys()) {
            readings.entry(*row).or_insert(Reading::Gone);
        }
        self.tell(readings).await
    }

    /// Takes news of these rows. Withdrawals go first, so that what passes from one row to another is never with both.
    pub(super) async fn tell(&mut self, readings: BTreeMap<Uuid, Reading<E>>) -> Result<(), ReceiverDropped> {
        let mut news = Vec::new();
        for (row, reading) in readings {
            let before = self.take(row);
            let now = match reading {
                Reading::Gone => None,
                Reading::Nobodys => {
                    self.nobodys.insert(row);
                    None
                }
                Reading::Fault { name, error } => {
                    self.faults.insert(row, (name, error));
                    None
                }
                Reading::Port(facts) => {
                    self.ports.insert(row, facts.clone());
                    Some(facts)
                }
            };
            if before == now {
                continue;
            }
            match now {
                None => self.send(row, Vec::new()).await?,
                Some(facts) => news.push((row, facts)),
            }
        }
        for (row, facts) in news {
            self.send(row, vec![facts]).await?;
        }
        Ok(())
    }

    /// Reports the state of the rows, and what is wrong with servers, by their names.
    pub(super) fn report(&self) {
        let rows = self.faults.values().map(|(name, error)| (name.clone(), error.to_string()));
        let faults = rows.chain(self.lost.clone()).collect();
        self.reporter.report(self.ready, self.ports.len(), self.nobodys.len(), faults);
    }

    /// Reports that there is no server to be asked, and that this is well.
    pub(super) fn report_no_server(&self) {
        self.reporter.report(true, 0, 0, BTreeMap::new());
    }

    /// Forgets a row, and hands back what was told of it.
    fn take(&mut self, row: Uuid) -> Option<PortRecord> {
        self.nobodys.remove(&row);
        self.faults.remove(&row);
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
pub struct ServerError(#[from] SessionError);

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
