//! `md_to_guest`: TC ingress on the host end of the portal's veth pair.
//!
//! Every packet here comes from the portal, which contains only the agent's sockets. A reply of the
//! metadata service goes to the client that its identity address names; everything else is dropped.
//!
//! The attachment in that address must still be carried by its interface. When an interface goes,
//! the kernel removes the attachment's entry in `MD_DEVICES` as well. So another interface that
//! gets the same index does not receive the reply.
//!
//! In a namespace whose interface many guests share, the reply goes to the MAC address that the
//! client sends from, which its identity address names. The agent answers nobody there who sends
//! from another MAC address than its port's. The namespace's neighbour table is not asked: all
//! namespaces share its size, so made-up clients could fill it and keep guests out.
//!
//! A datagram to an identity address becomes an ARP request or a neighbour solicitation in the
//! guest's name ([`query`]).

mod query;

use crate::from_guest::{METADATA_MAC, Outcome};
use crate::identity::{
    ClientAddress, ClientMac, GuestAddress, METADATA_IPV4, METADATA_IPV6, METADATA_PORT, PORTAL_ADDRESS,
};
use crate::reason::Reason;
use crate::skb::{Skb, SkbError};
use crate::wire::{
    self, ETH_LEN, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, TCP_CHECKSUM, TCP_LEN, TcpHeader,
};
use crate::world::World;
pub use query::PAYLOAD_LEN as QUERY_PAYLOAD_LEN;

/// Decides about one frame from the portal and rewrites it for the guest.
#[inline(always)]
pub fn to_guest<S: Skb, W: World>(skb: &mut S, world: &W) -> Outcome {
    reply(skb, world).unwrap_or_else(Outcome::from)
}

#[inline(always)]
fn reply<S: Skb, W: World>(skb: &mut S, world: &W) -> Result<Outcome, Reason> {
    // Only a TCP segment from the metadata service is a reply, and only a datagram is a query.
    let not_a_reply = |SkbError| Reason::NotAnAnswer;
    let ethertype: [u8; 2] = skb.load(12).map_err(not_a_reply)?;
    let ip = Ipv6Header(skb.load(ETH_LEN).map_err(not_a_reply)?);
    let tcp = TcpHeader(skb.load(ETH_LEN + IPV6_LEN).map_err(not_a_reply)?);
    let is_ours = ethertype == wire::ethertype::IPV6 && ip.source() == PORTAL_ADDRESS;
    let is_reply = is_ours
        && ip.0[6] == wire::protocol::TCP
        && tcp.source_port() == METADATA_PORT
        && u32::from(ip.payload_len()) >= TCP_LEN
        && u32::from(ip.payload_len()) <= 0xffff - IPV4_LEN
        && ETH_LEN + IPV6_LEN + u32::from(ip.payload_len()) <= skb.len();
    let is_query = is_ours
        && ip.0[6] == wire::protocol::UDP
        && ip.payload_len() == query::DATAGRAM_LEN
        && ETH_LEN + IPV6_LEN + u32::from(query::DATAGRAM_LEN) == skb.len();
    if !is_reply && !is_query {
        return Err(Reason::NotAnAnswer);
    }

    // Look up the client.
    let identity = ip.destination();
    let client = ClientAddress::from_identity(identity).ok_or(Reason::NoClient)?;
    let attachment = client.attachment.get();
    let (attachment_netns, vlan, metadata_mac, guest_mac) = world
        .attachment(attachment, |state| {
            let guest_mac = match client.mac {
                ClientMac::Address(mac) => Some(mac),
                ClientMac::Slot(slot) => state.mac(slot).get(),
            };
            (state.netns, state.vlan, state.metadata_mac.get(), guest_mac)
        })
        .ok_or(Reason::NoClient)?;
    let guest_mac = guest_mac.ok_or(Reason::NoClient)?;
    // The index of an interface is valid only in its own namespace.
    let netns = world.netns_context(|netns| &netns.netns);
    if attachment_netns != netns {
        return Err(Reason::NoClient);
    }
    let ifindex = world.device(attachment).ok_or(Reason::InterfaceGone)?;

    if is_query {
        query::write(skb, client.guest, guest_mac)?;
        push_tag(skb, vlan)?;
        return Ok(Outcome { reason: Reason::AddressQuery, ifindex });
    }

    // Rewrite the frame for the guest.
    let ethertype = match client.guest {
        GuestAddress::Ipv4(guest) => {
            translate_ipv4(skb, &ip, guest)?;
            wire::ethertype::IPV4
        }
        GuestAddress::Ipv6LinkLocal(interface_id) => {
            translate_ipv6(skb, identity, interface_id)?;
            wire::ethertype::IPV6
        }
    };
    skb.store(0, &wire::ethernet(guest_mac, metadata_mac.unwrap_or(METADATA_MAC), ethertype))?;
    push_tag(skb, vlan)?;
    let reason = if netns == 0 { Reason::Reply } else { Reason::RoutedReply };
    Ok(Outcome { reason, ifindex })
}

/// Adds the tag of a trunk subport.
#[inline(always)]
fn push_tag<S: Skb>(skb: &mut S, vlan: u32) -> Result<(), SkbError> {
    match u16::try_from(vlan) {
        Ok(vlan @ 1..) => skb.push_vlan(vlan),
        _ => Ok(()),
    }
}

#[inline(always)]
fn translate_ipv4<S: Skb>(skb: &mut S, ip: &Ipv6Header, guest: [u8; 4]) -> Result<(), SkbError> {
    let header = Ipv4Header::reply(METADATA_IPV4, guest, ip.payload_len(), ip.traffic_class(), ip.0[7]);
    let difference = wire::checksum_difference(&PORTAL_ADDRESS, &METADATA_IPV4)
        + wire::checksum_difference(&ip.destination(), &guest);

    skb.change_to_ipv4()?;
    skb.store(ETH_LEN, &header.0)?;
    skb.adjust_checksum(ETH_LEN + IPV4_LEN + TCP_CHECKSUM, difference)
}

#[inline(always)]
fn translate_ipv6<S: Skb>(skb: &mut S, identity: [u8; 16], interface_id: [u8; 8]) -> Result<(), SkbError> {
    let [a, b, c, d, e, f, g, h] = interface_id;
    let guest = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h];
    let difference = wire::checksum_difference(&PORTAL_ADDRESS, &METADATA_IPV6)
        + wire::checksum_difference(&identity, &guest);

    skb.store(ETH_LEN + 8, &METADATA_IPV6)?;
    skb.store(ETH_LEN + 24, &guest)?;
    skb.adjust_checksum(ETH_LEN + IPV6_LEN + TCP_CHECKSUM, difference)
}
