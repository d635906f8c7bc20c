//! Opens connections to an endpoint of the metadata API.

use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_util::task::TaskTracker;

use super::access::{NameLookup, SocketConnector, UpstreamAccess};
use super::address::UpstreamAddress;
use super::endpoints::EndpointState;
use super::error::{UpstreamError, is_unsolicited};
use super::pool::Reuse;
use super::resolve::Name;
use super::stream::{RECEIVE_BUFFER, StreamControl, UpstreamStream, UpstreamTcp};
use super::tls::UpstreamTls;
use crate::proxy::metrics::Metrics;

/// How often a connection without traffic is probed. A request that Nova works on keeps none busy,
/// so only probes show that Nova's host has vanished without closing its connections.
const TCP_KEEPALIVE: Duration = Duration::from_secs(5);
/// Most kernel memory of the received data of one connection. The kernel doubles the option to
/// allow for its overhead.
pub(in crate::proxy) const RECEIVED_MEMORY: usize = 2 * RECEIVE_BUFFER;
/// How long an address may take before the next one is tried too (RFC 8305, section 5).
pub(super) const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// The sending half of a connection.
pub(super) type Sender = SendRequest<Full<Bytes>>;

/// A connection, driven by its own task. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct UpstreamConnection {
    pub(super) sender: Sender,
    control: Arc<StreamControl>,
    /// How often the endpoint had been silent when this connection was opened.
    silences: u32,
}

impl UpstreamConnection {
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// Returns whether the endpoint has not been silent since this connection was opened.
    pub(super) fn is_from(&self, silences: u32) -> bool {
        self.silences == silences
    }

    /// Returns whether the server has ended the connection because no request came.
    pub(super) fn has_timed_out(&self) -> bool {
        self.control.has_timed_out()
    }

    /// Has the task look for unexpected bytes before it sends the next request.
    pub(super) fn check_before_reuse(&self) {
        self.control.demand_check();
    }

    /// Makes the buffers those of a long response, or the usual ones.
    pub(super) fn set_large_buffers(&self, are_large: bool) {
        self.control.set_large_buffers(are_large);
    }
}

/// The way to find the addresses of an endpoint.
#[derive(Debug)]
pub(super) enum Addresses {
    Tcp(TcpAddresses),
    Unix(Arc<Path>),
}

#[derive(Debug)]
pub(super) enum TcpAddresses {
    Fixed(SocketAddr),
    /// A name, and its address that accepted last.
    Named(Arc<Name>, Mutex<Option<SocketAddr>>),
}

impl Addresses {
    pub(super) fn new(address: &UpstreamAddress, names: &Arc<dyn NameLookup>) -> Self {
        let url = match address {
            UpstreamAddress::Tcp(url) => url,
            UpstreamAddress::Unix(path) => return Self::Unix(Arc::clone(path)),
        };
        let (host, port) = (host_of(address), url.port_u16().unwrap_or_default());
        Self::Tcp(match host.parse::<IpAddr>() {
            Ok(ip) => TcpAddresses::Fixed((ip, port).into()),
            Err(_) => TcpAddresses::Named(Name::new(host, port, Arc::clone(names)), Mutex::default()),
        })
    }
}

