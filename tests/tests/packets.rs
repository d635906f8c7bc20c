//! The packet table, once through the host build of the programs and once through the kernel (`BPF_PROG_TEST_RUN`).
#![expect(clippy::expect_used, clippy::panic, reason = "a step that fails, fails the test")]

use etherparse::{LaxPacketHeaders, NetHeaders, TransportHeader};
use metadata_agent::portal::Portal;
use metadata_ebpf::abi::{Client, ClientKey, PortKey};
use metadata_ebpf::from_guest::from_guest;
use metadata_ebpf::host::{HostSkb, HostWorld};
use metadata_ebpf::reason::Reason;
use metadata_ebpf::skb::Vlan;
use metadata_ebpf::to_guest::to_guest;
use metadata_tests::bpffs::Bpffs;
use metadata_tests::netns::Netns;
use metadata_tests::packets::kernel::{Kernel, PortalEnds, verdict_of};
use metadata_tests::packets::world::{IFINDEX, STALE_AFTER_NS, client, host_world};
use metadata_tests::packets::{Case, GUEST_MAC, NETWORK, Program, cases};
use tokio::runtime::Builder;

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
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let portal = runtime.block_on(Portal::establish(&portal_name, 1500)).expect("a portal");
        run_in_kernel(&portal_name, &portal);
    });
}

fn run_in_kernel(portal_name: &str, portal: &Portal) {
    let directory = tempfile::tempdir().expect("a directory");
    let bpffs = Bpffs::mount(&directory.path().join("bpf"));
    let mut kernel = Kernel::load(bpffs.path(), portal.nsid);
    let (listening, deaf): (Vec<_>, Vec<_>) = cases().into_iter().partition(|case| case.state.listening);

    let ends = PortalEnds::open(portal_name, portal);
    for case in &listening {
        run(&mut kernel, case);
    }
    drop(ends);
    for case in &deaf {
        run(&mut kernel, case);
    }
}

fn run(kernel: &mut Kernel, case: &Case) {
    kernel.set(&case.state);
    let before = kernel.counters();
    let mut frame = vec![0; 4096];
    let (verdict, len) = kernel.test_run(case.program, &case.frame, &mut frame);
    frame.truncate(len);
    let counted: Vec<Reason> = Reason::ALL
        .iter()
        .zip(before.iter().zip(kernel.counters()))
        .flat_map(|(reason, (before, after))| (*before..after).map(|_| *reason))
        .collect();
    assert!(counted.len() <= 1, "{}: counted once, not as {counted:?}", case.name);
    assert_eq!(verdict, verdict_of(case.reason), "{}: the verdict", case.name);
    assert_outcome(case, counted.first().copied(), &frame);
    assert_recorded(case, kernel.client(case.identity()));
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
