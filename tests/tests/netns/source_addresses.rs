//! Addresses that a guest uses besides those that it had at first: changed fixed addresses, allowed
//! address pairs and port security, by the source that states them. Its interface stays.

use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use metadata_agent::ids::MacAddress;
use metadata_ebpf::reason::Reason;
use metadata_tests::nova::Instance;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    AddressPair, Agent, AgentProcess, Binding, ControlPlane, Guest, Host, NextHop, NovaStandIn, Ovsdb, Plug,
    Port, Southbound, domain,
};
use serde_json::json;

const HOSTNAME: &str = "/latest/meta-data/hostname";
const HYPERVISOR: &str = "hypervisor-1";
/// Time to wait for a response that must not come: less than the kernel's first retransmission of a
/// SYN.
const UNANSWERED: Duration = Duration::from_millis(400);

const METADATA: &str = "169.254.169.254";
const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const NEXT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 50);
const PAIR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 116);
const FOREIGN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
/// A MAC address of VRRP.
const VIRTUAL_MAC: MacAddress = MacAddress([0, 0, 0x5e, 0, 1, 0x33]);
const FOREIGN_MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0xba, 0xdb, 0xad]);

/// A host with one guest, which resolves the address of the service by ARP.
struct World {
    guest: Guest,
    nova: NovaStandIn,
    host: Host,
}

impl World {
    fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        Self::on(host, nova, |port| port)
    }

    /// Plugs in a guest with the port that `create` returns, and adds the port to Nova.
    fn on(host: Host, nova: NovaStandIn, create: impl FnOnce(Port) -> Port) -> Self {
        let network = host.network();
        let mut spec = network.spec(FIRST);
        spec.next_hop = NextHop::OnLink;
        spec.port = create(spec.port);
        let guest = network.plug(spec);
        nova.add(Instance::from_port(&guest.port));
        for address in [NEXT, PAIR, FOREIGN] {
            guest.netns().ip(&format!("address add {address}/24 dev eth0"));
        }
        Self { guest, nova, host }
    }

    fn pair() -> AddressPair {
        AddressPair { ip_address: PAIR.to_string().parse().expect("an address"), mac_address: VIRTUAL_MAC }
    }

    fn port_with_pair(&self) -> Port {
        Port { allowed_address_pairs: vec![Self::pair()], ..self.guest.port.clone() }
    }

    /// Changes the MAC address of the guest, which forgets its neighbours.
    fn set_mac(&self, mac: MacAddress) {
        self.guest
            .netns()
            .ip(&format!("link set eth0 address {mac}\nroute replace {METADATA} dev eth0 scope link"));
    }

    fn connect_from(&self, address: Ipv4Addr, patience: Duration) -> io::Result<()> {
        self.guest.dial(self.guest.metadata_ipv4(), Some((address, 0).into()), patience).map(drop)
    }

    fn assert_served_from(&self, address: Ipv4Addr, process: &AgentProcess) {
        let hostname = Instance::from_port(&self.guest.port).hostname();
        let served = wait::poll(PATIENCE, || {
            let source = Some((address, 0).into());
            let mut connection = self.guest.dial(self.guest.metadata_ipv4(), source, PATIENCE).ok()?;
            let answer = connection.request("GET", HOSTNAME, &[], b"").ok()?;
            (answer.status == 200).then(|| answer.text().to_owned())
        });
        assert_eq!(served, Some(hostname), "from {address}: {}\n{}", process.state(), process.output());
    }

    fn assert_refused_from(&self, address: Ipv4Addr) {
        // The policy may be on its way.
        wait::until(&format!("{address} is refused"), PATIENCE, || {
            self.connect_from(address, UNANSWERED).is_err().then_some(())
        });
    }

    fn assert_never_refused(process: &AgentProcess) {
        assert_eq!([Reason::ForgedAddress, Reason::ForgedMac].map(|reason| process.packets(reason)), [0, 0]);
    }
}

/// libvirt's file has the addresses of the moment at which Nova wrote it, and no pairs.
#[test]
fn with_libvirt_alone_every_address_is_served() {
    let world = World::new();
    let agent = Agent::on(&world.host, &world.nova).install();
    domain::write(&agent.libvirt_dir(), &world.guest.port);
    for _ in 0..2 {
        let process = agent.start();
        for address in [FIRST, NEXT] {
            world.assert_served_from(address, &process);
        }
        world.set_mac(VIRTUAL_MAC);
        world.assert_served_from(PAIR, &process);
        world.set_mac(world.guest.port.mac);
        World::assert_never_refused(&process);
        assert!(process.stop().success());
    }
}

#[test]
fn the_static_file_states_pairs_and_port_security() {
    let world = World::new();
    let agent = Agent::on(&world.host, &world.nova).port(&world.port_with_pair()).install();
    let process = agent.start();
    world.assert_served_from(FIRST, &process);
    world.assert_refused_from(PAIR);
    world.set_mac(VIRTUAL_MAC);
    world.assert_served_from(PAIR, &process);
    world.assert_refused_from(FIRST);

    let changed = Port { fixed_ips: vec![NEXT.into()], ..world.guest.port.clone() };
    agent.set_ports([&changed]);
    world.assert_refused_from(PAIR);
    world.set_mac(world.guest.port.mac);
    world.assert_served_from(NEXT, &process);
    world.assert_refused_from(FIRST);

    agent.set_ports([&Port { port_security_enabled: Some(false), ..changed }]);
    world.set_mac(FOREIGN_MAC);
    world.assert_served_from(FOREIGN, &process);
}

