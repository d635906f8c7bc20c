//! Guests' ports from the database of the host's Open vSwitch, which both ML2/OVS and OVN write.
//!
//! Input is the OVSDB server of the host: the configured one, or the first of [`USUAL_SOCKETS`]
//! that has a server ([`usual_sockets`]). No socket is not an error: the host may not run Open
//! vSwitch, or not yet. Each row of the table `Interface` is one key of the inventory
//! ([`interfaces`]). The database knows the instance of a port but not its project, so this source
//! alone makes no port known.
//!
//! # Lost connections
//!
//! - While the server is not reachable, its last rows stay valid. Rows change only through this
//!   server, so nothing changes while it restarts, and guests do not notice. If the server runs but
//!   is not reachable for the agent, an outdated row alone serves no guest: another source must
//!   name the same instance now, and a source that names another instance makes the port disputed.
//! - After a reconnection all rows are read again. Rows that no longer exist are withdrawn first.
//! - An invalid message ends the connection. None of its content is used, and nothing is sent until
//!   all rows have been read again.
//! - An invalid row, such as one with a malformed id, is withdrawn and reported. It does not affect
//!   other rows.

mod interfaces;
mod schema;
mod trunks;
mod usual_sockets;

use std::convert::Infallible;
use std::time::Duration;

use ovsdb_client::{
    ConnectOptions, DatabaseReader, Disconnect, Monitor, Notification, ReceiverDropped, Remote, Session,
    SessionError, TlsFiles, UpdateError, follow,
};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Reporter;
use super::row_tracker::{RowTracker, ServerError};
use crate::inventory::{Event, SourceKind};
use interfaces::Interfaces;
use schema::TABLES;
use usual_sockets::UsualSockets;

pub(crate) use schema::InterfaceError;

/// Sockets of the server, as set by packages and by Open vSwitch itself.
pub(crate) const USUAL_SOCKETS: [&str; 3] =
    ["/run/openvswitch/db.sock", "/var/run/openvswitch/db.sock", "/usr/local/var/run/openvswitch/db.sock"];

const DATABASE: &str = "Open_vSwitch";

/// Interval between searches for a usual socket.
const SOCKET_SEARCH_INTERVAL: Duration = Duration::from_secs(2);
/// Longest pause between connection attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Silence after which the server is probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// Longest accepted message. Open vSwitch's maximum of 16384 ports takes about 8 MiB.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

const MONITOR: Monitor = Monitor { database: DATABASE, id: "metadata-agent", tables: TABLES };

/// Access to the database.
#[derive(Clone, Debug)]
pub(crate) struct OvsdbAccess {
    /// Configured server.
    pub connection: Option<Remote>,
    /// For an `ssl:` server.
    pub tls: TlsFiles,
    /// Limit for connecting and reading the rows.
    pub timeout: Duration,
}

impl OvsdbAccess {
    /// Checks that a server with the database responds; `None` if there is no server.
    pub(crate) async fn probe(&self) -> Option<(Remote, Result<(), ServerError>)> {
        let remote = self.connection.clone().or_else(|| UsualSockets::new(USUAL_SOCKETS).next())?;
        let options = self.options();
        let steps =
            async { Session::connect(&remote, &options).await?.require_database(DATABASE, DATABASE).await };
        let result = options.within_timeout(steps).await;
        Some((remote, result.map(|_has_other| ()).map_err(ServerError::from)))
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions {
            tls: self.tls.clone(),
            timeout: self.timeout,
            probe_interval: Some(PROBE_INTERVAL),
            message_limit: MAX_MESSAGE_BYTES,
        }
    }
}

/// Sends the ports of the database until cancelled or until the receiver is dropped.
pub(crate) async fn run(
    access: OvsdbAccess,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let usual = UsualSockets::new(USUAL_SOCKETS);
    let reading = Box::pin(read_rows(access, usual, RowTracker::new(SourceKind::Ovsdb, events, reporter)));
    // Cancelling at any point is safe: the next start reads all rows.
    let _stopped = cancel.run_until_cancelled_owned(reading).await;
}

async fn read_rows(
    access: OvsdbAccess,
    mut usual: UsualSockets,
    rows: RowTracker<InterfaceError>,
) -> ReceiverDropped {
    let options = access.options();
    let (server, usual) = match access.connection {
        Some(server) => (server, None),
        None => (wait_for_usual_server(&mut usual, &rows).await, Some(usual)),
    };
    let source = OvsdbSource { options, rows, server: server.clone(), usual };
    follow(source, &[server], LONGEST_PAUSE).await
}

async fn wait_for_usual_server(usual: &mut UsualSockets, rows: &RowTracker<InterfaceError>) -> Remote {
    loop {
        if let Some(server) = usual.next() {
            return server;
        }
        rows.report_no_server();
        sleep(SOCKET_SEARCH_INTERVAL).await;
    }
}

struct OvsdbSource {
    options: ConnectOptions,
    rows: RowTracker<InterfaceError>,
    server: Remote,
    /// `None` if the server is configured.
    usual: Option<UsualSockets>,
}

impl DatabaseReader for OvsdbSource {
    async fn read(&mut self, _: &Remote) -> Result<Infallible, Disconnect> {
        // Connect and read all rows.
        let initial = async {
            let mut session = Session::connect(&self.server, &self.options).await?;
            session.require_database(DATABASE, DATABASE).await?;
            let (format, rows) = session.monitor(MONITOR).await?;
            Ok((session, format, rows))
        };
        let (mut session, format, rows) = self.options.within_timeout(initial).await?;

        let mut interfaces = Interfaces::new();
        self.rows.replace_all(interfaces.apply(format, &rows)?).await?;
        drop(rows);
        self.rows.server_connected();
        // Apply updates until the connection fails.
        loop {
            self.rows.report();
            match session.next_notification().await? {
                Notification::Update { monitor, format, rows } if monitor == MONITOR.id => {
                    self.rows.update(interfaces.apply(format, &rows)?).await?;
                }
                Notification::Update { monitor, .. } => {
                    return Err(
                        UpdateError::unexpected("an update of a requested monitor", &monitor.into()).into()
                    );
                }
                Notification::Reply { .. } => {}
            }
        }
    }

    fn failed(&mut self, _: &Remote, error: &SessionError) {
        self.rows.server_failed(&self.server, error);
        if let Some(next) = self.usual.as_mut().and_then(UsualSockets::next) {
            self.server = next;
        }
    }

    async fn wait(&mut self, pause: Duration) -> Result<(), ReceiverDropped> {
        sleep(pause).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
