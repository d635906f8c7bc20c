//! What the programs need of a packet. The kernel build implements it with helpers on the real `sk_buff`, the host
//! build on a byte vector ([`crate::host`]).

/// How much of a frame [`Skb::head`] shows: an Ethernet header and an ARP packet, or an IPv4 header and the first
/// eight bytes behind it.
pub const HEAD: usize = 42;

/// A helper refused, or the frame is shorter than asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkbError;

/// The outermost VLAN tag of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vlan {
    /// None.
    Untagged,
    /// IEEE 802.1Q, with this VLAN id: 1 to 4095.
    Tagged(u16),
    /// Of priority alone (VLAN id 0), or IEEE 802.1ad.
    Unsupported,
}

/// A frame at TC ingress, from the Ethernet header on. Offsets are bytes from there.
#[expect(clippy::len_without_is_empty, reason = "a frame has an Ethernet header at least")]
pub trait Skb {
    /// Length of the frame, fragments and GSO payload included.
    fn len(&self) -> u32;

    /// Index of the interface that the frame came in by.
    fn ifindex(&self) -> u32;

    /// The VLAN tag of the frame (the kernel moves it out of the frame before TC sees it).
    fn vlan(&self) -> Vlan;

    /// The first [`HEAD`] bytes, `None` if the frame is shorter. The cheapest look there is.
    fn head(&mut self) -> Option<&[u8; HEAD]>;

    /// `N` bytes where they lie, `None` if not all of them are in the linear part of the packet. Costs no helper's call.
    fn linear<const N: usize>(&self, offset: u32) -> Option<&[u8; N]>;

    /// Copies `N` bytes out.
    ///
    /// # Errors
    /// The frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Result<[u8; N], SkbError>;

    /// Writes `N` bytes, leaving checksums alone.
    ///
    /// # Errors
    /// The frame ends before, or cannot be made writable.
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), SkbError>;

    /// Makes room for an IPv6 header in place of the IPv4 header, and keeps GSO and checksum state
    /// (`bpf_skb_change_proto`). The Ethernet header and the new IP header are to be written.
    ///
    /// # Errors
    /// The kernel has no memory, or the frame is GSO but not TCP.
    fn change_to_ipv6(&mut self) -> Result<(), SkbError>;

    /// The way back: room for an IPv4 header in place of the IPv6 header.
    ///
    /// # Errors
    /// As [`Self::change_to_ipv6`].
    fn change_to_ipv4(&mut self) -> Result<(), SkbError>;

    /// Adjusts the TCP checksum at `offset` for a pseudo header that changed by `difference`
    /// ([`crate::wire::checksum_difference`]), partial checksums included.
    ///
    /// # Errors
    /// The frame ends before.
    fn adjust_tcp_checksum(&mut self, offset: u32, difference: u32) -> Result<(), SkbError>;

    /// Adjusts the ICMP checksum at `offset` for one 16-bit word that changed. Words in network order.
    ///
    /// # Errors
    /// The frame ends before.
    fn adjust_icmp_checksum(&mut self, offset: u32, from: [u8; 2], to: [u8; 2]) -> Result<(), SkbError>;

    /// Declares the frame meant for this host, whatever MAC address it bears (`bpf_skb_change_type`).
    ///
    /// # Errors
    /// The kernel refuses.
    fn mark_for_host(&mut self) -> Result<(), SkbError>;

    /// Takes the VLAN tag off (`bpf_skb_vlan_pop`).
    ///
    /// # Errors
    /// The kernel refuses.
    fn pop_vlan(&mut self) -> Result<(), SkbError>;

    /// Puts an IEEE 802.1Q tag with this VLAN id on (`bpf_skb_vlan_push`).
    ///
    /// # Errors
    /// The kernel refuses.
    fn push_vlan(&mut self, id: u16) -> Result<(), SkbError>;

    /// Cuts the frame, or adds zeroes, at its end (`bpf_skb_change_tail`).
    ///
    /// # Errors
    /// The kernel has no memory.
    fn resize(&mut self, len: u32) -> Result<(), SkbError>;
}
