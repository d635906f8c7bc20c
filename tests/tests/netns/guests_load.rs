//! Many connections: all are served, each with the metadata of its own instance, and the excess of
//! one guest does not affect others.

use std::fs;
use std::net::SocketAddr;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use etherparse::PacketBuilder;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV4;
use metadata_ebpf::reason::Reason;
use metadata_tests::two_tenants::{ADDRESS, HOSTNAME};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, PacketSocket, ServedTenants, Tenant};

const OPEN: &str = "metadata_connections_open";
const OK: &str = "metadata_requests_total{code=\"200\"}";

/// Opens all connections, checks that all are open at the same time, then requests the host name on
/// each.
fn ask_at_once(process: &AgentProcess, from: &[(&Tenant, SocketAddr)]) {
    let together = Barrier::new(from.len() + 1);
    thread::scope(|scope| {
        for &(guest, source) in from {
            let together = &together;
            scope.spawn(move || {
                let connected = guest.dial(guest.metadata_ipv4(), Some(source), PATIENCE);
                // No thread may panic in between, or the others would wait for ever.
                together.wait();
                together.wait();
                let mut connection = connected.expect("a connection");
                let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
                assert_eq!((answer.status, answer.text()), (200, guest.hostname().as_str()), "{source}");
            });
        }
        together.wait();
        let all = from.len() as u64;
        let open = wait::poll(PATIENCE, || (process.count(OPEN) == all).then_some(()));
        together.wait();
        open.expect("the agent has all connections open");
    });
}

fn assert_all_closed(process: &AgentProcess) {
    wait::until("all connections are closed", PATIENCE, || (process.count(OPEN) == 0).then_some(()));
}

/// In sequence, and many at once.
#[test]
fn one_guest_opens_hundreds_of_connections() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    for _ in 0..200 {
        red.assert_hostname_served();
    }
    assert_eq!((process.count("metadata_connections_total"), process.count(OK)), (200, 200));
    let any_port = SocketAddr::from((ADDRESS, 0));
    ask_at_once(process, &[(red, any_port); 64]);
    blue.assert_hostname_served();
    assert_all_closed(process);

    assert_eq!((process.count("metadata_connections_total"), process.count(OK)), (265, 265));
    assert_eq!(nova.requests().len(), 265);
    // A SYN may be retransmitted, so the kernel may count more.
    assert!(process.packets(Reason::ConnectionOpened) >= 265);
    let clients = tenants.attachment(red)["clients"].take();
    assert_eq!(clients.as_array().map(Vec::len), Some(1), "{clients}");
    // Two CPUs that record one client at the same moment count once. Sequential connections are all
    // counted.
    assert!(clients[0]["connections"].as_u64() >= Some(200), "{clients}");
    let clients = tenants.attachment(blue)["clients"].take();
    assert!((1..10).contains(&clients[0]["connections"].as_u64().expect("a number")), "{clients}");
}

#[test]
fn two_guests_open_the_same_64_connections_at_once() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let sources = (42_000..42_032).map(|port| SocketAddr::from((ADDRESS, port)));
    let from: Vec<_> = sources.flat_map(|source| [(red, source), (blue, source)]).collect();
    ask_at_once(process, &from);
    assert_all_closed(process);
    assert_eq!(process.count("metadata_connections_total"), 64);
    assert!(process.packets(Reason::ConnectionOpened) >= 64);
    for guest in [red, blue] {
        let own = Some(guest.port.instance.to_string());
        let asked = nova.requests().iter().filter(|request| request.header("x-instance-id") == own).count();
        assert_eq!(asked, 32);
        let clients = tenants.attachment(guest)["clients"].take();
        assert_eq!(clients.as_array().map(Vec::len), Some(1), "{clients}");
        // Connections that are opened before the first one is complete are not counted.
        assert!((1..=64).contains(&clients[0]["connections"].as_u64().expect("a number")), "{clients}");
    }
}

#[test]
fn only_the_guest_that_connects_too_often_is_slowed_down() {
    // Less than the kernel's first retransmission of a SYN: a connection within this time was
    // admitted at once.
    const AT_ONCE: Duration = Duration::from_millis(800);
    let tenants = ServedTenants::with(|installer, red, blue| {
        let installer = installer.port(&red.port).port(&blue.port);
        installer.set("metadata_agent", "syn_rate_limit", "5").set("metadata_agent", "syn_burst", "2")
    });
    let ServedTenants { process, red, blue, .. } = &tenants;
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| red.assert_hostname_served());
        }
        wait::until("red is too fast", PATIENCE, || (process.packets(Reason::SynRate) > 0).then_some(()));
        for _ in 0..2 {
            let connection = blue.dial(blue.metadata_ipv4(), None, AT_ONCE);
            let answer = connection.expect("a connection").request("GET", HOSTNAME, &[], b"");
            assert_eq!(answer.expect("an answer").text(), blue.hostname());
        }
    });
    assert_eq!(process.count("metadata_connections_total"), 8);
}

/// Simulates the effect of a SYN flood: the portal's listener answers with cookies and keeps no
/// state, so that the final ACK of a handshake finds only the listener.
#[test]
fn syn_cookie_handshakes_are_served_and_forged_acks_are_not() {
    let scene = ServedTenants::new();
    let portal =
        metadata_agent::net::netns::Netns::named(scene.agent.portal()).expect("readable").expect("there");
    let in_portal = |work: fn() -> u64| portal.run(work).expect("the portal is entered");
    in_portal(|| {
        // 2: always, not only when the queue is full.
        fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("the portal's own setting");
        0
    });

    let received = in_portal(cookies_received);
    scene.red.assert_hostname_served();
    scene.blue.assert_hostname_served();
    assert_eq!(in_portal(cookies_received) - received, 2, "both handshakes ended with a cookie");

    // An ACK without a handshake, as from a guessing guest, is not ours.
    let foreign = scene.process.packets(Reason::ForeignConnection);
    let [a, b, c, d] = scene.red.port.ipv4().expect("an IPv4 port").octets();
    let wire = PacketSocket::open(scene.red.netns(), "eth0");
    let ack = PacketBuilder::ethernet2(scene.red.port.mac.0, METADATA_MAC)
        .ipv4([a, b, c, d], METADATA_IPV4, 64)
        .tcp(40_123, 80, 0x1234, 502)
        .ack(0x5678);
    let mut frame = Vec::new();
    ack.write(&mut frame, &[]).expect("a vector takes all");
    wire.send(&frame);
    wait::until("the forged ACK is passed on", PATIENCE, || {
        (scene.process.packets(Reason::ForeignConnection) > foreign).then_some(())
    });
}

/// Returns `SyncookiesRecv` of the thread's namespace: handshakes completed with a valid cookie.
fn cookies_received() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/netstat").expect("the namespace's own figures");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(name, _)| *name == "SyncookiesRecv").expect("the counter");
    value.parse().expect("a number")
}
