//! A guest behind a router, and no agent yet: where scenarios of namespaces begin.

use crate::agent::{Agent, Installer};
use crate::guest::Guest;
use crate::nova::{Instance, NovaStandIn};
use crate::port::Port;
use crate::router::Router;
use crate::topology::{Host, Network};

/// A router with one network, a guest on that, and the Nova that knows it.
#[derive(Debug)]
pub struct Routed {
    /// The guest.
    pub guest: Guest,
    /// Its router.
    pub router: Router,
    /// The port of the router's interface.
    pub interface: Port,
    /// The network of both.
    pub network: Network,
    /// Nova.
    pub nova: NovaStandIn,
    /// Where all of them are.
    pub host: Host,
}

impl Routed {
    /// A host of its own with all of them.
    #[must_use]
    pub fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let network = host.network();
        let mut router = Router::new(&host);
        let interface = router.add(&network);
        let guest = network.guest([10, 0, 0, 5]);
        nova.add(Instance::of(&guest.port));
        Self { guest, router, interface, network, nova, host }
    }

    /// An agent that meets the guest behind its router alone.
    #[must_use]
    pub fn agent(&self) -> Installer {
        let installer = Agent::on(&self.host, &self.nova).only_in(self.router.netns().name());
        installer.port(&self.interface).port(&self.guest.port)
    }
}

impl Default for Routed {
    fn default() -> Self {
        Self::new()
    }
}
