//! Guests' ports from OVN's Southbound database: the rows of the ports that are on this host, and no others.
//!
//! Input are the servers of the database, and which ports' interfaces are here ([`Presence`]). Local sources tell that: this
//! one is asked about ports that have an id already. It monitors the table `Port_Binding` on the condition that a row is of
//! one of these ports ([`bindings`] tells what is read from it), and changes the condition as interfaces come and go; while
//! there is none, the condition is `false`. On which chassis OVN sees a port is of no consequence, since the interface is
//! here: so a guest is served before, during and after its migration.
//!
//! # Servers and losses
//!
//! - One server is spoken to at a time. When it is lost the next of the list has its turn; where to begin is a matter of
//!   chance, so that the hosts of a cloud spread over a cluster. A pause is made when all were tried. A member that is cut
//!   off from its cluster, or begins with less than another member had before, is no server ([`member`]).
//! - While there is no server, what the rows said last holds, for those ports that stay. What can be out of date by then is
//!   who owns a *port*: Neutron may have given it to another instance meanwhile. That takes its interface away, here or for
//!   good, and with the interface the row is withdrawn, server or not. Should an interface of the same port be here again,
//!   nothing is told of it before a server has answered. And as long as it stays, the local source that told the port's id
//!   names the instance as well, independently of OVN, wherever Nova plugged it: another one than the row's is a conflict,
//!   which serves nobody. The same holds for a member that lags behind its cluster.
//! - Who a port is, is not for this source to say: once no local source tells the id any more, the row holds only while an
//!   interface is here that has the name of the port's tap.
//! - When a server is back, it is asked for the rows anew. One that is not among them is withdrawn before anything else is
//!   told.
//! - Whatever cannot be understood ends the connection; nothing of such a message is told. A row that cannot be understood
//!   says nothing, shows as a fault and touches no other row.
//! - The ports of a trunk's VLANs name the port of the trunk as their parent. They come by the same condition, and hold as
//!   long as the trunk's own interface is here.

mod bindings;
mod member;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::pin;
use std::time::Duration;

use ovsdb_client::{
    ConnectOptions, DatabaseReader, Disconnect, Notification, ReceiverDropped, Remote, Session, SessionError,
    TlsFiles, UpdateError, UpdateFormat, follow,
};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Reporter;
use super::rows::{Rows, ServerError};
use crate::ids::PortId;
use crate::inventory::presence::Presence;
use crate::inventory::{Event, SourceKind};
use bindings::{Bindings, DATABASE, MONITOR};
use member::{Clusters, Member};

pub use bindings::RowError;

/// The longest pause between two rounds, as for Open vSwitch's own clients (lib/reconnect.c), unless configured shorter.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// The longest message that is read. A row takes about a kilobyte.
const MAX_MESSAGE_BYTES: usize = 8 * 1024 * 1024;

/// Where the database is, and how to get to it.
#[derive(Clone, Debug)]
pub struct Access {
    /// Its servers, one or more.
    pub servers: Vec<Remote>,
    /// For servers at `ssl:`.
    pub tls: TlsFiles,
    /// How long it may take to connect and to read the rows.
    pub patience: Duration,
    /// The longest pause between two rounds.
    pub longest_pause: Duration,
    /// How long a server may be silent; `None` for ever.
    pub probe: Option<Duration>,
}

impl Access {
    /// Asks each server, in turn, whether it would do.
    pub async fn probe(&self) -> Vec<(Remote, Result<(), ServerError>)> {
        let options = self.options();
        let mut answers = Vec::new();
        let nobody = BTreeSet::new();
        for server in &self.servers {
            let asked = options.within_timeout(Conversation::begin(server, &options, &nobody)).await;
            let answer = asked.and_then(|told| Clusters::default().admit(&told.member));
            answers.push((server.clone(), answer.map_err(ServerError::from)));
        }
        answers
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions {
            tls: self.tls.clone(),
            timeout: self.patience,
            probe_interval: self.probe,
            message_limit: MAX_MESSAGE_BYTES,
        }
    }
}

