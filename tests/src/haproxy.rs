//! The haproxy that Neutron's agents run for a network or a router: the real program, with the configuration that they render.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use tempfile::TempDir;

use crate::gateway::Gateway;
use crate::topology::Network;
use crate::wait::{self, PATIENCE};

/// As whom it runs.
pub const USER: &str = "nobody";
const GROUP: &str = "nogroup";

/// Whose haproxy it is. The lines are those of neutron/agent/metadata/driver.py and neutron/agent/ovn/metadata/driver.py.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The DHCP agent's, on a network.
    Dhcp,
    /// The L3 agent's, in a router, which here has the id of its one network.
    Router,
    /// OVN's, on a network.
    Ovn,
}

/// A running haproxy.
#[derive(Debug)]
pub struct Haproxy {
    child: Child,
    _folder: TempDir,
    _gateway: Gateway,
}

impl Haproxy {
    /// Serves a network's metadata addresses from this socket.
    #[must_use]
    pub fn start(network: &Network, driver: Driver, socket: &Path) -> Self {
        let gateway = Gateway::plug(network);
        let folder = tempfile::Builder::new().prefix("haproxy-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for a haproxy: {e}"));
        let path = folder.path().join(format!("{}.conf", network.id));
        fs::write(&path, rendered(&network.id.to_string(), driver, socket, folder.path()))
            .unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        // In the foreground: a daemon would outlive a test that fails.
        let mut command: Command = gateway.netns().command("haproxy");
        command.arg("-db").arg("-f").arg(&path).stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        wait::until("haproxy listens", PATIENCE, || {
            let connected = gateway.netns().enter(|| {
                std::net::TcpStream::connect((std::net::Ipv4Addr::from(METADATA_IPV4), METADATA_PORT))
            });
            connected.ok()
        });
        Self { child, _folder: folder, _gateway: gateway }
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        if let Err(e) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("kill haproxy: {e}");
        }
    }
}

fn rendered(id: &str, driver: Driver, socket: &Path, folder: &Path) -> String {
    let headers = match driver {
        Driver::Dhcp => format!(
            "http-request del-header X-Neutron-Router-ID\n    http-request set-header X-Neutron-Network-ID {id}"
        ),
        Driver::Router => format!(
            "http-request del-header X-Neutron-Network-ID\n    http-request set-header X-Neutron-Router-ID {id}"
        ),
        Driver::Ovn => format!("http-request add-header X-OVN-Network-ID {id}"),
    };
    format!(
        "
global
    log         /dev/log local0 info
    log-tag     haproxy-metadata-proxy-{id}
    user        {USER}
    group       {GROUP}
    maxconn     1024
    pidfile     {pidfile}
    daemon

defaults
    log global
    mode http
    option httplog
    option dontlognull
    option http-server-close
    option forwardfor
    retries                 3
    timeout http-request    30s
    timeout connect         30s
    timeout client          32s
    timeout server          32s
    timeout http-keep-alive 30s

listen listener
    bind 169.254.169.254:80
    bind fe80::a9fe:a9fe:80 interface eth0
    server metadata {socket}
    {headers}
",
        pidfile = folder.join("pid").display(),
        socket = socket.display(),
    )
}
