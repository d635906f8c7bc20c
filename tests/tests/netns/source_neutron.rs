//! Guests that the agent knows only from Neutron's API, with the real Keystone and the real
//! neutron-server, and with neither Open vSwitch nor libvirt.

use std::time::Duration;

use metadata_agent::ids::{MacAddress, VlanId};
use metadata_tests::nova::Instance;
use metadata_tests::wait;
use metadata_tests::{
    Agent, AgentProcess, Binding, ControlPlane, Guest, Host, Network, NovaStandIn, Port, Subport,
};
use serde_json::Value;

const HOSTNAME: &str = "/latest/meta-data/hostname";
const HYPERVISOR: &str = "hypervisor-1";
const FAULTS: &str = "metadata_source_faults{source=\"neutron\"}";
/// A failed or unanswered query is repeated after half a minute at most. On a slow machine,
/// Keystone and Neutron take another while to answer it.
const RECOVERY: Duration = Duration::from_mins(3);

/// A host whose guests are identified only by Neutron.
struct World {
    host: Host,
    network: Network,
    nova: NovaStandIn,
    plane: ControlPlane,
    neutrons: metadata_agent::ids::NetworkId,
}

impl World {
    fn new(token_seconds: u32) -> Self {
        let host = Host::new();
        let plane = ControlPlane::start_with(&host, token_seconds);
        let neutrons = plane.create_network("10.0.0.0/24");
        Self { network: host.network(), nova: NovaStandIn::start(host.netns()), host, plane, neutrons }
    }

    fn agent(&self, options: &[(&str, String)]) -> Agent {
        let agent = Agent::on(&self.host, &self.nova).set("DEFAULT", "host", HYPERVISOR).set(
            "metadata_agent",
            "identity_hold",
            "0.2",
        );
        let set = |agent: metadata_tests::agent::Installer, (name, value): &(&str, String)| {
            agent.set("metadata_agent", name, value)
        };
        options.iter().fold(agent, set).install()
    }

    /// Creates a port with this owner in Neutron and in Nova.
    fn port(&self, last: u8, owner: &str) -> Port {
        let port = self.network.spec([10, 0, 0, last]).port;
        let device = if owner.is_empty() { String::new() } else { port.instance.to_string() };
        let binding = Binding { owner, device: &device, host: HYPERVISOR };
        let port = self.plane.create_port(self.neutrons, &port, &binding);
        self.nova.add(Instance::from_port(&port));
        port
    }

    fn plug(&self, port: &Port) -> Guest {
        let mut spec = self.network.spec([10, 0, 0, 99]);
        spec.port = port.clone();
        let guest = self.network.plug(spec);
        let MacAddress([_, b, c, d, e, f]) = port.mac;
        let taps = MacAddress([0xfe, b, c, d, e, f]);
        self.host.netns().ip(&format!("link set {} address {taps}", guest.tap));
        guest
    }
}

fn attachment(process: &AgentProcess, guest: &Guest) -> Value {
    let state = process.state();
    let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
    let untagged = |one: &Value| one["interface"] == *guest.tap && one["vlan"].is_null();
    attachments.into_iter().find(untagged).unwrap_or_default()
}

/// Returns the attachment of a VLAN on a guest's interface.
fn vlan(process: &AgentProcess, guest: &Guest, tag: u64) -> Option<Value> {
    let state = process.state();
    let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
    attachments.into_iter().find(|one| one["interface"] == *guest.tap && one["vlan"] == tag)
}

fn until_identity(process: &AgentProcess, guest: &Guest, wanted: &str) {
    let found = wait::poll(RECOVERY, || (attachment(process, guest)["identity"] == wanted).then_some(()));
    found.unwrap_or_else(|| {
        panic!("{} did not become {wanted}\n{}\n{}", guest.tap, process.state(), process.output())
    });
}

fn assert_served(world: &World, process: &AgentProcess, guest: &Guest) {
    until_identity(process, guest, "known");
    let answer = guest.get(HOSTNAME);
    assert_eq!((answer.status, answer.text()), (200, Instance::from_port(&guest.port).hostname().as_str()));
    let asked = world.nova.requests().pop().expect("Nova was asked");
    assert_eq!(asked.header("x-instance-id"), Some(guest.port.instance.to_string()));
    assert_eq!(asked.header("x-tenant-id"), Some(guest.port.project.to_string()));
}

