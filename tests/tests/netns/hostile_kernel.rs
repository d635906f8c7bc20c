//! Guests that try to use up what the programs share, or to receive what is another guest's.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, PerCpuArray};
use etherparse::PacketBuilder;
use metadata_ebpf::abi::names;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV4;
use metadata_ebpf::reason::Reason;
use metadata_tests::agent::Installer;
use metadata_tests::two_tenants::{HOSTNAME, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, Guest, Host, Instance, Mode, Netns, Network, NovaStandIn, PacketSocket, Routed, Router,
    ServedTenants,
};
use nix::net::if_::if_nametoindex;

/// An EtherType for local experiments (IEEE 802).
const MARKER: [u8; 2] = [0x88, 0xb5];

/// Reads a kernel counter while the agent cannot be asked.
fn counted(host: &Host, reason: Reason) -> u64 {
    let map = MapData::from_pin(host.bpffs().join("metadata").join(names::STATS)).expect("open MD_STATS");
    let stats = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(map)).expect("MD_STATS");
    stats.get(&reason.index(), 0).expect("a counter").iter().sum()
}

/// Removes the tap of a guest and puts one with the same index, name and MAC address in its place,
/// which leads to another namespace.
fn replace_tap(host: &Host, network: &Network, guest: &Guest) -> Netns {
    let tap = &guest.tap;
    let index = host.netns().enter(|| if_nametoindex(tap.as_str())).expect("its index");
    let successor = Netns::new("guest");
    host.netns().ip(&format!(
        "link del {tap}\n\
         link add {tap} index {index} type veth peer name eth0 address {mac} netns {name}\n\
         link set {tap} master {bridge}",
        mac = guest.port.mac,
        name = successor.name(),
        bridge = network.bridge,
    ));
    successor.ip("link set eth0 up");
    successor
}

/// Panics if a segment of the metadata service has reached the interface, whose other end is the
/// tap.
fn assert_no_answer_arrived(wire: &PacketSocket, host: &Host, tap: &str) {
    let marker = [&[0xff; 6][..], &[2; 6], &MARKER, &[0; 46]].concat();
    PacketSocket::open(host.netns(), tap).send(&marker);
    wire.wait_for("marker", |frame| {
        let is_answer = frame.get(12..14) == Some(&[8, 0]) && frame.get(26..30) == Some(&METADATA_IPV4);
        assert!(!is_answer, "an answer to the former guest: {frame:02x?}");
        (frame.get(12..14) == Some(&MARKER)).then_some(())
    });
}

#[test]
fn a_reused_interface_index_receives_no_pending_answer() {
    for mode in ["tcx", "clsact"] {
        let tenants = ServedTenants::with(|installer, red, blue| {
            installer.port(&red.port).port(&blue.port).set("metadata_agent", "attach_mode", mode)
        });
        let ServedTenants { process, nova, red, host, .. } = &tenants;
        nova.set_mode(Mode::Hold);
        let mut connection = red.connect();
        connection.send(format!("GET {HOSTNAME} HTTP/1.1\r\nHost: x\r\n\r\n")).expect("a request");
        nova.wait_for(1, PATIENCE);
        let successor = replace_tap(host, &red.network, red);
        let wire = PacketSocket::open(&successor, "eth0");
        host.netns().ip(&format!("link set {} up", red.tap));
        nova.set_mode(Mode::Serve);
        wait::until("the answer is dropped", PATIENCE, || {
            let dropped = process.packets(Reason::NoClient) + process.packets(Reason::InterfaceGone);
            (dropped > 0).then_some(())
        });
        assert_no_answer_arrived(&wire, host, &red.tap);
    }
}

/// The kernel retransmits the answer, and no agent has noticed that the interface is another one.
/// When the agent goes on, it must not take the new interface for the old one.
#[test]
fn a_reused_index_is_noticed_without_the_agent() {
    for mode in ["tcx", "clsact"] {
        let tenants = ServedTenants::with(|installer, red, blue| {
            installer.port(&red.port).port(&blue.port).set("metadata_agent", "attach_mode", mode)
        });
        let ServedTenants { process, nova, red, host, .. } = &tenants;
        let before = process.attachments()[&red.tap];
        nova.set_mode(Mode::Hold);
        let mut connection = red.connect();
        connection.send(format!("GET {HOSTNAME} HTTP/1.1\r\nHost: x\r\n\r\n")).expect("a request");
        nova.wait_for(1, PATIENCE);
        red.netns().ip("link set eth0 down");
        nova.set_mode(Mode::Serve);
        wait::until("the answer is written", PATIENCE, || {
            (process.count("metadata_requests_total{code=\"200\"}") == 1).then_some(())
        });
        process.freeze();

        let successor = replace_tap(host, &red.network, red);
        let wire = PacketSocket::open(&successor, "eth0");
        host.netns().ip(&format!("link set {} up", red.tap));
        wait::until("a retransmission is dropped", PATIENCE, || {
            (counted(host, Reason::InterfaceGone) > 0).then_some(())
        });
        assert_no_answer_arrived(&wire, host, &red.tap);

        process.thaw();
        let after = wait::until("the new interface is attached", PATIENCE, || {
            process.attachments().get(&red.tap).copied().filter(|id| *id != before)
        });
        assert!(after > before, "{mode}: {after}");
        let output = process.output();
        assert!(!output.contains("BPF program reattached"), "{mode}: under its former id: {output}");
    }
}

