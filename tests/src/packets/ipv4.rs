//! The rows of IPv4 and ARP, and of traffic that is not metadata traffic.

use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV4;
use metadata_ebpf::reason::Reason;

use super::frames::{Segment, answer, arp, arp_answer, echo, patched, udp};
use super::{
    ATTACHMENT, Case, Exhausted, GUEST_IP, GUEST_MAC, IPV6_ONLY_MAC, KNOWN_CLIENT, NORMAL, PAIR_IP, PAIR_MAC,
    Program, ROUTED, ROUTER_MAC, SELF_ASSIGNED_IP, State, UNKNOWN_PORT, answered, identity_of, refused, row,
    undelivered,
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = untouched();
    cases.extend(served());
    cases.extend(own_sources());
    cases.extend(passed_on());
    cases.extend(dropped());
    cases.extend(out_of_the_portal());
    cases
}

/// Frames that are not metadata traffic: no reason, no counter, no change.
fn untouched() -> Vec<Case> {
    let bystander = |name, frame| row(name, NORMAL, frame, None, None);
    let syn_to = |address: [u8; 4]| Segment::syn().with(|s| s.ip.destination = address).frame();
    vec![
        bystander("TCP to another address", syn_to([10, 0, 0, 1])),
        bystander("TCP to a neighbour of the address", syn_to([169, 254, 169, 253])),
        bystander("TCP to another port", Segment::syn().with(|s| s.tcp.destination_port = 443).frame()),
        bystander(
            "TCP to another port behind options",
            with_options(&[1; 8]).with(|s| s.tcp.destination_port = 443).frame(),
        ),
        bystander("UDP to port 80", udp()),
        bystander(
            "an echo reply to the address",
            echo(GUEST_IP, METADATA_IPV4, (GUEST_MAC, ROUTER_MAC), true),
        ),
        bystander(
            "an echo request to another",
            echo(GUEST_IP, [10, 0, 0, 1], (GUEST_MAC, ROUTER_MAC), false),
        ),
        bystander("ARP for another address", arp(1, GUEST_MAC, GUEST_IP, [10, 0, 0, 1])),
        bystander("an ARP reply to the address", arp(2, GUEST_MAC, GUEST_IP, METADATA_IPV4)),
        bystander(
            "ARP of another hardware",
            patched(arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4), 14, &[0, 6]),
        ),
        bystander(
            "a frame shorter than any of ours",
            arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4)[..41].to_vec(),
        ),
        bystander("a second VLAN tag inside the frame", {
            let frame = Segment::syn().frame();
            [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat()
        }),
    ]
}

