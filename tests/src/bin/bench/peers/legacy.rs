//! `legacy`: a haproxy per network, and behind its socket Neutron's own metadata agent, which
//! queries neutron-server through RabbitMQ to identify each request: once if haproxy sends the
//! network, twice if it sends a router.

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

/// The configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variant {
    /// The haproxies belong to routers.
    pub router: bool,
    /// One worker per core.
    pub all_cores: bool,
    /// The agent's cache, which used to be on by default.
    pub cache: bool,
}

/// Fields are in drop order.
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
        // haproxy runs as nobody and must reach the socket.
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
