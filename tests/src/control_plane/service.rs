//! A server with several processes and a log, which is killed as a whole.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::http::Connection;
use crate::topology::Host;
use crate::wait;

/// Limit for a server's start. Both load about a thousand Python modules, which takes fifteen
/// seconds on two idle processors.
const START: Duration = Duration::from_mins(4);

/// A server and its process, if it runs.
#[derive(Debug)]
pub(super) struct Service {
    name: &'static str,
    host: Host,
    address: (IpAddr, u16),
    log: PathBuf,
    child: Option<Child>,
}

impl Service {
    /// Describes a server that is not running yet.
    pub(super) fn new(name: &'static str, host: &Host, address: (IpAddr, u16), log: PathBuf) -> Self {
        Self { name, host: host.clone(), address, log, child: None }
    }

    /// Runs it in its own process group and waits until it responds.
    pub(super) fn start(&mut self, mut command: Command) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.unwrap_or_else(|e| panic!("open {}: {e}", self.log.display()));
        let other = log.try_clone().unwrap_or_else(|e| panic!("share {}: {e}", self.log.display()));
        command.process_group(0).stdin(Stdio::null()).stdout(log).stderr(other);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        let answered = wait::poll(START, || {
            let ended = child.try_wait().unwrap_or_else(|e| panic!("look at {}: {e}", self.name));
            assert!(ended.is_none(), "{} ended: {ended:?}\n{}", self.name, self.log());
            self.answers().then_some(())
        });
        self.child = Some(child);
        assert!(answered.is_some(), "{} does not respond\n{}", self.name, self.log());
    }

    /// Kills all its processes.
    pub(super) fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let group = Pid::from_raw(child.id().cast_signed());
        if let Err(e) = killpg(group, Signal::SIGKILL) {
            eprintln!("kill {}: {e}", self.name);
        }
        if let Err(e) = child.wait() {
            eprintln!("wait for {}: {e}", self.name);
        }
        let refused = wait::poll(wait::PATIENCE, || (!self.answers()).then_some(()));
        assert!(refused.is_some() || thread::panicking(), "{} still responds after it was killed", self.name);
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn answers(&self) -> bool {
        let asked = self.host.netns().enter(|| {
            let stream = TcpStream::connect_timeout(&SocketAddr::from(self.address), START)?;
            stream.set_read_timeout(Some(START))?;
            Connection::new(stream).request("GET", "/", &[("Connection", "close")], b"")
        });
        asked.is_ok()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().filter(|line| !line.contains(" DEBUG ")).collect();
            eprintln!(
                "--- last output of {}\n{}",
                self.name,
                lines[lines.len().saturating_sub(40)..].join("\n")
            );
        }
    }
}
