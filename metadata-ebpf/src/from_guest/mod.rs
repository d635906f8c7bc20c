//! `md_from_guest`: TC ingress on a guest-facing interface.
//!
//! * What is not metadata traffic leaves at once, before any map is touched: a few loads and compares are the tax
//!   that every packet of every guest pays ([`classify`]).
//! * ARP, neighbour solicitations and ICMP echo for the metadata addresses are answered in place ([`neighbour`], [`echo`]).
//! * TCP to port 80 there is led into the portal, with the identity address for its source ([`segment`]).
//! * In doubt a packet is left to the host's own path; a forged one is dropped. In a router that has no such path it is
//!   dropped as well, or it would leave by the external gateway.

mod classify;
mod echo;
mod neighbour;
mod segment;

use crate::abi::{CHECK_IPV4, CHECK_MAC, CONFINED, Port, PortKey, Settings};
use crate::identity::{METADATA_IPV4, METADATA_IPV6, METADATA_PORT};
use crate::reason::{Reason, Verdict};
use crate::skb::{Skb, SkbError, Vlan};
use crate::wire::{self, Mac};
use crate::world::{Version, World};
use classify::{Request, classify};
pub use neighbour::METADATA_MAC;

/// What became of a packet, and by which interface it goes where the verdict moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Counted, and mapped to the verdict.
    pub reason: Reason,
    /// Interface to redirect to; 0 where the verdict is not a redirection.
    pub ifindex: u32,
}

impl From<Reason> for Outcome {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self { reason, ifindex: 0 }
    }
}

impl From<SkbError> for Reason {
    #[inline(always)]
    fn from(_: SkbError) -> Self {
        Self::HelperFailed
    }
}

/// Decides about one frame of a guest and rewrites it where it is served. `None`: not metadata traffic, untouched and
/// uncounted.
#[inline(always)]
pub fn from_guest<S: Skb, W: World>(skb: &mut S, world: &W) -> Option<Outcome> {
    let served = match classify(skb)? {
        Ok(request) => serve(skb, world, request),
        Err(refused) => Err(refused),
    };
    let outcome = served.unwrap_or_else(Outcome::from);
    // Whatever goes to the next program is untouched, so it can still be looked at.
    if matches!(outcome.reason.verdict(), Verdict::Next) && is_confined(skb, world) {
        return Some(Reason::Confined.into());
    }
    Some(outcome)
}

/// Whether a packet that is left alone would find nobody in its router. Only sockets tell: the agent, which could, may be
/// gone. Not inlined, for the stack's sake.
#[inline(never)]
fn is_confined<S: Skb, W: World>(skb: &S, world: &W) -> bool {
    let netns = world.netns_context(|netns| &netns.netns);
    let version = match skb.load(12) {
        Ok(wire::ethertype::IPV4) => Version::V4,
        Ok(wire::ethertype::IPV6) => Version::V6,
        _ => return false,
    };
    let key = PortKey { netns, ifindex: skb.ifindex(), vlan: 0 };
    netns != 0
        && world.port(&key).is_some_and(|port| port.flags & CONFINED != 0)
        && !world.legacy_listens(version, METADATA_PORT.into())
        && !world.legacy_listens(version, world.netns_context(|netns| &netns.legacy_port))
}

