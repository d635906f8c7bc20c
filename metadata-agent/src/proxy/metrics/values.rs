//! Values of metrics. Counting takes no lock, computes no hash and allocates nothing.
//!
//! Every value is independent of the others, so all accesses are relaxed.

use std::array;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;

use super::exposition::Shape;
use super::labels::Label;

/// Upper bounds in nanoseconds, from a response over a pooled connection to the time-outs of Nova
/// and of the legacy path.
pub(super) const DURATION_BOUNDS: [u64; 13] = [
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    1_000_000_000,
    5_000_000_000,
    30_000_000_000,
    60_000_000_000,
];

/// One more than the largest code that hyper accepts.
pub(super) const STATUS_CODES: usize = 1000;

/// The values of one metric, in the shape that the exposition knows.
pub(super) trait Values {
    const SHAPE: Shape;

    fn read(&self, into: &mut Vec<u64>);
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Values for Counter {
    const SHAPE: Shape = Shape::Counter;

    fn read(&self, into: &mut Vec<u64>) {
        into.push(self.0.load(Ordering::Relaxed));
    }
}

/// A number of things that exist at the moment.
#[derive(Debug, Default)]
pub(super) struct Gauge(AtomicU64);

impl Gauge {
    pub(super) fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn decrement(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Values for Gauge {
    const SHAPE: Shape = Shape::Gauge;

    fn read(&self, into: &mut Vec<u64>) {
        into.push(self.0.load(Ordering::Relaxed));
    }
}

/// One counter for each HTTP status.
#[derive(Debug)]
pub(super) struct StatusCounters([AtomicU64; STATUS_CODES]);

impl StatusCounters {
    pub(super) fn increment(&self, code: StatusCode) {
        if let Some(counter) = self.0.get(usize::from(code.as_u16())) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Default for StatusCounters {
    fn default() -> Self {
        Self(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Values for StatusCounters {
    const SHAPE: Shape = Shape::ByStatus;

    fn read(&self, into: &mut Vec<u64>) {
        into.extend(self.0.iter().map(|counter| counter.load(Ordering::Relaxed)));
    }
}

/// One counter for each value of a label.
#[derive(Debug)]
pub(super) struct LabelCounters<L> {
    counters: Box<[AtomicU64]>,
    label: PhantomData<L>,
}

impl<L: Label> LabelCounters<L> {
    pub(super) fn increment(&self, label: L) {
        if let Some(counter) = self.counters.get(label.index()) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<L: Label> Default for LabelCounters<L> {
    fn default() -> Self {
        let counters = L::VALUES.iter().map(|_| AtomicU64::new(0)).collect();
        Self { counters, label: PhantomData }
    }
}

impl<L: Label> Values for LabelCounters<L> {
    const SHAPE: Shape = Shape::ByLabel { key: L::KEY, values: L::VALUES };

    fn read(&self, into: &mut Vec<u64>) {
        into.extend(self.counters.iter().map(|counter| counter.load(Ordering::Relaxed)));
    }
}

/// A histogram of durations.
#[derive(Debug)]
pub(super) struct Durations {
    /// One for each bound, and one for longer durations.
    buckets: [AtomicU64; DURATION_BOUNDS.len() + 1],
    /// In nanoseconds. It overflows after 584 years.
    sum: AtomicU64,
}

impl Durations {
    pub(super) fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = DURATION_BOUNDS.iter().position(|bound| nanos <= *bound);
        if let Some(bucket) = self.buckets.get(bucket.unwrap_or(DURATION_BOUNDS.len())) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(nanos, Ordering::Relaxed);
    }
}

impl Default for Durations {
    fn default() -> Self {
        Self { buckets: array::from_fn(|_| AtomicU64::new(0)), sum: AtomicU64::new(0) }
    }
}

impl Values for Durations {
    const SHAPE: Shape = Shape::Durations;

    fn read(&self, into: &mut Vec<u64>) {
        into.push(self.sum.load(Ordering::Relaxed));
        into.extend(self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)));
    }
}
