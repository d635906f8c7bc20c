//! `legacy`: haproxy for each network, and Neutron's own metadata agent behind its socket, which asks neutron-server by RabbitMQ whose
//! each request is: once where haproxy names the network, twice where it names a router.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::thread;

use anyhow::ensure;
use metadata_tests::haproxy::Driver;
use metadata_tests::nova::SECRET;
use metadata_tests::openstack::{MetadataAgent, MetadataAgentOptions};
use metadata_tests::{Guest, Haproxy, Host};
use tempfile::TempDir;

use super::super::upstream::Upstream;
use super::haproxy::plug;
use super::{Caller, Crowd, Peer};

/// How it is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variant {
    /// The haproxies are those of routers.
    pub router: bool,
    /// One worker for each core.
    pub all_cores: bool,
    /// The agent's cache, as it was before it was off by default.
    pub cache: bool,
}

/// In the order they go.
pub struct Legacy {
    haproxies: Vec<Haproxy>,
    agent: MetadataAgent,
    servers: Vec<u32>,
    guests: Vec<Guest>,
    _folder: TempDir,
    _host: Host,
}

impl Legacy {
    pub fn start(upstream: &Upstream, crowd: Crowd, variant: Variant) -> anyhow::Result<Self> {
        let host = Host::new();
        let server = upstream.cable(host.netns());
        let (networks, guests) = plug(&host, crowd);
        let openstack = upstream.openstack()?;
        openstack.add(networks.iter().map(|network| network.id), guests.iter().map(|guest| &guest.port));
        // Haproxy is nobody's, and must reach the socket.
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir()?;
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        let socket = folder.path().join("metadata_proxy");
        let workers = variant.all_cores.then(thread::available_parallelism).transpose()?;
        let options = MetadataAgentOptions { workers: workers.map(Into::into), cache: variant.cache };
        let agent = MetadataAgent::start(host.netns(), &socket, server, SECRET, options);
        let driver = if variant.router { Driver::Router } else { Driver::Dhcp };
        let haproxies = networks.iter().map(|network| Haproxy::start(network, driver, &socket)).collect();
        let answer = guests[0].get("/openstack");
        ensure!(answer.status == 200, "the first guest gets {}", answer.status_line);
        Ok(Self {
            haproxies,
            agent,
            servers: openstack.asked_by_neutron(),
            guests,
            _folder: folder,
            _host: host,
        })
    }
}

impl Peer for Legacy {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(Caller::of).collect()
    }

    fn processes(&self) -> Vec<u32> {
        let mut all = [self.agent.processes(), self.servers.clone()].concat();
        all.extend(self.haproxies.iter().map(Haproxy::pid));
        all
    }
}
