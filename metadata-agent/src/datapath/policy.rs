//! What the kernel is told of a port, as the agent says it and as the map has it.

use std::net::Ipv4Addr;

use metadata_ebpf::abi::{CHECK_IPV4, CHECK_MAC, CONFINED, Ipv4Prefix, MAX_PORT_IPV4, Port};
use metadata_ebpf::identity::AttachmentId;

use crate::ids::{MacAddress, NetworkId};

/// Source addresses that one attachment may use at the same time. A port has few; what is more is made up by its guest.
const CLIENT_QUOTA: u32 = 256;
/// The same of an attachment that all guests of a network share.
const SHARED_CLIENT_QUOTA: u32 = 4096;

/// What the kernel shall know of the port behind an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortPolicy {
    /// For the client records.
    pub network: Option<NetworkId>,
    /// The only source MAC address allowed; `None` allows any.
    pub mac: Option<MacAddress>,
    /// The only source addresses allowed, as prefixes; `None` allows any.
    pub addresses: Option<Vec<(Ipv4Addr, u8)>>,
    /// Whether many guests share the attachment.
    pub shared: bool,
    /// Whether packets that would be left to a legacy path are dropped while none listens.
    pub confined: bool,
}

/// The entry of an attachment in `MD_PORTS`.
pub(super) fn port_entry(id: AttachmentId, policy: &PortPolicy) -> Port {
    let mut port = Port {
        attachment: id.get(),
        flags: if policy.confined { CONFINED } else { 0 },
        client_quota: if policy.shared { SHARED_CLIENT_QUOTA } else { CLIENT_QUOTA },
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
    if let Some(addresses) = policy.addresses.as_ref().filter(|addresses| addresses.len() <= MAX_PORT_IPV4) {
        for (slot, (address, len)) in port.ipv4.iter_mut().zip(addresses) {
            *slot = Ipv4Prefix::new(address.octets(), *len);
            port.ipv4_count += 1;
        }
        port.flags |= CHECK_IPV4;
    }
    port
}
