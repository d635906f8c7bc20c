//! The stream under an upstream connection: TCP, TLS over TCP, or a unix socket.
//!
//! It does four things that hyper does not.
//!
//! - **Before a connection is reused, it looks into the socket.** Bytes that have arrived since the
//!   last response answer no request, and must not be taken for the answer to the next one. The
//!   runtime may not have reported them yet, so this look is a system call.
//! - **It recognises a time-out of the server.** A server that gives up an idle connection may send
//!   408 first (RFC 9110, section 15.5.9). That is no sign of a server that answers twice.
//! - **It closes without TIME-WAIT.** The agent decides when to close, so its ports would be in
//!   TIME-WAIT, and a guest that makes many requests could use up all of them. A reset leaves none.
//!   It is safe because the agent closes only when it wants nothing more of the connection: after a
//!   complete response, or when the response has nobody left to go to. Delayed segments cannot
//!   enter a later connection from the same port: its sequence numbers begin beyond theirs (RFC
//!   6528), and their timestamps are older (RFC 7323). If the server has closed first, we close in
//!   the usual way, because TIME-WAIT is then at the server.
//! - **It has larger buffers during a long response**
//!   ([`large_buffers`](crate::proxy::large_buffers)).

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::BufMut as _;
use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use crate::proxy::RESPONSE_PIECE;
use crate::proxy::large_buffers::{LARGE_PIECE, LARGE_RECEIVE_BUFFER};

/// Receive buffer of a connection (`SO_RCVBUF`). It replaces the kernel's automatic size, which
/// grows to several MiB, and stays full while a guest does not read its response.
pub(super) const RECEIVE_BUFFER: usize = 64 * 1024;

/// The part of a stream that the pool and a response can reach.
#[derive(Debug, Default)]
pub(super) struct StreamControl {
    is_check_due: AtomicBool,
    has_timed_out: AtomicBool,
    has_large_buffers: AtomicBool,
}

impl StreamControl {
    /// Makes the next read look into the socket, whatever the runtime knows of it.
    pub(super) fn demand_check(&self) {
        self.is_check_due.store(true, Ordering::Release);
    }

    /// Returns whether the server's last bytes said that it had waited too long for a request.
    pub(super) fn has_timed_out(&self) -> bool {
        self.has_timed_out.load(Ordering::Relaxed)
    }

    fn received(&self, bytes: &[u8]) {
        self.has_timed_out.store(begins_with_timeout(bytes), Ordering::Relaxed);
    }

    fn take_check(&self) -> bool {
        self.is_check_due.load(Ordering::Acquire) && self.is_check_due.swap(false, Ordering::AcqRel)
    }

    /// Makes the next read use the buffers of a long response, or the usual ones.
    pub(super) fn set_large_buffers(&self, are_large: bool) {
        self.has_large_buffers.store(are_large, Ordering::Relaxed);
    }
}

/// Returns whether a response of status 408 begins here.
fn begins_with_timeout(bytes: &[u8]) -> bool {
    bytes
        .strip_prefix(b"HTTP/1.")
        .is_some_and(|rest| matches!(rest, [b'0' | b'1', b' ', b'4', b'0', b'8', ..]))
}

/// A TCP connection to the metadata API.
#[derive(Debug)]
pub(super) struct UpstreamTcp {
    stream: TcpStream,
    control: Arc<StreamControl>,
    has_large_buffers: bool,
    closed_by_server: bool,
}

impl UpstreamTcp {
    pub(super) fn new(stream: TcpStream, control: Arc<StreamControl>) -> Self {
        Self { stream, control, has_large_buffers: false, closed_by_server: false }
    }

    /// Enlarges the receive buffer for a long response, or restores it.
    fn fit_buffer(&mut self) {
        let is_large = self.control.has_large_buffers.load(Ordering::Relaxed);
        if is_large != self.has_large_buffers {
            self.has_large_buffers = is_large;
            let size = if is_large { LARGE_RECEIVE_BUFFER } else { RECEIVE_BUFFER };
            // A response also passes through a buffer of another size.
            let _ = SockRef::from(&self.stream).set_recv_buffer_size(size);
        }
    }

