//! What the proxy counts: typed families, registered once, handed down. No global, no instance id as a label.

use std::time::Duration;

use hyper::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Upper bounds in seconds: from an answer out of a warm pool to the legacy path's time-outs and Nova's own.
const DURATION_BUCKETS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 60.0];

/// The HTTP status a guest received; 499 is a guest that left before its answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CodeLabels {
    code: u16,
}

/// A variant of the closed set of upstream errors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ErrorLabels {
    error: &'static str,
}

/// A variant of the closed set of reasons to refuse.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    reason: &'static str,
}

/// How a wait for an identity ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabels {
    outcome: &'static str,
}

/// The proxy's metrics.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<CodeLabels, Counter>,
    request_duration: Histogram,
    upstream_errors: Family<ErrorLabels, Counter>,
    upstream_connections: Counter,
    upstream_retries: Counter,
    upstream_forbidden: Counter,
    rejected_requests: Family<ReasonLabels, Counter>,
    rejected_connections: Family<ReasonLabels, Counter>,
    connections: Counter,
    connections_open: Gauge,
    accept_errors: Counter,
    identity_holds: Family<OutcomeLabels, Counter>,
}

impl Metrics {
    /// Makes the families and registers them.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            request_duration: Histogram::new(DURATION_BUCKETS),
            upstream_errors: Family::default(),
            upstream_connections: Counter::default(),
            upstream_retries: Counter::default(),
            upstream_forbidden: Counter::default(),
            rejected_requests: Family::default(),
            rejected_connections: Family::default(),
            connections: Counter::default(),
            connections_open: Gauge::default(),
            accept_errors: Counter::default(),
            identity_holds: Family::default(),
        };
        let registry = registry.sub_registry_with_prefix("metadata");
        registry.register("requests", "Requests by the status the guest received", metrics.requests.clone());
        registry.register_with_unit(
            "request_duration",
            "From a request's head to the last byte of its answer",
            Unit::Seconds,
            metrics.request_duration.clone(),
        );
        registry.register(
            "upstream_errors",
            "Failures on the way to Nova and back",
            metrics.upstream_errors.clone(),
        );
        registry.register(
            "upstream_connections",
            "Connections opened to Nova",
            metrics.upstream_connections.clone(),
        );
        registry.register(
            "upstream_retries",
            "Requests sent again because a pooled connection had gone stale",
            metrics.upstream_retries.clone(),
        );
        registry.register(
            "upstream_forbidden",
            "Answers 403 of Nova: the shared secrets differ",
            metrics.upstream_forbidden.clone(),
        );
        registry.register(
            "rejected_requests",
            "Requests answered without asking Nova",
            metrics.rejected_requests.clone(),
        );
        registry.register(
            "rejected_connections",
            "Connections closed without an HTTP answer",
            metrics.rejected_connections.clone(),
        );
        registry.register("connections", "Connections accepted from guests", metrics.connections.clone());
        registry.register("connections_open", "Guest connections now open", metrics.connections_open.clone());
        registry.register(
            "accept_errors",
            "Connections that could not be accepted",
            metrics.accept_errors.clone(),
        );
        registry.register(
            "identity_holds",
            "Requests that waited for their port's identity, by how the wait ended",
            metrics.identity_holds.clone(),
        );
        metrics
    }

    pub(crate) fn request(&self, code: StatusCode, duration: Duration) {
        self.requests.get_or_create(&CodeLabels { code: code.as_u16() }).inc();
        self.request_duration.observe(duration.as_secs_f64());
    }

    pub(crate) fn upstream_error(&self, error: &'static str) {
        self.upstream_errors.get_or_create(&ErrorLabels { error }).inc();
    }

    pub(crate) fn upstream_connection(&self) {
        self.upstream_connections.inc();
    }

    pub(crate) fn upstream_retry(&self) {
        self.upstream_retries.inc();
    }

    pub(crate) fn upstream_forbidden(&self) {
        self.upstream_forbidden.inc();
    }

    pub(crate) fn rejected_request(&self, reason: &'static str) {
        self.rejected_requests.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(crate) fn rejected_connection(&self, reason: &'static str) {
        self.rejected_connections.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(crate) fn accept_error(&self) {
        self.accept_errors.inc();
    }

    pub(crate) fn identity_hold(&self, outcome: &'static str) {
        self.identity_holds.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts a connection as open for as long as the guard lives.
    pub(crate) fn connection_opened(&self) -> OpenConnection {
        self.connections.inc();
        self.connections_open.inc();
        OpenConnection(self.connections_open.clone())
    }
}

/// One open guest connection.
#[derive(Debug)]
pub(crate) struct OpenConnection(Gauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_reach_the_exposition() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.request(StatusCode::OK, Duration::from_millis(3));
        metrics.upstream_error("refused");
        metrics.identity_hold("resolved");
        drop(metrics.connection_opened());

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "metadata_requests_total{code=\"200\"} 1",
            "metadata_request_duration_seconds_bucket{le=\"0.005\"} 1",
            "metadata_upstream_errors_total{error=\"refused\"} 1",
            "metadata_identity_holds_total{outcome=\"resolved\"} 1",
            "metadata_connections_total 1",
            "metadata_connections_open 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
