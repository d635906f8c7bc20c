//! Settings of the upstream.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::address::Endpoint;

/// Endpoints of the metadata API, and their time-outs.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct UpstreamConfig {
    /// The first endpoint that can be reached is used until it fails.
    pub endpoints: Vec<Endpoint>,
    /// For name resolution, TCP and TLS together.
    pub connect_timeout: Duration,
    /// From the request to the head of its response.
    pub answer_timeout: Duration,
    /// Between two pieces of a response body.
    pub stall_timeout: Duration,
    /// How long a connection may stay idle. This must be shorter than Nova's own limit
    /// (`client_socket_timeout`, `http-keepalive`).
    pub idle_timeout: Duration,
    /// Idle connections to keep, of all guests together.
    pub idle_connections: usize,
    /// Requests of one guest that may be in flight at once, to the end of their responses. Its
    /// other requests wait for up to `connect_timeout`.
    pub requests_per_guest: usize,
    /// Requests of all guests that may wait for the head of their response at once. Other requests
    /// wait for up to `connect_timeout`; the guests take turns.
    pub waiting_requests: usize,
}

impl UpstreamConfig {
    /// Returns the defaults for these endpoints.
    #[must_use]
    pub fn new(endpoints: Vec<Endpoint>) -> Self {
        Self {
            endpoints,
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_mins(1),
            stall_timeout: Duration::from_mins(1),
            // Apache in front of Nova, the usual deployment, closes after 5 s.
            idle_timeout: Duration::from_secs(4),
            // 64 guests that use all that `requests_per_guest` allows. Without a place here a
            // connection is closed after its response, which costs time and nothing else.
            idle_connections: 1024,
            requests_per_guest: 16,
            // A bound for the host's ports and descriptors, not for Nova.
            waiting_requests: 1024,
        }
    }

    /// Returns whether an endpoint uses https.
    #[must_use]
    pub fn uses_tls(&self) -> bool {
        self.endpoints.iter().any(Endpoint::is_https)
    }

    /// Returns the defaults for Neutron's metadata agent, which closes after each response and has
    /// a short accept queue.
    #[must_use]
    pub fn neutron_agent(socket: &Path, waiting_requests: usize) -> Self {
        Self { idle_connections: 0, waiting_requests, ..Self::new(vec![Endpoint::socket(socket)]) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum UpstreamSetupError {
    #[error("no endpoint of the metadata API is configured")]
    NoEndpoint,
    #[error("an endpoint uses https, but no certificates were read")]
    NoTls,
}
