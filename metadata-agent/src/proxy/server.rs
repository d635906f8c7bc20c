//! Accepts connections of guests, and of haproxies, and never stops doing so by itself.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::caller::ClientLookup;
use super::identify::Directory;
use super::limits::Ticket;
use super::shared::Proxy;
use crate::proxy::metrics::OpenConnection;

/// How long to wait for a file descriptor or memory to become free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl<D: Directory> Proxy<D> {
    fn welcome(
        self: &Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        cancel: &CancellationToken,
        tracker: &TaskTracker,
    ) {
        let Some(client) = client_of(peer) else {
            self.metrics.rejected_connection("not_an_identity");
            tracing::debug!(%peer, "a peer that is no identity address is not served");
            return;
        };
        let Some(place) = self.admit(Some(client.attachment)) else { return };
        // Without it the connection works as well, only slower.
        let _ = stream.set_nodelay(true);
        let served = Arc::clone(self).serve_connection(stream, client, cancel.clone());
        tracker.spawn(async move {
            served.await;
            drop(place);
        });
    }
}

impl<C: ClientLookup> Proxy<C> {
    fn welcome_haproxy(
        self: &Arc<Self>,
        stream: UnixStream,
        cancel: &CancellationToken,
        tracker: &TaskTracker,
    ) {
        let Some(place) = self.admit(None) else { return };
        let served = Arc::clone(self).serve_haproxy(stream, cancel.clone());
        tracker.spawn(async move {
            served.await;
            drop(place);
        });
    }
}

/// Who a peer is. Everybody else is somebody who found a way around the datapath.
fn client_of(peer: SocketAddr) -> Option<ClientAddress> {
    match peer.ip() {
        IpAddr::V6(address) => ClientAddress::from_identity(address.octets()),
        IpAddr::V4(_) => None,
    }
}

/// Accepts until `cancel`. Connections join `tracker`; each finishes its request in flight by itself.
pub async fn serve<D: Directory>(
    listener: TcpListener,
    proxy: Arc<Proxy<D>>,
    cancel: CancellationToken,
    tracker: TaskTracker,
) {
    let door = |cx: &mut Context<'_>| listener.poll_accept(cx);
    proxy.accept(door, &cancel, |(stream, peer)| proxy.welcome(stream, peer, &cancel, &tracker)).await;
}

/// The same for haproxies of Neutron's, which say for whom they ask. Whoever can open this socket is believed.
pub async fn serve_haproxies<C: ClientLookup>(
    listener: UnixListener,
    proxy: Arc<Proxy<C>>,
    cancel: CancellationToken,
    tracker: TaskTracker,
) {
    let door = |cx: &mut Context<'_>| listener.poll_accept(cx);
    proxy.accept(door, &cancel, |(stream, _)| proxy.welcome_haproxy(stream, &cancel, &tracker)).await;
}

impl<D> Proxy<D> {
    async fn accept<S>(
        &self,
        door: impl Fn(&mut Context<'_>) -> Poll<io::Result<S>>,
        cancel: &CancellationToken,
        welcome: impl Fn(S),
    ) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                accepted = poll_fn(&door) => accepted,
            };
            match accepted {
                Ok(newcomer) => welcome(newcomer),
                Err(error) => {
                    self.metrics.accept_error();
                    if self.accept_failed.may_speak() {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "cannot accept a connection"
                        );
                    }
                    if !concerns_one_connection(&error) {
                        // Out of descriptors or memory: nothing tells when there are some again.
                        tokio::select! {
                            () = cancel.cancelled() => return,
                            () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                        }
                    }
                }
            }
        }
    }

    /// Takes a place for a connection of an attachment's, or of a haproxy's.
    fn admit(&self, attachment: Option<AttachmentId>) -> Option<(Ticket, OpenConnection)> {
        match self.admission.admit(attachment) {
            Ok(ticket) => Some((ticket, self.metrics.connection_opened())),
            Err(overload) => {
                self.metrics.rejected_connection(overload.label());
                tracing::debug!(%overload, "connection refused");
                None
            }
        }
    }
}

/// A connection that died while it waited; the next one is not affected.
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
        assert_eq!(client_of((address, 4711).into()), Some(client));
        for stranger in ["127.0.0.1:80", "[::1]:80", "[::ffff:10.0.0.5]:80", "[fd6d::a9fe:a9fe]:80"] {
            assert_eq!(client_of(stranger.parse().unwrap()), None, "{stranger}");
        }
    }

    #[test]
    fn running_out_of_descriptors_is_waited_out() {
        for errno in [nix::errno::Errno::EMFILE, nix::errno::Errno::ENFILE, nix::errno::Errno::ENOBUFS] {
            assert!(!concerns_one_connection(&errno.into()), "{errno}");
        }
        assert!(concerns_one_connection(&nix::errno::Errno::ECONNABORTED.into()));
    }
}
