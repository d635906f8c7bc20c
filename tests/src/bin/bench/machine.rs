//! Which machine the figures are of.

use std::fs;

use anyhow::Context as _;
use serde::Serialize;

/// What a reader needs to know before comparing.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    pub kernel: String,
    pub memory_mib: u64,
    /// Without it programs are interpreted, and BPF figures mean something else.
    pub bpf_jit: bool,
    /// Of the last minute before the bench: what others took.
    pub load_before: String,
}

impl Machine {
    pub fn describe() -> anyhow::Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
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
            load_before: read("/proc/loadavg")?.split(' ').next().unwrap_or_default().to_owned(),
        })
    }
}
