//! Connections to unix sockets of the host.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::sleep;

use crate::proxy::{SocketConnector, SocketFuture};

/// Pause between two attempts to connect to a full accept queue.
const RETRY: Duration = Duration::from_millis(20);

/// Connects to the path in the host's file system.
#[derive(Debug)]
pub(crate) struct HostSockets;

impl SocketConnector for HostSockets {
    fn connect<'a>(&'a self, path: &'a Path) -> SocketFuture<'a> {
        Box::pin(connect(path))
    }
}

/// TCP retries by itself. A unix socket returns EAGAIN (`unix_stream_connect`), and no event
/// follows when there is room again.
async fn connect(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(RETRY).await,
            result => return result,
        }
    }
}
