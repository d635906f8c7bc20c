//! Metrics of the proxy. They are registered once and passed down. No metric is global, and no
//! label is an instance id.

use std::time::Duration;

use hyper::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Upper bounds in seconds, from a response over a pooled connection to the time-outs of Nova and
/// of the legacy path.
const DURATION_BUCKETS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 60.0];

/// The HTTP status that the guest received. 499 means that the guest left before the response.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct CodeLabels {
    code: u16,
}

/// The label of an `UpstreamError`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ErrorLabels {
    error: &'static str,
}

/// The label of a `RequestBound`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct BoundLabels {
    bound: &'static str,
}

/// The label of a `Rejection`, or of a connection limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabels {
    reason: &'static str,
}

/// The end of a wait for an identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OutcomeLabels {
    outcome: &'static str,
}

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $name:ident: $type:ty = $new:expr $(, $unit:expr)?;)+) => {
        /// The proxy's metrics.
        #[derive(Debug)]
        pub struct Metrics {
            $($name: $type,)+
        }

        impl Metrics {
            /// Creates the metrics and registers them with the prefix `metadata`.
            #[must_use]
            pub fn register(registry: &mut Registry) -> Self {
                let metrics = Self { $($name: $new,)+ };
                let registry = registry.sub_registry_with_prefix("metadata");
                $(register!(
                    registry, stringify!($name), concat!($($help),+).trim(), metrics.$name.clone() $(, $unit)?
                );)+
                metrics
            }
        }
    };
}

macro_rules! register {
    ($registry:ident, $name:expr, $help:expr, $metric:expr) => {
        $registry.register($name, $help, $metric)
    };
    ($registry:ident, $name:expr, $help:expr, $metric:expr, $unit:expr) => {
        $registry.register_with_unit($name, $help, $unit, $metric)
    };
}

// The doc comment of each metric is its help text.
metrics! {
    /// Requests by the status that the guest received
    requests: Family<CodeLabels, Counter> = Family::default();
    /// Time from a request's head to the last byte of its response
    request_duration: Histogram = Histogram::new(DURATION_BUCKETS), Unit::Seconds;
    /// Failed requests to Nova, by error
    upstream_errors: Family<ErrorLabels, Counter> = Family::default();
    /// Connections opened to Nova
    upstream_connections: Counter = Counter::default();
    /// Requests sent again because a pooled connection had been closed
    upstream_retries: Counter = Counter::default();
    /// Requests that waited for a slot because a bound on requests in flight was reached
    upstream_waits: Family<BoundLabels, Counter> = Family::default();
    /// Time for which such requests waited
    upstream_wait_duration: Histogram = Histogram::new(DURATION_BUCKETS), Unit::Seconds;
    /// Connections on which Nova sent bytes that answer no request
    upstream_unsolicited: Counter = Counter::default();
    /// Responses 403 of Nova, which mean that the shared secrets differ
    upstream_forbidden: Counter = Counter::default();
    /// Requests rejected without a request to Nova, by reason
    rejected_requests: Family<ReasonLabels, Counter> = Family::default();
    /// Connections closed without an HTTP response, by reason
    rejected_connections: Family<ReasonLabels, Counter> = Family::default();
    /// Connections accepted from guests
    connections: Counter = Counter::default();
    /// Open guest connections
    connections_open: Gauge = Gauge::default();
    /// Connections that could not be accepted
    accept_errors: Counter = Counter::default();
    /// Requests that waited for the identity of their port, by outcome
    identity_holds: Family<OutcomeLabels, Counter> = Family::default();
}

impl Metrics {
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

    pub(crate) fn upstream_wait(&self, bound: &'static str, duration: Duration) {
        self.upstream_waits.get_or_create(&BoundLabels { bound }).inc();
        self.upstream_wait_duration.observe(duration.as_secs_f64());
    }

    pub(crate) fn upstream_unsolicited(&self) {
        self.upstream_unsolicited.inc();
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

    /// Counts a connection as open until the guard is dropped.
    pub(crate) fn connection_opened(&self) -> OpenConnection {
        self.connections.inc();
        self.connections_open.inc();
        OpenConnection(self.connections_open.clone())
    }
}

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
