//! IPv4 options: removed when a packet is translated or answered (RFC 7915 section 4.1).
//!
//! A source route is refused, as by the kernel unless `accept_source_route` is set. Packets with
//! options are rare, so each byte may cost a helper call.

use core::hint::black_box;

use crate::reason::Reason;
use crate::skb::{Skb, SkbError};
use crate::wire::{self, ETH_LEN, IPV4_LEN, Ipv4Header};

/// Length of the longest options.
const MAX_LEN: u32 = 40;
const TOO_SHORT: fn(SkbError) -> Reason = |SkbError| Reason::Malformed;

/// Checks a header that has options. Each step reads the length again: otherwise the verifier would
/// walk through the second once for each result of the first.
#[inline(always)]
pub(super) fn check<S: Skb>(skb: &S) -> Result<(), Reason> {
    check_sum(skb)?;
    check_each(skb)
}

#[inline(never)]
fn check_sum<S: Skb>(skb: &S) -> Result<(), Reason> {
    let ip = Ipv4Header(skb.load(ETH_LEN).map_err(TOO_SHORT)?);
    let mut sum = 0;
    let mut at = IPV4_LEN;
    while at < IPV4_LEN + MAX_LEN {
        if at >= ip.header_len() {
            break;
        }
        sum = wire::sum(&skb.load::<4>(ETH_LEN + at).map_err(TOO_SHORT)?, sum);
        at += 4;
    }
    if ip.checksum_is_right(sum) { Ok(()) } else { Err(Reason::BadIpv4Checksum) }
}

/// Walks through the options. Without a counter, because the verifier would then distinguish
/// positions by the number of options before them. Linux 5.10 learns bounds only from comparisons
/// of a whole register with a constant; hence the type of the position, and the first comparison.
#[inline(never)]
fn check_each<S: Skb>(skb: &S) -> Result<(), Reason> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const LOOSE_SOURCE_ROUTE: u8 = 131;
    const STRICT_SOURCE_ROUTE: u8 = 137;

    let [start]: [u8; 1] = skb.load(ETH_LEN).map_err(TOO_SHORT)?;
    // The compiler would leave out the constant bound if it knew this one.
    let header_len = black_box(u64::from(start & 0x0f) * 4);
    let mut at = u64::from(IPV4_LEN);
    while at < u64::from(IPV4_LEN + MAX_LEN) && at < header_len {
        let offset = ETH_LEN + u32::try_from(at).map_err(|_| Reason::Malformed)?;
        let [kind, len] = skb.load(offset).map_err(TOO_SHORT)?;
        at += match kind {
            END => break,
            NO_OPERATION => 1,
            LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return Err(Reason::Ipv4SourceRoute),
            _ if len < 2 => return Err(Reason::Malformed),
            _ => u64::from(len),
        };
        if at > header_len {
            return Err(Reason::Malformed);
        }
    }
    Ok(())
}

/// Removes the options of a checked header. Does nothing if there are none.
#[inline(always)]
pub(super) fn remove<S: Skb>(skb: &mut S, ip: &mut Ipv4Header) -> Result<(), SkbError> {
    let Some(len @ 1..) = ip.header_len().checked_sub(IPV4_LEN) else { return Ok(()) };
    *ip = ip.without_options();
    skb.remove_ipv4_options(len)?;
    skb.store(ETH_LEN, &ip.0)
}
