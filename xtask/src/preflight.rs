//! Checks what privileged tests need from the running system, beyond installed programs. All
//! missing items are listed at once, before any test starts.

use std::path::Path;

use anyhow::{Result, bail};

use crate::command::Invocation;
use crate::probe::{Host, Probe};

/// Mount point of the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// Device that creates taps.
const TUN: &str = "/dev/net/tun";

/// Mounts the BPF file system if it is not mounted, and checks the rest.
///
/// # Errors
/// Lists everything that is missing.
pub fn check() -> Result<()> {
    if Host.is_root() && !is_mounted(&mounts(), BPFFS) {
        Invocation::new(["mount", "-t", "bpf", "bpf", BPFFS]).run()?;
    }
    let missing = missing(&Host, &mounts());
    if !missing.is_empty() {
        bail!("this system cannot run the selected tests:\n  {}", missing.join("\n  "));
    }
    Ok(())
}

fn missing(probe: &impl Probe, mounts: &str) -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !probe.is_root() {
        missing.push("not root: the tests load BPF programs and create network namespaces");
    }
    if !is_mounted(mounts, BPFFS) {
        missing.push("no BPF file system: mount -t bpf bpf /sys/fs/bpf");
    }
    if !probe.has_file(Path::new(TUN)) {
        missing.push("no /dev/net/tun: modprobe tun, or a kernel with CONFIG_TUN");
    }
    missing
}

/// Returns the mount table, which is empty if it cannot be read.
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
    fn all_missing_items_are_listed_at_once() {
        let missing = missing(&FakeProbe::default(), "tmpfs /sys/fs/bpf tmpfs rw 0 0\n");
        assert_eq!(missing.len(), 3, "{missing:?}");
    }

    #[test]
    fn a_ready_system_lacks_nothing() {
        let probe = FakeProbe { root: true, files: [TUN].into(), ..FakeProbe::default() };
        assert_eq!(missing(&probe, MOUNTED), [""; 0]);
    }
}
