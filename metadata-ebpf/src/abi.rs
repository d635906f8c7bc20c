//! Keys and values of the BPF maps, byte for byte.
//!
//! Addresses are byte arrays in network order. Plain integers are in host order, because both sides
//! run on the same host. There is no implicit padding: `IntoBytes` would not compile.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::reason::REFUSAL_COUNT;

/// Must grow with every change in this file or of [`crate::reason::Reason`]. The agent rebuilds
/// pins of any other version.
pub const ABI_VERSION: u32 = 11;

/// Elements of `MD_HEARTBEAT`. Each has one writer; zero in both means that the agent is absent.
pub mod heartbeat {
    /// Written by whatever answers guests, and read by the programs. Never later than
    /// [`CONTROL`], so that neither can hang unnoticed.
    pub const DATA: u32 = 0;
    /// Written by whatever keeps attachments and identities up to date.
    pub const CONTROL: u32 = 1;
    pub const COUNT: u32 = 2;
}

/// Names of the maps and programs. The kernel keeps at most 15 characters.
pub mod names {
    /// `Array<Settings>` with one element.
    pub const CONFIG: &str = "MD_CONFIG";
    /// `Array<u64>`, mapped into the agent's memory, with [`super::heartbeat::COUNT`] elements: the
    /// `CLOCK_MONOTONIC` nanoseconds of the agent's heartbeats, or 0 after the agent stopped.
    pub const HEARTBEAT: &str = "MD_HEARTBEAT";
    /// `HashMap<PortKey, Port>`.
    pub const PORTS: &str = "MD_PORTS";
    /// `HashMap<u32, AttachmentState>`, by attachment id.
    pub const ATTACHMENTS: &str = "MD_ATTACH";
    /// `DevMapHash`: the interface that carries an attachment, by attachment id. The kernel removes
    /// an entry together with its interface, before another interface can get the same index.
    pub const DEVICES: &str = "MD_DEVICES";
    /// `HashMap<u32, GuestShares>`, by the id of a shared attachment.
    pub const SHARES: &str = "MD_SHARES";
    /// `LruHashMap<ClientKey, Client>`: statistics. Nothing depends on a record being there.
    pub const CLIENTS: &str = "MD_CLIENTS";
    /// `HashMap<u32, Refusals>`, by attachment id.
    pub const REFUSALS: &str = "MD_REFUSALS";
    /// Ring buffer of [`super::Refusal`], which wakes the agent.
    pub const REFUSAL_EVENTS: &str = "MD_REFUSAL_EV";
    /// `PerCpuArray<u64>`, by [`crate::reason::Reason::index`].
    pub const STATS: &str = "MD_STATS";
    /// `ProgramArray`, indexed by [`super::slots`]: the programs that all namespaces except the
    /// host's share. Dispatchers tail-call into it.
    pub const PROGRAMS: &str = "MD_PROGRAMS";
    /// `u32` constant of each copy of the programs: 0 on the host. Any other value means that a
    /// dispatcher provides the [`super::NetnsContext`].
    pub const DISPATCHED: &str = "MD_DISPATCHED";
    /// [`super::NetnsContext`] constant of each dispatcher.
    pub const NETNS_CONTEXT: &str = "MD_NETNS";
    /// TC ingress on guest-facing interfaces. Its dispatchers have the same name.
    pub const FROM_GUEST: &str = "md_from_guest";
    /// TC ingress on the host end of the portal's veth pair. Its dispatchers have the same name.
    pub const TO_GUEST: &str = "md_to_guest";
}

/// Indexes into `MD_PROGRAMS`.
pub mod slots {
    pub const FROM_GUEST: u32 = 0;
    pub const TO_GUEST: u32 = 1;
    pub const COUNT: u32 = 2;
}

