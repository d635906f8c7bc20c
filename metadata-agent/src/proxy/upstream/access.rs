//! The ways to an upstream that need the host: names, unix sockets, and certificates.
//!
//! The upstream itself opens no file, queries no resolver and connects to no path. It is handed
//! addresses, open sockets and [`TlsMaterial`](tls_files::TlsMaterial) instead.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use tokio::net::UnixStream;

use super::tls::UpstreamTls;

/// Access to the host for one upstream.
#[derive(Debug)]
pub struct UpstreamAccess {
    pub names: Arc<dyn NameLookup>,
    pub sockets: Arc<dyn SocketConnector>,
    /// For https endpoints.
    pub tls: Option<UpstreamTls>,
}

pub type NameLookupFuture<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'a>>;

/// Finds the addresses of a name. A look-up may take as long as the resolver does.
pub trait NameLookup: fmt::Debug + Send + Sync + 'static {
    fn look_up<'a>(&'a self, host: &'a str, port: u16) -> NameLookupFuture<'a>;
}

pub type SocketFuture<'a> = Pin<Box<dyn Future<Output = io::Result<UnixStream>> + Send + 'a>>;

/// Connects to unix sockets, however long an accept queue is full. The caller limits the time.
pub trait SocketConnector: fmt::Debug + Send + Sync + 'static {
    fn connect<'a>(&'a self, path: &'a Path) -> SocketFuture<'a>;
}