fn served() -> Vec<Case> {
    let opens = |name, state, segment: Segment| {
        row(name, state, segment.clone().frame(), Some(Reason::ConnectionOpened), Some(segment.in_portal()))
    };
    let goes_on = |name, segment: Segment| {
        row(name, NORMAL, segment.clone().frame(), Some(Reason::Segment), Some(segment.in_portal()))
    };
    let arp_answered = |name, state, sender| {
        let request = arp(1, GUEST_MAC, sender, METADATA_IPV4);
        row(name, state, request, Some(Reason::ArpReply), Some(arp_answer(GUEST_MAC, sender)))
    };
    let answer = || echo(METADATA_IPV4, GUEST_IP, (ROUTER_MAC, GUEST_MAC), true);
    let request = ping;
    vec![
        opens("a SYN", NORMAL, Segment::syn()),
        opens("a SYN of a known client", KNOWN_CLIENT, Segment::syn()),
        opens("a SYN on a shared interface", ROUTED, Segment::syn()),
        opens(
            "a SYN of a silent guest when the others use up the total",
            State { exhausted: Exhausted::Total, ..ROUTED },
            Segment::syn(),
        ),
        opens(
            "a SYN of a known client when unknown ones use up their half",
            State { client_known: true, exhausted: Exhausted::HalfAndReserve, ..ROUTED },
            Segment::syn(),
        ),
        opens(
            "a SYN of a known client when all known ones use up the total",
            State { client_known: true, exhausted: Exhausted::Total, ..ROUTED },
            Segment::syn(),
        ),
        opens("a SYN of a port that no source knows", UNKNOWN_PORT, Segment::syn()),
        opens(
            "a SYN with ECN",
            NORMAL,
            Segment::syn().with(|s| {
                s.ip.ecn = etherparse::IpEcn::TWO;
                s.tcp.ece = true;
                s.tcp.cwr = true;
            }),
        ),
        opens(
            "a SYN with DSCP and a low TTL",
            NORMAL,
            Segment::syn().with(|s| {
                s.ip.dscp = etherparse::IpDscp::try_new(46).expect("a DSCP");
                s.ip.time_to_live = 1;
            }),
        ),
        opens("a SYN with data", NORMAL, Segment::syn().with(|s| s.payload = b"GET".to_vec())),
        opens(
            "a SYN to the MAC address of our ARP answer",
            NORMAL,
            Segment::syn().with(|s| s.ethernet.destination = METADATA_MAC),
        ),
        goes_on("a bare ACK", Segment::data(&[])),
        goes_on("a request", Segment::data(b"GET / HTTP/1.1\r\n\r\n")),
        goes_on("a segment of odd length", Segment::data(b"odd")),
        goes_on("a segment of a full frame", Segment::data(&[0x5a; 1446])),
        goes_on("a FIN", Segment::data(&[]).with(|s| s.tcp.fin = true)),
        goes_on(
            "a RST",
            Segment::data(&[]).with(|s| (s.tcp.rst, s.tcp.ack, s.tcp.psh) = (true, false, false)),
        ),
        arp_answered("ARP for the address", NORMAL, GUEST_IP),
        arp_answered("an ARP probe, before the guest has an address", NORMAL, [0; 4]),
        arp_answered("ARP of a port that no source knows", UNKNOWN_PORT, GUEST_IP),
        opens("a SYN with options without effect", NORMAL, with_options(&[1, 1, 1, 0])),
        opens("a SYN with a router alert", NORMAL, with_options(&[148, 4, 0, 0])),
        opens("a SYN that records its route", NORMAL, with_options(&[7, 7, 4, 0, 0, 0, 0, 0])),
        opens("a SYN with as many options as fit", NORMAL, with_options(&[1; 40])),
        opens("a SYN with bytes behind the end of its options", NORMAL, with_options(&[0, 131, 255, 1])),
        opens(
            "a SYN on a shared interface with a timestamp",
            ROUTED,
            with_options(&[68, 8, 5, 0, 0, 0, 0, 0]),
        ),
        goes_on(
            "a request with a router alert",
            Segment::data(b"GET / HTTP/1.1\r\n\r\n").with(|s| s.ip.options = options(&[148, 4, 0, 0])),
        ),
        row(
            "an echo request with a router alert",
            NORMAL,
            optioned(&request(), &[148, 4, 0, 0]),
            Some(Reason::EchoReply),
            Some(answer()),
        ),
        row("an echo request", NORMAL, request(), Some(Reason::EchoReply), Some(answer())),
        row(
            "an echo request of a port that no source knows",
            UNKNOWN_PORT,
            request(),
            Some(Reason::EchoReply),
            Some(answer()),
        ),
    ]
}

