//! What all connections of all listeners share.

use std::sync::Arc;

use hyper::server::conn::http1;

use super::ProxyConfig;
use super::limits::Admission;
use super::rate::Rates;
use super::seldom::Seldom;
use super::upstream::Upstream;
use crate::proxy::metrics::Metrics;

/// hyper's buffer for reading and writing; it takes none below 8 KiB.
const BUFFER: usize = 64 * 1024;

/// What all connections of all listeners share.
#[derive(Debug)]
pub struct Proxy<D> {
    pub(super) directory: D,
    pub(super) upstream: Arc<Upstream>,
    pub(super) config: ProxyConfig,
    pub(super) metrics: Arc<Metrics>,
    pub(super) protocol: http1::Builder,
    pub(super) forbidden: Seldom,
    pub(super) upstream_failed: Seldom,
    pub(super) admission: Arc<Admission>,
    pub(super) rates: Option<Rates>,
    pub(super) accept_failed: Seldom,
}

impl<D> Proxy<D> {
    /// Puts the parts together.
    #[must_use]
    pub fn new(
        directory: D,
        upstream: Arc<Upstream>,
        config: ProxyConfig,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            directory,
            upstream,
            protocol: protocol(&config),
            admission: Admission::new(config.connections_per_attachment, config.connections),
            rates: config.rate_limit.clone().map(Rates::new),
            config,
            metrics,
            forbidden: Seldom::new(),
            upstream_failed: Seldom::new(),
            accept_failed: Seldom::new(),
        })
    }
}

/// The settings of hyper that hold for all connections.
fn protocol(config: &ProxyConfig) -> http1::Builder {
    let mut protocol = http1::Builder::new();
    protocol
        // Many clients close their side once they have asked.
        .half_close(true)
        .max_header_size(config.request_head_limit)
        .max_buf_size(BUFFER.max(config.request_head_limit))
        // `Pulse` does it.
        .header_read_timeout(None)
        // Nova's headers go through as they are.
        .auto_date_header(false);
    protocol
}
