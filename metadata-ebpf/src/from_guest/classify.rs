//! Classifies a frame. Runs for every packet of every guest and does not touch any map.

use super::options;
use crate::identity::{METADATA_IPV4, METADATA_IPV6, METADATA_PORT};
use crate::reason::Reason;
use crate::skb::{HEAD, Skb};
use crate::wire::{self, ETH_LEN, IPV6_LEN, icmpv6};
use crate::world::Version;

/// The kinds of packets that the programs serve.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Arp,
    Solicitation,
    Echo(Version),
    /// An ICMP error that has an effect on TCP.
    IcmpError(Version),
    Tcp(Version),
}

/// Returns `None` if the packet is not metadata traffic.
#[inline(always)]
pub(super) fn classify<S: Skb>(skb: &mut S) -> Option<Result<Request, Reason>> {
    let head = skb.head()?;
    match [head[12], head[13]] {
        wire::ethertype::IPV4 => match Ipv4Kind::from_head(head)? {
            Ipv4Kind::Known(request) => Some(request),
            Ipv4Kind::BehindOptions(protocol, offset) => ipv4_behind_options(skb, protocol, offset),
        },
        wire::ethertype::ARP => arp(head),
        wire::ethertype::IPV6 => match Ipv6Kind::from_head(head)? {
            Ipv6Kind::Tcp => tcp_over_ipv6(skb),
            Ipv6Kind::Icmp(sender) => icmp_over_ipv6(skb, sender),
            Ipv6Kind::Other(rejection) => other_over_ipv6(skb, rejection),
        },
        _ => None,
    }
}

/// Classification of an IPv4 packet by its first bytes alone.
#[derive(Clone, Copy)]
enum Ipv4Kind {
    Known(Result<Request, Reason>),
    /// This protocol to the metadata address, with its header at this offset in the frame.
    BehindOptions(u8, u32),
}

impl Ipv4Kind {
    #[inline(always)]
    fn from_head(head: &[u8; HEAD]) -> Option<Self> {
        const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
        const WITHOUT_OPTIONS: u8 = 0x45;

        if [head[30], head[31], head[32], head[33]] != METADATA_IPV4 {
            return None;
        }
        let protocol = head[23];
        if protocol != wire::protocol::TCP && protocol != wire::protocol::ICMP {
            return None;
        }
        if head[14] < WITHOUT_OPTIONS || head[14] > 0x4f {
            return Some(Self::Known(Err(Reason::Malformed)));
        }
        if u16::from_be_bytes([head[20], head[21]]) & MORE_FRAGMENTS_AND_OFFSET != 0 {
            return Some(Self::Known(Err(Reason::Fragment)));
        }
        if head[14] != WITHOUT_OPTIONS {
            return Some(Self::BehindOptions(protocol, ETH_LEN + u32::from(head[14] & 0x0f) * 4));
        }
        let request = ipv4_request(protocol, [head[34], head[35], head[36], head[37]])?;
        Some(Self::Known(Ok(request)))
    }
}

/// Returns the request that TCP or ICMP with these first bytes is.
#[inline(always)]
fn ipv4_request(protocol: u8, [a, b, c, d]: [u8; 4]) -> Option<Request> {
    const UNREACHABLE: u8 = 3;
    const ECHO_REQUEST: u8 = 8;

    if protocol == wire::protocol::TCP {
        return (u16::from_be_bytes([c, d]) == METADATA_PORT).then_some(Request::Tcp(Version::V4));
    }
    match [a, b] {
        [ECHO_REQUEST, 0] => Some(Request::Echo(Version::V4)),
        // The other codes have no counterpart in ICMPv6 (RFC 7915 section 4.2).
        [UNREACHABLE, 0..=13 | 15] => Some(Request::IcmpError(Version::V4)),
        _ => None,
    }
}

#[inline(always)]
fn ipv4_behind_options<S: Skb>(skb: &S, protocol: u8, offset: u32) -> Option<Result<Request, Reason>> {
    let Ok(start) = skb.load(offset) else { return Some(Err(Reason::Malformed)) };
    let request = ipv4_request(protocol, start)?;
    Some(options::check(skb).map(|()| request))
}

#[inline(always)]
fn arp(head: &[u8; HEAD]) -> Option<Result<Request, Reason>> {
    const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    const REQUEST: [u8; 2] = [0, 1];

    if [head[14], head[15], head[16], head[17], head[18], head[19]] != ETHERNET_IPV4 {
        return None;
    }
    if [head[28], head[29], head[30], head[31]] == METADATA_IPV4 {
        return Some(Err(Reason::ForgedArp));
    }
    let asked = [head[38], head[39], head[40], head[41]] == METADATA_IPV4;
    (asked && [head[20], head[21]] == REQUEST).then_some(Ok(Request::Arp))
}

/// Classification of an IPv6 packet by its first bytes alone.
#[derive(Clone, Copy)]
enum Ipv6Kind {
    Tcp,
    Icmp(NdSender),
    /// Reason to reject the packet if it turns out to be for the metadata address.
    Other(Reason),
}

