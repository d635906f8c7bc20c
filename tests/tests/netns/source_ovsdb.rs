//! Guests whose instance the agent learns from the database of Open vSwitch, and whose project from
//! libvirt.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::thread;

use metadata_agent::ids::{InstanceId, MacAddress, NetworkId, PortId, VlanId};
use metadata_tests::nova::Instance;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, Host, Network, NovaStandIn, Ovsdb, Plug, Port, Subport};
use serde_json::Value;

const HOSTNAME: &str = "/latest/meta-data/hostname";
const READY: &str = "metadata_source_ready{source=\"ovsdb\"}";
const FAULTS: &str = "metadata_source_faults{source=\"ovsdb\"}";

/// A host whose agent has OVSDB and libvirt as its only sources.
struct World {
    process: AgentProcess,
    agent: Agent,
    nova: NovaStandIn,
    network: Network,
    ovsdb: Ovsdb,
}

impl World {
    fn new() -> Self {
        let ovsdb = Ovsdb::start();
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let agent = Agent::on(&host, &nova)
            .set("ovs", "ovsdb_connection", &ovsdb.remote())
            .set("metadata_agent", "identity_hold", "0.2")
            .install();
        let process = agent.start();
        Self { process, agent, nova, network: host.network(), ovsdb }
    }

    /// Plugs in a guest that Nova knows but no database does.
    fn guest(&self, last: u8) -> Guest {
        let guest = self.network.guest([10, 0, 0, last]);
        self.nova.add(Instance::from_port(&guest.port));
        guest
    }

    /// Writes libvirt's file of a domain with one interface. It has no port id, so only the device
    /// identifies the port.
    fn run_domain(&self, port: &Port) {
        let text = format!(
            "<domstatus><domain type='kvm'><uuid>{instance}</uuid><metadata>\
             <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>\
             <nova:owner><nova:project uuid='{project}'>p</nova:project></nova:owner></nova:instance></metadata>\
             <devices><interface type='ethernet'><mac address='{mac}'/><target dev='{tap}'/></interface></devices>\
             </domain></domstatus>",
            instance = port.instance,
            project = port.project,
            mac = port.mac,
            tap = port.tap(),
        );
        let folder = self.agent.libvirt_dir();
        let new = folder.join(format!("{}.xml.new", port.instance));
        fs::write(&new, text).expect("write a domain");
        fs::rename(&new, folder.join(format!("{}.xml", port.instance))).expect("put the domain in its place");
    }

    fn end_domain(&self, port: &Port) {
        fs::remove_file(self.agent.libvirt_dir().join(format!("{}.xml", port.instance)))
            .expect("end a domain");
    }

    fn attachment(&self, guest: &Guest) -> Value {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        let untagged = |one: &Value| one["interface"] == *guest.tap && one["vlan"].is_null();
        attachments.into_iter().find(untagged).unwrap_or_default()
    }

    /// Returns the attachment of a VLAN on a guest's interface.
    fn vlan(&self, guest: &Guest, vlan: VlanId) -> Option<Value> {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.into_iter().find(|one| one["interface"] == *guest.tap && one["vlan"] == vlan.get())
    }

    fn until_identity(&self, guest: &Guest, wanted: &str) {
        let mut last = Value::Null;
        let found = wait::poll(PATIENCE, || {
            last = self.attachment(guest);
            (last["identity"] == wanted).then_some(())
        });
        found.unwrap_or_else(|| {
            panic!("{} did not become {wanted}: {last}\n{}", guest.tap, self.process.output())
        });
    }

    fn until_metric(&self, series: &str, wanted: f64) {
        wait::until(&format!("{series} is {wanted}"), PATIENCE, || {
            ((self.process.metric(series) - wanted).abs() < f64::EPSILON).then_some(())
        });
    }

    fn assert_served(&self, guest: &Guest) {
        self.until_identity(guest, "known");
        let answer = guest.get(HOSTNAME);
        assert_eq!(
            (answer.status, answer.text()),
            (200, Instance::from_port(&guest.port).hostname().as_str())
        );
        assert_eq!(self.attachment(guest)["port"]["network"], guest.port.network.to_string());
    }

    fn assert_refused(&self, guest: &Guest, identity: &str) {
        self.until_identity(guest, identity);
        assert_eq!(guest.get(HOSTNAME).status, 503);
    }
}

