//! Two tenants on one host whose guests have the same address, and no agent yet: where scenarios of starting and stopping
//! begin.

use serde_json::Value;

use crate::agent::{Agent, Installer};
use crate::guest::Guest;
use crate::nova::{Instance, NovaStandIn};
use crate::topology::{Host, Network};

/// The address of both guests.
pub const ADDRESS: [u8; 4] = [10, 0, 0, 5];

/// Two networks with a guest each, and the Nova that knows both.
#[derive(Debug)]
pub struct Twins {
    /// One guest on each network, both with [`ADDRESS`].
    pub guests: [Guest; 2],
    /// Their networks.
    pub networks: [Network; 2],
    /// Nova.
    pub nova: NovaStandIn,
    /// The hypervisor.
    pub host: Host,
}

impl Twins {
    /// A host of its own with both tenants.
    #[must_use]
    pub fn new() -> Self {
        Self::on(Host::new())
    }

    /// Both tenants on this host.
    #[must_use]
    pub fn on(host: Host) -> Self {
        let networks = [host.network(), host.network()];
        let nova = NovaStandIn::start(host.netns());
        let guests = networks.each_ref().map(|network| network.guest(ADDRESS));
        for guest in &guests {
            nova.add(Instance::of(&guest.port));
        }
        Self { guests, networks, nova, host }
    }

    /// An agent that knows both guests.
    #[must_use]
    pub fn agent(&self) -> Installer {
        let install = Agent::on(&self.host, &self.nova);
        self.guests.iter().fold(install, |install, guest| install.port(&guest.port))
    }

    /// Panics unless the agent serves both guests, each with its own metadata.
    pub fn assert_served(&self) {
        self.guests.iter().for_each(assert_served);
    }
}

impl Default for Twins {
    fn default() -> Self {
        Self::new()
    }
}

/// Panics unless a guest gets its own metadata on a new connection.
pub fn assert_served(guest: &Guest) {
    let response = guest.get("/openstack/latest/meta_data.json");
    assert_eq!(response.status, 200, "{}: {}", guest.tap, response.text());
    let document: Value = serde_json::from_slice(&response.body)
        .unwrap_or_else(|e| panic!("{}: {e}\n{}", guest.tap, response.text()));
    assert_eq!(document["uuid"], guest.port.instance.to_string(), "{} is served as another one", guest.tap);
}
