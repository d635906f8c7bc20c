//! Answers a request that the agent sends to itself through the datapath.
//!
//! The answer is the identity address of the connection, so it shows that the whole way was right:
//! the programs, the portal and this listener. It does not depend on any source or on Nova, and
//! nothing that the peer sends changes it. Only the agent's own attachment gets it, and no guest
//! can have that attachment: the kernel derives it from the interface.

use std::io;
use std::net::Ipv6Addr;
use std::time::Duration;

use metadata_ebpf::identity::ClientAddress;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::connection::ClientStream;

/// Time for the whole exchange.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of a request.
const REQUEST_LIMIT: usize = 512;

/// Returns the body of the answer to a connection from this address.
pub(crate) fn expected_body(client: &ClientAddress) -> String {
    Ipv6Addr::from(client.identity()).to_string()
}

/// Reads one request, answers it, and waits until the agent has closed the connection.
pub(super) async fn answer<T: ClientStream>(mut stream: T, client: &ClientAddress) {
    match timeout(TIMEOUT, exchange(&mut stream, client)).await {
        Ok(Ok(())) => {}
        failed => {
            tracing::debug!(?failed, "request of the agent to itself failed");
            stream.reset();
        }
    }
}

async fn exchange<T: ClientStream>(stream: &mut T, client: &ClientAddress) -> io::Result<()> {
    let mut request = Vec::new();
    let mut piece = [0; REQUEST_LIMIT];
    while !request.ends_with(b"\r\n\r\n") {
        let read = stream.read(&mut piece).await?;
        if read == 0 || request.len() + read > REQUEST_LIMIT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        request.extend_from_slice(piece.get(..read).unwrap_or_default());
    }
    let body = expected_body(client);
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all((head + &body).as_bytes()).await?;
    stream.shutdown().await?;
    // The agent resets the connection, so that neither side keeps it.
    while let Ok(1..) = stream.read(&mut piece).await {}
    Ok(())
}