/// OVN knows each change at once. libvirt's file does not change.
#[test]
fn ovn_outranks_libvirt_for_changed_addresses_and_pairs() {
    let (ovsdb, southbound) = (Ovsdb::start(), Southbound::start());
    let world = World::new();
    let port = &world.guest.port;
    ovsdb.plug(port, Plug::Direct);
    southbound.bind(port);
    let agent = Agent::on(&world.host, &world.nova)
        .set("ovs", "ovsdb_connection", &ovsdb.remote())
        .set("ovn", "ovn_sb_connection", &southbound.remotes())
        .install();
    domain::write(&agent.libvirt_dir(), port);
    let process = agent.start();
    world.assert_served_from(FIRST, &process);
    world.assert_refused_from(NEXT);

    let changed = Port { fixed_ips: vec![NEXT.into()], ..port.clone() };
    southbound.readdress(&changed);
    wait::until("the agent has the address of now", PATIENCE, || {
        let state = process.state();
        (state["attachments"][0]["port"]["fixed_ips"] == json!([NEXT])).then_some(())
    });
    world.assert_served_from(NEXT, &process);
    let asked = world.nova.requests().pop().expect("Nova was asked");
    assert_eq!(asked.header("x-forwarded-for"), Some(NEXT.to_string()), "the address of now is forwarded");
    world.assert_refused_from(FIRST);

    southbound.readdress(&Port { allowed_address_pairs: vec![World::pair()], ..changed.clone() });
    world.set_mac(VIRTUAL_MAC);
    world.assert_served_from(PAIR, &process);
    world.assert_refused_from(NEXT);
    southbound.readdress(&Port { port_security_enabled: Some(false), ..changed });
    world.set_mac(FOREIGN_MAC);
    world.assert_served_from(FOREIGN, &process);
}

/// A port of the real neutron-server, which is the only source.
struct NeutronWorld {
    world: World,
    plane: ControlPlane,
    agent: Agent,
}

impl NeutronWorld {
    fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let plane = ControlPlane::start(&host);
        let neutrons = plane.create_network("10.0.0.0/24");
        let world = World::on(host, nova, |port| {
            let device = port.instance.to_string();
            plane.create_port(
                neutrons,
                &port,
                &Binding { owner: "compute:nova", device: &device, host: HYPERVISOR },
            )
        });
        let MacAddress([_, b, c, d, e, f]) = world.guest.port.mac;
        let taps = MacAddress([0xfe, b, c, d, e, f]);
        world.host.netns().ip(&format!("link set {} address {taps}", world.guest.tap));
        let installer = Agent::on(&world.host, &world.nova).set("DEFAULT", "host", HYPERVISOR);
        let options = plane.password_options();
        let installer =
            options.iter().fold(installer, |agent, (name, value)| agent.set("metadata_agent", name, value));
        let agent = installer.install();
        Self { world, plane, agent }
    }

    fn queries(&self) -> usize {
        self.plane.neutron.port_questions().len()
    }
}

#[test]
fn neutron_is_asked_again_after_a_refusal() {
    let NeutronWorld { world, plane, agent } = &NeutronWorld::new();
    let port = world.guest.port.id;
    let process = agent.start();
    world.assert_served_from(FIRST, &process);

    // One connection suffices: the guest's kernel repeats its SYN.
    plane.readdress_port(port, NEXT);
    let connected = world.connect_from(NEXT, PATIENCE);
    assert!(connected.is_ok(), "{connected:?}: {}\n{}", process.state(), process.output());
    world.assert_served_from(NEXT, &process);
    world.assert_refused_from(FIRST);

    plane.set_address_pairs(port, &[World::pair()]);
    world.set_mac(VIRTUAL_MAC);
    world.assert_served_from(PAIR, &process);
    world.assert_refused_from(NEXT);

    plane.disable_port_security(port);
    world.set_mac(FOREIGN_MAC);
    world.assert_served_from(FOREIGN, &process);
}

/// A guest decides what it sends, but not how often Neutron is asked.
#[test]
fn a_guest_that_forges_addresses_does_not_flood_neutron() {
    let neutron = NeutronWorld::new();
    let world = &neutron.world;
    let process = neutron.agent.start();
    world.assert_served_from(FIRST, &process);
    let (before, refused) = (neutron.queries(), process.packets(Reason::ForgedAddress));
    for host in 130..190 {
        let forged = Ipv4Addr::new(10, 0, 0, host);
        world.guest.netns().ip(&format!("address add {forged}/24 dev eth0"));
        for _ in 0..3 {
            assert!(world.connect_from(forged, Duration::from_millis(20)).is_err(), "{forged}");
        }
    }
    assert!(process.packets(Reason::ForgedAddress) >= refused + 30);
    wait::until("Neutron is asked", PATIENCE, || (neutron.queries() > before).then_some(()));
    let asked = neutron.queries() - before;
    assert!(asked <= 5, "{asked} queries");
    world.assert_served_from(FIRST, &process);
}