    /// Reads no more than the usual piece of a response.
    fn poll_read_piece(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read_buf(&mut (&mut *buf).limit(RESPONSE_PIECE)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result.map(drop)),
            }
        }
    }

    /// Reads without waiting for the runtime's report that the socket is readable.
    fn read_now(&self, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
        let mut first = [0];
        let fd = self.stream.as_raw_fd();
        // Looks first, because the usual result is that there is nothing to read.
        match recv(fd, &mut first, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Err(nix::errno::Errno::EAGAIN) => Ok(false),
            Err(error) => Err(error.into()),
            Ok(_) => {
                let read = recv(fd, buf.initialize_unfilled(), MsgFlags::MSG_DONTWAIT)?;
                buf.advance(read);
                Ok(true)
            }
        }
    }
}

impl AsyncRead for UpstreamTcp {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        self.fit_buffer();
        let result = if self.control.take_check() && self.read_now(buf)? {
            Poll::Ready(Ok(()))
        } else if buf.remaining() > RESPONSE_PIECE && !self.has_large_buffers {
            self.poll_read_piece(cx, buf)
        } else {
            Pin::new(&mut self.stream).poll_read(cx, buf)
        };
        if matches!(result, Poll::Ready(Ok(()))) && buf.filled().len() == before && buf.remaining() > 0 {
            self.closed_by_server = true;
        }
        result
    }
}

impl AsyncWrite for UpstreamTcp {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Does nothing: a FIN would lead to TIME-WAIT. The stream is dropped next.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for UpstreamTcp {
    fn drop(&mut self) {
        if !self.closed_by_server {
            // Fails only if the connection is already closed.
            let _ = self.stream.set_zero_linger();
        }
    }
}

#[derive(Debug)]
pub(super) enum UpstreamStream {
    Tcp(UpstreamTcp),
    Tls(Box<TlsStream<UpstreamTcp>>),
    Unix(UnixStream),
}

impl UpstreamStream {
    fn control(&self) -> Option<&StreamControl> {
        match self {
            Self::Tcp(stream) => Some(&stream.control),
            Self::Tls(stream) => Some(&stream.get_ref().0.control),
            // Connections to Neutron's agent are never reused.
            Self::Unix(_) => None,
        }
    }

    /// Returns the size of the largest piece that may be read. TLS has pieces of a record (16 KiB).
    pub(super) const fn largest_read(&self) -> usize {
        match self {
            Self::Tcp(_) => LARGE_PIECE,
            Self::Tls(_) | Self::Unix(_) => RESPONSE_PIECE,
        }
    }
}

macro_rules! forward {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            UpstreamStream::Tcp($stream) => $call,
            UpstreamStream::Tls($stream) => $call,
            UpstreamStream::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let inner = self.as_mut();
        let result = forward!(inner, stream => Pin::new(stream).poll_read(cx, buf));
        let bytes = &buf.filled()[before..];
        if !bytes.is_empty()
            && let Some(control) = self.control()
        {
            control.received(bytes);
        }
        result
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        forward!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    #[tokio::test]
    async fn a_receive_buffer_is_enlarged_and_restored() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpSocket::new_v4().unwrap().connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        SockRef::from(&stream).set_recv_buffer_size(RECEIVE_BUFFER).unwrap();
        let control = Arc::new(StreamControl::default());
        let mut stream = UpstreamTcp::new(stream, Arc::clone(&control));
        let whole = vec![7; 8 * LARGE_PIECE];
        let mut piece = vec![0; LARGE_PIECE];
        let receive_buffer =
            |stream: &UpstreamTcp| SockRef::from(&stream.stream).recv_buffer_size().unwrap() / 2;
        let writing = tokio::spawn(async move { server.write_all(&whole).await.map(|()| server) });
        let (mut taken, mut largest) = (0, 0);
        while taken < LARGE_PIECE {
            let read = stream.read(&mut piece).await.unwrap();
            assert!((1..=RESPONSE_PIECE).contains(&read), "{read}");
            taken += read;
        }
        assert_eq!(receive_buffer(&stream), RECEIVE_BUFFER);
        control.set_large_buffers(true);
        while taken < 8 * LARGE_PIECE {
            let read = stream.read(&mut piece).await.unwrap();
            largest = largest.max(read);
            taken += read;
        }
        assert!(receive_buffer(&stream) > RECEIVE_BUFFER);
        assert!(largest > RESPONSE_PIECE, "{largest}");
        control.set_large_buffers(false);
        writing.await.unwrap().unwrap().write_all(b"next").await.unwrap();
        assert_eq!(stream.read(&mut piece).await.unwrap(), 4);
        assert_eq!(receive_buffer(&stream), RECEIVE_BUFFER);
    }
}
