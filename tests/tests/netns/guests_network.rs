//! Paths of packets: next hops, frames that do not concern us, links that move.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, PacketBuilder, VlanId};
use metadata_agent::ids::MacAddress;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV4;
use metadata_ebpf::reason::Reason;
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, Guest, GuestSpec, Host, HostState, NextHop, NovaStandIn, PacketSocket, ServedTenants, TwoTenants,
};
use socket2::{Domain, Protocol, Socket, Type};

fn by_next_hop(next_hop: NextHop) -> ServedTenants {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let plug = |spec| GuestSpec { next_hop, ..spec };
    TwoTenants::on(host, nova, plug)
        .serve(|agent, red, blue| agent.port(&red.port).port(&blue.port).without_probes())
}

/// Returns the source MAC address of a reply of the metadata service on `guest`'s wire.
fn answered_by(wire: &PacketSocket) -> MacAddress {
    wire.wait_for("TCP segment from 169.254.169.254", |frame| {
        let is_tcp = frame.get(12..14)? == [8, 0] && *frame.get(23)? == 6;
        let ours = is_tcp && frame.get(26..30)? == METADATA_IPV4;
        ours.then(|| MacAddress(frame[6..12].try_into().expect("six octets")))
    })
}

#[test]
fn behind_a_gateway_replies_have_the_gateways_mac() {
    let tenants = by_next_hop(NextHop::Gateway);
    for guest in [&tenants.red, &tenants.blue] {
        let wire = PacketSocket::open(guest.netns(), "eth0");
        guest.assert_hostname_served();
        assert_eq!(answered_by(&wire), guest.network.gateway_mac);
        let client = &tenants.attachment(guest)["clients"][0];
        assert_eq!(client["metadata_mac"], guest.network.gateway_mac.to_string());
    }
    assert_eq!(tenants.process.packets(Reason::ArpReply), 0);
}

#[test]
fn on_link_replies_have_the_mac_from_arp() {
    let tenants = by_next_hop(NextHop::OnLink);
    let metadata_mac = MacAddress(METADATA_MAC);
    for guest in [&tenants.red, &tenants.blue] {
        let wire = PacketSocket::open(guest.netns(), "eth0");
        guest.assert_hostname_served();
        assert_eq!(answered_by(&wire), metadata_mac);
        let neighbour = guest.netns().run(&["ip", "neigh", "show", "169.254.169.254", "dev", "eth0"]);
        assert!(neighbour.contains(&format!("lladdr {metadata_mac} ")), "{neighbour}");
    }
    assert!(tenants.process.packets(Reason::ArpReply) >= 2);
}

/// Sends an ICMP echo request with this payload and returns the payload of the reply.
fn ping(guest: &Guest, payload: &[u8]) -> Vec<u8> {
    const IPV4_LEN: usize = 20;
    let echo = IcmpEchoHeader { id: 0x4d44, seq: 1 };
    let header = Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), payload);
    guest.netns().enter(|| {
        let mut socket =
            Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).expect("a socket for ICMP");
        socket.set_read_timeout(Some(PATIENCE)).expect("be patient");
        socket
            .connect(&SocketAddr::from((METADATA_IPV4, 0)).into())
            .expect("connect to the metadata service");
        socket.write_all(&[&header.to_bytes()[..], payload].concat()).expect("send an echo request");
        let mut packet = [0; 2048];
        let length = socket.read(&mut packet).expect("an echo reply");
        let (reply, payload) = Icmpv4Header::from_slice(&packet[IPV4_LEN..length]).expect("ICMP");
        assert_eq!(reply.icmp_type, Icmpv4Type::EchoReply(echo));
        assert_eq!(reply.checksum, reply.icmp_type.calc_checksum(payload));
        payload.to_vec()
    })
}

#[test]
fn the_metadata_service_answers_to_ping() {
    for next_hop in [NextHop::Gateway, NextHop::OnLink] {
        let tenants = by_next_hop(next_hop);
        let long: Vec<u8> = (0..=255).cycle().take(1400).collect();
        for guest in [&tenants.red, &tenants.blue] {
            for payload in [&b""[..], b"odd", &long] {
                assert_eq!(ping(guest, payload), payload, "{next_hop:?}");
            }
        }
        assert_eq!(tenants.process.packets(Reason::EchoReply), 6);
    }
}

