//! One conversation with an OVSDB server (RFC 7047), from the connection to the first thing that goes wrong.
//!
//! In either direction silence is broken by an `echo`, unless the user of the session wants none. What a session is asked to
//! wait for may be dropped at any time, and nothing is lost by it: what was read and what is still to be written is kept.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout, timeout_at};

use super::framing::{Framer, FramingError};
use super::remote::{Host, OvsdbRemote};
use super::replica::{Form, Table, UpdateError, shape};
use super::tls::{self, TlsFiles};
use crate::tls::TlsSetupError;

/// How long a connection may take, and how long a server may take nothing that is written to it.
const STALL: Duration = Duration::from_secs(20);
/// Updates that a server may send while an answer of it is awaited.
const BACKLOG: usize = 16;

const ECHO_ID: &str = "echo";

/// How to speak to a server.
#[derive(Clone, Debug)]
pub struct Dial {
    /// For `ssl:`.
    pub tls: TlsFiles,
    /// How long it may take to connect and to read what is monitored.
    pub patience: Duration,
    /// How long the other side may be silent before it is asked for an echo, and then before it is given up. `None` for ever.
    pub probe: Option<Duration>,
    /// The longest message that is read.
    pub message_limit: usize,
}

/// Why there is no conversation, or no more.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody takes the connection.
    #[error("cannot be connected to: {0}")]
    Connect(#[source] io::Error),
    /// Nobody answers.
    #[error("has not taken a connection within {} s", limit.as_secs_f64())]
    NotTaken {
        /// How long was waited.
        limit: Duration,
    },
    /// There is nobody to believe.
    #[error(
        "is to be spoken to over TLS without certificates of authorities (ovn_sb_ca_cert; of the host's Open vSwitch ssl_ca_cert_file)"
    )]
    NoAuthorities,
    /// Our certificate is configured without its key, or the key without the certificate.
    #[error("is to be spoken to over TLS with a certificate without its private key, or the other way round")]
    HalfIdentity,
    /// The files for TLS are not usable.
    #[error("cannot be spoken to over TLS: {}", .0.with_causes())]
    TlsSetup(#[source] TlsSetupError),
    /// No TLS connection comes about.
    #[error("cannot be spoken to over TLS: {0}")]
    Handshake(#[source] io::Error),
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
    #[error("has been silent for {} s", limit.as_secs_f64())]
    Silent {
        /// How long was waited.
        limit: Duration,
    },
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
    /// The server tells news without end and does not answer.
    #[error("sends updates instead of an answer")]
    Chatter,
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
    /// The server is a member of a cluster and has lost the others.
    #[error("is cut off from its cluster")]
    CutOff,
    /// The server is a member of a cluster and knows less than another member did.
    #[error("is behind its cluster: at entry {index} of the log, another member was at {seen}")]
    Behind {
        /// How far it is.
        index: i64,
        /// How far the other was.
        seen: i64,
    },
    /// Something in a message is not what it should be.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// What a connection must be able to do.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// What is to be monitored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Monitor {
    pub(crate) database: &'static str,
    /// By which updates name it.
    pub(crate) id: &'static str,
    pub(crate) tables: &'static [Table],
}

/// What a server says of its own accord, or in answer to [`Session::change`].
#[derive(Debug)]
pub(crate) enum News {
    Update { monitor: String, form: Form, rows: Value },
    Answer { request: u64, refusal: Option<String> },
}

/// A conversation.
pub(crate) struct Session {
    stream: Box<dyn Duplex>,
    framer: Framer,
    outgoing: VecDeque<u8>,
    /// What was given to the stream and may still be in it.
    unflushed: bool,
    probe: Option<Duration>,
    /// When the other side was last heard of, or asked for an echo.
    quiet_since: Instant,
    asked: bool,
    last_id: u64,
    backlog: VecDeque<News>,
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

impl Message {
    fn refusal(&self) -> Option<String> {
        let error = (!self.error.is_null()).then_some(&self.error)?;
        Some(error.as_str().map_or_else(|| error.to_string(), str::to_owned))
    }
}

impl Session {
    /// Connects.
    pub(crate) async fn open(remote: &OvsdbRemote, dial: &Dial) -> Result<Self, SessionError> {
        let limit = STALL.min(dial.patience);
        let stream = timeout(limit, connect(remote, &dial.tls)).await;
        Ok(Self {
            stream: stream.unwrap_or(Err(SessionError::NotTaken { limit }))?,
            framer: Framer::new(dial.message_limit),
            outgoing: VecDeque::new(),
            unflushed: false,
            probe: dial.probe,
            quiet_since: Instant::now(),
            asked: false,
            last_id: 0,
            backlog: VecDeque::new(),
        })
    }

    /// Makes sure that the server has a database, and tells whether it has `other`, too.
    pub(crate) async fn expect_database(
        &mut self,
        name: &'static str,
        other: &'static str,
    ) -> Result<bool, SessionError> {
        let databases = self.call("list_dbs", json!([])).await?;
        let has = |name| databases.as_array().is_some_and(|names| names.iter().any(|found| found == name));
        if has(name) {
            Ok(has(other))
        } else {
            Err(SessionError::NoDatabase { name, there: databases.to_string() })
        }
    }

    /// Asks for all rows and for what will become of them; returns the rows, and in which form they come.
    pub(crate) async fn monitor(&mut self, monitor: Monitor) -> Result<(Form, Value), SessionError> {
        match self.call("monitor_cond", monitor.request(None)).await {
            // Open vSwitch before 2.6.
            Err(SessionError::Refused { error, .. }) if error == "unknown method" => {
                Ok((Form::Whole, self.call("monitor", monitor.request(None)).await?))
            }
            rows => Ok((Form::Difference, rows?)),
        }
    }

    /// Asks for the rows that match one of the clauses and for what will become of them. A server that cannot choose is
    /// not asked for all.
    pub(crate) async fn monitor_where(
        &mut self,
        monitor: Monitor,
        clauses: &Value,
    ) -> Result<Value, SessionError> {
        self.call("monitor_cond", monitor.request(Some(clauses))).await
    }

    /// Asks for other rows of what is monitored. News from now on may be of the old or the new clauses, up to the answer
    /// that bears the number returned here.
    pub(crate) fn change(&mut self, monitor: Monitor, clauses: &Value) -> u64 {
        let tables =
            monitor.tables.iter().map(|table| (table.name.to_owned(), json!([{ "where": clauses }])));
        let tables: Map<_, _> = tables.collect();
        self.ask("monitor_cond_change", &json!([monitor.id, monitor.id, tables]))
    }

    /// Columns of the rows that match all of the clauses, as they are now.
    pub(crate) async fn select(
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
            None => Err(shape("rows", &results).into()),
        }
    }

    /// What the server says next.
    pub(crate) async fn next(&mut self) -> Result<News, SessionError> {
        if let Some(news) = self.backlog.pop_front() {
            return Ok(news);
        }
        loop {
            let message = self.listen().await?;
            if let Some(news) = news(message)? {
                return Ok(news);
            }
        }
    }

    async fn call(&mut self, method: &'static str, params: Value) -> Result<Value, SessionError> {
        let id = self.ask(method, &params);
        drop(params);
        loop {
            let message = self.listen().await?;
            if message.method.is_none() && message.id == id {
                return match message.refusal() {
                    None => Ok(message.result),
                    Some(error) => Err(SessionError::Refused { method, error }),
                };
            }
            self.backlog.extend(news(message)?);
            if self.backlog.len() > BACKLOG {
                return Err(SessionError::Chatter);
            }
        }
    }

    fn ask(&mut self, method: &'static str, params: &Value) -> u64 {
        self.last_id += 1;
        let id = self.last_id;
        self.put(&json!({ "method": method, "params": params, "id": id }));
        id
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
            self.put(&json!({ "id": id, "result": result, "error": error }));
        }
    }

    async fn receive(&mut self) -> Result<Message, SessionError> {
        loop {
            self.write().await?;
            if let Some(message) = self.framer.next()? {
                return serde_json::from_slice(message).map_err(SessionError::Json);
            }
            let deadline = self.probe.map(|probe| self.quiet_since + probe);
            match by(deadline, self.stream.read_buf(self.framer.room())).await {
                Some(Ok(0)) => return Err(SessionError::Closed),
                Some(Ok(_)) => self.asked = false,
                Some(Err(error)) => return Err(SessionError::Read(error)),
                None if self.asked => {
                    return Err(SessionError::Silent { limit: 2 * self.probe.unwrap_or_default() });
                }
                None => {
                    self.asked = true;
                    self.put(&json!({ "method": "echo", "params": [], "id": ECHO_ID }));
                }
            }
            self.quiet_since = Instant::now();
        }
    }

    fn put(&mut self, message: &Value) {
        self.outgoing.extend(message.to_string().into_bytes());
    }

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
            Err(_) => Err(SessionError::Silent { limit: STALL }),
        }
    }
}

