//! Packet and world of the host build: a byte vector and hash tables. Tests run the programs on
//! these and compare the results with what the kernel does with the same frame.

use core::cell::{Cell, RefCell};
use std::collections::HashMap;

use crate::abi::{
    AttachmentState, Client, ClientKey, GuestShares, NetnsContext, Port, PortKey, Refusal, Refusals, Settings,
};
use crate::skb::{HEAD, Skb, SkbError, Vlan};
use crate::wire::{self, ETH_LEN, IPV4_LEN, IPV6_LEN};
use crate::world::{PortalPeer, PortalSocket, Version, World};

/// A frame in a byte vector, with complete checksums (no GSO, no partial checksum).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSkb {
    /// Starts with the Ethernet header.
    pub frame: Vec<u8>,
    /// Ingress interface.
    pub ifindex: u32,
    /// VLAN tag that the kernel moved out of the frame.
    pub vlan: Vlan,
    /// Number of bytes in the linear part. The head is always linear after it was read.
    pub linear: usize,
}

impl HostSkb {
    /// Creates an untagged frame that is completely linear.
    #[must_use]
    pub fn new(frame: Vec<u8>, ifindex: u32) -> Self {
        Self { frame, ifindex, vlan: Vlan::Untagged, linear: usize::MAX }
    }

    fn range(&self, offset: u32, len: usize) -> Result<core::ops::Range<usize>, SkbError> {
        let start = offset as usize;
        if start + len <= self.frame.len() { Ok(start..start + len) } else { Err(SkbError) }
    }

    fn resize_header(&mut self, from: u32, to: u32) -> Result<(), SkbError> {
        let header = self.range(ETH_LEN, from as usize)?;
        self.frame.splice(header, core::iter::repeat_n(0, to as usize));
        Ok(())
    }
}

impl Skb for HostSkb {
    fn len(&self) -> u32 {
        u32::try_from(self.frame.len()).unwrap_or(u32::MAX)
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn vlan(&self) -> Vlan {
        self.vlan
    }

    fn head(&mut self) -> Option<&[u8; HEAD]> {
        self.frame.first_chunk()
    }

    fn linear<const N: usize>(&self, offset: u32) -> Option<&[u8; N]> {
        let range = self.range(offset, N).ok().filter(|range| range.end <= self.linear)?;
        self.frame[range].first_chunk()
    }

    fn load<const N: usize>(&self, offset: u32) -> Result<[u8; N], SkbError> {
        self.frame[self.range(offset, N)?].try_into().map_err(|_| SkbError)
    }

    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), SkbError> {
        let range = self.range(offset, N)?;
        self.frame[range].copy_from_slice(bytes);
        Ok(())
    }

    fn change_to_ipv6(&mut self) -> Result<(), SkbError> {
        self.resize_header(IPV4_LEN, IPV6_LEN)
    }

    fn change_to_ipv4(&mut self) -> Result<(), SkbError> {
        self.resize_header(IPV6_LEN, IPV4_LEN)
    }

    fn remove_ipv4_options(&mut self, len: u32) -> Result<(), SkbError> {
        let options = self.range(ETH_LEN + IPV4_LEN, len as usize)?;
        self.frame.drain(options);
        Ok(())
    }

    fn insert_behind_ipv6(&mut self, len: u32) -> Result<(), SkbError> {
        let payload = self.range(ETH_LEN + IPV6_LEN, 0)?;
        self.frame.splice(payload, core::iter::repeat_n(0, len as usize));
        Ok(())
    }

    fn adjust_checksum(&mut self, offset: u32, difference: u32) -> Result<(), SkbError> {
        let adjusted = wire::apply_difference(self.load(offset)?, difference);
        self.store(offset, &adjusted)
    }

    fn adjust_icmp_checksum(&mut self, offset: u32, from: [u8; 2], to: [u8; 2]) -> Result<(), SkbError> {
        self.adjust_checksum(offset, wire::checksum_difference(&from, &to))
    }

    fn mark_for_host(&mut self) -> Result<(), SkbError> {
        Ok(())
    }

    fn pop_vlan(&mut self) -> Result<(), SkbError> {
        self.vlan = Vlan::Untagged;
        Ok(())
    }

    fn push_vlan(&mut self, id: u16) -> Result<(), SkbError> {
        self.vlan = Vlan::Tagged(id);
        Ok(())
    }

