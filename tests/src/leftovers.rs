//! Removes what a host with a name left behind when its process was killed.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns;
use crate::topology::{BPFFS, RUN};

/// Ends the processes in the namespaces of these names, and removes the namespaces and the folder of the host. The
/// names must be nobody else's, and their owner must be dead. Says what it removed.
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
            // Not mounted, or not even made.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => panic!("unmount {}: {e}", folder.join(BPFFS).display()),
        }
        fs::remove_dir_all(&folder).unwrap_or_else(|e| panic!("remove {}: {e}", folder.display()));
        removed.push(folder.display().to_string());
    }
    removed
}
