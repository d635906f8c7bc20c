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

mod framing;
mod interfaces;
mod replica;
mod session;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Reporter;
use crate::config::OvsdbRemote;
use crate::inventory::{Event, Facts, SourceKind};
use interfaces::{Interfaces, Reading, TABLES};
use session::Session;

pub use framing::FramingError;
pub use interfaces::RowError;
pub use replica::UpdateError;
pub use session::{MAX_MESSAGE_BYTES, SessionError};

/// Where packages and Open vSwitch itself put the server's socket.
pub const USUAL_SOCKETS: [&str; 3] =
    ["/run/openvswitch/db.sock", "/var/run/openvswitch/db.sock", "/usr/local/var/run/openvswitch/db.sock"];

const DATABASE: &str = "Open_vSwitch";

/// How often the usual sockets are looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// The pause after the first loss. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause, and how long a connection must have held for the next loss to be a first one again.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Sends what the database says, until cancelled or until nobody listens.
pub async fn run(
    connection: Option<OvsdbRemote>,
    patience: Duration,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let source = Source { patience, events, reporter, ready: false, told: Told::default() };
    // Nothing is lost by stopping anywhere: the next start reads all rows.
    let _stopped = cancel.run_until_cancelled_owned(source.follow(connection)).await;
}

/// Whether a server with the database answers; `None` if there is none to be asked.
pub async fn probe(
    connection: Option<&OvsdbRemote>,
    patience: Duration,
) -> Option<(OvsdbRemote, Result<(), SessionError>)> {
    let remote = connection.cloned().or_else(usual)?;
    let asked = timeout(patience, async { Session::open(&remote).await?.expect_database(DATABASE).await });
    let answer = asked.await.unwrap_or(Err(SessionError::Late { limit: patience }));
    Some((remote, answer))
}

fn usual() -> Option<OvsdbRemote> {
    let socket = USUAL_SOCKETS.iter().map(Path::new).find(|path| path.exists())?;
    Some(OvsdbRemote::Unix(socket.to_owned()))
}

struct Source {
    patience: Duration,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    ready: bool,
    told: Told,
}

/// What was made of each row.
#[derive(Debug, Default)]
struct Told {
    guests: HashMap<Uuid, Facts>,
    nobodys: BTreeSet<Uuid>,
    faults: BTreeMap<Uuid, (String, RowError)>,
}

/// Why a conversation ended.
enum End {
    Lost(SessionError),
    NobodyListens,
}

impl<E: Into<SessionError>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Lost(error.into())
    }
}

impl Source {
    async fn follow(mut self, connection: Option<OvsdbRemote>) -> Option<()> {
        let mut known = connection;
        let mut pause = FIRST_PAUSE;
        loop {
            // A socket that was there and is gone is that of a server that will be back.
            known = known.or_else(usual);
            let Some(remote) = &known else {
                self.reporter.report(true, 0, 0, BTreeMap::new());
                sleep(LOOK_AGAIN).await;
                continue;
            };
            let begin = Instant::now();
            let End::Lost(error) = self.converse(remote).await else { return None };
            if begin.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            self.report(Some((remote, error)));
            sleep(jittered(pause)).await;
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    }

    async fn converse(&mut self, remote: &OvsdbRemote) -> End {
        let Err(end) = self.keep_in_step(remote).await;
        end
    }

    async fn keep_in_step(&mut self, remote: &OvsdbRemote) -> Result<std::convert::Infallible, End> {
        let begin = async {
            let mut session = Session::open(remote).await?;
            session.expect_database(DATABASE).await?;
            let (form, rows) = session.monitor(DATABASE, TABLES).await?;
            Ok::<_, SessionError>((session, form, rows))
        };
        let late = SessionError::Late { limit: self.patience };
        let (mut session, form, rows) = timeout(self.patience, begin).await.unwrap_or(Err(late))?;

        let mut interfaces = Interfaces::new();
        let mut readings = interfaces.apply(form, &rows)?;
        drop(rows);
        for row in self.told.rows() {
            readings.entry(row).or_insert(Reading::Gone);
        }
        self.ready = true;
        loop {
            self.tell(readings).await?;
            self.report(None);
            readings = interfaces.apply(form, &session.update(form).await?)?;
        }
    }

    /// Withdrawals go first, so that what passes from one row to another is never with both.
    async fn tell(&mut self, readings: BTreeMap<Uuid, Reading>) -> Result<(), End> {
        let mut news = Vec::new();
        for (row, reading) in readings {
            let before = self.told.take(row);
            let now = match reading {
                Reading::Gone => None,
                Reading::Nobodys => {
                    self.told.nobodys.insert(row);
                    None
                }
                Reading::Fault { name, error } => {
                    self.told.faults.insert(row, (name, error));
                    None
                }
                Reading::Guest(facts) => {
                    self.told.guests.insert(row, facts.clone());
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

    async fn send(&self, row: Uuid, ports: Vec<Facts>) -> Result<(), End> {
        let event = Event { source: SourceKind::Ovsdb, key: row.to_string(), ports };
        self.events.send(event).await.map_err(|_| End::NobodyListens)
    }

    fn report(&self, lost: Option<(&OvsdbRemote, SessionError)>) {
        let rows = self.told.faults.values().map(|(name, error)| (name.clone(), error.to_string()));
        let mut faults: BTreeMap<_, _> = rows.collect();
        if let Some((remote, error)) = lost {
            faults.insert(remote.to_string(), error.to_string());
        }
        self.reporter.report(self.ready, self.told.guests.len(), self.told.nobodys.len(), faults);
    }
}

impl Told {
    fn rows(&self) -> Vec<Uuid> {
        self.guests.keys().chain(&self.nobodys).chain(self.faults.keys()).copied().collect()
    }

    /// Forgets a row, and hands back what was told of it.
    fn take(&mut self, row: Uuid) -> Option<Facts> {
        self.nobodys.remove(&row);
        self.faults.remove(&row);
        self.guests.remove(&row)
    }
}

/// Between half of it and all of it, so that clients that lost one server do not come back as one.
fn jittered(pause: Duration) -> Duration {
    let [octet, ..] = *Uuid::new_v4().as_bytes();
    pause.mul_f64(0.5 + f64::from(octet) / 512.0)
}

#[cfg(test)]
mod tests;
