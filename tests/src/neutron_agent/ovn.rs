//! The proxy of neutron-ovn-metadata-agent, as Debian packages it or of today, before a Southbound database of OVN's own server.

use std::fs::{self, File, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::netns::Netns;
use crate::python;
use crate::southbound::Southbound;
use crate::wait;

const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = include_str!("ovn.py");
const SCRIPT_OF_TODAY: &str = include_str!("ovn_current.py");
const NEUTRON_OF_TODAY: &str = "neutron==29.0.0";
/// It imports half of OpenStack.
const START: Duration = Duration::from_mins(3);

/// Which one.
#[derive(Clone, Debug)]
pub enum OvnRelease {
    /// Debian's, Neutron 21.
    Debian,
    /// Neutron 29, in this virtual environment.
    Current {
        /// Where it is installed.
        environment: PathBuf,
        /// `metadata_workers`, where it is not left to the agent: none, so that one request is answered at a time.
        workers: Option<usize>,
    },
}

impl OvnRelease {
    /// Neutron 29, which is installed the first time that it is asked for.
    ///
    /// # Errors
    /// Why it cannot be installed.
    pub fn current(workers: Option<usize>) -> Result<Self, String> {
        python::environment(PYTHON, NEUTRON_OF_TODAY)
            .map(|environment| Self::Current { environment, workers })
    }
}

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
        release: &OvnRelease,
        netns: &Netns,
        socket: &Path,
        (southbound, chassis): (&Southbound, &str),
        nova: SocketAddr,
        secret: &str,
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for Neutron's agent: {e}"));
        let path = |name: &str| folder.path().join(name);
        let (python, script, workers) = match release {
            OvnRelease::Debian => (PathBuf::from(PYTHON), SCRIPT, None),
            OvnRelease::Current { environment, workers } => {
                (environment.join("bin/python"), SCRIPT_OF_TODAY, *workers)
            }
        };
        let workers = workers.map_or_else(String::new, |workers| format!("metadata_workers = {workers}\n"));
        let config = format!(
            "[DEFAULT]\nstate_path = {}\nnova_metadata_host = {}\nnova_metadata_port = {}\n\
             metadata_proxy_shared_secret = {secret}\nmetadata_proxy_socket = {}\n\
             metadata_proxy_socket_mode = all\n{workers}[ovn]\novn_sb_connection = {}\n",
            folder.path().display(),
            nova.ip(),
            nova.port(),
            socket.display(),
            southbound.remotes()
        );
        for (name, text) in [("agent.py", script), ("agent.ini", &config)] {
            fs::write(path(name), text).unwrap_or_else(|e| panic!("write {name}: {e}"));
        }
        let log = File::create(path("log")).unwrap_or_else(|e| panic!("make a log: {e}"));
        let mut command = netns.command(python);
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
        // Today's does not heed `metadata_proxy_socket_mode`.
        fs::set_permissions(socket, Permissions::from_mode(0o666))
            .unwrap_or_else(|e| panic!("open {} to all: {e}", socket.display()));
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