fn until_metric(process: &AgentProcess, series: &str, wanted: f64) {
    wait::until(&format!("{series} is {wanted}"), RECOVERY, || {
        ((process.metric(series) - wanted).abs() < f64::EPSILON).then_some(())
    });
}

/// Guests are served from Neutron's data, and their requests cause no queries.
#[test]
fn neutron_is_polled_and_never_queried_per_request() {
    let mut world = World::new(3600);
    let early = world.plug(&world.port(5, "compute:nova"));
    let agent = world.agent(&world.plane.password_options());
    let process = agent.start();
    assert_served(&world, &process, &early);
    assert_eq!(attachment(&process, &early)["port"]["network"], world.neutrons.to_string());

    let asked = world.plane.neutron.port_questions().len();
    let mut connection = early.connect();
    for _ in 0..1000 {
        let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
        assert_eq!(answer.status, 200);
    }
    assert_eq!(world.plane.neutron.port_questions().len(), asked);

    // The port is bound to an instance only after it was plugged in and queried.
    let late = world.plug(&world.port(6, ""));
    until_identity(&process, &late, "unknown");
    wait::until("Neutron is queried about it", RECOVERY, || {
        (world.plane.neutron.port_questions().len() > asked).then_some(())
    });
    assert_eq!(late.get(HOSTNAME).status, 503);
    let device = late.port.instance.to_string();
    let binding = Binding { owner: "compute:az-1", device: &device, host: HYPERVISOR };
    world.plane.bind_port(late.port.id, &binding);
    assert_served(&world, &process, &late);

    // Neutron's own port loses our program once Neutron has been queried.
    let dhcp = world.plug(&world.port(7, "network:dhcp"));
    wait::until("the DHCP port is passed on", RECOVERY, || {
        process.output().contains("not an instance's port").then_some(())
    });
    assert!(attachment(&process, &dhcp).is_null());

    // Keystone loses its tokens.
    let logins = world.plane.keystone.logins();
    world.plane.keystone.forget_tokens();
    let third = world.plug(&world.port(8, "compute:nova"));
    assert_served(&world, &process, &third);
    assert!(world.plane.keystone.logins() > logins);

    // neutron-server crashes and returns.
    let fourth = world.port(9, "compute:nova");
    world.plane.neutron.stop();
    let fourth = world.plug(&fourth);
    until_metric(&process, FAULTS, 1.0);
    assert_served(&world, &process, &early);
    assert_eq!(fourth.get(HOSTNAME).status, 503);
    world.plane.neutron.start();
    assert_served(&world, &process, &fourth);
    until_metric(&process, FAULTS, 0.0);

    // The port belongs to another instance when it is plugged in again.
    let next =
        Port { instance: metadata_agent::ids::InstanceId::new(uuid::Uuid::new_v4()), ..third.port.clone() };
    world.nova.add(Instance::from_port(&next));
    drop(third);
    let device = next.instance.to_string();
    world.plane.bind_port(next.id, &Binding { owner: "compute:nova", device: &device, host: HYPERVISOR });
    let again = world.plug(&next);
    assert_served(&world, &process, &again);
}

/// Returns the number of queries for ports, once it is at least this.
fn questions(world: &World, at_least: usize) -> usize {
    let asked = || world.plane.neutron.port_questions().len();
    // Neutron logs a request after it has responded.
    wait::poll(wait::PATIENCE, || Some(asked()).filter(|asked| *asked >= at_least)).unwrap_or_else(asked)
}

