//! A client of OVSDB: RFC 7047 as far as a reader needs it, and of its extensions (ovsdb-server(7), section 4.1) the
//! conditional monitor.
//!
//! A [`Session`] is one conversation with one server, over a unix socket, TCP or TLS; a [`Replica`] is the copy of what it
//! monitors. Which rows are wanted, and what they mean, is its user's business: a [`Reader`], which [`follow`] leads from
//! server to server.

mod backoff;
mod follow;
mod framing;
mod remote;
mod replica;
mod session;
mod tls;

#[cfg(test)]
pub(crate) use backoff::FIRST_PAUSE;
pub(crate) use follow::{End, NobodyListens, Reader, follow};
pub use framing::FramingError;
pub use remote::{Host, OvsdbRemote};
pub use replica::UpdateError;
pub(crate) use replica::{
    Atom, Change, Datum, Form, Kind, Replica, Row, Table, entry, integer, references, shape, text, texts,
};
pub use session::{Dial, SessionError};
pub(crate) use session::{Monitor, News, Session};
pub use tls::TlsFiles;

#[cfg(test)]
pub(crate) use framing::Framer;
