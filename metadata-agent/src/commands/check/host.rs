//! Checks of the kernel and the host.

use std::path::Path;

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::utsname::uname;

use super::{Finding, finding};
use crate::config::Config;
use crate::process::capabilities;

/// Oldest supported kernel, the first with `bpf_redirect_peer`.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

pub(super) fn check(config: &Config) -> Vec<Finding> {
    vec![kernel(), ipv6(), capabilities(), bpffs(&config.bpffs_dir), namespaces()]
}

fn kernel() -> Finding {
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    finding(
        "kernel",
        match version(&release) {
            Some(version) if version >= OLDEST_KERNEL => Ok(release),
            _ => Err(format!(
                "{release}, but {}.{} or newer is needed (bpf_redirect_peer)",
                OLDEST_KERNEL.0, OLDEST_KERNEL.1
            )),
        },
    )
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn ipv6() -> Finding {
    let there = Path::new("/proc/sys/net/ipv6").exists();
    finding(
        "IPv6",
        if there {
            Ok("in the kernel".to_owned())
        } else {
            Err("not in the kernel; boot without ipv6.disable=1 (addresses may stay off by sysctl)"
                .to_owned())
        },
    )
}

fn capabilities() -> Finding {
    let held = || capabilities::TO_RUN.map(|(capability, _)| capability.to_string()).join(" ");
    finding(
        "capabilities",
        capabilities::require(&capabilities::TO_RUN).map(|()| held()).map_err(|error| error.to_string()),
    )
}

fn bpffs(directory: &Path) -> Finding {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let on_bpffs = statfs(existing).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    finding(
        "BPF file system",
        if on_bpffs {
            Ok(directory.display().to_string())
        } else {
            Err(format!("{} is not on one; mount -t bpf bpf /sys/fs/bpf", directory.display()))
        },
    )
}

fn namespaces() -> Finding {
    let there = Path::new("/proc/self/ns/net").exists();
    finding(
        "network namespaces",
        if there { Ok("in the kernel".to_owned()) } else { Err("not in the kernel".to_owned()) },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, version_found) in [
            ("6.18.44-fc-v669", Some((6, 18))),
            ("5.10.0-30-cloud-amd64", Some((5, 10))),
            ("5.9", Some((5, 9))),
            ("", None),
        ] {
            assert_eq!(version(release), version_found, "{release}");
        }
        assert!(version("5.9.16") < Some(OLDEST_KERNEL));
        assert!(version("10.0.1") >= Some(OLDEST_KERNEL));
    }
}
