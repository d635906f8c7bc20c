//! The rows of ICMP errors about segments that went to the guest.

use etherparse::PacketBuilder;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, PORTAL_ADDRESS};
use metadata_ebpf::reason::Reason;

use super::frames::{answer, answer_v6, patched};
use super::{
    Case, DERIVED_IPV6, GUEST_IP, GUEST_IPV6, GUEST_MAC, NORMAL, PORTAL_MAC, ROUTED, ROUTER_MAC, State,
    UNKNOWN_PORT, identity, identity_at, refused, row,
};

/// Another address behind the guest, with a smaller MTU.
const INNER_ROUTER: [u8; 4] = [192, 0, 2, 1];
const GLOBAL: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
const UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const MTU_1300: [u8; 4] = [0, 0, 5, 0x14];
/// The quoted bytes of TCP of the shortest error (RFC 792), of an error of odd length, and of one
/// of Linux.
const QUOTES: [usize; 3] = [8, 33, 528];
/// Offsets in an error from the guest.
const QUOTED: usize = 42;
const QUOTED_V6: usize = 62;

pub(super) fn cases() -> Vec<Case> {
    [untouched(), translated(), translated_v6(), passed_on(), dropped()].concat()
}

/// Returns a segment for the guest up to this number of TCP's bytes, and the same in the portal
/// except for the checksum of TCP.
fn quoted(tcp: usize) -> (Vec<u8>, Vec<u8>) {
    let (portal, guest) = answer(&[0x5a; 1400]);
    let tcp = &guest[34..34 + tcp];
    ([&guest[14..34], tcp].concat(), [&portal[14..54], tcp].concat())
}

fn quoted_v6(to: [u8; 16], tcp: usize) -> (Vec<u8>, Vec<u8>) {
    let (portal, guest) = answer_v6(&[0x5a; 1400]);
    let tcp = &guest[54..54 + tcp];
    ([&guest[14..38], &to, tcp].concat(), [&portal[14..38], &identity_at(to), tcp].concat())
}

/// Returns an ICMPv4 error of the guest about this packet.
fn error(source: [u8; 4], (kind, code, rest): (u8, u8, [u8; 4]), packet: &[u8]) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(GUEST_MAC, ROUTER_MAC).ipv4(source, METADATA_IPV4, 64);
    let mut frame = Vec::new();
    step.icmpv4_raw(kind, code, rest).write(&mut frame, packet).expect("a vector takes all");
    frame
}

fn error_v6(source: [u8; 16], (kind, code, rest): (u8, u8, [u8; 4]), packet: &[u8]) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(GUEST_MAC, ROUTER_MAC).ipv6(source, METADATA_IPV6, 64);
    let mut frame = Vec::new();
    step.icmpv6_raw(kind, code, rest).write(&mut frame, packet).expect("a vector takes all");
    frame
}

/// Returns an error as the portal receives it.
fn in_portal(client: [u8; 16], (kind, code, rest): (u8, u8, [u8; 4]), packet: &[u8]) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(METADATA_MAC, PORTAL_MAC).ipv6(client, PORTAL_ADDRESS, 64);
    let mut frame = Vec::new();
    step.icmpv6_raw(kind, code, rest).write(&mut frame, packet).expect("a vector takes all");
    frame
}

fn too_big() -> Vec<u8> {
    error(GUEST_IP, (UNREACHABLE, FRAGMENTATION_NEEDED, MTU_1300), &quoted(528).0)
}

fn too_big_v6(source: [u8; 16], about: [u8; 16]) -> Vec<u8> {
    error_v6(source, (2, 0, MTU_1300), &quoted_v6(about, 528).0)
}

/// Types and codes without an effect on TCP, or without a counterpart.
fn untouched() -> Vec<Case> {
    let bystander = |name, frame| row(name, NORMAL, frame, None, None);
    let of_type = |kind, code| error(GUEST_IP, (kind, code, [0; 4]), &quoted(8).0);
    let of_type_v6 = |kind| error_v6(GUEST_IPV6, (kind, 0, [0; 4]), &quoted_v6(GUEST_IPV6, 8).0);
    vec![
        bystander("host precedence violation", of_type(UNREACHABLE, 14)),
        bystander("an unknown code", of_type(UNREACHABLE, 16)),
        bystander("source quench", of_type(4, 0)),
        bystander("a redirect", of_type(5, 0)),
        bystander("time exceeded", of_type(11, 0)),
        bystander("a parameter problem", of_type(12, 0)),
        bystander("an ICMP error to another address", patched(too_big(), 30, &[10, 0, 0, 1])),
        bystander("time exceeded over IPv6", of_type_v6(3)),
        bystander("a parameter problem over IPv6", of_type_v6(4)),
        bystander(
            "an ICMPv6 error to another address",
            patched(too_big_v6(GUEST_IPV6, GUEST_IPV6), 38, &GLOBAL),
        ),
    ]
}

