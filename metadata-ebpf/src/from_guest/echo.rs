//! Answers ICMP echo requests in place: swaps the addresses and changes the type.
//!
//! Not inlined, for the reason given in [`super::segment`].

use super::{PacketContext, check_ipv6_source, check_source, options};
use crate::identity::{METADATA_IPV4, METADATA_IPV6};
use crate::reason::Reason;
use crate::skb::Skb;
use crate::wire::{self, ETH_LEN, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, icmpv6};

/// Length of an echo message without data.
const ECHO_LEN: u32 = 8;

/// RFC 792. Swapping the addresses does not change the IPv4 checksum.
#[inline(never)]
pub(super) fn answer_ipv4<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    const REQUEST: [u8; 2] = [8, 0];
    const REPLY: [u8; 2] = [0, 0];
    let mut ip = Ipv4Header(skb.load(ETH_LEN)?);
    check_source(context, u32::from_ne_bytes(ip.source()))?;
    if ip.total_len() < ip.header_len() + ECHO_LEN || ETH_LEN + ip.total_len() > skb.len() {
        return Err(Reason::Malformed);
    }

    options::remove(skb, &mut ip)?;
    skb.store(0, &wire::ethernet(context.macs.guest, context.macs.metadata, wire::ethertype::IPV4))?;
    skb.store(ETH_LEN + 12, &METADATA_IPV4)?;
    skb.store(ETH_LEN + 16, &ip.source())?;
    skb.adjust_icmp_checksum(ETH_LEN + IPV4_LEN + 2, REQUEST, REPLY)?;
    skb.store(ETH_LEN + IPV4_LEN, &REPLY)?;
    Ok(())
}

/// RFC 4443 section 4. Swapping the addresses does not change the pseudo header's sum.
#[inline(never)]
pub(super) fn answer_ipv6<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    const REQUEST: [u8; 2] = [icmpv6::ECHO_REQUEST, 0];
    const REPLY: [u8; 2] = [icmpv6::ECHO_REPLY, 0];
    let ip = Ipv6Header(skb.load(ETH_LEN)?);
    check_ipv6_source(ip.source())?;
    let payload_len = u32::from(ip.payload_len());
    if payload_len < ECHO_LEN || ETH_LEN + IPV6_LEN + payload_len > skb.len() {
        return Err(Reason::Malformed);
    }

    skb.store(0, &wire::ethernet(context.macs.guest, context.macs.metadata, wire::ethertype::IPV6))?;
    skb.store(ETH_LEN + 8, &METADATA_IPV6)?;
    skb.store(ETH_LEN + 24, &ip.source())?;
    skb.adjust_icmp_checksum(ETH_LEN + IPV6_LEN + 2, REQUEST, REPLY)?;
    skb.store(ETH_LEN + IPV6_LEN, &REPLY)?;
    Ok(())
}
