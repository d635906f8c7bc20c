//! A script that runs one of Neutron's agents with its files in a private folder until it is
//! dropped.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::wait;

/// Debian's Python, for its packages of the agents.
pub(super) const PYTHON: &str = "/usr/bin/python3";
/// The script imports a large part of OpenStack.
const START: Duration = Duration::from_mins(3);
const LOG: &str = "log";

/// A running script.
#[derive(Debug)]
pub(super) struct Script {
    child: Child,
    folder: TempDir,
}

/// Creates an empty folder for a script.
pub(super) fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("neutron-").tempdir();
    folder.unwrap_or_else(|e| panic!("create a folder for Neutron's agent: {e}"))
}

impl Script {
    /// Writes these files (names and texts), runs the command in their folder and waits until this
    /// socket accepts connections.
    pub(super) fn start(
        folder: TempDir,
        files: &[(&str, &str)],
        mut command: Command,
        socket: &Path,
    ) -> Self {
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap_or_else(|e| panic!("write {name}: {e}"));
        }
        let log = File::create(folder.path().join(LOG)).unwrap_or_else(|e| panic!("create a log: {e}"));
        command.current_dir(folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        let mut script = Self { child, folder };
        let ready = wait::poll(START, || UnixStream::connect(socket).ok());
        assert!(
            ready.is_some(),
            "Neutron's agent does not listen ({:?}): {}",
            script.child.try_wait(),
            fs::read_to_string(script.folder.path().join(LOG)).unwrap_or_default()
        );
        script
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the ids of its process and of its workers.
    pub(super) fn processes(&self) -> Vec<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let workers = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        std::iter::once(pid).chain(workers).collect()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // The parent comes first, so that it does not replace the others.
        for pid in self.processes() {
            if let Err(e) = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL) {
                eprintln!("kill Neutron's agent: {e}");
            }
        }
        if let Err(e) = self.child.wait() {
            eprintln!("wait for Neutron's agent: {e}");
        }
    }
}
