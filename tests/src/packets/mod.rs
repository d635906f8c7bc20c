//! The packet table. Each case has a frame, the state of the programs' maps and the expected
//! result.
//!
//! Expected frames are built by etherparse, header by header with its own checksums, and never by
//! the code under test.
pub mod control_block;
pub mod differential;
pub mod frame_mutator;
mod frames;
mod ipv6;
pub mod kernel;
pub mod table;
pub mod world;

use metadata_ebpf::abi::{CHECK_IPV4, CHECK_MAC, CONFINED, Ipv4Prefix, MAX_PORT_IPV4, Port};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{AttachmentId, ClientAddress, GuestAddress, METADATA_IPV4};
use metadata_ebpf::reason::Reason;

use frames::{Segment, answer, arp, arp_answer, echo, patched, udp};

/// The guest of the table.
pub const GUEST_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 5];
pub const GUEST_IP: [u8; 4] = [10, 0, 0, 5];
/// Its link-local address, with a stable-privacy interface identifier (RFC 7217).
pub const GUEST_IPV6: [u8; 16] =
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x9c, 0x1f, 0x55, 0xaa, 0x07, 0xd2, 0x4e, 0x31];
/// The router to which it sends.
pub const ROUTER_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0xff, 0, 1];
/// The MAC address of the portal's end of the veth pair, as assumed by the table.
pub const PORTAL_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x80];
pub const ATTACHMENT: u32 = 7;
/// A source port without a connection.
pub const NEW_PORT: u16 = 40_000;
/// The source port of a connection in the portal.
pub const CONNECTED_PORT: u16 = 40_001;
/// The Neutron network of the port.
pub const NETWORK: [u8; 16] = [0x11; 16];

/// The program that receives the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `md_from_guest`
    FromGuest,
    /// `md_to_guest`
    ToGuest,
}

/// The state of maps and sockets, as far as cases differ in it.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each row sets one of them apart")]
pub struct State {
    /// The interface is attached.
    pub attached: bool,
    /// The MAC and IP addresses of the port are known.
    pub port_known: bool,
    /// The agent's heartbeat is current.
    pub alive: bool,
    /// The agent listens, and [`CONNECTED_PORT`] is connected.
    pub listening: bool,
    /// The client is recorded under both its addresses.
    pub client_known: bool,
    /// The maximum number of clients of the attachment.
    pub client_quota: u32,
    /// The rate limit of new connections is exhausted.
    pub syn_exhausted: bool,
    /// The interface belongs to a router without a legacy path and with a subnet behind it.
    pub routed: bool,
}

/// An attached port with known addresses, and a running agent.
pub const NORMAL: State = State {
    attached: true,
    port_known: true,
    alive: true,
    listening: true,
    client_known: false,
    client_quota: 4,
    syn_exhausted: false,
    routed: false,
};

const KNOWN_CLIENT: State = State { client_known: true, ..NORMAL };
const UNKNOWN_PORT: State = State { port_known: false, ..NORMAL };

/// One row.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub program: Program,
    pub state: State,
    /// The input.
    pub frame: Vec<u8>,
    /// The expected reason, or `None` for a packet that is not metadata traffic.
    pub reason: Option<Reason>,
    /// The output, or `None` for a frame that must not change.
    pub rewritten: Option<Vec<u8>>,
}

impl Case {
    /// Returns the identity address of the client's record.
    #[must_use]
    pub fn identity(&self) -> [u8; 16] {
        if self.frame.get(12..14) == Some(&[0x86, 0xdd]) { identity_v6() } else { identity() }
    }
}

/// Returns the identity address of the guest.
#[must_use]
pub fn identity() -> [u8; 16] {
    identity_of(ATTACHMENT)
}

/// Returns the identity address of the guest's address behind another attachment.
#[must_use]
pub fn identity_of(attachment: u32) -> [u8; 16] {
    let attachment = AttachmentId::new(attachment).expect("attachments count from 1");
    ClientAddress::ipv4(attachment, GUEST_IP).identity()
}

/// Returns the identity address of the guest's IPv6 address.
#[must_use]
pub fn identity_v6() -> [u8; 16] {
    let attachment = AttachmentId::new(ATTACHMENT).expect("attachments count from 1");
    let interface_id = GUEST_IPV6.last_chunk().copied().expect("eight of sixteen bytes");
    ClientAddress { attachment, guest: GuestAddress::Ipv6LinkLocal(interface_id) }.identity()
}

