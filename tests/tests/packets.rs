//! The packet table, once through the host build of the programs and once through the kernel (`BPF_PROG_TEST_RUN`).
#![expect(clippy::expect_used, clippy::panic, reason = "a step that fails, fails the test")]

use std::net::{SocketAddrV6, TcpListener, TcpStream};
use std::path::Path;

use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use etherparse::{LaxPacketHeaders, NetHeaders, TransportHeader};
use metadata_agent::datapath::{Clock, OBJECT, PROGRAMS};
use metadata_agent::netlink::Netlink;
use metadata_agent::netns::Netns as AgentNetns;
use metadata_agent::portal::Portal;
use metadata_ebpf::abi::{ABI_VERSION, Client, ClientKey, Gate, Port, PortKey, Settings, names};
use metadata_ebpf::from_guest::from_guest;
use metadata_ebpf::host::{HostSkb, HostWorld};
use metadata_ebpf::identity::PORTAL_ADDRESS;
use metadata_ebpf::reason::{Reason, Verdict};
use metadata_ebpf::skb::Vlan;
use metadata_ebpf::to_guest::to_guest;
use metadata_tests::bpffs::Bpffs;
use metadata_tests::netns::Netns;
use metadata_tests::packets::{
    ATTACHMENT, CONNECTED_PORT, Case, GUEST_MAC, NETWORK, PORTAL_MAC, Program, ROUTER_MAC, State, cases,
    identity, identity_v6, port,
};
use tokio::runtime::{Builder, Runtime};

/// The loopback interface, on which `BPF_PROG_TEST_RUN` lets frames arrive. It stands for the guest's.
const IFINDEX: u32 = 1;
const PORTAL_IFINDEX: u32 = 4242;
const STALE_AFTER_NS: u64 = 3_600_000_000_000;

fn settings(nsid: u32) -> Settings {
    Settings {
        abi_version: ABI_VERSION,
        portal_ifindex: PORTAL_IFINDEX,
        portal_nsid: nsid,
        next_attachment: 1,
        stale_after_ns: STALE_AFTER_NS,
        syn_interval_ns: 1_000_000,
        syn_burst_ns: 0,
        portal_mac: PORTAL_MAC,
        _pad: [0; 2],
    }
}

fn heartbeat(state: &State, now: u64) -> u64 {
    if state.alive { now } else { 0 }
}

fn gate(state: &State, now: u64) -> Gate {
    let far = now + STALE_AFTER_NS;
    Gate { syn_tat_ns: if state.syn_exhausted { far } else { 0 }, clients: u64::from(state.client_known) }
}

fn client() -> Client {
    Client {
        network: [0; 16],
        first_seen_ns: 1,
        last_seen_ns: 1,
        connections: 3,
        ifindex: IFINDEX,
        vlan: 0,
        guest_mac: GUEST_MAC,
        metadata_mac: ROUTER_MAC,
        _pad: [0; 4],
    }
}

#[test]
fn every_case_holds_on_the_host() {
    for case in cases() {
        let world = host_world(&case.state);
        let mut skb = HostSkb::new(case.frame.clone(), IFINDEX);
        let outcome = match case.program {
            Program::FromGuest => from_guest(&mut skb, &world),
            Program::ToGuest => Some(to_guest(&mut skb, &world)),
        };
        assert_outcome(&case, outcome.map(|outcome| outcome.reason), &skb.frame);
        assert_recorded(&case, world.clients.borrow().get(&ClientKey { identity: case.identity() }).copied());
        if case.reason.is_none() {
            assert_eq!(world.look_ups.get(), 0, "{}: a bystander costs no map look-up", case.name);
        }
    }
}

#[test]
fn a_stale_heartbeat_is_no_heartbeat() {
    let case = cases().into_iter().find(|case| case.reason == Some(Reason::ConnectionOpened)).expect("a SYN");
    for (age, reason) in
        [(STALE_AFTER_NS, Reason::ConnectionOpened), (STALE_AFTER_NS + 1, Reason::AgentAbsent)]
    {
        let mut world = host_world(&case.state);
        world.heartbeat_ns = world.now_ns - age;
        let mut skb = HostSkb::new(case.frame.clone(), IFINDEX);
        assert_eq!(from_guest(&mut skb, &world).map(|outcome| outcome.reason), Some(reason), "age {age}");
    }
}

