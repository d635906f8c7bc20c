//! The identity address: the IPv6 address under which the agent sees a client.
//!
//! It is computed from the attachment and the guest's own address and is never allocated. So it
//! cannot be exhausted, recycled or confused:
//!
//! ```text
//!  IPv4 guest   fd6d:4:<attachment id, 32 bit>:0:0:<guest IPv4>
//!  IPv6 guest   fd6d:6:<attachment id, 32 bit>:<guest interface id, 64 bit>
//! ```
//!
//! All bytes are in network order.

/// The portal's own address, `fd6d::a9fe:a9fe`: the destination of every redirected connection.
pub const PORTAL_ADDRESS: [u8; 16] = [0xfd, 0x6d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 169, 254, 169, 254];

/// The common prefix of all identity addresses, `fd6d::/16`.
pub const IDENTITY_PREFIX: [u8; 2] = [0xfd, 0x6d];

/// The metadata address for IPv4, 169.254.169.254.
pub const METADATA_IPV4: [u8; 4] = [169, 254, 169, 254];

/// The metadata address for IPv6, fe80::a9fe:a9fe.
pub const METADATA_IPV6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 169, 254, 169, 254];

/// The port of the metadata service, both for guests and in the portal.
pub const METADATA_PORT: u16 = 80;

const FAMILY_IPV4: [u8; 2] = [0, 4];
const FAMILY_IPV6: [u8; 2] = [0, 6];

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

/// Identifies a client: a guest address behind one attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientAddress {
    pub attachment: AttachmentId,
    pub guest: GuestAddress,
}

impl ClientAddress {
    /// Creates a client address from an IPv4 address.
    #[must_use]
    #[inline(always)]
    pub const fn ipv4(attachment: AttachmentId, address: [u8; 4]) -> Self {
        Self { attachment, guest: GuestAddress::Ipv4(address) }
    }

    /// Returns the identity address of this client.
    #[must_use]
    #[inline(always)]
    pub const fn identity(&self) -> [u8; 16] {
        let a = self.attachment.0.to_be_bytes();
        let [p, q] = IDENTITY_PREFIX;
        match self.guest {
            GuestAddress::Ipv4(g) => {
                let [f, v] = FAMILY_IPV4;
                [p, q, f, v, a[0], a[1], a[2], a[3], 0, 0, 0, 0, g[0], g[1], g[2], g[3]]
            }
            GuestAddress::Ipv6LinkLocal(g) => {
                let [f, v] = FAMILY_IPV6;
                [p, q, f, v, a[0], a[1], a[2], a[3], g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]]
            }
        }
    }

    /// Returns the two /64 prefixes that contain the identity addresses of all clients of an
    /// attachment.
    #[must_use]
    pub const fn prefixes(attachment: AttachmentId) -> [[u8; 16]; 2] {
        let ipv4 = Self { attachment, guest: GuestAddress::Ipv4([0; 4]) };
        let ipv6 = Self { attachment, guest: GuestAddress::Ipv6LinkLocal([0; 8]) };
        [ipv4.identity(), ipv6.identity()]
    }

    /// Parses an identity address. Returns `None` for every address that [`Self::identity`] does
    /// not produce.
    #[must_use]
    #[inline(always)]
    pub const fn from_identity(address: [u8; 16]) -> Option<Self> {
        let [p, q, f, v, a0, a1, a2, a3, g0, g1, g2, g3, g4, g5, g6, g7] = address;
        if p != IDENTITY_PREFIX[0] || q != IDENTITY_PREFIX[1] || f != 0 {
            return None;
        }
        let Some(attachment) = AttachmentId::new(u32::from_be_bytes([a0, a1, a2, a3])) else {
            return None;
        };
        let guest = if v == FAMILY_IPV4[1] {
            if g0 != 0 || g1 != 0 || g2 != 0 || g3 != 0 {
                return None;
            }
            GuestAddress::Ipv4([g4, g5, g6, g7])
        } else if v == FAMILY_IPV6[1] {
            GuestAddress::Ipv6LinkLocal([g0, g1, g2, g3, g4, g5, g6, g7])
        } else {
            return None;
        };
        Some(Self { attachment, guest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv6Addr;

    fn attachment(id: u32) -> AttachmentId {
        AttachmentId::new(id).unwrap()
    }

    #[test]
    fn an_ipv4_identity_has_the_documented_format() {
        let client = ClientAddress::ipv4(attachment(1), [10, 0, 0, 5]);
        assert_eq!(Ipv6Addr::from(client.identity()).to_string(), "fd6d:4:0:1::a00:5");
    }

    #[test]
    fn the_portal_and_attachment_zero_are_not_clients() {
        assert_eq!(ClientAddress::from_identity(PORTAL_ADDRESS), None);
        let zero: Ipv6Addr = "fd6d:4::a00:5".parse().unwrap();
        assert_eq!(ClientAddress::from_identity(zero.octets()), None);
    }

    fn client() -> impl Strategy<Value = ClientAddress> {
        let guest = prop_oneof![
            any::<[u8; 4]>().prop_map(GuestAddress::Ipv4),
            any::<[u8; 8]>().prop_map(GuestAddress::Ipv6LinkLocal),
        ];
        (1..=u32::MAX, guest).prop_map(|(id, guest)| ClientAddress { attachment: attachment(id), guest })
    }

    proptest! {
        #[test]
        fn an_identity_reads_back_as_its_client(client in client()) {
            prop_assert_eq!(ClientAddress::from_identity(client.identity()), Some(client));
        }

        #[test]
        fn a_parsed_client_formats_to_the_same_address(tail in any::<[u8; 13]>(), family in 0u8..8) {
            let mut address = [0; 16];
            address[..2].copy_from_slice(&IDENTITY_PREFIX);
            address[3..].copy_from_slice(&tail);
            address[3] = family;
            if let Some(client) = ClientAddress::from_identity(address) {
                prop_assert_eq!(client.identity(), address);
            }
        }
    }
}
