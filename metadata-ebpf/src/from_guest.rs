//! `md_from_guest`: TC ingress on a guest-facing interface.
//!
//! * What is not metadata traffic leaves at once, before any map is touched: a few loads and compares are the tax
//!   that every packet of every guest pays.
//! * ARP and ICMP echo for 169.254.169.254 are answered in place.
//! * TCP to port 80 there is led into the portal, with the identity address for its source.
//! * In doubt a packet is left to the host's own path; a forged one is dropped.

use crate::abi::{CHECK_IPV4, CHECK_MAC, Client, ClientKey, Port, PortKey, Settings};
use crate::identity::{
    AttachmentId, ClientAddress, METADATA_IPV4, METADATA_IPV6, METADATA_PORT, PORTAL_ADDRESS,
};
use crate::rate;
use crate::reason::Reason;
use crate::skb::{HEAD, Skb, SkbFault};
use crate::wire::{
    self, ETH_LEN, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, Mac, TCP_CHECKSUM, TCP_LEN, TcpHeader,
};
use crate::world::{PortalPeer, PortalSocket, World};

/// The MAC address that ARP requests for 169.254.169.254 are answered with: locally administered, and the address it
/// stands for can be read in it.
pub const METADATA_MAC: Mac = [0x02, 0x00, 169, 254, 169, 254];

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

