//! The router or network that a namespace belongs to, by the name of the namespace.
//!
//! Neutron's agents, which are root, choose the names (neutron/agent/l3/namespaces.py, `NS_PREFIX`;
//! neutron/agent/linux/dhcp.py, `NS_PREFIX`). Guests have no influence on them.

use crate::ids::NetworkOrRouter;

/// Returns the router or network that a namespace serves by its name, or `None` for another
/// namespace.
pub(super) fn scope_of(name: &str) -> Option<NetworkOrRouter> {
    let router = || name.strip_prefix("qrouter-")?.parse().ok().map(NetworkOrRouter::Router);
    let network = || name.strip_prefix("qdhcp-")?.parse().ok().map(NetworkOrRouter::Network);
    router().or_else(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "11111111-1111-4111-8111-111111111111";

    #[test]
    fn only_routers_and_dhcp_servers_have_a_scope() {
        assert_eq!(scope_of(&format!("qrouter-{ID}")), Some(NetworkOrRouter::Router(ID.parse().unwrap())));
        assert_eq!(scope_of(&format!("qdhcp-{ID}")), Some(NetworkOrRouter::Network(ID.parse().unwrap())));
        for other in ["", "qrouter-", "qdhcp-x", "snat-11111111-1111-4111-8111-111111111111", ID] {
            assert_eq!(scope_of(other), None, "{other}");
        }
    }
}
