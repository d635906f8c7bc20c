//! What a namespace of Neutron's is, by its name: whose guests come by there, and by which interfaces.
//!
//! Neutron's agents, which are root, make the names (neutron/agent/l3/namespaces.py, `NS_PREFIX`;
//! neutron/agent/linux/dhcp.py, `NS_PREFIX`); no guest has a say in them.

use crate::ids::{NetworkId, RouterId};
use crate::net::netlink::Link;
use crate::proxy::NetworkOrRouter;

/// Interfaces by which a router's networks reach it (neutron/agent/l3/router_info.py, `INTERNAL_DEV_PREFIX`).
const ROUTER_INTERFACE: &str = "qr-";
/// The interface of a DHCP server (neutron/agent/linux/interface.py, `DEV_NAME_PREFIX`).
const DHCP_INTERFACE: &str = "tap";

/// A namespace that guests come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(pub(super) NetworkOrRouter);

impl Place {
    /// `None` for a namespace that is something else.
    pub(super) fn of(name: &str) -> Option<Self> {
        let router = || name.strip_prefix("qrouter-")?.parse::<RouterId>().ok().map(NetworkOrRouter::Router);
        let network = || name.strip_prefix("qdhcp-")?.parse::<NetworkId>().ok().map(NetworkOrRouter::Network);
        router().or_else(network).map(Self)
    }

    /// Whether guests come by an interface there.
    pub(super) fn admits(self, link: &Link) -> bool {
        link.name.starts_with(match self.0 {
            NetworkOrRouter::Router(_) => ROUTER_INTERFACE,
            NetworkOrRouter::Network(_) => DHCP_INTERFACE,
        })
    }

    pub(super) fn is_router(self) -> bool {
        matches!(self.0, NetworkOrRouter::Router(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "11111111-1111-4111-8111-111111111111";

    #[test]
    fn only_routers_and_dhcp_servers_are_places() {
        let of = |name: &str| Place::of(name).map(|place| place.0);
        assert_eq!(of(&format!("qrouter-{ID}")), Some(NetworkOrRouter::Router(ID.parse().unwrap())));
        assert_eq!(of(&format!("qdhcp-{ID}")), Some(NetworkOrRouter::Network(ID.parse().unwrap())));
        for other in ["", "qrouter-", "qdhcp-x", "snat-11111111-1111-4111-8111-111111111111", ID] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
