//! A server that is killed with all its child processes.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::wait;

/// Limit for a server's start. Most servers load about a thousand Python modules.
const START: Duration = Duration::from_mins(4);
/// The number of log lines to show.
const LAST_LINES: usize = 40;

/// A running server in its own process group.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Runs the server and waits until it is ready.
    pub(super) fn start(
        name: &'static str,
        mut command: Command,
        log: PathBuf,
        mut ready: impl FnMut() -> bool,
    ) -> Self {
        let output = File::create(&log).unwrap_or_else(|e| panic!("make {}: {e}", log.display()));
        let errors = output.try_clone().unwrap_or_else(|e| panic!("share {}: {e}", log.display()));
        command.process_group(0).stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        let mut process = Self { name, log, child };
        let is_ready = wait::poll(START, || {
            let ended = process.child.try_wait().unwrap_or_else(|e| panic!("wait for {name}: {e}"));
            assert_eq!(ended, None, "{name} exited before it was ready");
            ready().then_some(())
        });
        assert!(is_ready.is_some(), "{name} is not ready after {START:?}");
        process
    }

    /// Returns the id of its first process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the ids of its first process and of the children.
    pub(super) fn with_children(&self) -> Vec<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|child| child.parse().ok());
        std::iter::once(pid).chain(children).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.child.id().cast_signed());
        match killpg(group, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => eprintln!("kill {}: {e}", self.name),
        }
        if let Err(e) = self.child.wait() {
            eprintln!("wait for {}: {e}", self.name);
        }
        if thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
            eprintln!("--- last output of {}\n{last}", self.name);
        }
    }
}
