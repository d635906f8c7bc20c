//! Accepts and admits connections of guests and of haproxies, and never stops by itself.

use std::future::{poll_fn, ready};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use metadata_ebpf::identity::ClientAddress;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::admission::{AdmissionError, Ticket};
use super::haproxy_users::HaproxyUsers;
use super::own_request;
use crate::proxy::Proxy;
use crate::proxy::client::ClientSource;
use crate::proxy::log_throttle::LogThrottle;
use crate::proxy::metrics::{OpenConnection, RejectionLabel};

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
    let room = || ready(());
    let poll_accept = |cx: &mut Context<'_>| listener.poll_accept(cx);
    acceptor
        .run(room, poll_accept, |(), (stream, peer)| {
            let Some(client) = client_address(peer) else {
                proxy.metrics.rejected_connection(RejectionLabel::NotAnIdentity);
                tracing::debug!(%peer, "connection rejected: peer is not an identity address");
                return;
            };
            let Some(guest) = proxy.clients.limited(&client) else {
                // It takes no place of guests, so it is answered however many these have.
                tracker.spawn(async move { own_request::answer(stream, &client).await });
                return;
            };
            let Some((ticket, open)) = proxy.admitted(proxy.admission.admit(guest)) else { return };
            // The connection also works without it, only slower.
            let _ = stream.set_nodelay(true);
            let source = ClientSource::guest(client, guest);
            let served = Arc::clone(&proxy).serve(stream, source, ticket, cancel.clone());
            tracker.spawn(async move {
                served.await;
                drop(open);
            });
        })
        .await;
}

/// Serves Neutron's haproxies in the same way, if they run as one of these users.
pub async fn serve_haproxies(
    listener: UnixListener,
    users: HaproxyUsers,
    proxy: Arc<Proxy>,
    cancel: CancellationToken,
    tracker: TaskTracker,
) {
    let acceptor = Acceptor::new(&proxy, cancel.clone());
    let room = || proxy.admission.admit_haproxy();
    let poll_accept = |cx: &mut Context<'_>| listener.poll_accept(cx);
    let log = LogThrottle::new();
    acceptor
        .run(room, poll_accept, |ticket, (stream, _)| {
            if let Err(error) = users.check(&stream) {
                proxy.metrics.rejected_connection(RejectionLabel::HaproxyUser);
                if log.allow() {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "haproxy connection rejected; see metadata_proxy_user");
                }
                return;
            }
            let open = proxy.metrics.connection_opened();
            let served = Arc::clone(&proxy).serve(stream, ClientSource::Haproxy, ticket, cancel.clone());
            tracker.spawn(async move {
                served.await;
                drop(open);
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

impl Proxy {
    /// Counts an admitted connection as open, or reports why it was rejected.
    fn admitted(&self, ticket: Result<Ticket, AdmissionError>) -> Option<(Ticket, OpenConnection)> {
        match ticket {
            Ok(ticket) => Some((ticket, self.metrics.connection_opened())),
            Err(error) => {
                self.metrics.rejected_connection(error.label());
                tracing::debug!(%error, "connection rejected");
                None
            }
        }
    }
}

/// The accept loop of one listener.
struct Acceptor {
    proxy: Arc<Proxy>,
    cancel: CancellationToken,
    log: LogThrottle,
}

impl Acceptor {
    fn new(proxy: &Arc<Proxy>, cancel: CancellationToken) -> Self {
        Self { proxy: Arc::clone(proxy), cancel, log: LogThrottle::new() }
    }

    /// Accepts a connection whenever `room` has found room for one.
    async fn run<R: Future, S>(
        &self,
        room: impl Fn() -> R,
        poll_accept: impl Fn(&mut Context<'_>) -> Poll<io::Result<S>>,
        serve: impl Fn(R::Output, S),
    ) {
        loop {
            let accept = async { (room().await, poll_fn(&poll_accept).await) };
            let (room, accepted) = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                accepted = accept => accepted,
            };
            match accepted {
                Ok(connection) => serve(room, connection),
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
    use metadata_ebpf::identity::AttachmentId;

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