/// Builds a SYN, or an ACK as if the handshake were complete.
fn segment(mac: [u8; 6], from: Ipv4Addr, to_mac: [u8; 6], port: u16, is_syn: bool) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(mac, to_mac).ipv4(from.octets(), METADATA_IPV4, 64);
    let step = step.tcp(port, 80, 0x1234, 64_240);
    let step = if is_syn { step.syn() } else { step.ack(0x5678) };
    let mut frame = Vec::new();
    step.write(&mut frame, &[]).expect("a vector takes all");
    frame
}

/// Returns an address in 10.x.0.0/20, beyond its first 256.
fn made_up(second: u8, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0100 + (u32::from(second) << 16) + number % 0xe00)
}

/// Returns the number of clients that `/state` shows behind an interface.
fn shown_clients(state: &serde_json::Value, interface: &str) -> usize {
    let attachments = state["attachments"].as_array().expect("attachments");
    let found = attachments.iter().find(|attachment| attachment["interface"] == interface);
    found.expect("it is attached")["clients"].as_array().expect("clients").len()
}

/// Neither a SYN nor an ACK that guesses the rest of the handshake leaves anything behind.
#[test]
fn half_open_connections_leave_no_record() {
    let tenants = ServedTenants::with(|installer, red, blue| {
        let installer = installer.port(&red.port).port(&blue.port);
        installer.set("metadata_agent", "source_check", "off").set("metadata_agent", "syn_rate_limit", "0")
    });
    let ServedTenants { process, red, blue, .. } = &tenants;
    let wire = PacketSocket::open(red.netns(), "eth0");
    let opened = process.packets(Reason::ConnectionOpened);
    for number in 0..1000 {
        for is_syn in [true, false] {
            wire.send(&segment(red.port.mac.0, made_up(0, number), METADATA_MAC, 40_000, is_syn));
        }
    }
    wait::until("all SYNs are redirected", PATIENCE, || {
        (process.packets(Reason::ConnectionOpened) - opened >= 1000).then_some(())
    });
    red.assert_hostname_served();
    blue.assert_hostname_served();
    for guest in [red, blue] {
        assert_eq!(shown_clients(&process.state(), &guest.tap), 1);
    }
}

/// A port with an address pair of 0.0.0.0/0 and many containers behind it.
#[test]
fn all_of_320_addresses_behind_one_port_are_served() {
    let tenants = ServedTenants::with(|installer, red, blue| {
        let mut port = red.port.clone();
        port.allowed_addresses = vec!["0.0.0.0/0".parse().expect("a prefix")];
        installer.port(&port).port(&blue.port)
    });
    let ServedTenants { process, red, blue, .. } = &tenants;
    let addresses: Vec<Ipv4Addr> = (0..320).map(|number| made_up(9, number)).collect();
    let mut batch = String::new();
    for address in &addresses {
        writeln!(batch, "address add {address}/32 dev eth0").expect("write to a String");
    }
    red.netns().ip(&batch);
    let mut open = Vec::new();
    for (number, address) in addresses.iter().enumerate() {
        let mut connection = red.connect_from(SocketAddr::from((*address, 0)));
        let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
        assert_eq!((answer.status, answer.text()), (200, red.hostname().as_str()), "{address}");
        // The first ones stay open.
        if number < 64 {
            open.push(connection);
        }
    }
    for connection in &mut open {
        let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer after all others");
        assert_eq!(answer.status, 200);
    }
    red.assert_hostname_served();
    blue.assert_hostname_served();
    assert_eq!(shown_clients(&process.state(), &red.tap), 321);
}

