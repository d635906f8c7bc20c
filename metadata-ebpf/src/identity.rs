//! The identity address: the IPv6 address under which the agent sees a client.
//!
//! It is computed from the attachment and the guest's own addresses and is never allocated. So it
//! cannot be exhausted, recycled or confused:
//!
//! ```text
//!  IPv4 guest   fd64:<attachment id, 32 bit>:<guest MAC address, 48 bit>:<guest IPv4>
//!  IPv6 guest   fd66:<attachment id, 32 bit>:<MAC slot, 16 bit>:<guest interface id, 64 bit>
//! ```
//!
//! It contains all that a reply needs, so the kernel keeps no table of clients. A segment from
//! another MAC address belongs to another client. An IPv6 address that is derived from the MAC
//! address has slot 0. For any other address the attachment remembers the MAC address in a slot
//! ([`ClientMac::Slot`]).
//!
//! All bytes are in network order.

use crate::abi::MAC_SLOTS;

/// The portal's own address, `fd6d::a9fe:a9fe`: the destination of every redirected connection.
pub const PORTAL_ADDRESS: [u8; 16] = [0xfd, 0x6d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 169, 254, 169, 254];

/// The common prefix of all identity addresses, `fd64::/14`. It does not contain
/// [`PORTAL_ADDRESS`].
pub const IDENTITY_PREFIX: ([u8; 2], u8) = ([0xfd, 0x64], 14);

/// Length of the prefixes of [`ClientAddress::prefixes`].
pub const ATTACHMENT_PREFIX_LEN: u8 = 48;

/// The metadata address for IPv4, 169.254.169.254.
pub const METADATA_IPV4: [u8; 4] = [169, 254, 169, 254];

/// The metadata address for IPv6, fe80::a9fe:a9fe.
pub const METADATA_IPV6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 169, 254, 169, 254];

/// The port of the metadata service, both for guests and in the portal.
pub const METADATA_PORT: u16 = 80;

const FAMILY_IPV4: [u8; 2] = [0xfd, 0x64];
const FAMILY_IPV6: [u8; 2] = [0xfd, 0x66];

/// Identifies a guest-facing interface, or one VLAN on it. Never reused while the host is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttachmentId(u32);

impl AttachmentId {
    /// Returns `None` for 0, which is not a valid id.
    #[must_use]
    pub const fn new(id: u32) -> Option<Self> {
        if id == 0 { None } else { Some(Self(id)) }
    }

    #[must_use]
    #[inline(always)]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl core::fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

/// The guest's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestAddress {
    /// An IPv4 source address.
    Ipv4([u8; 4]),
    /// The interface identifier of a source in fe80::/64.
    Ipv6LinkLocal([u8; 8]),
}

/// The MAC address that a client sends from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientMac {
    /// Contained in the identity address.
    Address([u8; 6]),
    /// In this slot of the attachment, counted from 1. MAC addresses of one attachment may share a
    /// slot, which then holds the last one.
    Slot(u8),
}

/// Identifies a client: a guest address and a MAC address behind one attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientAddress {
    pub attachment: AttachmentId,
    pub guest: GuestAddress,
    /// The slot of a link-local address that is not derived from the MAC address.
    pub mac: ClientMac,
}

impl ClientAddress {
    /// Creates a client address from an IPv4 address, with a MAC address of zeroes.
    #[must_use]
    pub const fn ipv4(attachment: AttachmentId, address: [u8; 4]) -> Self {
        Self::from_ipv4(attachment, address, [0; 6])
    }

    /// Creates a client address from an IPv4 address and a MAC address.
    #[must_use]
    #[inline(always)]
    pub const fn from_ipv4(attachment: AttachmentId, address: [u8; 4], mac: [u8; 6]) -> Self {
        Self { attachment, guest: GuestAddress::Ipv4(address), mac: ClientMac::Address(mac) }
    }

