//! One connection to an OVSDB server (RFC 7047), until its first error.
//!
//! A silent server is probed with `echo`, if a probe interval is set. Futures of a session may be
//! dropped at any point without loss: bytes read and bytes still to be written are kept.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tls_files::TlsSetupError;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout, timeout_at};

use crate::framing::{Framer, FramingError};
use crate::remote::{Host, Remote};
use crate::replica::{TableSchema, UpdateError, UpdateFormat};
use crate::tls::{self, TlsFiles};

/// Limit for establishing a connection, and for a write without progress.
const STALL: Duration = Duration::from_secs(20);
/// Notifications accepted while a reply is awaited.
const BACKLOG: usize = 16;

const ECHO_ID: &str = "echo";

/// Parameters of a connection.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// For `ssl:` remotes.
    pub tls: TlsFiles,
    /// Limit for connecting and for reading the initial rows.
    pub timeout: Duration,
    /// Silence after which the server is probed, and the time it then has to respond. `None`
    /// disables probes.
    pub probe_interval: Option<Duration>,
    /// Longest accepted message, in bytes.
    pub message_limit: usize,
}

/// Error that ends a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no connection within {} s", limit.as_secs_f64())]
    ConnectTimeout { limit: Duration },
    #[error("TLS requires CA certificates")]
    NoCaCertificates,
    #[error("TLS certificate and private key must be configured together")]
    IncompleteIdentity,
    #[error("cannot set up TLS")]
    TlsSetup(#[source] TlsSetupError),
    #[error("TLS handshake failed")]
    TlsHandshake(#[source] io::Error),
    #[error("cannot read")]
    Read(#[source] io::Error),
    #[error("cannot write")]
    Write(#[source] io::Error),
    #[error("server closed the connection")]
    Closed,
    /// The server does not send, or does not receive.
    #[error("no response for {} s", limit.as_secs_f64())]
    Unresponsive { limit: Duration },
    #[error("initial rows not received within {} s", limit.as_secs_f64())]
    Timeout { limit: Duration },
    #[error(transparent)]
    Framing(#[from] FramingError),
    #[error("message is not JSON-RPC")]
    Json(#[source] serde_json::Error),
    #[error("{method} was refused: {error}")]
    Refused { method: &'static str, error: String },
    #[error("server sends updates instead of a reply")]
    TooManyUpdates,
    #[error("no database {name}; the server has {available}")]
    NoDatabase { name: &'static str, available: String },
    /// A server cancels monitors if a schema changes.
    #[error("server cancelled the monitor")]
    Cancelled,
    #[error("server is disconnected from its cluster")]
    ClusterDisconnected,
    /// Another member of the cluster had a later entry of the log.
    #[error("server is behind its cluster: log index {index}, another member had {seen}")]
    Behind { index: i64, seen: i64 },
    #[error(transparent)]
    Update(#[from] UpdateError),
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Set of monitored tables.
#[derive(Clone, Copy, Debug)]
pub struct Monitor {
    pub database: &'static str,
    /// Identifies the monitor in updates.
    pub id: &'static str,
    pub tables: &'static [TableSchema],
}

/// Message from the server that is not the reply to a call in progress.
#[derive(Debug)]
pub enum Notification {
    Update {
        monitor: String,
        format: UpdateFormat,
        rows: Value,
    },
    /// Reply to [`Session::change_condition`].
    Reply {
        request: u64,
        error: Option<String>,
    },
}

/// Connection to a server.
pub struct Session {
    stream: Box<dyn Duplex>,
    framer: Framer,
    outgoing: VecDeque<u8>,
    /// Bytes were written to the stream since its last flush.
    unflushed: bool,
    probe_interval: Option<Duration>,
    /// Time of the last bytes from the server, or of the last probe.
    quiet_since: Instant,
    probing: bool,
    last_id: u64,
    backlog: VecDeque<Notification>,
}

/// JSON-RPC 1.0 message: a request, a notification or a reply.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    method: Option<String>,
    params: Value,
    id: Value,
    result: Value,
    error: Value,
}

impl Message {
    fn error(&self) -> Option<String> {
        let error = (!self.error.is_null()).then_some(&self.error)?;
        Some(error.as_str().map_or_else(|| error.to_string(), str::to_owned))
    }
}

impl Session {
    /// Connects to a server.
    ///
    /// # Errors
    /// The connection, or its TLS handshake, failed or took too long.
    pub async fn connect(remote: &Remote, options: &ConnectOptions) -> Result<Self, SessionError> {
        let limit = STALL.min(options.timeout);
        let stream = timeout(limit, connect(remote, &options.tls)).await;
        Ok(Self {
            stream: stream.unwrap_or(Err(SessionError::ConnectTimeout { limit }))?,
            framer: Framer::new(options.message_limit),
            outgoing: VecDeque::new(),
            unflushed: false,
            probe_interval: options.probe_interval,
            quiet_since: Instant::now(),
            probing: false,
            last_id: 0,
            backlog: VecDeque::new(),
        })
    }

    /// Verifies that the server has a database, and returns whether it has `other` as well.
    ///
    /// # Errors
    /// The server does not have the database, or does not reply.
    pub async fn require_database(
        &mut self,
        name: &'static str,
        other: &'static str,
    ) -> Result<bool, SessionError> {
        let databases = self.call("list_dbs", json!([])).await?;
        let has = |name| databases.as_array().is_some_and(|names| names.iter().any(|found| found == name));
        if has(name) {
            Ok(has(other))
        } else {
            Err(SessionError::NoDatabase { name, available: databases.to_string() })
        }
    }

    /// Monitors all rows. Returns the current rows and the format of updates.
    ///
    /// # Errors
    /// The server refuses, or does not reply.
    pub async fn monitor(&mut self, monitor: Monitor) -> Result<(UpdateFormat, Value), SessionError> {
        match self.call("monitor_cond", monitor.request(None)).await {
            // Open vSwitch before 2.6.
            Err(SessionError::Refused { error, .. }) if error == "unknown method" => {
                Ok((UpdateFormat::Rows, self.call("monitor", monitor.request(None)).await?))
            }
            rows => Ok((UpdateFormat::Differences, rows?)),
        }
    }

    /// Monitors the rows that match one of the clauses, and returns the current ones. Does not fall
    /// back to all rows if the server does not support conditions.
    ///
    /// # Errors
    /// The server refuses, or does not reply.
    pub async fn monitor_where(&mut self, monitor: Monitor, clauses: &Value) -> Result<Value, SessionError> {
        self.call("monitor_cond", monitor.request(Some(clauses))).await
    }

    /// Replaces the clauses of a monitor and returns the id of the request. Until the reply with
    /// this id arrives, updates may follow the old or the new clauses.
    pub fn change_condition(&mut self, monitor: Monitor, clauses: &Value) -> u64 {
        let tables =
            monitor.tables.iter().map(|table| (table.name.to_owned(), json!([{ "where": clauses }])));
        let tables: Map<_, _> = tables.collect();
        self.queue_request("monitor_cond_change", &json!([monitor.id, monitor.id, tables]))
    }

    /// Returns columns of the rows that match all clauses.
    ///
    /// # Errors
    /// The server refuses, or does not reply.
    pub async fn select(
        &mut self,
        database: &str,
        table: &str,
        clauses: &Value,
        columns: &[&str],
    ) -> Result<Value, SessionError> {
        let select = json!({ "op": "select", "table": table, "where": clauses, "columns": columns });
        let mut results = self.call("transact", json!([database, select])).await?;
        match results.pointer_mut("/0/rows") {
            Some(rows) => Ok(rows.take()),
            None => Err(UpdateError::unexpected("rows", &results).into()),
        }
    }

    /// Returns the next update or reply.
    ///
    /// # Errors
    /// The connection failed, or the server sent something invalid.
    pub async fn next_notification(&mut self) -> Result<Notification, SessionError> {
        if let Some(notification) = self.backlog.pop_front() {
            return Ok(notification);
        }
        loop {
            let message = self.next_message().await?;
            if let Some(notification) = notification(message)? {
                return Ok(notification);
            }
        }
    }

    async fn call(&mut self, method: &'static str, params: Value) -> Result<Value, SessionError> {
        let id = self.queue_request(method, &params);
        drop(params);
        loop {
            let message = self.next_message().await?;
            if message.method.is_none() && message.id == id {
                return match message.error() {
                    None => Ok(message.result),
                    Some(error) => Err(SessionError::Refused { method, error }),
                };
            }
            self.backlog.extend(notification(message)?);
            if self.backlog.len() > BACKLOG {
                return Err(SessionError::TooManyUpdates);
            }
        }
    }

    fn queue_request(&mut self, method: &'static str, params: &Value) -> u64 {
        self.last_id += 1;
        let id = self.last_id;
        self.queue(&json!({ "method": method, "params": params, "id": id }));
        id
    }

    /// Returns the next reply or notification. Answers the server's requests.
    async fn next_message(&mut self) -> Result<Message, SessionError> {
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
            self.queue(&json!({ "id": id, "result": result, "error": error }));
        }
    }

    async fn receive(&mut self) -> Result<Message, SessionError> {
        loop {
            self.write().await?;
            if let Some(message) = self.framer.next_message()? {
                return serde_json::from_slice(message).map_err(SessionError::Json);
            }
            let deadline = self.probe_interval.map(|interval| self.quiet_since + interval);
            match before(deadline, self.stream.read_buf(self.framer.read_buffer())).await {
                Some(Ok(0)) => return Err(SessionError::Closed),
                Some(Ok(_)) => self.probing = false,
                Some(Err(error)) => return Err(SessionError::Read(error)),
                // The server did not respond to the probe.
                None if self.probing => {
                    let limit = 2 * self.probe_interval.unwrap_or_default();
                    return Err(SessionError::Unresponsive { limit });
                }
                None => {
                    self.probing = true;
                    self.queue(&json!({ "method": "echo", "params": [], "id": ECHO_ID }));
                }
            }
            self.quiet_since = Instant::now();
        }
    }

    fn queue(&mut self, message: &Value) {
        self.outgoing.extend(message.to_string().into_bytes());
    }

    /// Writes everything in the queue.
    async fn write(&mut self) -> Result<(), SessionError> {
        let write = async {
            while !self.outgoing.is_empty() {
                self.unflushed = true;
                if self.stream.write_buf(&mut self.outgoing).await? == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
            }
            if self.unflushed {
                self.stream.flush().await?;
                self.unflushed = false;
            }
            Ok(())
        };
        match timeout(STALL, write).await {
            Ok(written) => written.map_err(SessionError::Write),
            Err(_) => Err(SessionError::Unresponsive { limit: STALL }),
        }
    }
}

impl Monitor {
    fn request(&self, clauses: Option<&Value>) -> Value {
        let request = |table: &TableSchema| {
            let columns: Vec<_> = table.columns.iter().map(|(column, _)| *column).collect();
            let mut request = json!({ "columns": columns });
            if let Some(clauses) = clauses {
                request["where"] = clauses.clone();
            }
            (table.name.to_owned(), json!([request]))
        };
        let tables: Map<_, _> = self.tables.iter().map(request).collect();
        json!([self.database, self.id, tables])
    }
}

async fn connect(remote: &Remote, files: &TlsFiles) -> Result<Box<dyn Duplex>, SessionError> {
    Ok(match remote {
        Remote::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(SessionError::Connect)?),
        Remote::Tcp(host, port) => Box::new(connect_tcp(host, *port).await?),
        Remote::Ssl(host, port) => {
            Box::new(tls::handshake(connect_tcp(host, *port).await?, host, files).await?)
        }
    })
}

async fn connect_tcp(host: &Host, port: u16) -> Result<TcpStream, SessionError> {
    let connected = match host {
        Host::Address(address) => TcpStream::connect((*address, port)).await,
        Host::Name(name) => TcpStream::connect((name.as_str(), port)).await,
    };
    connected.map_err(SessionError::Connect)
}

/// Interprets a message that is not the awaited reply; `None` if it is of no interest.
fn notification(message: Message) -> Result<Option<Notification>, SessionError> {
    let format = match message.method.as_deref() {
        None => {
            let request = message.id.as_u64();
            return Ok(request.map(|request| Notification::Reply { request, error: message.error() }));
        }
        Some("update") => UpdateFormat::Rows,
        Some("update2") => UpdateFormat::Differences,
        Some("monitor_canceled") => return Err(SessionError::Cancelled),
        // The remaining notifications are about locks, which are not used.
        Some(_) => return Ok(None),
    };
    let mut params = message.params;
    match params.as_array_mut().map(Vec::as_mut_slice) {
        Some([Value::String(monitor), rows]) => {
            let monitor = std::mem::take(monitor);
            Ok(Some(Notification::Update { monitor, format, rows: rows.take() }))
        }
        _ => Err(UpdateError::unexpected("an update of a requested monitor", &params).into()),
    }
}

/// Returns `None` if the deadline passes.
async fn before<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}