/// A VLAN tag lies beside the frame, where `BPF_PROG_TEST_RUN` cannot put one; the namespace scenarios send real tags.
#[test]
fn a_tagged_metadata_packet_is_left_alone() {
    for case in cases().into_iter().filter(|case| case.reason == Some(Reason::ConnectionOpened)) {
        let mut skb = HostSkb { vlan: Vlan::Tagged(5), ..HostSkb::new(case.frame.clone(), IFINDEX) };
        let outcome = from_guest(&mut skb, &host_world(&case.state)).expect(case.name);
        assert_eq!(outcome.reason, Reason::Vlan, "{}", case.name);
        assert_eq!(skb.frame, case.frame, "{}", case.name);
    }
}

/// The same packets, under the tag of a subport: served as its attachment's, without the tag, and answered with it.
#[test]
fn a_subports_packets_lose_their_tag_on_the_way_in_and_get_it_back() {
    let tag = PortKey { ifindex: IFINDEX, vlan: 5 };
    for case in cases().into_iter().filter(|case| case.reason == Some(Reason::ConnectionOpened)) {
        let mut world = host_world(&case.state);
        let untagged = world.ports.remove(&PortKey::untagged(IFINDEX)).expect(case.name);
        world.ports.insert(tag, untagged);
        let with_tag = |vlan| HostSkb { vlan, ..HostSkb::new(case.frame.clone(), IFINDEX) };
        for (vlan, reason) in [
            (Vlan::Tagged(5), Reason::ConnectionOpened),
            (Vlan::Tagged(6), Reason::Vlan),
            (Vlan::Strange, Reason::Vlan),
            (Vlan::Untagged, Reason::NotAttached),
        ] {
            let mut skb = with_tag(vlan);
            let outcome = from_guest(&mut skb, &world).expect(case.name);
            assert_eq!(outcome.reason, reason, "{}: {vlan:?}", case.name);
            let led = reason == Reason::ConnectionOpened;
            assert_eq!(skb.vlan, if led { Vlan::Untagged } else { vlan }, "{}", case.name);
            assert_eq!(
                skb.frame,
                *case.rewritten.as_ref().filter(|_| led).unwrap_or(&case.frame),
                "{}",
                case.name
            );
        }
        let client = world.clients.borrow().get(&ClientKey { identity: case.identity() }).copied();
        assert_eq!(client.expect(case.name).vlan, 5, "{}", case.name);
    }
    let answers = cases().into_iter().filter(|case| case.reason == Some(Reason::Reply));
    for case in answers {
        let world = host_world(&case.state);
        for client in world.clients.borrow_mut().values_mut() {
            client.vlan = 5;
        }
        let mut skb = HostSkb::new(case.frame.clone(), IFINDEX);
        assert_eq!(to_guest(&mut skb, &world).reason, Reason::Reply, "{}", case.name);
        assert_eq!(skb.vlan, Vlan::Tagged(5), "{}", case.name);
    }
}

#[test]
fn a_full_client_map_admits_only_clients_on_record() {
    for case in cases().into_iter().filter(|case| case.reason == Some(Reason::ConnectionOpened)) {
        let world = HostWorld { clients_full: true, ..host_world(&case.state) };
        let outcome = from_guest(&mut HostSkb::new(case.frame.clone(), IFINDEX), &world).expect(case.name);
        let expected = if case.state.client_known { Reason::ConnectionOpened } else { Reason::ClientsFull };
        assert_eq!(outcome.reason, expected, "{}", case.name);
    }
}

#[test]
fn every_case_holds_in_the_kernel() {
    if !metadata_tests::privileged() {
        return;
    }
    let host = Netns::new("packets");
    let portal_name = format!("{}-portal", host.name());
    // The portal adopts a namespace that is there; this one goes with its owner, also when a case fails.
    let _portal_netns = Netns::named(&portal_name);
    host.enter(|| {
        let portal = runtime().block_on(Portal::establish(&portal_name, 1500)).expect("a portal");
        run_in_kernel(&portal_name, &portal);
    });
}

fn run_in_kernel(portal_name: &str, portal: &Portal) {
    let directory = tempfile::tempdir().expect("a directory");
    let bpffs = Bpffs::mount(&directory.path().join("bpf"));
    let mut kernel = Kernel::load(bpffs.path(), portal.nsid);
    let (listening, deaf): (Vec<_>, Vec<_>) = cases().into_iter().partition(|case| case.state.listening);

    // The other side of the connections that the portal shall know: sockets that bear the identity addresses themselves.
    let listener = portal.listen(16).expect("a listener");
    let inside = AgentNetns::named(portal_name).expect("readable").expect("there");
    let connect = || [identity(), identity_v6()].map(|identity| connect_as(identity, &listener));
    let connections = inside.run(connect).expect("the portal is entered");
    for case in &listening {
        kernel.run(case);
    }
    drop((connections, listener));
    for case in &deaf {
        kernel.run(case);
    }
}

