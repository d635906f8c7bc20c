//! The rows of address queries: datagrams from the portal that become requests in a guest's name.

use etherparse::PacketBuilder;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, PORTAL_ADDRESS};
use metadata_ebpf::reason::Reason;
use metadata_ebpf::to_guest::QUERY_PAYLOAD_LEN;

use super::frames::{arp, patched, solicitation};
use super::ipv6::SOLICITED_NODE;
use super::{
    Case, DERIVED_IPV6, GUEST_IP, GUEST_IPV6, GUEST_MAC, KNOWN_CLIENT, NORMAL, PORTAL_MAC, Program, ROUTED,
    State, identity, identity_at, identity_v6, undelivered,
};

/// Length of a frame with padding.
const ETHERNET_MIN: usize = 60;
/// Offset of the last byte of the source address.
const LAST_OF_SOURCE: usize = 37;

pub(super) fn cases() -> Vec<Case> {
    let mut request = arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4);
    request.resize(ETHERNET_MIN, 0);
    let asked = |name, state, to, rewritten: &[u8]| {
        let (frame, reason) = (query(to, QUERY_PAYLOAD_LEN.into()), Some(Reason::AddressQuery));
        Case { name, program: Program::ToGuest, state, frame, reason, rewritten: Some(rewritten.to_vec()) }
    };
    let solicited = |source| solicitation(source, SOLICITED_NODE, METADATA_IPV6);
    let refused = |name, frame| undelivered(name, KNOWN_CLIENT, frame, Reason::NotAnAnswer);
    let is_gone = State { interface_there: false, ..KNOWN_CLIENT };
    let normal = || query(identity(), QUERY_PAYLOAD_LEN.into());
    vec![
        asked("an address query of an IPv4 client", KNOWN_CLIENT, identity(), &request),
        asked("the same on a shared interface", ROUTED, identity(), &request),
        asked("an address query without an agent", State { alive: false, ..NORMAL }, identity(), &request),
        asked("an address query of an IPv6 client", KNOWN_CLIENT, identity_v6(), &solicited(GUEST_IPV6)),
        asked(
            "an address query of a client with a derived address",
            NORMAL,
            identity_at(DERIVED_IPV6),
            &solicited(DERIVED_IPV6),
        ),
        refused("a shorter datagram", query(identity(), usize::from(QUERY_PAYLOAD_LEN) - 1)),
        refused("a longer datagram", query(identity(), usize::from(QUERY_PAYLOAD_LEN) + 1)),
        refused("a datagram with a trailer", [normal(), vec![0]].concat()),
        refused("a datagram from another address", patched(normal(), LAST_OF_SOURCE, &[1])),
        undelivered(
            "an address query of a client whose MAC address is not known",
            NORMAL,
            query(identity_v6(), QUERY_PAYLOAD_LEN.into()),
            Reason::NoClient,
        ),
        undelivered(
            "an address query on an interface that is gone",
            is_gone,
            normal(),
            Reason::InterfaceGone,
        ),
    ]
}

fn query(to: [u8; 16], payload_len: usize) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(PORTAL_MAC, METADATA_MAC).ipv6(PORTAL_ADDRESS, to, 64).udp(50_000, 9);
    let mut frame = Vec::new();
    step.write(&mut frame, &vec![0; payload_len]).expect("a vector takes all");
    frame
}