#[test]
fn ovsdb_and_libvirt_together_identify_a_guest() {
    let world = World::new();
    let [direct, hybrid] = [5, 6].map(|last| world.guest(last));
    world.assert_refused(&direct, "unknown");
    world.ovsdb.plug(&direct.port, Plug::Direct);
    world.until_metric("metadata_ports_incomplete", 1.0);
    world.assert_refused(&direct, "unknown");
    world.run_domain(&direct.port);
    world.assert_served(&direct);
    assert_eq!(world.attachment(&direct)["port"]["id"], direct.port.id.to_string());

    world.run_domain(&hybrid.port);
    world.ovsdb.plug(&hybrid.port, Plug::Hybrid);
    wait::until("the port of the hybrid plug has its id", PATIENCE, || {
        (world.attachment(&hybrid)["port"]["id"] == hybrid.port.id.to_string()).then_some(())
    });
    world.assert_served(&hybrid);

    world.ovsdb.plug_dhcp_port("tapdddddddd-dd", PortId::new(uuid::Uuid::new_v4()));
    let state = wait::until("the row is counted", PATIENCE, || {
        let state = world.process.state();
        let source = state["sources"].as_array()?.iter().find(|one| one["source"] == "ovsdb")?.clone();
        (source["ignored"] == 1).then_some(source)
    });
    assert_eq!((&state["ready"], &state["ports"]), (&Value::from(true), &Value::from(2)));
    assert_eq!(state["faults"], serde_json::json!({}));
}

#[test]
fn subports_are_attached_as_neutrons_agent_connects_them() {
    let world = World::new();
    let guest = world.guest(5);
    let subport = |tag: u64| {
        let vlan = VlanId::try_from(tag).expect("a VLAN id");
        Subport::new(vlan, NetworkId::new(uuid::Uuid::new_v4()), [10, 5, 0, 5].into())
    };
    let [first, second] = [5, 6].map(subport);
    // Nothing of it counts before the parent's instance is known.
    world.ovsdb.plug_trunk(&guest.port);
    world.ovsdb.connect_subport(&first, &guest.port);
    world.assert_refused(&guest, "unknown");
    assert_eq!(world.vlan(&guest, first.vlan), None);
    world.run_domain(&guest.port);
    world.ovsdb.connect_subport(&second, &guest.port);
    for subport in [&first, &second] {
        let attached = wait::until("the subport is attached", PATIENCE, || world.vlan(&guest, subport.vlan));
        let port = &attached["port"];
        assert_eq!(port["id"], subport.id.to_string());
        assert_eq!(port["network"], subport.network.to_string());
        assert_eq!(port["instance"], guest.port.instance.to_string());
        assert_eq!(port["project"], guest.port.project.to_string());
    }
    // The network of the parent is stored at its patch port.
    world.assert_served(&guest);

    world.ovsdb.disconnect_subport(&first);
    wait::until("the subport is detached", PATIENCE, || {
        world.vlan(&guest, first.vlan).is_none().then_some(())
    });
    assert!(world.vlan(&guest, second.vlan).is_some());
    world.ovsdb.clear();
    wait::until("all subports are detached", PATIENCE, || {
        world.vlan(&guest, second.vlan).is_none().then_some(())
    });
    world.until_metric(FAULTS, 0.0);
}

/// Attaching and detaching take effect at once.
#[test]
fn a_tap_handed_to_another_port_never_serves_the_old_data() {
    let world = World::new();
    let first = world.guest(5);
    world.run_domain(&first.port);
    world.ovsdb.plug(&first.port, Plug::Direct);
    world.assert_served(&first);

    // Another instance gets the same tap. Its row arrives before libvirt has reported the end of
    // the old domain.
    let next = Port { instance: InstanceId::new(uuid::Uuid::new_v4()), ..first.port.clone() };
    world.nova.add(Instance::from_port(&next));
    world.ovsdb.set_external_id(&first.tap, "vm-uuid", &next.instance.to_string());
    world.assert_refused(&first, "disputed");
    world.end_domain(&first.port);
    world.assert_refused(&first, "unknown");
    world.run_domain(&next);
    world.until_identity(&first, "known");
    let answer = first.get(HOSTNAME);
    assert_eq!(answer.status, 200);
    // Both instances have the name of their only port.
    let asked = world.nova.requests().pop().expect("Nova was asked");
    assert_eq!(asked.header("x-instance-id"), Some(next.instance.to_string()));

    world.end_domain(&next);
    world.ovsdb.clear();
    world.assert_refused(&first, "unknown");
    world.until_metric("metadata_ports_incomplete", 0.0);
}