/// Sources other than the port's address that are the guest's own.
fn own_sources() -> Vec<Case> {
    let from = |mac, address: [u8; 4]| {
        Segment::syn().with(move |s| (s.ethernet.source, s.ip.source) = (mac, address))
    };
    let opens = |name, state, mac, address| {
        let segment = from(mac, address);
        row(name, state, segment.clone().frame(), Some(Reason::ConnectionOpened), Some(segment.in_portal()))
    };
    let forged =
        |name, state, mac, address| refused(name, state, from(mac, address).frame(), Reason::ForgedAddress);
    let pinged = |name, mac, address| {
        let answer = echo(METADATA_IPV4, address, (ROUTER_MAC, mac), true);
        row(
            name,
            NORMAL,
            echo(address, METADATA_IPV4, (mac, ROUTER_MAC), false),
            Some(Reason::EchoReply),
            Some(answer),
        )
    };
    vec![
        opens("a SYN of an address pair with its own MAC address", NORMAL, PAIR_MAC, PAIR_IP),
        pinged("an echo request of an address pair with its own MAC address", PAIR_MAC, PAIR_IP),
        row(
            "ARP of an address pair with its own MAC address",
            NORMAL,
            arp(1, PAIR_MAC, PAIR_IP, METADATA_IPV4),
            Some(Reason::ArpReply),
            Some(arp_answer(PAIR_MAC, PAIR_IP)),
        ),
        forged("a pair's address from the port's MAC address", NORMAL, GUEST_MAC, PAIR_IP),
        forged("the port's address from a pair's MAC address", NORMAL, PAIR_MAC, GUEST_IP),
        forged("an address from a MAC address for IPv6 alone", NORMAL, IPV6_ONLY_MAC, GUEST_IP),
        opens("a SYN from a self-assigned address", NORMAL, GUEST_MAC, SELF_ASSIGNED_IP),
        opens("a SYN from a self-assigned address of a pair", NORMAL, PAIR_MAC, SELF_ASSIGNED_IP),
        pinged("an echo request from a self-assigned address", GUEST_MAC, SELF_ASSIGNED_IP),
        opens("the first link-local address", NORMAL, GUEST_MAC, [169, 254, 0, 0]),
        forged("an address next to the link-local ones", NORMAL, GUEST_MAC, [169, 253, 255, 255]),
        forged("a self-assigned address on a shared interface", ROUTED, GUEST_MAC, SELF_ASSIGNED_IP),
        refused(
            "a self-assigned address from a forged MAC address",
            NORMAL,
            from(ROUTER_MAC, SELF_ASSIGNED_IP).frame(),
            Reason::ForgedMac,
        ),
    ]
}

fn mutated(name: &'static str, mutate: fn(&mut Segment), reason: Reason) -> Case {
    refused(name, NORMAL, Segment::syn().with(mutate).frame(), reason)
}

fn options(bytes: &[u8]) -> etherparse::Ipv4Options {
    etherparse::Ipv4Options::try_from(bytes).expect("whole words, ten at most")
}

/// Returns a SYN with these IPv4 options.
fn with_options(bytes: &[u8]) -> Segment {
    Segment::syn().with(|s| s.ip.options = options(bytes))
}

/// Returns a frame whose IPv4 header has these options as well.
fn optioned(frame: &[u8], bytes: &[u8]) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(14);
    let (mut ip, payload) = etherparse::Ipv4Header::from_slice(packet).expect("IPv4");
    ip.options = options(bytes);
    ip.set_payload_len(payload.len()).expect("it fits");
    ip.header_checksum = ip.calc_header_checksum();
    [ethernet, &ip.to_bytes(), payload].concat()
}

fn ping() -> Vec<u8> {
    echo(GUEST_IP, METADATA_IPV4, (GUEST_MAC, ROUTER_MAC), false)
}

fn syn() -> Vec<u8> {
    Segment::syn().frame()
}

fn passed_on() -> Vec<Case> {
    absent_or_foreign().into_iter().chain(unclear()).collect()
}

/// Frames without an agent, or frames that belong to others.
fn absent_or_foreign() -> Vec<Case> {
    let dead = State { alive: false, ..NORMAL };
    let unheard = State { listening: false, ..NORMAL };
    let arp_request = || arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4);
    vec![
        refused("a SYN while the heartbeat is stale", dead, syn(), Reason::AgentAbsent),
        refused("ARP while the heartbeat is stale", dead, arp_request(), Reason::AgentAbsent),
        refused(
            "a segment while the heartbeat is stale",
            dead,
            Segment::data(b"x").frame(),
            Reason::AgentAbsent,
        ),
        refused("a SYN without a listener", unheard, syn(), Reason::AgentAbsent),
        refused(
            "a SYN from an interface that is not attached",
            State { attached: false, ..NORMAL },
            syn(),
            Reason::NotAttached,
        ),
        refused(
            "a segment of a connection that is not ours",
            NORMAL,
            Segment::data(b"x").with(|s| s.tcp.source_port = 5).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "the same from a client that we know",
            KNOWN_CLIENT,
            Segment::data(b"x").with(|s| s.tcp.source_port = 5).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "SYN and ACK of a connection that is not ours",
            NORMAL,
            Segment::syn().with(|s| s.tcp.ack = true).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "SYN and FIN",
            NORMAL,
            Segment::syn().with(|s| s.tcp.fin = true).frame(),
            Reason::ForeignConnection,
        ),
    ]
}

