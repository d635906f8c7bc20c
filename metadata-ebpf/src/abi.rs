//! Keys and values of the BPF maps, byte for byte.
//!
//! Addresses are byte arrays in network order. Plain integers are in host order, as both sides run on one host.
//! There is no implicit padding: `IntoBytes` would not compile.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Grows with every change in this file or of [`crate::reason::Reason`]. The agent rebuilds pins of another version.
pub const ABI_VERSION: u32 = 5;

/// Names of the maps and programs; 15 characters at most, which is what the kernel keeps.
pub mod names {
    /// `Array<Settings>` with one element.
    pub const CONFIG: &str = "MD_CONFIG";
    /// `Array<u64>` with one element: `CLOCK_MONOTONIC` nanoseconds of the agent's last beat; 0 when it left.
    pub const HEARTBEAT: &str = "MD_HEARTBEAT";
    /// `HashMap<PortKey, Port>`.
    pub const PORTS: &str = "MD_PORTS";
    /// `HashMap<u32, AttachmentState>`, by attachment id.
    pub const ATTACHMENTS: &str = "MD_ATTACH";
    /// `HashMap<ClientKey, Client>`.
    pub const CLIENTS: &str = "MD_CLIENTS";
    /// `PerCpuArray<u64>`, by [`crate::reason::Reason::index`].
    pub const STATS: &str = "MD_STATS";
    /// `ProgramArray`: the copy of the programs that all namespaces but the host's share, by [`super::slots`].
    pub const PROGRAMS: &str = "MD_PROGRAMS";
    /// `u32`, a constant of each copy of the programs: 0 on the host, else a front tells the [`super::NetnsContext`].
    pub const DISPATCHED: &str = "MD_DISPATCHED";
    /// [`super::NetnsContext`], a constant of each front.
    pub const NETNS_CONTEXT: &str = "MD_NETNS";
    /// TC ingress on guest-facing interfaces; its fronts are called so as well.
    pub const FROM_GUEST: &str = "md_from_guest";
    /// TC ingress on the host end of the portal's veth; its fronts are called so as well.
    pub const TO_GUEST: &str = "md_to_guest";
}

/// Where in `MD_PROGRAMS` a program is.
pub mod slots {
    /// `md_from_guest`.
    pub const FROM_GUEST: u32 = 0;
    /// `md_to_guest`.
    pub const TO_GUEST: u32 = 1;
    /// How many there are.
    pub const COUNT: u32 = 2;
}

/// Attachments that a host can have; the size of `MD_PORTS` and `MD_ATTACH`.
pub const MAX_PORTS: u32 = 16_384;
/// Clients that a host can have; the size of `MD_CLIENTS`.
pub const MAX_CLIENTS: u32 = 131_072;
/// IPv4 prefixes of a port that the kernel checks. More than Neutron gives a port by default: five fixed addresses
/// (`max_fixed_ips_per_port`) and ten allowed pairs (`max_allowed_address_pair`).
pub const MAX_PORT_IPV4: usize = 32;

/// `Port::flags`: [`Port::mac`] is known, and other source MAC addresses are forged.
pub const CHECK_MAC: u32 = 1;
/// `Port::flags`: [`Port::ipv4`] is complete, and other source addresses are forged.
pub const CHECK_IPV4: u32 = 1 << 1;
/// `Port::flags`: where no legacy path listens, what would be left to it is dropped.
pub const CONFINED: u32 = 1 << 2;

/// `MD_CONFIG[0]`: what the agent tells the programs once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Settings {
    /// [`ABI_VERSION`] of who wrote it. Stays the first field for ever.
    pub abi_version: u32,
    /// Interface index of the host end of the portal's veth pair.
    pub portal_ifindex: u32,
    /// Network namespace id (`man 8 ip-netns`, `nsid`) of the portal, as seen from the host's namespace.
    pub portal_nsid: u32,
    /// The next attachment id that the agent will give out. The programs do not read it.
    pub next_attachment: u32,
    /// After so many nanoseconds without a beat the agent counts as absent.
    pub stale_after_ns: u64,
    /// Allowance of new connections per attachment: one in so many nanoseconds. 0 switches the limit off.
    pub syn_interval_ns: u64,
    /// How far, in nanoseconds, a burst may run ahead of [`Self::syn_interval_ns`].
    pub syn_burst_ns: u64,
    /// MAC address of the portal's end of every veth pair.
    pub portal_mac: [u8; 6],
    /// Zero.
    pub _pad: [u8; 2],
}

