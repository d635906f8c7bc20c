//! Guests that pass answers on to something behind a smaller MTU.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};

use etherparse::PacketBuilder;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6};
use metadata_ebpf::reason::Reason;
use metadata_tests::netns::Netns;
use metadata_tests::two_tenants::ADDRESS;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Connection, Instance, PacketSocket, ServedTenants, Tenant};
use nix::net::if_::if_nametoindex;

const USER_DATA: &str = "/openstack/latest/user_data";

/// Gives the guest 100 kB of user data and returns them.
fn long_answer(tenants: &ServedTenants, guest: &Tenant) -> Vec<u8> {
    let long: Vec<u8> = (0..=250).cycle().take(100_000).collect();
    tenants.nova.add(Instance { user_data: Some(long.clone()), ..Instance::from_port(&guest.port) });
    long
}

/// Requests the user data from inside a namespace.
fn user_data(inner: &Netns, metadata: SocketAddr) -> Vec<u8> {
    let stream = inner.enter(|| TcpStream::connect_timeout(&metadata, PATIENCE)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("be patient");
    let answer = Connection::new(stream).request("GET", USER_DATA, &[], b"").expect("a whole answer");
    assert_eq!(answer.status, 200);
    answer.body
}

/// Creates a namespace for which the guest routes and translates addresses. The link to it has this
/// MTU, which only the guest knows.
fn behind_guest(guest: &Tenant, mtu: u32) -> Netns {
    let inner = Netns::new("inner");
    guest.netns().ip(&format!(
        "link add inner mtu {mtu} type veth peer name eth0 mtu 1500 netns {}\n\
         address add 172.30.0.1/24 dev inner\nlink set inner up",
        inner.name()
    ));
    inner.ip("address add 172.30.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 172.30.0.1");
    guest.netns().sysctl("ipv4/ip_forward", "1");
    let rule = "-t nat -A POSTROUTING -s 172.30.0.0/24 -o eth0 -j MASQUERADE";
    guest.netns().run(&std::iter::once("iptables").chain(rule.split(' ')).collect::<Vec<_>>());
    inner
}

#[test]
fn an_answer_reaches_a_namespace_behind_a_small_mtu() {
    let tenants = ServedTenants::new();
    for guest in [&tenants.red, &tenants.blue] {
        let long = long_answer(&tenants, guest);
        let inner = behind_guest(guest, 1300);
        assert!(user_data(&inner, guest.metadata_ipv4()) == long);
    }
    assert!(tenants.process.packets(Reason::IcmpError) >= 2);
}

/// The path MTU of a guest is an exception to the portal's route. Routes that other software adds
/// are damage, and the guard of the portal removes them.
#[test]
fn a_path_mtu_is_no_damage_to_the_portal() {
    let tenants = ServedTenants::new();
    let ServedTenants { agent, host, process, red, .. } = &tenants;
    let long = long_answer(&tenants, red);
    let inner = behind_guest(red, 1300);
    assert!(user_data(&inner, red.metadata_ipv4()) == long);
    let in_portal = |command: &str| {
        let ip = ["ip", "netns", "exec", agent.portal(), "ip", "-6"];
        host.netns().run(&ip.into_iter().chain(command.split(' ')).collect::<Vec<_>>())
    };
    assert!(in_portal("route show cache").contains(" mtu 1"), "the portal has an exception");
    // The guard compares routes after any damage.
    in_portal("neigh del fe80::1 dev md0");
    wait::until("the damage is repaired", PATIENCE, || {
        (process.metric("metadata_damage_total{kind=\"neighbour\"}") >= 1.0).then_some(())
    });
    process.wait_ready();
    assert_eq!(process.count("metadata_damage_total{kind=\"route\"}"), 0);
}

/// The second line of defence (`tcp_mtu_probing`): no ICMP error arrives, or it names an MTU that
/// IPv6 does not have.
#[test]
fn the_portal_finds_a_small_mtu_by_itself() {
    let tenants = ServedTenants::new();
    let (silent, small) = (&tenants.red, &tenants.blue);
    silent.netns().run(&["iptables", "-A", "OUTPUT", "-p", "icmp", "-j", "DROP"]);
    for (guest, mtu) in [(silent, 1300), (small, 1000)] {
        let long = long_answer(&tenants, guest);
        let inner = behind_guest(guest, mtu);
        assert!(user_data(&inner, guest.metadata_ipv4()) == long, "an MTU of {mtu}");
    }
    assert!(tenants.process.packets(Reason::IcmpError) > 0);
}

/// A VXLAN tunnel in a bridge of the guest sends "packet too big" by itself. A router does not
/// forward link-local addresses.
#[test]
fn an_answer_over_ipv6_passes_a_tunnel_in_the_guest() {
    let tenants = ServedTenants::new();
    let red = &tenants.red;
    let long = long_answer(&tenants, red);
    let inner = Netns::new("inner");
    // The port's MAC address moves into the inner namespace.
    red.netns().ip(&format!(
        "address flush dev eth0\nlink set eth0 address 02:00:00:00:00:99\n\
         link add under mtu 1350 type veth peer name under mtu 1350 netns {inner}\n\
         address add 172.30.0.1/24 dev under\nlink set under up\n\
         link add tunnel mtu 1500 type vxlan id 7 local 172.30.0.1 remote 172.30.0.2 dstport 4789\n\
         link add bridge type bridge mcast_snooping 0\n\
         link set tunnel master bridge\nlink set eth0 master bridge\n\
         link set tunnel up\nlink set bridge up",
        inner = inner.name()
    ));
    inner.ip(&format!(
        "address add 172.30.0.2/24 dev under\nlink set under up\n\
         link add eth0 address {} mtu 1500 type vxlan id 7 local 172.30.0.2 remote 172.30.0.1 dstport 4789\n\
         link set eth0 up",
        red.port.mac
    ));
    // The kernel lets an address be used a moment later, also without duplicate address detection.
    wait::until("the link-local address is usable", PATIENCE, || {
        let usable =
            inner.run(&["ip", "-6", "address", "show", "dev", "eth0", "scope", "link", "-tentative"]);
        (!usable.is_empty()).then_some(())
    });
    let index = inner.enter(|| if_nametoindex("eth0")).expect("an index");
    let metadata = SocketAddrV6::new(Ipv6Addr::from(METADATA_IPV6), 80, 0, index);
    assert!(user_data(&inner, metadata.into()) == long);
    assert!(tenants.process.packets(Reason::IcmpError) > 0);
}

/// Both guests have the same address, so the quoted packet is the same as well.
#[test]
fn an_icmp_error_reaches_no_connection_of_another_guest() {
    const PORT: u16 = 41_000;
    let tenants = ServedTenants::new();
    let ServedTenants { process, red, blue, .. } = &tenants;
    let _victim = blue.connect_from((IpAddr::from(ADDRESS), PORT).into());
    let quoted = {
        let mut packet = Vec::new();
        let step = PacketBuilder::ipv4(METADATA_IPV4, ADDRESS, 64).tcp(80, PORT, 1, 1);
        step.write(&mut packet, &[0; 1400]).expect("a packet");
        packet
    };
    let send = |guest: &Tenant, mac| {
        let step =
            PacketBuilder::ethernet2(mac, guest.network.gateway_mac.0).ipv4(ADDRESS, METADATA_IPV4, 64);
        let mut frame = Vec::new();
        step.icmpv4_raw(3, 4, [0, 0, 5, 0x14]).write(&mut frame, &quoted[..548]).expect("a frame");
        PacketSocket::for_sending(guest.netns(), "eth0").send(&frame);
    };
    let counts = || {
        [Reason::IcmpError, Reason::ForeignConnection, Reason::ForgedMac]
            .map(|reason| process.packets(reason))
    };
    send(red, red.port.mac.0);
    assert_eq!(counts(), [0, 1, 0]);
    send(red, blue.port.mac.0);
    assert_eq!(counts(), [0, 1, 1]);
    send(blue, blue.port.mac.0);
    assert_eq!(counts(), [1, 1, 1], "the connection exists");
}
