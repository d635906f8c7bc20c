//! `md_from_guest`: TC ingress on a guest-facing interface.
//!
//! * A packet that is not metadata traffic leaves at once, before any map is touched. Every packet
//!   of every guest pays only these few loads and compares ([`classify`]).
//! * ARP requests, neighbour solicitations and ICMP echo requests for the metadata addresses are
//!   answered in place ([`neighbour`], [`echo`]).
//! * TCP to port 80 of these addresses is redirected to the portal, with the identity address as
//!   its source ([`segment`]). ICMP errors about such a connection follow it ([`icmp_error`]).
//! * A doubtful packet is left to the host's own path; a forged packet is dropped. In a router
//!   namespace without such a path doubtful packets are dropped too, because they would leave by
//!   the external gateway. Each dropped packet is recorded at its attachment ([`refusal`]).

mod classify;
mod echo;
mod icmp_error;
mod neighbour;
mod options;
mod refusal;
mod segment;

use core::hint::black_box;

use crate::abi::{
    CHECK_IPV4, CHECK_MAC, CONFINED, MAX_PORT_SOURCES, MacWord, Port, PortKey, PortSource, SHARED, Settings,
};
use crate::identity::{AttachmentId, ClientAddress, METADATA_IPV4, METADATA_IPV6, METADATA_PORT};
use crate::reason::{Reason, Verdict};
use crate::skb::{Skb, SkbError, Vlan};
use crate::wire::{self, Mac};
use crate::world::{Version, World};
use classify::{Request, classify};
pub use neighbour::METADATA_MAC;

/// The decision about a packet, and the interface to redirect it to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Counted, and mapped to the verdict.
    pub reason: Reason,
    /// Interface to redirect to; 0 if the verdict is not a redirection.
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

/// Decides about one frame of a guest and rewrites it if it is served. Returns `None`, with the
/// frame unchanged and uncounted, if it is not metadata traffic.
#[inline(always)]
pub fn from_guest<S: Skb, W: World>(skb: &mut S, world: &W) -> Option<Outcome> {
    let served = match classify(skb)? {
        Ok(request) => serve(skb, world, request),
        Err(rejection) => Err(rejection),
    };
    let mut outcome = served.unwrap_or_else(Outcome::from);
    // A packet for the next program is unchanged, so it can still be inspected.
    if matches!(outcome.reason.verdict(), Verdict::Next) && is_confined(skb, world) {
        outcome = Reason::Confined.into();
    }
    if matches!(outcome.reason.verdict(), Verdict::Drop) {
        refusal::record(skb, world, outcome.reason);
    }
    Some(outcome)
}

/// Returns the key of the attachment by which a frame with this tag entered.
#[inline(always)]
fn port_key<S: Skb, W: World>(skb: &S, world: &W, tag: Vlan) -> Result<PortKey, Reason> {
    Ok(PortKey {
        netns: world.netns_context(|netns| &netns.netns),
        ifindex: skb.ifindex(),
        vlan: match tag {
            Vlan::Untagged | Vlan::Priority => 0,
            Vlan::Tagged(id) => u32::from(id),
            // A service provider tag: Neutron's subports never use it.
            Vlan::Unsupported => return Err(Reason::Vlan),
        },
    })
}