fn translated() -> Vec<Case> {
    let becomes = |name, state, source, from: (u8, [u8; 4]), to, tcp| {
        let (quoted, renumbered) = quoted(tcp);
        let frame = error(source, (UNREACHABLE, from.0, from.1), &quoted);
        row(name, state, frame, Some(Reason::IcmpError), Some(in_portal(identity(), to, &renumbered)))
    };
    let mtu = |mtu: u16| {
        let [high, low] = mtu.to_be_bytes();
        (FRAGMENTATION_NEEDED, [0, 0, high, low])
    };
    let packet_too_big = |mtu: u32| (2, 0, mtu.to_be_bytes());
    let of_code = |name, code, to| becomes(name, NORMAL, GUEST_IP, (code, [0; 4]), to, 8);
    let [shortest, odd, usual] = QUOTES;
    vec![
        becomes("fragmentation needed", NORMAL, GUEST_IP, mtu(1300), packet_too_big(1320), usual),
        becomes("the shortest error", NORMAL, GUEST_IP, mtu(1300), packet_too_big(1320), shortest),
        becomes("an error of odd length", NORMAL, GUEST_IP, mtu(1300), packet_too_big(1320), odd),
        becomes(
            "fragmentation needed, from a router behind the guest",
            NORMAL,
            INNER_ROUTER,
            mtu(1300),
            packet_too_big(1320),
            usual,
        ),
        becomes(
            "fragmentation needed, of a port that no source knows",
            UNKNOWN_PORT,
            GUEST_IP,
            mtu(1300),
            packet_too_big(1320),
            usual,
        ),
        becomes(
            "fragmentation needed, on a shared interface",
            ROUTED,
            GUEST_IP,
            mtu(1300),
            packet_too_big(1320),
            usual,
        ),
        becomes("the smallest MTU of IPv6", NORMAL, GUEST_IP, mtu(1260), packet_too_big(1280), usual),
        becomes("a smaller MTU", NORMAL, GUEST_IP, mtu(1259), packet_too_big(1280), usual),
        becomes("a router that knows no MTU", NORMAL, GUEST_IP, mtu(0), packet_too_big(1280), usual),
        becomes("an MTU that is no limit", NORMAL, GUEST_IP, mtu(u16::MAX), packet_too_big(65_555), usual),
        of_code("network unreachable", 0, (1, 0, [0; 4])),
        of_code("host unreachable", 1, (1, 0, [0; 4])),
        of_code("protocol unreachable", 2, (4, 1, [0, 0, 0, 6])),
        of_code("port unreachable", 3, (1, 4, [0; 4])),
        of_code("source route failed", 5, (1, 0, [0; 4])),
        of_code("network prohibited", 9, (1, 1, [0; 4])),
        of_code("host prohibited", 10, (1, 1, [0; 4])),
        of_code("host unreachable for this service", 12, (1, 0, [0; 4])),
        of_code("communication prohibited", 13, (1, 1, [0; 4])),
        of_code("precedence cutoff", 15, (1, 1, [0; 4])),
    ]
}

fn translated_v6() -> Vec<Case> {
    let becomes = |name, state, source, about, message, tcp| {
        let (quoted, renumbered) = quoted_v6(about, tcp);
        let portal = in_portal(identity_at(about), message, &renumbered);
        row(name, state, error_v6(source, message, &quoted), Some(Reason::IcmpError), Some(portal))
    };
    let too_big = (2, 0, MTU_1300);
    let [shortest, odd, usual] = QUOTES;
    vec![
        becomes("packet too big", NORMAL, GUEST_IPV6, GUEST_IPV6, too_big, usual),
        becomes("the shortest error over IPv6", NORMAL, GUEST_IPV6, GUEST_IPV6, too_big, shortest),
        becomes("an error of odd length over IPv6", NORMAL, GUEST_IPV6, GUEST_IPV6, too_big, odd),
        becomes("packet too big, from a router behind the guest", NORMAL, GLOBAL, GUEST_IPV6, too_big, usual),
        becomes("packet too big, on a shared interface", ROUTED, GLOBAL, DERIVED_IPV6, too_big, usual),
        becomes("address unreachable", NORMAL, GUEST_IPV6, GUEST_IPV6, (1, 3, [0; 4]), usual),
        becomes("port unreachable over IPv6", NORMAL, GUEST_IPV6, GUEST_IPV6, (1, 4, [0; 4]), usual),
    ]
}

