//! The rows of IPv6.

use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::METADATA_IPV6;
use metadata_ebpf::reason::Reason;

use super::frames::{Segment6, advertisement, answer_v6, icmpv6, patched, solicitation};
use super::{
    Case, DERIVED_IPV6, Exhausted, GUEST_IPV6, GUEST_MAC, IPV6_ONLY_MAC, KNOWN_CLIENT, NORMAL, ROUTED,
    ROUTER_MAC, State, UNKNOWN_PORT, answered, refused, row, undelivered,
};

/// The solicited-node multicast address of fe80::a9fe:a9fe (RFC 4291 section 2.7.1).
pub(super) const SOLICITED_NODE: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xfe, 0xa9, 0xfe];
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const UNSPECIFIED: [u8; 16] = [0; 16];
const ROUTER: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const GLOBAL: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
const TO_ROUTER: ([u8; 6], [u8; 6]) = (GUEST_MAC, ROUTER_MAC);
/// Offset in a frame.
const NEXT_HEADER: usize = 20;
const HOP_LIMIT: usize = 21;
const ICMP_CODE: usize = 55;

pub(super) fn cases() -> Vec<Case> {
    [untouched(), served(), passed_on(), dropped(), out_of_the_portal()].concat()
}

fn untouched() -> Vec<Case> {
    let bystander = |name, frame| row(name, NORMAL, frame, None, None);
    let syn_to = |address| Segment6::syn().with(|s| s.ip.destination = address).frame();
    let echo_to = |address, kind| icmpv6(TO_ROUTER, (GUEST_IPV6, address), kind, [0, 1, 0, 2], b"ping");
    vec![
        bystander("TCP over IPv6 to another address", syn_to(GLOBAL)),
        bystander("TCP over IPv6 to another link-local address", syn_to(ROUTER)),
        bystander(
            "TCP over IPv6 to another port",
            Segment6::syn().with(|s| s.tcp.destination_port = 443).frame(),
        ),
        bystander(
            "UDP over IPv6 to port 80 of the address",
            patched(Segment6::syn().frame(), NEXT_HEADER, &[17]),
        ),
        bystander("an ICMPv6 echo request to another address", echo_to(ROUTER, 128)),
        bystander("an ICMPv6 echo request to a global address", echo_to(GLOBAL, 128)),
        bystander("an ICMPv6 echo reply to the address", echo_to(METADATA_IPV6, 129)),
        bystander(
            "an ICMPv6 echo request with a code",
            patched(echo_to(METADATA_IPV6, 128), ICMP_CODE, &[1]),
        ),
        bystander("a solicitation for the router", solicitation(GUEST_IPV6, ALL_NODES, ROUTER)),
        bystander("an advertisement of the guest's own address", claim(GUEST_IPV6, GUEST_IPV6)),
        bystander(
            "a router solicitation",
            icmpv6((GUEST_MAC, ALL_NODES_MAC), (GUEST_IPV6, ALL_NODES), 133, [0; 4], &[]),
        ),
        bystander("an ICMPv6 message without a body", {
            icmpv6(TO_ROUTER, (GUEST_IPV6, METADATA_IPV6), 135, [0; 4], &[])
        }),
        bystander("a jumbo of extension headers to another address", extended(ROUTER, 0)),
    ]
}