/// Rows that vanished meanwhile are removed.
#[test]
fn a_restarted_ovsdb_server_does_not_disturb_guests() {
    let mut world = World::new();
    let [stays, leaves] = [5, 6].map(|last| world.guest(last));
    for guest in [&stays, &leaves] {
        world.run_domain(&guest.port);
        world.ovsdb.plug(&guest.port, Plug::Direct);
        world.assert_served(guest);
    }
    world.ovsdb.stop();
    world.until_metric(FAULTS, 1.0);
    for guest in [&stays, &leaves] {
        world.assert_served(guest);
    }
    world.ovsdb.restart();
    world.until_metric(FAULTS, 0.0);
    world.assert_served(&stays);

    // It returns with another database, in which one port has another instance and one is missing.
    world.ovsdb.stop();
    world.until_metric(FAULTS, 1.0);
    world.ovsdb.replace();
    world.ovsdb.restart();
    let other = Port { instance: InstanceId::new(uuid::Uuid::new_v4()), ..stays.port.clone() };
    world.ovsdb.plug(&other, Plug::Direct);
    world.assert_refused(&stays, "disputed");
    // libvirt alone still identifies the second port, but nothing remains of its row.
    wait::until("the deleted row is forgotten", PATIENCE, || {
        (world.attachment(&leaves)["port"]["network"].is_null()).then_some(())
    });
    assert_eq!(leaves.get(HOSTNAME).status, 200);
    world.until_metric(FAULTS, 0.0);
    world.until_metric(READY, 1.0);
}

/// Each gets its own metadata or none.
#[test]
fn ports_with_the_same_eleven_characters_are_not_confused() {
    let world = World::new();
    let id = uuid::Uuid::new_v4();
    let mut other_id = *id.as_bytes();
    other_id[15] ^= 1;
    let mut spec = world.network.spec([10, 0, 0, 5]);
    spec.port.id = PortId::new(id);
    let guest = world.network.plug(spec);
    // The agent's end of the veth pair has the guest's MAC address, like libvirt's taps except for
    // one octet.
    world.network.host().netns().ip(&format!("link set {} address {}", guest.tap, link_mac(guest.port.mac)));
    world.nova.add(Instance::from_port(&guest.port));
    let MacAddress([a, b, c, d, e, f]) = guest.port.mac;
    let other = Port {
        id: PortId::new(uuid::Uuid::from_bytes(other_id)),
        instance: InstanceId::new(uuid::Uuid::new_v4()),
        mac: MacAddress([a, b, c, d, e, !f]),
        ..guest.port.clone()
    };
    assert_eq!(other.tap(), guest.tap);
    // One row each: the names in Open vSwitch differ, but both lead to the same tap.
    world.ovsdb.plug(&guest.port, Plug::Direct);
    world.ovsdb.plug(&other, Plug::Hybrid);
    world.until_metric("metadata_ports_incomplete", 2.0);
    world.agent.set_ports([&guest.port, &other]);
    world.assert_served(&guest);
    let served: Vec<_> = world.nova.requests().iter().filter_map(|one| one.header("x-instance-id")).collect();
    assert_eq!(served, [guest.port.instance.to_string()]);

    // With neither's address the interface is neither port.
    let neither = MacAddress([a, b, c, d, !e, f]);
    world.network.host().netns().ip(&format!("link set {} address {neither}", guest.tap));
    world.assert_refused(&guest, "disputed");
}

fn link_mac(guest: MacAddress) -> MacAddress {
    let MacAddress([_, b, c, d, e, f]) = guest;
    MacAddress([0xfe, b, c, d, e, f])
}

#[test]
fn a_server_that_sends_garbage_affects_no_other_source() {
    let mut world = World::new();
    let guest = world.guest(5);
    world.run_domain(&guest.port);
    world.ovsdb.plug(&guest.port, Plug::Direct);
    world.assert_served(&guest);
    world.ovsdb.stop();
    fs::remove_file(world.ovsdb.socket()).expect("remove the server's socket");
    let listener = UnixListener::bind(world.ovsdb.socket()).expect("take the server's place");
    let garbage = thread::spawn(move || {
        for answer in ["HTTP/1.1 400 Bad Request\r\n\r\n", "{\"id\": 1, \"result\": [\"Open_vSw", "{\"id\":}"]
        {
            let (mut stream, _) = listener.accept().expect("the agent connects");
            stream.set_read_timeout(Some(PATIENCE)).expect("a deadline");
            assert!(stream.read(&mut [0; 1024]).expect("its request") > 0);
            stream.write_all(answer.as_bytes()).expect("answer it");
        }
    });
    garbage.join().expect("the agent connected three times");
    world.until_metric(FAULTS, 1.0);
    world.assert_served(&guest);
    fs::remove_file(world.ovsdb.socket()).expect("remove the impostor\'s socket");
    world.ovsdb.restart();
    world.until_metric(FAULTS, 0.0);
    world.assert_served(&guest);
}
