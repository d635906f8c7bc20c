//! Sysctls of the portal's namespace. All functions must run inside it.

use std::{fs, io};

use super::PortalError;

/// Sysctls of the portal's namespace, below `/proc/sys/net`, and their required values.
const SYSCTLS: [Sysctl; 7] = [
    Sysctl { name: "ipv6/conf/all/disable_ipv6", want: "0", is_required: true },
    Sysctl { name: "ipv6/conf/default/disable_ipv6", want: "0", is_required: true },
    Sysctl { name: "ipv6/conf/lo/disable_ipv6", want: "0", is_required: true },
    Sysctl { name: "ipv6/conf/md0/disable_ipv6", want: "0", is_required: true },
    Sysctl { name: "ipv6/conf/all/forwarding", want: "0", is_required: false },
    Sysctl { name: "ipv4/tcp_syncookies", want: "1", is_required: false },
    // Applies to IPv6 too. Finds a path MTU below 1,280 bytes, which ICMPv6 cannot report, and one
    // whose ICMP errors are lost.
    Sysctl { name: "ipv4/tcp_mtu_probing", want: "1", is_required: false },
];

/// A sysctl and the value that it must have.
#[derive(Debug)]
struct Sysctl {
    name: &'static str,
    want: &'static str,
    /// True if no guest is served with another value.
    is_required: bool,
}

/// A sysctl with another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WrongSysctl {
    pub(super) name: &'static str,
    pub(super) found: String,
    pub(super) want: &'static str,
    pub(super) is_required: bool,
}

/// Returns the sysctls that have another value.
///
/// # Errors
/// The kernel has no IPv6.
pub(super) fn wrong() -> Result<Vec<WrongSysctl>, PortalError> {
    let mut wrong = Vec::new();
    for Sysctl { name, want, is_required } in SYSCTLS {
        let found = match fs::read_to_string(path(name)) {
            Ok(found) => found.trim().to_owned(),
            // The interface is gone, which its link shows.
            Err(error) if error.kind() == io::ErrorKind::NotFound && name.contains("/md0/") => continue,
            Err(source) => return Err(PortalError::NoIpv6 { source }),
        };
        if found != want {
            wrong.push(WrongSysctl { name, found, want, is_required });
        }
    }
    Ok(wrong)
}

/// Writes the sysctls that differ. Returns those that cannot be written and need not be: in a
/// container `/proc/sys` is read-only, and new namespaces usually have the right values already.
///
/// # Errors
/// IPv6 is disabled and cannot be enabled.
pub(super) fn apply() -> Result<Vec<(WrongSysctl, io::Error)>, PortalError> {
    let mut refused = Vec::new();
    for wrong in wrong()? {
        match fs::write(path(wrong.name), wrong.want) {
            Ok(()) => {}
            Err(source) if wrong.is_required => {
                let WrongSysctl { name, found, want, .. } = wrong;
                return Err(PortalError::Sysctl { name, found, want, source });
            }
            Err(error) => refused.push((wrong, error)),
        }
    }
    Ok(refused)
}

/// Enables IPv6 on an interface, if it is disabled there.
///
/// # Errors
/// The interface is gone, or `/proc/sys` is read-only.
pub(super) fn enable_ipv6(interface: &str) -> io::Result<()> {
    let path = path(&format!("ipv6/conf/{interface}/disable_ipv6"));
    if fs::read_to_string(&path)?.trim() == "0" { Ok(()) } else { fs::write(path, "0") }
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}
