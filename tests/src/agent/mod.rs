//! The agent under test: its configuration, and processes of the real binary.
//!
//! An [`Agent`] is an installation on a [`Host`]: a configuration, an inventory and unique names.
//! It may run several processes, as during an upgrade. When the installation and all its processes
//! have been dropped, `detach` has run.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use serde_json::json;
use tempfile::TempDir;

use crate::netns;
use crate::nova::NovaStandIn;
use crate::port::Port;
use crate::topology::Host;

mod process;

pub use process::{AgentProcess, NotReady};

/// Returns the path of the agent's binary: `METADATA_AGENT_BIN`, or the one in cargo's target
/// directory.
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

/// Returns the name of the portal namespace of a host.
#[must_use]
pub fn portal_of(host: &str) -> String {
    format!("{host}-portal")
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
    environment: Vec<(String, String)>,
    pass_output: bool,
    is_placeholder: bool,
}

/// Builds an installation.
#[derive(Debug)]
pub struct Installer {
    host: Host,
    binary: Option<PathBuf>,
    portal: String,
    options: Vec<(String, String, String)>,
    ports: Vec<Port>,
    environment: Vec<(String, String)>,
    pass_output: bool,
}

impl Agent {
    /// Starts an installation on this host that forwards to this Nova.
    #[must_use]
    pub fn on(host: &Host, nova: &NovaStandIn) -> Installer {
        Self::forwarding_to(host, nova.address(), nova.secret())
    }

    /// Starts an installation on this host that forwards to a Nova at this address with this
    /// secret.
    #[must_use]
    pub fn forwarding_to(host: &Host, nova: SocketAddr, secret: &str) -> Installer {
        let portal = portal_of(host.netns().name());
        Installer {
            host: host.clone(),
            binary: None,
            portal,
            options: Vec::new(),
            ports: Vec::new(),
            environment: Vec::new(),
            pass_output: false,
        }
        .set("DEFAULT", "nova_metadata_host", &nova.ip().to_string())
        .set("DEFAULT", "nova_metadata_port", &nova.port().to_string())
        .set("DEFAULT", "metadata_proxy_shared_secret", secret)
    }

    /// Starts a process and waits until it is ready.
    #[must_use]
    pub fn start(&self) -> AgentProcess {
        let process = self.spawn(&[]);
        process.wait_ready();
        process
    }

    /// Starts a process with additional arguments, without waiting.
    #[must_use]
    pub fn spawn(&self, args: &[String]) -> AgentProcess {
        AgentProcess::spawn(Arc::clone(&self.installation), args)
    }

    #[must_use]
    pub fn portal(&self) -> &str {
        &self.installation.portal
    }

    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.installation.admin_socket()
    }

    /// Returns the folder in which its processes pin links and maps.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        self.installation.pins()
    }

    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.installation.path("metadata_agent.ini")
    }

    /// Returns the folder that the libvirt source watches. It is empty at first.
    #[must_use]
    pub fn libvirt_dir(&self) -> PathBuf {
        self.installation.path("libvirt")
    }

    /// Replaces the static inventory atomically.
    pub fn set_ports<'a>(&self, ports: impl IntoIterator<Item = &'a Port>) {
        let ports: Vec<&Port> = ports.into_iter().collect();
        let path = self.installation.inventory();
        let next = path.with_extension("next");
        write(&next, &json!({ "ports": ports }).to_string());
        fs::rename(&next, &path).unwrap_or_else(|e| panic!("replace {}: {e}", path.display()));
    }

    /// Runs a subcommand other than `run` to its end and returns its output, even if it fails.
    pub fn query(&self, subcommand: &str, args: &[&str]) -> Output {
        let mut command = self.installation.command(subcommand);
        command.args(args).output().unwrap_or_else(|e| panic!("run {command:?}: {e}"))
    }

    /// Runs `metadata-agent detach` to its end.
    pub fn detach(&self) {
        netns::output_of(&mut self.installation.command("detach"));
    }

    /// Builds a subcommand with this installation's configuration, in the host's namespace.
    #[must_use]
    pub fn command(&self, subcommand: &str) -> Command {
        self.installation.command(subcommand)
    }
}

