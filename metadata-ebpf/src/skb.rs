//! Packet operations that the programs need. The kernel build implements them with helpers on the
//! real `sk_buff`, the host build on a byte vector ([`crate::host`]).

/// Number of bytes that [`Skb::head`] returns: an Ethernet header and an ARP packet, or an Ethernet
/// header, an IPv4 header and the first eight bytes behind it.
pub const HEAD: usize = 42;

/// A helper failed, or the frame is shorter than requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkbError;

/// The outermost VLAN tag of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vlan {
    Untagged,
    /// IEEE 802.1Q with this VLAN id, 1 to 4095.
    Tagged(u16),
    /// A priority tag (VLAN id 0). Its frame belongs to no VLAN, and the kernel treats it as
    /// untagged.
    Priority,
    /// IEEE 802.1ad with a VLAN id.
    Unsupported,
}

/// A frame at TC ingress. Offsets are bytes from the start of the Ethernet header.
#[expect(clippy::len_without_is_empty, reason = "a frame has an Ethernet header at least")]
pub trait Skb {
    /// Length of the frame, including fragments and GSO payload.
    fn len(&self) -> u32;

    /// Index of the ingress interface.
    fn ifindex(&self) -> u32;

    /// The VLAN tag of the frame. The kernel moves it out of the frame before TC runs.
    fn vlan(&self) -> Vlan;

    /// The first [`HEAD`] bytes, or `None` if the frame is shorter. The cheapest access of all.
    fn head(&mut self) -> Option<&[u8; HEAD]>;

    /// Returns `N` bytes in place, or `None` if not all of them are in the linear part of the
    /// packet. Does not call a helper.
    fn linear<const N: usize>(&self, offset: u32) -> Option<&[u8; N]>;

    /// Copies `N` bytes out of the frame.
    ///
    /// # Errors
    /// The frame is too short.
    fn load<const N: usize>(&self, offset: u32) -> Result<[u8; N], SkbError>;

    /// Writes `N` bytes and leaves checksums unchanged.
    ///
    /// # Errors
    /// The frame is too short or cannot be made writable.
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), SkbError>;

    /// Makes room for an IPv6 header in place of the IPv4 header and keeps GSO and checksum state
    /// (`bpf_skb_change_proto`). The caller must write the Ethernet header and the new IP header.
    ///
    /// # Errors
    /// The kernel has no memory, or the frame is GSO but not TCP.
    fn change_to_ipv6(&mut self) -> Result<(), SkbError>;

    /// The reverse: makes room for an IPv4 header in place of the IPv6 header.
    ///
    /// # Errors
    /// As [`Self::change_to_ipv6`].
    fn change_to_ipv4(&mut self) -> Result<(), SkbError>;

    /// Removes `len` bytes behind the first [`crate::wire::IPV4_LEN`] of the IPv4 header and keeps
    /// GSO and checksum state (`bpf_skb_adjust_room`). The caller must correct the header.
    ///
    /// # Errors
    /// The packet is too short, or the kernel has no memory.
    fn remove_ipv4_options(&mut self, len: u32) -> Result<(), SkbError>;

    /// Inserts `len` zero bytes behind the IPv6 header (`bpf_skb_adjust_room`).
    ///
    /// # Errors
    /// The frame becomes too long, or the kernel has no memory.
    fn insert_behind_ipv6(&mut self, len: u32) -> Result<(), SkbError>;

    /// Adjusts the checksum of TCP or ICMPv6 at `offset` for addresses that changed by `difference`
    /// ([`crate::wire::checksum_difference`]). Handles partial checksums of TCP too.
    ///
    /// # Errors
    /// The frame is too short.
    fn adjust_checksum(&mut self, offset: u32, difference: u32) -> Result<(), SkbError>;

    /// Adjusts the ICMP checksum at `offset` for one 16-bit word that changed. Both words are in
    /// network order.
    ///
    /// # Errors
    /// The frame is too short.
    fn adjust_icmp_checksum(&mut self, offset: u32, from: [u8; 2], to: [u8; 2]) -> Result<(), SkbError>;

    /// Marks the frame as addressed to this host, regardless of its destination MAC address
    /// (`bpf_skb_change_type`).
    ///
    /// # Errors
    /// The kernel refuses.
    fn mark_for_host(&mut self) -> Result<(), SkbError>;

    /// Removes the VLAN tag (`bpf_skb_vlan_pop`).
    ///
    /// # Errors
    /// The kernel refuses.
    fn pop_vlan(&mut self) -> Result<(), SkbError>;

    /// Adds an IEEE 802.1Q tag with this VLAN id (`bpf_skb_vlan_push`).
    ///
    /// # Errors
    /// The kernel refuses.
    fn push_vlan(&mut self, id: u16) -> Result<(), SkbError>;

    /// Truncates the frame, or appends zeroes (`bpf_skb_change_tail`).
    ///
    /// # Errors
    /// The kernel has no memory.
    fn resize(&mut self, len: u32) -> Result<(), SkbError>;
}
