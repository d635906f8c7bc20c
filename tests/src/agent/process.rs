//! One process of the agent, from its start to its end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use metadata_ebpf::reason::Reason;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::Installation;
use crate::http::{Connection, Response};
use crate::wait::{self, PATIENCE};

/// Why an agent cannot be asked anything.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// It is no more.
    #[error("the agent ended before it was ready: {status}")]
    Exited {
        /// How it ended.
        status: ExitStatus,
    },
    /// It is still starting.
    #[error("the agent is not ready after {deadline:?}; it says {missing:?}")]
    Late {
        /// How long it was given.
        deadline: Duration,
        /// What `/ready` said last.
        missing: String,
    },
}

/// A process of the agent. Dropping it kills it.
#[derive(Debug)]
pub struct AgentProcess {
    child: Mutex<Child>,
    output: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    installation: Arc<Installation>,
}

impl AgentProcess {
    pub(super) fn spawn(installation: Arc<Installation>, args: &[String]) -> Self {
        let mut command = installation.command("run");
        command.args(args);
        if !installation.pass_output {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        let mut child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        let output = Arc::new(Mutex::new(String::new()));
        let reader = child.stderr.take().map(|stderr| {
            let output = Arc::clone(&output);
            thread::spawn(move || collect(stderr, &output))
        });
        Self { child: Mutex::new(child), output, reader, installation }
    }

    /// Waits until the agent says that it is ready.
    pub fn wait_ready(&self) {
        if let Err(e) = self.ready_within(PATIENCE) {
            panic!("{e}\n{}", self.output());
        }
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// Why it is not.
    pub fn ready_within(&self, deadline: Duration) -> Result<(), NotReady> {
        let mut missing = String::new();
        let end = wait::poll(deadline, || {
            if let Some(status) = self.exited() {
                return Some(Err(NotReady::Exited { status }));
            }
            let response = self.try_admin("/ready").ok()?;
            missing = String::from_utf8_lossy(&response.body).into_owned();
            (response.status == 200).then_some(Ok(()))
        });
        end.unwrap_or(Err(NotReady::Late { deadline, missing }))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn exited(&self) -> Option<ExitStatus> {
        self.child().try_wait().unwrap_or_else(|e| panic!("wait for the agent: {e}"))
    }

    /// Asks the admin socket.
    ///
    /// # Errors
    /// What the socket says; nobody may be listening yet.
    pub fn try_admin(&self, path: &str) -> io::Result<Response> {
        let stream = UnixStream::connect(self.installation.admin_socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Connection::new(stream).request("GET", path, &[("Connection", "close")], b"")
    }

    /// Asks the admin socket.
    #[must_use]
    pub fn admin(&self, path: &str) -> Response {
        self.try_admin(path).unwrap_or_else(|e| panic!("admin {path}: {e}\n{}", self.output()))
    }

    /// The state dump.
    #[must_use]
    pub fn state(&self) -> Value {
        let response = self.admin("/state");
        serde_json::from_slice(&response.body)
            .unwrap_or_else(|e| panic!("/state is no JSON: {e}\n{}", String::from_utf8_lossy(&response.body)))
    }

    /// The metrics, as scraped.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.admin("/metrics").text().to_owned()
    }

    /// One sample of the metrics, by its name with labels as written; 0 while it has never moved.
    #[must_use]
    pub fn metric(&self, series: &str) -> f64 {
        let metrics = self.metrics();
        let sample = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        sample.map_or(0.0, |value| value.trim().parse().unwrap_or_else(|e| panic!("{series} = {value}: {e}")))
    }

    /// One counter or gauge of whole numbers, named as for [`Self::metric`].
    #[must_use]
    pub fn count(&self, series: &str) -> u64 {
        let metrics = self.metrics();
        let sample = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        sample.map_or(0, |value| value.trim().parse().unwrap_or_else(|e| panic!("{series} = {value}: {e}")))
    }

    /// What the programs counted for this reason.
    #[must_use]
    pub fn packets(&self, reason: Reason) -> u64 {
        self.count(&format!("metadata_packets_total{{reason=\"{}\"}}", reason.label()))
    }

    /// The ids of the attachments, by interface.
    #[must_use]
    pub fn attachments(&self) -> BTreeMap<String, u64> {
        let state = self.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        let entry = |attachment: &Value| {
            let interface = attachment["interface"].as_str()?.to_owned();
            Some((interface, attachment["attachment"].as_u64()?))
        };
        attachments
            .iter()
            .map(|attachment| entry(attachment).unwrap_or_else(|| panic!("no attachment: {attachment}")))
            .collect()
    }

    /// Waits until the interfaces attached are exactly these, and returns their ids.
    pub fn wait_for_attachments<'a>(
        &self,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> BTreeMap<String, u64> {
        let wanted: BTreeSet<&str> = interfaces.into_iter().collect();
        let mut found = BTreeMap::new();
        wait::poll(PATIENCE, || {
            found = self.attachments();
            found.keys().map(String::as_str).eq(wanted.iter().copied()).then_some(())
        })
        .unwrap_or_else(|| panic!("attached should be {wanted:?} and are {found:?}\n{}", self.output()));
        found
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.raw_pid(), signal).unwrap_or_else(|e| panic!("send {signal} to the agent: {e}"));
    }

    /// Kills it without notice and waits for its end.
    pub fn kill9(self) {
        self.end();
    }

    /// Asks it to stop and waits for its end.
    pub fn stop(self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_exit(PATIENCE)
    }

    /// Waits for its end.
    pub fn wait_exit(&self, deadline: Duration) -> ExitStatus {
        wait::poll(deadline, || self.exited())
            .unwrap_or_else(|| panic!("the agent still runs after {deadline:?}\n{}", self.output()))
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raw_pid(&self) -> Pid {
        let pid = self.pid();
        Pid::from_raw(pid.try_into().unwrap_or_else(|_| unreachable!("process id {pid}")))
    }

    fn end(&self) {
        let mut child = self.child();
        // It may have ended by itself; then there is nothing to kill, and wait tells how it went.
        if let Err(e) = child.kill().and_then(|()| child.wait()) {
            eprintln!("kill the agent: {e}");
        }
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        self.end();
        if self.reader.take().is_some_and(|reader| reader.join().is_err()) {
            eprintln!("reading the agent's output failed");
        }
        if thread::panicking() {
            eprintln!("--- the agent said\n{}", self.output());
        }
    }
}

fn collect(stderr: impl Read, output: &Mutex<String>) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    while stderr.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        output.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&line));
        line.clear();
    }
}
