//! The proxy of neutron-ovn-metadata-agent, as Debian packages it or from current Neutron, with a
//! Southbound database served by OVN's own server.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::script::{self, PYTHON, Script};
use crate::netns::Netns;
use crate::python;
use crate::southbound::Southbound;

const SCRIPT: &str = include_str!("ovn.py");
const SCRIPT_OF_TODAY: &str = include_str!("ovn_current.py");
const NEUTRON_OF_TODAY: &str = "neutron==29.0.0";

/// A release of the agent.
#[derive(Clone, Debug)]
pub enum OvnRelease {
    /// Neutron 21, as packaged by Debian.
    Debian,
    /// Neutron 29, installed in this virtual environment.
    Current {
        environment: PathBuf,
        /// `metadata_workers`. If unset, the agent has no workers and handles one request at a
        /// time.
        workers: Option<usize>,
    },
}

impl OvnRelease {
    /// Returns Neutron 29, which is installed by the first call.
    ///
    /// # Errors
    /// Returns the reason why it cannot be installed.
    pub fn current(workers: Option<usize>) -> Result<Self, String> {
        python::environment(PYTHON, NEUTRON_OF_TODAY)
            .map(|environment| Self::Current { environment, workers })
    }
}

/// A running agent with its workers.
#[derive(Debug)]
pub struct OvnAgent {
    script: Script,
}

impl OvnAgent {
    /// Serves this socket in a namespace as the agent of this chassis, and forwards to a Nova at
    /// this address.
    #[must_use]
    pub fn start(
        release: &OvnRelease,
        netns: &Netns,
        socket: &Path,
        (southbound, chassis): (&Southbound, &str),
        nova: SocketAddr,
        secret: &str,
    ) -> Self {
        let folder = script::folder();
        let (python, code, workers) = match release {
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
        let mut command = netns.command(python);
        command.args(["agent.py", chassis, "--config-file", "agent.ini"]);
        let files = [("agent.py", code), ("agent.ini", &config)];
        let script = Script::start(folder, &files, command, socket);
        // The current release ignores `metadata_proxy_socket_mode`.
        fs::set_permissions(socket, Permissions::from_mode(0o666))
            .unwrap_or_else(|e| panic!("open {} to all: {e}", socket.display()));
        Self { script }
    }

    /// Returns the ids of its process and of its workers.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.script.processes()
    }
}
