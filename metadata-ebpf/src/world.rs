//! Everything that the programs need besides the packet: maps, the clock and the portal's sockets.

use crate::abi::{
    AttachmentState, Client, ClientKey, GuestShares, NetnsContext, Port, PortKey, Refusal, Refusals, Settings,
};

/// Result of a socket look-up in the portal.
///
/// The programs keep no connection table of their own: the kernel's sockets decide which segment
/// belongs to a connection that began with us. So no table can fill up or become stale.
///
/// Anyone can send a SYN and an ACK from a made-up address, so a half-open connection proves
/// nothing about its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortalSocket {
    /// No connection and no listener: the agent is absent.
    Absent,
    /// Only the listener matches.
    Listening,
    /// A connection whose handshake is not complete.
    HalfOpen,
    /// A connection, one in TIME-WAIT, or a valid SYN cookie: the client has received our SYN-ACK.
    Connected,
}

/// The client's side of a connection into the portal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortalPeer {
    pub identity: [u8; 16],
    /// TCP header without options as the guest sent it, in network order.
    pub tcp: [u8; 20],
}

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V4,
    V6,
}

/// Maps, clock and sockets.
pub trait World {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    fn now_ns(&self) -> u64;

    /// Reads one scalar field of the program's [`NetnsContext`]. A copy of the whole struct would
    /// not fit on the stack.
    fn netns_context<T: Copy>(&self, field: impl Fn(&NetnsContext) -> &T) -> T;

    /// `MD_CONFIG[0]`.
    fn settings(&self) -> Option<&Settings>;

    /// `MD_HEARTBEAT[DATA]`, in `CLOCK_MONOTONIC` nanoseconds; 0 if no agent runs.
    fn heartbeat_ns(&self) -> u64;

    /// Looks up a key in `MD_PORTS`.
    fn port(&self, key: &PortKey) -> Option<&Port>;

    /// Runs `with` on an entry of `MD_ATTACH`, in place. A copy would not fit on the stack.
    fn attachment<T>(&self, attachment: u32, with: impl FnOnce(&mut AttachmentState) -> T) -> Option<T>;

    /// Runs `with` on an entry of `MD_SHARES`, in place.
    fn shares<T>(&self, attachment: u32, with: impl FnOnce(&mut GuestShares) -> T) -> Option<T>;

    /// Runs `with` on an entry of `MD_REFUSALS`, in place.
    fn refusals<T>(&self, attachment: u32, with: impl FnOnce(&mut Refusals) -> T) -> Option<T>;

    /// Reports a dropped packet to the agent (`MD_REFUSAL_EV`), unless too many reports wait.
    fn report(&self, refusal: &Refusal);

    /// Returns the index of the interface that carries an attachment, or `None` if that interface
    /// is gone (`MD_DEVICES`).
    fn device(&self, attachment: u32) -> Option<u32>;

    /// Runs `with` on an entry of `MD_CLIENTS`, in place.
    fn client<T>(&self, key: &ClientKey, with: impl FnOnce(&mut Client) -> T) -> Option<T>;

    /// Inserts or overwrites an entry of `MD_CLIENTS`.
    fn put_client(&self, key: &ClientKey, client: &Client);

    /// Looks up the portal's socket that would receive a segment of this peer.
    fn portal_socket(&self, peer: &PortalPeer, nsid: u32) -> PortalSocket;

    /// Returns true if a process in the program's own namespace listens at the metadata address of
    /// this version.
    fn legacy_listens(&self, version: Version, port: u32) -> bool;
}
