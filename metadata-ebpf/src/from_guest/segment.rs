//! TCP to the metadata service: recorded if it opens a connection, and redirected to the portal
//! with the identity address as its source.

use super::{
    PacketContext, address_to_portal, check_identity, identify_ipv4, identify_ipv6, options, portal_nsid,
};
use crate::abi::{Client, ClientKey, MacWord, SHARED};
use crate::identity::{ClientAddress, ClientMac, METADATA_IPV4, METADATA_IPV6, PORTAL_ADDRESS};
use crate::rate::{self, GuestRate, SynLimit};
use crate::reason::Reason;
use crate::skb::{Skb, SkbError};
use crate::wire::{
    self, ETH_LEN, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, TCP_CHECKSUM, TCP_LEN, TcpHeader,
};
use crate::world::{PortalPeer, PortalSocket, Version, World};

/// Redirects a SYN if the portal has a listener, and any other segment if the portal has its
/// connection.
#[inline(always)]
pub(super) fn redirect_to_portal<S: Skb, W: World>(
    skb: &mut S,
    world: &W,
    context: &PacketContext<'_>,
    version: Version,
) -> Result<Reason, Reason> {
    // Validate the headers and compute the identity address.
    let mut peer = PortalPeer { identity: [0; 16], tcp: [0; 20] };
    match version {
        Version::V4 => {
            parse_ipv4(skb, context, &mut peer)?;
            check_identity(context, &peer.identity)?;
        }
        Version::V6 => parse_ipv6(skb, context, &mut peer)?,
    }

    // Find the portal's socket for the segment.
    let opens = TcpHeader::opens_by(peer.tcp[13]);
    let reason = match (opens, world.portal_socket(&peer, portal_nsid(world, context))) {
        (true, PortalSocket::Absent) => return Err(Reason::AgentAbsent),
        (true, PortalSocket::Listening | PortalSocket::HalfOpen | PortalSocket::Connected) => {
            admit(world, context, &peer.identity)?;
            Reason::ConnectionOpened
        }
        (false, PortalSocket::HalfOpen) => Reason::Segment,
        (false, PortalSocket::Connected) => {
            record_client(world, context, &peer.identity);
            Reason::Segment
        }
        (false, PortalSocket::Absent | PortalSocket::Listening) => return Err(Reason::ForeignConnection),
    };

    // Rewrite the frame for the portal.
    match version {
        Version::V4 => translate_ipv4(skb, context, &peer.identity)?,
        Version::V6 => translate_ipv6(skb, context, &peer.identity)?,
    }
    Ok(reason)
}

/// Not inlined, like the other steps: a program has 512 bytes of stack, and consecutive calls reuse
/// the same bytes. BPF functions return only scalars, so results go through `peer`.
#[inline(never)]
fn parse_ipv4<S: Skb>(skb: &S, context: &PacketContext<'_>, peer: &mut PortalPeer) -> Result<(), Reason> {
    let ip = Ipv4Header(skb.load(ETH_LEN)?);
    let tcp = TcpHeader(skb.load(ETH_LEN + ip.header_len()).map_err(|SkbError| Reason::Malformed)?);
    let is_truncated = ETH_LEN + ip.total_len() > skb.len();
    if is_truncated || tcp.header_len() < TCP_LEN || ip.header_len() + tcp.header_len() > ip.total_len() {
        return Err(Reason::Malformed);
    }
    if ip.header_len() == IPV4_LEN && !ip.checksum_is_right(0) {
        return Err(Reason::BadIpv4Checksum);
    }
    peer.identity = identify_ipv4(context, ip.source())?;
    peer.tcp = tcp.0;
    Ok(())
}

#[inline(never)]
fn parse_ipv6<S: Skb>(skb: &S, context: &PacketContext<'_>, peer: &mut PortalPeer) -> Result<(), Reason> {
    let ip = Ipv6Header(skb.load(ETH_LEN)?);
    let tcp = TcpHeader(skb.load(ETH_LEN + IPV6_LEN).map_err(|SkbError| Reason::Malformed)?);
    let payload_len = u32::from(ip.payload_len());
    let is_truncated = ETH_LEN + IPV6_LEN + payload_len > skb.len();
    if is_truncated || tcp.header_len() < TCP_LEN || tcp.header_len() > payload_len {
        return Err(Reason::Malformed);
    }
    peer.identity = identify_ipv6(context, ip.source())?;
    peer.tcp = tcp.0;
    Ok(())
}

