//! Neutron's own metadata agent, as Debian packages it: its handler, its server and its way to ask Nova. Only neutron-server,
//! which it asks for ports, is replaced.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::netns::Netns;
use crate::nova::NovaStandIn;
use crate::port::Port;
use crate::wait;

/// Debian's, whose packages the agent is one of.
const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = include_str!("original.py");
/// It imports half of OpenStack.
const START: Duration = Duration::from_mins(3);

/// A running metadata agent of Neutron's.
#[derive(Debug)]
pub struct OriginalAgent {
    child: Child,
    folder: TempDir,
}

impl OriginalAgent {
    /// Serves this socket in a namespace, knowing these ports, and asks this Nova.
    #[must_use]
    pub fn start<'a>(
        netns: &Netns,
        socket: &Path,
        ports: impl IntoIterator<Item = &'a Port>,
        nova: &NovaStandIn,
    ) -> Self {
        Self::asking(netns, socket, ports, nova.address(), nova.secret())
    }

    /// The same, with a Nova at this address that shares this secret.
    #[must_use]
    pub fn asking<'a>(
        netns: &Netns,
        socket: &Path,
        ports: impl IntoIterator<Item = &'a Port>,
        nova: SocketAddr,
        secret: &str,
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for Neutron's agent: {e}"));
        let path = |name: &str| folder.path().join(name);
        let ports: Vec<_> = ports.into_iter().map(as_neutron_has_it).collect();
        let config = format!(
            "[DEFAULT]\ntransport_url = fake:/\nnova_metadata_host = {}\nnova_metadata_port = {}\n\
             metadata_proxy_shared_secret = {}\n",
            nova.ip(),
            nova.port(),
            secret
        );
        let files = [("agent.py", SCRIPT), ("agent.ini", &config), ("ports.json", &json!(ports).to_string())];
        for (name, text) in files {
            fs::write(path(name), text).unwrap_or_else(|e| panic!("write {name}: {e}"));
        }
        let log = File::create(path("log")).unwrap_or_else(|e| panic!("make a log: {e}"));
        let mut command = netns.command(PYTHON);
        command.arg(path("agent.py")).arg(socket).arg(path("ports.json")).arg(path("agent.ini"));
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
}

impl OriginalAgent {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for OriginalAgent {
    fn drop(&mut self) {
        if let Err(e) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("kill Neutron's agent: {e}");
        }
    }
}

fn as_neutron_has_it(port: &Port) -> serde_json::Value {
    json!({
        "id": port.id,
        "network_id": port.network,
        "mac_address": port.mac,
        "fixed_ips": port.fixed_ips.iter().map(|ip| json!({ "ip_address": ip })).collect::<Vec<_>>(),
        "device_id": port.instance,
        "tenant_id": port.project,
    })
}
