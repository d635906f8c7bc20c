//! What the programs need besides the packet: maps, the clock and the portal's sockets.

use crate::abi::{AttachmentState, Client, ClientKey, NetnsContext, Port, PortKey, Settings};

/// The connection table of the portal is the connection table of the programs: the kernel's own sockets tell
/// which segment belongs to a connection that began with us, so nothing of our own can fill up or go stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortalSocket {
    /// No connection and no listener: the agent is not there.
    Absent,
    /// Only the listener matches.
    Listening,
    /// A connection, a half-open one, one in TIME-WAIT, or a valid SYN cookie.
    Connected,
}

/// The client's side of a connection into the portal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortalPeer {
    /// The identity address.
    pub identity: [u8; 16],
    /// The TCP header as the guest sent it, without options; network order.
    pub tcp: [u8; 20],
}

/// Version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Maps, clock and sockets.
pub trait World {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    fn now_ns(&self) -> u64;

    /// A field of the [`NetnsContext`] that the program works in, as scalars: a copy of the whole would fill the stack.
    fn netns_context<T: Copy>(&self, field: impl Fn(&NetnsContext) -> &T) -> T;

    /// `MD_CONFIG[0]`.
    fn settings(&self) -> Option<&Settings>;

    /// `MD_HEARTBEAT[0]`, `CLOCK_MONOTONIC` nanoseconds; 0 when no agent is there.
    fn heartbeat_ns(&self) -> u64;

    /// A look into `MD_PORTS`.
    fn port(&self, key: &PortKey) -> Option<&Port>;

    /// A look into `MD_ATTACH`.
    fn attachment_state(&self, attachment: u32) -> Option<AttachmentState>;

    /// Overwrites an entry of `MD_ATTACH`; without effect where there is none.
    fn put_attachment_state(&self, attachment: u32, state: AttachmentState);

    /// A look into `MD_CLIENTS` for `first_seen_ns` and `connections`. A copy of the whole would fill the stack.
    fn known_client(&self, key: &ClientKey) -> Option<(u64, u64)>;

    /// A look into `MD_CLIENTS` that sets `last_seen_ns`.
    fn touch_client(&self, key: &ClientKey, now_ns: u64) -> Option<Client>;

    /// Inserts or overwrites an entry of `MD_CLIENTS`; `false` if the map is full.
    fn put_client(&self, key: &ClientKey, client: &Client) -> bool;

    /// Looks for a socket of the portal that would receive a segment of this peer.
    fn portal_socket(&self, peer: &PortalPeer, nsid: u32) -> PortalSocket;

    /// Whether somebody in the program's own namespace listens at the metadata address of this version.
    fn legacy_listens(&self, version: Version, port: u32) -> bool;
}
