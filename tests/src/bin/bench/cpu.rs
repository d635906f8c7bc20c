//! The CPU time while something runs, split among its consumers.
//!
//! The kernel accounts the work for a packet to whichever process is running, and a peer in the
//! kernel alone has no process. The relevant figure is therefore `machine`: everything that was not
//! idle. It includes guest and upstream, which are the same for all peers; `direct` shows their
//! share.

use std::process;

use anyhow::Context as _;
use nix::unistd::{SysconfVar, sysconf};

use super::machine::read;
use super::statistics::precise;

/// Measures CPU time.
#[derive(Debug)]
pub struct CpuMeter {
    peer: Vec<u32>,
    upstream: Vec<u32>,
    began: Ticks,
}

/// The CPU time used, in seconds of one core.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CpuUse {
    /// Everything that was not idle: processes, system calls, interrupts.
    pub machine: f64,
    /// The processes of the peer, with their system calls.
    pub peer: f64,
    /// The share of all cores that is accounted to neither bench nor peer nor upstream: interrupts
    /// and other programs.
    pub others: f64,
}

#[derive(Clone, Copy, Debug)]
struct Ticks {
    busy: u64,
    idle: u64,
    bench: u64,
    peer: u64,
    upstream: u64,
}

impl CpuMeter {
    pub fn start(peer: Vec<u32>, upstream: Vec<u32>) -> anyhow::Result<Self> {
        let began = Ticks::now(&peer, &upstream)?;
        Ok(Self { peer, upstream, began })
    }

    pub fn stop(self) -> anyhow::Result<CpuUse> {
        let hertz = sysconf(SysconfVar::CLK_TCK)?.context("the kernel's clock ticks")?;
        let used = Ticks::now(&self.peer, &self.upstream)?.since(self.began);
        Ok(used.as_use(precise(u64::try_from(hertz)?)))
    }
}

impl Ticks {
    fn now(peer: &[u32], upstream: &[u32]) -> anyhow::Result<Self> {
        // proc(5), /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
        let stat = read("/proc/stat")?;
        let fields = stat.lines().next().context("/proc/stat has lines")?.split_whitespace().skip(1).take(8);
        let all: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>().context("/proc/stat")?;
        let idle = all.iter().skip(3).take(2).sum();
        let busy = all.iter().sum::<u64>() - idle;
        let of = |pids: &[u32]| pids.iter().map(|pid| ticks_of(*pid)).sum::<anyhow::Result<u64>>();
        Ok(Self { busy, idle, bench: ticks_of(process::id())?, peer: of(peer)?, upstream: of(upstream)? })
    }

    fn since(self, before: Self) -> Self {
        Self {
            busy: self.busy - before.busy,
            idle: self.idle - before.idle,
            bench: self.bench - before.bench,
            peer: self.peer - before.peer,
            upstream: self.upstream - before.upstream,
        }
    }

    fn as_use(self, hertz: f64) -> CpuUse {
        // The kernel's tick counts of processes and of CPUs agree only roughly.
        let others = self.busy.saturating_sub(self.bench + self.peer + self.upstream);
        CpuUse {
            machine: precise(self.busy) / hertz,
            peer: precise(self.peer) / hertz,
            others: precise(others) / precise(self.busy + self.idle).max(1.0),
        }
    }
}

fn ticks_of(pid: u32) -> anyhow::Result<u64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // Fields are counted after the name, which may contain anything: proc(5), utime and stime.
    let fields = stat.rsplit_once(") ").context("a process's stat has a name")?.1;
    let times = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
    times.sum::<Result<u64, _>>().context("times of a process")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_time_is_neither_idle_nor_of_a_participant() {
        let before = Ticks { busy: 100, idle: 50, bench: 7, peer: 9, upstream: 2 };
        let used =
            |bench| Ticks { busy: 180, idle: 70, bench, peer: 39, upstream: 7 }.since(before).as_use(100.0);
        assert_eq!(used(32), CpuUse { machine: 0.8, peer: 0.3, others: 0.2 });
        assert!(used(70).others.abs() < 1e-9, "the share of others must not be negative");
    }
}
