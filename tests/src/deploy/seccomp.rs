//! A unit's `SystemCallFilter=` as a container runtime's profile, so that it can be tried without
//! systemd.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::json;

use super::{stdout_of, unit_settings};

/// The system calls that systemd always allows to a service with a filter (systemd.exec(5)).
const ALWAYS: &str = "@default execve exit exit_group getrlimit rt_sigreturn sigreturn";

/// Returns a profile that allows these system calls and fails all others with `EPERM`.
#[must_use]
pub fn seccomp_profile(unit: &str) -> String {
    let filters = unit_settings(unit).filter(|(name, _)| *name == "SystemCallFilter").map(|(_, value)| value);
    let mut names = BTreeSet::new();
    for filter in filters.chain([ALWAYS]) {
        assert!(!filter.starts_with('~'), "SystemCallFilter={filter} is a deny list");
        filter.split_whitespace().for_each(|word| expand(word, &mut names));
    }
    let allowed = json!({ "names": names, "action": "SCMP_ACT_ALLOW" });
    json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [allowed] }).to_string()
}

/// Adds a system call, or the calls of a group and of the groups in it.
fn expand(word: &str, names: &mut BTreeSet<String>) {
    if !word.starts_with('@') {
        names.insert(word.to_owned());
        return;
    }
    // The first line names the group itself, and comments begin with a hash.
    let group = stdout_of(Command::new("systemd-analyze").args(["syscall-filter", word]));
    let members = group.lines().skip(1).map(str::trim).filter(|line| !line.starts_with('#'));
    members.filter(|line| !line.is_empty()).for_each(|member| expand(member, names));
}
