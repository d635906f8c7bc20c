//! Recognises ports of Neutron's agents that look like guest interfaces.
//!
//! OVN's metadata agent, and the L3 and DHCP agents with Linux bridge or `ovs_use_veth`, connect
//! their namespaces by veth pairs. The host's end is named like a guest's tap
//! (neutron/agent/ovn/metadata/agent.py, `_get_veth_name`; neutron/agent/linux/interface.py,
//! `_get_tap_name`). The kernel reports the namespace of the other end, so such an interface is
//! known for what it is before any source reports it.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{debug, warn};

use super::Links;
use crate::ids::IfIndex;
use crate::net::netlink::{Link, Netlink};
use crate::net::netns::Netns;

/// Prefixes of the names of namespaces that belong to Neutron's agents (`NS_PREFIX` of
/// neutron/agent/l3/namespaces.py, linux/dhcp.py and ovn/metadata/agent.py; `SNAT_NS_PREFIX`,
/// `FIP_NS_PREFIX`). A guest never lives in one of them.
const PREFIXES: [&str; 5] = ["qrouter-", "qdhcp-", "snat-", "fip-", "ovnmeta-"];

/// The other ends of veth pairs, as far as they were looked up.
#[derive(Debug, Default)]
pub(super) struct AgentVeths {
    peers: BTreeMap<IfIndex, Peer>,
    /// Namespace ids of the agents' namespaces, by name.
    namespaces: BTreeMap<String, i32>,
}

/// The other end of a veth pair.
#[derive(Clone, Copy, Debug)]
struct Peer {
    nsid: i32,
    is_agents: bool,
}

impl AgentVeths {
    /// Returns true for the host's end of a pair that leads to an agent's namespace.
    pub(super) fn contains(&self, link: &Link) -> bool {
        self.peers.get(&link.index).is_some_and(|peer| peer.is_agents)
    }

    /// Looks up the other ends of those links that may be guest interfaces. `netlink` must be a
    /// socket in their namespace.
    pub(super) async fn observe(
        &mut self,
        netlink: &Netlink,
        links: &Links,
        may_be_guest: impl Fn(&Link) -> bool,
    ) {
        // Forget links that are gone, or whose other end was moved.
        let present = match links {
            Links::All(present) => {
                let indexes: BTreeSet<IfIndex> = present.iter().map(|link| link.index).collect();
                self.peers.retain(|index, _| indexes.contains(index));
                present
            }
            Links::Some { present, gone } => {
                for index in gone {
                    self.peers.remove(index);
                }
                present
            }
        };
        for link in present {
            if self.peers.get(&link.index).is_some_and(|peer| Some(peer.nsid) != link.peer_nsid) {
                self.peers.remove(&link.index);
            }
        }

        // Look up the new ones.
        let mut is_fresh = false;
        for link in present {
            let Some(nsid) = link.peer_nsid.filter(|_| may_be_guest(link)) else { continue };
            if self.peers.contains_key(&link.index) {
                continue;
            }
            let is_agents = self.is_agents(netlink, nsid, &mut is_fresh).await;
            if is_agents {
                debug!(interface = link.name, "port of a Neutron agent; not a guest interface");
            }
            self.peers.insert(link.index, Peer { nsid, is_agents });
        }
    }

    /// Returns true if a namespace id stands for an agent's namespace now. The kernel reuses the id
    /// of a namespace that is gone. `is_fresh` states that all ids were read for this event, which
    /// is done once however many links are others'.
    async fn is_agents(&mut self, netlink: &Netlink, nsid: i32, is_fresh: &mut bool) -> bool {
        if *is_fresh {
            return self.namespaces.values().any(|id| *id == nsid);
        }
        self.add_new_namespaces(netlink).await;
        let known = self.namespaces.iter().find(|(_, id)| **id == nsid).map(|(name, _)| name.clone());
        if let Some(name) = known
            && netlink.namespace_id(&name).await == Some(nsid)
        {
            return true;
        }
        // A namespace may have been replaced by another one of the same name.
        self.namespaces.clear();
        self.add_new_namespaces(netlink).await;
        *is_fresh = true;
        self.namespaces.values().any(|id| *id == nsid)
    }

    async fn add_new_namespaces(&mut self, netlink: &Netlink) {
        let names = match Netns::names() {
            Ok(names) => names,
            Err(error) => return warn!(%error, "cannot list named namespaces"),
        };
        self.namespaces.retain(|name, _| names.contains(name));
        for name in names.into_iter().filter(|name| is_agents_namespace(name)) {
            if !self.namespaces.contains_key(&name)
                && let Some(id) = netlink.namespace_id(&name).await
            {
                self.namespaces.insert(name, id);
            }
        }
    }
}

fn is_agents_namespace(name: &str) -> bool {
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_of_agents_are_known_by_their_names() {
        for name in ["qrouter-1", "qdhcp-1", "snat-1", "fip-1", "ovnmeta-1"] {
            assert!(is_agents_namespace(name), "{name}");
        }
        for name in ["", "qdhcp", "cni-1", "metadata-portal", "my-qrouter-1"] {
            assert!(!is_agents_namespace(name), "{name}");
        }
    }
}
