//! Guests that use fe80::a9fe:a9fe: resolved by neighbour discovery, served from any link-local
//! address, and distinguished by their interface.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::thread;

use etherparse::{IcmpEchoHeader, Icmpv6Header, Icmpv6Type, PacketBuilder};
use metadata_agent::ids::MacAddress;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV6;
use metadata_ebpf::reason::Reason;
use metadata_tests::two_tenants::{ADDRESS, HOSTNAME};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, Guest, GuestSpec, Host, Instance, NovaStandIn, PacketSocket, ServedTenants, Tenant, TwoTenants,
};
use socket2::{Domain, Protocol, Socket, Type};

/// The address of both tenants' guests, which EUI-64 would never generate.
const STABLE_PRIVACY: &str = "fe80::9c1f:55aa:7d2:4e31";

/// Returns an address of `guest` on its link, as a source to connect from.
fn source(guest: &Guest, address: &str) -> SocketAddr {
    let SocketAddr::V6(metadata) = guest.metadata_ipv6() else { unreachable!("it is IPv6") };
    let address: Ipv6Addr = address.parse().expect("an address");
    SocketAddrV6::new(address, 0, 0, metadata.scope_id()).into()
}

fn add_address(guest: &Guest, address: &str) {
    guest.netns().ip(&format!("address add {address}/64 dev eth0 nodad"));
}

fn hostname_from(guest: &Guest, source: Option<SocketAddr>) -> String {
    let mut connection = guest.dial(guest.metadata_ipv6(), source, PATIENCE).expect("a connection over IPv6");
    connection.request("GET", HOSTNAME, &[], b"").expect("an answer").text().to_owned()
}

/// Any link-local address is accepted.
#[test]
fn two_tenants_may_use_the_same_link_local_address() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    for guest in [red, blue] {
        // The kernel's own EUI-64 address, after duplicate address detection.
        let eui64 = guest.connect_v6().request("GET", HOSTNAME, &[], b"").expect("an answer");
        assert_eq!((eui64.status, eui64.text()), (200, guest.hostname().as_str()));
        add_address(guest, STABLE_PRIVACY);
    }
    let same = |guest: &Tenant| hostname_from(guest, Some(source(guest, STABLE_PRIVACY)));
    assert_eq!(same(red), red.hostname());
    assert_eq!(same(blue), blue.hostname());

    let [.., of_red, of_blue] = &nova.requests()[..] else { panic!("four requests") };
    for request in [of_red, of_blue] {
        assert_eq!(request.header("x-forwarded-for").as_deref(), Some(STABLE_PRIVACY));
    }
    for guest in [red, blue] {
        let clients = tenants.attachment(guest)["clients"].clone();
        let addresses: Vec<_> = clients.as_array().expect("clients").iter().map(|c| &c["address"]).collect();
        assert_eq!(addresses.len(), 2, "{clients}");
        assert!(addresses.contains(&&STABLE_PRIVACY.into()), "{clients}");
        let neighbours = guest.netns().run(&["ip", "-6", "neigh", "show", "fe80::a9fe:a9fe", "dev", "eth0"]);
        assert!(neighbours.contains(&format!("lladdr {} ", MacAddress(METADATA_MAC))), "{neighbours}");
    }
    assert!(process.packets(Reason::NdReply) >= 2);
}

#[test]
fn bodies_of_any_size_pass_both_ways() {
    let tenants = ServedTenants::new();
    let red = &tenants.red;
    let large: Vec<u8> = (0..=250).cycle().take(900_000).collect();
    tenants.nova.add(Instance { user_data: Some(large.clone()), ..Instance::from_port(&red.port) });
    let answer = red.get_v6("/openstack/latest/user_data");
    assert_eq!(answer.status, 200);
    assert!(answer.body == large, "{} bytes came", answer.body.len());
    let password = vec![b'x'; 1000];
    let posted = red
        .connect_v6()
        .request("POST", "/openstack/2013-04-04/password", &[], &password)
        .expect("an answer to a POST");
    assert_eq!(posted.status, 200);
    assert_eq!(tenants.nova.requests().last().expect("the POST").body, password);
}

/// The ports do not have a fixed address, so Nova gets the address that the guest uses.
#[test]
fn a_network_without_ipv4_is_served() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let without_ipv4 = |mut spec: GuestSpec| {
        spec.port.fixed_ips = vec!["2001:db8::5".parse().expect("an address")];
        spec
    };
    let tenants = TwoTenants::on(host, nova, without_ipv4)
        .serve(|installer, red, blue| installer.port(&red.port).port(&blue.port));
    for guest in [&tenants.red, &tenants.blue] {
        assert_eq!(guest.get_v6(HOSTNAME).text(), guest.hostname());
    }
    for request in tenants.nova.requests() {
        assert_eq!(request.header("x-forwarded-for").as_deref(), Some("2001:db8::5"));
    }
}