/// Attachments that a host can have; the size of the maps of attachments.
pub const MAX_PORTS: u32 = 16_384;
/// Clients about which there are statistics; the size of `MD_CLIENTS`. The kernel drops the record
/// that was not used for the longest time.
pub const MAX_CLIENTS: u32 = 16_384;
/// MAC addresses that one attachment remembers for clients whose address does not contain one.
pub const MAC_SLOTS: u8 = 16;
/// Rate limits of guests in one [`GuestShares`].
pub const GUEST_RATES: usize = 256;
/// Sources of a port that the kernel checks. This is more than Neutron gives a port by default:
/// five fixed addresses (`max_fixed_ips_per_port`) and ten allowed pairs
/// (`max_allowed_address_pair`).
pub const MAX_PORT_SOURCES: usize = 32;
/// Size in bytes of `MD_REFUSAL_EV`. A page of some architectures is as large.
pub const REFUSAL_EVENTS_LEN: u32 = 65_536;
/// Minimum nanoseconds between two events of one attachment and reason. A flood of refused packets
/// wakes the agent no more often.
pub const REFUSAL_EVENT_INTERVAL_NS: u64 = 1_000_000_000;

/// Flag in `Port::flags`: a source MAC address that is in none of [`Port::sources`] is forged.
pub const CHECK_MAC: u32 = 1;
/// Flag in `Port::flags`: a source that matches none of [`Port::sources`] is forged.
pub const CHECK_IPV4: u32 = 1 << 1;
/// Flag in `Port::flags`: drop packets meant for the legacy path if the legacy path is not
/// listening.
pub const CONFINED: u32 = 1 << 2;
/// Flag in `Port::flags`: many guests share the attachment.
pub const SHARED: u32 = 1 << 3;

/// `MD_CONFIG[0]`: settings that the agent writes and the programs read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Settings {
    /// [`ABI_VERSION`] of the agent that wrote this value. Always the first field.
    pub abi_version: u32,
    /// Interface index of the host end of the portal's veth pair.
    pub portal_ifindex: u32,
    /// Network namespace id (`man 8 ip-netns`, `nsid`) of the portal, as seen from the host's
    /// namespace.
    pub portal_nsid: u32,
    /// The next attachment id that the agent will assign. The programs do not read it.
    pub next_attachment: u32,
    /// Nanoseconds without a heartbeat after which the agent counts as absent.
    pub stale_after_ns: u64,
    /// Minimum nanoseconds between new connections of one attachment; 0 disables the limit.
    pub syn_interval_ns: u64,
    /// Nanoseconds by which a burst may run ahead of [`Self::syn_interval_ns`].
    pub syn_burst_ns: u64,
    /// Random numbers that decide which guests share an entry of [`GuestShares::guests`].
    pub hash_keys: [u64; 2],
    /// MAC address of the portal's end of every veth pair.
    pub portal_mac: [u8; 6],
    pub _pad: [u8; 2],
}

/// The network namespace that a program runs in, and the portal as seen from there.
///
/// On the host all fields are zero and [`Settings`] describes the portal. In any other namespace a
/// dispatcher writes this value into the packet's control block (`skb->cb`, which the kernel leaves
/// to programs on this hook) and tail-calls the programs that all namespaces share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct NetnsContext {
    /// Inode of the namespace's nsfs file; 0 for the host's own namespace.
    pub netns: u32,
    /// Interface index of this namespace's end of the veth pair into the portal.
    pub portal_ifindex: u32,
    /// Network namespace id of the portal, as seen from this namespace.
    pub portal_nsid: u32,
    /// TCP port, besides [`crate::identity::METADATA_PORT`], on which a legacy path of this
    /// namespace listens.
    pub legacy_port: u32,
}

impl NetnsContext {
    /// Returns the fields in the order in which the packet's control block holds them.
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        [self.netns, self.portal_ifindex, self.portal_nsid, self.legacy_port]
    }

    /// Reads the fields back from the packet's control block.
    #[must_use]
    #[inline(always)]
    pub const fn from_words([netns, portal_ifindex, portal_nsid, legacy_port]: [u32; 4]) -> Self {
        Self { netns, portal_ifindex, portal_nsid, legacy_port }
    }
}

/// Key of `MD_PORTS`: the interface and VLAN by which a guest's packets enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct PortKey {
    /// [`NetnsContext::netns`] of the program's namespace.
    pub netns: u32,
    /// Interface index in the program's namespace.
    pub ifindex: u32,
    /// VLAN id of a trunk's subport, in host order; 0 for untagged packets.
    pub vlan: u32,
}

