//! The agent under test: its configuration, and processes of the real binary.
//!
//! An [`Agent`] is an installation on a [`Host`]: configuration, inventory, names that nobody else has. It may run
//! several processes, as an upgrade does. When the installation and all its processes are gone, `detach` has run.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http::{Connection, Response};
use crate::netns;
use crate::nova::NovaStandIn;
use crate::port::Port;
use crate::topology::Host;
use crate::wait::{self, PATIENCE};

/// Where the agent's binary is: `METADATA_AGENT_BIN`, or beside what cargo has built this test into.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("METADATA_AGENT_BIN") {
        return path.into();
    }
    let this = std::env::current_exe().unwrap_or_else(|e| panic!("path of this executable: {e}"));
    let found =
        this.ancestors().skip(1).take(2).map(|folder| folder.join("metadata-agent")).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("no metadata-agent beside {}; set METADATA_AGENT_BIN", this.display()))
}

/// An installation of the agent on a host.
#[derive(Clone, Debug)]
pub struct Agent {
    installation: Arc<Installation>,
}

#[derive(Debug)]
struct Installation {
    host: Host,
    binary: PathBuf,
    folder: TempDir,
    portal: String,
    pass_output: bool,
}

/// What to install.
#[derive(Debug)]
pub struct Installer {
    host: Host,
    binary: Option<PathBuf>,
    portal: String,
    options: Vec<(String, String, String)>,
    ports: Vec<Port>,
    pass_output: bool,
}

impl Agent {
    /// An installation on this host that asks this Nova.
    #[must_use]
    pub fn on(host: &Host, nova: &NovaStandIn) -> Installer {
        let portal = format!("{}-portal", host.netns().name());
        Installer {
            host: host.clone(),
            binary: None,
            portal,
            options: Vec::new(),
            ports: Vec::new(),
            pass_output: false,
        }
        .set("DEFAULT", "nova_metadata_host", &nova.address().ip().to_string())
        .set("DEFAULT", "nova_metadata_port", &nova.address().port().to_string())
        .set("DEFAULT", "metadata_proxy_shared_secret", nova.secret())
    }

    /// Starts a process and waits until it is ready.
    #[must_use]
    pub fn start(&self) -> AgentProcess {
        let process = self.spawn(&[]);
        process.wait_ready();
        process
    }

    /// Starts a process with more arguments, and does not wait.
    #[must_use]
    pub fn spawn(&self, args: &[String]) -> AgentProcess {
        AgentProcess::spawn(Arc::clone(&self.installation), args)
    }

    /// The name of the portal's namespace.
    #[must_use]
    pub fn portal(&self) -> &str {
        &self.installation.portal
    }

    /// The admin socket.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.installation.admin_socket()
    }

    /// The configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.installation.path("metadata_agent.ini")
    }

    /// The folder that the libvirt source watches, empty at first.
    #[must_use]
    pub fn libvirt_dir(&self) -> PathBuf {
        self.installation.path("libvirt")
    }

    /// Replaces the static inventory at once.
    pub fn set_ports<'a>(&self, ports: impl IntoIterator<Item = &'a Port>) {
        let ports: Vec<&Port> = ports.into_iter().collect();
        let path = self.installation.inventory();
        let next = path.with_extension("next");
        write(&next, &json!({ "ports": ports }).to_string());
        fs::rename(&next, &path).unwrap_or_else(|e| panic!("replace {}: {e}", path.display()));
    }

    /// Runs `metadata-agent detach` to its end.
    pub fn detach(&self) {
        netns::output_of(&mut self.installation.command("detach"));
    }
}

impl Installer {
    /// Sets an option; the last word on it counts.
    #[must_use]
    pub fn set(mut self, group: &str, key: &str, value: &str) -> Self {
        self.options.push((group.to_owned(), key.to_owned(), value.to_owned()));
        self
    }

    /// Puts a port into the static inventory.
    #[must_use]
    pub fn port(mut self, port: &Port) -> Self {
        self.ports.push(port.clone());
        self
    }

    /// Takes this binary instead of [`binary`].
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }

    /// Lets the agent write to this process's own output instead of keeping what it says.
    #[must_use]
    pub fn pass_output(mut self) -> Self {
        self.pass_output = true;
        self
    }

    /// Writes everything down.
    #[must_use]
    pub fn install(self) -> Agent {
        let Self { host, binary: given, portal, options, ports, pass_output } = self;
        let folder = tempfile::Builder::new().prefix("agent-").tempdir_in(host.folder());
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for an agent: {e}"));
        let binary = given.unwrap_or_else(binary);
        let installation = Installation { host, binary, folder, portal, pass_output };
        let libvirt = installation.path("libvirt");
        fs::create_dir(&libvirt).unwrap_or_else(|e| panic!("make {}: {e}", libvirt.display()));
        write(&installation.path("metadata_agent.ini"), &installation.config(&options));
        let agent = Agent { installation: Arc::new(installation) };
        agent.set_ports(&ports);
        agent
    }
}

impl Installation {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn inventory(&self) -> PathBuf {
        self.path("inventory.json")
    }

    fn admin_socket(&self) -> PathBuf {
        self.path("admin.sock")
    }

    fn config(&self, options: &[(String, String, String)]) -> String {
        let own = [
            ("static_inventory", self.inventory().display().to_string()),
            ("libvirt_dir", self.path("libvirt").display().to_string()),
            ("guest_interfaces", "tap*".to_owned()),
            ("guest_link_kinds", "tun,veth".to_owned()),
            ("portal_namespace", self.portal.clone()),
            ("bpffs_dir", self.host.bpffs().join("metadata").display().to_string()),
            ("admin_socket", self.admin_socket().display().to_string()),
        ];
        let own = own.iter().map(|(key, value)| ("metadata_agent", *key, value.as_str()));
        let given = options.iter().map(|(group, key, value)| (group.as_str(), key.as_str(), value.as_str()));
        own.chain(given).fold(String::new(), |mut text, (group, key, value)| {
            // A `$` would be a reference to another option.
            let written = write!(text, "[{group}]\n{key} = {}\n", value.replace('$', "$$"));
            written.unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
            text
        })
    }

    /// A subcommand of the agent, in the host's namespace and a process group of its own: what a terminal sends to
    /// the foreground is for us, who then stop it in order.
    fn command(&self, subcommand: &str) -> Command {
        let mut command = self.host.netns().command(&self.binary);
        command.arg(subcommand).arg("--config-file").arg(self.path("metadata_agent.ini"));
        command.stdin(Stdio::null()).process_group(0);
        command
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        match self.command("detach").output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!("detach: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)),
            Err(e) => eprintln!("detach: run {}: {e}", self.binary.display()),
        }
    }
}

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
    fn spawn(installation: Arc<Installation>, args: &[String]) -> Self {
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

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
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

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
