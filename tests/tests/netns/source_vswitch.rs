//! Guests behind the real Open vSwitch, which tells the index of each interface that it has.

use metadata_agent::ids::{InstanceId, MacAddress};
use metadata_tests::nova::Instance;
use metadata_tests::vswitch::Vswitch;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, Host, Network, NovaStandIn, Port, domain};
use nix::net::if_::if_nametoindex;
use serde_json::Value;
use uuid::Uuid;

/// It bears the instance's id.
const DOCUMENT: &str = "/openstack/latest/meta_data.json";

/// A host whose agent knows instances from the switch, and their projects from libvirt.
struct World {
    process: AgentProcess,
    agent: Agent,
    switch: Vswitch,
    nova: NovaStandIn,
    network: Network,
    host: Host,
}

impl World {
    fn new() -> Self {
        let host = Host::new();
        let switch = Vswitch::start(host.netns());
        let nova = NovaStandIn::start(host.netns());
        let agent = Agent::on(&host, &nova)
            .set("ovs", "ovsdb_connection", &switch.remote())
            .set("metadata_agent", "identity_hold", "0.2")
            .install();
        let process = agent.start();
        Self { process, agent, switch, nova, network: host.network(), host }
    }

    /// Makes a guest's interface, on no bridge, under this name.
    fn guest(&self, port: &Port, name: &str) -> Guest {
        let mut spec = self.network.spec([10, 0, 0, 99]);
        spec.port = Port { device: Some(name.to_owned()), ..port.clone() };
        let guest = self.network.plug(spec);
        let MacAddress([_, b, c, d, e, f]) = port.mac;
        let taps = MacAddress([0xfe, b, c, d, e, f]);
        self.host.netns().ip(&format!("link set {name} nomaster\nlink set {name} address {taps}"));
        self.nova.add(Instance::of(port));
        guest
    }

    /// Puts a guest's interface in the place and under the name of the one of this port, in one run.
    fn supersede(&self, port: &Port, guest: &Guest) {
        let (tap, new) = (port.tap(), &guest.tap);
        let steps =
            format!("link set {new} down\nlink del {tap}\nlink set {new} name {tap}\nlink set {tap} up");
        self.host.netns().ip(&steps);
    }

    fn attachment(&self, tap: &str) -> Value {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.into_iter().find(|one| one["interface"] == *tap).unwrap_or_default()
    }

    fn until_identity(&self, port: &Port, wanted: &str) {
        let mut last = Value::Null;
        let index = self.index(port);
        let found = wait::poll(PATIENCE, || {
            last = self.attachment(&port.tap());
            (last["ifindex"] == index && last["identity"] == wanted).then_some(())
        });
        found.unwrap_or_else(|| panic!("never {wanted}: {last}\n{}", self.process.output()));
    }

    fn assert_served(&self, guest: &Guest, port: &Port) {
        self.until_identity(port, "known");
        let answer = guest.get(DOCUMENT);
        assert_eq!(answer.status, 200);
        assert!(answer.text().contains(&port.instance.to_string()), "{}", answer.text());
    }

    fn assert_refused(&self, guest: &Guest, port: &Port) {
        self.until_identity(port, "unknown");
        for _ in 0..5 {
            assert_eq!(guest.get(DOCUMENT).status, 503);
        }
        assert_eq!(self.attachment(&port.tap())["identity"], "unknown");
    }

    /// The index that the interface of a port has in the kernel.
    fn index(&self, port: &Port) -> u32 {
        let tap = port.tap();
        let index = self.host.netns().enter(|| if_nametoindex(tap.as_str()));
        index.unwrap_or_else(|e| panic!("index of {tap}: {e}"))
    }

    fn until_index(&self, port: &Port) {
        let index = self.index(port);
        wait::until("the switch has written the index", PATIENCE, || {
            (self.switch.index_of(&port.tap()) == Some(index)).then_some(())
        });
    }
}

#[test]
fn an_interface_is_nobodys_while_the_row_of_its_name_is_of_an_earlier_one() {
    let world = World::new();
    let old = world.network.spec([10, 0, 0, 5]).port;
    let first = world.guest(&old, &old.tap());
    world.switch.plug(&old);
    domain::write(&world.agent.libvirt_dir(), &old);
    world.until_index(&old);
    world.assert_served(&first, &old);

    // Another instance's interface gets the name, and nobody has been told yet: Open vSwitch and libvirt agree on the old one.
    let next = Port { instance: InstanceId::new(Uuid::new_v4()), ..old.clone() };
    let second = world.guest(&next, "next0");
    world.switch.freeze();
    world.supersede(&old, &second);
    world.assert_refused(&second, &next);

    // The row is replaced. That the switch has not looked at it yet hinders nobody.
    world.switch.plug(&next);
    domain::remove(&world.agent.libvirt_dir(), &old);
    domain::write(&world.agent.libvirt_dir(), &next);
    world.assert_served(&second, &next);
    world.switch.thaw();
    world.until_index(&next);
    world.assert_served(&second, &next);

    // The same instance with another interface, as after a hard reboot: the row stays, and the switch finds the new one.
    let third = world.guest(&next, "next1");
    world.switch.freeze();
    world.supersede(&next, &third);
    world.assert_refused(&third, &next);
    world.switch.thaw();
    world.until_index(&next);
    world.assert_served(&third, &next);
}