    /// Creates a client address from the interface identifier of a link-local address and a MAC
    /// address.
    #[must_use]
    #[inline(always)]
    pub const fn from_link_local(attachment: AttachmentId, interface_id: [u8; 8], mac: [u8; 6]) -> Self {
        let guest = GuestAddress::Ipv6LinkLocal(interface_id);
        let mac = if is_derived(interface_id, mac) {
            ClientMac::Address(mac)
        } else {
            // Guests of one cloud differ in the last octets.
            ClientMac::Slot((mac[4] ^ mac[5]) % MAC_SLOTS + 1)
        };
        Self { attachment, guest, mac }
    }

    /// Returns the MAC address, if the identity address contains it. On a shared attachment it
    /// always does.
    #[must_use]
    #[inline(always)]
    pub const fn mac(&self) -> Option<[u8; 6]> {
        match self.mac {
            ClientMac::Address(mac) => Some(mac),
            ClientMac::Slot(_) => None,
        }
    }

    /// Returns the identity address of this client.
    #[must_use]
    #[inline(always)]
    pub const fn identity(&self) -> [u8; 16] {
        let a = self.attachment.0.to_be_bytes();
        match self.guest {
            GuestAddress::Ipv4(g) => {
                let [p, q] = FAMILY_IPV4;
                let m = match self.mac {
                    ClientMac::Address(mac) => mac,
                    ClientMac::Slot(_) => [0; 6],
                };
                [p, q, a[0], a[1], a[2], a[3], m[0], m[1], m[2], m[3], m[4], m[5], g[0], g[1], g[2], g[3]]
            }
            GuestAddress::Ipv6LinkLocal(g) => {
                let [p, q] = FAMILY_IPV6;
                let slot = match self.mac {
                    ClientMac::Address(_) => 0,
                    ClientMac::Slot(slot) => slot,
                };
                [p, q, a[0], a[1], a[2], a[3], 0, slot, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]]
            }
        }
    }

    /// Returns the two prefixes that contain the identity addresses of all clients of an
    /// attachment.
    #[must_use]
    pub const fn prefixes(attachment: AttachmentId) -> [[u8; 16]; 2] {
        let ipv4 = Self::ipv4(attachment, [0; 4]);
        let ipv6 = Self { guest: GuestAddress::Ipv6LinkLocal([0; 8]), ..ipv4 };
        [ipv4.identity(), ipv6.identity()]
    }

    /// Parses an identity address. Returns `None` for every address that [`Self::identity`] does
    /// not produce.
    #[must_use]
    #[inline(always)]
    pub const fn from_identity(address: [u8; 16]) -> Option<Self> {
        let [p, q, a0, a1, a2, a3, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9] = address;
        let Some(attachment) = AttachmentId::new(u32::from_be_bytes([a0, a1, a2, a3])) else {
            return None;
        };
        if p == FAMILY_IPV4[0] && q == FAMILY_IPV4[1] {
            return Some(Self::from_ipv4(attachment, [b6, b7, b8, b9], [b0, b1, b2, b3, b4, b5]));
        }
        if p != FAMILY_IPV6[0] || q != FAMILY_IPV6[1] || b0 != 0 {
            return None;
        }
        let interface_id = [b2, b3, b4, b5, b6, b7, b8, b9];
        let mac = if b1 != 0 {
            ClientMac::Slot(b1)
        } else if b5 == 0xff && b6 == 0xfe {
            ClientMac::Address([b2 ^ 2, b3, b4, b7, b8, b9])
        } else {
            return None;
        };
        Some(Self { attachment, guest: GuestAddress::Ipv6LinkLocal(interface_id), mac })
    }
}

