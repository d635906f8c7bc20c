//! Connections to a unix socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::sleep;

/// Between two attempts to get into a full accept queue.
const PAUSE: Duration = Duration::from_millis(20);

/// Connects, however long the accept queue is full: where TCP would try again by itself, a unix socket answers EAGAIN
/// (`unix_stream_connect`), and nothing tells when there is room. The caller limits the time.
pub(super) async fn connect(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(PAUSE).await,
            outcome => return outcome,
        }
    }
}
