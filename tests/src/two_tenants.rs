//! The start of most scenarios: one host, a Nova, and two tenants that know nothing of each other
//! and whose guests have the same address. [`TwoTenants`] has no agent yet; [`ServedTenants`] has
//! one.

use std::ops::Deref;

use serde_json::Value;

use crate::agent::{Agent, AgentProcess, Installer};
use crate::guest::Guest;
use crate::http::Response;
use crate::nova::{Instance, NovaStandIn};
use crate::topology::{GuestSpec, Host, Network};

/// The address of both guests.
pub const ADDRESS: [u8; 4] = [10, 0, 0, 5];

/// A document that differs between all instances.
pub const HOSTNAME: &str = "/latest/meta-data/hostname";

const DOCUMENT: &str = "/openstack/latest/meta_data.json";

/// Two networks with a guest each, and a Nova that knows both. Fields are in drop order.
#[derive(Debug)]
pub struct TwoTenants {
    /// One guest on each network, both with [`ADDRESS`].
    pub guests: [Guest; 2],
    pub networks: [Network; 2],
    pub nova: NovaStandIn,
    pub host: Host,
}

/// Two tenants and a running agent. Fields are in drop order.
#[derive(Debug)]
pub struct ServedTenants {
    pub process: AgentProcess,
    pub agent: Agent,
    pub nova: NovaStandIn,
    pub red: Tenant,
    pub blue: Tenant,
    pub host: Host,
}

/// A tenant's guest and its network.
#[derive(Debug)]
pub struct Tenant {
    pub guest: Guest,
    pub network: Network,
}

impl TwoTenants {
    /// Creates both tenants on a new host.
    #[must_use]
    pub fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        Self::on(host, nova, |spec| spec)
    }

    /// Creates both tenants on this host with this Nova. `modify` changes the guests before they
    /// are plugged.
    #[must_use]
    pub fn on(host: Host, nova: NovaStandIn, modify: impl Fn(GuestSpec) -> GuestSpec) -> Self {
        let networks = [host.network(), host.network()];
        let guests = networks.each_ref().map(|network| network.plug(modify(network.spec(ADDRESS))));
        for guest in &guests {
            nova.add(Instance::from_port(&guest.port));
        }
        Self { guests, networks, nova, host }
    }

    /// Installs an agent with both guests in its static inventory.
    #[must_use]
    pub fn agent(&self) -> Installer {
        let install = Agent::on(&self.host, &self.nova);
        self.guests.iter().fold(install, |install, guest| install.port(&guest.port))
    }

    /// Starts an agent. `configure` adds its sources and options.
    #[must_use]
    pub fn serve(self, configure: impl FnOnce(Installer, &Tenant, &Tenant) -> Installer) -> ServedTenants {
        let Self { guests: [red, blue], networks: [red_network, blue_network], nova, host } = self;
        let red = Tenant { guest: red, network: red_network };
        let blue = Tenant { guest: blue, network: blue_network };
        let agent = configure(Agent::on(&host, &nova), &red, &blue).install();
        let process = agent.start();
        ServedTenants { process, agent, nova, red, blue, host }
    }

    /// Panics unless each guest gets its own metadata.
    pub fn assert_served(&self) {
        self.guests.iter().for_each(assert_served);
    }
}

impl Default for TwoTenants {
    fn default() -> Self {
        Self::new()
    }
}

impl ServedTenants {
    /// Starts an agent with both guests in its static inventory.
    #[must_use]
    pub fn new() -> Self {
        Self::with(|installer, red, blue| installer.port(&red.port).port(&blue.port))
    }

    /// Starts an agent on a new host. `configure` adds its sources and options.
    #[must_use]
    pub fn with(configure: impl FnOnce(Installer, &Tenant, &Tenant) -> Installer) -> Self {
        TwoTenants::new().serve(configure)
    }

    /// Returns the attachment of a guest in `/state`.
    #[must_use]
    pub fn attachment(&self, guest: &Guest) -> Value {
        let mut state = self.process.state();
        let attachments = state["attachments"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let found = attachments.into_iter().find(|attachment| attachment["interface"] == guest.tap);
        found.unwrap_or_else(|| panic!("{} is not attached: {state}", guest.tap))
    }
}

impl Default for ServedTenants {
    fn default() -> Self {
        Self::new()
    }
}

impl Tenant {
    /// Returns the content of [`HOSTNAME`] for this guest.
    #[must_use]
    pub fn hostname(&self) -> String {
        Instance::from_port(&self.guest.port).hostname()
    }

    /// Panics unless [`HOSTNAME`] is this guest's own.
    pub fn assert_hostname_served(&self) {
        let answer = self.guest.get(HOSTNAME);
        assert_eq!((answer.status, answer.text()), (200, self.hostname().as_str()), "{}", self.guest.tap);
    }
}

impl Deref for Tenant {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

/// Panics unless a guest gets its own metadata on a new connection.
pub fn assert_served(guest: &Guest) {
    assert_own(guest, &guest.get(DOCUMENT));
}

/// Panics unless a guest gets its own metadata on a new connection over IPv6.
pub fn assert_served_v6(guest: &Guest) {
    assert_own(guest, &guest.get_v6(DOCUMENT));
}

fn assert_own(guest: &Guest, response: &Response) {
    assert_eq!(response.status, 200, "{}: {}", guest.tap, response.text());
    let document: Value = serde_json::from_slice(&response.body)
        .unwrap_or_else(|e| panic!("{}: {e}\n{}", guest.tap, response.text()));
    assert_eq!(
        document["uuid"],
        guest.port.instance.to_string(),
        "{} gets another guest's metadata",
        guest.tap
    );
}
