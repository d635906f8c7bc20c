//! Encodes the values of the proxy's metrics for a scrape.
//!
//! A value of a label is shown once it has been counted.

use std::fmt;
use std::time::Duration;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelValue, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::values::{DURATION_BOUNDS, STATUS_CODES};

static SECONDS: Unit = Unit::Seconds;

/// The meaning of the values of one metric.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    Counter,
    Gauge,
    /// One counter for each HTTP status.
    ByStatus,
    /// One counter for each value of a label.
    ByLabel {
        key: &'static str,
        values: &'static [&'static str],
    },
    /// Sum in nanoseconds, then a counter for each bound, then one for longer durations.
    Durations,
}

impl Shape {
    pub(super) const fn len(self) -> usize {
        match self {
            Self::Counter | Self::Gauge => 1,
            Self::ByStatus => STATUS_CODES,
            Self::ByLabel { values, .. } => values.len(),
            Self::Durations => 2 + DURATION_BOUNDS.len(),
        }
    }

    const fn metric_type(self) -> MetricType {
        match self {
            Self::Counter | Self::ByStatus | Self::ByLabel { .. } => MetricType::Counter,
            Self::Gauge => MetricType::Gauge,
            Self::Durations => MetricType::Histogram,
        }
    }

    fn unit(self) -> Option<&'static Unit> {
        match self {
            Self::Durations => Some(&SECONDS),
            Self::Counter | Self::Gauge | Self::ByStatus | Self::ByLabel { .. } => None,
        }
    }
}

/// A metric as a scrape shows it.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) shape: Shape,
}

/// Encodes `values`, the values of all families in their order.
pub(super) fn encode(
    families: &[Family],
    mut values: &[u64],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    for family in families {
        let (own, rest) = values.split_at_checked(family.shape.len()).ok_or(fmt::Error)?;
        family.encode(own, encoder)?;
        values = rest;
    }
    Ok(())
}

impl Family {
    fn encode(&self, values: &[u64], encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self { name, help, shape } = *self;
        let has_labels = matches!(shape, Shape::ByStatus | Shape::ByLabel { .. });
        if has_labels && values.iter().all(|count| *count == 0) {
            return Ok(());
        }
        let mut metric = encoder.encode_descriptor(name, help, shape.unit(), shape.metric_type())?;
        match (shape, values) {
            (Shape::Counter, [count]) => metric.encode_counter::<NoLabelSet, _, u64>(count, None),
            (Shape::Gauge, [value]) => metric.encode_gauge(value),
            (Shape::ByStatus, counts) => counts
                .iter()
                .zip(0_u16..)
                .try_for_each(|(count, code)| labelled(&mut metric, "code", code, *count)),
            (Shape::ByLabel { key, values }, counts) => counts
                .iter()
                .zip(values)
                .try_for_each(|(count, value)| labelled(&mut metric, key, *value, *count)),
            (Shape::Durations, [sum, buckets @ ..]) => durations(&mut metric, *sum, buckets),
            (Shape::Counter | Shape::Gauge | Shape::Durations, _) => Err(fmt::Error),
        }
    }
}

/// Encodes the counter of one value of a label, if it has counted.
fn labelled(
    metric: &mut MetricEncoder<'_>,
    key: &'static str,
    value: impl EncodeLabelValue,
    count: u64,
) -> Result<(), fmt::Error> {
    if count == 0 {
        return Ok(());
    }
    metric.encode_family(&[(key, value)])?.encode_counter::<NoLabelSet, _, u64>(&count, None)
}

fn durations(metric: &mut MetricEncoder<'_>, sum: u64, buckets: &[u64]) -> Result<(), fmt::Error> {
    let bounds = DURATION_BOUNDS.iter().map(|bound| Duration::from_nanos(*bound).as_secs_f64());
    let buckets: Vec<_> = bounds.chain([f64::INFINITY]).zip(buckets.iter().copied()).collect();
    // The total is the sum of the same buckets, so that both agree in each scrape.
    let count = buckets.iter().map(|(_, count)| count).sum();
    metric.encode_histogram::<NoLabelSet>(Duration::from_nanos(sum).as_secs_f64(), count, &buckets, None)
}