#[test]
fn the_address_answers_to_ping() {
    let tenants = ServedTenants::new();
    let red = &tenants.red;
    red.get_v6(HOSTNAME);
    let long: Vec<u8> = (0..=255).cycle().take(1400).collect();
    for payload in [&b""[..], b"odd", &long] {
        let echo = IcmpEchoHeader { id: 0x4d44, seq: 1 };
        let reply = red.netns().enter(|| {
            let mut socket =
                Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).expect("a socket for ICMPv6");
            socket.set_read_timeout(Some(PATIENCE)).expect("be patient");
            socket.connect(&red.metadata_ipv6().into()).expect("connect to the metadata address");
            // The kernel computes the checksum (RFC 3542 section 3.1) and verifies that of the
            // reply.
            let header = Icmpv6Header { icmp_type: Icmpv6Type::EchoRequest(echo), checksum: 0 };
            socket.write_all(&[&header.to_bytes()[..], payload].concat()).expect("send an echo request");
            let mut message = [0; 2048];
            loop {
                let length = socket.read(&mut message).expect("an echo reply");
                let (header, payload) = Icmpv6Header::from_slice(&message[..length]).expect("ICMPv6");
                if header.icmp_type == Icmpv6Type::EchoReply(echo) {
                    break payload.to_vec();
                }
            }
        });
        assert_eq!(reply, payload);
    }
    assert_eq!(tenants.process.packets(Reason::EchoReply), 3);
}

/// Two guests of one network. A claim of one must not reach the other.
#[test]
fn claiming_the_metadata_address_reaches_no_neighbour() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, red, .. } = &tenants;
    let neighbour = red.network.guest([10, 0, 0, 6]);
    let wire = PacketSocket::open(neighbour.netns(), "eth0");

    // By duplicate address detection: the guest learns that the address is in use.
    red.netns().sysctl("ipv6/conf/eth0/accept_dad", "1");
    red.netns().ip("address add fe80::a9fe:a9fe/64 dev eth0");
    wait::until("duplicate address detection has failed", PATIENCE, || {
        let addresses = red.netns().run(&["ip", "-6", "address", "show", "dev", "eth0"]);
        let ours = addresses.lines().find(|line| line.contains("fe80::a9fe:a9fe"));
        ours.is_none_or(|line| line.contains("dadfailed")).then_some(())
    });
    red.netns().ip("address del fe80::a9fe:a9fe/64 dev eth0");

    // By an unsolicited advertisement, from the guest's own address and from the metadata address.
    let sender = PacketSocket::open(red.netns(), "eth0");
    let all_nodes: Ipv6Addr = "ff02::1".parse().expect("an address");
    let mac = red.port.mac.0;
    let body = [&METADATA_IPV6[..], &[2, 1], &mac].concat();
    let advertise = |source: [u8; 16], target: &[u8]| {
        let step =
            PacketBuilder::ethernet2(mac, [0x33, 0x33, 0, 0, 0, 1]).ipv6(source, all_nodes.octets(), 255);
        let mut frame = Vec::new();
        step.icmpv6_raw(136, 0, [0x20, 0, 0, 0]).write(&mut frame, target).expect("a frame");
        sender.send(&frame);
    };
    let own: Ipv6Addr = STABLE_PRIVACY.parse().expect("an address");
    advertise(own.octets(), &body);
    advertise(METADATA_IPV6, &body);
    // An advertisement of the guest's own address passes. Its arrival shows that the earlier frames
    // have been processed.
    let harmless = [&own.octets()[..], &[2, 1], &mac].concat();
    advertise(own.octets(), &harmless);
    wire.wait_for("advertisement of the guest's own address", |frame| {
        let message = frame.get(54..)?;
        let is_discovery = frame.get(12..14)? == [0x86, 0xdd] && *frame.get(20)? == 58;
        let target = message.get(8..24)?;
        assert!(!is_discovery || target != METADATA_IPV6, "the claim came through: {frame:02x?}");
        (is_discovery && message[0] == 136 && target == own.octets()).then_some(())
    });
    assert_eq!(process.packets(Reason::ForgedNd), 2);
    red.assert_hostname_served();
}

/// cloud-init probes both addresses at once. A quick error over IPv6 would end its search
/// (url_helper.py, `dual_stack`).
#[test]
fn both_families_are_held_until_the_port_is_identified() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let network = host.network();
    let guest = network.guest(ADDRESS);
    nova.add(Instance::from_port(&guest.port));
    let agent = Agent::on(&host, &nova).install();
    let process = agent.start();
    process.wait_for_attachments([guest.tap.as_str()]);
    thread::scope(|scope| {
        let over_ipv6 = scope.spawn(|| guest.get_v6("/openstack"));
        let over_ipv4 = scope.spawn(|| guest.get("/openstack"));
        wait::until("both wait", PATIENCE, || {
            (process.count("metadata_connections_open") == 2).then_some(())
        });
        agent.set_ports([&guest.port]);
        for answer in [over_ipv6, over_ipv4] {
            assert_eq!(answer.join().expect("an answer").status, 200);
        }
    });
}
