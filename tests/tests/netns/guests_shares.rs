//! Limits count per guest: one guest behind a router does not use up its neighbours' share, and all
//! ports of an instance have one share.

use std::net::{IpAddr, SocketAddr, TcpStream};

use etherparse::PacketBuilder;
use metadata_agent::ids::{NetworkId, VlanId};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV4;
use metadata_tests::agent::Installer;
use metadata_tests::nova::Instance;
use metadata_tests::two_tenants::{ADDRESS, HOSTNAME};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, Answer, Connection, Guest, Host, NeutronAgent, NovaStandIn, PacketSocket, Routed,
    Subport,
};
use uuid::Uuid;

const OWN: &str = "metadata_agent";
const RATE: &str = "metadata_rate_limiting";
const OPEN: &str = "metadata_connections_open";
const PER_GUEST: &str = "metadata_rejected_connections_total{reason=\"guest_connections\"}";
const LIMITED: &str = "metadata_rejected_requests_total{reason=\"rate_limited\"}";

/// A router with two guests on one network.
struct Neighbours {
    process: AgentProcess,
    neighbour: Guest,
    routed: Routed,
}

impl Neighbours {
    fn new(configure: impl FnOnce(Installer) -> Installer) -> Self {
        let routed = Routed::new();
        let neighbour = routed.network.guest([10, 0, 0, 6]);
        routed.nova.add(Instance::from_port(&neighbour.port));
        let process = configure(routed.agent().port(&neighbour.port)).install().start();
        Self { process, neighbour, routed }
    }
}

/// Returns the status of a request for the host name on a connection from this address.
fn status(guest: &Guest, source: Option<IpAddr>) -> Option<u16> {
    let source = source.map(|address| SocketAddr::new(address, 0));
    let mut connection = guest.dial(guest.metadata_ipv4(), source, PATIENCE).expect("a connection");
    // A connection above a limit is closed without a response.
    connection.request("GET", HOSTNAME, &[("Connection", "close")], b"").ok().map(|answer| answer.status)
}

fn idle(guest: &Guest, source: Option<IpAddr>, number: usize) -> Vec<Connection<TcpStream>> {
    let source = source.map(|address| SocketAddr::new(address, 0));
    (0..number).map(|_| guest.dial(guest.metadata_ipv4(), source, PATIENCE).expect("a connection")).collect()
}

fn until_open(process: &AgentProcess, open: u64) {
    wait::until("the connections are counted", PATIENCE, || (process.count(OPEN) == open).then_some(()));
}

#[test]
fn idle_connections_behind_a_router_are_one_guests_alone() {
    let world = Neighbours::new(|agent| agent);
    let (process, guest) = (&world.process, &world.routed.guest);
    let held = idle(guest, None, 130);
    wait::until("the guest has used its share", PATIENCE, || (process.count(PER_GUEST) == 2).then_some(()));
    for _ in 0..50 {
        assert_eq!(status(&world.neighbour, None), Some(200));
        assert_eq!(world.neighbour.get_v6(HOSTNAME).status, 200);
    }
    assert_eq!(status(guest, None), None);
    // Its other address belongs to the same guest.
    let over_ipv6 = guest.dial(guest.metadata_ipv6(), None, PATIENCE).expect("a connection");
    assert!({ over_ipv6 }.request("GET", HOSTNAME, &[], b"").is_err());
    drop(held);
    until_open(process, 0);
    assert_eq!(status(guest, None), Some(200));
}

#[test]
fn a_rate_limit_behind_a_router_is_one_guests_alone() {
    let world = Neighbours::new(|agent| {
        [
            ("rate_limit_enabled", "true"),
            ("base_window_duration", "3600"),
            ("base_query_rate_limit", "5"),
            ("burst_window_duration", "3600"),
            ("burst_query_rate_limit", "30"),
        ]
        .iter()
        .fold(agent, |agent, (key, value)| agent.set(RATE, key, value))
    });
    let answers: Vec<_> = (0..20).map(|_| status(&world.routed.guest, None)).collect();
    assert_eq!(answers.iter().filter(|answer| **answer == Some(429)).count(), 15, "{answers:?}");
    for _ in 0..5 {
        assert_eq!(status(&world.neighbour, None), Some(200));
    }
    assert_eq!(status(&world.neighbour, None), Some(429));
    assert_eq!(world.process.count(LIMITED), 16);
}

/// Two ports of one instance on taps, with one limit.
#[test]
fn two_ports_of_an_instance_share_a_limit() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let network = host.network();
    let first = network.guest(ADDRESS);
    let mut spec = network.spec([10, 0, 0, 6]);
    (spec.port.instance, spec.port.project) = (first.port.instance, first.port.project.clone());
    let second = network.plug(spec);
    let bystander = network.guest([10, 0, 0, 7]);
    for guest in [&first, &bystander] {
        nova.add(Instance::from_port(&guest.port));
    }
    let agent = Agent::on(&host, &nova).port(&first.port).port(&second.port).port(&bystander.port);
    let process = agent.set(OWN, "connections_per_guest", "10").install().start();
    let held = [idle(&first, None, 6), idle(&second, None, 4)];
    until_open(&process, 10);
    assert_eq!((status(&first, None), status(&second, None)), (None, None));
    assert_eq!(process.count(PER_GUEST), 2);
    assert_eq!(status(&bystander, None), Some(200));
    drop(held);
    until_open(&process, 0);
    assert_eq!(status(&second, None), Some(200));
}

