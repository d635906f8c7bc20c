//! Address resolution in the name of a guest.
//!
//! When the agent stops, guests that reach the metadata address on their link still send to
//! [`METADATA_MAC`](crate::from_guest::METADATA_MAC). The agent sends an empty datagram to each
//! client's identity address. It becomes an ARP request or a neighbour solicitation that the
//! guest's interface receives as if the guest had sent it. Whatever else has the metadata address
//! replies to the guest, whose neighbour table is then correct.
//!
//! Only the agent can send such a datagram: no other process has a socket in the portal, and
//! `md_from_guest` redirects no UDP.

use crate::identity::{GuestAddress, METADATA_IPV4, METADATA_IPV6};
use crate::skb::{Skb, SkbError};
use crate::wire::{self, ETH_LEN, IPV6_LEN, Mac, icmpv6};

/// Length of the UDP header.
const UDP_LEN: u16 = 8;
/// Length of the datagram's payload. The frame is then as long as a solicitation.
pub const PAYLOAD_LEN: u16 = 24;
/// Length of the datagram with its header.
pub(super) const DATAGRAM_LEN: u16 = UDP_LEN + PAYLOAD_LEN;

/// Replaces a query's datagram by the request for the metadata address in the guest's name.
#[inline(always)]
pub(super) fn write<S: Skb>(skb: &mut S, guest: GuestAddress, mac: Mac) -> Result<(), SkbError> {
    match guest {
        GuestAddress::Ipv4(address) => request_arp(skb, address, mac),
        GuestAddress::Ipv6LinkLocal(interface_id) => solicit(skb, interface_id, mac),
    }
}

/// RFC 826.
#[inline(always)]
fn request_arp<S: Skb>(skb: &mut S, address: [u8; 4], mac: Mac) -> Result<(), SkbError> {
    const BROADCAST: Mac = [0xff; 6];
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    /// Ethernet's minimum, without the checksum. The kernel cuts no further than to the transport
    /// header.
    const FRAME_LEN: u32 = 60;
    const PADDING: [u8; 18] = [0; 18];

    skb.resize(FRAME_LEN)?;
    skb.store(0, &wire::ethernet(BROADCAST, mac, wire::ethertype::ARP))?;
    skb.store(ETH_LEN, &REQUEST)?;
    skb.store(ETH_LEN + 8, &mac)?;
    skb.store(ETH_LEN + 14, &address)?;
    skb.store(ETH_LEN + 18, &[0; 6])?;
    skb.store(ETH_LEN + 24, &METADATA_IPV4)?;
    skb.store(ETH_LEN + 28, &PADDING)
}

/// RFC 4861 section 7.2.2.
#[inline(always)]
fn solicit<S: Skb>(skb: &mut S, interface_id: [u8; 8], mac: Mac) -> Result<(), SkbError> {
    let [a, b, c, d, e, f, g, h] = interface_id;
    let guest = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h];

    skb.store(0, &wire::ethernet(icmpv6::SOLICITED_NODE_MAC, mac, wire::ethertype::IPV6))?;
    skb.store(ETH_LEN, &icmpv6::DISCOVERY_IPV6_HEADER)?;
    skb.store(ETH_LEN + 8, &guest)?;
    skb.store(ETH_LEN + 24, &icmpv6::SOLICITED_NODE)?;
    skb.store(ETH_LEN + IPV6_LEN, &icmpv6::solicitation(&guest, METADATA_IPV6, mac))?;
    skb.store(ETH_LEN + IPV6_LEN + icmpv6::TARGET, &METADATA_IPV6)?;
    skb.store(ETH_LEN + IPV6_LEN + icmpv6::TARGET + 16, &icmpv6::source_link_layer_address(mac))
}
