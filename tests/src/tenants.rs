//! Where most scenarios begin: one host, an agent, a Nova, and two tenants who know nothing of each other and whose
//! guests have the same address.

use std::ops::Deref;

use serde_json::Value;

use crate::agent::{Agent, AgentProcess, Installer};
use crate::guest::Guest;
use crate::nova::{Instance, NovaStandIn};
use crate::topology::{GuestSpec, Host, Network};

/// The address of both guests.
pub const ADDRESS: [u8; 4] = [10, 0, 0, 5];

/// A document that is another one for every instance.
pub const HOSTNAME: &str = "/latest/meta-data/hostname";

/// The scene. Its parts go in the order they stand here.
#[derive(Debug)]
pub struct Tenants {
    /// The agent at work.
    pub process: AgentProcess,
    /// Its installation.
    pub agent: Agent,
    /// Nova, which knows both instances.
    pub nova: NovaStandIn,
    /// One tenant.
    pub red: Tenant,
    /// The other one.
    pub blue: Tenant,
    /// What both are on.
    pub host: Host,
}

/// A tenant's guest and the network it is on.
#[derive(Debug)]
pub struct Tenant {
    /// The guest.
    pub guest: Guest,
    /// Its network.
    pub network: Network,
}

impl Tenants {
    /// Both guests are in the static inventory.
    #[must_use]
    pub fn new() -> Self {
        Self::with(|installer, red, blue| installer.port(&red.port).port(&blue.port))
    }

    /// `configure` tells the agent what it knows and how it works.
    #[must_use]
    pub fn with(configure: impl FnOnce(Installer, &Tenant, &Tenant) -> Installer) -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        Self::on(host, nova, |spec| spec, configure)
    }

    /// On a host and with a Nova of the test's own; `plug` changes the guests before they are plugged.
    #[must_use]
    pub fn on(
        host: Host,
        nova: NovaStandIn,
        plug: impl Fn(GuestSpec) -> GuestSpec,
        configure: impl FnOnce(Installer, &Tenant, &Tenant) -> Installer,
    ) -> Self {
        let tenant = || {
            let network = host.network();
            let guest = network.plug(plug(network.spec(ADDRESS)));
            nova.add(Instance::of(&guest.port));
            Tenant { guest, network }
        };
        let (red, blue) = (tenant(), tenant());
        let agent = configure(Agent::on(&host, &nova), &red, &blue).install();
        let process = agent.start();
        Self { process, agent, nova, red, blue, host }
    }

    /// What `/state` says of a guest's attachment.
    #[must_use]
    pub fn attachment(&self, guest: &Guest) -> Value {
        let mut state = self.process.state();
        let attachments = state["attachments"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let found = attachments.into_iter().find(|attachment| attachment["interface"] == guest.tap);
        found.unwrap_or_else(|| panic!("{} is not attached: {state}", guest.tap))
    }
}

impl Default for Tenants {
    fn default() -> Self {
        Self::new()
    }
}

impl Tenant {
    /// What [`HOSTNAME`] has to say.
    #[must_use]
    pub fn hostname(&self) -> String {
        Instance::of(&self.guest.port).hostname()
    }

    /// Gets a document and sees that it is this guest's own.
    pub fn assert_served(&self) {
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
