//! Sources that disagree: the databases of Open vSwitch and of libvirt on the host, the real
//! Keystone and the real neutron-server. One of them may be out of date.

use std::time::Duration;

use metadata_agent::ids::{InstanceId, MacAddress, NetworkId};
use metadata_tests::nova::Instance;
use metadata_tests::wait;
use metadata_tests::{
    Agent, AgentProcess, Binding, ControlPlane, Guest, Host, Network, NovaStandIn, Ovsdb, Plug, Port, domain,
};
use serde_json::Value;

/// Contains the instance's id.
const DOCUMENT: &str = "/openstack/latest/meta_data.json";
const HYPERVISOR: &str = "hypervisor-1";
/// A query to Neutron is repeated after a minute at most, and several may be due in sequence.
const RECOVERY: Duration = Duration::from_mins(5);

/// A host whose ports are identified by Open vSwitch, libvirt and Neutron.
struct World {
    process: AgentProcess,
    agent: Agent,
    host: Host,
    network: Network,
    nova: NovaStandIn,
    ovsdb: Ovsdb,
    plane: ControlPlane,
    neutrons: NetworkId,
}

impl World {
    fn new() -> Self {
        let (host, ovsdb) = (Host::new(), Ovsdb::start());
        let plane = ControlPlane::start(&host);
        let neutrons = plane.create_network("10.0.0.0/24");
        let nova = NovaStandIn::start(host.netns());
        let installer = Agent::on(&host, &nova)
            .set("DEFAULT", "host", HYPERVISOR)
            .set("ovs", "ovsdb_connection", &ovsdb.remote())
            .set("metadata_agent", "identity_hold", "0.2");
        let options = plane.password_options();
        let installer =
            options.iter().fold(installer, |agent, (name, value)| agent.set("metadata_agent", name, value));
        let agent = installer.install();
        let process = agent.start();
        Self { process, agent, network: host.network(), host, nova, ovsdb, plane, neutrons }
    }

    /// Creates a port in Neutron that is bound to an instance.
    fn port(&self, last: u8) -> Port {
        let port = self.network.spec([10, 0, 0, last]).port;
        let device = port.instance.to_string();
        let port = self.plane.create_port(self.neutrons, &port, &binding(&device));
        self.nova.add(Instance::from_port(&port));
        port
    }

    /// Returns the same port with another instance.
    fn successor(&self, port: &Port) -> Port {
        let next = Port { instance: InstanceId::new(uuid::Uuid::new_v4()), ..port.clone() };
        self.nova.add(Instance::from_port(&next));
        next
    }

    fn bind(&self, port: &Port) {
        self.plane.bind_port(port.id, &binding(&port.instance.to_string()));
    }

    /// Plugs in the guest under this name.
    fn plug(&self, port: &Port, name: Option<&str>) -> Guest {
        let mut spec = self.network.spec([10, 0, 0, 99]);
        spec.port = Port { device: name.map(str::to_owned), ..port.clone() };
        let guest = self.network.plug(spec);
        let MacAddress([_, b, c, d, e, f]) = port.mac;
        let taps = MacAddress([0xfe, b, c, d, e, f]);
        self.host.netns().ip(&format!("link set {} address {taps}", guest.tap));
        guest
    }

    fn attachment(&self, tap: &str) -> Value {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.into_iter().find(|one| one["interface"] == *tap).unwrap_or_default()
    }

    fn until(&self, what: &str, fits: impl Fn() -> bool) {
        wait::poll(RECOVERY, || fits().then_some(())).unwrap_or_else(|| {
            panic!("timed out waiting until {what}\n{}\n{}", self.process.state(), self.process.output())
        });
    }

    fn assert_served_as(&self, guest: &Guest, port: &Port) {
        let instance = port.instance.to_string();
        self.until("its instance is known", || {
            let attachment = self.attachment(&port.tap());
            attachment["identity"] == "known" && attachment["port"]["instance"] == instance
        });
        let answer = guest.get(DOCUMENT);
        assert!(answer.status == 200 && answer.text().contains(&instance), "{}", answer.text());
        let asked = self.nova.requests().pop().expect("Nova was asked");
        assert_eq!(asked.header("x-tenant-id"), Some(port.project.to_string()));
    }
}