/// Validity of the sender of a neighbour discovery message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NdSender {
    /// A node on the link.
    OnLink,
    /// A sender that uses the metadata address as its own.
    MetadataAddress,
    /// A group address, or a sender behind a router.
    Invalid,
}

impl NdSender {
    #[inline(always)]
    fn from_head(head: &[u8; HEAD]) -> Self {
        const NEVER_FORWARDED: u8 = 255;

        if is_metadata_at(head, 22) {
            Self::MetadataAddress
        } else if head[21] != NEVER_FORWARDED || head[22] == 0xff {
            Self::Invalid
        } else {
            Self::OnLink
        }
    }
}

impl Ipv6Kind {
    /// The first bytes contain only four bytes of the destination. Neighbour discovery messages may
    /// be sent to any address.
    #[inline(always)]
    fn from_head(head: &[u8; HEAD]) -> Option<Self> {
        let [p0, p1, p2, p3, ..] = METADATA_IPV6;
        let next_header = head[20];
        if next_header == wire::protocol::ICMPV6 {
            return Some(Self::Icmp(NdSender::from_head(head)));
        }
        if [head[38], head[39], head[40], head[41]] != [p0, p1, p2, p3] {
            return None;
        }
        match next_header {
            wire::protocol::TCP => Some(Self::Tcp),
            wire::protocol::IPV6_FRAGMENT => Some(Self::Other(Reason::Fragment)),
            wire::protocol::HOP_BY_HOP
            | wire::protocol::IPV6_ROUTING
            | wire::protocol::AUTHENTICATION
            | wire::protocol::IPV6_DESTINATION => Some(Self::Other(Reason::Ipv6Extension)),
            _ => None,
        }
    }
}

/// Returns true if the address at `offset` is the metadata address. Compares from the end, because
/// addresses of one link differ there.
#[inline(always)]
fn is_metadata_at<const N: usize>(bytes: &[u8; N], offset: usize) -> bool {
    let mut at = METADATA_IPV6.len();
    while at > 0 {
        at -= 1;
        if bytes[offset + at] != METADATA_IPV6[at] {
            return false;
        }
    }
    true
}

/// Offset of the destination address.
const DESTINATION: u32 = ETH_LEN + 24;

/// Reads bytes behind the head: in place if they are in the linear part of the packet, as they
/// usually are, and by a helper call otherwise.
#[inline(always)]
fn read<S: Skb, const N: usize, T>(skb: &S, offset: u32, parse: impl FnOnce(&[u8; N]) -> T) -> Option<T> {
    match skb.linear(offset) {
        Some(bytes) => Some(parse(bytes)),
        None => skb.load(offset).ok().as_ref().map(parse),
    }
}

#[inline(always)]
fn tcp_over_ipv6<S: Skb>(skb: &S) -> Option<Result<Request, Reason>> {
    let ours = read(skb, DESTINATION, |destination_and_ports: &[u8; 20]| {
        let port = [destination_and_ports[18], destination_and_ports[19]];
        u16::from_be_bytes(port) == METADATA_PORT && is_metadata_at(destination_and_ports, 0)
    })?;
    ours.then_some(Ok(Request::Tcp(Version::V6)))
}

#[inline(always)]
fn other_over_ipv6<S: Skb>(skb: &S, rejection: Reason) -> Option<Result<Request, Reason>> {
    read(skb, DESTINATION, is_metadata)?.then_some(Err(rejection))
}

#[inline(always)]
fn is_metadata(address: &[u8; 16]) -> bool {
    is_metadata_at(address, 0)
}

/// Rejects every neighbour discovery message that claims the metadata address (RFC 4861, section
/// 4).
#[inline(always)]
fn icmp_over_ipv6<S: Skb>(skb: &S, sender: NdSender) -> Option<Result<Request, Reason>> {
    let (kind, code) = read(skb, ETH_LEN + IPV6_LEN, |[kind, code]: &[u8; 2]| (*kind, *code))?;
    let is_ours = |at: u32| read(skb, at, is_metadata).unwrap_or(false);
    if kind == icmpv6::ECHO_REQUEST {
        return (code == 0 && is_ours(DESTINATION)).then_some(Ok(Request::Echo(Version::V6)));
    }
    if !icmpv6::is_neighbour_discovery(kind) {
        let is_error = kind == icmpv6::UNREACHABLE || kind == icmpv6::PACKET_TOO_BIG;
        return (is_error && is_ours(DESTINATION)).then_some(Ok(Request::IcmpError(Version::V6)));
    }
    if sender == NdSender::MetadataAddress {
        return Some(Err(Reason::ForgedNd));
    }
    let solicits = kind == icmpv6::NEIGHBOUR_SOLICITATION;
    if (!solicits && kind != icmpv6::NEIGHBOUR_ADVERTISEMENT) || !is_ours(ETH_LEN + IPV6_LEN + icmpv6::TARGET)
    {
        return None;
    }
    Some(if !solicits {
        Err(Reason::ForgedNd)
    } else if sender == NdSender::Invalid || code != 0 {
        Err(Reason::Malformed)
    } else {
        Ok(Request::Solicitation)
    })
}
