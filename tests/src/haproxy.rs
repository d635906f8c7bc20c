//! The haproxy that Neutron's agents run for a network or a router: the real program with their
//! configuration.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use tempfile::TempDir;

use crate::gateway::Gateway;
use crate::netns::Netns;
use crate::topology::Network;
use crate::wait::{self, PATIENCE};

/// The user and the group it runs as.
pub const USER: &str = "nobody";
pub const GROUP: &str = "nogroup";

/// The Neutron agent that configures the haproxy. The lines are those of
/// neutron/agent/metadata/driver.py and neutron/agent/ovn/metadata/driver.py.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The DHCP agent, on a network.
    Dhcp,
    /// The L3 agent, in a router. Here the router has the id of its only network.
    Router,
    /// The OVN metadata agent, on a network.
    Ovn,
}

/// A running haproxy.
#[derive(Debug)]
pub struct Haproxy {
    child: Child,
    _folder: TempDir,
    gateway: Option<Gateway>,
}

impl Haproxy {
    /// Serves a network's metadata addresses and forwards to this socket.
    #[must_use]
    pub fn start(network: &Network, driver: Driver, socket: &Path) -> Self {
        let gateway = Gateway::plug(network);
        let id = network.id.to_string();
        let config = rendered(&id, &socket.display().to_string(), &driver.headers(&id));
        let mut haproxy = Self::serve(gateway.netns(), &config);
        haproxy.gateway = Some(gateway);
        haproxy
    }

    /// Serves port 80 of 169.254.169.254 in this namespace with this configuration. The namespace
    /// must have that address.
    #[must_use]
    pub fn serve(netns: &Netns, config: &str) -> Self {
        let mut haproxy = Self::spawn(netns, config);
        wait::until("haproxy listens", PATIENCE, || {
            let ended = haproxy.child.try_wait().unwrap_or_else(|e| panic!("wait for haproxy: {e}"));
            assert_eq!(ended, None, "haproxy exited before it listened");
            netns.enter(|| TcpStream::connect((Ipv4Addr::from(METADATA_IPV4), METADATA_PORT))).ok()
        });
        haproxy
    }

    /// Starts haproxy without waiting until it listens.
    #[must_use]
    pub fn spawn(netns: &Netns, config: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("haproxy-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for a haproxy: {e}"));
        let path = folder.path().join("haproxy.conf");
        fs::write(&path, config).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        // In the foreground, because a daemon would outlive a failed test.
        let mut command: Command = netns.command("/usr/sbin/haproxy");
        command
            .arg("-db")
            .arg("-f")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        Self { child, _folder: folder, gateway: None }
    }

    /// Returns its plug into a network, if [`Self::start`] created one.
    #[must_use]
    pub fn gateway(&self) -> Option<&Gateway> {
        self.gateway.as_ref()
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        if let Err(e) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("kill haproxy: {e}");
        }
    }
}

impl Driver {
    /// Returns the lines that identify the network or router of the requests.
    fn headers(self, id: &str) -> String {
        match self {
            Self::Dhcp => format!(
                "http-request del-header X-Neutron-Router-ID\n    http-request set-header X-Neutron-Network-ID {id}"
            ),
            Self::Router => format!(
                "http-request del-header X-Neutron-Network-ID\n    http-request set-header X-Neutron-Router-ID {id}"
            ),
            Self::Ovn => format!("http-request add-header X-OVN-Network-ID {id}"),
        }
    }
}

/// Renders the configuration for a network or router, with the server to forward to and the header
/// lines.
#[must_use]
pub fn rendered(id: &str, server: &str, headers: &str) -> String {
    format!(
        "
global
    log         /dev/log local0 info
    log-tag     haproxy-metadata-proxy-{id}
    user        {USER}
    group       {GROUP}
    maxconn     1024
    nbthread    2
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
    server metadata {server}
    {headers}
"
    )
}
