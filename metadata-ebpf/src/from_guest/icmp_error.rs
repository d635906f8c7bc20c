//! ICMP errors about segments of the portal: translated, and redirected to it. The kernel's TCP
//! takes the path MTU from them.
//!
//! A router behind the guest may send the error, so its source address proves nothing. The quoted
//! packet names the connection, and its destination becomes an identity address in the same way as
//! the source of a segment: with the attachment and the frame's source MAC address. So an error
//! reaches only a connection whose segments the sender could send as well.
//!
//! A flood harms only the sender's own connections. `tcp_v6_err` ignores a quoted sequence number
//! that is not in flight and a path MTU below 1,280 bytes; `tcp_v6_mtu_reduced` ignores one that is
//! not smaller than before. Types other than these have no effect on a connection.

use super::{
    PacketContext, address_to_portal, check_identity, identify_ipv4, identify_ipv6, options, portal_nsid,
};
use crate::identity::{METADATA_IPV4, METADATA_IPV6, METADATA_PORT, PORTAL_ADDRESS};
use crate::reason::Reason;
use crate::skb::{Skb, SkbError};
use crate::wire::{self, ETH_LEN, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, icmpv6};
use crate::world::{PortalPeer, PortalSocket, Version, World};

/// Length of an error without the quoted packet.
const ICMP_LEN: u32 = 8;
/// Quoted bytes of TCP that each error has: ports and sequence number (RFC 792).
const QUOTED_TCP_LEN: u32 = 8;
/// Offset of the checksum in the portal's frame.
const CHECKSUM: u32 = ETH_LEN + IPV6_LEN + 2;
/// Difference of the lengths of an IPv6 and an IPv4 header.
const GROWTH: u16 = 20;

/// Redirects an error if the portal has the connection that it is about.
#[inline(always)]
pub(super) fn redirect_to_portal<S: Skb, W: World>(
    skb: &mut S,
    world: &W,
    context: &PacketContext<'_>,
    version: Version,
) -> Result<Reason, Reason> {
    let mut peer = PortalPeer { identity: [0; 16], tcp: [0; 20] };
    match version {
        Version::V4 => {
            parse_ipv4(skb, context, &mut peer)?;
            check_identity(context, &peer.identity)?;
        }
        Version::V6 => parse_ipv6(skb, context, &mut peer)?,
    }
    match world.portal_socket(&peer, portal_nsid(world, context)) {
        PortalSocket::HalfOpen | PortalSocket::Connected => {}
        PortalSocket::Absent | PortalSocket::Listening => return Err(Reason::ForeignConnection),
    }
    match version {
        Version::V4 => {
            translate_ipv4(skb, context, &peer.identity)?;
            translate_quoted(skb, &peer.identity)?;
        }
        Version::V6 => translate_ipv6(skb, context, &peer.identity)?,
    }
    Ok(Reason::IcmpError)
}

/// Finds the connection. Not inlined, for the reason given in [`super::segment`].
#[inline(never)]
fn parse_ipv4<S: Skb>(skb: &S, context: &PacketContext<'_>, peer: &mut PortalPeer) -> Result<(), Reason> {
    const WITHOUT_OPTIONS: u8 = 0x45;

    let too_short = |SkbError| Reason::Malformed;
    let ip = Ipv4Header(skb.load(ETH_LEN)?);
    let quoted_at = ip.header_len() + ICMP_LEN;
    let quoted = Ipv4Header(skb.load(ETH_LEN + quoted_at).map_err(too_short)?);
    let tcp: [u8; 4] = skb.load(ETH_LEN + quoted_at + IPV4_LEN).map_err(too_short)?;
    let total_len = ip.total_len();
    if total_len < quoted_at + IPV4_LEN + QUOTED_TCP_LEN || ETH_LEN + total_len > skb.len() {
        return Err(Reason::Malformed);
    }
    if ip.header_len() == IPV4_LEN && !ip.checksum_is_right(0) {
        return Err(Reason::BadIpv4Checksum);
    }
    // Our segments have no options and are never fragments.
    let is_ours = quoted.0[0] == WITHOUT_OPTIONS
        && quoted.0[9] == wire::protocol::TCP
        && !quoted.is_fragment()
        && quoted.source() == METADATA_IPV4
        && [tcp[0], tcp[1]] == METADATA_PORT.to_be_bytes();
    if !is_ours {
        return Err(Reason::ForeignConnection);
    }
    peer.identity = identify_ipv4(context, quoted.destination())?;
    peer.tcp[0] = tcp[2];
    peer.tcp[1] = tcp[3];
    Ok(())
}

