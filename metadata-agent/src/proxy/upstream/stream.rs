//! The stream under an upstream connection: TCP, TLS over TCP, or a unix socket.
//!
//! It does three things that hyper does not.
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

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

/// The part of a stream that the pool can reach.
#[derive(Debug, Default)]
pub(super) struct ReuseCheck {
    is_due: AtomicBool,
    has_timed_out: AtomicBool,
}

impl ReuseCheck {
    /// Makes the next read look into the socket, whatever the runtime knows of it.
    pub(super) fn demand(&self) {
        self.is_due.store(true, Ordering::Release);
    }

    /// Returns whether the server's last bytes said that it had waited too long for a request.
    pub(super) fn has_timed_out(&self) -> bool {
        self.has_timed_out.load(Ordering::Relaxed)
    }

    fn received(&self, bytes: &[u8]) {
        self.has_timed_out.store(begins_with_timeout(bytes), Ordering::Relaxed);
    }

    fn take(&self) -> bool {
        self.is_due.load(Ordering::Acquire) && self.is_due.swap(false, Ordering::AcqRel)
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
    check: Arc<ReuseCheck>,
    closed_by_server: bool,
}

impl UpstreamTcp {
    pub(super) fn new(stream: TcpStream, check: Arc<ReuseCheck>) -> Self {
        Self { stream, check, closed_by_server: false }
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
        let result = if self.check.take() && self.read_now(buf)? {
            Poll::Ready(Ok(()))
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
    fn check(&self) -> Option<&ReuseCheck> {
        match self {
            Self::Tcp(stream) => Some(&stream.check),
            Self::Tls(stream) => Some(&stream.get_ref().0.check),
            // Connections to Neutron's agent are never reused.
            Self::Unix(_) => None,
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
            && let Some(check) = self.check()
        {
            check.received(bytes);
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
