//! Which machine the figures are of.

use std::{fs, process};

use anyhow::Context as _;
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use super::statistics::precise;

/// What a reader needs to know before comparing.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    pub kernel: String,
    pub memory_mib: u64,
    /// Without it programs are interpreted, and BPF figures mean something else.
    pub bpf_jit: bool,
}

impl Machine {
    pub fn describe() -> anyhow::Result<Self> {
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo")?, "MemTotal").context("MemTotal")?;
        let memory_kib: u64 = memory.trim_end_matches(" kB").parse().context("MemTotal")?;
        Ok(Self {
            // Some architectures name none.
            processor: field(&read("/proc/cpuinfo")?, "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism()?.get(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            memory_mib: memory_kib / 1024,
            bpf_jit: read("/proc/sys/net/core/bpf_jit_enable")?.trim() != "0",
        })
    }
}

/// Takes the time of the CPUs while something runs.
#[derive(Debug)]
pub struct CpuMeter {
    agent: u32,
    began: CpuTicks,
}

/// What was used meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct CpuUse {
    pub agent_us: u64,
    /// The share of all cores that went to neither bench nor agent: how much the run was disturbed.
    pub others: f64,
}

#[derive(Clone, Copy, Debug)]
struct CpuTicks {
    busy: u64,
    idle: u64,
    bench: u64,
    agent: u64,
}

impl CpuMeter {
    pub fn start(agent: u32) -> anyhow::Result<Self> {
        Ok(Self { agent, began: CpuTicks::now(agent)? })
    }

    pub fn stop(self) -> anyhow::Result<CpuUse> {
        let used = CpuTicks::now(self.agent)?.since(self.began);
        let hertz = sysconf(SysconfVar::CLK_TCK)?.context("the kernel's clock ticks")?;
        Ok(CpuUse { agent_us: used.agent * 1_000_000 / u64::try_from(hertz)?, others: used.others() })
    }
}

impl CpuTicks {
    fn now(agent: u32) -> anyhow::Result<Self> {
        // proc(5), /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
        let stat = read("/proc/stat")?;
        let fields = stat.lines().next().context("/proc/stat has lines")?.split_whitespace().skip(1).take(8);
        let all: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>().context("/proc/stat")?;
        let idle = all.iter().skip(3).take(2).sum();
        let busy = all.iter().sum::<u64>() - idle;
        Ok(Self { busy, idle, bench: ticks_of(process::id())?, agent: ticks_of(agent)? })
    }

    fn since(self, before: Self) -> Self {
        Self {
            busy: self.busy - before.busy,
            idle: self.idle - before.idle,
            bench: self.bench - before.bench,
            agent: self.agent - before.agent,
        }
    }

    fn others(self) -> f64 {
        // The kernel counts ticks of processes and of CPUs in two ways that agree but roughly.
        let others = self.busy.saturating_sub(self.bench + self.agent);
        precise(others) / precise(self.busy + self.idle).max(1.0)
    }
}

fn ticks_of(pid: u32) -> anyhow::Result<u64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // Fields are counted behind the name, which may hold anything: proc(5), utime and stime.
    let fields = stat.rsplit_once(") ").context("a process's stat has a name")?.1;
    let times = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
    times.sum::<Result<u64, _>>().context("times of a process")
}

fn read(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_have_what_is_neither_idle_nor_ours() {
        let before = CpuTicks { busy: 100, idle: 50, bench: 7, agent: 9 };
        let used = |bench| CpuTicks { busy: 180, idle: 70, bench, agent: 39 }.since(before).others();
        assert!((used(37) - 0.2).abs() < 1e-9);
        assert!(used(70).abs() < 1e-9, "a few ticks more of ours than of all are none of others");
    }
}
