//! The packet table, once through the host build of the programs and once through the kernel
//! (`BPF_PROG_TEST_RUN`).

use metadata_ebpf::abi::{ClientKey, PortKey, REFUSAL_EVENT_INTERVAL_NS};
use metadata_ebpf::from_guest::from_guest;
use metadata_ebpf::host::HostSkb;
use metadata_ebpf::reason::Reason;
use metadata_ebpf::skb::{HEAD, Vlan};
use metadata_ebpf::to_guest::to_guest;
use metadata_tests::packets::control_block;
use metadata_tests::packets::table::{self, assert_noted, assert_outcome, assert_recorded, assert_refused};
use metadata_tests::packets::world::{IFINDEX, STALE_AFTER_NS, host_world};
use metadata_tests::packets::{ATTACHMENT, CONNECTED_PORT, Case, Program, State, cases, identity};

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
        assert_noted(&case, &world.attachments.borrow()[&ATTACHMENT]);
        assert_refused(&case, &world.refusals.borrow()[&ATTACHMENT], &world.reports.borrow());
        if case.reason.is_none() {
            assert_eq!(world.lookups.get(), 0, "{}: a bystander must not cost a map look-up", case.name);
        }
    }
}

/// A driver may store everything behind the head in fragments. `BPF_PROG_TEST_RUN` cannot build
/// such packets.
#[test]
fn a_packets_memory_layout_has_no_effect() {
    for case in cases().into_iter().filter(|case| case.program == Program::FromGuest) {
        let [whole, fragmented] = [usize::MAX, HEAD].map(|linear| {
            let world = host_world(&case.state);
            let mut skb = HostSkb { linear, ..HostSkb::new(case.frame.clone(), IFINDEX) };
            (from_guest(&mut skb, &world), skb.frame, world.lookups.get())
        });
        assert_eq!(whole, fragmented, "{}", case.name);
    }
}

