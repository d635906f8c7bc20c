//! One conversation with an OVSDB server (RFC 7047), from the connection to the first thing that goes wrong.
//!
//! In either direction silence is broken by an `echo`. Every wait has an end: [`QUIET`] for the other side to say or
//! take anything at all, and whoever opens a session bounds its beginning as a whole.

use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::framing::{Framer, FramingError};
use super::replica::{Form, Table, UpdateError, shape};
use crate::config::{Host, OvsdbRemote};

/// The longest message that is read. A host with the 16384 ports that Open vSwitch can have takes about 8 MiB.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// How long the other side may be silent before it is asked for an echo, and then before it is given up.
const QUIET: Duration = Duration::from_secs(10);

const ECHO_ID: &str = "echo";
const MONITOR_ID: &str = "metadata-agent";

/// Why there is no conversation, or no more.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody takes the connection.
    #[error("cannot be connected to: {0}")]
    Connect(#[source] io::Error),
    /// The connection would have to be encrypted.
    #[error("ssl: is not spoken yet; give the server a unix: or tcp: remote as well")]
    Ssl,
    /// The connection broke while reading.
    #[error("cannot be read from: {0}")]
    Read(#[source] io::Error),
    /// The connection broke while writing.
    #[error("cannot be written to: {0}")]
    Write(#[source] io::Error),
    /// The server ended the connection.
    #[error("closed the connection")]
    Closed,
    /// The server says nothing, or takes nothing.
    #[error("has been silent for {} s", 2 * QUIET.as_secs())]
    Silent,
    /// The connection and the first answers took too long.
    #[error("has not told its rows within {} s (ovsdb_connection_timeout)", limit.as_secs_f64())]
    Late {
        /// How long was waited.
        limit: Duration,
    },
    /// What the server sends cannot be cut into messages.
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// A message is no JSON-RPC.
    #[error("sends no JSON-RPC: {0}")]
    Json(#[source] serde_json::Error),
    /// The server refuses a request.
    #[error("refuses {method}: {error}")]
    Refused {
        /// The request.
        method: &'static str,
        /// Its words.
        error: String,
    },
    /// The server does not have the database.
    #[error("has no database {name}, but {there}")]
    NoDatabase {
        /// The one that is wanted.
        name: &'static str,
        /// What it has.
        there: String,
    },
    /// The server ended the monitor, as it does when a schema changes.
    #[error("ended the monitor")]
    Cancelled,
    /// Something in a message is not what it should be.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// What a connection must be able to do.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A conversation.
pub(super) struct Session {
    stream: Box<dyn Duplex>,
    framer: Framer,
    last_id: u64,
}

/// A message of JSON-RPC 1.0: a request, a notification or a reply.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    method: Option<String>,
    params: Value,
    id: Value,
    result: Value,
    error: Value,
}

impl Session {
    /// Connects.
    pub(super) async fn open(remote: &OvsdbRemote) -> Result<Self, SessionError> {
        let stream: Box<dyn Duplex> = match remote {
            OvsdbRemote::Unix(path) => {
                Box::new(UnixStream::connect(path).await.map_err(SessionError::Connect)?)
            }
            OvsdbRemote::Tcp(host, port) => {
                let connected = match host {
                    Host::Address(address) => TcpStream::connect((*address, *port)).await,
                    Host::Name(name) => TcpStream::connect((name.as_str(), *port)).await,
                };
                Box::new(connected.map_err(SessionError::Connect)?)
            }
            OvsdbRemote::Ssl(..) => return Err(SessionError::Ssl),
        };
        Ok(Self { stream, framer: Framer::new(MAX_MESSAGE_BYTES), last_id: 0 })
    }

    /// Makes sure that the server has a database.
    pub(super) async fn expect_database(&mut self, name: &'static str) -> Result<(), SessionError> {
        let databases = self.call("list_dbs", json!([])).await?;
        let there = databases.as_array().is_some_and(|names| names.iter().any(|found| found == name));
        if there { Ok(()) } else { Err(SessionError::NoDatabase { name, there: databases.to_string() }) }
    }

    /// Asks for all rows of these tables and for what will become of them; returns the rows, and in which form they
    /// and all updates come.
    pub(super) async fn monitor(
        &mut self,
        database: &'static str,
        tables: &[Table],
    ) -> Result<(Form, Value), SessionError> {
        let request = |table: &Table| {
            let columns: Vec<_> = table.columns.iter().map(|(column, _)| *column).collect();
            (table.name.to_owned(), json!([{ "columns": columns }]))
        };
        let tables: Map<_, _> = tables.iter().map(request).collect();
        let params = json!([database, MONITOR_ID, tables]);
        match self.call("monitor_cond", params.clone()).await {
            // Open vSwitch before 2.6.
            Err(SessionError::Refused { error, .. }) if error == "unknown method" => {
                Ok((Form::Whole, self.call("monitor", params).await?))
            }
            rows => Ok((Form::Difference, rows?)),
        }
    }

    /// The next update of what is monitored. May be dropped at any time but while it writes.
    pub(super) async fn update(&mut self, form: Form) -> Result<Value, SessionError> {
        let wanted = match form {
            Form::Whole => "update",
            Form::Difference => "update2",
        };
        loop {
            let message = self.listen().await?;
            match message.method.as_deref() {
                Some("monitor_canceled") => return Err(SessionError::Cancelled),
                Some(method) if method == wanted => {
                    let params = message.params;
                    return match params.as_array().map(Vec::as_slice) {
                        Some([monitor, updates]) if monitor == MONITOR_ID => Ok(updates.clone()),
                        _ => Err(shape("an update of our monitor", &params).into()),
                    };
                }
                // Nothing else concerns us: no lock was asked for, and no reply is due.
                Some(_) | None => {}
            }
        }
    }

    async fn call(&mut self, method: &'static str, params: Value) -> Result<Value, SessionError> {
        self.last_id += 1;
        let id = self.last_id;
        self.send(&json!({ "method": method, "params": params, "id": id })).await?;
        loop {
            let message = self.listen().await?;
            if message.method.is_none() && message.id == id {
                if message.error.is_null() {
                    return Ok(message.result);
                }
                let error = message.error.as_str().map_or_else(|| message.error.to_string(), str::to_owned);
                return Err(SessionError::Refused { method, error });
            }
        }
    }

    /// The next reply or notification. Requests are answered here.
    async fn listen(&mut self) -> Result<Message, SessionError> {
        loop {
            let Message { method, params, id, .. } = match self.receive().await? {
                message if message.method.is_none() && message.id == ECHO_ID => continue,
                message if message.method.is_none() || message.id.is_null() => return Ok(message),
                request => request,
            };
            let (result, error) = match method.as_deref() {
                Some("echo") => (params, Value::Null),
                _ => (Value::Null, "unknown method".into()),
            };
            self.send(&json!({ "id": id, "result": result, "error": error })).await?;
        }
    }

    async fn receive(&mut self) -> Result<Message, SessionError> {
        let mut asked = false;
        loop {
            if let Some(message) = self.framer.next()? {
                return serde_json::from_slice(message).map_err(SessionError::Json);
            }
            match timeout(QUIET, self.stream.read_buf(self.framer.room())).await {
                Ok(Ok(0)) => return Err(SessionError::Closed),
                Ok(Ok(_)) => asked = false,
                Ok(Err(error)) => return Err(SessionError::Read(error)),
                Err(_) if asked => return Err(SessionError::Silent),
                Err(_) => {
                    asked = true;
                    self.send(&json!({ "method": "echo", "params": [], "id": ECHO_ID })).await?;
                }
            }
        }
    }

    async fn send(&mut self, message: &Value) -> Result<(), SessionError> {
        let text = message.to_string();
        match timeout(2 * QUIET, self.stream.write_all(text.as_bytes())).await {
            Ok(written) => written.map_err(SessionError::Write),
            Err(_) => Err(SessionError::Silent),
        }
    }
}