/// Two ports of one instance on two networks of a router. The instance is known from the first
/// request on a connection on.
#[test]
fn two_ports_behind_a_router_share_a_limit() {
    let mut routed = Routed::new();
    let green = routed.host.network_at([10, 0, 1, 1].into(), 24);
    let interface = routed.router.add(&green);
    let mut spec = green.spec([10, 0, 1, 5]);
    (spec.port.instance, spec.port.project) = (routed.guest.port.instance, routed.guest.port.project.clone());
    let second = green.plug(spec);
    let agent = routed.agent().port(&interface).port(&second.port);
    let process = agent.set(OWN, "connections_per_guest", "10").install().start();
    let mut held =
        [idle(&routed.guest, None, 6), idle(&second, None, 4)].into_iter().flatten().collect::<Vec<_>>();
    for connection in &mut held {
        assert_eq!(connection.request("GET", HOSTNAME, &[], b"").expect("an answer").status, 200);
    }
    for guest in [&routed.guest, &second] {
        assert_eq!(status(guest, None), Some(503));
    }
    drop(held);
    until_open(&process, 0);
    assert_eq!(status(&second, None), Some(200));
}

/// Opens a connection from a subport of the guest with handmade frames. The guest's kernel may not
/// know VLANs.
fn open_on_vlan(wire: &PacketSocket, subport: &Subport, port: u16) {
    let IpAddr::V4(address) = subport.fixed_ips[0] else { panic!("{subport:?} has no IPv4 address") };
    let send = |sequence, acknowledges: Option<u32>| {
        let tcp = PacketBuilder::ethernet2(subport.mac.0, METADATA_MAC)
            .single_vlan(etherparse::VlanId::try_new(subport.vlan.get()).expect("twelve bits"))
            .ipv4(address.octets(), METADATA_IPV4, 64)
            .tcp(port, 80, sequence, 64_240);
        let mut frame = Vec::new();
        match acknowledges {
            None => tcp.syn().write(&mut frame, &[]),
            Some(number) => tcp.ack(number).write(&mut frame, &[]),
        }
        .expect("a vector takes all");
        wire.send(&frame);
    };
    send(1, None);
    let received = wire.wait_for("SYN-ACK", |frame| {
        let is_tcp = frame.get(12..14)? == [8, 0] && frame.get(23)? == &6;
        let is_reply =
            is_tcp && frame.get(26..30)? == METADATA_IPV4 && frame.get(36..38)? == port.to_be_bytes();
        is_reply.then(|| u32::from_be_bytes(frame[38..42].try_into().expect("four octets")))
    });
    send(2, Some(received.wrapping_add(1)));
}

#[test]
fn two_subports_of_a_trunk_share_a_limit() {
    assert_one_share_for_a_trunk(|installer| installer);
}

#[test]
fn two_subports_share_a_limit_with_neutrons_agent() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("metadata_proxy");
    let _neutron = NeutronAgent::start(&socket, |_| Answer::text(200, "served"));
    assert_one_share_for_a_trunk(|installer| {
        installer.set(OWN, "upstream", "neutron-agent").set(
            "DEFAULT",
            "metadata_proxy_socket",
            &socket.display().to_string(),
        )
    });
}

fn assert_one_share_for_a_trunk(configure: impl FnOnce(Installer) -> Installer) {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let network = host.network();
    let mut guest = network.guest(ADDRESS);
    nova.add(Instance::from_port(&guest.port));
    for third in [5, 6] {
        let vlan = VlanId::try_from(u64::from(third)).expect("a VLAN id");
        let network = NetworkId::new(Uuid::new_v4());
        guest.port.subports.push(Subport::new(vlan, network, [10, third, 0, 5].into()));
    }
    let agent = Agent::on(&host, &nova).port(&guest.port);
    let process = configure(agent.set(OWN, "connections_per_guest", "10")).install().start();
    wait::until("both subports are attached", PATIENCE, || {
        (process.state()["attachments"].as_array().map(Vec::len) == Some(3)).then_some(())
    });
    assert_eq!(status(&guest, None), Some(200));
    until_open(&process, 0);
    let wire = PacketSocket::open(guest.netns(), "eth0");
    let [first, second] = &guest.port.subports[..] else { panic!("two subports") };
    for (subport, ports) in [(first, 40_000..40_006), (second, 41_000..41_004)] {
        ports.for_each(|port| open_on_vlan(&wire, subport, port));
    }
    until_open(&process, 10);
    assert_eq!(status(&guest, None), None);
    assert_eq!(process.count(PER_GUEST), 1);
}