/// Returns the entry of `MD_PORTS` for a state.
#[must_use]
pub fn port(state: &State) -> Port {
    let mut ipv4 = [Ipv4Prefix::default(); MAX_PORT_IPV4];
    ipv4[0] = Ipv4Prefix::new([10, 0, 0, 4], 32);
    ipv4[1] = Ipv4Prefix::new(GUEST_IP, 32);
    if state.routed {
        ipv4[0] = Ipv4Prefix::new([10, 0, 0, 1], 20);
    }
    let checked = if state.port_known { CHECK_MAC | CHECK_IPV4 } else { 0 };
    Port {
        attachment: ATTACHMENT,
        flags: checked | if state.routed { CONFINED } else { 0 },
        client_quota: state.client_quota,
        ipv4_count: 2,
        network: NETWORK,
        ipv4,
        mac: GUEST_MAC,
        _pad: [0; 2],
    }
}

/// Returns every row of the table.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = untouched();
    cases.extend(served());
    cases.extend(passed_on());
    cases.extend(dropped());
    cases.extend(out_of_the_portal());
    cases.extend(ipv6::cases());
    cases
}

fn row(
    name: &'static str,
    state: State,
    frame: Vec<u8>,
    reason: Option<Reason>,
    rewritten: Option<Vec<u8>>,
) -> Case {
    Case { name, program: Program::FromGuest, state, frame, reason, rewritten }
}

/// Frames that are not metadata traffic: no reason, no counter, no change.
fn untouched() -> Vec<Case> {
    let bystander = |name, frame| row(name, NORMAL, frame, None, None);
    let syn_to = |address: [u8; 4]| Segment::syn().with(|s| s.ip.destination = address).frame();
    vec![
        bystander("TCP to another address", syn_to([10, 0, 0, 1])),
        bystander("TCP to a neighbour of the address", syn_to([169, 254, 169, 253])),
        bystander("TCP to another port", Segment::syn().with(|s| s.tcp.destination_port = 443).frame()),
        bystander("UDP to port 80", udp()),
        bystander(
            "an echo reply to the address",
            echo(GUEST_IP, METADATA_IPV4, (GUEST_MAC, ROUTER_MAC), true),
        ),
        bystander(
            "an echo request to another",
            echo(GUEST_IP, [10, 0, 0, 1], (GUEST_MAC, ROUTER_MAC), false),
        ),
        bystander("ARP for another address", arp(1, GUEST_MAC, GUEST_IP, [10, 0, 0, 1])),
        bystander("an ARP reply to the address", arp(2, GUEST_MAC, GUEST_IP, METADATA_IPV4)),
        bystander(
            "ARP of another hardware",
            patched(arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4), 14, &[0, 6]),
        ),
        bystander(
            "a frame shorter than any of ours",
            arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4)[..41].to_vec(),
        ),
        bystander("a second VLAN tag inside the frame", {
            let frame = Segment::syn().frame();
            [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat()
        }),
    ]
}

fn served() -> Vec<Case> {
    let opens = |name, state, segment: Segment| {
        row(name, state, segment.clone().frame(), Some(Reason::ConnectionOpened), Some(segment.in_portal()))
    };
    let goes_on = |name, segment: Segment| {
        row(name, NORMAL, segment.clone().frame(), Some(Reason::Segment), Some(segment.in_portal()))
    };
    let arp_answered = |name, state, sender| {
        let request = arp(1, GUEST_MAC, sender, METADATA_IPV4);
        row(name, state, request, Some(Reason::ArpReply), Some(arp_answer(sender)))
    };
    let answer = || echo(METADATA_IPV4, GUEST_IP, (ROUTER_MAC, GUEST_MAC), true);
    let request = || echo(GUEST_IP, METADATA_IPV4, (GUEST_MAC, ROUTER_MAC), false);
    vec![
        opens("a SYN", NORMAL, Segment::syn()),
        opens("a SYN of a known client", KNOWN_CLIENT, Segment::syn()),
        opens(
            "a SYN of a known client when no other may come",
            State { client_quota: 1, ..KNOWN_CLIENT },
            Segment::syn(),
        ),
        opens("a SYN of a port that no source knows", UNKNOWN_PORT, Segment::syn()),
        opens(
            "a SYN with ECN",
            NORMAL,
            Segment::syn().with(|s| {
                s.ip.ecn = etherparse::IpEcn::TWO;
                s.tcp.ece = true;
                s.tcp.cwr = true;
            }),
        ),
        opens(
            "a SYN with DSCP and a low TTL",
            NORMAL,
            Segment::syn().with(|s| {
                s.ip.dscp = etherparse::IpDscp::try_new(46).expect("a DSCP");
                s.ip.time_to_live = 1;
            }),
        ),
        opens("a SYN with data", NORMAL, Segment::syn().with(|s| s.payload = b"GET".to_vec())),
        opens(
            "a SYN to the MAC address of our ARP answer",
            NORMAL,
            Segment::syn().with(|s| s.ethernet.destination = METADATA_MAC),
        ),
        goes_on("a bare ACK", Segment::data(&[])),
        goes_on("a request", Segment::data(b"GET / HTTP/1.1\r\n\r\n")),
        goes_on("a segment of odd length", Segment::data(b"odd")),
        goes_on("a segment of a full frame", Segment::data(&[0x5a; 1446])),
        goes_on("a FIN", Segment::data(&[]).with(|s| s.tcp.fin = true)),
        goes_on(
            "a RST",
            Segment::data(&[]).with(|s| (s.tcp.rst, s.tcp.ack, s.tcp.psh) = (true, false, false)),
        ),
        arp_answered("ARP for the address", NORMAL, GUEST_IP),
        arp_answered("an ARP probe, before the guest has an address", NORMAL, [0; 4]),
        arp_answered("ARP of a port that no source knows", UNKNOWN_PORT, GUEST_IP),
        row("an echo request", NORMAL, request(), Some(Reason::EchoReply), Some(answer())),
        row(
            "an echo request of a port that no source knows",
            UNKNOWN_PORT,
            request(),
            Some(Reason::EchoReply),
            Some(answer()),
        ),
    ]
}

