//! One process of the agent, from its start to its end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use metadata_ebpf::reason::Reason;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use super::Installation;
use crate::http::{Connection, Response};
use crate::processes::{self, raw};
use crate::wait::{self, PATIENCE};

/// Reason why an agent does not become ready.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// The process has exited.
    #[error("the agent exited before it was ready: {status}")]
    Exited { status: ExitStatus },
    /// The process is still starting.
    #[error("the agent is not ready after {deadline:?}; it says {missing:?}")]
    Late {
        deadline: Duration,
        /// The last response of `/ready`.
        missing: String,
    },
}

/// A process of the agent. It is killed on drop.
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

    /// Waits until the agent reports that it is ready.
    pub fn wait_ready(&self) {
        if let Err(e) = self.ready_within(PATIENCE) {
            panic!("{e}\n{}", self.output());
        }
    }

    /// Waits until the agent reports that it is ready.
    ///
    /// # Errors
    /// Returns the reason why it is not ready.
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

    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Returns its data plane, which is a process of its own.
    #[must_use]
    pub fn data_plane(&self) -> u32 {
        self.running_data_plane().unwrap_or_else(|| panic!("no data plane\n{}", self.output()))
    }

    /// Returns its data plane, if there is one.
    #[must_use]
    pub fn running_data_plane(&self) -> Option<u32> {
        processes::children(self.pid()).into_iter().next()
    }

    /// Returns all of its processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        processes::with_children(self.pid())
    }

    /// Kills the data plane alone.
    pub fn kill_data_plane(&self) -> u32 {
        let pid = self.data_plane();
        kill(raw(pid), Signal::SIGKILL).unwrap_or_else(|e| panic!("kill the data plane: {e}"));
        pid
    }

    /// Returns its standard error up to now.
    #[must_use]
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns its exit status if it has exited.
    #[must_use]
    pub fn exited(&self) -> Option<ExitStatus> {
        self.child().try_wait().unwrap_or_else(|e| panic!("wait for the agent: {e}"))
    }

    /// Sends a request to the admin socket.
    ///
    /// # Errors
    /// Returns the error of the socket, for example if nothing listens yet.
    pub fn try_admin(&self, path: &str) -> io::Result<Response> {
        let stream = UnixStream::connect(self.installation.admin_socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Connection::new(stream).request("GET", path, &[("Connection", "close")], b"")
    }

    /// Sends a request to the admin socket.
    #[must_use]
    pub fn admin(&self, path: &str) -> Response {
        self.try_admin(path).unwrap_or_else(|e| panic!("admin {path}: {e}\n{}", self.output()))
    }

    /// Returns the state dump.
    #[must_use]
    pub fn state(&self) -> Value {
        let response = self.admin("/state");
        serde_json::from_slice(&response.body).unwrap_or_else(|e| {
            panic!("/state is not JSON: {e}\n{}", String::from_utf8_lossy(&response.body))
        })
    }

    /// Returns the metrics, as scraped.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.admin("/metrics").text().to_owned()
    }

    /// Returns one sample by its name with labels, or 0 if it has never changed.
    #[must_use]
    pub fn metric(&self, series: &str) -> f64 {
        let metrics = self.metrics();
        let sample = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        sample.map_or(0.0, |value| value.trim().parse().unwrap_or_else(|e| panic!("{series} = {value}: {e}")))
    }

    /// Returns a counter or gauge with an integer value, named as for [`Self::metric`].
    #[must_use]
    pub fn count(&self, series: &str) -> u64 {
        let metrics = self.metrics();
        let sample = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        sample.map_or(0, |value| value.trim().parse().unwrap_or_else(|e| panic!("{series} = {value}: {e}")))
    }

    /// Returns the number of packets that the programs counted for this reason.
    #[must_use]
    pub fn packets(&self, reason: Reason) -> u64 {
        self.count(&format!("metadata_packets_total{{reason=\"{}\"}}", reason.label()))
    }

    /// Returns the attachment ids by interface.
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

    /// Waits until exactly these interfaces are attached, and returns their ids.
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
        .unwrap_or_else(|| {
            panic!("attached interfaces are {found:?}, expected {wanted:?}\n{}", self.output())
        });
        found
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.raw_pid(), signal).unwrap_or_else(|e| panic!("send {signal} to the agent: {e}"));
    }

    /// Stops all of its processes, and waits until every thread has stopped. Until then one of them
    /// may still answer a guest.
    pub fn freeze(&self) {
        self.pids().into_iter().for_each(processes::stop);
    }

    /// Lets all of its processes go on.
    pub fn thaw(&self) {
        self.pids().into_iter().for_each(processes::go_on);
    }

    /// Stops its threads of this name until the result is dropped. The others go on. The main
    /// thread of the control process has the name of the program. Only the calling thread can let
    /// them go on.
    #[must_use]
    pub fn freeze_threads(&self, name: &str) -> FrozenThreads {
        let ids = self.pids().into_iter().flat_map(|pid| processes::threads(pid, name)).map(raw);
        let mut frozen = FrozenThreads { ids: Vec::new() };
        for id in ids {
            ptrace::seize(id, ptrace::Options::empty()).unwrap_or_else(|e| panic!("seize thread {id}: {e}"));
            frozen.ids.push(id);
            ptrace::interrupt(id).unwrap_or_else(|e| panic!("interrupt thread {id}: {e}"));
            let status = waitpid(id, Some(WaitPidFlag::__WALL));
            assert!(
                matches!(status, Ok(WaitStatus::PtraceEvent(..))),
                "thread {id} did not stop: {status:?}"
            );
        }
        assert!(!frozen.ids.is_empty(), "no thread {name:?}");
        frozen
    }

    /// Kills the control process with SIGKILL, and waits until its data plane has ended too.
    pub fn kill9(self) {
        self.end();
    }

    /// Stops it with SIGTERM and waits for its exit.
    pub fn stop(self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_exit(PATIENCE)
    }

    /// Waits for its exit.
    pub fn wait_exit(&self, deadline: Duration) -> ExitStatus {
        wait::poll(deadline, || self.exited())
            .unwrap_or_else(|| panic!("the agent still runs after {deadline:?}\n{}", self.output()))
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raw_pid(&self) -> Pid {
        raw(self.pid())
    }

    fn end(&self) {
        let data_planes = processes::children(self.pid());
        self.kill_control();
        for pid in data_planes {
            // It may be stopped, and would then not notice the end of its parent.
            processes::go_on(pid);
            wait::until("the data plane ends", PATIENCE, || (!processes::runs(pid)).then_some(()));
        }
    }

    fn kill_control(&self) {
        let mut child = self.child();
        // If it has already exited, there is nothing to kill, and `wait` returns its status.
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
            eprintln!("--- output of the agent\n{}", self.output());
        }
    }
}

/// Threads of an agent that do not run, as if they hung. They go on when this is dropped.
#[derive(Debug)]
pub struct FrozenThreads {
    ids: Vec<Pid>,
}

impl Drop for FrozenThreads {
    fn drop(&mut self) {
        for id in &self.ids {
            // It may have been killed meanwhile. Its process ends only once its tracer knows.
            if ptrace::detach(*id, None).is_err()
                && let Err(e) = waitpid(*id, Some(WaitPidFlag::__WALL))
            {
                eprintln!("wait for thread {id}: {e}");
            }
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