/// Which network namespace a program works in, and the way to the portal from there. On the host all is zero, and the way
/// in [`Settings`]. Elsewhere a front of each namespace writes it into the packet's control block, whose words the kernel
/// leaves to programs on this hook, and goes on in the copy that all namespaces share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct NetnsContext {
    /// Inode of the namespace's nsfs file; 0 for the host's own.
    pub netns: u32,
    /// Interface index of this end of the veth pair into the portal.
    pub portal_ifindex: u32,
    /// Network namespace id of the portal, as seen from this namespace.
    pub portal_nsid: u32,
    /// TCP port on which a legacy path of this namespace listens besides [`crate::identity::METADATA_PORT`].
    pub legacy_port: u32,
}

impl NetnsContext {
    /// As the control block of a packet holds it.
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        [self.netns, self.portal_ifindex, self.portal_nsid, self.legacy_port]
    }

    /// The way back.
    #[must_use]
    #[inline(always)]
    pub const fn from_words([netns, portal_ifindex, portal_nsid, legacy_port]: [u32; 4]) -> Self {
        Self { netns, portal_ifindex, portal_nsid, legacy_port }
    }
}

/// Key of `MD_PORTS`: where a guest's packets enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct PortKey {
    /// [`NetnsContext::netns`] of the program.
    pub netns: u32,
    /// Interface index in the namespace of the program.
    pub ifindex: u32,
    /// VLAN id of a trunk's subport, in host order; 0 for untagged.
    pub vlan: u32,
}

impl PortKey {
    /// The untagged side of an interface in the host's own namespace.
    #[must_use]
    #[inline(always)]
    pub const fn untagged(ifindex: u32) -> Self {
        Self { netns: 0, ifindex, vlan: 0 }
    }
}

/// Value of `MD_PORTS`: one attachment, and what is known of the port behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Port {
    /// The attachment id, never 0.
    pub attachment: u32,
    /// [`CHECK_MAC`], [`CHECK_IPV4`] and [`CONFINED`].
    pub flags: u32,
    /// How many source addresses may be recorded at the same time.
    pub client_quota: u32,
    /// How many of [`Self::ipv4`] are meant.
    pub ipv4_count: u32,
    /// Neutron's network id; zero while unknown.
    pub network: [u8; 16],
    /// The prefixes in which the port's addresses are: mask, and address under it. An address alone has 32 ones.
    pub ipv4: [Ipv4Prefix; MAX_PORT_IPV4],
    /// The port's MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub _pad: [u8; 2],
}

/// Addresses with a beginning in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Ipv4Prefix {
    /// Ones where they agree.
    pub mask: [u8; 4],
    /// What they agree in.
    pub address: [u8; 4],
}

impl Ipv4Prefix {
    /// The prefix of this length that an address is in; a length above 32 counts as 32.
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

    /// Whether an address is in it.
    #[must_use]
    #[inline(always)]
    pub const fn contains(&self, address: [u8; 4]) -> bool {
        u32::from_ne_bytes(address) & u32::from_ne_bytes(self.mask) == u32::from_ne_bytes(self.address)
    }
}

/// Value of `MD_ATTACH`: what the kernel counts per attachment. Apart from [`Port`], because the agent rewrites
/// that one whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct AttachmentState {
    /// Theoretical arrival time of the next new connection ([`crate::rate`]), `CLOCK_MONOTONIC` nanoseconds.
    pub syn_tat_ns: u64,
    /// Clients recorded. The agent corrects it when it removes idle ones.
    pub clients: u64,
}

/// Key of `MD_CLIENTS`: the identity address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct ClientKey {
    /// [`crate::identity::ClientAddress::identity`].
    pub identity: [u8; 16],
}