fn binding(device: &str) -> Binding<'_> {
    Binding { owner: "compute:nova", device, host: HYPERVISOR }
}

/// Two sources name different instances, so Neutron is queried again.
#[test]
fn neutron_settles_a_dispute_if_it_agrees_with_one_side() {
    let world = World::new();
    // Open vSwitch says A, libvirt says B, and Neutron, queried about both, says A.
    let port = world.port(5);
    let wrong = world.successor(&port);
    let guest = world.plug(&port, None);
    world.ovsdb.plug(&port, Plug::Direct);
    world.assert_served_as(&guest, &port);
    let asked = world.plane.neutron.port_questions().len();
    domain::write(&world.agent.libvirt_dir(), &wrong);
    world.until("Neutron is queried again", || world.plane.neutron.port_questions().len() > asked);
    world.assert_served_as(&guest, &port);
    let libvirt = || {
        let state = world.process.state();
        state["sources"]
            .as_array()
            .expect("sources")
            .iter()
            .any(|one| one["source"] == "libvirt" && one["ports"] == 1)
    };
    assert!(libvirt(), "the error is still reported");

    // Neutron says C, which is neither, so the port is not served.
    let other = world.port(6);
    let mistaken = world.successor(&other);
    let third = world.successor(&other);
    world.bind(&third);
    domain::write(&world.agent.libvirt_dir(), &mistaken);
    world.ovsdb.plug(&other, Plug::Direct);
    let asked = world.plane.neutron.port_questions().len();
    let refused = world.plug(&other, None);
    world.until("Neutron is queried about it", || world.plane.neutron.port_questions().len() > asked);
    let tap = other.tap();
    world.until("its record is among the claims", || {
        world.attachment(&tap)["identity"] == "disputed"
            && world.process.output().contains(&third.instance.to_string())
    });
    assert_eq!(refused.get(DOCUMENT).status, 503);
    assert_eq!(world.attachment(&tap)["identity"], "disputed");
    assert!(
        world
            .nova
            .requests()
            .iter()
            .all(|asked| { asked.header("x-instance-id") == Some(port.instance.to_string()) })
    );

    // The correction settles the dispute.
    world.bind(&other);
    world.assert_served_as(&refused, &other);
}

/// The interface of the next instance follows at once under the same name.
#[test]
fn a_successor_on_the_same_tap_never_gets_the_old_data() {
    let world = World::new();
    let old = world.port(5);
    let guest = world.plug(&old, None);
    world.ovsdb.plug(&old, Plug::Direct);
    domain::write(&world.agent.libvirt_dir(), &old);
    world.assert_served_as(&guest, &old);

    // The order of Nova: update Neutron, then Open vSwitch, then create the interface. libvirt
    // comes last.
    let next = world.successor(&old);
    let (tap, waiting) = (old.tap(), world.plug(&next, Some("next0")));
    world.bind(&next);
    world.ovsdb.replug(&next);
    // One link vanishes and the other takes its name in a single command.
    world
        .host
        .netns()
        .ip(&format!("link set next0 down\nlink del {tap}\nlink set next0 name {tap}\nlink set {tap} up"));
    let [olds, news] = [&old, &next].map(|port| port.instance.to_string());
    let ask = || {
        let answer = waiting.get(DOCUMENT);
        assert!(!answer.text().contains(&olds), "the old instance's: {}", answer.text());
        answer.status == 200 && answer.text().contains(&news)
    };
    // Neutron decides between Open vSwitch and the stale state of libvirt.
    world.until("the new one is served while libvirt reports the old one", ask);
    domain::write(&world.agent.libvirt_dir(), &next);
    assert!(ask());
    domain::remove(&world.agent.libvirt_dir(), &old);
    world.until("libvirt has recovered", || {
        let state = world.process.state();
        let sources = state["sources"].as_array().expect("sources").clone();
        sources.iter().any(|one| one["source"] == "libvirt" && one["ports"] == 1)
    });
    world.until("the new one is served", ask);
    let attachment = world.attachment(&tap);
    assert_eq!(attachment["port"]["instance"], next.instance.to_string());
    drop(guest);
}
