//! Asynchronous client of the Open vSwitch Database Management Protocol (OVSDB, RFC 7047).
//!
//! Implements what a reader needs, plus conditional monitors (ovsdb-server(7), section 4.1.12).
//!
//! - [`Session`] is one connection to one [`Remote`], over a unix socket, TCP or TLS.
//! - [`Replica`] is the local copy of the monitored columns.
//! - [`follow`] keeps a [`DatabaseReader`] connected: it moves on to the next server after a
//!   failure and backs off after a round of failures.

#![warn(unreachable_pub)]

mod backoff;
mod follow;
mod framing;
mod remote;
mod replica;
mod session;
mod tls;

pub use backoff::FIRST_PAUSE;
pub use follow::{DatabaseReader, Disconnect, ReceiverDropped, follow};
pub use framing::{Framer, FramingError};
pub use remote::{Host, Remote};
pub use replica::{
    Atom, ColumnKind, Datum, Replica, Row, RowChange, TableSchema, UpdateError, UpdateFormat, integer,
    map_value, references, text, texts,
};
pub use session::{ConnectOptions, Monitor, Notification, Session, SessionError};
pub use tls::TlsFiles;
