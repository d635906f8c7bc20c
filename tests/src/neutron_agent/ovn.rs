//! The proxy of neutron-ovn-metadata-agent, as Debian packages it, before a Southbound database of OVN's own server.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::netns::Netns;
use crate::southbound::Southbound;
use crate::wait;

const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = include_str!("ovn.py");
/// It imports half of OpenStack.
const START: Duration = Duration::from_mins(1);

/// A running one, with its workers.
#[derive(Debug)]
pub struct OvnAgent {
    child: Child,
    folder: TempDir,
}

impl OvnAgent {
    /// Serves this socket in a namespace, as the agent of this chassis, and asks a Nova at this address.
    #[must_use]
    pub fn start(
        netns: &Netns,
        socket: &Path,
        (southbound, chassis): (&Southbound, &str),
        nova: SocketAddr,
        secret: &str,
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for Neutron's agent: {e}"));
        let path = |name: &str| folder.path().join(name);
        let config = format!(
            "[DEFAULT]\nstate_path = {}\nnova_metadata_host = {}\nnova_metadata_port = {}\n\
             metadata_proxy_shared_secret = {secret}\nmetadata_proxy_socket = {}\n\
             metadata_proxy_socket_mode = all\n[ovn]\novn_sb_connection = {}\n",
            folder.path().display(),
            nova.ip(),
            nova.port(),
            socket.display(),
            southbound.remotes()
        );
        for (name, text) in [("agent.py", SCRIPT), ("agent.ini", &config)] {
            fs::write(path(name), text).unwrap_or_else(|e| panic!("write {name}: {e}"));
        }
        let log = File::create(path("log")).unwrap_or_else(|e| panic!("make a log: {e}"));
        let mut command = netns.command(PYTHON);
        command.arg(path("agent.py")).arg(chassis).arg("--config-file").arg(path("agent.ini"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        let mut agent = Self { child, folder };
        let ready = wait::poll(START, || UnixStream::connect(socket).ok());
        assert!(
            ready.is_some(),
            "Neutron's agent does not listen ({:?}): {}",
            agent.child.try_wait(),
            fs::read_to_string(agent.folder.path().join("log")).unwrap_or_default()
        );
        agent
    }

    /// Its process and its workers.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let workers = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        std::iter::once(pid).chain(workers).collect()
    }
}

impl Drop for OvnAgent {
    fn drop(&mut self) {
        // The first is the parent, so nobody replaces the others.
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
