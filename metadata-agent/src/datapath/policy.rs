//! The policy of a port as the agent states it, and its entry in `MD_PORTS`.

use std::net::Ipv4Addr;

use metadata_ebpf::abi::{CHECK_IPV4, CHECK_MAC, CONFINED, Ipv4Prefix, MAX_PORT_IPV4, Port, SHARED};
use metadata_ebpf::identity::AttachmentId;

use crate::ids::{MacAddress, NetworkId};

/// Policy of the port behind an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortPolicy {
    /// Copied into the client records.
    pub network: Option<NetworkId>,
    /// The only source MAC address allowed; `None` allows any.
    pub mac: Option<MacAddress>,
    /// The only source addresses allowed, as prefixes; `None` allows any. Above [`MAX_PORT_IPV4`]
    /// prefixes a shared attachment keeps the first ones, and any other attachment allows any
    /// address.
    pub addresses: Option<Vec<(Ipv4Addr, u8)>>,
    /// True if many guests share the attachment.
    pub shared: bool,
    /// True if packets for the legacy path are dropped while no legacy path listens.
    pub confined: bool,
}

/// Builds the entry of an attachment in `MD_PORTS`.
pub(super) fn port_entry(id: AttachmentId, policy: &PortPolicy) -> Port {
    let mut port = Port {
        attachment: id.get(),
        flags: if policy.confined { CONFINED } else { 0 } | if policy.shared { SHARED } else { 0 },
        ipv4_count: 0,
        network: policy.network.map_or([0; 16], |network| network.octets()),
        ipv4: [Ipv4Prefix::default(); MAX_PORT_IPV4],
        mac: [0; 6],
        _pad: [0; 2],
    };
    if let Some(mac) = policy.mac {
        port.mac = mac.0;
        port.flags |= CHECK_MAC;
    }
    // A shared attachment is always checked: there, addresses that do not fit are rejected.
    let fits = |addresses: &&Vec<_>| policy.shared || addresses.len() <= MAX_PORT_IPV4;
    if let Some(addresses) = policy.addresses.as_ref().filter(fits) {
        for (slot, (address, len)) in port.ipv4.iter_mut().zip(addresses) {
            *slot = Ipv4Prefix::new(address.octets(), *len);
            port.ipv4_count += 1;
        }
        port.flags |= CHECK_IPV4;
    }
    port
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(count: u8, shared: bool) -> Port {
        let addresses = (0..count).map(|third| (Ipv4Addr::new(10, 0, third, 1), 24)).collect();
        let policy = PortPolicy { addresses: Some(addresses), shared, ..PortPolicy::default() };
        port_entry(AttachmentId::new(1).unwrap(), &policy)
    }

    #[test]
    fn a_shared_attachment_is_checked_for_any_number_of_subnets() {
        let most = u8::try_from(MAX_PORT_IPV4).unwrap();
        for (count, shared, checked, kept) in [
            (most, true, true, most),
            (most + 1, true, true, most),
            (0, true, true, 0),
            (most + 1, false, false, 0),
        ] {
            let port = entry(count, shared);
            assert_eq!(port.flags & CHECK_IPV4 != 0, checked, "{count} {shared}");
            assert_eq!(port.flags & SHARED != 0, shared);
            assert_eq!(port.ipv4_count, u32::from(kept), "{count} {shared}");
        }
    }
}
