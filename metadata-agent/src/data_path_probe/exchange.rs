//! One request of the agent to itself, over a socket at the guest end of its pair.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::Socket;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::{ProbeError, ProbeStep};

/// Time to connect. The kernel repeats a lost SYN or ARP request after one second.
const CONNECT: Duration = Duration::from_secs(2);
/// Time for the response.
const RESPONSE: Duration = Duration::from_secs(2);
/// Most bytes of a response. The right one is shorter.
const RESPONSE_LIMIT: usize = 512;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";

/// Sends a request, and expects a response with this body. The connection is reset at the end, so
/// that neither side keeps it.
pub(super) async fn exchange(socket: Socket, target: SocketAddr, body: &str) -> Result<(), ProbeError> {
    let stream =
        connect(socket, target).await.map_err(|found| ProbeError::new(ProbeStep::Listener, found))?;
    // It fails only if the socket is closed already.
    let _ = stream.set_zero_linger();
    let response = match timeout(RESPONSE, respond(stream)).await {
        Ok(Ok(response)) if response.is_empty() => Err("connection closed without a response".to_owned()),
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no response".to_owned()),
    };
    let response = response.map_err(|found| ProbeError::new(ProbeStep::Accept, found))?;
    let text = String::from_utf8_lossy(&response);
    let is_right = text.starts_with("HTTP/1.1 200 ")
        && text.split_once("\r\n\r\n").is_some_and(|(_, found)| found == body);
    // The response may be anybody's, so it is not repeated.
    if is_right { Ok(()) } else { Err(ProbeError::new(ProbeStep::Answer, "the response is not the agent's")) }
}

async fn connect(socket: Socket, target: SocketAddr) -> Result<TcpStream, String> {
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(target);
    match timeout(CONNECT, connecting).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err("no connection".to_owned()),
    }
}

async fn respond(mut stream: TcpStream) -> std::io::Result<Vec<u8>> {
    stream.write_all(REQUEST).await?;
    let mut response = Vec::new();
    let mut limited = stream.take(RESPONSE_LIMIT as u64);
    limited.read_to_end(&mut response).await?;
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Type};
    use tokio::net::TcpListener;

    const BODY: &str = "fd64::7";

    /// Probes a server on the loopback interface that sends these bytes and closes.
    async fn probe(response: &'static [u8]) -> Result<(), ProbeStep> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; REQUEST.len()];
            stream.read_exact(&mut request).await.unwrap();
            stream.write_all(response).await.unwrap();
        };
        let (outcome, ()) = tokio::join!(exchange(socket, target, BODY), serve);
        outcome.map_err(|error| error.step)
    }

    #[tokio::test]
    async fn only_the_right_body_is_an_answer() {
        assert_eq!(probe(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nfd64::7").await, Ok(()));
        for wrong in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nfd64::8"[..],
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\nfd64::7",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"\xff",
        ] {
            assert_eq!(probe(wrong).await, Err(ProbeStep::Answer), "{wrong:?}");
        }
        assert_eq!(probe(b"").await, Err(ProbeStep::Accept));
    }

    #[tokio::test]
    async fn a_refused_connection_is_the_listeners() {
        let target = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let error = exchange(socket, target, BODY).await.unwrap_err();
        assert_eq!(error.step, ProbeStep::Listener);
    }
}
