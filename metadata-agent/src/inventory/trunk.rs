//! Subports of trunks: ports that reach their guest as VLANs on another port's interface. Whose they are follows from
//! their parent, so a source that tells of a subport need not know the instance.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use super::ledger::Claim;
use super::port::Facts;
use super::prefix::AddressPrefix;
use crate::ids::{MacAddress, NetworkId, PortId, VlanId};

/// Where a subport is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Seat {
    /// The trunk's parent port.
    pub parent: PortId,
    /// The tag under which it is there.
    pub vlan: VlanId,
}

/// A subport, as all sources together know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Subport {
    /// The tag.
    pub vlan: VlanId,
    /// Neutron's id, where a source knows it.
    pub id: Option<PortId>,
    /// Its network, where a source knows it.
    pub network: Option<NetworkId>,
    /// The guest's MAC address on it, where a source knows it.
    pub mac: Option<MacAddress>,
    /// Its addresses; empty where no source knows them.
    pub fixed_ips: Vec<IpAddr>,
    /// Further addresses that the guest may send from.
    pub allowed_addresses: Vec<AddressPrefix>,
}

/// The subports of one parent, by tag. A tag under which sources place different ports is nobody's.
pub(super) fn subports(claims: &BTreeSet<Claim>) -> Arc<[Subport]> {
    let mut by_vlan: BTreeMap<VlanId, Option<Facts>> = BTreeMap::new();
    for claim in claims {
        let Some(seat) = claim.facts.seat else { continue };
        let merged = by_vlan.entry(seat.vlan).or_insert_with(|| Some(Facts::default()));
        if let Some(facts) = merged {
            let differ = facts.id.zip(claim.facts.id).is_some_and(|(ours, theirs)| ours != theirs);
            if differ {
                *merged = None;
            } else {
                facts.complete_with(&claim.facts);
            }
        }
    }
    let known = by_vlan.into_iter().filter_map(|(vlan, facts)| {
        let Facts { id, network, mac, fixed_ips, allowed_addresses, .. } = facts?;
        Some(Subport { vlan, id, network, mac, fixed_ips, allowed_addresses })
    });
    known.collect()
}