/// Frames with headers that we cannot or do not translate.
fn unclear() -> Vec<Case> {
    vec![
        refused(
            "a loose source route",
            NORMAL,
            with_options(&[131, 3, 4, 0]).frame(),
            Reason::Ipv4SourceRoute,
        ),
        refused(
            "a strict source route behind other options",
            NORMAL,
            with_options(&[1, 148, 4, 0, 0, 137, 7, 4, 10, 0, 0, 1]).frame(),
            Reason::Ipv4SourceRoute,
        ),
        refused(
            "an echo request with a source route",
            NORMAL,
            optioned(&ping(), &[131, 3, 4, 0]),
            Reason::Ipv4SourceRoute,
        ),
        refused(
            "an option without room for its length",
            NORMAL,
            with_options(&[1, 1, 7, 1]).frame(),
            Reason::Malformed,
        ),
        refused(
            "an option beyond the header",
            NORMAL,
            with_options(&[7, 5, 0, 0]).frame(),
            Reason::Malformed,
        ),
        refused(
            "options beyond the frame",
            NORMAL,
            patched(syn()[..54].to_vec(), 14, &[0x4b]),
            Reason::Malformed,
        ),
        refused(
            "a TCP header beyond the packet behind options",
            NORMAL,
            patched(with_options(&[1; 40]).frame(), 86, &[0xf0]),
            Reason::Malformed,
        ),
        refused(
            "a wrong checksum over options",
            NORMAL,
            patched(with_options(&[1; 4]).frame(), 37, &[0]),
            Reason::BadIpv4Checksum,
        ),
        refused(
            "a first fragment with options",
            NORMAL,
            with_options(&[1; 4]).with(|s| s.ip.more_fragments = true).frame(),
            Reason::Fragment,
        ),
        mutated("a first fragment", |s| s.ip.more_fragments = true, Reason::Fragment),
        mutated(
            "a later fragment",
            |s| s.ip.fragment_offset = etherparse::IpFragOffset::try_new(8).expect("an offset"),
            Reason::Fragment,
        ),
        refused(
            "an IP header shorter than five words",
            NORMAL,
            patched(syn(), 14, &[0x44]),
            Reason::Malformed,
        ),
        refused(
            "an IP total length beyond the frame",
            NORMAL,
            patched(syn(), 16, &[0x40, 0]),
            Reason::Malformed,
        ),
        refused(
            "an IP total length within the TCP header",
            NORMAL,
            patched(syn(), 16, &[0, 30]),
            Reason::Malformed,
        ),
        refused(
            "a TCP header shorter than five words",
            NORMAL,
            patched(syn(), 46, &[0x40]),
            Reason::Malformed,
        ),
        refused("a TCP header beyond the packet", NORMAL, patched(syn(), 46, &[0xf0]), Reason::Malformed),
        refused("a frame cut within the TCP header", NORMAL, syn()[..50].to_vec(), Reason::Malformed),
        refused(
            "a wrong IP header checksum",
            NORMAL,
            patched(syn(), 24, &[0xde, 0xad]),
            Reason::BadIpv4Checksum,
        ),
        mutated("a broadcast frame", |s| s.ethernet.destination = [0xff; 6], Reason::Malformed),
        mutated(
            "a group address for source",
            |s| s.ethernet.source = [1, 0, 0x5e, 0, 0, 5],
            Reason::Malformed,
        ),
    ]
}