fn refused(name: &'static str, state: State, frame: Vec<u8>, reason: Reason) -> Case {
    row(name, state, frame, Some(reason), None)
}

fn mutated(name: &'static str, mutate: fn(&mut Segment), reason: Reason) -> Case {
    refused(name, NORMAL, Segment::syn().with(mutate).frame(), reason)
}

fn syn() -> Vec<u8> {
    Segment::syn().frame()
}

fn passed_on() -> Vec<Case> {
    absent_or_foreign().into_iter().chain(unclear()).collect()
}

/// Frames without an agent, or frames that belong to others.
fn absent_or_foreign() -> Vec<Case> {
    let dead = State { alive: false, ..NORMAL };
    let unheard = State { listening: false, ..NORMAL };
    let arp_request = || arp(1, GUEST_MAC, GUEST_IP, METADATA_IPV4);
    vec![
        refused("a SYN while the heartbeat is stale", dead, syn(), Reason::AgentAbsent),
        refused("ARP while the heartbeat is stale", dead, arp_request(), Reason::AgentAbsent),
        refused(
            "a segment while the heartbeat is stale",
            dead,
            Segment::data(b"x").frame(),
            Reason::AgentAbsent,
        ),
        refused("a SYN without a listener", unheard, syn(), Reason::AgentAbsent),
        refused(
            "a SYN from an interface that is not attached",
            State { attached: false, ..NORMAL },
            syn(),
            Reason::NotAttached,
        ),
        refused(
            "a segment of a connection that is not ours",
            NORMAL,
            Segment::data(b"x").with(|s| s.tcp.source_port = 5).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "the same from a client that we know",
            KNOWN_CLIENT,
            Segment::data(b"x").with(|s| s.tcp.source_port = 5).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "SYN and ACK of a connection that is not ours",
            NORMAL,
            Segment::syn().with(|s| s.tcp.ack = true).frame(),
            Reason::ForeignConnection,
        ),
        refused(
            "SYN and FIN",
            NORMAL,
            Segment::syn().with(|s| s.tcp.fin = true).frame(),
            Reason::ForeignConnection,
        ),
    ]
}

/// Frames with headers that we cannot or do not translate.
fn unclear() -> Vec<Case> {
    vec![
        mutated(
            "IPv4 options",
            |s| s.ip.options = etherparse::Ipv4Options::try_from(&[1, 1, 1, 0][..]).expect("four bytes"),
            Reason::Ipv4Options,
        ),
        mutated("a first fragment", |s| s.ip.more_fragments = true, Reason::Fragment),
        mutated(
            "a later fragment",
            |s| s.ip.fragment_offset = etherparse::IpFragOffset::try_new(8).expect("an offset"),
            Reason::Fragment,
        ),
        refused(
            "an IP header shorter than five words",
            NORMAL,
            patched(syn(), 14, &[0x44]),
            Reason::Malformed,
        ),
        refused(
            "an IP total length beyond the frame",
            NORMAL,
            patched(syn(), 16, &[0x40, 0]),
            Reason::Malformed,
        ),
        refused(
            "an IP total length within the TCP header",
            NORMAL,
            patched(syn(), 16, &[0, 30]),
            Reason::Malformed,
        ),
        refused(
            "a TCP header shorter than five words",
            NORMAL,
            patched(syn(), 46, &[0x40]),
            Reason::Malformed,
        ),
        refused("a TCP header beyond the packet", NORMAL, patched(syn(), 46, &[0xf0]), Reason::Malformed),
        refused("a frame cut within the TCP header", NORMAL, syn()[..50].to_vec(), Reason::Malformed),
        refused(
            "a wrong IP header checksum",
            NORMAL,
            patched(syn(), 24, &[0xde, 0xad]),
            Reason::BadIpv4Checksum,
        ),
        mutated("a broadcast frame", |s| s.ethernet.destination = [0xff; 6], Reason::Malformed),
        mutated(
            "a group address for source",
            |s| s.ethernet.source = [1, 0, 0x5e, 0, 0, 5],
            Reason::Malformed,
        ),
    ]
}