/// Returns the host of a URL without the brackets of an IPv6 address.
fn host_of(address: &UpstreamAddress) -> &str {
    let UpstreamAddress::Tcp(url) = address else { return "" };
    let host = url.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

#[derive(Debug)]
pub(super) struct Connector {
    /// `None` if no endpoint uses TLS.
    tls: Option<UpstreamTls>,
    sockets: Arc<dyn SocketConnector>,
    limit: Duration,
    metrics: Arc<Metrics>,
    tracker: TaskTracker,
}

impl Connector {
    /// `limit` is for name resolution, TCP and TLS together. Connections run as tasks of `tracker`.
    pub(super) fn new(
        access: UpstreamAccess,
        limit: Duration,
        metrics: Arc<Metrics>,
        tracker: TaskTracker,
    ) -> Self {
        let UpstreamAccess { names: _, sockets, tls } = access;
        Self { tls, sockets, limit, metrics, tracker }
    }

    /// Returns the TLS configuration for new connections. `None` if no endpoint uses TLS.
    pub(super) fn tls_in_force(&self) -> Option<Arc<ClientConfig>> {
        self.tls.as_ref().map(UpstreamTls::current)
    }

    /// Has the TLS files checked because a server refused a connection made with this
    /// configuration. Returns whether another one is then in force.
    pub(super) async fn has_replaced_tls(&self, refused: &Arc<ClientConfig>) -> bool {
        match &self.tls {
            Some(tls) => tls.replacement_of(refused).await.is_some(),
            None => false,
        }
    }

    /// Connects on behalf of a guest, whose reuse of connections is suspended if the server turns
    /// out to send more than one response.
    pub(super) async fn connect(
        &self,
        endpoint: &Arc<EndpointState>,
        reuse: Option<&Arc<Reuse>>,
    ) -> Result<UpstreamConnection, UpstreamError> {
        let (control, silences) = (Arc::new(StreamControl::default()), endpoint.silences());
        let opened = timeout(self.limit, self.open(endpoint, Arc::clone(&control))).await;
        let late = |_| UpstreamError::ConnectTimeout { address: endpoint.address(), limit: self.limit };
        let stream = opened.map_err(late)??;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(stream.largest_read())
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| UpstreamError::Handshake { address: endpoint.address(), source })?;
        self.metrics.upstream_connection();
        let (endpoint, reuse, metrics) = (Arc::clone(endpoint), reuse.cloned(), Arc::clone(&self.metrics));
        let seen = Arc::clone(&control);
        // Ends when the sender is dropped or the server closes.
        self.tracker.spawn(async move {
            if let Err(error) = connection.await {
                if is_unsolicited(&error) && !seen.has_timed_out() {
                    endpoint.report_unsolicited(reuse.as_deref(), &metrics);
                }
                tracing::debug!(error = &error as &dyn Error, "upstream connection ended");
            }
        });
        Ok(UpstreamConnection { sender, control, silences })
    }

    async fn open(
        &self,
        endpoint: &EndpointState,
        control: Arc<StreamControl>,
    ) -> Result<UpstreamStream, UpstreamError> {
        let addresses = match &endpoint.addresses {
            Addresses::Tcp(addresses) => addresses,
            Addresses::Unix(path) => {
                let connected = self.sockets.connect(path).await;
                let connected = connected.map_err(|error| self.not_connected(endpoint, error));
                return connected.map(UpstreamStream::Unix);
            }
        };
        match &self.tls {
            Some(tls) if endpoint.endpoint.is_https() => {
                self.open_tls(endpoint, addresses, tls, control).await
            }
            _ => self.open_tcp(endpoint, addresses, control).await.map(UpstreamStream::Tcp),
        }
    }

    async fn open_tcp(
        &self,
        endpoint: &EndpointState,
        addresses: &TcpAddresses,
        control: Arc<StreamControl>,
    ) -> Result<UpstreamTcp, UpstreamError> {
        let connected = match addresses {
            TcpAddresses::Fixed(address) => connect_tcp(*address).await,
            TcpAddresses::Named(name, last) => {
                let addresses = name.addresses().await.map_err(|source| UpstreamError::Resolve {
                    address: endpoint.address(),
                    source: source.into(),
                })?;
                match connect_to_first(&addresses, last).await {
                    Ok(stream) => Ok(stream),
                    // The service may have moved.
                    Err(error) => match name.addresses_instead_of(&addresses).await {
                        Some(addresses) => connect_to_first(&addresses, last).await,
                        None => Err(error),
                    },
                }
            }
        };
        let stream = connected.map_err(|error| self.not_connected(endpoint, error))?;
        // The connection also works without these options.
        let _ = stream.set_nodelay(true);
        let socket = SockRef::from(&stream);
        let keepalive = TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
        let _ = socket.set_tcp_keepalive(&keepalive);
        // A peer that acknowledges nothing for this long is gone.
        let _ = socket.set_tcp_user_timeout(Some(self.limit));
        Ok(UpstreamTcp::new(stream, control))
    }

    /// Connects with TLS. If a certificate is refused that was replaced a moment ago, it connects
    /// once more.
    async fn open_tls(
        &self,
        endpoint: &EndpointState,
        addresses: &TcpAddresses,
        tls: &UpstreamTls,
        control: Arc<StreamControl>,
    ) -> Result<UpstreamStream, UpstreamError> {
        let config = tls.current();
        let stream = self.open_tcp(endpoint, addresses, Arc::clone(&control)).await?;
        let error = match self.encrypt(endpoint, Arc::clone(&config), stream).await {
            Err(error) if error.is_about_certificates() => error,
            result => return result,
        };
        match tls.replacement_of(&config).await {
            Some(config) => {
                let stream = self.open_tcp(endpoint, addresses, control).await?;
                self.encrypt(endpoint, config, stream).await
            }
            None => Err(error),
        }
    }

    async fn encrypt(
        &self,
        endpoint: &EndpointState,
        config: Arc<ClientConfig>,
        stream: UpstreamTcp,
    ) -> Result<UpstreamStream, UpstreamError> {
        let host = host_of(&endpoint.endpoint.address).to_owned();
        let name = ServerName::try_from(host)
            .map_err(|source| UpstreamError::Tls { address: endpoint.address(), source: source.into() })?;
        match TlsConnector::from(config).connect(name, stream).await {
            Ok(stream) => Ok(UpstreamStream::Tls(Box::new(stream))),
            Err(error) if error.raw_os_error().is_some() => Err(self.not_connected(endpoint, error)),
            Err(error) => Err(UpstreamError::Tls { address: endpoint.address(), source: error.into() }),
        }
    }

    fn not_connected(&self, endpoint: &EndpointState, error: io::Error) -> UpstreamError {
        let address = endpoint.address();
        if error.kind() == io::ErrorKind::TimedOut {
            UpstreamError::ConnectTimeout { address, limit: self.limit }
        } else {
            UpstreamError::Connect { address, source: error.into() }
        }
    }
}

async fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let stream = socket.connect(address).await?;
    // After the handshake, which settles the scale of the window: the buffer may grow later.
    SockRef::from(&stream).set_recv_buffer_size(RECEIVE_BUFFER)?;
    Ok(stream)
}

/// Connects to the first address that accepts, and begins with the one that did so last. An address
/// that takes long delays the others by [`NEXT_ADDRESS`] only.
async fn connect_to_first(
    addresses: &[SocketAddr],
    last: &Mutex<Option<SocketAddr>>,
) -> io::Result<TcpStream> {
    if let [only] = addresses {
        return connect_tcp(*only).await;
    }
    let mut addresses = addresses.to_vec();
    let worked = *last.lock().unwrap_or_else(PoisonError::into_inner);
    addresses.sort_by_key(|address| Some(*address) != worked);
    let mut rest = addresses.into_iter();
    let mut attempts = JoinSet::new();
    let mut last_error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    loop {
        if let Some(address) = rest.next() {
            attempts.spawn(async move { connect_tcp(address).await.map(|stream| (address, stream)) });
        } else if attempts.is_empty() {
            return Err(last_error);
        }
        let has_more = rest.len() > 0;
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok(Ok((address, stream))) => {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
                    return Ok(stream);
                }
                Ok(Err(error)) => last_error = error,
                Err(_) => {}
            },
            () = sleep(NEXT_ADDRESS), if has_more => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn an_address_that_refuses_does_not_hide_the_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        for addresses in [[closed, open], [open, closed]] {
            let last = Mutex::default();
            let stream = connect_to_first(&addresses, &last).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), open);
            assert_eq!(*last.lock().unwrap(), Some(open));
        }
        let error = connect_to_first(&[closed, closed], &Mutex::default()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
