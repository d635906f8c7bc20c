//! Resources of the agent's process, compared before and after a run.

use std::fs;
use std::iter::Sum;

use crate::agent::AgentProcess;
use crate::wait::{self, PATIENCE};

/// Connections to Nova, which the agent keeps for a while.
const KEPT_DESCRIPTORS: usize = 40;
/// The allocator keeps freed memory.
const KEPT_BYTES: u64 = 24 * 1024 * 1024;

/// The resources of a process at rest.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    pub descriptors: usize,
    pub threads: usize,
    pub resident_bytes: u64,
}

impl Resources {
    /// Waits until no guest's connection is open, and counts.
    #[must_use]
    pub fn at_rest(process: &AgentProcess) -> Self {
        wait::until("all connections have ended", PATIENCE, || {
            (process.count("metadata_connections_open") == 0).then_some(())
        });
        process.pids().into_iter().map(Self::of).sum()
    }

    /// Counts those of one process.
    fn of(pid: u32) -> Self {
        let count = |folder: &str| {
            let path = format!("/proc/{pid}/{folder}");
            fs::read_dir(&path).unwrap_or_else(|e| panic!("list {path}: {e}")).count()
        };
        let status = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&status).unwrap_or_else(|e| panic!("read {status}: {e}"));
        let resident =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let kilobytes: u64 = resident.and_then(|text| text.parse().ok()).expect("the resident memory");
        Self { descriptors: count("fd"), threads: count("task"), resident_bytes: kilobytes * 1024 }
    }

    /// Panics if `self` holds more than `before` and what the agent keeps on purpose.
    pub fn assert_no_leak(&self, before: &Self) {
        assert!(self.descriptors <= before.descriptors + KEPT_DESCRIPTORS, "{before:?} became {self:?}");
        // Threads for blocking work end after ten seconds of rest.
        assert!(self.threads <= before.threads + 4, "{before:?} became {self:?}");
        assert!(self.resident_bytes <= before.resident_bytes + KEPT_BYTES, "{before:?} became {self:?}");
    }
}

impl Sum for Resources {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self { descriptors: 0, threads: 0, resident_bytes: 0 }, |sum, one| Self {
            descriptors: sum.descriptors + one.descriptors,
            threads: sum.threads + one.threads,
            resident_bytes: sum.resident_bytes + one.resident_bytes,
        })
    }
}
