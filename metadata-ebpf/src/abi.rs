//! Keys and values of the BPF maps, byte for byte.
//!
//! Addresses are byte arrays in network order. Plain integers are in host order, as both sides run on one host.
//! There is no implicit padding: `IntoBytes` would not compile.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Grows with every change in this file or of [`crate::reason::Reason`]. The agent rebuilds pins of another version.
pub const ABI_VERSION: u32 = 2;

/// Names of the maps and programs; 15 characters at most, which is what the kernel keeps.
pub mod names {
    /// `Array<Settings>` with one element.
    pub const CONFIG: &str = "MD_CONFIG";
    /// `Array<u64>` with one element: `CLOCK_MONOTONIC` nanoseconds of the agent's last beat; 0 when it left.
    pub const HEARTBEAT: &str = "MD_HEARTBEAT";
    /// `HashMap<PortKey, Port>`.
    pub const PORTS: &str = "MD_PORTS";
    /// `HashMap<u32, Gate>`, by attachment id.
    pub const GATES: &str = "MD_GATES";
    /// `HashMap<ClientKey, Client>`.
    pub const CLIENTS: &str = "MD_CLIENTS";
    /// `PerCpuArray<u64>`, by [`crate::reason::Reason::index`].
    pub const STATS: &str = "MD_STATS";
    /// TC ingress on guest-facing interfaces.
    pub const FROM_GUEST: &str = "md_from_guest";
    /// TC ingress on the host end of the portal's veth.
    pub const TO_GUEST: &str = "md_to_guest";
}

/// Attachments that a host can have; the size of `MD_PORTS` and `MD_GATES`.
pub const MAX_PORTS: u32 = 16_384;
/// Clients that a host can have; the size of `MD_CLIENTS`.
pub const MAX_CLIENTS: u32 = 131_072;
/// IPv4 addresses of a port that the kernel checks; a port with more is not checked for addresses.
pub const MAX_PORT_IPV4: usize = 8;

/// `Port::flags`: [`Port::mac`] is known, and other source MAC addresses are forged.
pub const CHECK_MAC: u32 = 1;
/// `Port::flags`: [`Port::ipv4`] is complete, and other source addresses are forged.
pub const CHECK_IPV4: u32 = 1 << 1;

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
    /// MAC address of the portal's end of the veth pair.
    pub portal_mac: [u8; 6],
    /// Zero.
    pub _pad: [u8; 2],
}

/// Key of `MD_PORTS`: where a guest's packets enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct PortKey {
    /// Interface index in the namespace of the program.
    pub ifindex: u32,
    /// VLAN id of a trunk's subport, in host order; 0 for untagged.
    pub vlan: u32,
}

impl PortKey {
    /// The untagged side of an interface.
    #[must_use]
    #[inline(always)]
    pub const fn untagged(ifindex: u32) -> Self {
        Self { ifindex, vlan: 0 }
    }
}

/// Value of `MD_PORTS`: one attachment, and what is known of the port behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Port {
    /// The attachment id, never 0.
    pub attachment: u32,
    /// [`CHECK_MAC`] and [`CHECK_IPV4`].
    pub flags: u32,
    /// How many source addresses may be recorded at the same time.
    pub client_quota: u32,
    /// How many of [`Self::ipv4`] are meant.
    pub ipv4_count: u32,
    /// Neutron's network id; zero while unknown.
    pub network: [u8; 16],
    /// The addresses that the port may use.
    pub ipv4: [[u8; 4]; MAX_PORT_IPV4],
    /// The port's MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub _pad: [u8; 2],
}

/// Value of `MD_GATES`: what the kernel counts per attachment. Apart from [`Port`], because the agent rewrites
/// that one whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Gate {
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
    /// Zero.
    pub _pad: [u8; 4],
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya::Pod is an unsafe trait; this is its one home")]

    // SAFETY: `repr(C)` without padding (zerocopy's `IntoBytes` would not derive otherwise) and every bit
    // pattern is a value (`FromBytes` is derived).
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PortKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Port {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Gate {}
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
    fn sizes_and_offsets_are_those_of_abi_version_2() {
        assert_eq!(ABI_VERSION, 2, "a new version needs new figures below");
        assert_eq!(size_of::<Settings>(), 48);
        assert_eq!(offset_of!(Settings, abi_version), 0);
        assert_eq!(offset_of!(Settings, stale_after_ns), 16);
        assert_eq!(offset_of!(Settings, portal_mac), 40);
        assert_eq!(size_of::<PortKey>(), 8);
        assert_eq!(size_of::<Port>(), 72);
        assert_eq!(offset_of!(Port, network), 16);
        assert_eq!(offset_of!(Port, ipv4), 32);
        assert_eq!(offset_of!(Port, mac), 64);
        assert_eq!(size_of::<Gate>(), 16);
        assert_eq!(size_of::<ClientKey>(), 16);
        assert_eq!(size_of::<Client>(), 64);
        assert_eq!(offset_of!(Client, first_seen_ns), 16);
        assert_eq!(offset_of!(Client, ifindex), 40);
        assert_eq!(offset_of!(Client, metadata_mac), 54);
        assert_eq!(crate::reason::Reason::COUNT, 26, "MD_STATS changes its size with the reasons");
    }
}