/// Returns true if a packet that we leave alone would find no listener in its router namespace.
/// Only sockets show this, because the agent may have stopped. Not inlined, to save stack.
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
    let tag = skb.vlan();
    let key = port_key(skb, world, tag)?;

    // Check that the agent is alive.
    let settings = world.settings().ok_or(Reason::AgentAbsent)?;
    let now_ns = world.now_ns();
    let beat = world.heartbeat_ns();
    if beat == 0 || now_ns.saturating_sub(beat) > settings.stale_after_ns {
        return Err(Reason::AgentAbsent);
    }

    // Find the attachment and check the source MAC address.
    let missing = if key.vlan == 0 { Reason::NotAttached } else { Reason::Vlan };
    let port = world.port(&key).ok_or(missing)?;
    let mut macs = Macs { metadata: [0; 6], guest: [0; 6] };
    check_macs(port, skb, request, &mut macs)?;

    // Answer in place, or redirect.
    let context = PacketContext { settings, port, key: &key, macs: &macs, now_ns };
    let reason = match request {
        Request::Arp => neighbour::answer_arp(skb, &context).map(|()| Reason::ArpReply),
        Request::Solicitation => neighbour::answer_solicitation(skb, &context).map(|()| Reason::NdReply),
        Request::Echo(Version::V4) => echo::answer_ipv4(skb, &context).map(|()| Reason::EchoReply),
        Request::Echo(Version::V6) => echo::answer_ipv6(skb, &context).map(|()| Reason::EchoReply),
        Request::IcmpError(version) => icmp_error::redirect_to_portal(skb, world, &context, version),
        Request::Tcp(version) => segment::redirect_to_portal(skb, world, &context, version),
    }?;
    // Remove the tag, except from the answer to a subport. The kernel's own replies to priority
    // tagged packets are untagged too.
    let keeps_tag = match tag {
        Vlan::Untagged => true,
        Vlan::Tagged(_) | Vlan::Unsupported => reason.verdict() != Verdict::ToPortal,
        Vlan::Priority => false,
    };
    if !keeps_tag {
        skb.pop_vlan()?;
    }
    let ifindex = match reason.verdict() {
        Verdict::ToPortal if key.netns == 0 => settings.portal_ifindex,
        Verdict::ToPortal => world.netns_context(|netns| &netns.portal_ifindex),
        Verdict::ToGuest => key.ifindex,
        Verdict::Next | Verdict::Drop | Verdict::AsGuest => 0,
    };
    Ok(Outcome { reason, ifindex })
}

/// Facts about a packet that all handlers need.
struct PacketContext<'a> {
    settings: &'a Settings,
    port: &'a Port,
    key: &'a PortKey,
    macs: &'a Macs,
    now_ns: u64,
}

/// MAC addresses of a frame.
#[derive(Clone, Copy)]
struct Macs {
    /// Destination: a router, a DHCP port, OVN's metadata port or our own address.
    metadata: Mac,
    /// Source.
    guest: Mac,
}

/// Checks that the source MAC address is one of the port's, if these are known. Not inlined, to
/// save stack.
#[inline(never)]
fn check_macs<S: Skb>(port: &Port, skb: &S, request: Request, macs: &mut Macs) -> Result<(), Reason> {
    let ethernet: [u8; 14] = skb.load(0)?;
    let [t0, t1, t2, t3, t4, t5, f0, f1, f2, f3, f4, f5, ..] = ethernet;
    *macs = Macs { metadata: [t0, t1, t2, t3, t4, t5], guest: [f0, f1, f2, f3, f4, f5] };
    let is_broadcast_request = matches!(request, Request::Arp | Request::Solicitation);
    if wire::is_group(macs.guest) || (!is_broadcast_request && wire::is_group(macs.metadata)) {
        return Err(Reason::Malformed);
    }
    if port.flags & CHECK_MAC == 0 || has_source(port, MacWord::new(macs.guest).0, 0, 0) {
        return Ok(());
    }
    Err(Reason::ForgedMac)
}

/// Returns true if one of the port's sources has this MAC address and contains this IPv4 address.
/// `relevant` has ones where the addresses must agree. Addresses are in network order.
///
/// Each step has one comparison, so that the verifier need not follow two paths through each. The
/// bounds are explained in [`options`].
#[inline(never)]
fn has_source(port: &Port, mac: u64, address: u32, relevant: u32) -> bool {
    let count = black_box(port.source_count as usize);
    let mut at = 0;
    while at < MAX_PORT_SOURCES && at < count {
        let PortSource { mac: MacWord(allowed), ipv4 } = port.sources[at];
        let difference = ipv4.difference(address) & relevant;
        if allowed ^ mac | u64::from(difference) == 0 {
            return true;
        }
        at += 1;
    }
    false
}

