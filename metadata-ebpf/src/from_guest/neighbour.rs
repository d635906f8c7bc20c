//! Answers ARP requests and neighbour solicitations for the metadata addresses in place.

use super::PacketContext;
use crate::identity::{METADATA_IPV4, METADATA_IPV6};
use crate::reason::Reason;
use crate::skb::Skb;
use crate::wire::{self, ETH_LEN, IPV6_LEN, Mac, icmpv6};

/// The MAC address in replies for 169.254.169.254 and fe80::a9fe:a9fe: locally administered, with
/// the IPv4 address in its last four octets.
pub const METADATA_MAC: Mac = [0x02, 0x00, 169, 254, 169, 254];

/// RFC 826: sends a reply to the requester, from the requested address. A probe (RFC 5227, sender
/// 0.0.0.0) gets a reply too, because the address is in use.
#[inline(always)]
pub(super) fn answer_arp<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    const REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
    let requester: [u8; 10] = skb.load(ETH_LEN + 8)?;

    skb.store(0, &wire::ethernet(context.macs.guest, METADATA_MAC, wire::ethertype::ARP))?;
    skb.store(ETH_LEN, &REPLY)?;
    skb.store(ETH_LEN + 8, &METADATA_MAC)?;
    skb.store(ETH_LEN + 14, &METADATA_IPV4)?;
    skb.store(ETH_LEN + 18, &requester)?;
    Ok(())
}

/// RFC 4861 section 7.2.4. A solicitation with source `::` is a duplicate address detection probe
/// (RFC 4862 section 5.4). Its sender has no address yet, so the reply goes to the all-nodes
/// multicast address. The solicitation's checksum is not verified: only its source is used.
#[inline(never)]
pub(super) fn answer_solicitation<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

    let requester: [u8; 16] = skb.load(ETH_LEN + 8)?;
    let (to, to_mac, flags) = match requester {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => (ALL_NODES, ALL_NODES_MAC, icmpv6::OVERRIDE),
        _ => (requester, context.macs.guest, icmpv6::SOLICITED | icmpv6::OVERRIDE),
    };

    // The target stays in place and the rest is written in pieces, because a whole message would
    // not fit on the stack.
    skb.resize(ETH_LEN + IPV6_LEN + icmpv6::DISCOVERY_LEN)?;
    skb.store(0, &wire::ethernet(to_mac, METADATA_MAC, wire::ethertype::IPV6))?;
    skb.store(ETH_LEN, &icmpv6::DISCOVERY_IPV6_HEADER)?;
    skb.store(ETH_LEN + 8, &METADATA_IPV6)?;
    skb.store(ETH_LEN + 24, &to)?;
    skb.store(ETH_LEN + IPV6_LEN, &icmpv6::advertisement(flags, METADATA_IPV6, METADATA_MAC, to))?;
    skb.store(ETH_LEN + IPV6_LEN + icmpv6::TARGET + 16, &icmpv6::target_link_layer_address(METADATA_MAC))?;
    Ok(())
}
