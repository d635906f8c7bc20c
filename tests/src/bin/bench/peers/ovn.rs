//! `ovn`: a haproxy per network, and behind its socket the proxy of neutron-ovn-metadata-agent and
//! a Southbound database served by OVN's own server. Debian's package (Neutron 21) has its default
//! number of workers. Current Neutron (29) handles one request at a time by default.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use metadata_tests::haproxy::Driver;
use metadata_tests::neutron_agent::{OvnAgent, OvnRelease};
use metadata_tests::nova::SECRET;
use metadata_tests::{Guest, Haproxy, Host, Southbound};
use tempfile::TempDir;

use super::super::upstream::Upstream;
use super::haproxy::plug;
use super::{Caller, Crowd, Peer};

const CHASSIS: &str = "hypervisor";

/// Fields are in drop order.
pub struct Ovn {
    haproxies: Vec<Haproxy>,
    agent: OvnAgent,
    _southbound: Southbound,
    guests: Vec<Guest>,
    _folder: TempDir,
    _host: Host,
}

impl Ovn {
    pub fn start(upstream: &Upstream, crowd: Crowd, release: &OvnRelease) -> anyhow::Result<Self> {
        let host = Host::new();
        let server = upstream.cable(host.netns());
        let (networks, guests) = plug(&host, crowd);
        upstream.introduce(networks.iter().map(|network| network.id), guests.iter().map(|guest| &guest.port));
        let southbound = Southbound::start();
        let chassis = southbound.add_chassis(CHASSIS);
        for network in &networks {
            let on_it = guests.iter().map(|guest| &guest.port).filter(|port| port.network == network.id);
            southbound.bind_at(&chassis, network.id, &on_it.collect::<Vec<_>>());
        }
        // haproxy runs as nobody and must reach the socket.
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir()?;
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        let socket = folder.path().join("metadata_proxy");
        let agent = OvnAgent::start(release, host.netns(), &socket, (&southbound, CHASSIS), server, SECRET);
        let haproxies =
            networks.iter().map(|network| Haproxy::start(network, Driver::Ovn, &socket)).collect();
        Ok(Self { haproxies, agent, _southbound: southbound, guests, _folder: folder, _host: host })
    }
}

impl Peer for Ovn {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(Caller::of).collect()
    }

    fn processes(&self) -> Vec<u32> {
        let mut all = self.agent.processes();
        all.extend(self.haproxies.iter().map(Haproxy::pid));
        all
    }
}
