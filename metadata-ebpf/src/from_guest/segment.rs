//! TCP to the metadata service: recorded if it opens a connection, and redirected to the portal
//! with the identity address as its source.

use super::neighbour::METADATA_MAC;
use super::{PacketContext, check_ipv6_source, check_source};
use crate::abi::{Client, ClientKey};
use crate::identity::{
    AttachmentId, ClientAddress, GuestAddress, METADATA_IPV4, METADATA_IPV6, PORTAL_ADDRESS,
};
use crate::rate;
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
        Version::V4 => parse_ipv4(skb, context, &mut peer)?,
        Version::V6 => parse_ipv6(skb, context, &mut peer)?,
    }

    // Find the portal's socket for the segment.
    let opens = TcpHeader::opens_by(peer.tcp[13]);
    let nsid = match context.key.netns {
        0 => context.settings.portal_nsid,
        _ => world.netns_context(|netns| &netns.portal_nsid),
    };
    let reason = match (opens, world.portal_socket(&peer, nsid)) {
        (true, PortalSocket::Absent) => return Err(Reason::AgentAbsent),
        (true, PortalSocket::Listening | PortalSocket::Connected) => {
            record_client(world, context, &peer.identity)?;
            Reason::ConnectionOpened
        }
        (false, PortalSocket::Connected) => Reason::Segment,
        (false, PortalSocket::Absent | PortalSocket::Listening) => return Err(Reason::ForeignConnection),
    };

    // Rewrite the frame for the portal.
    if context.key.vlan != 0 {
        skb.pop_vlan()?;
    }
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
    let attachment = AttachmentId::new(context.port.attachment).ok_or(Reason::NotAttached)?;
    let ip = Ipv4Header(skb.load(ETH_LEN)?);
    let tcp = TcpHeader(skb.load(ETH_LEN + IPV4_LEN).map_err(|SkbError| Reason::Malformed)?);
    let is_truncated = ETH_LEN + ip.total_len() > skb.len();
    if is_truncated || tcp.header_len() < TCP_LEN || IPV4_LEN + tcp.header_len() > ip.total_len() {
        return Err(Reason::Malformed);
    }
    if !ip.checksum_is_right() {
        return Err(Reason::BadIpv4Checksum);
    }
    check_source(context.port, ip.source())?;
    peer.identity = ClientAddress::ipv4(attachment, ip.source()).identity();
    peer.tcp = tcp.0;
    Ok(())
}

/// A guest may use any of its link-local addresses, so the source is not compared with the port.
#[inline(never)]
fn parse_ipv6<S: Skb>(skb: &S, context: &PacketContext<'_>, peer: &mut PortalPeer) -> Result<(), Reason> {
    let attachment = AttachmentId::new(context.port.attachment).ok_or(Reason::NotAttached)?;
    let ip = Ipv6Header(skb.load(ETH_LEN)?);
    let tcp = TcpHeader(skb.load(ETH_LEN + IPV6_LEN).map_err(|SkbError| Reason::Malformed)?);
    let payload_len = u32::from(ip.payload_len());
    let is_truncated = ETH_LEN + IPV6_LEN + payload_len > skb.len();
    if is_truncated || tcp.header_len() < TCP_LEN || tcp.header_len() > payload_len {
        return Err(Reason::Malformed);
    }
    let guest = GuestAddress::Ipv6LinkLocal(check_ipv6_source(ip.source())?);
    peer.identity = ClientAddress { attachment, guest }.identity();
    peer.tcp = tcp.0;
    Ok(())
}

/// Translates IPv4 to IPv6, a subset of RFC 7915: no options, no fragments, fixed addresses.
/// Protocol and length contribute equally to both pseudo headers.
#[inline(never)]
fn translate_ipv4<S: Skb>(
    skb: &mut S,
    context: &PacketContext<'_>,
    identity: &[u8; 16],
) -> Result<(), Reason> {
    let ip = Ipv4Header(skb.load(ETH_LEN)?);
    let (class, hop_limit) = (ip.0[1], ip.0[8]);
    let header =
        Ipv6Header::new(wire::protocol::TCP, *identity, PORTAL_ADDRESS, ip.payload_len(), class, hop_limit);
    let difference = wire::checksum_difference(&ip.source(), identity)
        + wire::checksum_difference(&METADATA_IPV4, &PORTAL_ADDRESS);

    skb.change_to_ipv6()?;
    skb.store(ETH_LEN, &header.0)?;
    skb.adjust_tcp_checksum(ETH_LEN + IPV6_LEN + TCP_CHECKSUM, difference)?;
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
    skb.adjust_tcp_checksum(ETH_LEN + IPV6_LEN + TCP_CHECKSUM, difference)?;
    address_to_portal(skb, context)
}

/// Addresses the frame to the portal's end of the veth pair.
#[inline(always)]
fn address_to_portal<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    skb.store(0, &wire::ethernet(context.settings.portal_mac, METADATA_MAC, wire::ethertype::IPV6))?;
    Ok(skb.mark_for_host()?)
}

/// Admits a new connection of the attachment and records how to reply to the client.
#[inline(never)]
fn record_client<W: World>(
    world: &W,
    context: &PacketContext<'_>,
    identity: &[u8; 16],
) -> Result<(), Reason> {
    let PacketContext { settings, port, key, macs, now_ns, .. } = *context;
    let client_key = ClientKey { identity: *identity };

    // Apply the rate limit and the quota.
    let mut state = world.attachment_state(port.attachment).ok_or(Reason::NotAttached)?;
    state.syn_tat_ns = rate::admit(state.syn_tat_ns, now_ns, settings.syn_interval_ns, settings.syn_burst_ns)
        .ok_or(Reason::SynRate)?;
    let known = world.known_client(&client_key);
    if known.is_none() {
        if state.clients >= u64::from(port.client_quota) {
            return Err(Reason::ClientQuota);
        }
        state.clients += 1;
    }

    // Store the client, then the counters: a client that was not stored is not counted.
    let client = Client {
        network: port.network,
        first_seen_ns: known.map_or(now_ns, |(first_seen_ns, _)| first_seen_ns),
        last_seen_ns: now_ns,
        connections: known.map_or(1, |(_, connections)| connections.wrapping_add(1)),
        ifindex: key.ifindex,
        vlan: key.vlan,
        guest_mac: macs.guest,
        metadata_mac: macs.metadata,
        netns: key.netns,
    };
    if !world.put_client(&client_key, &client) {
        return Err(Reason::ClientsFull);
    }
    world.put_attachment_state(port.attachment, state);
    Ok(())
}
