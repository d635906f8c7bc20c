//! Guests behind the real Open vSwitch, which reports the index of each of its interfaces.

use metadata_agent::ids::{InstanceId, MacAddress};
use metadata_tests::nova::Instance;
use metadata_tests::vswitch::Vswitch;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, Host, Network, NovaStandIn, Port, domain};
use nix::net::if_::if_nametoindex;
use serde_json::Value;
use uuid::Uuid;

/// Contains the instance's id.
const DOCUMENT: &str = "/openstack/latest/meta_data.json";

/// A host whose agent gets instances from the switch, and their projects from libvirt.
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

    /// Creates a guest's interface under this name, without a bridge.
    fn guest(&self, port: &Port, name: &str) -> Guest {
        let mut spec = self.network.spec([10, 0, 0, 99]);
        spec.port = Port { device: Some(name.to_owned()), ..port.clone() };
        let guest = self.network.plug(spec);
        let MacAddress([_, b, c, d, e, f]) = port.mac;
        let taps = MacAddress([0xfe, b, c, d, e, f]);
        self.host.netns().ip(&format!("link set {name} nomaster\nlink set {name} address {taps}"));
        self.nova.add(Instance::from_port(port));
        guest
    }

    /// Replaces the interface of this port by a guest's interface under the same name, in a single
    /// command.
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
        found.unwrap_or_else(|| panic!("timed out waiting for {wanted}: {last}\n{}", self.process.output()));
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

    /// Returns the kernel's index of a port's interface.
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

/// The row still has the index of an earlier interface with that name.
#[test]
fn a_stale_interface_row_identifies_no_one() {
    let world = World::new();
    let old = world.network.spec([10, 0, 0, 5]).port;
    let first = world.guest(&old, &old.tap());
    world.switch.plug(&old);
    domain::write(&world.agent.libvirt_dir(), &old);
    world.until_index(&old);
    world.assert_served(&first, &old);

    // Another instance's interface takes the name before any source reports it: Open vSwitch and
    // libvirt agree on the old one.
    let next = Port { instance: InstanceId::new(Uuid::new_v4()), ..old.clone() };
    let second = world.guest(&next, "next0");
    world.switch.freeze();
    world.supersede(&old, &second);
    world.assert_refused(&second, &next);

    // The row is replaced. It is served even before the switch has processed the row.
    world.switch.plug(&next);
    domain::remove(&world.agent.libvirt_dir(), &old);
    domain::write(&world.agent.libvirt_dir(), &next);
    world.assert_served(&second, &next);
    world.switch.thaw();
    world.until_index(&next);
    world.assert_served(&second, &next);

    // The same instance with another interface, as after a hard reboot: the row stays, and the
    // switch finds the new interface.
    let third = world.guest(&next, "next1");
    world.switch.freeze();
    world.supersede(&next, &third);
    world.assert_refused(&third, &next);
    world.switch.thaw();
    world.until_index(&next);
    world.assert_served(&third, &next);
}
