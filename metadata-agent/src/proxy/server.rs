//! Accepts guest connections and never stops doing so by itself.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use metadata_ebpf::identity::ClientAddress;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::identify::Directory;
use super::shared::Proxy;

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
        let ticket = match self.admission.admit(client.attachment) {
            Ok(ticket) => ticket,
            Err(overload) => {
                self.metrics.rejected_connection(overload.label());
                tracing::debug!(%overload, "connection refused");
                return;
            }
        };
        // Without it the connection works as well, only slower.
        let _ = stream.set_nodelay(true);
        let open = self.metrics.connection_opened();
        let served = Arc::clone(self).serve_connection(stream, client, cancel.clone());
        tracker.spawn(async move {
            served.await;
            drop((ticket, open));
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
    loop {
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => proxy.welcome(stream, peer, &cancel, &tracker),
            Err(error) => {
                proxy.metrics.accept_error();
                if proxy.accept_failed.may_speak() {
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot accept a connection");
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
    use metadata_ebpf::identity::AttachmentId;

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