#[test]
fn a_stale_heartbeat_counts_as_absent() {
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

/// A guest that floods wakes the agent once a second for each reason. All packets count.
#[test]
fn refused_packets_are_reported_once_a_second_for_each_reason() {
    let forged = [Reason::ForgedAddress, Reason::ForgedMac].map(|reason| {
        let of_reason = |case: &Case| case.reason == Some(reason) && !case.state.routed;
        cases().into_iter().find(of_reason).expect("such a row")
    });
    let mut world = host_world(&forged[0].state);
    let start = world.now_ns;
    for (after, reported) in
        [(0, 2), (1, 2), (REFUSAL_EVENT_INTERVAL_NS - 1, 2), (REFUSAL_EVENT_INTERVAL_NS, 4)]
    {
        world.now_ns = start + after;
        for case in &forged {
            let outcome = from_guest(&mut HostSkb::new(case.frame.clone(), IFINDEX), &world);
            assert_eq!(outcome.map(|outcome| outcome.reason), case.reason);
        }
        assert_eq!(world.reports.borrow().len(), reported, "after {after} ns");
    }
    let packets = world.refusals.borrow()[&ATTACHMENT].packets;
    assert_eq!(packets.iter().sum::<u64>(), 8);
}

/// A VLAN tag is stored beside the frame, where `BPF_PROG_TEST_RUN` cannot put one. The namespace
/// scenarios send real tags.
#[test]
fn a_tagged_metadata_packet_is_passed_on() {
    for case in cases().into_iter().filter(|case| case.reason == Some(Reason::ConnectionOpened)) {
        let mut skb = HostSkb { vlan: Vlan::Tagged(5), ..HostSkb::new(case.frame.clone(), IFINDEX) };
        let outcome = from_guest(&mut skb, &host_world(&case.state)).expect(case.name);
        assert_eq!(outcome.reason, Reason::Vlan, "{}", case.name);
        assert_eq!(skb.frame, case.frame, "{}", case.name);
    }
}

/// A priority tag (VLAN id 0) changes no decision. Portal and guest get the frame without it.
#[test]
fn a_priority_tag_has_no_effect() {
    for case in cases().into_iter().filter(|case| case.program == Program::FromGuest) {
        let [untagged, tagged] = [Vlan::Untagged, Vlan::Priority].map(|vlan| {
            let world = host_world(&case.state);
            let mut skb = HostSkb { vlan, ..HostSkb::new(case.frame.clone(), IFINDEX) };
            (from_guest(&mut skb, &world), skb)
        });
        assert_eq!((tagged.0, &tagged.1.frame), (untagged.0, &untagged.1.frame), "{}", case.name);
        let left = if case.rewritten.is_some() { Vlan::Untagged } else { Vlan::Priority };
        assert_eq!(tagged.1.vlan, left, "{}", case.name);
    }
}

/// The same packets with the tag of a subport are served without the tag, and the replies get it
/// back.
#[test]
fn the_tag_of_a_subport_is_removed_and_restored() {
    let tag = PortKey { netns: 0, ifindex: IFINDEX, vlan: 5 };
    let opens = |case: &Case| case.reason == Some(Reason::ConnectionOpened) && !case.state.routed;
    for case in cases().into_iter().filter(opens) {
        let mut world = host_world(&case.state);
        let untagged = world.ports.remove(&PortKey { netns: 0, ifindex: IFINDEX, vlan: 0 }).expect(case.name);
        world.ports.insert(tag, untagged);
        let with_tag = |vlan| HostSkb { vlan, ..HostSkb::new(case.frame.clone(), IFINDEX) };
        for (vlan, reason) in [
            (Vlan::Tagged(5), Reason::ConnectionOpened),
            (Vlan::Tagged(6), Reason::Vlan),
            (Vlan::Unsupported, Reason::Vlan),
            (Vlan::Priority, Reason::NotAttached),
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
    }
    let in_place = [Reason::ArpReply, Reason::NdReply, Reason::EchoReply].map(Some);
    for case in cases().into_iter().filter(|case| in_place.contains(&case.reason)) {
        let mut world = host_world(&case.state);
        let untagged = world.ports.remove(&PortKey { netns: 0, ifindex: IFINDEX, vlan: 0 }).expect(case.name);
        world.ports.insert(tag, untagged);
        let mut skb = HostSkb { vlan: Vlan::Tagged(5), ..HostSkb::new(case.frame.clone(), IFINDEX) };
        assert_eq!(from_guest(&mut skb, &world).map(|outcome| outcome.reason), case.reason, "{}", case.name);
        assert_eq!(skb.vlan, Vlan::Tagged(5), "{}", case.name);
    }
    let sent = [Reason::Reply, Reason::AddressQuery].map(Some);
    for case in cases().into_iter().filter(|case| sent.contains(&case.reason) && !case.state.routed) {
        let world = host_world(&case.state);
        world.attachments.borrow_mut().get_mut(&ATTACHMENT).expect(case.name).vlan = 5;
        let mut skb = HostSkb::new(case.frame.clone(), IFINDEX);
        assert_eq!(Some(to_guest(&mut skb, &world).reason), case.reason, "{}", case.name);
        assert_eq!(skb.vlan, Vlan::Tagged(5), "{}", case.name);
    }
}

/// Anyone can send an ACK after a SYN from a made-up address.
#[test]
fn a_half_open_connection_leaves_no_record() {
    let segments = cases().into_iter().filter(|case| case.reason == Some(Reason::Segment));
    for case in segments.filter(|case| case.identity() == identity()) {
        let mut world = host_world(&case.state);
        world.half_open = std::mem::take(&mut world.connections);
        assert!(world.half_open.contains(&(identity(), CONNECTED_PORT)));
        let outcome = from_guest(&mut HostSkb::new(case.frame.clone(), IFINDEX), &world).expect(case.name);
        assert_eq!(outcome.reason, Reason::Segment, "{}", case.name);
        assert!(world.clients.borrow().is_empty(), "{}", case.name);
    }
}

/// A guest that forges another guest's address on a shared interface has another identity.
#[test]
fn a_segment_from_another_mac_address_is_of_another_connection() {
    let segments = cases().into_iter().filter(|case| case.reason == Some(Reason::Segment));
    for case in segments {
        let world = host_world(&State { routed: true, port_known: false, ..case.state });
        let mut frame = case.frame.clone();
        frame[11] ^= 1;
        let outcome = from_guest(&mut HostSkb::new(frame, IFINDEX), &world).expect(case.name);
        let reasons = [Reason::ForeignConnection, Reason::Ipv6Underived];
        assert!(reasons.contains(&outcome.reason), "{}: {outcome:?}", case.name);
    }
}

/// Translation adjusts the checksum of an error instead of computing it, so it hides no damage.
#[test]
fn a_damaged_icmp_error_stays_damaged() {
    for case in cases().into_iter().filter(|case| case.reason == Some(Reason::IcmpError)) {
        let (mut damaged, mut expected) = (case.frame.clone(), case.rewritten.clone().expect(case.name));
        for frame in [&mut damaged, &mut expected] {
            *frame.last_mut().expect(case.name) ^= 1;
        }
        let mut skb = HostSkb::new(damaged, IFINDEX);
        let outcome = from_guest(&mut skb, &host_world(&case.state)).expect(case.name);
        assert_eq!((outcome.reason, skb.frame), (Reason::IcmpError, expected), "{}", case.name);
    }
}

#[test]
fn every_case_holds_in_the_kernel() {
    table::assert_in_kernel();
}

#[test]
fn the_old_control_block_has_no_effect() {
    control_block::has_no_effect();
}