/// Value of `MD_PORTS`: one attachment and the sources that its port may send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Port {
    /// Attachment id, never 0.
    pub attachment: u32,
    /// Combination of [`CHECK_MAC`], [`CHECK_IPV4`], [`CONFINED`] and [`SHARED`].
    pub flags: u32,
    /// Number of valid entries in [`Self::sources`].
    pub source_count: u32,
    pub _pad: u32,
    /// Neutron's network id; zero while unknown.
    pub network: [u8; 16],
    pub sources: [PortSource; MAX_PORT_SOURCES],
}

/// A MAC address, and addresses that a port may send from with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct PortSource {
    /// None in every entry of a port without [`CHECK_MAC`].
    pub mac: MacWord,
    /// A single address has a mask of 32 ones. 0.0.0.0/32 allows no IPv4 address: such an entry
    /// allows IPv6 alone.
    pub ipv4: Ipv4Prefix,
}

/// An IPv4 prefix as mask and masked address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Ipv4Prefix {
    pub mask: [u8; 4],
    pub address: [u8; 4],
}

impl Ipv4Prefix {
    /// Returns the prefix of this length that contains the address. A length above 32 counts as 32.
    #[must_use]
    pub const fn new(address: [u8; 4], len: u8) -> Self {
        let ones = match 32_u32.checked_sub(len as u32) {
            Some(zeroes) => match u32::MAX.checked_shl(zeroes) {
                Some(ones) => ones,
                None => 0,
            },
            None => u32::MAX,
        };
        let address = u32::from_be_bytes(address) & ones;
        Self { mask: ones.to_be_bytes(), address: address.to_be_bytes() }
    }

    /// Returns zero if the address, in network order, is in this prefix.
    #[must_use]
    #[inline(always)]
    pub const fn difference(&self, address: u32) -> u32 {
        (address & u32::from_ne_bytes(self.mask)) ^ u32::from_ne_bytes(self.address)
    }
}

/// Value of `MD_ATTACH`: the way back to an attachment, and its rate limit. Kept apart from
/// [`Port`], which the agent overwrites as a whole.
///
/// The kernel writes single words, each without a lock. On an interface of one guest all of them
/// belong to that guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct AttachmentState {
    /// Theoretical arrival time of the next new connection ([`crate::rate`]), in `CLOCK_MONOTONIC`
    /// nanoseconds. Unused on a shared attachment.
    pub syn_tat_ns: u64,
    /// Source MAC address of the replies. On an interface of one guest, the address to which its
    /// last SYN was sent: router, DHCP port, OVN metadata port or our own; 0 before the first SYN.
    /// On a shared one, that of the interface, because no guest may choose it for another.
    pub metadata_mac: MacWord,
    /// MAC addresses of clients, by [`crate::identity::ClientMac::Slot`].
    pub macs: [MacWord; MAC_SLOTS as usize],
    /// [`NetnsContext::netns`] of the interface's namespace.
    pub netns: u32,
    /// VLAN id that replies leave with, in host order; 0 for untagged.
    pub vlan: u32,
}

impl AttachmentState {
    /// Returns the state of an attachment that no guest has used yet.
    #[must_use]
    pub const fn new(key: &PortKey, metadata_mac: MacWord) -> Self {
        Self {
            syn_tat_ns: 0,
            metadata_mac,
            macs: [MacWord(0); MAC_SLOTS as usize],
            netns: key.netns,
            vlan: key.vlan,
        }
    }

    /// Returns the MAC address in a slot, counted from 1.
    #[must_use]
    #[inline(always)]
    pub const fn mac(&self, slot: u8) -> MacWord {
        self.macs[(slot.wrapping_sub(1) % MAC_SLOTS) as usize]
    }

    /// Puts a MAC address into a slot.
    #[inline(always)]
    pub const fn put_mac(&mut self, slot: u8, mac: MacWord) {
        self.macs[(slot.wrapping_sub(1) % MAC_SLOTS) as usize] = mac;
    }
}

/// A MAC address in one word, so that it is read and written as a whole. 0 means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(transparent)]
pub struct MacWord(pub u64);