impl From<SkbFault> for Reason {
    #[inline(always)]
    fn from(_: SkbFault) -> Self {
        Self::HelperFailed
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    Arp,
    Echo,
    Tcp,
}

/// Decides about one frame of a guest and rewrites it where it is served. `None`: not metadata traffic, untouched and
/// uncounted.
#[inline(always)]
pub fn from_guest<S: Skb, W: World>(skb: &mut S, world: &W) -> Option<Outcome> {
    let served = match classify(skb)? {
        Ok(request) => serve(skb, world, request),
        Err(refused) => Err(refused),
    };
    Some(served.unwrap_or_else(Outcome::from))
}

/// `None`: not metadata traffic.
#[inline(always)]
fn classify<S: Skb>(skb: &mut S) -> Option<Result<Request, Reason>> {
    let head = skb.head()?;
    match [head[12], head[13]] {
        wire::ethertype::IPV4 => classify_ipv4(head),
        wire::ethertype::ARP => classify_arp(head),
        wire::ethertype::IPV6 if may_be_metadata_ipv6(head) => classify_ipv6(skb),
        _ => None,
    }
}

#[inline(always)]
fn classify_ipv4(head: &[u8; HEAD]) -> Option<Result<Request, Reason>> {
    const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
    const ECHO_REQUEST: u8 = 8;

    if [head[30], head[31], head[32], head[33]] != METADATA_IPV4 {
        return None;
    }
    let request = match head[23] {
        wire::protocol::TCP => Request::Tcp,
        wire::protocol::ICMP => Request::Echo,
        _ => return None,
    };
    if head[14] != 0x45 {
        // Longer headers carry options; others are no IPv4 at all.
        return Some(Err(if head[14] > 0x45 && head[14] < 0x50 {
            Reason::Ipv4Options
        } else {
            Reason::Malformed
        }));
    }
    if u16::from_be_bytes([head[20], head[21]]) & MORE_FRAGMENTS_AND_OFFSET != 0 {
        return Some(Err(Reason::Fragment));
    }
    let ours = match request {
        Request::Tcp => u16::from_be_bytes([head[36], head[37]]) == METADATA_PORT,
        Request::Echo => [head[34], head[35]] == [ECHO_REQUEST, 0],
        Request::Arp => false,
    };
    ours.then_some(Ok(request))
}

#[inline(always)]
fn classify_arp(head: &[u8; HEAD]) -> Option<Result<Request, Reason>> {
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

/// As much as the head shows: TCP, and the first four bytes of the destination. Neighbour discovery ends here.
#[inline(always)]
fn may_be_metadata_ipv6(head: &[u8; HEAD]) -> bool {
    let [p0, p1, p2, p3, ..] = METADATA_IPV6;
    [head[38], head[39], head[40], head[41]] == [p0, p1, p2, p3] && head[20] == wire::protocol::TCP
}

#[inline(always)]
fn classify_ipv6<S: Skb>(skb: &S) -> Option<Result<Request, Reason>> {
    const DESTINATION: u32 = ETH_LEN + 24;
    let end_of_header_and_ports: [u8; 20] = skb.load(DESTINATION).ok()?;
    let (destination, ports) = end_of_header_and_ports.split_first_chunk()?;
    let ours = *destination == METADATA_IPV6 && u16::from_be_bytes([ports[2], ports[3]]) == METADATA_PORT;
    ours.then_some(Err(Reason::Ipv6))
}

#[inline(always)]
fn serve<S: Skb, W: World>(skb: &mut S, world: &W, request: Request) -> Result<Outcome, Reason> {
    if skb.vlan_tagged() {
        return Err(Reason::Vlan);
    }
    let settings = world.settings().ok_or(Reason::AgentAbsent)?;
    let now = world.now_ns();
    let beat = world.heartbeat_ns();
    if beat == 0 || now.saturating_sub(beat) > settings.stale_after_ns {
        return Err(Reason::AgentAbsent);
    }
    let port = world.port(&PortKey::untagged(skb.ifindex())).ok_or(Reason::NotAttached)?;
    let (metadata_mac, guest_mac) = check_macs(port, skb, request)?;
    match request {
        Request::Arp => answer_arp(skb, guest_mac),
        Request::Echo => answer_echo(skb, port, metadata_mac, guest_mac),
        Request::Tcp => {
            let segment = Segment::parse(skb, port, metadata_mac, guest_mac)?;
            segment.lead_into_portal(skb, world, settings, port, now)
        }
    }
}

/// The MAC addresses that the frame is sent to and from. The source must be the port's own where that is known.
#[inline(always)]
fn check_macs<S: Skb>(port: &Port, skb: &S, request: Request) -> Result<(Mac, Mac), Reason> {
    let ethernet: [u8; 14] = skb.load(0)?;
    let [t0, t1, t2, t3, t4, t5, f0, f1, f2, f3, f4, f5, ..] = ethernet;
    let (to, from) = ([t0, t1, t2, t3, t4, t5], [f0, f1, f2, f3, f4, f5]);
    if wire::is_group(from) || (request != Request::Arp && wire::is_group(to)) {
        return Err(Reason::Malformed);
    }
    if port.flags & CHECK_MAC != 0 && from != port.mac {
        return Err(Reason::ForgedMac);
    }
    Ok((to, from))
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
    if known.into_iter().any(|address| *address == source) { Ok(()) } else { Err(Reason::ForgedAddress) }
}

/// RFC 826: the answer to who asked, from the asked address. A probe (RFC 5227, sender 0.0.0.0) is answered too: the
/// address is taken.
#[inline(always)]
fn answer_arp<S: Skb>(skb: &mut S, guest_mac: Mac) -> Result<Outcome, Reason> {
    const REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
    let asker: [u8; 10] = skb.load(ETH_LEN + 8)?;

    skb.store(0, &wire::ethernet(guest_mac, METADATA_MAC, wire::ethertype::ARP))?;
    skb.store(ETH_LEN, &REPLY)?;
    skb.store(ETH_LEN + 8, &METADATA_MAC)?;
    skb.store(ETH_LEN + 14, &METADATA_IPV4)?;
    skb.store(ETH_LEN + 18, &asker)?;
    Ok(Outcome { reason: Reason::ArpReply, ifindex: skb.ifindex() })
}

/// RFC 792: addresses swapped, type 0, the rest as it came. Swapping leaves the IPv4 checksum right.
#[inline(always)]
fn answer_echo<S: Skb>(
    skb: &mut S,
    port: &Port,
    metadata_mac: Mac,
    guest_mac: Mac,
) -> Result<Outcome, Reason> {
    const REQUEST: [u8; 2] = [8, 0];
    const REPLY: [u8; 2] = [0, 0];
    let ip = Ipv4Header(skb.load(ETH_LEN)?);
    check_source(port, ip.source())?;
    if ip.total_len() < IPV4_LEN + 8 || ETH_LEN + ip.total_len() > skb.len() {
        return Err(Reason::Malformed);
    }

    skb.store(0, &wire::ethernet(guest_mac, metadata_mac, wire::ethertype::IPV4))?;
    skb.store(ETH_LEN + 12, &METADATA_IPV4)?;
    skb.store(ETH_LEN + 16, &ip.source())?;
    skb.adjust_icmp_checksum(ETH_LEN + IPV4_LEN + 2, REQUEST, REPLY)?;
    skb.store(ETH_LEN + IPV4_LEN, &REPLY)?;
    Ok(Outcome { reason: Reason::EchoReply, ifindex: skb.ifindex() })
}

/// A TCP segment of a guest, checked.
struct Segment {
    client: ClientAddress,
    ip: Ipv4Header,
    tcp: TcpHeader,
    guest_mac: Mac,
    metadata_mac: Mac,
}

impl Segment {
    #[inline(always)]
    fn parse<S: Skb>(skb: &S, port: &Port, metadata_mac: Mac, guest_mac: Mac) -> Result<Self, Reason> {
        let ip = Ipv4Header(skb.load(ETH_LEN)?);
        let tcp = TcpHeader(skb.load(ETH_LEN + IPV4_LEN).map_err(|SkbFault| Reason::Malformed)?);
        let cut_short = ETH_LEN + ip.total_len() > skb.len();
        if cut_short || tcp.header_len() < TCP_LEN || IPV4_LEN + tcp.header_len() > ip.total_len() {
            return Err(Reason::Malformed);
        }
        if !ip.checksum_is_right() {
            return Err(Reason::BadIpv4Checksum);
        }
        check_source(port, ip.source())?;
        let attachment = AttachmentId::new(port.attachment).ok_or(Reason::NotAttached)?;
        let client = ClientAddress::ipv4(attachment, ip.source());
        Ok(Self { client, ip, tcp, guest_mac, metadata_mac })
    }

    /// A SYN goes wherever a listener is, and is recorded; any other segment only where its connection is.
    #[inline(always)]
    fn lead_into_portal<S: Skb, W: World>(
        &self,
        skb: &mut S,
        world: &W,
        settings: &Settings,
        port: &Port,
        now: u64,
    ) -> Result<Outcome, Reason> {
        let identity = self.client.identity();
        let socket = world.portal_socket(&PortalPeer { identity, tcp: self.tcp.0 }, settings.portal_nsid);
        let reason = match (self.tcp.opens(), socket) {
            (true, PortalSocket::Absent) => return Err(Reason::AgentAbsent),
            (true, PortalSocket::Listening | PortalSocket::Connected) => {
                self.record(world, settings, port, skb.ifindex(), now)?;
                Reason::ConnectionOpened
            }
            (false, PortalSocket::Connected) => Reason::Segment,
            (false, PortalSocket::Absent | PortalSocket::Listening) => return Err(Reason::ForeignConnection),
        };
        self.renumber(skb, settings, identity)?;
        Ok(Outcome { reason, ifindex: settings.portal_ifindex })
    }

    #[inline(always)]
    fn record<W: World>(
        &self,
        world: &W,
        settings: &Settings,
        port: &Port,
        ifindex: u32,
        now: u64,
    ) -> Result<(), Reason> {
        let mut gate = world.gate(port.attachment).ok_or(Reason::NotAttached)?;
        gate.syn_tat_ns = rate::admit(gate.syn_tat_ns, now, settings.syn_interval_ns, settings.syn_burst_ns)
            .ok_or(Reason::SynRate)?;
        let key = ClientKey { identity: self.client.identity() };
        let known = world.client(&key);
        if known.is_none() {
            if gate.clients >= u64::from(port.client_quota) {
                return Err(Reason::ClientQuota);
            }
            gate.clients += 1;
        }
        let client = Client {
            network: port.network,
            first_seen_ns: known.map_or(now, |c| c.first_seen_ns),
            last_seen_ns: now,
            connections: known.map_or(1, |c| c.connections.wrapping_add(1)),
            ifindex,
            guest_mac: self.guest_mac,
            metadata_mac: self.metadata_mac,
        };
        if !world.put_client(&key, &client) {
            return Err(Reason::ClientsFull);
        }
        world.put_gate(port.attachment, gate);
        Ok(())
    }

    /// IPv4 to IPv6, RFC 7915 in the small: no options, no fragments, addresses of our own.
    #[inline(always)]
    fn renumber<S: Skb>(&self, skb: &mut S, settings: &Settings, identity: [u8; 16]) -> Result<(), SkbFault> {
        let payload_len = self.ip.payload_len();
        let (class, hop_limit) = (self.ip.0[1], self.ip.0[8]);
        let ethernet = wire::ethernet(settings.portal_mac, METADATA_MAC, wire::ethertype::IPV6);
        let header = Ipv6Header::tcp(identity, PORTAL_ADDRESS, payload_len, class, hop_limit);
        let difference = address_difference(self.ip.source(), METADATA_IPV4, identity, PORTAL_ADDRESS);

        skb.change_to_ipv6()?;
        skb.store(0, &ethernet)?;
        skb.store(ETH_LEN, &header.0)?;
        skb.adjust_tcp_checksum(ETH_LEN + IPV6_LEN + TCP_CHECKSUM, difference)?;
        skb.mark_for_host()
    }
}

/// What the pseudo header changes by. Protocol and length stand in both pseudo headers with the same weight.
#[inline(always)]
fn address_difference(
    source: [u8; 4],
    destination: [u8; 4],
    new_source: [u8; 16],
    new_destination: [u8; 16],
) -> u32 {
    wire::checksum_difference(&source, &new_source)
        + wire::checksum_difference(&destination, &new_destination)
}