fn served() -> Vec<Case> {
    let opens = |name, state, segment: Segment6| {
        row(name, state, segment.clone().frame(), Some(Reason::ConnectionOpened), Some(segment.in_portal()))
    };
    let goes_on = |name, segment: Segment6| {
        row(name, NORMAL, segment.clone().frame(), Some(Reason::Segment), Some(segment.in_portal()))
    };
    let solicited = |name, state, question: Vec<u8>, answer: Vec<u8>| {
        row(name, state, question, Some(Reason::NdReply), Some(answer))
    };
    let to_guest = advertisement(GUEST_MAC, GUEST_IPV6, 0x60);
    let eui64 = DERIVED_IPV6;
    let derived = Segment6::syn().with(|s| s.ip.source = DERIVED_IPV6);
    let ping = |from, to, macs, kind| icmpv6(macs, (from, to), kind, [0, 77, 0, 1], b"0123456789");
    vec![
        opens("a SYN over IPv6", NORMAL, Segment6::syn()),
        opens("a SYN over IPv6 of a known client", KNOWN_CLIENT, Segment6::syn()),
        opens("a SYN over IPv6 from an address derived from the MAC address", NORMAL, derived.clone()),
        opens("the same on a shared interface", ROUTED, derived),
        opens("a SYN over IPv6 of a port that no source knows", UNKNOWN_PORT, Segment6::syn()),
        opens(
            "a SYN over IPv6 to the MAC address of our advertisement",
            NORMAL,
            Segment6::syn().with(|s| s.ethernet.destination = METADATA_MAC),
        ),
        opens("a SYN over IPv6 with data", NORMAL, Segment6::syn().with(|s| s.payload = b"GET".to_vec())),
        goes_on("a bare ACK over IPv6", Segment6::data(&[])),
        goes_on("a request over IPv6", Segment6::data(b"GET / HTTP/1.1\r\n\r\n")),
        goes_on("a segment of odd length over IPv6", Segment6::data(b"odd")),
        goes_on("a segment of a full frame over IPv6", Segment6::data(&[0x5a; 1428])),
        solicited(
            "a solicitation from a MAC address for IPv6 alone",
            NORMAL,
            patched(asks(GUEST_IPV6), 6, &IPV6_ONLY_MAC),
            advertisement(IPV6_ONLY_MAC, GUEST_IPV6, 0x60),
        ),
        solicited("a solicitation by multicast", NORMAL, asks(GUEST_IPV6), to_guest.clone()),
        solicited(
            "a solicitation from an EUI-64 address",
            UNKNOWN_PORT,
            asks(eui64),
            advertisement(GUEST_MAC, eui64, 0x60),
        ),
        solicited(
            "a solicitation from a global address",
            NORMAL,
            asks(GLOBAL),
            advertisement(GUEST_MAC, GLOBAL, 0x60),
        ),
        solicited(
            "a solicitation by unicast, without the sender's MAC address",
            NORMAL,
            icmpv6((GUEST_MAC, METADATA_MAC), (GUEST_IPV6, METADATA_IPV6), 135, [0; 4], &METADATA_IPV6),
            to_guest.clone(),
        ),
        solicited(
            "a solicitation with a nonce behind the sender's MAC address",
            NORMAL,
            icmpv6(
                (GUEST_MAC, METADATA_MAC),
                (GUEST_IPV6, METADATA_IPV6),
                135,
                [0; 4],
                &[&METADATA_IPV6[..], &[1, 1], &GUEST_MAC, &[14, 1, 1, 2, 3, 4, 5, 6]].concat(),
            ),
            to_guest,
        ),
        solicited(
            "a guest that tries the address out for itself",
            NORMAL,
            asks(UNSPECIFIED),
            advertisement(ALL_NODES_MAC, ALL_NODES, 0x20),
        ),
        row(
            "an ICMPv6 echo request",
            NORMAL,
            ping(GUEST_IPV6, METADATA_IPV6, TO_ROUTER, 128),
            Some(Reason::EchoReply),
            Some(ping(METADATA_IPV6, GUEST_IPV6, (ROUTER_MAC, GUEST_MAC), 129)),
        ),
    ]
}

/// Returns a multicast solicitation for the metadata address.
fn asks(source: [u8; 16]) -> Vec<u8> {
    solicitation(source, SOLICITED_NODE, METADATA_IPV6)
}

/// Returns TCP behind an extension header.
fn extended(destination: [u8; 16], next_header: u8) -> Vec<u8> {
    patched(Segment6::syn().with(|s| s.ip.destination = destination).frame(), NEXT_HEADER, &[next_header])
}