impl MacWord {
    #[must_use]
    #[inline(always)]
    pub const fn new([a, b, c, d, e, f]: [u8; 6]) -> Self {
        Self(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// Returns the address, or `None` if there is none.
    #[must_use]
    #[inline(always)]
    pub const fn get(self) -> Option<[u8; 6]> {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        if self.0 == 0 { None } else { Some([a, b, c, d, e, f]) }
    }
}

/// Value of `MD_SHARES`: rate limits of the guests behind one shared attachment. All words are
/// theoretical arrival times of [`crate::rate`], written without a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct GuestShares {
    /// Of all guests together.
    pub total_tat_ns: u64,
    /// Of the reserve for guests that have not sent a SYN lately.
    pub reserve_tat_ns: u64,
    /// Of single guests, by a hash of the MAC address. Each guest has two of them.
    pub guests: [u64; GUEST_RATES],
}

impl GuestShares {
    /// Shares that no guest has used yet.
    pub const UNUSED: Self = Self { total_tat_ns: 0, reserve_tat_ns: 0, guests: [0; GUEST_RATES] };
}

/// Value of `MD_REFUSALS`: the packets of one attachment that were dropped.
///
/// Written without a lock, so packets that are dropped at once on several CPUs may count once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Refusals {
    /// Dropped packets, in the order of [`crate::reason::Reason::REFUSALS`].
    pub packets: [u64; REFUSAL_COUNT],
    /// Time of the last event of each reason, in `CLOCK_MONOTONIC` nanoseconds.
    pub reported_ns: [u64; REFUSAL_COUNT],
    pub last: Refusal,
}

impl Refusals {
    /// Refusals of an attachment that has none yet.
    pub const NONE: Self = Self {
        packets: [0; REFUSAL_COUNT],
        reported_ns: [0; REFUSAL_COUNT],
        last: Refusal { at_ns: 0, attachment: 0, reason: 0, address: [0; 16], mac: [0; 6], _pad: [0; 2] },
    };
}

/// One packet that was dropped, and an event of `MD_REFUSAL_EV`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Refusal {
    /// `CLOCK_MONOTONIC` nanoseconds; 0 means that there was none.
    pub at_ns: u64,
    pub attachment: u32,
    /// [`crate::reason::Reason::index`].
    pub reason: u32,
    /// Source address, that of IPv4 and ARP as an IPv4-mapped address; zero if it is unknown.
    pub address: [u8; 16],
    /// Source MAC address; zero if it is unknown.
    pub mac: [u8; 6],
    pub _pad: [u8; 2],
}

impl Refusal {
    /// Reads an event of `MD_REFUSAL_EV`; `None` if it has another length.
    #[must_use]
    pub fn from_event(bytes: &[u8]) -> Option<Self> {
        Self::read_from_bytes(bytes).ok()
    }
}

/// Key of `MD_CLIENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct ClientKey {
    /// Identity address, see [`crate::identity::ClientAddress::identity`].
    pub identity: [u8; 16],
}

