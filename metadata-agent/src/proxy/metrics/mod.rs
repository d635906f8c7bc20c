//! Metrics of the proxy. They are registered once and passed down. No metric is global, and no
//! label is an instance id.
//!
//! Every request counts several values, on every worker thread. So they are plain atomics, and all
//! labels are closed sets. They may lie in memory that another process reads for a scrape
//! ([`totals`]).

mod exposition;
mod labels;
mod totals;
mod values;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::StatusCode;
use prometheus_client::registry::Registry;

use super::upstream::RequestBound;
use crate::sys::SharedWords;
use exposition::Family;
pub(crate) use labels::{HoldOutcome, RejectionLabel, UpstreamErrorLabel};
pub(crate) use totals::MetricsTotals;
use values::{Counter, Durations, Gauge, LabelCounters, Part, StatusCounters, Values, Words};

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $name:ident: $type:ty;)+) => {
        /// The proxy's metrics.
        #[derive(Debug)]
        pub struct Metrics {
            words: Arc<Words>,
            first: usize,
            $($name: $type,)+
        }

        /// The metrics in the order of their words.
        const FAMILIES: &[Family] = &[$(
            Family {
                name: stringify!($name),
                help: concat!($($help,)+ ".").trim_ascii(),
                shape: <$type as Values>::SHAPE,
            },
        )+];

        /// The number of words that hold the values of all metrics.
        const LEN: usize = 0 $(+ <$type as Values>::SHAPE.len())+;

        impl Metrics {
            /// Counts in these words, from the `first` on.
            #[expect(unused_assignments, reason = "nothing follows the last metric")]
            fn in_words(words: Words, first: usize) -> Self {
                let words = Arc::new(words);
                let mut next = first;
                $(
                    let $name = <$type>::from(Part::new(&words, next));
                    next += <$type as Values>::SHAPE.len();
                )+
                Self { words, first, $($name,)+ }
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

/// The number of words that the metrics of a process need.
pub(crate) const METRICS_LEN: usize = LEN;

/// Metrics in the memory of this process alone.
impl Default for Metrics {
    fn default() -> Self {
        Self::in_words(Words::own(LEN), 0)
    }
}

impl Metrics {
    /// Creates the metrics of the only proxy, in the memory of this process, and registers them
    /// with the prefix `metadata`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let metrics = Arc::new(Self::default());
        MetricsTotals::register(registry).add(Arc::clone(&metrics));
        metrics
    }

    /// Counts in shared words, which have [`METRICS_LEN`] from the `first` on for this.
    pub(crate) fn shared(words: SharedWords, first: usize) -> Self {
        Self::in_words(Words::Shared(words), first)
    }

    /// Reads all values, one after the other.
    fn values(&self) -> impl Iterator<Item = u64> {
        self.words.iter().skip(self.first).take(LEN).map(|word| word.load(Ordering::Relaxed))
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
    fn no_label_has_a_value_twice() {
        for family in FAMILIES {
            let exposition::Shape::ByLabel { values, .. } = family.shape else { continue };
            let unique: std::collections::BTreeSet<_> = values.iter().collect();
            assert_eq!(unique.len(), values.len(), "{}", family.name);
        }
    }
}
