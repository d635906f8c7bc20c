//! The machine's ability to run scenarios, checked once per process. The rig's constructors check
//! it, so tests need not declare their privileges and are never skipped.

use std::fs;
use std::sync::OnceLock;

/// Panics unless this process may create namespaces and load BPF programs.
pub fn require() {
    static MISSING: OnceLock<Vec<&'static str>> = OnceLock::new();
    let missing = MISSING.get_or_init(missing);
    assert!(missing.is_empty(), "this test needs {}; run `cargo xtask test` as root", missing.join(" and "));
}

fn missing() -> Vec<&'static str> {
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let requirements = [
        (nix::unistd::geteuid().is_root(), "root"),
        (fs::exists("/proc/self/ns/net").unwrap_or(false), "a kernel with CONFIG_NET_NS"),
        (file_systems.split_whitespace().any(|word| word == "bpf"), "a kernel with CONFIG_BPF_SYSCALL"),
    ];
    requirements.into_iter().filter(|(met, _)| !met).map(|(_, requirement)| requirement).collect()
}
