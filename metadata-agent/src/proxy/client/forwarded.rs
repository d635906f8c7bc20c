//! The address of a port that is forwarded to Neutron's metadata agent, which finds the instance by
//! the network and this address.
//!
//! There the address is the identity, so it depends on what the sources reported about the port.
//! The guest influences nothing but the address family. See `docs/design/forwarded-address.md`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::NetworkHeader;
use crate::ids::MacAddress;

/// The forwarded address of a port, for clients of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct ForwardedAddresses {
    pub(super) ipv4: IpAddr,
    pub(super) ipv6: IpAddr,
}

impl ForwardedAddresses {
    /// Chooses from the fixed addresses that a source confirms, and the link-local address that is
    /// derived from the port's MAC address. `None` if neither is known.
    ///
    /// A MAC address does not move between ports, so the link-local address comes first for IPv6
    /// clients. Agents of OVN before 2024.1 know only fixed addresses, so for them it comes last.
    #[must_use]
    pub fn new(header: NetworkHeader, confirmed: &[IpAddr], mac: Option<MacAddress>) -> Option<Self> {
        let fixed_ipv4 = confirmed.iter().copied().find(IpAddr::is_ipv4);
        let fixed_ipv6 = confirmed.iter().copied().find(IpAddr::is_ipv6);
        let link_local = mac.map(|mac| IpAddr::V6(mac.link_local()));
        let ipv4 = fixed_ipv4.or(link_local).or(fixed_ipv6)?;
        let ipv6 = match header {
            NetworkHeader::Neutron => link_local.or(fixed_ipv6).or(fixed_ipv4)?,
            NetworkHeader::Ovn => fixed_ipv6.or(fixed_ipv4).or(link_local)?,
        };
        Some(Self { ipv4, ipv6 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
    const DERIVED: &str = "fe80::f816:3eff:fe00:1";

    fn chosen(
        header: NetworkHeader,
        confirmed: &[&str],
        mac: Option<MacAddress>,
    ) -> Option<(String, String)> {
        let confirmed: Vec<IpAddr> = confirmed.iter().map(|ip| ip.parse().unwrap()).collect();
        let addresses = ForwardedAddresses::new(header, &confirmed, mac)?;
        Some((addresses.ipv4.to_string(), addresses.ipv6.to_string()))
    }

    #[test]
    fn the_forwarded_address_is_one_of_the_ports_own() {
        let (v4, v6) = ("10.0.0.9", "2001:db8::1");
        for (confirmed, mac, neutron, ovn) in [
            (&[v4, "10.0.0.5", v6][..], Some(MAC), (v4, DERIVED), (v4, v6)),
            (&[v4], Some(MAC), (v4, DERIVED), (v4, v4)),
            (&[v6], Some(MAC), (DERIVED, DERIVED), (DERIVED, v6)),
            (&[], Some(MAC), (DERIVED, DERIVED), (DERIVED, DERIVED)),
            (&[v6, v4], None, (v4, v6), (v4, v6)),
            (&[v6], None, (v6, v6), (v6, v6)),
            (&[v4], None, (v4, v4), (v4, v4)),
        ] {
            for (header, (ipv4, ipv6)) in [(NetworkHeader::Neutron, neutron), (NetworkHeader::Ovn, ovn)] {
                let wanted = (ipv4.to_owned(), ipv6.to_owned());
                assert_eq!(chosen(header, confirmed, mac), Some(wanted), "{header:?} {confirmed:?} {mac:?}");
            }
        }
    }

    #[test]
    fn without_any_address_there_is_none_to_forward() {
        for header in [NetworkHeader::Neutron, NetworkHeader::Ovn] {
            assert_eq!(chosen(header, &[], None), None);
        }
    }
}
