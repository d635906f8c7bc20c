//! Sources that a port may send from, as its port security states them.
//!
//! Only a statement of the whole set may refuse a packet, and only from a source that follows
//! changes or is the operator's own ([`SourceKind::states_allowed_sources`]). A port without a
//! statement may send from anywhere: on a tap the interface alone identifies the guest.
//!
//! [`SourceKind::states_allowed_sources`]: super::SourceKind::states_allowed_sources

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use super::prefix::AddressPrefix;
use crate::ids::MacAddress;

/// Sources that a port may send from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourcePolicy {
    /// Any MAC address and any IP address: port security is off.
    Any,
    /// Only these. Link-local addresses are not listed.
    Only(BTreeSet<AllowedSource>),
}

/// MAC address with addresses that a port may use with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct AllowedSource {
    pub mac: MacAddress,
    pub prefix: AddressPrefix,
}

impl AllowedSource {
    /// Returns the sources that allow every address with this MAC address.
    #[must_use]
    pub(crate) fn any_address(mac: MacAddress) -> [Self; 2] {
        let whole = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        whole.map(|address| Self { mac, prefix: AddressPrefix::whole_family(address) })
    }
}

impl SourcePolicy {
    /// Returns the policy of a port with port security. A port without fixed addresses may use any
    /// address with its own MAC address, as in Neutron's OVN driver
    /// (`_get_allowed_addresses_from_port`).
    #[must_use]
    pub(crate) fn secured(
        mac: MacAddress,
        fixed_ips: &[IpAddr],
        pairs: impl IntoIterator<Item = AllowedSource>,
    ) -> Self {
        let mut sources: BTreeSet<_> = pairs.into_iter().collect();
        if fixed_ips.is_empty() {
            sources.extend(AllowedSource::any_address(mac));
        }
        sources.extend(fixed_ips.iter().map(|ip| AllowedSource { mac, prefix: (*ip).into() }));
        Self::Only(sources)
    }

    /// Returns a policy that allows what either allows.
    #[must_use]
    pub(super) fn union(self, other: Self) -> Self {
        match (self, other) {
            (Self::Only(mut sources), Self::Only(more)) => {
                sources.extend(more);
                Self::Only(sources)
            }
            (Self::Any, _) | (_, Self::Any) => Self::Any,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
    const VIRTUAL: MacAddress = MacAddress([0, 0, 0x5e, 0, 1, 0x33]);

    fn only(sources: &[(MacAddress, &str)]) -> SourcePolicy {
        let source =
            |(mac, prefix): &(MacAddress, &str)| AllowedSource { mac: *mac, prefix: prefix.parse().unwrap() };
        SourcePolicy::Only(sources.iter().map(source).collect())
    }

    #[test]
    fn fixed_addresses_and_pairs_are_allowed_with_their_own_mac() {
        let pair = AllowedSource { mac: VIRTUAL, prefix: "10.0.0.116".parse().unwrap() };
        let fixed = ["10.0.0.5", "fd00::5"].map(|ip| ip.parse().unwrap());
        assert_eq!(
            SourcePolicy::secured(OWN, &fixed, [pair]),
            only(&[(OWN, "10.0.0.5"), (OWN, "fd00::5"), (VIRTUAL, "10.0.0.116")])
        );
        assert_eq!(
            SourcePolicy::secured(OWN, &[], [pair]),
            only(&[(OWN, "0.0.0.0/0"), (OWN, "::/0"), (VIRTUAL, "10.0.0.116")])
        );
    }

    #[test]
    fn a_union_allows_what_either_allows() {
        let (one, other) = (only(&[(OWN, "10.0.0.5")]), only(&[(OWN, "10.0.0.6")]));
        assert_eq!(one.clone().union(other), only(&[(OWN, "10.0.0.5"), (OWN, "10.0.0.6")]));
        assert_eq!(one.clone().union(SourcePolicy::Any), SourcePolicy::Any);
        assert_eq!(SourcePolicy::Any.union(one), SourcePolicy::Any);
    }
}
