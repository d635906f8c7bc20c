//! A guest behind a router, without an agent: the start of scenarios with namespaces.

use crate::agent::{Agent, Installer};
use crate::domain;
use crate::guest::Guest;
use crate::nova::{Instance, NovaStandIn};
use crate::ovsdb::{Ovsdb, Plug};
use crate::port::Port;
use crate::router::Router;
use crate::topology::{Host, Network};

/// A router with one network, a guest on it, and a Nova that knows the guest.
#[derive(Debug)]
pub struct Routed {
    pub guest: Guest,
    pub router: Router,
    /// The port of the router's interface.
    pub interface: Port,
    /// The network of both.
    pub network: Network,
    pub nova: NovaStandIn,
    pub host: Host,
}

impl Routed {
    /// Creates all of them on a new host.
    #[must_use]
    pub fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let network = host.network();
        let mut router = Router::new(&host);
        let interface = router.add(&network);
        let guest = network.guest([10, 0, 0, 5]);
        nova.add(Instance::from_port(&guest.port));
        Self { guest, router, interface, network, nova, host }
    }

    /// Installs an agent that serves the guest only in its router's namespace.
    #[must_use]
    pub fn agent(&self) -> Installer {
        let installer = Agent::on(&self.host, &self.nova).only_in(self.router.netns().name());
        installer.port(&self.interface).port(&self.guest.port)
    }

    /// Installs an agent that serves the guest only in its router's namespace, and knows its port
    /// from libvirt and Open vSwitch alone.
    #[must_use]
    pub fn install_with_libvirt(&self, ovsdb: &Ovsdb) -> Agent {
        let agent = Agent::on(&self.host, &self.nova)
            .only_in(self.router.netns().name())
            .port(&self.interface)
            .set("ovs", "ovsdb_connection", &ovsdb.remote())
            .install();
        ovsdb.plug(&self.guest.port, Plug::Direct);
        domain::write(&agent.libvirt_dir(), &self.guest.port);
        agent
    }
}

impl Default for Routed {
    fn default() -> Self {
        Self::new()
    }
}