/// Translates IPv4 to IPv6, a subset of RFC 7915: no fragments, fixed addresses.
/// Protocol and length contribute equally to both pseudo headers.
#[inline(never)]
fn translate_ipv4<S: Skb>(
    skb: &mut S,
    context: &PacketContext<'_>,
    identity: &[u8; 16],
) -> Result<(), Reason> {
    let mut ip = Ipv4Header(skb.load(ETH_LEN)?);
    options::remove(skb, &mut ip)?;
    let (class, hop_limit) = (ip.0[1], ip.0[8]);
    let header =
        Ipv6Header::new(wire::protocol::TCP, *identity, PORTAL_ADDRESS, ip.payload_len(), class, hop_limit);
    let difference = wire::checksum_difference(&ip.source(), identity)
        + wire::checksum_difference(&METADATA_IPV4, &PORTAL_ADDRESS);

    skb.change_to_ipv6()?;
    skb.store(ETH_LEN, &header.0)?;
    skb.adjust_checksum(ETH_LEN + IPV6_LEN + TCP_CHECKSUM, difference)?;
    address_to_portal(skb, context)
}

/// Replaces the addresses.
#[inline(never)]
fn translate_ipv6<S: Skb>(
    skb: &mut S,
    context: &PacketContext<'_>,
    identity: &[u8; 16],
) -> Result<(), Reason> {
    let source: [u8; 16] = skb.load(ETH_LEN + 8)?;
    let difference = wire::checksum_difference(&source, identity)
        + wire::checksum_difference(&METADATA_IPV6, &PORTAL_ADDRESS);

    skb.store(ETH_LEN + 8, identity)?;
    skb.store(ETH_LEN + 24, &PORTAL_ADDRESS)?;
    skb.adjust_checksum(ETH_LEN + IPV6_LEN + TCP_CHECKSUM, difference)?;
    address_to_portal(skb, context)
}

/// Admits a new connection by the rate limits, and notes the MAC addresses that replies need and
/// the identity address does not contain.
///
/// A SYN proves nothing about its sender, so it leaves nothing behind except on an interface of one
/// guest.
#[inline(never)]
fn admit<W: World>(world: &W, context: &PacketContext<'_>, identity: &[u8; 16]) -> Result<(), Reason> {
    let PacketContext { settings, port, macs, now_ns, .. } = *context;
    let limit = SynLimit { interval: settings.syn_interval_ns, burst: settings.syn_burst_ns };
    // The client is known if it has completed a handshake.
    let known = world.client(&ClientKey { identity: *identity }, |client| {
        client.connections = client.connections.wrapping_add(1);
        client.metadata_mac = macs.metadata;
    });

    if port.flags & SHARED != 0 {
        let guest = GuestRate::new(macs.guest, settings.hash_keys);
        return world
            .shares(port.attachment, |shares| {
                rate::admit_shared(shares, guest, known.is_some(), now_ns, limit)
            })
            .ok_or(Reason::NotAttached)?;
    }
    let slot = ClientAddress::from_identity(*identity).and_then(|client| match client.mac {
        ClientMac::Address(_) => None,
        ClientMac::Slot(slot) => Some(slot),
    });
    world
        .attachment(port.attachment, |state| -> Result<(), Reason> {
            let tat = rate::admit(state.syn_tat_ns, now_ns, limit.interval, limit.burst);
            state.syn_tat_ns = tat.ok_or(Reason::SynRate)?;
            state.metadata_mac = MacWord::new(macs.metadata);
            if let Some(slot) = slot {
                state.put_mac(slot, MacWord::new(macs.guest));
            }
            Ok(())
        })
        .ok_or(Reason::NotAttached)?
}

/// Keeps statistics about a client that has completed a handshake.
#[inline(never)]
fn record_client<W: World>(world: &W, context: &PacketContext<'_>, identity: &[u8; 16]) {
    let PacketContext { port, macs, now_ns, .. } = *context;
    let key = ClientKey { identity: *identity };
    if world.client(&key, |client| client.last_seen_ns = now_ns).is_some() {
        return;
    }
    let client = Client {
        network: port.network,
        first_seen_ns: now_ns,
        last_seen_ns: now_ns,
        connections: 1,
        guest_mac: macs.guest,
        metadata_mac: macs.metadata,
        _pad: [0; 4],
    };
    world.put_client(&key, &client);
}
