//! Real guests: qemu without KVM, on a tap device that the caller made, in a network namespace that the caller
//! names.
//!
//! * [`SmallVm`]: a kernel and busybox, up in two seconds, which runs shell text and fetches paths on request.
//! * [`CloudVm`]: Debian with cloud-init, which boots once, reports what it took from the metadata service and
//!   powers off.
//! * [`Dhcp`]: what gives the latter its address and its route.
//! * [`scenario`]: what the guests do, whoever answers at 169.254.169.254.
//!
//! Guests know nothing of who answers. Everything here blocks; from async code, call it on a blocking thread.
//! Every wait has a deadline, every process ends with its owner, and what the guest said on its console is part
//! of every error.

mod cache;
mod cloud;
mod cpio;
mod debian;
mod dhcp;
mod guest;
mod hex;
mod qemu;
pub mod scenario;
mod small;

use std::path::Path;
use std::process::Command;

pub use cloud::{CloudReport, CloudVm};
pub use dhcp::{Dhcp, Lease};
pub use qemu::{Nic, Offloads};
pub use small::{Answer, Route, SmallVm, numbered_lines};

/// Where a program runs: gives the command that starts it in one network namespace. The command must become the
/// program (`exec`), not wait for it, so that its process id is the program's.
pub type Place<'a> = &'a dyn Fn(&str) -> Command;

/// The packages, beyond the base system, that guests need on the host.
pub const PACKAGES: &[&str] =
    &["qemu-system-x86", "dnsmasq-base", "e2fsprogs", "iproute2", "lz4", "mmdebstrap"];

const PROGRAMS: &[&str] = &[
    "qemu-system-x86_64",
    "dnsmasq",
    "mkfs.ext4",
    "ip",
    "lz4",
    "mmdebstrap",
    "apt-get",
    "apt-cache",
    "dpkg-deb",
    "timeout",
];

/// What this machine lacks to run guests; empty when it lacks nothing.
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = |program: &str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    missing.extend(PROGRAMS.iter().filter(|program| !installed(program)).map(|&program| program.to_owned()));
    missing
}

/// Builds the images of both kinds of guest, so that no test spends its deadline on it.
///
/// # Errors
/// When a package cannot be had or a tool fails.
pub fn prepare() -> anyhow::Result<()> {
    guest::Kernel::prepare()?;
    cloud::root_image()?;
    Ok(())
}