/// Checks that the port may send from this address. Addresses that a host must not send from count
/// as forged on every port.
///
/// A guest without DHCP gives itself a link-local address (RFC 3927). Like fe80::/64, that range is
/// its own business, unless guests share the interface.
#[inline(never)]
fn check_source(context: &PacketContext<'_>, address: u32) -> Result<(), Reason> {
    let PacketContext { port, macs, .. } = *context;
    let source = address.to_ne_bytes();
    let is_host_address = source[0] != 0 && source[0] != 127 && source[0] < 224 && source != METADATA_IPV4;
    if !is_host_address {
        return Err(Reason::ForgedAddress);
    }
    let is_link_local = source[0] == METADATA_IPV4[0] && source[1] == METADATA_IPV4[1];
    if port.flags & CHECK_IPV4 == 0 || (is_link_local && port.flags & SHARED == 0) {
        return Ok(());
    }
    let mac = if port.flags & CHECK_MAC == 0 { MacWord::default() } else { MacWord::new(macs.guest) };
    if has_source(port, mac.0, address, u32::MAX) { Ok(()) } else { Err(Reason::ForgedAddress) }
}

/// Checks that the port may send from the IPv4 address in an identity address.
#[inline(always)]
fn check_identity(context: &PacketContext<'_>, identity: &[u8; 16]) -> Result<(), Reason> {
    let [.., a, b, c, d] = *identity;
    check_source(context, u32::from_ne_bytes([a, b, c, d]))
}

/// Returns the interface identifier of a source in fe80::/64. Guests choose it freely (RFC 7217,
/// RFC 8981), so any value except that of the metadata address is accepted.
#[inline(always)]
fn check_ipv6_source(source: [u8; 16]) -> Result<[u8; 8], Reason> {
    let [p0, p1, p2, p3, p4, p5, p6, p7, interface_id @ ..] = source;
    if [p0, p1, p2, p3, p4, p5, p6, p7] != [0xfe, 0x80, 0, 0, 0, 0, 0, 0] {
        return Err(Reason::Ipv6Source);
    }
    if source == METADATA_IPV6 { Err(Reason::ForgedAddress) } else { Ok(interface_id) }
}

/// Returns the identity address of an IPv4 address. The caller checks it ([`check_identity`]),
/// because a check within the steps that parse would not fit on the stack.
#[inline(always)]
fn identify_ipv4(context: &PacketContext<'_>, address: [u8; 4]) -> Result<[u8; 16], Reason> {
    let attachment = AttachmentId::new(context.port.attachment).ok_or(Reason::NotAttached)?;
    Ok(ClientAddress::from_ipv4(attachment, address, context.macs.guest).identity())
}

/// Returns the identity address of a link-local address. A guest may use any of its own, so it is
/// not compared with the port.
///
/// On a shared interface the address must be derived from the MAC address. Nothing else says whose
/// it is: Neutron does not know the address, and it has no port to be found by.
#[inline(always)]
fn identify_ipv6(context: &PacketContext<'_>, address: [u8; 16]) -> Result<[u8; 16], Reason> {
    let attachment = AttachmentId::new(context.port.attachment).ok_or(Reason::NotAttached)?;
    let interface_id = check_ipv6_source(address)?;
    let client = ClientAddress::from_link_local(attachment, interface_id, context.macs.guest);
    if context.port.flags & SHARED != 0 && client.mac().is_none() {
        return Err(Reason::Ipv6Underived);
    }
    Ok(client.identity())
}

/// Returns the portal's namespace id as seen from the program's namespace.
#[inline(always)]
fn portal_nsid<W: World>(world: &W, context: &PacketContext<'_>) -> u32 {
    match context.key.netns {
        0 => context.settings.portal_nsid,
        _ => world.netns_context(|netns| &netns.portal_nsid),
    }
}

/// Addresses the frame to the portal's end of the veth pair.
#[inline(always)]
fn address_to_portal<S: Skb>(skb: &mut S, context: &PacketContext<'_>) -> Result<(), Reason> {
    skb.store(0, &wire::ethernet(context.settings.portal_mac, METADATA_MAC, wire::ethertype::IPV6))?;
    Ok(skb.mark_for_host()?)
}
