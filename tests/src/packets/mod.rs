//! The packet table. Each case has a frame, the state of the programs' maps and the expected
//! result.
//!
//! Expected frames are built by etherparse, header by header with its own checksums, and never by
//! the code under test.

pub mod control_block;
pub mod differential;
pub mod frame_mutator;
mod frames;
mod icmp_errors;
mod ipv4;
mod ipv6;
pub mod kernel;
mod queries;
pub mod table;
pub mod world;

use metadata_ebpf::abi::{
    CHECK_IPV4, CHECK_MAC, CONFINED, Ipv4Prefix, MAX_PORT_SOURCES, MacWord, Port, PortSource, SHARED,
};
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use metadata_ebpf::reason::Reason;

/// The guest of the table.
pub const GUEST_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 5];
pub const GUEST_IP: [u8; 4] = [10, 0, 0, 5];
/// An address pair of the guest with a MAC address of its own, as VRRP has one.
pub const PAIR_MAC: [u8; 6] = [0, 0, 0x5e, 0, 1, 0x33];
pub const PAIR_IP: [u8; 4] = [10, 0, 0, 116];
/// A MAC address that the guest may use for IPv6 alone.
pub const IPV6_ONLY_MAC: [u8; 6] = [0, 0, 0x5e, 0, 2, 0x33];
/// An address that a guest without DHCP gives itself (RFC 3927).
pub const SELF_ASSIGNED_IP: [u8; 4] = [169, 254, 10, 20];
/// Its link-local address, with a stable-privacy interface identifier (RFC 7217).
pub const GUEST_IPV6: [u8; 16] =
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x9c, 0x1f, 0x55, 0xaa, 0x07, 0xd2, 0x4e, 0x31];
/// The router to which it sends.
pub const ROUTER_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0xff, 0, 1];
/// The MAC address of the portal's end of the veth pair, as assumed by the table.
pub const PORTAL_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x80];
pub const ATTACHMENT: u32 = 7;
/// The link-local address that is derived from the guest's MAC address.
pub const DERIVED_IPV6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 5];
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
    /// The client has a record under both its addresses.
    pub client_known: bool,
    /// The interface of the attachment exists.
    pub interface_there: bool,
    /// The rate limit that is exhausted.
    pub exhausted: Exhausted,
    /// The interface belongs to a router with a subnet behind it. Many guests share it.
    pub routed: bool,
    /// The router has no legacy path.
    pub confined: bool,
}

/// An attached port with known addresses, and a running agent.
pub const NORMAL: State = State {
    attached: true,
    port_known: true,
    alive: true,
    listening: true,
    client_known: false,
    interface_there: true,
    exhausted: Exhausted::Nothing,
    routed: false,
    confined: false,
};

/// The part of the rate limits that is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    Nothing,
    /// The limit of the guest.
    Guest,
    /// Half of a shared interface's total, and the reserve.
    HalfAndReserve,
    /// The total.
    Total,
    /// The total and the reserve.
    All,
}

const KNOWN_CLIENT: State = State { client_known: true, ..NORMAL };
/// Many guests share the interface.
const ROUTED: State = State { routed: true, ..NORMAL };
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
        if self.frame.get(12..14) != Some(&[0x86, 0xdd]) {
            let (mac, address) = (self.frame.get(6..12), self.frame.get(26..30));
            let read = mac.and_then(|mac| mac.first_chunk()).zip(address.and_then(|ip| ip.first_chunk()));
            read.map_or_else(identity, |(mac, address)| identity_from(*address, *mac))
        } else if self.frame.get(22..38) == Some(&DERIVED_IPV6) {
            identity_at(DERIVED_IPV6)
        } else {
            identity_v6()
        }
    }
}

/// Returns the identity address of the guest.
#[must_use]
pub fn identity() -> [u8; 16] {
    identity_of(ATTACHMENT, GUEST_MAC)
}

/// Returns the identity address of the guest's address behind an attachment and with a MAC address.
#[must_use]
pub fn identity_of(attachment: u32, mac: [u8; 6]) -> [u8; 16] {
    let attachment = AttachmentId::new(attachment).expect("attachments count from 1");
    ClientAddress::from_ipv4(attachment, GUEST_IP, mac).identity()
}

/// Returns the identity address of a guest that sends from these addresses.
#[must_use]
pub fn identity_from(address: [u8; 4], mac: [u8; 6]) -> [u8; 16] {
    let attachment = AttachmentId::new(ATTACHMENT).expect("attachments count from 1");
    ClientAddress::from_ipv4(attachment, address, mac).identity()
}

/// Returns the identity address of the guest's IPv6 address.
#[must_use]
pub fn identity_v6() -> [u8; 16] {
    identity_at(GUEST_IPV6)
}

/// Returns the identity address of a link-local address of the guest.
#[must_use]
pub fn identity_at(address: [u8; 16]) -> [u8; 16] {
    let attachment = AttachmentId::new(ATTACHMENT).expect("attachments count from 1");
    let interface_id = address.last_chunk().copied().expect("eight of sixteen bytes");
    ClientAddress::from_link_local(attachment, interface_id, GUEST_MAC).identity()
}

/// Returns the entry of `MD_PORTS` for a state.
#[must_use]
pub fn port(state: &State) -> Port {
    let source =
        |mac, address, len| PortSource { mac: MacWord::new(mac), ipv4: Ipv4Prefix::new(address, len) };
    let (checked, entries) = match (state.port_known, state.routed) {
        (false, _) => (0, Vec::new()),
        (true, true) => (CHECK_IPV4, vec![source([0; 6], [10, 0, 0, 1], 20)]),
        (true, false) => (
            CHECK_MAC | CHECK_IPV4,
            vec![
                source(GUEST_MAC, [10, 0, 0, 4], 32),
                source(GUEST_MAC, GUEST_IP, 32),
                source(PAIR_MAC, PAIR_IP, 32),
                source(IPV6_ONLY_MAC, [0; 4], 32),
            ],
        ),
    };
    let mut sources = [PortSource::default(); MAX_PORT_SOURCES];
    sources[..entries.len()].copy_from_slice(&entries);
    Port {
        attachment: ATTACHMENT,
        flags: checked | if state.routed { SHARED } else { 0 } | if state.confined { CONFINED } else { 0 },
        source_count: u32::try_from(entries.len()).expect("a few"),
        _pad: 0,
        network: NETWORK,
        sources,
    }
}

/// Returns every row of the table.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = ipv4::cases();
    cases.extend(ipv6::cases());
    cases.extend(icmp_errors::cases());
    cases.extend(queries::cases());
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

fn refused(name: &'static str, state: State, frame: Vec<u8>, reason: Reason) -> Case {
    row(name, state, frame, Some(reason), None)
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
