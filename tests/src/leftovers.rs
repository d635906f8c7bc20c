//! Removes the leftovers of a named host whose process was killed.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns;
use crate::topology::{BPFFS, RUN};

/// Kills the processes in these namespaces, then removes the namespaces and the host's folder. The
/// owner of the names must be dead. Returns a list of what was removed.
pub fn remove(host: &str, namespaces: &[String]) -> Vec<String> {
    let mut removed = Vec::new();
    for name in netns::names().iter().filter(|name| namespaces.contains(*name)) {
        for pid in netns::output_of(Command::new("ip").args(["netns", "pids", name])).split_whitespace() {
            let number = pid.parse().unwrap_or_else(|e| panic!("process id {pid}: {e}"));
            match kill(Pid::from_raw(number), Signal::SIGKILL) {
                Ok(()) => removed.push(format!("process {pid} in {name}")),
                Err(Errno::ESRCH) => {}
                Err(e) => panic!("end process {pid} in {name}: {e}"),
            }
        }
        netns::output_of(Command::new("ip").args(["netns", "del", name]));
        removed.push(format!("namespace {name}"));
    }
    let folder = Path::new(RUN).join(host);
    if folder.exists() {
        match umount2(&folder.join(BPFFS), MntFlags::MNT_DETACH) {
            // Not mounted, or not even created.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => panic!("unmount {}: {e}", folder.join(BPFFS).display()),
        }
        fs::remove_dir_all(&folder).unwrap_or_else(|e| panic!("remove {}: {e}", folder.display()));
        removed.push(folder.display().to_string());
    }
    removed
}
