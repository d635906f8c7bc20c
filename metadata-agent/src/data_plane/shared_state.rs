//! The memory that the data plane shares with the control process: the time of its last heartbeat,
//! and its metrics. The control process trusts none of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use crate::datapath::Clock;
use crate::proxy::metrics::{METRICS_LEN, Metrics};
use crate::sys::SharedWords;

/// The position of the heartbeat, which the metrics follow.
const BEAT: usize = 0;
const LEN: usize = 1 + METRICS_LEN;

/// The state of one data plane, in either process.
#[derive(Debug)]
pub(crate) struct SharedState {
    beat: SharedWords,
    metrics: Arc<Metrics>,
}

impl SharedState {
    /// Creates the state of a data plane that is to be started. It gets the descriptor.
    pub(super) fn create() -> Result<(OwnedFd, Self), Errno> {
        let (memory, beat) = SharedWords::create("metadata-agent", LEN)?;
        let state = Self::with(beat, &memory)?;
        Ok((memory, state))
    }

    /// Maps the state in the data plane.
    pub(super) fn map(memory: BorrowedFd<'_>) -> Result<Self, Errno> {
        Self::with(SharedWords::map_memory(memory, LEN)?, memory)
    }

    fn with(beat: SharedWords, memory: impl AsFd) -> Result<Self, Errno> {
        let metrics = Metrics::shared(SharedWords::map_memory(memory.as_fd(), LEN)?, BEAT + 1);
        Ok(Self { beat, metrics: Arc::new(metrics) })
    }

    pub(super) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Marks a heartbeat, also one that damage makes void.
    pub(crate) fn mark_beat(&self) {
        self.beat[BEAT].store(Clock::now_ns(), Ordering::Relaxed);
    }

    /// Returns the time of the last heartbeat in nanoseconds of [`Clock`]; 0 before the first one.
    pub(crate) fn last_beat(&self) -> u64 {
        self.beat[BEAT].load(Ordering::Relaxed)
    }
}
