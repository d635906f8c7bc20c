//! What privileged tests need of the running system beyond installed programs. Whatever is missing is named, all of it at
//! once, and nothing starts.

use std::path::Path;

use anyhow::{Result, bail};

use crate::command::Invocation;
use crate::probe::{Host, Probe};

/// Where BPF objects are pinned.
const BPFFS: &str = "/sys/fs/bpf";
/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// Mounts the BPF file system where it is absent, and checks the rest.
///
/// # Errors
/// Names everything that is missing.
pub fn check() -> Result<()> {
    if Host.is_root() && !is_mounted(&mounts(), BPFFS) {
        Invocation::new(["mount", "-t", "bpf", "bpf", BPFFS]).run()?;
    }
    let faults = faults(&Host, &mounts());
    if !faults.is_empty() {
        bail!("this system cannot run the tests asked for:\n  {}", faults.join("\n  "));
    }
    Ok(())
}

fn faults(probe: &impl Probe, mounts: &str) -> Vec<&'static str> {
    let mut faults = Vec::new();
    if !probe.is_root() {
        faults.push("not root: the tests load BPF programs and make network namespaces");
    }
    if !is_mounted(mounts, BPFFS) {
        faults.push("no BPF file system: mount -t bpf bpf /sys/fs/bpf");
    }
    if !probe.file(Path::new(TUN)) {
        faults.push("no /dev/net/tun: modprobe tun, or a kernel with CONFIG_TUN");
    }
    faults
}

/// The mount table; empty where it cannot be read, as then nothing is known to be mounted.
fn mounts() -> String {
    std::fs::read_to_string("/proc/self/mounts").unwrap_or_default()
}

fn is_mounted(mounts: &str, path: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(path) && fields.next() == Some("bpf")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requirements::tests::FakeProbe;

    const MOUNTED: &str = "sysfs /sys sysfs rw 0 0\nbpf /sys/fs/bpf bpf rw,relatime 0 0\n";

    #[test]
    fn every_fault_is_named_at_once() {
        let faults = faults(&FakeProbe::default(), "tmpfs /sys/fs/bpf tmpfs rw 0 0\n");
        assert_eq!(faults.len(), 3, "{faults:?}");
    }

    #[test]
    fn a_ready_system_has_no_fault() {
        let probe = FakeProbe { root: true, files: [TUN].into(), ..FakeProbe::default() };
        assert_eq!(faults(&probe, MOUNTED), [""; 0]);
    }
}
