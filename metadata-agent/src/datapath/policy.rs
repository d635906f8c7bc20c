//! The policy of a port as the agent states it, and its entry in `MD_PORTS`.

use std::net::Ipv4Addr;

use metadata_ebpf::abi::{
    CHECK_IPV4, CHECK_MAC, CONFINED, Ipv4Prefix, MAX_PORT_SOURCES, MacWord, Port, PortSource, SHARED,
};
use metadata_ebpf::identity::AttachmentId;

use crate::ids::{MacAddress, NetworkId};
use crate::inventory::AllowedSource;

/// Policy of the port behind an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortPolicy {
    /// Copied into the client records.
    pub network: Option<NetworkId>,
    pub sources: SourceRule,
    /// True if packets for the legacy path are dropped while no legacy path listens.
    pub confined: bool,
}

/// The sources from which packets are accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum SourceRule {
    /// Any source that a host may have.
    #[default]
    Any,
    /// These MAC addresses.
    Macs(Vec<MacAddress>),
    /// These pairs of MAC address and IPv4 addresses, and each link-local address. Any source if
    /// there are more than [`MAX_PORT_SOURCES`] pairs.
    Pairs(Vec<AllowedSource>),
    /// These subnets, of which the first [`MAX_PORT_SOURCES`] count. Many guests share the
    /// attachment.
    Subnets(Vec<(Ipv4Addr, u8)>),
}

impl SourceRule {
    /// Returns flags and entries for the kernel.
    fn compile(&self) -> (u32, Vec<PortSource>) {
        // Allows a MAC address, but no IPv4 address with it.
        let without_ipv4 = Ipv4Prefix::new([0; 4], 32);
        let source = |mac: MacAddress, ipv4| PortSource { mac: MacWord::new(mac.0), ipv4 };
        let (flags, entries): (_, Vec<_>) = match self {
            Self::Any => return (0, Vec::new()),
            Self::Macs(macs) => (CHECK_MAC, macs.iter().map(|mac| source(*mac, without_ipv4)).collect()),
            Self::Pairs(pairs) => {
                let ipv4 = |pair: &AllowedSource| {
                    let (address, len) = pair.prefix.ipv4()?;
                    Some(source(pair.mac, Ipv4Prefix::new(address.octets(), len)))
                };
                let mut entries: Vec<_> = pairs.iter().filter_map(ipv4).collect();
                for AllowedSource { mac, .. } in pairs {
                    let mac = source(*mac, without_ipv4);
                    if entries.iter().all(|entry| entry.mac != mac.mac) {
                        entries.push(mac);
                    }
                }
                (CHECK_MAC | CHECK_IPV4, entries)
            }
            Self::Subnets(subnets) => {
                let subnet = |(address, len): &(Ipv4Addr, u8)| PortSource {
                    mac: MacWord::default(),
                    ipv4: Ipv4Prefix::new(address.octets(), *len),
                };
                let kept = subnets.iter().take(MAX_PORT_SOURCES).map(subnet).collect();
                return (CHECK_IPV4 | SHARED, kept);
            }
        };
        if entries.len() > MAX_PORT_SOURCES { (0, Vec::new()) } else { (flags, entries) }
    }
}

impl PortPolicy {
    /// Returns true if many guests share the attachment.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.sources, SourceRule::Subnets(_))
    }
}

/// Builds the entry of an attachment in `MD_PORTS`.
pub(super) fn port_entry(id: AttachmentId, policy: &PortPolicy) -> Port {
    let (flags, entries) = policy.sources.compile();
    let mut port = Port {
        attachment: id.get(),
        flags: flags | if policy.confined { CONFINED } else { 0 },
        source_count: 0,
        _pad: 0,
        network: policy.network.map_or([0; 16], |network| network.octets()),
        sources: [PortSource::default(); MAX_PORT_SOURCES],
    };
    for (slot, entry) in port.sources.iter_mut().zip(entries) {
        *slot = entry;
        port.source_count += 1;
    }
    port
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 5]);
    const VIRTUAL: MacAddress = MacAddress([0, 0, 0x5e, 0, 1, 0x33]);

    fn entry(sources: SourceRule) -> Port {
        port_entry(AttachmentId::new(1).unwrap(), &PortPolicy { sources, ..PortPolicy::default() })
    }

    fn pair(mac: MacAddress, prefix: &str) -> AllowedSource {
        AllowedSource { mac, prefix: prefix.parse().unwrap() }
    }

    fn kept(port: &Port) -> &[PortSource] {
        &port.sources[..port.source_count as usize]
    }

    fn source(mac: MacAddress, address: [u8; 4], len: u8) -> PortSource {
        PortSource { mac: MacWord::new(mac.0), ipv4: Ipv4Prefix::new(address, len) }
    }

    #[test]
    fn pairs_keep_their_mac_addresses() {
        let port = entry(SourceRule::Pairs(vec![
            pair(GUEST, "fd00::5"),
            pair(GUEST, "10.0.0.5"),
            pair(VIRTUAL, "10.0.0.96/28"),
        ]));
        assert_eq!(port.flags, CHECK_MAC | CHECK_IPV4);
        let wanted = [source(GUEST, [10, 0, 0, 5], 32), source(VIRTUAL, [10, 0, 0, 96], 28)];
        assert_eq!(kept(&port), wanted);
    }

    #[test]
    fn a_mac_address_with_ipv6_alone_is_allowed_without_ipv4() {
        let port = entry(SourceRule::Pairs(vec![pair(GUEST, "10.0.0.5"), pair(VIRTUAL, "fd00::/64")]));
        assert_eq!(kept(&port), [source(GUEST, [10, 0, 0, 5], 32), source(VIRTUAL, [0; 4], 32)]);
        let port = entry(SourceRule::Macs(vec![GUEST]));
        assert_eq!((port.flags, kept(&port)), (CHECK_MAC, &[source(GUEST, [0; 4], 32)][..]));
    }

    #[test]
    fn a_port_with_more_sources_than_fit_is_not_checked() {
        let most = u8::try_from(MAX_PORT_SOURCES).unwrap();
        for (count, flags, kept) in
            [(0, CHECK_MAC | CHECK_IPV4, 0), (most, CHECK_MAC | CHECK_IPV4, most), (most + 1, 0, 0)]
        {
            let pairs = (0..count).map(|last| pair(GUEST, &format!("10.0.0.{last}")));
            let port = entry(SourceRule::Pairs(pairs.collect()));
            assert_eq!((port.flags, port.source_count), (flags, u32::from(kept)), "{count}");
        }
        assert_eq!(entry(SourceRule::Any).flags, 0);
    }

    #[test]
    fn a_shared_attachment_is_checked_for_any_number_of_subnets() {
        let most = u8::try_from(MAX_PORT_SOURCES).unwrap();
        for (count, kept) in [(0, 0), (most, most), (most + 1, most)] {
            let subnets = (0..count).map(|third| (Ipv4Addr::new(10, 0, third, 1), 24)).collect();
            let port = entry(SourceRule::Subnets(subnets));
            assert_eq!((port.flags, port.source_count), (CHECK_IPV4 | SHARED, u32::from(kept)), "{count}");
        }
    }
}