/// One tenant has a router with 33 networks and sends as many SYNs from as many addresses as each
/// of them allows.
#[test]
fn made_up_clients_on_33_networks_keep_nobody_out() {
    const NETWORKS: u8 = 33;
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let mut router = Router::new(&host);
    let mut ports = Vec::new();
    let mut attackers = Vec::new();
    for number in 1..=NETWORKS {
        let network = host.network_at(Ipv4Addr::new(10, number, 0, 1), 20);
        ports.push(router.add(&network));
        attackers.push((network.guest([10, number, 0, 5]), network));
    }
    let elsewhere = host.network();
    let on_a_tap = elsewhere.guest([10, 0, 0, 5]);
    let behind_the_router = attackers[0].1.guest([10, 1, 0, 6]);
    for guest in [&on_a_tap, &behind_the_router] {
        nova.add(Instance::from_port(&guest.port));
        ports.push(guest.port.clone());
    }
    let installer = Agent::on(&host, &nova).set("metadata_agent", "namespaces", router.netns().name()).set(
        "metadata_agent",
        "guest_interfaces",
        &on_a_tap.tap,
    );
    let installer = ports.iter().fold(installer, Installer::port);
    let process = installer.install().start();

    for (number, (guest, network)) in (1..).zip(&attackers) {
        let wire = PacketSocket::open(guest.netns(), "eth0");
        for source in 0..4100 {
            let from = made_up(number, source);
            wire.send(&segment(guest.port.mac.0, from, network.gateway_mac.0, 40_000, true));
        }
    }
    wait::until("SYNs are refused", PATIENCE, || (process.packets(Reason::GuestSynRate) > 0).then_some(()));
    assert_served(&on_a_tap);
    assert_served(&behind_the_router);
    let state = process.state();
    let attachments = state["attachments"].as_array().expect("attachments");
    let clients: usize =
        attachments.iter().map(|attachment| attachment["clients"].as_array().map_or(0, Vec::len)).sum();
    assert_eq!(clients, 2, "only those that completed a handshake");
}

/// Sends SYNs from a guest's interface at a fixed rate until the value is dropped.
fn flood<T>(guest: &Guest, rate: u32, frames: &[Vec<u8>], work: impl FnOnce() -> T) -> T {
    let wire = PacketSocket::open(guest.netns(), "eth0");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (began, mut sent) = (Instant::now(), 0_usize);
            let mut frames = frames.iter().cycle();
            while !over.load(Ordering::Relaxed) && began.elapsed() < PATIENCE {
                let due = began.elapsed().as_micros() * u128::from(rate) / 1_000_000;
                let due = usize::try_from(due).expect("a number of frames");
                for frame in frames.by_ref().take(due.saturating_sub(sent)) {
                    wire.send(frame);
                }
                sent = due;
                thread::park_timeout(Duration::from_millis(1));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A neighbour behind the same interface is served beside 10,000 SYNs per second of one guest,
/// whether they come from its own address or from made-up ones.
#[test]
fn a_neighbour_is_served_beside_a_syn_flood() {
    for is_made_up in [false, true] {
        let routed = Routed::new();
        let neighbour = routed.network.guest([10, 0, 0, 6]);
        routed.nova.add(Instance::from_port(&neighbour.port));
        let process = routed.agent().port(&neighbour.port).install().start();
        let attacker = &routed.guest;
        let frame = |number: u32| {
            let host = if is_made_up { 7 + number % 200 } else { 5 };
            let from = Ipv4Addr::from(0x0a00_0000 + host);
            let port = 1024 + u16::try_from(number % 60_000).expect("a port");
            segment(attacker.port.mac.0, from, routed.network.gateway_mac.0, port, true)
        };
        let frames: Vec<Vec<u8>> = (0..20_000).map(frame).collect();
        flood(attacker, 10_000, &frames, || {
            wait::until("SYNs are refused", PATIENCE, || {
                (process.packets(Reason::GuestSynRate) > 1000).then_some(())
            });
            for _ in 0..40 {
                // Less than the first retransmission of a SYN.
                let connection = neighbour.dial(neighbour.metadata_ipv4(), None, Duration::from_millis(900));
                let answer = connection.expect("a connection at once").request("GET", HOSTNAME, &[], b"");
                assert_eq!(answer.expect("an answer").status, 200, "{is_made_up}");
            }
        });
        assert_eq!(process.packets(Reason::SynRate), 0, "{is_made_up}: the interface has room");
    }
}

/// Behind a shared interface a guest cannot choose its IPv6 address.
#[test]
fn a_chosen_link_local_address_behind_a_router_is_not_served() {
    const CHOSEN: &str = "fe80::1234:5678:9abc:def0";
    let routed = Routed::new();
    let process = routed.agent().install().start();
    let guest = &routed.guest;
    let to = guest.metadata_ipv6();
    assert_eq!(guest.get_v6(HOSTNAME).status, 200, "its derived address");
    guest.netns().ip(&format!("address add {CHOSEN}/64 dev eth0 nodad"));
    let from = CHOSEN.parse::<IpAddr>().expect("an address");
    let SocketAddr::V6(scoped) = to else { unreachable!("an IPv6 address") };
    let IpAddr::V6(from) = from else { unreachable!("an IPv6 address") };
    let source = std::net::SocketAddrV6::new(from, 0, 0, scoped.scope_id());
    let refused = guest.dial(to, Some(source.into()), Duration::from_millis(1500));
    assert!(refused.is_err(), "no connection");
    assert!(process.packets(Reason::Confined) + process.packets(Reason::Ipv6Underived) > 0);
}
