//! The HTTP proxy between guests and Nova's metadata API.
//!
//! In: connections whose peer is an identity address, a [`Directory`] that knows who is behind it. Out: each request
//! to Nova with headers that prove the instance, each answer back byte for byte. Who asks is decided by the
//! connection alone, never by anything a guest writes on it.
//!
//! For sites that go step by step either end may still be Neutron's: its metadata agent in Nova's place, or its haproxies in
//! the guests', who say on a unix socket of their own whom each request is from.
//!
//! One request, in the order of the files: [`server`] accepts, [`limits`] admits, [`connection`] keeps the deadlines
//! with the help of [`pulse`] and [`fragment`], [`service`] answers: [`target`], [`rate`], [`peer`], [`identify`] or
//! [`caller`], [`requester`], [`headers`] and [`sign`], [`upstream`], [`relay`]. What goes wrong is a [`fault`]; what went
//! on is an [`exchange`]. [`probe`] asks Nova for nobody.

mod caller;
mod connection;
mod endpoint;
mod exchange;
mod fault;
mod fragment;
mod headers;
mod identify;
mod limits;
pub mod metrics;
mod peer;
mod pool;
mod probe;
mod pulse;
mod rate;
mod relay;
mod requester;
mod seldom;
mod server;
mod service;
mod shared;
mod sign;
mod target;
mod tls;
mod unix;
mod upstream;

use std::time::Duration;

pub use caller::{ClientLookup, ClientQuery, LookupOutcome, PortMatch};
pub use connection::GuestStream;
pub use endpoint::{Endpoint, EndpointError, Scheme};
pub use identify::{Directory, LookupState};
pub use probe::{ProbeError, TlsErrorKind, probe};
pub use rate::{RateLimit, RateWindow};
pub use requester::{ClientIdentity, NetworkHeader, UpstreamAuth};
pub use server::{serve, serve_haproxies};
pub use shared::Proxy;
pub use sign::Signer;
pub use tls::{ClientCertificate, TlsConfig, TlsSetupError};
pub use upstream::{Upstream, UpstreamConfig, UpstreamSetupError};

/// Limits and deadlines on the guests' side.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Largest request line and headers, in bytes; more is answered with 431.
    pub request_head_limit: usize,
    /// Largest request body, in bytes; more is answered with 413.
    pub request_body_limit: usize,
    /// From the first byte of a request to the end of its headers; 408 after that.
    pub request_head_timeout: Duration,
    /// From the end of the headers to the end of the body; 408 after that.
    pub request_body_timeout: Duration,
    /// How long a connection may stay open between requests; closed without a word after that.
    pub keep_alive_timeout: Duration,
    /// How long a guest may leave its answer unread; the connection is reset after that.
    pub write_timeout: Duration,
    /// How long a request waits for its port to become known.
    pub identity_hold: Duration,
    /// How long after its attachment appeared a port may stay unknown before it counts as no instance.
    pub identity_grace: Duration,
    /// How long requests in flight may take after the agent was told to stop.
    pub drain_timeout: Duration,
    /// Open connections of one attachment.
    pub connections_per_attachment: u32,
    /// Open connections of all guests together, the first few of each aside.
    pub connections: u32,
    /// How often each attachment may ask, if that is limited.
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
            connections_per_attachment: 128,
            connections: 16_384,
            rate_limit: None,
        }
    }
}
