//! Who has the metadata address: ARP and neighbour solicitations, answered in place.

use super::PacketContext;
use crate::identity::{METADATA_IPV4, METADATA_IPV6};
use crate::reason::Reason;
use crate::skb::Skb;
use crate::wire::{self, ETH_LEN, IPV6_LEN, Mac, icmpv6};

/// The MAC address that requests for 169.254.169.254 and fe80::a9fe:a9fe are answered with: locally administered, and the
/// address it stands for can be read in it.
pub const METADATA_MAC: Mac = [0x02, 0x00, 169, 254, 169, 254];

/// RFC 826: the answer to who asked, from the asked address. A probe (RFC 5227, sender 0.0.0.0) is answered too: the
/// address is taken.
#[inline(always)]
pub(super) fn answer_arp<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    const REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
    let asker: [u8; 10] = skb.load(ETH_LEN + 8)?;

    skb.store(0, &wire::ethernet(context.macs.guest, METADATA_MAC, wire::ethertype::ARP))?;
    skb.store(ETH_LEN, &REPLY)?;
    skb.store(ETH_LEN + 8, &METADATA_MAC)?;
    skb.store(ETH_LEN + 14, &METADATA_IPV4)?;
    skb.store(ETH_LEN + 18, &asker)?;
    Ok(())
}

/// RFC 4861 section 7.2.4. Who tries the address out for itself (RFC 4862 section 5.4, source `::`) is told, by all-nodes
/// multicast as it has no address to be told at, that it is taken. The solicitation's checksum is not looked at: nothing
/// of it but the source is used.
#[inline(never)]
pub(super) fn answer_solicitation<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

    let asker: [u8; 16] = skb.load(ETH_LEN + 8)?;
    let (to, to_mac, flags) = match asker {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => (ALL_NODES, ALL_NODES_MAC, icmpv6::OVERRIDE),
        _ => (asker, context.macs.guest, icmpv6::SOLICITED | icmpv6::OVERRIDE),
    };

    // The target stays where it is, and the rest is written piece by piece: a whole message would fill the stack.
    skb.resize(ETH_LEN + IPV6_LEN + icmpv6::ADVERTISEMENT_LEN)?;
    skb.store(0, &wire::ethernet(to_mac, METADATA_MAC, wire::ethertype::IPV6))?;
    skb.store(ETH_LEN, &icmpv6::ADVERTISEMENT_IPV6_HEADER)?;
    skb.store(ETH_LEN + 8, &METADATA_IPV6)?;
    skb.store(ETH_LEN + 24, &to)?;
    skb.store(ETH_LEN + IPV6_LEN, &icmpv6::advertisement(flags, METADATA_IPV6, METADATA_MAC, to))?;
    skb.store(ETH_LEN + IPV6_LEN + icmpv6::TARGET + 16, &icmpv6::target_link_layer_address(METADATA_MAC))?;
    Ok(())
}
