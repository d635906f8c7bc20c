//! The messages between the control process and the data plane.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tls_files::TlsMaterial;

use super::client_table::EntryRecords;
use crate::proxy::{ClientQuery, HaproxyUsers, LookupOutcome, ProxyConfig, UpstreamConfig};

/// The longest message of the control process. Certificates of a large store have some 250 KB, and
/// those of one file at most 4 MiB.
pub(super) const LONGEST_ORDER: usize = 16 * 1024 * 1024;

/// The longest message of the data plane, which a guest may have taken over. Paths and names of
/// endpoints are the longest part.
pub(super) const LONGEST_REPORT: usize = 16 * 1024;

/// The first message to a data plane. Its descriptors are, in this order, the listener for guests,
/// the map of heartbeats, the memory of [`SharedState`](super::SharedState), and the listener for
/// haproxies, if there is one.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Settings {
    pub log: LogSettings,
    /// The user to change to.
    pub user: UserId,
    /// `None` means one for each CPU.
    pub workers: Option<u32>,
    pub proxy: ProxyConfig,
    pub upstream: UpstreamConfig,
    pub heartbeat_stale_after: Duration,
    /// The users that may connect as haproxies, if they are served.
    pub haproxy_users: Option<HaproxyUsers>,
    pub tls: Option<TlsMaterial>,
    /// The generation of the shared secrets in force.
    pub generation: u32,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct LogSettings {
    pub debug: bool,
    pub json: bool,
}

/// Numbers of a user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct UserId {
    pub user: u32,
    pub group: u32,
}

/// A message to the data plane, after the first one.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Order {
    /// Changes of the clients behind attachments.
    Entries(EntryRecords),
    /// Other shared secrets are in force. Identities that they signed follow.
    Secrets {
        generation: u32,
    },
    /// Certificates and keys for connections that begin from now on.
    Tls(TlsMaterial),
    /// The TLS files were checked because of the refusal with this number.
    TlsChecked {
        refusal: u64,
    },
    Answer {
        call: u64,
        answer: Answer,
    },
    /// Another listener for haproxies, as the descriptor.
    HaproxyListener,
    /// The option `debug` has changed.
    LogLevel {
        debug: bool,
    },
    /// Traffic may flow again, so write a heartbeat now.
    Beat,
    /// Accept no more connections, and end those that there are.
    Drain,
}

/// A message of the data plane.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Report {
    /// Connections are accepted, and the heartbeat is written.
    Serving,
    Call {
        call: u64,
        query: Query,
    },
    /// The copy of the table of clients has this version.
    Copied {
        version: u64,
    },
    /// Nova has accepted this secret, and not the ones before it.
    Preferred {
        generation: u32,
        secret: u32,
    },
    /// Nova has accepted none of the secrets.
    SecretsRefused {
        generation: u32,
    },
    /// A certificate was refused.
    TlsRefused {
        refusal: u64,
    },
    /// All requests have ended.
    Drained,
}

/// A call of the data plane for what it may not do by itself.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Query {
    /// Find the port behind a client of a shared attachment or of a haproxy.
    Client(ClientQuery),
    /// Find the addresses of an endpoint's name.
    Name { host: String, port: u16 },
    /// Connect to an endpoint's unix socket. The answer comes with the descriptor.
    Socket { path: PathBuf },
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Answer {
    Client(LookupOutcome),
    Name(Vec<SocketAddr>),
    Socket,
    Failed(CallError),
}

/// An [`io::Error`] in a message.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct CallError {
    /// The number of the kernel's error, if it is one.
    errno: Option<i32>,
    text: String,
}

impl From<&io::Error> for CallError {
    fn from(error: &io::Error) -> Self {
        Self { errno: error.raw_os_error(), text: error.to_string() }
    }
}

impl From<CallError> for io::Error {
    fn from(error: CallError) -> Self {
        error.errno.map_or_else(|| Self::other(error.text), Self::from_raw_os_error)
    }
}
