//! A netlink socket that yields to the readers of its messages.
//!
//! The kernel continues a dump as soon as a part of it was read, so a connection that reads until
//! there is no more data reads all of it at once. A thousand links take 27 MB when parsed, most of
//! which is not needed, and the allocator keeps the memory.

use std::cell::Cell;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use bytes::BufMut;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::proto;
use rtnetlink::sys::{AsyncSocket, Socket, SocketAddr, TokioSocket};
use tokio::task::yield_now;

/// Drives a socket. Must be spawned as a task.
pub(super) type Connection = proto::Connection<RouteNetlinkMessage, CooperativeSocket>;

/// Yields after each datagram. A datagram holds the links that fit into 32 KiB, and their readers
/// consume these before the next read.
pub(super) struct CooperativeSocket {
    socket: TokioSocket,
    yields_next: Cell<bool>,
}

impl CooperativeSocket {
    fn read<T>(
        &self,
        cx: &mut Context<'_>,
        datagram: impl FnOnce(&TokioSocket, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.yields_next.take() {
            // A plain wake would run before the runtime's main future, which is polled only now and
            // then while a task is ready.
            ready!(pin!(yield_now()).poll(cx));
        }
        let read = ready!(datagram(&self.socket, cx));
        self.yields_next.set(true);
        Poll::Ready(read)
    }
}

impl AsyncSocket for CooperativeSocket {
    fn socket_ref(&self) -> &Socket {
        self.socket.socket_ref()
    }

    fn socket_mut(&mut self) -> &mut Socket {
        self.socket.socket_mut()
    }

    fn new(protocol: isize) -> io::Result<Self> {
        Ok(Self { socket: TokioSocket::new(protocol)?, yields_next: Cell::default() })
    }

    fn poll_send(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_send(cx, buf)
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, buf: &[u8], addr: &SocketAddr) -> Poll<io::Result<usize>> {
        self.socket.poll_send_to(cx, buf, addr)
    }

    fn poll_recv<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<()>> {
        self.read(cx, |socket, cx| socket.poll_recv(cx, buf))
    }

    fn poll_recv_from<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<SocketAddr>> {
        self.read(cx, |socket, cx| socket.poll_recv_from(cx, buf))
    }

    fn poll_recv_from_full(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Vec<u8>, SocketAddr)>> {
        self.read(cx, TokioSocket::poll_recv_from_full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage};
    use rtnetlink::packet_route::link::LinkMessage;
    use rtnetlink::sys::protocols::NETLINK_ROUTE;
    use std::future::poll_fn;
    use tokio::sync::mpsc;

    const LOOPBACK: u32 = 1;
    const DATAGRAMS: usize = 8;

    /// Sends the same request several times. Returns when all responses are queued, because the
    /// kernel serves netlink in the caller's time.
    async fn socket_with_responses() -> CooperativeSocket {
        let mut about = LinkMessage::default();
        about.header.index = LOOPBACK;
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(about));
        request.header.flags = NLM_F_REQUEST;
        request.finalize();
        let mut octets = vec![0; request.buffer_len()];
        request.serialize(&mut octets);
        let socket = CooperativeSocket::new(NETLINK_ROUTE).unwrap();
        for _ in 0..DATAGRAMS {
            poll_fn(|cx| socket.poll_send_to(cx, &octets, &SocketAddr::new(0, 0))).await.unwrap();
        }
        socket
    }

    #[tokio::test]
    async fn a_waiting_reader_runs_before_the_next_datagram_is_read() {
        let socket = socket_with_responses().await;
        let (sender, mut datagrams) = mpsc::unbounded_channel();
        tokio::spawn(poll_fn(move |cx| {
            loop {
                let mut read = Vec::with_capacity(1 << 16);
                ready!(socket.poll_recv_from(cx, &mut read)).unwrap();
                if sender.send(read).is_err() {
                    return Poll::Ready(());
                }
            }
        }));
        for _ in 0..DATAGRAMS {
            assert!(!datagrams.recv().await.unwrap().is_empty());
            assert!(datagrams.is_empty());
        }
    }
}
