//! `neutron-agent (RPC replaced)`: a haproxy per network, and Neutron's own metadata agent behind
//! its socket. Its queries to neutron-server are answered from memory, without the cost of a
//! message bus and a database.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use metadata_tests::haproxy::Driver;
use metadata_tests::neutron_agent::OriginalAgent;
use metadata_tests::nova::SECRET;
use metadata_tests::processes;
use metadata_tests::{Guest, Haproxy, Host};
use tempfile::TempDir;

use super::super::upstream::Upstream;
use super::haproxy::plug;
use super::{Caller, Crowd, Peer};

/// Fields are in drop order.
pub struct Original {
    haproxies: Vec<Haproxy>,
    agent: OriginalAgent,
    guests: Vec<Guest>,
    _folder: TempDir,
    _host: Host,
}

impl Original {
    pub fn start(upstream: &Upstream, crowd: Crowd) -> anyhow::Result<Self> {
        let host = Host::new();
        let server = upstream.cable(host.netns());
        let (networks, guests) = plug(&host, crowd);
        upstream.introduce(networks.iter().map(|network| network.id), guests.iter().map(|guest| &guest.port));
        // haproxy runs as nobody and must reach the socket.
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir()?;
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        let socket = folder.path().join("metadata_proxy");
        let ports = guests.iter().map(|guest| &guest.port);
        let agent = OriginalAgent::forwarding_to(host.netns(), &socket, ports, server, SECRET);
        let haproxies =
            networks.iter().map(|network| Haproxy::start(network, Driver::Dhcp, &socket)).collect();
        Ok(Self { haproxies, agent, guests, _folder: folder, _host: host })
    }
}

impl Peer for Original {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(Caller::of).collect()
    }

    fn processes(&self) -> Vec<u32> {
        let mut all = processes::with_children(self.agent.pid());
        all.extend(self.haproxies.iter().map(Haproxy::pid));
        all
    }
}