fn passed_on() -> Vec<Case> {
    let foreign = |name, frame| refused(name, NORMAL, frame, Reason::ForeignConnection);
    let malformed = |name, frame| refused(name, NORMAL, frame, Reason::Malformed);
    let neighbour = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6];
    let from_neighbour = |frame| patched(frame, 6, &[0xfa, 0x16, 0x3e, 0, 0, 6]);
    let unknown_behind_router = State { port_known: false, ..ROUTED };
    vec![
        foreign("an error about a port without a connection", patched(too_big(), QUOTED + 22, &[0, 5])),
        foreign("an error about a segment to us", patched(too_big(), QUOTED + 20, &[0x9c, 0x41, 0, 80])),
        foreign("an error about UDP", patched(too_big(), QUOTED + 9, &[17])),
        foreign("an error about another sender's segment", patched(too_big(), QUOTED + 12, &[10, 0, 0, 1])),
        foreign("an error about a later fragment", patched(too_big(), QUOTED + 6, &[0, 8])),
        foreign("an error about a segment with options", patched(too_big(), QUOTED, &[0x46])),
        foreign("an error about UDP over IPv6", {
            patched(too_big_v6(GUEST_IPV6, GUEST_IPV6), QUOTED_V6 + 6, &[17])
        }),
        foreign("an error about another sender's segment over IPv6", {
            patched(too_big_v6(GUEST_IPV6, GUEST_IPV6), QUOTED_V6 + 8, &GLOBAL)
        }),
        foreign("an error over IPv6 about a port without a connection", {
            patched(too_big_v6(GUEST_IPV6, GUEST_IPV6), QUOTED_V6 + 42, &[0, 5])
        }),
        foreign("an error about a neighbour's connection over IPv6", too_big_v6(GUEST_IPV6, neighbour)),
        refused(
            "an error about a neighbour's connection, of a port that no source knows",
            UNKNOWN_PORT,
            patched(too_big(), QUOTED + 16, &[10, 0, 0, 6]),
            Reason::ForeignConnection,
        ),
        refused(
            "an error about a connection of a neighbour on a shared interface",
            unknown_behind_router,
            from_neighbour(too_big()),
            Reason::ForeignConnection,
        ),
        refused(
            "the same over IPv6",
            unknown_behind_router,
            from_neighbour(too_big_v6(GUEST_IPV6, DERIVED_IPV6)),
            Reason::Ipv6Underived,
        ),
        refused(
            "an error about a global address",
            NORMAL,
            too_big_v6(GUEST_IPV6, GLOBAL),
            Reason::Ipv6Source,
        ),
        refused(
            "an error while the heartbeat is stale",
            State { alive: false, ..NORMAL },
            too_big(),
            Reason::AgentAbsent,
        ),
        refused(
            "an error without a listener",
            State { listening: false, ..NORMAL },
            too_big(),
            Reason::ForeignConnection,
        ),
        refused(
            "an error with a wrong IP header checksum",
            NORMAL,
            patched(too_big(), 24, &[0xde, 0xad]),
            Reason::BadIpv4Checksum,
        ),
        malformed("an error without a quoted packet", error(GUEST_IP, (UNREACHABLE, 1, [0; 4]), &[])),
        malformed(
            "an error without TCP's sequence number",
            error(GUEST_IP, (UNREACHABLE, 1, [0; 4]), &quoted(7).0),
        ),
        malformed("an error whose length is beyond the frame", patched(too_big(), 16, &[0x40, 0])),
        malformed(
            "an error without TCP's sequence number over IPv6",
            error_v6(GUEST_IPV6, (1, 0, [0; 4]), &quoted_v6(GUEST_IPV6, 7).0),
        ),
        malformed("an error whose length is beyond the frame over IPv6", {
            patched(too_big_v6(GUEST_IPV6, GUEST_IPV6), 18, &[0x40, 0])
        }),
    ]
}

fn dropped() -> Vec<Case> {
    vec![
        refused(
            "an error about a neighbour's connection",
            NORMAL,
            patched(too_big(), QUOTED + 16, &[10, 0, 0, 6]),
            Reason::ForgedAddress,
        ),
        refused(
            "an error about a segment to the metadata address",
            NORMAL,
            too_big_v6(GUEST_IPV6, METADATA_IPV6),
            Reason::ForgedAddress,
        ),
        refused(
            "an error from a forged MAC address",
            NORMAL,
            patched(too_big(), 6, &[0xfa, 0x16, 0x3e, 0, 0, 6]),
            Reason::ForgedMac,
        ),
    ]
}