/// Value of `MD_CLIENTS`: how to answer a client, and what was seen of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Client {
    /// Neutron's network id, from the port at the last SYN; zero while unknown.
    pub network: [u8; 16],
    /// `CLOCK_MONOTONIC` nanoseconds of the first SYN.
    pub first_seen_ns: u64,
    /// `CLOCK_MONOTONIC` nanoseconds of the last SYN or answer.
    pub last_seen_ns: u64,
    /// SYNs led into the portal, retransmissions included.
    pub connections: u64,
    /// The interface by which answers leave.
    pub ifindex: u32,
    /// The VLAN id by which answers leave, in host order; 0 for untagged.
    pub vlan: u32,
    /// The MAC address of the guest, as its last SYN bore it.
    pub guest_mac: [u8; 6],
    /// The MAC address that the guest sent to: router, DHCP port, OVN metadata port or our own. Answers bear it.
    pub metadata_mac: [u8; 6],
    /// [`NetnsContext::netns`] of the namespace that the interface is in.
    pub netns: u32,
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya::Pod is an unsafe trait; this is its one home")]

    // SAFETY: `repr(C)` without padding (zerocopy's `IntoBytes` would not derive otherwise) and every bit
    // pattern is a value (`FromBytes` is derived).
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
    unsafe impl aya::Pod for super::ClientKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Client {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn sizes_and_offsets_are_those_of_abi_version_5() {
        assert_eq!(ABI_VERSION, 5, "a new version needs new figures below");
        assert_eq!(size_of::<Settings>(), 48);
        assert_eq!(offset_of!(Settings, abi_version), 0);
        assert_eq!(offset_of!(Settings, stale_after_ns), 16);
        assert_eq!(offset_of!(Settings, portal_mac), 40);
        assert_eq!(size_of::<NetnsContext>(), 16);
        assert_eq!(offset_of!(NetnsContext, legacy_port), 12);
        assert_eq!(size_of::<PortKey>(), 12);
        assert_eq!(size_of::<Port>(), 296);
        assert_eq!(offset_of!(Port, network), 16);
        assert_eq!(offset_of!(Port, ipv4), 32);
        assert_eq!(offset_of!(Port, mac), 288);
        assert_eq!(size_of::<AttachmentState>(), 16);
        assert_eq!(size_of::<ClientKey>(), 16);
        assert_eq!(size_of::<Client>(), 64);
        assert_eq!(offset_of!(Client, first_seen_ns), 16);
        assert_eq!(offset_of!(Client, ifindex), 40);
        assert_eq!(offset_of!(Client, metadata_mac), 54);
        assert_eq!(offset_of!(Client, netns), 60);
        assert_eq!(crate::reason::Reason::COUNT, 28, "MD_STATS changes its size with the reasons");
    }

    #[test]
    fn a_site_reads_back_from_its_words() {
        let site = NetnsContext { netns: 1, portal_ifindex: 2, portal_nsid: 3, legacy_port: 4 };
        assert_eq!(site.words(), [1, 2, 3, 4]);
        assert_eq!(NetnsContext::from_words(site.words()), site);
    }

    #[test]
    fn a_prefix_holds_the_addresses_under_its_mask() {
        let subnet = Ipv4Prefix::new([10, 0, 1, 77], 23);
        assert_eq!(subnet, Ipv4Prefix { mask: [255, 255, 254, 0], address: [10, 0, 0, 0] });
        for (address, is_in) in [([10, 0, 0, 0], true), ([10, 0, 1, 255], true), ([10, 0, 2, 0], false)] {
            assert_eq!(subnet.contains(address), is_in, "{address:?}");
        }
        assert!(Ipv4Prefix::new([10, 0, 0, 5], 32).contains([10, 0, 0, 5]));
        assert!(!Ipv4Prefix::new([10, 0, 0, 5], 32).contains([10, 0, 0, 4]));
        assert!(Ipv4Prefix::new([10, 0, 0, 5], 0).contains([192, 0, 2, 1]));
    }
}