#[test]
fn a_vlan_tagged_metadata_frame_is_passed_on_and_counted() {
    let tenants =
        ServedTenants::with(|agent, red, blue| agent.port(&red.port).port(&blue.port).without_probes());
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let legacies = [red.network.legacy(), blue.network.legacy()];
    for ((guest, legacy), port) in [red, blue].iter().zip(&legacies).zip([41_000, 41_001]) {
        let wire = PacketSocket::open(guest.netns(), "eth0");
        let beyond = PacketSocket::open(legacy.netns(), "eth0");
        let address: Ipv4Addr = guest.port.ipv4().expect("an address");
        let syn = PacketBuilder::ethernet2(guest.port.mac.0, guest.network.gateway_mac.0)
            .single_vlan(VlanId::try_new(7).expect("twelve bits"))
            .ipv4(address.octets(), METADATA_IPV4, 64)
            .tcp(port, 80, 1, 64_240)
            .syn();
        let mut frame = Vec::new();
        syn.write(&mut frame, &[]).expect("a frame");
        wire.send(&frame);
        // The kernel shows the frame without the four bytes of the tag.
        let untagged = [&frame[..12], &frame[16..]].concat();
        beyond.wait_for("tagged SYN", |arrived| (arrived == untagged).then_some(()));
    }
    assert_eq!(process.packets(Reason::Vlan), 2);
    assert_eq!(process.packets(Reason::ConnectionOpened), 0);
    for guest in [red, blue] {
        guest.assert_hostname_served();
    }
    assert_eq!(nova.requests().len(), 2);
}

#[test]
fn a_tap_that_leaves_its_bridge_and_comes_back_stays_attached() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, red, blue, host, .. } = &tenants;
    let before = tenants.attachment(red);
    let mut connection = red.connect();
    let mut get = || connection.request("GET", HOSTNAME, &[], b"").expect("an answer").text().to_owned();
    assert_eq!(get(), red.hostname());

    let leave = || host.netns().ip(&format!("link set {} nomaster", red.tap));
    let come_back = || red.network.enslave(&red.tap);
    let steps: [(&dyn Fn(), [u8; 4]); 2] = [(&leave, [10, 0, 0, 101]), (&come_back, [10, 0, 0, 102])];
    for (step, newcomer) in steps {
        step();
        // Link events arrive in order: once the agent knows a later link, it has processed the
        // change.
        let newcomer = blue.network.guest(newcomer);
        wait::until("the agent has seen it", PATIENCE, || {
            let state = process.state();
            let attachments = state["attachments"].as_array().expect("attachments");
            attachments.iter().any(|attachment| attachment["interface"] == newcomer.tap).then_some(())
        });
        let now = tenants.attachment(red);
        assert_eq!(now["attachment"], before["attachment"]);
        assert_eq!(now["identity"], "known");
        assert_eq!(get(), red.hostname());
        red.assert_hostname_served();
    }
    blue.assert_hostname_served();
}

#[test]
fn nothing_remains_of_a_guest_that_left() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let red = host.network();
    // A bridge loses its initial MAC address when its last port leaves.
    drop(red.guest([10, 0, 0, 4]));
    let before = HostState::capture(&host);
    let agent = Agent::on(&host, &nova).install();
    let process = agent.start();
    let attachments = || process.state()["attachments"].as_array().map(Vec::len);
    for address in [[10, 0, 0, 5], [10, 0, 0, 6]] {
        let guest = red.guest(address);
        wait::until("it is attached", PATIENCE, || (attachments() == Some(1)).then_some(()));
        drop(guest);
        wait::until("it is detached", PATIENCE, || (attachments() == Some(0)).then_some(()));
    }
    let log = process.output();
    let is_clean = !log.contains("cannot remove");
    assert!(log.contains("guest interface detached") && is_clean, "{log}");
    // `detach` must not find anything either.
    process.kill9();
    agent.detach();
    before.assert_same(&HostState::capture(&host));
}
