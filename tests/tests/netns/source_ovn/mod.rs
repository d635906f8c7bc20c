//! Guests whose instance the agent learns from Open vSwitch's database, and whose project from
//! OVN's Southbound database.

use metadata_tests::nova::Instance;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, Host, Network, NovaStandIn, Ovsdb, Plug, Port};
use serde_json::{Value, json};

mod ports;
mod relay;
mod servers;

const HOSTNAME: &str = "/latest/meta-data/hostname";
const READY: &str = "metadata_source_ready{source=\"ovn_southbound\"}";

/// A host whose agent has Open vSwitch and OVN as its only sources.
struct World {
    process: AgentProcess,
    nova: NovaStandIn,
    network: Network,
    ovsdb: Ovsdb,
}

impl World {
    /// Starts an agent with these servers of the Southbound database.
    fn new(servers: &str) -> Self {
        let (host, ovsdb) = (Host::new(), Ovsdb::start());
        let remote = ovsdb.remote();
        Self::on(&host, ovsdb, &[("ovs", "ovsdb_connection", &remote), ("ovn", "ovn_sb_connection", servers)])
    }

    fn on(host: &Host, ovsdb: Ovsdb, options: &[(&str, &str, &str)]) -> Self {
        let nova = NovaStandIn::start(host.netns());
        let agent = Agent::on(host, &nova).set("metadata_agent", "identity_hold", "0.2").set(
            "ovn",
            "ovsdb_retry_max_interval",
            "1",
        );
        let agent = options.iter().fold(agent, |agent, (group, key, value)| agent.set(group, key, value));
        // It is not ready before it has read the Southbound database, which some tests rely on.
        let process = agent.install().spawn(&[]);
        wait::until("the state dump", PATIENCE, || process.try_admin("/state").ok());
        Self { process, nova, network: host.network(), ovsdb }
    }

    /// Creates a guest that Nova knows and plugs it into Open vSwitch.
    fn guest(&self, last: u8) -> Guest {
        let guest = self.unplugged(last);
        self.ovsdb.plug(&guest.port, Plug::Direct);
        guest
    }

    /// Creates a guest that Nova knows but no database does.
    fn unplugged(&self, last: u8) -> Guest {
        let guest = self.network.guest([10, 0, 0, last]);
        self.nova.add(Instance::from_port(&guest.port));
        guest
    }

    /// Plugs a port into Open vSwitch as for a guest, but without an instance.
    fn plug_without_instance(&self, port: &Port) {
        let ids = [
            ("iface-id", port.id.to_string()),
            ("iface-status", "active".to_owned()),
            ("attached-mac", port.mac.to_string()),
        ];
        self.ovsdb.insert(&port.tap(), &ids, &[]);
    }

    fn attachment(&self, guest: &Guest) -> Value {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        let untagged = |one: &Value| one["interface"] == *guest.tap && one["vlan"].is_null();
        attachments.into_iter().find(untagged).unwrap_or_default()
    }

    /// Returns the attachment of a VLAN on a guest's interface.
    fn vlan(&self, guest: &Guest, tag: u16) -> Option<Value> {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.into_iter().find(|one| one["interface"] == *guest.tap && one["vlan"] == tag)
    }

    /// Waits for a state of the source and returns it.
    fn source(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = wait::poll(PATIENCE, || {
            let state = self.process.state();
            let sources = state["sources"].as_array()?;
            last = sources.iter().find(|one| one["source"] == "ovn_southbound")?.clone();
            wanted(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|| {
            panic!("timed out waiting until the source {what}: {last}\n{}", self.process.output())
        })
    }

    fn until_sound(&self) -> Value {
        self.source("had no errors", |state| state["ready"] == true && state["faults"] == json!({}))
    }

    /// Waits until the error of a server contains these words.
    fn until_fault(&self, wanted: &str) {
        self.source(wanted, |state| state["faults"].to_string().contains(wanted));
    }

    fn assert_served(&self, guest: &Guest) {
        self.assert_served_as(guest, &guest.port);
    }

    fn assert_served_as(&self, guest: &Guest, port: &Port) {
        let mut last = Value::Null;
        let known = wait::poll(PATIENCE, || {
            last = self.attachment(guest);
            (last["identity"] == "known" && last["port"]["instance"] == port.instance.to_string())
                .then_some(())
        });
        known
            .unwrap_or_else(|| panic!("{} was not identified: {last}\n{}", guest.tap, self.process.output()));
        let answer = guest.get(HOSTNAME);
        assert_eq!((answer.status, answer.text()), (200, Instance::from_port(port).hostname().as_str()));
    }

    fn assert_refused(&self, guest: &Guest, identity: &str) {
        let mut last = Value::Null;
        let refused = wait::poll(PATIENCE, || {
            last = self.attachment(guest);
            (last["identity"] == identity).then_some(())
        });
        refused.unwrap_or_else(|| {
            panic!("{} did not become {identity}: {last}\n{}", guest.tap, self.process.output())
        });
        assert_eq!(guest.get(HOSTNAME).status, 503);
    }
}