fn passed_on() -> Vec<Case> {
    let syn = || Segment6::syn().frame();
    let dead = State { alive: false, ..NORMAL };
    vec![
        refused("a SYN over IPv6 while the heartbeat is stale", dead, syn(), Reason::AgentAbsent),
        refused("a solicitation while the heartbeat is stale", dead, asks(GUEST_IPV6), Reason::AgentAbsent),
        refused(
            "a SYN over IPv6 without a listener",
            State { listening: false, ..NORMAL },
            syn(),
            Reason::AgentAbsent,
        ),
        refused(
            "a SYN over IPv6 from an interface that is not attached",
            State { attached: false, ..NORMAL },
            syn(),
            Reason::NotAttached,
        ),
        refused(
            "a segment over IPv6 of a connection that is not ours",
            NORMAL,
            Segment6::data(b"x").with(|s| s.tcp.source_port = 5).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "TCP over IPv6 from a global address",
            NORMAL,
            Segment6::syn().with(|s| s.ip.source = GLOBAL).frame(),
            Reason::Ipv6Source,
        ),
        refused(
            "an ICMPv6 echo request from a global address",
            NORMAL,
            icmpv6(TO_ROUTER, (GLOBAL, METADATA_IPV6), 128, [0; 4], b"ping"),
            Reason::Ipv6Source,
        ),
        refused(
            "a SYN over IPv6 on a shared interface from an address of its own choice",
            ROUTED,
            syn(),
            Reason::Ipv6Underived,
        ),
        refused(
            "a segment over IPv6 on a shared interface from an address of its own choice",
            ROUTED,
            Segment6::data(b"x").frame(),
            Reason::Ipv6Underived,
        ),
        refused(
            "a SYN over IPv6 on a shared interface from the address of another MAC address",
            State { port_known: false, ..ROUTED },
            Segment6::syn()
                .with(|s| (s.ip.source, s.ethernet.source) = (DERIVED_IPV6, [0xfa, 0x16, 0x3e, 0, 0, 6]))
                .frame(),
            Reason::Ipv6Underived,
        ),
        refused("hop-by-hop options", NORMAL, extended(METADATA_IPV6, 0), Reason::Ipv6Extension),
        refused("a routing header", NORMAL, extended(METADATA_IPV6, 43), Reason::Ipv6Extension),
        refused("destination options", NORMAL, extended(METADATA_IPV6, 60), Reason::Ipv6Extension),
        refused("an authentication header", NORMAL, extended(METADATA_IPV6, 51), Reason::Ipv6Extension),
        refused("a fragment over IPv6", NORMAL, extended(METADATA_IPV6, 44), Reason::Fragment),
        refused(
            "a payload length beyond the frame over IPv6",
            NORMAL,
            patched(syn(), 18, &[0x40, 0]),
            Reason::Malformed,
        ),
        refused(
            "a payload length within the TCP header",
            NORMAL,
            patched(syn(), 18, &[0, 20]),
            Reason::Malformed,
        ),
        refused(
            "a TCP header shorter than five words over IPv6",
            NORMAL,
            patched(syn(), 66, &[0x40]),
            Reason::Malformed,
        ),
        refused(
            "a frame cut within the TCP header over IPv6",
            NORMAL,
            syn()[..70].to_vec(),
            Reason::Malformed,
        ),
        refused(
            "a solicitation that came by a router",
            NORMAL,
            patched(asks(GUEST_IPV6), HOP_LIMIT, &[254]),
            Reason::Malformed,
        ),
        refused("a solicitation from a group", NORMAL, asks(ALL_NODES), Reason::Malformed),
        refused(
            "an echo message shorter than its header",
            NORMAL,
            patched(icmpv6(TO_ROUTER, (GUEST_IPV6, METADATA_IPV6), 128, [0; 4], b"ping"), 18, &[0, 7]),
            Reason::Malformed,
        ),
    ]
}

/// Returns an unsolicited advertisement.
fn claim(source: [u8; 16], target: [u8; 16]) -> Vec<u8> {
    let body = [&target[..], &[2, 1], &GUEST_MAC].concat();
    icmpv6((GUEST_MAC, ALL_NODES_MAC), (source, ALL_NODES), 136, [0x20, 0, 0, 0], &body)
}

fn dropped() -> Vec<Case> {
    let forged = |name, frame| refused(name, NORMAL, frame, Reason::ForgedNd);
    vec![
        forged("an advertisement of the metadata address", claim(GUEST_IPV6, METADATA_IPV6)),
        forged("the same from the address itself", claim(METADATA_IPV6, METADATA_IPV6)),
        forged(
            "an advertisement of it to a global address",
            icmpv6(TO_ROUTER, (GUEST_IPV6, GLOBAL), 136, [0x60, 0, 0, 0], &METADATA_IPV6),
        ),
        forged(
            "a solicitation from the metadata address, which would be learnt from it",
            solicitation(METADATA_IPV6, ALL_NODES, ROUTER),
        ),
        forged(
            "a router advertisement from the metadata address",
            icmpv6((GUEST_MAC, ALL_NODES_MAC), (METADATA_IPV6, ALL_NODES), 134, [0; 4], &[0; 8]),
        ),
        refused(
            "the metadata address for source of TCP",
            UNKNOWN_PORT,
            Segment6::syn().with(|s| s.ip.source = METADATA_IPV6).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "a solicitation from a forged MAC address",
            NORMAL,
            patched(asks(GUEST_IPV6), 6, &ROUTER_MAC),
            Reason::ForgedMac,
        ),
        refused(
            "a SYN over IPv6 beyond the allowance",
            State { exhausted: Exhausted::Guest, ..NORMAL },
            Segment6::syn().frame(),
            Reason::SynRate,
        ),
    ]
}

fn out_of_the_portal() -> Vec<Case> {
    vec![
        answered("an answer over IPv6", answer_v6(b"HTTP/1.1 200 OK\r\n\r\n")),
        answered("an answer of odd length over IPv6", answer_v6(b"odd")),
        answered("an answer of a full frame over IPv6", answer_v6(&[0xa5; 1400])),
        undelivered(
            "an answer over IPv6 to a client whose MAC address is not known",
            NORMAL,
            answer_v6(b"x").0,
            Reason::NoClient,
        ),
        undelivered(
            "an answer over IPv6 to an interface that is gone",
            State { interface_there: false, ..KNOWN_CLIENT },
            answer_v6(b"x").0,
            Reason::InterfaceGone,
        ),
    ]
}