#[inline(never)]
fn parse_ipv6<S: Skb>(skb: &S, context: &PacketContext<'_>, peer: &mut PortalPeer) -> Result<(), Reason> {
    const QUOTED_AT: u32 = ETH_LEN + IPV6_LEN + ICMP_LEN;

    // Single fields, because both headers would not fit on the stack.
    let too_short = |SkbError| Reason::Malformed;
    let payload_len: [u8; 2] = skb.load(ETH_LEN + 4)?;
    let [next_header]: [u8; 1] = skb.load(QUOTED_AT + 6).map_err(too_short)?;
    let source: [u8; 16] = skb.load(QUOTED_AT + 8).map_err(too_short)?;
    let destination: [u8; 16] = skb.load(QUOTED_AT + 24).map_err(too_short)?;
    let tcp: [u8; 4] = skb.load(QUOTED_AT + IPV6_LEN).map_err(too_short)?;
    let payload_len = u32::from(u16::from_be_bytes(payload_len));
    if payload_len < ICMP_LEN + IPV6_LEN + QUOTED_TCP_LEN || ETH_LEN + IPV6_LEN + payload_len > skb.len() {
        return Err(Reason::Malformed);
    }
    let is_ours = next_header == wire::protocol::TCP
        && source == METADATA_IPV6
        && [tcp[0], tcp[1]] == METADATA_PORT.to_be_bytes();
    if !is_ours {
        return Err(Reason::ForeignConnection);
    }
    peer.identity = identify_ipv6(context, destination)?;
    peer.tcp[0] = tcp[2];
    peer.tcp[1] = tcp[3];
    Ok(())
}

/// Translates the error's own headers (RFC 7915 section 4.2). The checksum is adjusted, so that a
/// damaged error stays damaged.
#[inline(never)]
fn translate_ipv4<S: Skb>(
    skb: &mut S,
    context: &PacketContext<'_>,
    identity: &[u8; 16],
) -> Result<(), Reason> {
    let mut ip = Ipv4Header(skb.load(ETH_LEN)?);
    options::remove(skb, &mut ip)?;
    let error: [u8; 8] = skb.load(ETH_LEN + IPV4_LEN)?;
    // The payload consists of the error and the quoted packet, whose header grows.
    let payload_len = ip.payload_len() + GROWTH;
    let header =
        Ipv6Header::new(wire::protocol::ICMPV6, *identity, PORTAL_ADDRESS, payload_len, ip.0[1], ip.0[8]);

    skb.change_to_ipv6()?;
    skb.insert_behind_ipv6(GROWTH.into())?;
    skb.store(ETH_LEN, &header.0)?;
    let translated = icmpv6::from_unreachable(error);
    skb.store(ETH_LEN + IPV6_LEN, &translated)?;
    let [high, low] = payload_len.to_be_bytes();
    let added = wire::sum(&translated, wire::sum(&[high, low, 0, wire::protocol::ICMPV6], 0));
    skb.adjust_checksum(CHECKSUM, wire::fold(added + wire::removed(&error)).into())?;
    address_to_portal(skb, context)
}

/// Translates the quoted IPv4 header (RFC 7915 section 4.3), which is now behind the added bytes.
/// The quoted TCP stays.
#[inline(never)]
fn translate_quoted<S: Skb>(skb: &mut S, identity: &[u8; 16]) -> Result<(), SkbError> {
    const QUOTED: u32 = ETH_LEN + IPV6_LEN + ICMP_LEN;

    let quoted = Ipv4Header(skb.load(QUOTED + u32::from(GROWTH))?);
    // In pieces, because the whole header would not fit on the stack.
    let start = wire::ipv6_start(wire::protocol::TCP, quoted.payload_len(), quoted.0[1], quoted.0[8]);
    skb.store(QUOTED, &start)?;
    skb.store(QUOTED + 8, &PORTAL_ADDRESS)?;
    skb.store(QUOTED + 24, identity)?;
    // The addresses are those of the pseudo header as well.
    let addresses = wire::sum(identity, wire::sum(&PORTAL_ADDRESS, 0));
    let difference = wire::sum(&start, 2 * addresses) + wire::removed(&quoted.0);
    skb.adjust_checksum(CHECKSUM, wire::fold(difference).into())
}

/// Replaces the addresses of the error and of the quoted packet.
#[inline(never)]
fn translate_ipv6<S: Skb>(
    skb: &mut S,
    context: &PacketContext<'_>,
    identity: &[u8; 16],
) -> Result<(), Reason> {
    const QUOTED: u32 = ETH_LEN + IPV6_LEN + ICMP_LEN;

    replace_address(skb, ETH_LEN + 8, identity)?;
    replace_address(skb, ETH_LEN + 24, &PORTAL_ADDRESS)?;
    replace_address(skb, QUOTED + 8, &PORTAL_ADDRESS)?;
    replace_address(skb, QUOTED + 24, identity)?;
    address_to_portal(skb, context)
}

/// Replaces an address that the checksum of an ICMPv6 message covers. Not inlined: the compiler
/// would keep the bytes of all addresses on the stack.
#[inline(never)]
fn replace_address<S: Skb>(skb: &mut S, at: u32, to: &[u8; 16]) -> Result<(), SkbError> {
    let from: [u8; 16] = skb.load(at)?;
    skb.store(at, to)?;
    skb.adjust_checksum(CHECKSUM, wire::checksum_difference(&from, to))
}