fn connect_as(identity: [u8; 16], listener: &TcpListener) -> (TcpStream, TcpStream) {
    runtime().block_on(async {
        let netlink = Netlink::connect().expect("netlink");
        let lo = netlink.link("lo").await.expect("links").expect("lo");
        netlink.set_address(lo.index, identity.into(), 128).await.expect("the identity address");
    });
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddrV6::new(identity.into(), CONNECTED_PORT, 0, 0).into()).expect("bound");
    socket.connect(&SocketAddrV6::new(PORTAL_ADDRESS.into(), 80, 0, 0).into()).expect("connected");
    listener.set_nonblocking(false).expect("blocking");
    let (accepted, _) = listener.accept().expect("accepted");
    (socket.into(), accepted)
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn host_world(state: &State) -> HostWorld {
    let now = 2 * STALE_AFTER_NS;
    let mut world = HostWorld {
        now_ns: now,
        settings: Some(settings(0)),
        heartbeat_ns: heartbeat(state, now),
        listening: state.listening,
        ..HostWorld::default()
    };
    if state.attached {
        world.ports.insert(PortKey::untagged(IFINDEX), port(state));
    }
    world.gates.borrow_mut().insert(ATTACHMENT, gate(state, now));
    if state.client_known {
        for identity in [identity(), identity_v6()] {
            world.clients.borrow_mut().insert(ClientKey { identity }, client());
        }
    }
    if state.listening {
        world.connections.extend([identity(), identity_v6()].map(|identity| (identity, CONNECTED_PORT)));
    }
    world
}

/// The programs in the kernel, with maps of their own.
struct Kernel {
    ebpf: Ebpf,
    config: Array<MapData, Settings>,
    heartbeat: Array<MapData, u64>,
    ports: HashMap<MapData, PortKey, Port>,
    gates: HashMap<MapData, u32, Gate>,
    clients: HashMap<MapData, ClientKey, Client>,
    stats: PerCpuArray<MapData, u64>,
}

impl Kernel {
    fn load(pins: &Path, nsid: u32) -> Self {
        let mut ebpf =
            EbpfLoader::new().default_map_pin_directory(pins).load(OBJECT).expect("the object loads");
        for name in PROGRAMS {
            let program: &mut SchedClassifier = ebpf.program_mut(name).expect(name).try_into().expect(name);
            program.load().unwrap_or_else(|error| panic!("the verifier refuses {name}: {error:?}"));
        }
        let mut take = |name| ebpf.take_map(name).unwrap_or_else(|| panic!("no map {name}"));
        let mut kernel = Self {
            config: take(names::CONFIG).try_into().expect("an array"),
            heartbeat: take(names::HEARTBEAT).try_into().expect("an array"),
            ports: take(names::PORTS).try_into().expect("a hash table"),
            gates: take(names::GATES).try_into().expect("a hash table"),
            clients: take(names::CLIENTS).try_into().expect("a hash table"),
            stats: take(names::STATS).try_into().expect("a per-CPU array"),
            ebpf,
        };
        kernel.config.set(0, settings(nsid), 0).expect("settings");
        kernel
    }

    fn run(&mut self, case: &Case) {
        self.set(&case.state);
        let before = self.counters();
        let (verdict, frame) = self.test_run(case);
        let counted: Vec<Reason> = Reason::ALL
            .iter()
            .zip(before.iter().zip(self.counters()))
            .flat_map(|(reason, (before, after))| (*before..after).map(|_| *reason))
            .collect();
        assert!(counted.len() <= 1, "{}: counted once, not as {counted:?}", case.name);
        assert_eq!(verdict, expected_verdict(case.reason), "{}: the verdict", case.name);
        assert_outcome(case, counted.first().copied(), &frame);
        assert_recorded(case, self.clients.get(&ClientKey { identity: case.identity() }, 0).ok());
    }

    fn set(&mut self, state: &State) {
        let now = Clock::now_ns();
        let port_key = PortKey::untagged(IFINDEX);
        self.heartbeat.set(0, heartbeat(state, now), 0).expect("a beat");
        self.gates.insert(ATTACHMENT, gate(state, now), 0).expect("a gate");
        let _absent = self.ports.remove(&port_key);
        if state.attached {
            self.ports.insert(port_key, port(state), 0).expect("a port");
        }
        for identity in [identity(), identity_v6()] {
            let _absent = self.clients.remove(&ClientKey { identity });
            if state.client_known {
                self.clients.insert(ClientKey { identity }, client(), 0).expect("a client");
            }
        }
    }

