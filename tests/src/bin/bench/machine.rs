//! The machine that was measured, and the resources of its processes.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// Information that a reader needs before comparing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    pub kernel: String,
    pub memory_mib: u64,
    /// Without it programs are interpreted, and BPF figures have another meaning.
    pub bpf_jit: bool,
    /// The versions of the programs that take part, as they report them.
    pub versions: Vec<String>,
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
            // Some architectures have no such field.
            processor: field(&read("/proc/cpuinfo")?, "model name")
                .unwrap_or_else(|| env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism()?.get(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            memory_mib: memory_kib / 1024,
            bpf_jit: read("/proc/sys/net/core/bpf_jit_enable")?.trim() != "0",
            versions: versions(),
        })
    }
}

impl Machine {
    /// Returns true if figures of both machines can be compared. Programs may differ, because they
    /// are what is compared.
    pub fn is_same_as(&self, other: &Self) -> bool {
        Self { versions: other.versions.clone(), ..self.clone() } == *other
    }
}

/// Programs that do not respond are absent, and so are their peers.
fn versions() -> Vec<String> {
    let agent = metadata_tests::agent::binary().display().to_string();
    let asked = [(agent.as_str(), "--version"), ("nginx", "-v"), ("haproxy", "-v")];
    let first_line = |(program, flag): (&str, &str)| {
        let output = Command::new(program).arg(flag).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).lines().next().map(str::to_owned)
    };
    asked.into_iter().filter_map(first_line).collect()
}

/// Returns true if a program is on the PATH.
pub fn has_program(name: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(name).is_file()))
}

/// Returns true if Debian's packages of Neutron are installed.
pub fn has_neutron_agent() -> bool {
    Path::new("/usr/lib/python3/dist-packages/neutron/agent/metadata/agent.py").is_file()
}

/// Returns true if OVN's Southbound database can be served.
pub fn has_southbound() -> bool {
    Path::new("/usr/share/ovn/ovn-sb.ovsschema").is_file()
}

/// Returns the memory that can be allocated without swapping.
pub fn available_mib() -> anyhow::Result<u64> {
    number_in(&read("/proc/meminfo")?, "MemAvailable").map(|kib| kib / 1024)
}

/// The memory of processes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub resident_kib: u64,
    /// Shared pages are counted once.
    pub proportional_kib: u64,
}

impl Memory {
    pub fn of_processes(processes: &[u32]) -> anyhow::Result<Self> {
        let mut total = Self::default();
        for pid in processes {
            let rollup = read(&format!("/proc/{pid}/smaps_rollup"))?;
            total.resident_kib += number_in(&rollup, "Rss")?;
            total.proportional_kib += number_in(&rollup, "Pss")?;
        }
        Ok(total)
    }
}

fn number_in(text: &str, name: &str) -> anyhow::Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = value.and_then(|value| value.split_whitespace().next());
    value.with_context(|| name.to_owned())?.parse().with_context(|| name.to_owned())
}

pub fn read(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_full_name() {
        let text = "Pss_Dirty:   7 kB\nPss:     12 kB\n";
        assert_eq!(number_in(text, "Pss").ok(), Some(12));
        assert!(number_in(text, "Rss").is_err());
    }

    #[test]
    fn this_process_is_resident() {
        let memory = Memory::of_processes(&[std::process::id()]).expect("its own memory");
        assert!(memory.resident_kib >= memory.proportional_kib && memory.proportional_kib > 0);
    }
}