/// Returns true if an interface identifier was made from a MAC address (RFC 4291, appendix A).
#[inline(always)]
const fn is_derived([a, b, c, d, e, f, g, h]: [u8; 8], mac: [u8; 6]) -> bool {
    d == 0xff
        && e == 0xfe
        && a ^ 2 == mac[0]
        && b == mac[1]
        && c == mac[2]
        && f == mac[3]
        && g == mac[4]
        && h == mac[5]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv6Addr;

    fn attachment(id: u32) -> AttachmentId {
        AttachmentId::new(id).unwrap()
    }

    const MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 5];
    const DERIVED: [u8; 8] = [0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 5];

    #[test]
    fn identities_have_the_documented_formats() {
        let text = |client: ClientAddress| Ipv6Addr::from(client.identity()).to_string();
        let ipv4 = ClientAddress::from_ipv4(attachment(7), [10, 0, 0, 5], MAC);
        assert_eq!(text(ipv4), "fd64:0:7:fa16:3e00:5:a00:5");
        let derived = ClientAddress::from_link_local(attachment(7), DERIVED, MAC);
        assert_eq!(text(derived), "fd66:0:7:0:f816:3eff:fe00:5");
        assert_eq!(derived.mac(), Some(MAC));
        let private = ClientAddress::from_link_local(attachment(7), [1; 8], MAC);
        assert_eq!(text(private), "fd66:0:7:6:101:101:101:101");
        assert_eq!(private.mac(), None);
    }

    #[test]
    fn an_address_derived_from_another_mac_address_is_in_a_slot() {
        for octet in 0..MAC.len() {
            let mut other = MAC;
            other[octet] ^= 1;
            assert_eq!(ClientAddress::from_link_local(attachment(1), DERIVED, other).mac(), None);
        }
    }

    #[test]
    fn the_portal_and_attachment_zero_are_not_clients() {
        assert_eq!(ClientAddress::from_identity(PORTAL_ADDRESS), None);
        for zero in ["fd64::fa16:3e00:5:a00:5", "fd66::f816:3eff:fe00:5"] {
            let zero: Ipv6Addr = zero.parse().unwrap();
            assert_eq!(ClientAddress::from_identity(zero.octets()), None);
        }
    }

    fn is_in(address: [u8; 16], prefix: &[u8], len: u8) -> bool {
        let bits = |bytes: &[u8]| bytes.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
        let width = prefix.len() * 8;
        bits(&address[..prefix.len()]) >> (width - usize::from(len))
            == bits(prefix) >> (width - usize::from(len))
    }

    fn client() -> impl Strategy<Value = ClientAddress> {
        let ipv4 = (1..=u32::MAX, any::<[u8; 4]>(), any::<[u8; 6]>());
        let link_local = (1..=u32::MAX, any::<[u8; 8]>(), any::<[u8; 6]>(), any::<bool>());
        prop_oneof![
            ipv4.prop_map(|(id, address, mac)| ClientAddress::from_ipv4(attachment(id), address, mac)),
            link_local.prop_map(|(id, interface_id, mac, derived)| {
                let [a, b, c, d, e, f] = mac;
                let interface_id = if derived { [a ^ 2, b, c, 0xff, 0xfe, d, e, f] } else { interface_id };
                ClientAddress::from_link_local(attachment(id), interface_id, mac)
            }),
        ]
    }

    proptest! {
        #[test]
        fn an_identity_reads_back_as_its_client(client in client()) {
            prop_assert_eq!(ClientAddress::from_identity(client.identity()), Some(client));
        }

        #[test]
        fn the_prefixes_contain_all_identities(client in client()) {
            let identity = client.identity();
            let (prefix, len) = IDENTITY_PREFIX;
            prop_assert!(is_in(identity, &prefix, len) && !is_in(PORTAL_ADDRESS, &prefix, len));
            let prefixes = ClientAddress::prefixes(client.attachment);
            let of = |prefix: &[u8; 16]| is_in(identity, &prefix[..6], ATTACHMENT_PREFIX_LEN);
            prop_assert_eq!(prefixes.iter().filter(|prefix| of(prefix)).count(), 1);
        }

        #[test]
        fn a_parsed_client_formats_to_the_same_address(tail in any::<[u8; 14]>(), family in 0x60u8..0x70) {
            let mut address = [0; 16];
            (address[0], address[1]) = (0xfd, family);
            address[2..].copy_from_slice(&tail);
            if family == 0x66 {
                (address[6], address[7]) = (0, address[7] % 20);
            }
            if let Some(client) = ClientAddress::from_identity(address) {
                prop_assert_eq!(client.identity(), address);
            }
        }
    }
}