/// Value of `MD_CLIENTS`: statistics about a client that has completed a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Client {
    /// Neutron's network id, copied from the port; zero while unknown.
    pub network: [u8; 16],
    /// `CLOCK_MONOTONIC` nanoseconds of the segment that created the record.
    pub first_seen_ns: u64,
    /// `CLOCK_MONOTONIC` nanoseconds of the last segment from the client.
    pub last_seen_ns: u64,
    /// The first connection, and the SYNs after it, including retransmissions.
    pub connections: u64,
    /// MAC address from which the client sent the first segment.
    pub guest_mac: [u8; 6],
    /// MAC address that the client sent that segment to.
    pub metadata_mac: [u8; 6],
    pub _pad: [u8; 4],
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya::Pod is an unsafe trait; this is its one home")]

    // SAFETY: `repr(C)` without padding (otherwise zerocopy's `IntoBytes` would not derive), and
    // every bit pattern is a valid value (`FromBytes` is derived).
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::NetnsContext {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PortKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Port {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::AttachmentState {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::GuestShares {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Refusals {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ClientKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Client {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn sizes_and_offsets_are_those_of_abi_version_11() {
        assert_eq!(ABI_VERSION, 11, "a new version needs new figures below");
        assert_eq!(size_of::<Settings>(), 64);
        assert_eq!(offset_of!(Settings, abi_version), 0);
        assert_eq!(offset_of!(Settings, stale_after_ns), 16);
        assert_eq!(offset_of!(Settings, hash_keys), 40);
        assert_eq!(offset_of!(Settings, portal_mac), 56);
        assert_eq!(size_of::<NetnsContext>(), 16);
        assert_eq!(offset_of!(NetnsContext, legacy_port), 12);
        assert_eq!(size_of::<PortKey>(), 12);
        assert_eq!(size_of::<PortSource>(), 16);
        assert_eq!(offset_of!(PortSource, ipv4), 8);
        assert_eq!(size_of::<Port>(), 544);
        assert_eq!(offset_of!(Port, network), 16);
        assert_eq!(offset_of!(Port, sources), 32);
        assert_eq!(size_of::<AttachmentState>(), 152);
        assert_eq!(offset_of!(AttachmentState, macs), 16);
        assert_eq!(offset_of!(AttachmentState, netns), 144);
        assert_eq!(size_of::<GuestShares>(), 2064);
        assert_eq!(offset_of!(GuestShares, guests), 16);
        assert_eq!(size_of::<Refusal>(), 40);
        assert_eq!(offset_of!(Refusal, address), 16);
        assert_eq!(offset_of!(Refusal, mac), 32);
        assert_eq!(size_of::<Refusals>(), 168);
        assert_eq!(offset_of!(Refusals, reported_ns), 64);
        assert_eq!(offset_of!(Refusals, last), 128);
        assert_eq!(size_of::<ClientKey>(), 16);
        assert_eq!(size_of::<Client>(), 56);
        assert_eq!(offset_of!(Client, first_seen_ns), 16);
        assert_eq!(offset_of!(Client, guest_mac), 40);
        assert_eq!(offset_of!(Client, metadata_mac), 46);
        assert_eq!(crate::reason::Reason::COUNT, 31, "MD_STATS changes its size with the reasons");
    }

    #[test]
    fn a_refusal_reads_back_from_its_event() {
        let refusal =
            Refusal { at_ns: 1, attachment: 2, reason: 3, address: [4; 16], mac: [5; 6], _pad: [0; 2] };
        assert_eq!(Refusal::from_event(refusal.as_bytes()), Some(refusal));
        assert_eq!(Refusal::from_event(&refusal.as_bytes()[1..]), None);
    }

    #[test]
    fn a_mac_address_reads_back_from_its_word() {
        let mac = [0xfa, 0x16, 0x3e, 0, 0, 5];
        assert_eq!(MacWord::new(mac).get(), Some(mac));
        assert_eq!(MacWord::default().get(), None);
    }

    #[test]
    fn a_netns_context_reads_back_from_its_words() {
        let context = NetnsContext { netns: 1, portal_ifindex: 2, portal_nsid: 3, legacy_port: 4 };
        assert_eq!(context.words(), [1, 2, 3, 4]);
        assert_eq!(NetnsContext::from_words(context.words()), context);
    }

    #[test]
    fn a_prefix_contains_the_addresses_under_its_mask() {
        let contains = |prefix: Ipv4Prefix, address| prefix.difference(u32::from_ne_bytes(address)) == 0;
        let subnet = Ipv4Prefix::new([10, 0, 1, 77], 23);
        assert_eq!(subnet, Ipv4Prefix { mask: [255, 255, 254, 0], address: [10, 0, 0, 0] });
        for (address, is_in) in [([10, 0, 0, 0], true), ([10, 0, 1, 255], true), ([10, 0, 2, 0], false)] {
            assert_eq!(contains(subnet, address), is_in, "{address:?}");
        }
        assert!(contains(Ipv4Prefix::new([10, 0, 0, 5], 32), [10, 0, 0, 5]));
        assert!(!contains(Ipv4Prefix::new([10, 0, 0, 5], 32), [10, 0, 0, 4]));
        assert!(contains(Ipv4Prefix::new([10, 0, 0, 5], 0), [192, 0, 2, 1]));
    }
}
