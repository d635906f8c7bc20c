//! Guests' ports from OVN's Southbound database: only the rows of ports on this host.
//!
//! Input are the database's servers and the list of local interfaces ([`Presence`]). Local sources
//! provide the port ids, so this source is asked only about ports whose id is known. It monitors
//! the rows of table `Port_Binding` that belong to these ports ([`bindings`]), and changes the
//! condition as interfaces appear and disappear. Without a port the condition is `false`. The
//! chassis of a row does not matter, because the interface is here; so a guest is served before,
//! during and after a migration.
//!
//! # Servers and lost connections
//!
//! - One server is used at a time; [`follow`] moves on to the next one. A cluster member that is
//!   disconnected from its cluster, or has an older log than another member had, is rejected
//!   ([`cluster`]).
//! - While no server is connected, the last rows stay valid for ports that stay. Only the owner of
//!   a *port* can be outdated by then: Neutron may have assigned it to another instance. That
//!   removes its interface, and with the interface the row is withdrawn, with or without a server.
//!   If an interface of the port reappears, nothing is reported before a server has responded.
//!   While it stays, the local source that knows the port id also names the instance, independently
//!   of OVN; a different instance is a dispute, and the port is not served. The same holds for a
//!   cluster member that lags behind.
//! - This source does not decide which port an interface has. If no local source knows the id any
//!   more, the row is valid only while there is an interface with the name of the port's tap.
//! - After a reconnection the rows are read again. Rows that no longer exist are withdrawn first.
//! - An invalid message ends the connection, and none of its content is used. An invalid row is
//!   withdrawn and reported, and does not affect other rows.
//! - Subports of a trunk name the parent port. They match the same condition, and are valid while
//!   the parent's interface is here.

mod bindings;
mod cluster;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::pin;
use std::time::Duration;

use ovsdb_client::{
    ConnectOptions, DatabaseReader, Disconnect, Notification, ReceiverDropped, Remote, Session, SessionError,
    TlsFiles, UpdateError, follow,
};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Reporter;
use super::row_tracker::{RowTracker, ServerError};
use crate::ids::PortId;
use crate::inventory::presence::Presence;
use crate::inventory::{Event, SourceKind};
use bindings::{Bindings, DATABASE, InitialRows, MONITOR};
use cluster::{ClusterMember, ClusterPositions};

pub(crate) use bindings::BindingError;

/// Longest pause between rounds, as in Open vSwitch's own clients (lib/reconnect.c), unless a
/// shorter one is configured.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// Longest accepted message. A row takes about a kilobyte.
const MAX_MESSAGE_BYTES: usize = 8 * 1024 * 1024;

/// Access to the database.
#[derive(Clone, Debug)]
pub(crate) struct OvnAccess {
    pub servers: Vec<Remote>,
    /// For `ssl:` servers.
    pub tls: TlsFiles,
    /// Limit for connecting and reading the rows.
    pub timeout: Duration,
    /// Longest pause between rounds of attempts.
    pub longest_pause: Duration,
    /// Silence after which a server is probed; `None` disables probes.
    pub probe_interval: Option<Duration>,
}

impl OvnAccess {
    /// Checks each server in turn.
    pub(crate) async fn probe(&self) -> Vec<(Remote, Result<(), ServerError>)> {
        let options = self.options();
        let mut results = Vec::new();
        let no_ports = BTreeSet::new();
        for server in &self.servers {
            let connected =
                options.within_timeout(ConnectedServer::connect(server, &options, &no_ports)).await;
            let result = connected.and_then(|server| ClusterPositions::default().accept(&server.member));
            results.push((server.clone(), result.map_err(ServerError::from)));
        }
        results
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions {
            tls: self.tls.clone(),
            timeout: self.timeout,
            probe_interval: self.probe_interval,
            message_limit: MAX_MESSAGE_BYTES,
        }
    }
}

/// Sends the rows of present ports until cancelled or until the receiver is dropped.
pub(crate) async fn run(
    access: OvnAccess,
    present: watch::Receiver<Presence>,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let source = OvnSource {
        options: access.options(),
        present,
        clusters: ClusterPositions::default(),
        bindings: Bindings::new(),
        valid: BTreeSet::new(),
        rows: RowTracker::new(SourceKind::OvnSouthbound, events, reporter),
    };
    // Cancelling at any point is safe: the next start reads all rows.
    let reading = Box::pin(follow(source, &access.servers, access.longest_pause.min(LONGEST_PAUSE)));
    let _stopped = cancel.run_until_cancelled_owned(reading).await;
}

