//! Address prefixes: one address or a CIDR, as in Neutron's allowed-address-pairs.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The text is neither an IP address nor a CIDR.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is neither an IP address nor a CIDR")]
pub struct AddressPrefixError {
    pub text: String,
}

/// Set of addresses with a common prefix. The bits after the prefix are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AddressPrefix {
    address: IpAddr,
    length: u8,
}

impl AddressPrefix {
    /// Returns the prefix of this length that contains an address; `None` if the address is
    /// shorter.
    #[must_use]
    pub(crate) fn new(address: IpAddr, length: u8) -> Option<Self> {
        let host_bits = u32::from(bits(address).checked_sub(length)?);
        let address = match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(host_bits).unwrap_or_default();
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or_default();
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        };
        Some(Self { address, length })
    }

    /// Returns the prefix of length zero in the family of an address.
    #[must_use]
    pub(crate) const fn whole_family(address: IpAddr) -> Self {
        let address = match address {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self { address, length: 0 }
    }

    /// Returns the first address and the length of an IPv4 prefix.
    #[must_use]
    pub(crate) fn ipv4(&self) -> Option<(Ipv4Addr, u8)> {
        match self.address {
            IpAddr::V4(address) => Some((address, self.length)),
            IpAddr::V6(_) => None,
        }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl From<IpAddr> for AddressPrefix {
    fn from(address: IpAddr) -> Self {
        Self { address, length: bits(address) }
    }
}

impl FromStr for AddressPrefix {
    type Err = AddressPrefixError;
    fn from_str(text: &str) -> Result<Self, AddressPrefixError> {
        let parsed = match text.split_once('/') {
            None => text.parse::<IpAddr>().ok().map(Self::from),
            Some((address, length)) => {
                let address = address.parse().ok();
                address.zip(length.parse().ok()).and_then(|(address, length)| Self::new(address, length))
            }
        };
        parsed.ok_or_else(|| AddressPrefixError { text: text.to_owned() })
    }
}

impl TryFrom<String> for AddressPrefix {
    type Error = AddressPrefixError;
    fn try_from(text: String) -> Result<Self, AddressPrefixError> {
        text.parse()
    }
}

impl From<AddressPrefix> for String {
    fn from(prefix: AddressPrefix) -> Self {
        prefix.to_string()
    }
}

impl fmt::Display for AddressPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, length } = self;
        if *length == bits(*address) { address.fmt(f) } else { write!(f, "{address}/{length}") }
    }
}

impl fmt::Debug for AddressPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_parsed_and_displayed_without_host_bits() {
        for (text, wanted) in [
            ("10.0.0.9", "10.0.0.9"),
            ("10.0.0.9/32", "10.0.0.9"),
            ("10.0.1.9/23", "10.0.0.0/23"),
            ("10.0.0.9/0", "0.0.0.0/0"),
            ("fd00::9", "fd00::9"),
            ("fd00::9/128", "fd00::9"),
            ("fd00::9/64", "fd00::/64"),
            ("fd00::9/0", "::/0"),
        ] {
            let prefix: AddressPrefix = text.parse().unwrap();
            assert_eq!(prefix.to_string(), wanted, "{text}");
            assert_eq!(wanted.parse(), Ok(prefix), "{text}");
        }
        for bad in
            ["", "10.0.0", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "fd00::/129", "10.0.0.0/8/8", "x/8"]
        {
            assert!(bad.parse::<AddressPrefix>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_an_ipv4_prefix_has_an_ipv4_form() {
        let ipv4 = |text: &str| text.parse::<AddressPrefix>().unwrap().ipv4();
        assert_eq!(ipv4("10.0.1.9/23"), Some((Ipv4Addr::new(10, 0, 0, 0), 23)));
        assert_eq!(ipv4("10.0.0.9"), Some((Ipv4Addr::new(10, 0, 0, 9), 32)));
        assert_eq!(ipv4("::ffff:10.0.0.9"), None);
    }
}