fn dropped() -> Vec<Case> {
    vec![
        mutated("a forged MAC address", |s| s.ethernet.source[5] = 6, Reason::ForgedMac),
        refused(
            "ARP from a forged MAC address",
            NORMAL,
            arp(1, ROUTER_MAC, GUEST_IP, METADATA_IPV4),
            Reason::ForgedMac,
        ),
        mutated("a forged address", |s| s.ip.source = [10, 0, 0, 6], Reason::ForgedAddress),
        refused(
            "a forged address in a segment",
            NORMAL,
            Segment::data(b"x").with(|s| s.ip.source = [10, 0, 0, 6]).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "a forged address in an echo request",
            NORMAL,
            echo([10, 0, 0, 6], METADATA_IPV4, (GUEST_MAC, ROUTER_MAC), false),
            Reason::ForgedAddress,
        ),
        refused(
            "the metadata address for source, on a port that no source knows",
            UNKNOWN_PORT,
            Segment::syn().with(|s| s.ip.source = METADATA_IPV4).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "a multicast source, on a port that no source knows",
            UNKNOWN_PORT,
            Segment::syn().with(|s| s.ip.source = [224, 0, 0, 1]).frame(),
            Reason::ForgedAddress,
        ),
        refused(
            "an ARP announcement of the address",
            NORMAL,
            arp(1, GUEST_MAC, METADATA_IPV4, METADATA_IPV4),
            Reason::ForgedArp,
        ),
        refused(
            "an ARP reply that claims the address",
            NORMAL,
            arp(2, GUEST_MAC, METADATA_IPV4, GUEST_IP),
            Reason::ForgedArp,
        ),
        refused(
            "a SYN beyond the allowance",
            State { syn_exhausted: true, ..NORMAL },
            syn(),
            Reason::SynRate,
        ),
        refused(
            "a SYN of one client too many",
            State { client_quota: 0, ..NORMAL },
            syn(),
            Reason::ClientQuota,
        ),
    ]
}

/// Returns a row for a reply from the portal and its frame for the guest.
fn answered(name: &'static str, (frame, back): (Vec<u8>, Vec<u8>)) -> Case {
    let (reason, rewritten) = (Some(Reason::Reply), Some(back));
    Case { name, program: Program::ToGuest, state: KNOWN_CLIENT, frame, reason, rewritten }
}

/// Returns a row for a frame from the portal that does not reach the guest.
fn undelivered(name: &'static str, state: State, frame: Vec<u8>, reason: Reason) -> Case {
    Case { program: Program::ToGuest, ..refused(name, state, frame, reason) }
}

fn out_of_the_portal() -> Vec<Case> {
    let out = || answer(b"HTTP/1.1 200 OK\r\n").0;
    let to_other = identity_of(ATTACHMENT + 1);
    let no_answer = |name, offset, bytes: &[u8]| {
        undelivered(name, KNOWN_CLIENT, patched(out(), offset, bytes), Reason::NotAnAnswer)
    };
    vec![
        answered("an answer", answer(b"HTTP/1.1 200 OK\r\n\r\n")),
        answered("an empty answer", answer(&[])),
        answered("an answer of odd length", answer(b"odd")),
        answered("an answer of a full frame", answer(&[0xa5; 1400])),
        undelivered("an answer to a client that is not on record", NORMAL, out(), Reason::NoClient),
        undelivered(
            "an answer to the same address behind another attachment",
            KNOWN_CLIENT,
            patched(out(), 38, &to_other),
            Reason::NoClient,
        ),
        undelivered(
            "an answer to no identity address",
            KNOWN_CLIENT,
            patched(out(), 38, &[0x20, 1]),
            Reason::NoClient,
        ),
        no_answer("a packet from another port", 54, &[0, 81]),
        no_answer("a packet from another address", 37, &[9]),
        no_answer("UDP out of the portal", 20, &[17]),
        no_answer("IPv4 out of the portal", 12, &[8, 0]),
        no_answer("a payload length beyond the frame", 18, &[0x40, 0]),
    ]
}