/// Sends what the database says of the ports that are present, until cancelled or until nobody listens.
pub async fn run(
    access: Access,
    present: watch::Receiver<Presence>,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let source = Source {
        options: access.options(),
        present,
        clusters: Clusters::default(),
        bindings: Bindings::new(),
        answered: BTreeSet::new(),
        rows: Rows::new(SourceKind::OvnSouthbound, events, reporter),
    };
    // Nothing is lost by stopping anywhere: the next start reads all rows.
    let reading = Box::pin(follow(source, &access.servers, access.longest_pause.min(LONGEST_PAUSE)));
    let _stopped = cancel.run_until_cancelled_owned(reading).await;
}

struct Source {
    options: ConnectOptions,
    present: watch::Receiver<Presence>,
    clusters: Clusters,
    /// As the present server told it, or the last one.
    bindings: Bindings,
    /// The ports whose rows count: those that are here; while there is no server, those that were never away since.
    answered: BTreeSet<PortId>,
    rows: Rows<RowError>,
}

impl DatabaseReader for Source {
    async fn read(&mut self, server: &Remote) -> Result<Infallible, Disconnect> {
        let (options, mut asked) = (self.options.clone(), ports(&self.present.borrow_and_update()));
        self.keep_only(&asked).await?;
        let begin = options.within_timeout(Conversation::begin(server, &options, &asked));
        let Conversation { mut session, mut member, rows } = self.meanwhile(begin).await??;
        self.clusters.admit(&member)?;

        let mut bindings = Bindings::new();
        bindings.apply(UpdateFormat::Differences, &rows)?;
        drop(rows);
        self.bindings = bindings;
        self.answered = ports(&self.present.borrow_and_update());
        self.rows.found();
        let mut change = None;
        loop {
            self.rows.become_all(self.bindings.read(&self.answered)).await?;
            self.rows.report();
            if change.is_none() && asked != self.answered {
                asked.clone_from(&self.answered);
                change = Some(session.change_condition(MONITOR, &bindings::clauses(&asked)));
            }
            let news = tokio::select! {
                news = session.next_notification() => news?,
                now = present(&mut self.present) => {
                    self.answered = now;
                    continue;
                }
            };
            match news {
                Notification::Update { monitor, format, rows } if monitor == MONITOR.id => {
                    self.bindings.apply(format, &rows)?;
                }
                Notification::Update { monitor, format, rows } if monitor == member::MONITOR.id => {
                    member.apply(format, &rows)?;
                    self.clusters.admit(&member)?;
                }
                Notification::Update { monitor, .. } => {
                    return Err(UpdateError::unexpected("an update of our monitors", &monitor.into()).into());
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
        self.rows.failed(server, error);
    }

    async fn wait(&mut self, pause: Duration) -> Result<(), ReceiverDropped> {
        self.meanwhile(sleep(pause)).await
    }
}

impl Source {
    /// Does something that takes time while there is no server, and lets go the rows of ports that leave.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, ReceiverDropped> {
        let mut work = pin!(work);
        loop {
            let now = tokio::select! {
                done = &mut work => return Ok(done),
                now = present(&mut self.present) => now,
            };
            self.keep_only(&now).await?;
        }
    }

    /// Lets go the rows of all ports but these.
    async fn keep_only(&mut self, ports: &BTreeSet<PortId>) -> Result<(), ReceiverDropped> {
        self.answered.retain(|port| ports.contains(port));
        self.rows.become_all(self.bindings.read(&self.answered)).await?;
        self.rows.report();
        Ok(())
    }
}

/// A server that has told its rows.
struct Conversation {
    session: Session,
    member: Member,
    rows: Value,
}

impl Conversation {
    async fn begin(
        server: &Remote,
        options: &ConnectOptions,
        asked: &BTreeSet<PortId>,
    ) -> Result<Self, SessionError> {
        let mut session = Session::connect(server, options).await?;
        let member = Member::ask(&mut session, DATABASE).await?;
        let rows = session.monitor_where(MONITOR, &bindings::clauses(asked)).await?;
        Ok(Self { session, member, rows })
    }
}

/// The ports on this host, when they are not what they were.
async fn present(presence: &mut watch::Receiver<Presence>) -> BTreeSet<PortId> {
    match presence.changed().await {
        Ok(()) => ports(&presence.borrow_and_update()),
        // Nobody looks after interfaces any more: the agent is about to stop.
        Err(_) => pending().await,
    }
}

fn ports(presence: &Presence) -> BTreeSet<PortId> {
    presence.iter().filter_map(|present| present.port).collect()
}

#[cfg(test)]
mod tests;