impl Installer {
    /// Sets an option. A later value replaces an earlier one.
    #[must_use]
    pub fn set(mut self, group: &str, key: &str, value: &str) -> Self {
        self.options.push((group.to_owned(), key.to_owned(), value.to_owned()));
        self
    }

    /// Adds a port to the static inventory.
    #[must_use]
    pub fn port(mut self, port: &Port) -> Self {
        self.ports.push(port.clone());
        self
    }

    /// Attaches nothing in the host's own namespace: guests are served in these namespaces only.
    #[must_use]
    pub fn only_in(self, namespaces: &str) -> Self {
        self.set("metadata_agent", "guest_interfaces", "none*").set(
            "metadata_agent",
            "namespaces",
            namespaces,
        )
    }

    /// Sends no requests of the agent to itself, for tests that count every packet, program or
    /// system call.
    #[must_use]
    pub fn without_probes(self) -> Self {
        self.set("metadata_agent", "data_path_interval", "0")
    }

    /// Sets an environment variable of the agent.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Uses this binary instead of [`binary`].
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }

    /// Lets the agent write to the output of this process instead of capturing it.
    #[must_use]
    pub fn pass_output(mut self) -> Self {
        self.pass_output = true;
        self
    }

    /// Writes the configuration and the inventory.
    #[must_use]
    pub fn install(self) -> Agent {
        let Self { host, binary: given, portal, options, ports, environment, pass_output } = self;
        let folder = tempfile::Builder::new().prefix("agent-").tempdir_in(host.folder());
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for an agent: {e}"));
        let is_placeholder = given.is_some();
        let binary = given.unwrap_or_else(binary);
        let installation =
            Installation { host, binary, folder, portal, environment, pass_output, is_placeholder };
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

    fn pins(&self) -> PathBuf {
        self.host.bpffs().join("metadata")
    }

    fn config(&self, options: &[(String, String, String)]) -> String {
        let own = [
            ("static_inventory", self.inventory().display().to_string()),
            ("libvirt_dir", self.path("libvirt").display().to_string()),
            ("guest_interfaces", "tap*".to_owned()),
            ("guest_link_kinds", "tun,veth".to_owned()),
            ("portal_namespace", self.portal.clone()),
            ("bpffs_dir", self.pins().display().to_string()),
            ("admin_socket", self.admin_socket().display().to_string()),
        ];
        let own = own.iter().map(|(key, value)| ("metadata_agent", *key, value.as_str()));
        let given = options.iter().map(|(group, key, value)| (group.as_str(), key.as_str(), value.as_str()));
        own.chain(given).fold(String::new(), |mut text, (group, key, value)| {
            // A `$` would refer to another option.
            let written = write!(text, "[{group}]\n{key} = {}\n", value.replace('$', "$$"));
            written.unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
            text
        })
    }

    /// Builds a subcommand of the agent in the host's namespace and in its own process group. A
    /// signal from the terminal reaches only this process, which then stops the agent in order.
    fn command(&self, subcommand: &str) -> Command {
        let mut command = self.host.netns().command(&self.binary);
        command.arg(subcommand).arg("--config-file").arg(self.path("metadata_agent.ini"));
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        command.stdin(Stdio::null()).process_group(0);
        command
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        let fault = match self.command("detach").output() {
            Ok(output) if output.status.success() => return,
            Ok(output) => format!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr)),
            Err(e) => format!("run {}: {e}", self.binary.display()),
        };
        // Leftovers are a fault of the agent, unless a placeholder runs instead of it.
        assert!(self.is_placeholder || thread::panicking(), "detach: {fault}");
        eprintln!("detach: {fault}");
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