/// One query for the ports of the host covers all interfaces that exist at the start, although they
/// are attached one after the other. The MAC addresses of these interfaces name no port.
#[test]
fn one_query_identifies_the_interfaces_at_the_start() {
    let world = World::new(3600);
    let plug = |port: &Port| {
        let mut spec = world.network.spec([10, 0, 0, 99]);
        spec.port = port.clone();
        world.network.plug(spec)
    };
    let guests: Vec<Guest> = (10..34).map(|last| plug(&world.port(last, "compute:nova"))).collect();
    let former = world.port(5, "compute:nova");
    let asked = world.plane.neutron.port_questions().len();
    let agent = world.agent(&world.plane.password_options());
    let process = agent.start();
    for guest in &guests {
        assert_served(&world, &process, guest);
    }
    assert_eq!(questions(&world, asked + 1), asked + 1, "{}", process.output());

    // Neutron reported this port with its former owner before it was plugged in. Its present owner
    // takes one more query, by the id of the port.
    let next =
        Port { instance: metadata_agent::ids::InstanceId::new(uuid::Uuid::new_v4()), ..former.clone() };
    world.nova.add(Instance::from_port(&next));
    let device = next.instance.to_string();
    world.plane.bind_port(next.id, &Binding { owner: "compute:nova", device: &device, host: HYPERVISOR });
    let later = plug(&next);
    assert_served(&world, &process, &later);
    assert_eq!(questions(&world, asked + 2), asked + 2, "{}", process.output());
}

/// With an application credential.
#[test]
fn a_late_control_plane_and_expiring_tokens_are_handled() {
    let mut world = World::new(30);
    let (id, secret) = world.plane.application_credential();
    let guest = world.plug(&world.port(5, "compute:nova"));
    world.plane.neutron.stop();
    world.plane.keystone.stop();
    let agent = world.agent(&[
        ("neutron_auth_url", world.plane.auth_url()),
        ("neutron_auth_type", "v3applicationcredential".to_owned()),
        ("neutron_application_credential_id", id),
        ("neutron_application_credential_secret", secret.clone()),
    ]);
    let process = agent.start();
    until_metric(&process, FAULTS, 1.0);
    assert_eq!(guest.get(HOSTNAME).status, 503);
    world.plane.keystone.start();
    world.plane.neutron.start();
    assert_served(&world, &process, &guest);
    until_metric(&process, FAULTS, 0.0);

    // A guest that Neutron does not know is queried repeatedly, with renewed tokens and never with
    // an expired one.
    let logins = world.plane.keystone.logins();
    let (asked, unknown) = (world.plane.neutron.port_questions().len(), world.network.guest([10, 0, 0, 6]));
    wait::until("tokens are renewed", RECOVERY, || {
        (world.plane.keystone.logins() > logins && world.plane.neutron.port_questions().len() >= asked + 3)
            .then_some(())
    });
    let statuses = world.plane.neutron.port_questions().split_off(asked);
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    until_identity(&process, &unknown, "unknown");
    assert!(!process.output().contains(&secret) && !process.state().to_string().contains(&secret));
}

#[test]
fn subports_of_a_trunk_follow_neutron() {
    let world = World::new(3600);
    let subport = |tag: u64| {
        let vlan = VlanId::try_from(tag).expect("a VLAN id");
        Subport::new(vlan, world.neutrons, [10, 0, 0, 50 + u8::try_from(tag).expect("a small tag")].into())
    };
    let mut subports = [5, 6].map(subport);
    let parent = world.network.spec([10, 0, 0, 5]).port;
    let unbound = Binding { owner: "", device: "", host: "" };
    let parent = world.plane.create_port(world.neutrons, &parent, &unbound);
    world.nova.add(Instance::from_port(&parent));
    let trunk = world.plane.create_trunk(world.neutrons, &parent, &mut subports);
    let device = parent.instance.to_string();
    world.plane.bind_port(parent.id, &Binding { owner: "compute:nova", device: &device, host: HYPERVISOR });

    let guest = world.plug(&parent);
    let agent = world.agent(&world.plane.password_options());
    let process = agent.start();
    assert_served(&world, &process, &guest);
    for (tag, subport) in [5, 6].into_iter().zip(&subports) {
        let attached = wait::until("the subport is attached", RECOVERY, || vlan(&process, &guest, tag));
        let port = &attached["port"];
        assert_eq!(port["id"], subport.id.to_string());
        assert_eq!(port["instance"], guest.port.instance.to_string());
        assert_eq!(port["network"], world.neutrons.to_string());
        assert_eq!(port["fixed_ips"], serde_json::json!(subport.fixed_ips));
        assert_eq!(port["mac"], subport.mac.to_string());
    }
    world.plane.remove_subport(trunk, &subports[0]);
    wait::until("the subport is detached", RECOVERY, || vlan(&process, &guest, 5).is_none().then_some(()));
    assert!(vlan(&process, &guest, 6).is_some());
    assert_served(&world, &process, &guest);
}
