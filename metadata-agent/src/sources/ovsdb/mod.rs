//! Guests' ports from the database of the host's Open vSwitch, which both ML2/OVS and OVN write.
//!
//! Input is the OVSDB server of the host: the one that is configured, or the first of [`USUAL_SOCKETS`] that is
//! there. No socket anywhere is no fault: the host has no Open vSwitch, or has it not yet. Each row of the table
//! `Interface` is one key of the inventory; [`interfaces`] tells what is read from it. The database knows the
//! instance of a port but not its project, so by itself it makes no port known.
//!
//! # Rows and losses
//!
//! - While the server is not there, what its rows said last holds: rows change through this server alone, so they
//!   stand still while it restarts, and no guest shall notice that it does. Should they not (it is there, but not for
//!   us), a row that is out of date serves nobody by itself: another source has to name, now, the same instance for
//!   the same port, and one that names another instance makes it a conflict.
//! - When the server is back it is asked for all rows anew. A row that is not among them is withdrawn before anything
//!   else is told.
//! - Whatever cannot be understood ends the connection: half a message, another type, a change to a row that is not
//!   there. Nothing of such a message is told, and nothing is told again before all rows were read anew.
//! - A row that cannot be understood (its form is right, but an id in it is none) says nothing: what it said before is
//!   withdrawn, it shows as a fault, and it touches no other row.

mod interfaces;
mod tables;
mod trunks;

use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

use ovsdb_client::{
    ConnectOptions, DatabaseReader, Disconnect, Monitor, Notification, ReceiverDropped, Remote, Session,
    SessionError, TlsFiles, UpdateError, follow,
};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Reporter;
use super::rows::{Rows, ServerError};
use crate::inventory::{Event, SourceKind};
use interfaces::Interfaces;
use tables::TABLES;

pub use tables::RowError;

/// Where packages and Open vSwitch itself put the server's socket.
pub const USUAL_SOCKETS: [&str; 3] =
    ["/run/openvswitch/db.sock", "/var/run/openvswitch/db.sock", "/usr/local/var/run/openvswitch/db.sock"];

const DATABASE: &str = "Open_vSwitch";

/// How often the usual sockets are looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long the server may be silent.
const QUIET: Duration = Duration::from_secs(10);
/// The longest message that is read. A host with the 16384 ports that Open vSwitch can have takes about 8 MiB.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

const MONITOR: Monitor = Monitor { database: DATABASE, id: "metadata-agent", tables: TABLES };

/// Where the database is, and how to get to it.
#[derive(Clone, Debug)]
pub struct Access {
    /// The server, where one is configured.
    pub connection: Option<Remote>,
    /// For a server at `ssl:`.
    pub tls: TlsFiles,
    /// How long it may take to connect and to read the rows.
    pub patience: Duration,
}

impl Access {
    /// Whether a server with the database answers; `None` if there is none to be asked.
    pub async fn probe(&self) -> Option<(Remote, Result<(), ServerError>)> {
        let remote = self.connection.clone().or_else(usual)?;
        let options = self.options();
        let asked =
            async { Session::connect(&remote, &options).await?.require_database(DATABASE, DATABASE).await };
        let answer = options.within_timeout(asked).await;
        Some((remote, answer.map(|_there| ()).map_err(ServerError::from)))
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions {
            tls: self.tls.clone(),
            timeout: self.patience,
            probe_interval: Some(QUIET),
            message_limit: MAX_MESSAGE_BYTES,
        }
    }
}

/// Sends what the database says, until cancelled or until nobody listens.
pub async fn run(access: Access, events: mpsc::Sender<Event>, reporter: Reporter, cancel: CancellationToken) {
    let rows = Rows::new(SourceKind::Ovsdb, events, reporter);
    let options = access.options();
    let reading = async {
        let server = match access.connection {
            Some(server) => server,
            None => look_for_usual(&rows).await,
        };
        follow(Source { options, rows }, &[server], LONGEST_PAUSE).await
    };
    // Nothing is lost by stopping anywhere: the next start reads all rows.
    let _stopped = cancel.run_until_cancelled_owned(reading).await;
}

/// The first of the usual servers that is there. One that goes again will be back.
async fn look_for_usual(rows: &Rows<RowError>) -> Remote {
    loop {
        if let Some(server) = usual() {
            return server;
        }
        rows.report_no_server();
        sleep(LOOK_AGAIN).await;
    }
}

fn usual() -> Option<Remote> {
    let socket = USUAL_SOCKETS.iter().map(Path::new).find(|path| path.exists())?;
    Some(Remote::Unix(socket.to_owned()))
}

struct Source {
    options: ConnectOptions,
    rows: Rows<RowError>,
}

impl DatabaseReader for Source {
    async fn read(&mut self, server: &Remote) -> Result<Infallible, Disconnect> {
        let begin = async {
            let mut session = Session::connect(server, &self.options).await?;
            session.require_database(DATABASE, DATABASE).await?;
            let (format, rows) = session.monitor(MONITOR).await?;
            Ok((session, format, rows))
        };
        let (mut session, format, rows) = self.options.within_timeout(begin).await?;

        let mut interfaces = Interfaces::new();
        self.rows.become_all(interfaces.apply(format, &rows)?).await?;
        drop(rows);
        self.rows.found();
        loop {
            self.rows.report();
            match session.next_notification().await? {
                Notification::Update { monitor, format, rows } if monitor == MONITOR.id => {
                    self.rows.tell(interfaces.apply(format, &rows)?).await?;
                }
                Notification::Update { monitor, .. } => {
                    return Err(UpdateError::unexpected("an update of our monitor", &monitor.into()).into());
                }
                Notification::Reply { .. } => {}
            }
        }
    }

    fn failed(&mut self, server: &Remote, error: &SessionError) {
        self.rows.failed(server, error);
    }

    async fn wait(&mut self, pause: Duration) -> Result<(), ReceiverDropped> {
        sleep(pause).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