struct OvnSource {
    options: ConnectOptions,
    present: watch::Receiver<Presence>,
    clusters: ClusterPositions,
    /// Rows of the current or the last server.
    bindings: Bindings,
    /// Ports whose rows are valid: the local ones; without a server, those that stayed since the
    /// last one.
    valid: BTreeSet<PortId>,
    rows: RowTracker<BindingError>,
}

impl DatabaseReader for OvnSource {
    async fn read(&mut self, server: &Remote) -> Result<Infallible, Disconnect> {
        // Connect and read the rows of present ports. Ports may disappear meanwhile.
        let (options, mut asked) = (self.options.clone(), ports(&self.present.borrow_and_update()));
        self.keep_only(&asked).await?;
        let connect = options.within_timeout(ConnectedServer::connect(server, &options, &asked));
        let ConnectedServer { mut session, mut member, rows } = self.while_disconnected(connect).await??;
        self.clusters.accept(&member)?;

        // Replace the rows of the previous server.
        self.bindings = Bindings::from_initial(&rows)?;
        drop(rows);
        self.valid = ports(&self.present.borrow_and_update());
        self.rows.server_connected();
        // Apply updates and changes of presence. At most one change of the condition is in
        // progress.
        let mut change = None;
        loop {
            self.rows.replace_all(self.bindings.read(&self.valid)).await?;
            self.rows.report();
            if change.is_none() && asked != self.valid {
                asked.clone_from(&self.valid);
                change = Some(session.change_condition(MONITOR, &bindings::clauses(&asked)));
            }
            let notification = tokio::select! {
                notification = session.next_notification() => notification?,
                now = changed_ports(&mut self.present) => {
                    self.valid = now;
                    continue;
                }
            };
            match notification {
                Notification::Update { monitor, format, rows } if monitor == MONITOR.id => {
                    self.bindings.apply(format, &rows)?;
                }
                Notification::Update { monitor, format, rows } if monitor == cluster::MONITOR.id => {
                    member.apply(format, &rows)?;
                    self.clusters.accept(&member)?;
                }
                Notification::Update { monitor, .. } => {
                    return Err(
                        UpdateError::unexpected("an update of a requested monitor", &monitor.into()).into()
                    );
                }
                Notification::Reply { request, error } if change == Some(request) => {
                    if let Some(error) = error {
                        return Err(SessionError::Refused { method: "monitor_cond_change", error }.into());
                    }
                    change = None;
                }
                Notification::Reply { .. } => {}
            }
        }
    }

    fn failed(&mut self, server: &Remote, error: &SessionError) {
        self.rows.server_failed(server, error);
    }

    async fn wait(&mut self, pause: Duration) -> Result<(), ReceiverDropped> {
        self.while_disconnected(sleep(pause)).await
    }
}

impl OvnSource {
    /// Waits for a future while no server is connected. Withdraws the rows of ports that disappear.
    async fn while_disconnected<T>(&mut self, work: impl Future<Output = T>) -> Result<T, ReceiverDropped> {
        let mut work = pin!(work);
        loop {
            let now = tokio::select! {
                done = &mut work => return Ok(done),
                now = changed_ports(&mut self.present) => now,
            };
            self.keep_only(&now).await?;
        }
    }

    /// Withdraws the rows of all ports but these.
    async fn keep_only(&mut self, ports: &BTreeSet<PortId>) -> Result<(), ReceiverDropped> {
        self.valid.retain(|port| ports.contains(port));
        self.rows.replace_all(self.bindings.read(&self.valid)).await?;
        self.rows.report();
        Ok(())
    }
}

/// Server that has sent its rows.
struct ConnectedServer {
    session: Session,
    member: ClusterMember,
    rows: InitialRows,
}

impl ConnectedServer {
    async fn connect(
        server: &Remote,
        options: &ConnectOptions,
        asked: &BTreeSet<PortId>,
    ) -> Result<Self, SessionError> {
        let mut session = Session::connect(server, options).await?;
        let member = ClusterMember::query(&mut session, DATABASE).await?;
        let rows = InitialRows::request(&mut session, asked).await?;
        Ok(Self { session, member, rows })
    }
}

/// Waits for a change, and returns the ports on this host.
async fn changed_ports(presence: &mut watch::Receiver<Presence>) -> BTreeSet<PortId> {
    match presence.changed().await {
        Ok(()) => ports(&presence.borrow_and_update()),
        // The sender is dropped only when the agent stops.
        Err(_) => pending().await,
    }
}

fn ports(presence: &Presence) -> BTreeSet<PortId> {
    presence.iter().filter_map(|present| present.port).collect()
}

#[cfg(test)]
mod tests;
