//! Accepts connections of guests and of haproxies, and never stops by itself.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::admission::{Admission, Ticket};
use crate::proxy::Proxy;
use crate::proxy::log_throttle::LogThrottle;
use crate::proxy::metrics::OpenConnection;

/// Pause after accept fails for lack of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves guests until `cancel`. Connections join `tracker`, and each finishes its request in
/// flight.
pub async fn serve_guests(
    listener: TcpListener,
    proxy: Arc<Proxy>,
    cancel: CancellationToken,
    tracker: TaskTracker,
) {
    let acceptor = Acceptor::new(&proxy, cancel.clone());
    let poll_accept = |cx: &mut Context<'_>| listener.poll_accept(cx);
    acceptor
        .run(poll_accept, |(stream, peer)| {
            let Some(client) = client_address(peer) else {
                proxy.metrics.rejected_connection("not_an_identity");
                tracing::debug!(%peer, "connection rejected: peer is not an identity address");
                return;
            };
            let Some(admitted) = acceptor.admit(Some(client.attachment)) else { return };
            // The connection also works without it, only slower.
            let _ = stream.set_nodelay(true);
            let served = Arc::clone(&proxy).serve_connection(stream, client, cancel.clone());
            tracker.spawn(async move {
                served.await;
                drop(admitted);
            });
        })
        .await;
}

/// Serves Neutron's haproxies in the same way. A process that can open the socket is trusted.
pub async fn serve_haproxies(
    listener: UnixListener,
    proxy: Arc<Proxy>,
    cancel: CancellationToken,
    tracker: TaskTracker,
) {
    let acceptor = Acceptor::new(&proxy, cancel.clone());
    let poll_accept = |cx: &mut Context<'_>| listener.poll_accept(cx);
    acceptor
        .run(poll_accept, |(stream, _)| {
            let Some(admitted) = acceptor.admit(None) else { return };
            let served = Arc::clone(&proxy).serve_haproxy(stream, cancel.clone());
            tracker.spawn(async move {
                served.await;
                drop(admitted);
            });
        })
        .await;
}

/// Returns the guest behind a peer address. Any other peer has bypassed the eBPF program.
fn client_address(peer: SocketAddr) -> Option<ClientAddress> {
    match peer.ip() {
        IpAddr::V6(address) => ClientAddress::from_identity(address.octets()),
        IpAddr::V4(_) => None,
    }
}

/// The accept loop of one listener, with its own connection limits.
struct Acceptor {
    proxy: Arc<Proxy>,
    admission: Arc<Admission>,
    cancel: CancellationToken,
    log: LogThrottle,
}

impl Acceptor {
    fn new(proxy: &Arc<Proxy>, cancel: CancellationToken) -> Self {
        let config = &proxy.config;
        Self {
            proxy: Arc::clone(proxy),
            admission: Admission::new(config.connections_per_attachment, config.connections),
            cancel,
            log: LogThrottle::new(),
        }
    }

    async fn run<S>(&self, poll_accept: impl Fn(&mut Context<'_>) -> Poll<io::Result<S>>, serve: impl Fn(S)) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                accepted = poll_fn(&poll_accept) => accepted,
            };
            match accepted {
                Ok(connection) => serve(connection),
                Err(error) => {
                    self.proxy.metrics.accept_error();
                    if self.log.allow() {
                        tracing::warn!(error = &error as &dyn std::error::Error, "accept failed");
                    }
                    if !concerns_one_connection(&error) {
                        // Out of descriptors or memory: no event follows when there are some again.
                        tokio::select! {
                            () = self.cancel.cancelled() => return,
                            () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                        }
                    }
                }
            }
        }
    }

    /// Admits a connection of an attachment, or of a haproxy.
    fn admit(&self, attachment: Option<AttachmentId>) -> Option<(Ticket, OpenConnection)> {
        match self.admission.admit(attachment) {
            Ok(ticket) => Some((ticket, self.proxy.metrics.connection_opened())),
            Err(error) => {
                self.proxy.metrics.rejected_connection(error.label());
                tracing::debug!(%error, "connection rejected");
                None
            }
        }
    }
}

/// Returns whether only this connection failed, while it waited. The next one is not affected.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_identity_address_is_a_client() {
        let client = ClientAddress::ipv4(AttachmentId::new(9).unwrap(), [10, 0, 0, 5]);
        let address = std::net::Ipv6Addr::from(client.identity());
        assert_eq!(client_address((address, 4711).into()), Some(client));
        for stranger in ["127.0.0.1:80", "[::1]:80", "[::ffff:10.0.0.5]:80", "[fd6d::a9fe:a9fe]:80"] {
            assert_eq!(client_address(stranger.parse().unwrap()), None, "{stranger}");
        }
    }

    #[test]
    fn accept_pauses_if_descriptors_run_out() {
        for errno in [nix::errno::Errno::EMFILE, nix::errno::Errno::ENFILE, nix::errno::Errno::ENOBUFS] {
            assert!(!concerns_one_connection(&errno.into()), "{errno}");
        }
        assert!(concerns_one_connection(&nix::errno::Errno::ECONNABORTED.into()));
    }
}
