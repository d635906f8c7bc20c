//! Values of metrics. Counting takes no lock, computes no hash and allocates nothing.
//!
//! The words that hold them may be shared with another process, which reads them for a scrape.
//! Every value is independent of the others, so all accesses are relaxed.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;

use super::exposition::Shape;
use super::labels::Label;
use crate::sys::SharedWords;

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

/// The memory of all values.
#[derive(Debug)]
pub(super) enum Words {
    Own(Box<[AtomicU64]>),
    Shared(SharedWords),
}

impl Words {
    pub(super) fn own(len: usize) -> Self {
        Self::Own((0..len).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Own(words) => words,
            Self::Shared(words) => words,
        }
    }
}

/// The words of one metric.
#[derive(Clone)]
pub(super) struct Part {
    words: Arc<Words>,
    first: usize,
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({})", self.first)
    }
}

impl Part {
    pub(super) fn new(words: &Arc<Words>, first: usize) -> Self {
        Self { words: Arc::clone(words), first }
    }

    fn add(&self, position: usize, amount: u64) {
        if let Some(word) = self.words.get(self.first + position) {
            word.fetch_add(amount, Ordering::Relaxed);
        }
    }
}

/// The values of one metric, in the shape that the exposition knows.
pub(super) trait Values: From<Part> {
    const SHAPE: Shape;
}

#[derive(Debug)]
pub(super) struct Counter(Part);

impl Counter {
    pub(super) fn increment(&self) {
        self.0.add(0, 1);
    }
}

impl From<Part> for Counter {
    fn from(part: Part) -> Self {
        Self(part)
    }
}

impl Values for Counter {
    const SHAPE: Shape = Shape::Counter;
}

/// A number of things that exist at the moment.
#[derive(Debug)]
pub(super) struct Gauge(Part);

impl Gauge {
    pub(super) fn increment(&self) {
        self.0.add(0, 1);
    }

    pub(super) fn decrement(&self) {
        // Wraps, like the counter that it takes back.
        self.0.add(0, u64::MAX);
    }
}

impl From<Part> for Gauge {
    fn from(part: Part) -> Self {
        Self(part)
    }
}

impl Values for Gauge {
    const SHAPE: Shape = Shape::Gauge;
}

/// One counter for each HTTP status.
#[derive(Debug)]
pub(super) struct StatusCounters(Part);

impl StatusCounters {
    pub(super) fn increment(&self, code: StatusCode) {
        if usize::from(code.as_u16()) < STATUS_CODES {
            self.0.add(usize::from(code.as_u16()), 1);
        }
    }
}

impl From<Part> for StatusCounters {
    fn from(part: Part) -> Self {
        Self(part)
    }
}

impl Values for StatusCounters {
    const SHAPE: Shape = Shape::ByStatus;
}

/// One counter for each value of a label.
#[derive(Debug)]
pub(super) struct LabelCounters<L> {
    counters: Part,
    label: PhantomData<L>,
}

impl<L: Label> LabelCounters<L> {
    pub(super) fn increment(&self, label: L) {
        if label.index() < L::VALUES.len() {
            self.counters.add(label.index(), 1);
        }
    }
}

impl<L> From<Part> for LabelCounters<L> {
    fn from(counters: Part) -> Self {
        Self { counters, label: PhantomData }
    }
}

impl<L: Label> Values for LabelCounters<L> {
    const SHAPE: Shape = Shape::ByLabel { key: L::KEY, values: L::VALUES };
}

/// A histogram of durations: their sum in nanoseconds, which overflows after 584 years; one counter
/// for each bound; and one for longer durations.
#[derive(Debug)]
pub(super) struct Durations(Part);

impl Durations {
    pub(super) fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = DURATION_BOUNDS.iter().position(|bound| nanos <= *bound);
        self.0.add(1 + bucket.unwrap_or(DURATION_BOUNDS.len()), 1);
        self.0.add(0, nanos);
    }
}

impl From<Part> for Durations {
    fn from(part: Part) -> Self {
        Self(part)
    }
}

impl Values for Durations {
    const SHAPE: Shape = Shape::Durations;
}