#[inline(always)]
fn serve<S: Skb, W: World>(skb: &mut S, world: &W, request: Request) -> Result<Outcome, Reason> {
    let netns = world.netns_context(|netns| &netns.netns);
    let key = PortKey {
        netns,
        ifindex: skb.ifindex(),
        vlan: match skb.vlan() {
            Vlan::Untagged => 0,
            Vlan::Tagged(id) => u32::from(id),
            // Of priority alone, or of a service provider: no subport of Neutron's has such a tag.
            Vlan::Unsupported => return Err(Reason::Vlan),
        },
    };
    let settings = world.settings().ok_or(Reason::AgentAbsent)?;
    let now_ns = world.now_ns();
    let beat = world.heartbeat_ns();
    if beat == 0 || now_ns.saturating_sub(beat) > settings.stale_after_ns {
        return Err(Reason::AgentAbsent);
    }
    let missing = if key.vlan == 0 { Reason::NotAttached } else { Reason::Vlan };
    let port = world.port(&key).ok_or(missing)?;
    let mut macs = Macs { metadata: [0; 6], guest: [0; 6] };
    check_macs(port, skb, request, &mut macs)?;
    let context = PacketContext { settings, port, key: &key, macs: &macs, now_ns };
    let reason = match request {
        Request::Arp => neighbour::answer_arp(skb, &context).map(|()| Reason::ArpReply),
        Request::Solicitation => neighbour::answer_solicitation(skb, &context).map(|()| Reason::NdReply),
        Request::Echo(Version::V4) => echo::answer_ipv4(skb, &context).map(|()| Reason::EchoReply),
        Request::Echo(Version::V6) => echo::answer_ipv6(skb, &context).map(|()| Reason::EchoReply),
        Request::Tcp(version) => segment::redirect_to_portal(skb, world, &context, version),
    }?;
    let ifindex = match reason.verdict() {
        Verdict::ToPortal if netns == 0 => settings.portal_ifindex,
        Verdict::ToPortal => world.netns_context(|netns| &netns.portal_ifindex),
        Verdict::ToGuest => key.ifindex,
        Verdict::Next | Verdict::Drop | Verdict::ToNeighbour => 0,
    };
    Ok(Outcome { reason, ifindex })
}

/// Where a request comes from, and when.
struct PacketContext<'a> {
    settings: &'a Settings,
    port: &'a Port,
    key: &'a PortKey,
    macs: &'a Macs,
    now_ns: u64,
}

/// The MAC addresses of a frame.
#[derive(Clone, Copy)]
struct Macs {
    /// What it is sent to: a router, a DHCP port, OVN's metadata port or our own answer.
    metadata: Mac,
    /// What it is sent from.
    guest: Mac,
}

/// The source must be the port's own where that is known. Not inlined, for the stack's sake.
#[inline(never)]
fn check_macs<S: Skb>(port: &Port, skb: &S, request: Request, macs: &mut Macs) -> Result<(), Reason> {
    let ethernet: [u8; 14] = skb.load(0)?;
    let [t0, t1, t2, t3, t4, t5, f0, f1, f2, f3, f4, f5, ..] = ethernet;
    *macs = Macs { metadata: [t0, t1, t2, t3, t4, t5], guest: [f0, f1, f2, f3, f4, f5] };
    let asks_all = matches!(request, Request::Arp | Request::Solicitation);
    if wire::is_group(macs.guest) || (!asks_all && wire::is_group(macs.metadata)) {
        return Err(Reason::Malformed);
    }
    if port.flags & CHECK_MAC != 0 && macs.guest != port.mac {
        return Err(Reason::ForgedMac);
    }
    Ok(())
}

/// Whether the port may send from this address. Addresses that no host may send from count as forged on every port.
#[inline(always)]
fn check_source(port: &Port, source: [u8; 4]) -> Result<(), Reason> {
    let is_a_hosts = source[0] != 0 && source[0] != 127 && source[0] < 224 && source != METADATA_IPV4;
    if !is_a_hosts {
        return Err(Reason::ForgedAddress);
    }
    if port.flags & CHECK_IPV4 == 0 {
        return Ok(());
    }
    let known = port.ipv4.iter().take(port.ipv4_count as usize);
    if known.into_iter().any(|prefix| prefix.contains(source)) { Ok(()) } else { Err(Reason::ForgedAddress) }
}

/// The interface identifier of a source in fe80::/64. Any will do, since guests make them up as they like (RFC 7217, RFC
/// 8981); but not ours.
#[inline(always)]
fn check_ipv6_source(source: [u8; 16]) -> Result<[u8; 8], Reason> {
    let [p0, p1, p2, p3, p4, p5, p6, p7, interface_id @ ..] = source;
    if [p0, p1, p2, p3, p4, p5, p6, p7] != [0xfe, 0x80, 0, 0, 0, 0, 0, 0] {
        return Err(Reason::Ipv6Source);
    }
    if source == METADATA_IPV6 { Err(Reason::ForgedAddress) } else { Ok(interface_id) }
}
