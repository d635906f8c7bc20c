//! What a namespace of Neutron's is, by its name: whose guests come by there, and by which interfaces.
//!
//! Neutron's agents, which are root, make the names (neutron/agent/l3/namespaces.py, `NS_PREFIX`;
//! neutron/agent/linux/dhcp.py, `NS_PREFIX`); no guest has a say in them.

use crate::ids::NetworkOrRouter;
use crate::net::netlink::Link;

/// Interfaces by which a router's networks reach it (neutron/agent/l3/router_info.py, `INTERNAL_DEV_PREFIX`).
const ROUTER_INTERFACE: &str = "qr-";
/// The interface of a DHCP server (neutron/agent/linux/interface.py, `DEV_NAME_PREFIX`).
const DHCP_INTERFACE: &str = "tap";

/// Returns the router or network that a namespace serves by its name, or `None` for another namespace.
pub(super) fn scope_of(name: &str) -> Option<NetworkOrRouter> {
    let router = || name.strip_prefix("qrouter-")?.parse().ok().map(NetworkOrRouter::Router);
    let network = || name.strip_prefix("qdhcp-")?.parse().ok().map(NetworkOrRouter::Network);
    router().or_else(network)
}

/// Returns whether guests reach the router or DHCP server through this interface.
pub(super) fn faces_guests(scope: NetworkOrRouter, link: &Link) -> bool {
    link.name.starts_with(match scope {
        NetworkOrRouter::Router(_) => ROUTER_INTERFACE,
        NetworkOrRouter::Network(_) => DHCP_INTERFACE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "11111111-1111-4111-8111-111111111111";

    #[test]
    fn only_routers_and_dhcp_servers_are_places() {
        assert_eq!(scope_of(&format!("qrouter-{ID}")), Some(NetworkOrRouter::Router(ID.parse().unwrap())));
        assert_eq!(scope_of(&format!("qdhcp-{ID}")), Some(NetworkOrRouter::Network(ID.parse().unwrap())));
        for other in ["", "qrouter-", "qdhcp-x", "snat-11111111-1111-4111-8111-111111111111", ID] {
            assert_eq!(scope_of(other), None, "{other}");
        }
    }
}
