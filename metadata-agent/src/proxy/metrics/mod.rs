//! Metrics of the proxy. They are registered once and passed down. No metric is global, and no
//! label is an instance id.
//!
//! Every request counts several values, on every worker thread. So they are plain atomics, and all
//! labels are closed sets. A scrape reads a [`MetricsSnapshot`], which is nothing but numbers.

mod exposition;
mod labels;
mod values;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;

use super::upstream::RequestBound;
use exposition::Family;
pub(crate) use labels::{HoldOutcome, RejectionLabel, UpstreamErrorLabel};
use values::{Counter, Durations, Gauge, LabelCounters, StatusCounters, Values};

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $name:ident: $type:ty;)+) => {
        /// The proxy's metrics.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($name: $type,)+
        }

        /// The metrics in the order of their values in a [`MetricsSnapshot`].
        const FAMILIES: &[Family] = &[$(
            Family {
                name: stringify!($name),
                help: concat!($($help,)+ ".").trim_ascii(),
                shape: <$type as Values>::SHAPE,
            },
        )+];

        impl Metrics {
            /// Reads all values.
            pub(crate) fn snapshot(&self) -> MetricsSnapshot {
                let mut values = Vec::new();
                $(self.$name.read(&mut values);)+
                MetricsSnapshot(values)
            }
        }
    };
}

// The doc comment of each metric is its help text.
metrics! {
    /// Requests by the status that the guest received
    requests: StatusCounters;
    /// Time from a request's head to the last byte of its response
    request_duration: Durations;
    /// Failed requests to Nova, by error
    upstream_errors: LabelCounters<UpstreamErrorLabel>;
    /// Connections opened to Nova
    upstream_connections: Counter;
    /// Requests sent again because a pooled connection had been closed
    upstream_retries: Counter;
    /// Requests that waited for a slot because a bound on requests in flight was reached
    upstream_waits: LabelCounters<RequestBound>;
    /// Time for which such requests waited
    upstream_wait_duration: Durations;
    /// Connections on which Nova sent bytes that answer no request
    upstream_unsolicited: Counter;
    /// Responses 403 of Nova, which mean that the shared secrets differ
    upstream_forbidden: Counter;
    /// Requests rejected without a request to Nova, by reason
    rejected_requests: LabelCounters<RejectionLabel>;
    /// Connections closed without an HTTP response, by reason
    rejected_connections: LabelCounters<RejectionLabel>;
    /// Connections accepted from guests
    connections: Counter;
    /// Open guest connections
    connections_open: Gauge;
    /// Connections that could not be accepted
    accept_errors: Counter;
    /// Requests that waited for the identity of their port, by outcome
    identity_holds: LabelCounters<HoldOutcome>;
}

/// The values of all metrics, read one after the other.
#[derive(Debug)]
pub(crate) struct MetricsSnapshot(Vec<u64>);

impl MetricsSnapshot {
    /// Encodes the values for a scrape.
    pub(crate) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        exposition::encode(FAMILIES, &self.0, encoder)
    }
}

/// Reads the metrics at each scrape.
#[derive(Debug)]
struct MetricsCollector(Arc<Metrics>);

impl Collector for MetricsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.snapshot().encode(&mut encoder)
    }
}

impl Metrics {
    /// Creates the metrics and registers them with the prefix `metadata`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let metrics = Arc::new(Self::default());
        let registry = registry.sub_registry_with_prefix("metadata");
        registry.register_collector(Box::new(MetricsCollector(Arc::clone(&metrics))));
        metrics
    }

    pub(crate) fn request(&self, code: StatusCode, duration: Duration) {
        self.requests.increment(code);
        self.request_duration.observe(duration);
    }

    pub(crate) fn upstream_error(&self, error: UpstreamErrorLabel) {
        self.upstream_errors.increment(error);
    }

    pub(crate) fn upstream_connection(&self) {
        self.upstream_connections.increment();
    }

    pub(crate) fn upstream_retry(&self) {
        self.upstream_retries.increment();
    }

    pub(crate) fn upstream_wait(&self, bound: RequestBound, duration: Duration) {
        self.upstream_waits.increment(bound);
        self.upstream_wait_duration.observe(duration);
    }

    pub(crate) fn upstream_unsolicited(&self) {
        self.upstream_unsolicited.increment();
    }

    pub(crate) fn upstream_forbidden(&self) {
        self.upstream_forbidden.increment();
    }

    pub(crate) fn rejected_request(&self, reason: RejectionLabel) {
        self.rejected_requests.increment(reason);
    }

    pub(crate) fn rejected_connection(&self, reason: RejectionLabel) {
        self.rejected_connections.increment(reason);
    }

    pub(crate) fn accept_error(&self) {
        self.accept_errors.increment();
    }

    pub(crate) fn identity_hold(&self, outcome: HoldOutcome) {
        self.identity_holds.increment(outcome);
    }

    /// Counts a connection as open until the guard is dropped.
    pub(crate) fn connection_opened(self: &Arc<Self>) -> OpenConnection {
        self.connections.increment();
        self.connections_open.increment();
        OpenConnection(Arc::clone(self))
    }
}

#[derive(Debug)]
pub(crate) struct OpenConnection(Arc<Metrics>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections_open.decrement();
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
        metrics.upstream_error(UpstreamErrorLabel::Connect);
        metrics.identity_hold(HoldOutcome::Resolved);
        drop(metrics.connection_opened());

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "metadata_requests_total{code=\"200\"} 1",
            "metadata_request_duration_seconds_bucket{le=\"0.005\"} 1",
            "metadata_upstream_errors_total{error=\"connect\"} 1",
            "metadata_identity_holds_total{outcome=\"resolved\"} 1",
            "metadata_connections_total 1",
            "metadata_connections_open 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }

    /// The whole text, so that no name, help, unit, bucket or order changes unnoticed.
    #[test]
    fn a_scrape_shows_every_metric_in_order() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.request(StatusCode::NOT_FOUND, Duration::from_micros(500));
        metrics.request(StatusCode::OK, Duration::from_nanos(500_001));
        metrics.request(StatusCode::OK, Duration::from_secs(61));
        metrics.upstream_wait(RequestBound::All, Duration::ZERO);
        metrics.rejected_connection(RejectionLabel::HaproxyUser);
        let open = metrics.connection_opened();

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert_eq!(text, include_str!("exposition.txt"));
        drop(open);
    }

    #[test]
    fn a_snapshot_of_another_length_is_an_error() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let MetricsSnapshot(mut values) = metrics.snapshot();
        values.pop();
        let truncated = TruncatedSnapshot(MetricsSnapshot(values));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(truncated));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap_err();
    }

    #[derive(Debug)]
    struct TruncatedSnapshot(MetricsSnapshot);

    impl Collector for TruncatedSnapshot {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            self.0.encode(&mut encoder)
        }
    }

    #[test]
    fn no_label_has_a_value_twice() {
        for family in FAMILIES {
            let exposition::Shape::ByLabel { values, .. } = family.shape else { continue };
            let unique: std::collections::BTreeSet<_> = values.iter().collect();
            assert_eq!(unique.len(), values.len(), "{}", family.name);
        }
    }
}