impl Monitor {
    fn request(&self, clauses: Option<&Value>) -> Value {
        let request = |table: &Table| {
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

async fn connect(remote: &OvsdbRemote, files: &TlsFiles) -> Result<Box<dyn Duplex>, SessionError> {
    Ok(match remote {
        OvsdbRemote::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(SessionError::Connect)?),
        OvsdbRemote::Tcp(host, port) => Box::new(connect_to(host, *port).await?),
        OvsdbRemote::Ssl(host, port) => {
            Box::new(tls::handshake(connect_to(host, *port).await?, host, files).await?)
        }
    })
}

async fn connect_to(host: &Host, port: u16) -> Result<TcpStream, SessionError> {
    let connected = match host {
        Host::Address(address) => TcpStream::connect((*address, port)).await,
        Host::Name(name) => TcpStream::connect((name.as_str(), port)).await,
    };
    connected.map_err(SessionError::Connect)
}

/// What a message is to a user of the session; `None` if nothing.
fn news(message: Message) -> Result<Option<News>, SessionError> {
    let form = match message.method.as_deref() {
        None => {
            let request = message.id.as_u64();
            return Ok(request.map(|request| News::Answer { request, refusal: message.refusal() }));
        }
        Some("update") => Form::Whole,
        Some("update2") => Form::Difference,
        Some("monitor_canceled") => return Err(SessionError::Cancelled),
        // Nothing else concerns us: no lock was asked for.
        Some(_) => return Ok(None),
    };
    let mut params = message.params;
    match params.as_array_mut().map(Vec::as_mut_slice) {
        Some([Value::String(monitor), rows]) => {
            Ok(Some(News::Update { monitor: std::mem::take(monitor), form, rows: rows.take() }))
        }
        _ => Err(shape("an update of our monitor", &params).into()),
    }
}

/// `None` when the deadline passes.
async fn by<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}