    fn test_run(&mut self, case: &Case) -> (i32, Vec<u8>) {
        let name = match case.program {
            Program::FromGuest => names::FROM_GUEST,
            Program::ToGuest => names::TO_GUEST,
        };
        let program: &mut SchedClassifier = self.ebpf.program_mut(name).expect(name).try_into().expect(name);
        let mut frame = vec![0; 4096];
        let options = TestRunOptions {
            data_in: Some(&case.frame),
            data_out: Some(&mut frame),
            ..TestRunOptions::default()
        };
        let result = program.test_run(options).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        let len = usize::try_from(result.data_size_out).expect("a length");
        frame.truncate(len);
        (result.return_value.cast_signed(), frame)
    }

    fn counters(&self) -> Vec<u64> {
        let count = |reason: &Reason| self.stats.get(&reason.index(), 0).expect("a counter").iter().sum();
        Reason::ALL.iter().map(count).collect()
    }
}

/// As linux/pkt_cls.h numbers them.
fn expected_verdict(reason: Option<Reason>) -> i32 {
    const TC_ACT_UNSPEC: i32 = -1;
    const TC_ACT_SHOT: i32 = 2;
    const TC_ACT_REDIRECT: i32 = 7;
    match reason.map(Reason::verdict) {
        None | Some(Verdict::Next) => TC_ACT_UNSPEC,
        Some(Verdict::Drop) => TC_ACT_SHOT,
        Some(Verdict::ToPortal | Verdict::ToGuest) => TC_ACT_REDIRECT,
    }
}

fn assert_outcome(case: &Case, reason: Option<Reason>, frame: &[u8]) {
    assert_eq!(reason, case.reason, "{}", case.name);
    let expected = case.rewritten.as_ref().unwrap_or(&case.frame);
    assert_eq!(frame, expected, "{}: the frame", case.name);
    if case.rewritten.is_some() {
        assert_checksums(case, frame);
    }
}

/// Whatever leaves us must be right to the last checksum, by etherparse's arithmetic.
fn assert_checksums(case: &Case, frame: &[u8]) {
    let headers = LaxPacketHeaders::from_ethernet(frame).expect(case.name);
    let payload = headers.payload.slice();
    match (headers.net.expect(case.name), headers.transport) {
        (NetHeaders::Ipv4(ip, _), Some(TransportHeader::Tcp(tcp))) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{}: IPv4 header checksum", case.name);
            assert_eq!(
                tcp.checksum,
                tcp.calc_checksum_ipv4(&ip, payload).expect(case.name),
                "{}: TCP checksum",
                case.name
            );
        }
        (NetHeaders::Ipv4(ip, _), Some(TransportHeader::Icmpv4(icmp))) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{}: IPv4 header checksum", case.name);
            assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(payload), "{}: ICMP checksum", case.name);
        }
        (NetHeaders::Ipv6(ip, _), Some(TransportHeader::Tcp(tcp))) => {
            assert_eq!(
                tcp.checksum,
                tcp.calc_checksum_ipv6(&ip, payload).expect(case.name),
                "{}: TCP checksum",
                case.name
            );
        }
        (NetHeaders::Ipv6(ip, _), Some(TransportHeader::Icmpv6(icmp))) => {
            let checksum = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload);
            assert_eq!(icmp.checksum, checksum.expect(case.name), "{}: ICMPv6 checksum", case.name);
        }
        (NetHeaders::Arp(_), None) => {}
        other => panic!("{}: an unexpected frame: {other:?}", case.name),
    }
}

/// What a SYN leaves on record.
fn assert_recorded(case: &Case, record: Option<Client>) {
    if case.reason != Some(Reason::ConnectionOpened) {
        return;
    }
    let record = record.expect(case.name);
    assert_eq!(record.connections, if case.state.client_known { 4 } else { 1 }, "{}", case.name);
    assert_eq!(record.network, NETWORK, "{}", case.name);
    assert_eq!(record.guest_mac, GUEST_MAC, "{}", case.name);
    assert_eq!(
        record.metadata_mac[..],
        case.frame[..6],
        "{}: answers bear the MAC address that was asked",
        case.name
    );
    assert_eq!(record.ifindex, IFINDEX, "{}", case.name);
    assert!(record.last_seen_ns > client().last_seen_ns, "{}", case.name);
}
