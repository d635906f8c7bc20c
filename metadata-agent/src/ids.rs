//! Identifiers of Neutron, Nova and the kernel. Each has its own type, so that two of them cannot
//! be swapped in a signature.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Invalid text or number for an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("`{text}` is not a UUID")]
    NotUuid { text: String },
    #[error("`{text}` is not a MAC address like fa:16:3e:00:00:01")]
    NotMac { text: String },
    #[error("{id} is not a VLAN id: 1 to 4094")]
    NotVlan { id: u64 },
    /// The header `X-Tenant-ID` could not carry it.
    #[error("`{text}` is not a project id: 1 to 255 visible ASCII characters")]
    NotProject { text: String },
}

macro_rules! uuid_newtype {
    ($($(#[$doc:meta])+ $name:ident;)+) => {$(
        $(#[$doc])+
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Uuid);

        impl $name {
            #[must_use]
            pub const fn new(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// Returns the 16 bytes in network order.
            #[must_use]
            pub const fn octets(&self) -> [u8; 16] {
                *self.0.as_bytes()
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Uuid::try_parse(text).map(Self).map_err(|_| IdError::NotUuid { text: text.to_owned() })
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
    )+};
}

uuid_newtype! {
    /// A Neutron port.
    PortId;
    /// A Nova instance.
    InstanceId;
    /// A Neutron network.
    NetworkId;
    /// A Neutron router.
    RouterId;
}

/// A network, or a router with all of its networks: the scope of a client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum NetworkOrRouter {
    Network(NetworkId),
    Router(RouterId),
}

impl NetworkOrRouter {
    #[must_use]
    pub(crate) const fn is_router(self) -> bool {
        matches!(self, Self::Router(_))
    }
}

impl PortId {
    /// Returns the first eleven characters. Nova forms the interface's name from them
    /// (nova/network/model.py, `get_devname`).
    #[must_use]
    pub fn device_suffix(&self) -> String {
        let mut text = self.to_string();
        text.truncate(11);
        text
    }
}

/// A Keystone project. It may not be a UUID: Nova compares it as text
/// (nova/api/metadata/handler.py).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProjectId(String);

impl ProjectId {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProjectId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        if (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::NotProject { text: text.to_owned() })
        }
    }
}

impl TryFrom<String> for ProjectId {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<ProjectId> for String {
    fn from(id: ProjectId) -> Self {
        id.0
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Returns the link-local address that is derived from it (RFC 4291, appendix A).
    #[must_use]
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }

    /// Returns the MAC address from which a link-local address is derived, if it is.
    #[must_use]
    pub(crate) fn from_link_local(address: Ipv6Addr) -> Option<Self> {
        match address.octets() {
            [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, 0xff, 0xfe, d, e, f] => {
                Some(Self([a ^ 2, b, c, d, e, f]))
            }
            _ => None,
        }
    }
}

impl FromStr for MacAddress {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let error = || IdError::NotMac { text: text.to_owned() };
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part =
                parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            let part = part.ok_or_else(error)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(octets)) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An IEEE 802.1Q VLAN id, which is the segmentation id of a trunk's subport in Neutron.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VlanId(u16);

impl VlanId {
    /// Returns the number, from 1 to 4094.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u64> for VlanId {
    type Error = IdError;
    fn try_from(id: u64) -> Result<Self, IdError> {
        match u16::try_from(id) {
            Ok(number @ 1..=4094) => Ok(Self(number)),
            _ => Err(IdError::NotVlan { id }),
        }
    }
}

impl From<VlanId> for u64 {
    fn from(id: VlanId) -> Self {
        id.0.into()
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A kernel interface index. Unique within one network namespace only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct IfIndex(pub u32);

impl fmt::Display for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_tap_is_named_as_in_nova() {
        let port: PortId = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01".parse().unwrap();
        assert_eq!(format!("tap{}", port.device_suffix()), "tap3f2a9d10-77");
    }

    #[test]
    fn a_project_id_keeps_its_text_and_cannot_break_a_header() {
        assert_eq!("acme".parse::<ProjectId>().unwrap().as_str(), "acme");
        for bad in ["", "a b", "a\r\nX-Instance-ID: x", "\u{fc}"] {
            assert!(bad.parse::<ProjectId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_vlan_id_is_one_that_a_frame_can_carry() {
        assert_eq!(VlanId::try_from(4094).unwrap().get(), 4094);
        for bad in [0, 4095, 65_537] {
            assert_eq!(VlanId::try_from(bad), Err(IdError::NotVlan { id: bad }));
        }
    }

    #[test]
    fn a_link_local_address_leads_back_to_its_mac_address() {
        let mac: MacAddress = "fa:16:3e:0a:0b:0c".parse().unwrap();
        assert_eq!(mac.link_local().to_string(), "fe80::f816:3eff:fe0a:b0c");
        assert_eq!(MacAddress::from_link_local(mac.link_local()), Some(mac));
        for other in ["fe80::1", "fe80:0:0:1:f816:3eff:fe0a:b0c", "fd00::f816:3eff:fe0a:b0c"] {
            assert_eq!(MacAddress::from_link_local(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn a_mac_address_reads_back() {
        let mac: MacAddress = "fa:16:3e:0A:0b:0c".parse().unwrap();
        assert_eq!(mac.to_string(), "fa:16:3e:0a:0b:0c");
        for bad in ["", "fa:16:3e:0a:0b", "fa:16:3e:0a:0b:0c:0d", "fa:16:3e:0a:0b:+c", "fa163e0a0b0c"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad:?}");
        }
    }
}