    fn resize(&mut self, len: u32) -> Result<(), SkbError> {
        self.frame.resize(len as usize, 0);
        Ok(())
    }
}

/// Maps, clock and sockets as plain values.
#[derive(Debug, Default)]
pub struct HostWorld {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub now_ns: u64,
    pub netns_context: NetnsContext,
    /// True if a process listens at the metadata address in the programs' own namespace.
    pub legacy_listening: bool,
    /// `MD_CONFIG[0]`.
    pub settings: Option<Settings>,
    /// `MD_HEARTBEAT[DATA]`.
    pub heartbeat_ns: u64,
    /// `MD_PORTS`.
    pub ports: HashMap<PortKey, Port>,
    /// `MD_ATTACH`.
    pub attachments: RefCell<HashMap<u32, AttachmentState>>,
    /// `MD_SHARES`.
    pub shares: RefCell<HashMap<u32, GuestShares>>,
    /// `MD_REFUSALS`.
    pub refusals: RefCell<HashMap<u32, Refusals>>,
    /// `MD_REFUSAL_EV`.
    pub reports: RefCell<Vec<Refusal>>,
    /// `MD_DEVICES`.
    pub devices: HashMap<u32, u32>,
    /// `MD_CLIENTS`.
    pub clients: RefCell<HashMap<ClientKey, Client>>,
    /// True if the agent listens in the portal.
    pub listening: bool,
    /// Connections of the portal: identity address and guest port.
    pub connections: Vec<([u8; 16], u16)>,
    /// Connections whose handshake is not complete.
    pub half_open: Vec<([u8; 16], u16)>,
    /// Number of map look-ups.
    pub lookups: Cell<usize>,
}

impl HostWorld {
    fn count_lookup<T>(&self, value: T) -> T {
        self.lookups.set(self.lookups.get() + 1);
        value
    }
}

impl World for HostWorld {
    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn netns_context<T: Copy>(&self, field: impl Fn(&NetnsContext) -> &T) -> T {
        *field(&self.netns_context)
    }

    fn settings(&self) -> Option<&Settings> {
        self.count_lookup(self.settings.as_ref())
    }

    fn heartbeat_ns(&self) -> u64 {
        self.count_lookup(self.heartbeat_ns)
    }

    fn port(&self, key: &PortKey) -> Option<&Port> {
        self.count_lookup(self.ports.get(key))
    }

    fn attachment<T>(&self, attachment: u32, with: impl FnOnce(&mut AttachmentState) -> T) -> Option<T> {
        self.count_lookup(self.attachments.borrow_mut().get_mut(&attachment).map(with))
    }

    fn shares<T>(&self, attachment: u32, with: impl FnOnce(&mut GuestShares) -> T) -> Option<T> {
        self.count_lookup(self.shares.borrow_mut().get_mut(&attachment).map(with))
    }

    fn refusals<T>(&self, attachment: u32, with: impl FnOnce(&mut Refusals) -> T) -> Option<T> {
        self.count_lookup(self.refusals.borrow_mut().get_mut(&attachment).map(with))
    }

    fn report(&self, refusal: &Refusal) {
        self.reports.borrow_mut().push(*refusal);
    }

    fn device(&self, attachment: u32) -> Option<u32> {
        self.count_lookup(self.devices.get(&attachment).copied())
    }

    fn client<T>(&self, key: &ClientKey, with: impl FnOnce(&mut Client) -> T) -> Option<T> {
        self.count_lookup(self.clients.borrow_mut().get_mut(key).map(with))
    }

    fn put_client(&self, key: &ClientKey, client: &Client) {
        self.clients.borrow_mut().insert(*key, *client);
    }

    fn portal_socket(&self, peer: &PortalPeer, _nsid: u32) -> PortalSocket {
        let port = u16::from_be_bytes([peer.tcp[0], peer.tcp[1]]);
        if self.connections.contains(&(peer.identity, port)) {
            PortalSocket::Connected
        } else if self.half_open.contains(&(peer.identity, port)) {
            PortalSocket::HalfOpen
        } else if self.listening {
            PortalSocket::Listening
        } else {
            PortalSocket::Absent
        }
    }

    fn legacy_listens(&self, _version: Version, _port: u32) -> bool {
        self.legacy_listening
    }
}
