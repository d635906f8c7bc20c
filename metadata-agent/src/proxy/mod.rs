//! The HTTP proxy between guests and Nova's metadata API.
//!
//! In: connections whose peer is an identity address, and a [`ClientDirectory`] that knows the port
//! behind it. Out: each request to Nova with headers that prove the instance, each response back
//! byte for byte. The connection alone identifies a guest; nothing that a guest writes on it can.
//!
//! During a step-by-step migration, either end may still be Neutron's: its metadata agent in Nova's
//! place, or its haproxies in the guests'. A haproxy connects to a unix socket and names the client
//! in each request.
//!
//! One request passes four rooms:
//!
//! - [`downstream`] accepts and admits connections, and enforces their time-outs and rate limits.
//! - [`client`] identifies the client.
//! - [`request`] checks the request, forwards it and relays the response. [`request::handler`]
//!   shows the phases in order.
//! - [`upstream`] sends to Nova, or to Neutron's metadata agent, over pooled connections.
//!
//! The proxy imports nothing of the kernel side, the inventory, the sources or the configuration.
//! It opens no file and no path, and queries no resolver: what it needs is handed to it.

mod client;
mod downstream;
mod large_buffers;
mod log_throttle;
pub mod metrics;
mod request;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use serde::{Deserialize, Serialize};

pub(crate) use client::PortMatch;
pub use client::{
    ClientDirectory, ClientIdentity, ClientLookup, ClientQuery, ForwardedAddresses, LookupFuture,
    LookupOutcome, LookupState, NetworkHeader, SecretStatus, Signatures,
};
pub(crate) use downstream::expected_body;
pub use downstream::{ClientStream, HaproxyUsers, RateLimit, RateWindow, serve_guests, serve_haproxies};
pub use upstream::{
    Endpoint, EndpointError, NameLookup, NameLookupFuture, ProbeError, Scheme, SocketConnector, SocketFuture,
    TlsErrorKind, TlsFeed, Upstream, UpstreamAccess, UpstreamConfig, UpstreamSetupError, UpstreamTls, probe,
    probe_secrets,
};

use client::ClientResolver;
use downstream::{AWAITED_HEADS, Admission, GROUP_RESERVED, GuestRates, RESERVED};
use large_buffers::LargeBuffers;
pub use large_buffers::{LARGE_BUFFER_PLACES, LARGE_BUFFERS_MEMORY, LARGE_SEND_BUFFER};
use log_throttle::LogThrottle;
use metrics::Metrics;
use upstream::RECEIVED_MEMORY;

/// hyper's buffer for reading and writing. hyper takes none below 8 KiB. A larger one for large
/// request heads replaces it.
const BUFFER: usize = 32 * 1024;

/// Largest piece of a response that is read from the upstream, unless it is a long one.
pub(crate) const RESPONSE_PIECE: usize = 64 * 1024;

/// Memory of a connection's task with its timers, headers and record.
const TASK: usize = 12 * 1024;

/// A TLS record that was received, and its plain text.
const TLS: usize = 36 * 1024;

/// Limits and time-outs on the clients' side.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct ProxyConfig {
    /// Largest request line and headers, in bytes. Larger ones are answered with 431.
    pub request_head_limit: usize,
    /// Largest request body, in bytes. Larger ones are answered with 413.
    pub request_body_limit: usize,
    /// Time from the first byte of a request to the end of its headers; 408 after that.
    pub request_head_timeout: Duration,
    /// Time from the end of the headers to the end of the body; 408 after that.
    pub request_body_timeout: Duration,
    /// How long a connection may stay open between requests. It is then closed without a response.
    pub keep_alive_timeout: Duration,
    /// How long a guest may leave its response unread. The connection is then reset.
    pub write_timeout: Duration,
    /// How long a request waits for its port to become known.
    pub identity_hold: Duration,
    /// How long after its attachment a port may stay unknown before it counts as not an instance.
    pub identity_grace: Duration,
    /// How long requests in flight may take after the signal to stop.
    pub drain_timeout: Duration,
    /// Open connections of one guest.
    pub connections_per_guest: u32,
    /// Open connections of all guests together, not counting the reserves.
    pub connections: u32,
    pub rate_limit: Option<RateLimit>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            request_head_limit: 32 * 1024,
            request_body_limit: 64 * 1024,
            request_head_timeout: Duration::from_secs(30),
            request_body_timeout: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(32),
            identity_hold: Duration::from_secs(5),
            identity_grace: Duration::from_mins(2),
            drain_timeout: Duration::from_secs(30),
            connections_per_guest: 128,
            connections: 1024,
            rate_limit: None,
        }
    }
}

impl ProxyConfig {
    /// Returns the most connections of guests that are open at the same time, if that many ports
    /// have an interface of their own and that many groups of guests share one.
    #[must_use]
    pub fn most_connections(&self, ports: usize, groups: usize) -> usize {
        let reserved = RESERVED.min(self.connections_per_guest) as usize;
        let behind_haproxies = AWAITED_HEADS as usize + groups * GROUP_RESERVED as usize;
        self.connections as usize + ports * reserved + behind_haproxies
    }

    /// Returns the most memory that one connection uses, in the agent and in the kernel's buffers
    /// towards Nova.
    #[must_use]
    pub fn connection_memory(&self) -> usize {
        let buffer = BUFFER.max(self.request_head_limit);
        // A body that was read whole; or a response: a full buffer, the piece that follows, and the
        // buffer of the connection to Nova.
        let message = self.request_body_limit.max(buffer + 2 * RESPONSE_PIECE);
        buffer + message + TASK + RECEIVED_MEMORY + TLS
    }
}

/// State that the connections of both listeners share.
#[derive(Debug)]
pub struct Proxy {
    clients: ClientResolver,
    upstream: Arc<Upstream>,
    config: ProxyConfig,
    metrics: Arc<Metrics>,
    http: http1::Builder,
    admission: Arc<Admission>,
    rates: Option<GuestRates>,
    large_buffers: LargeBuffers,
    signature_log: LogThrottle,
    upstream_log: LogThrottle,
}

impl Proxy {
    #[must_use]
    pub fn new(
        directory: Arc<dyn ClientDirectory>,
        lookup: Arc<dyn ClientLookup>,
        upstream: Arc<Upstream>,
        config: ProxyConfig,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            clients: ClientResolver::new(directory, lookup, &config, Arc::clone(&metrics)),
            upstream,
            http: http_settings(&config),
            admission: Admission::new(config.connections_per_guest, config.connections),
            rates: config.rate_limit.clone().map(GuestRates::new),
            config,
            metrics,
            large_buffers: LargeBuffers::new(),
            signature_log: LogThrottle::new(),
            upstream_log: LogThrottle::new(),
        })
    }
}

fn http_settings(config: &ProxyConfig) -> http1::Builder {
    let mut http = http1::Builder::new();
    http
        // Many clients close their side once they have sent the request.
        .half_close(true)
        .max_header_size(config.request_head_limit)
        .max_buf_size(BUFFER.max(config.request_head_limit))
        // `downstream::connection` enforces this time-out itself.
        .header_read_timeout(None)
        // Nova's headers pass unchanged.
        .auto_date_header(false);
    http
}