fn dropped() -> Vec<Case> {
    vec![
        mutated("a forged MAC address", |s| s.ethernet.source[5] = 6, Reason::ForgedMac),
        refused(
            "ARP from a forged MAC address",
            NORMAL,
            arp(1, ROUTER_MAC, GUEST_IP, METADATA_IPV4),
            Reason::ForgedMac,
        ),
        mutated("a forged address", |s| s.ip.source = [10, 0, 0, 6], Reason::ForgedAddress),
        refused(
            "a forged address in a segment",
            NORMAL,
            Segment::data(b"x").with(|s| s.ip.source = [10, 0, 0, 6]).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "a forged address in an echo request",
            NORMAL,
            echo([10, 0, 0, 6], METADATA_IPV4, (GUEST_MAC, ROUTER_MAC), false),
            Reason::ForgedAddress,
        ),
        refused(
            "the metadata address for source, on a port that no source knows",
            UNKNOWN_PORT,
            Segment::syn().with(|s| s.ip.source = METADATA_IPV4).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "a multicast source, on a port that no source knows",
            UNKNOWN_PORT,
            Segment::syn().with(|s| s.ip.source = [224, 0, 0, 1]).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "an ARP announcement of the address",
            NORMAL,
            arp(1, GUEST_MAC, METADATA_IPV4, METADATA_IPV4),
            Reason::ForgedArp,
        ),
        refused(
            "an ARP reply that claims the address",
            NORMAL,
            arp(2, GUEST_MAC, METADATA_IPV4, GUEST_IP),
            Reason::ForgedArp,
        ),
        refused(
            "a SYN beyond the allowance",
            State { exhausted: Exhausted::Guest, ..NORMAL },
            syn(),
            Reason::SynRate,
        ),
        refused(
            "a SYN beyond a guest's share",
            State { exhausted: Exhausted::Guest, client_known: true, ..ROUTED },
            syn(),
            Reason::GuestSynRate,
        ),
        refused(
            "a SYN of an unknown client when such clients use up their half and the reserve",
            State { exhausted: Exhausted::HalfAndReserve, ..ROUTED },
            syn(),
            Reason::SynRate,
        ),
        refused(
            "a SYN of a known client beyond total and reserve",
            State { exhausted: Exhausted::All, client_known: true, ..ROUTED },
            syn(),
            Reason::SynRate,
        ),
    ]
}

fn out_of_the_portal() -> Vec<Case> {
    let out = || answer(b"HTTP/1.1 200 OK\r\n").0;
    let to_other = identity_of(ATTACHMENT + 1, GUEST_MAC);
    let routed = |name, state, (frame, back)| Case {
        program: Program::ToGuest,
        ..row(name, State { routed: true, ..state }, frame, Some(Reason::RoutedReply), Some(back))
    };
    let no_answer = |name, offset, bytes: &[u8]| {
        undelivered(name, KNOWN_CLIENT, patched(out(), offset, bytes), Reason::NotAnAnswer)
    };
    vec![
        answered("an answer", answer(b"HTTP/1.1 200 OK\r\n\r\n")),
        answered("an empty answer", answer(&[])),
        answered("an answer of odd length", answer(b"odd")),
        answered("an answer of a full frame", answer(&[0xa5; 1400])),
        routed("an answer to a guest of a shared interface", KNOWN_CLIENT, answer(b"routed")),
        undelivered(
            "an answer to an interface that is gone",
            State { interface_there: false, ..KNOWN_CLIENT },
            out(),
            Reason::InterfaceGone,
        ),
        undelivered(
            "an answer to the same address behind another attachment",
            KNOWN_CLIENT,
            patched(out(), 38, &to_other),
            Reason::NoClient,
        ),
        undelivered(
            "an answer to no identity address",
            KNOWN_CLIENT,
            patched(out(), 38, &[0x20, 1]),
            Reason::NoClient,
        ),
        no_answer("a packet from another port", 54, &[0, 81]),
        no_answer("a packet from another address", 37, &[9]),
        no_answer("UDP out of the portal", 20, &[17]),
        no_answer("IPv4 out of the portal", 12, &[8, 0]),
        no_answer("a payload length beyond the frame", 18, &[0x40, 0]),
    ]
}
