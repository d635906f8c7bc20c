//! Merges the claims of all sources about one port: its owner or a dispute, and its subports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::port::{PortRecord, SourceKind, Subport};
use super::snapshot::{Dispute, Entry, Ownership};
use crate::ids::{InstanceId, VlanId};

/// A record with its origin. Sorts by trust, then by key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    pub(super) source: SourceKind,
    pub(super) key: Arc<str>,
    pub(super) record: Arc<PortRecord>,
}

/// Merges the claims about one port, the most trusted first; `None` without a claim.
pub(super) fn merge(claims: &BTreeSet<&Claim>) -> Option<Entry> {
    // Leave out the claims that an arbitration overrules.
    let arbitration = arbitration(claims);
    let overruled = |record: &PortRecord| {
        let named = record.tenant.as_ref().map(|tenant| tenant.instance);
        arbitration.is_some_and(|decided| named.is_some_and(|named| named != decided))
    };
    let mut valid = claims.iter().filter(|claim| !overruled(&claim.record));

    // Complete the most trusted record with the fields of the others.
    let mut record = PortRecord::clone(&valid.next()?.record);
    let mut agreed = true;
    for claim in valid {
        agreed &= record.complete_with(&claim.record).is_ok();
    }

    let not_an_instance = record.device_owner.as_ref().is_some_and(|owner| !owner.is_instance());
    if agreed && not_an_instance && record.tenant.is_none() {
        return Some(Entry::NoInstance(Arc::new(record)));
    }
    if agreed && !not_an_instance {
        return Some(match record.port() {
            Some(port) => Entry::Agreed(Arc::new(port)),
            None => Entry::Incomplete(Arc::new(record)),
        });
    }
    let claims = claims.iter().filter_map(|claim| {
        let tenant = claim.record.tenant.as_ref()?;
        Some(Ownership {
            source: claim.source,
            key: claim.key.as_ref().to_owned(),
            instance: tenant.instance,
            project: tenant.project.clone(),
        })
    });
    Some(Entry::Disputed(Arc::new(Dispute {
        id: record.id,
        device: record.device,
        claims: claims.collect(),
    })))
}

/// Returns the instance chosen by a source that arbitrated between exactly the named instances. The
/// choice is ignored if no other source names that instance, or if a source names an instance that
/// was not known when the arbiter was queried: its answer may be out of date.
fn arbitration(claims: &BTreeSet<&Claim>) -> Option<InstanceId> {
    let arbiter = claims.iter().find(|claim| !claim.record.arbitrated.is_empty())?;
    let decided = arbiter.record.tenant.as_ref()?.instance;
    let mut confirmed = false;
    let others = claims.iter().filter(|claim| *claim != arbiter);
    for tenant in others.filter_map(|claim| claim.record.tenant.as_ref()) {
        if !arbiter.record.arbitrated.contains(&tenant.instance) {
            return None;
        }
        confirmed |= tenant.instance == decided;
    }
    confirmed.then_some(decided)
}

/// Merges the subports of one parent by VLAN id. A VLAN id to which sources assign different ports
/// is left out.
pub(super) fn subports(claims: &BTreeSet<Claim>) -> Arc<[Subport]> {
    let mut by_vlan: BTreeMap<VlanId, Option<PortRecord>> = BTreeMap::new();
    for claim in claims {
        let Some(trunk) = claim.record.trunk else { continue };
        let merged = by_vlan.entry(trunk.vlan).or_insert_with(|| Some(PortRecord::default()));
        if let Some(record) = merged {
            let differ = record.id.zip(claim.record.id).is_some_and(|(ours, theirs)| ours != theirs);
            if differ {
                *merged = None;
            } else {
                // The subport's own entry shows a conflict of tenants; here only the fields count.
                let _ = record.complete_with(&claim.record);
            }
        }
    }
    let known = by_vlan.into_iter().filter_map(|(vlan, record)| {
        let PortRecord { id, addressing, .. } = record?;
        Some(Subport { vlan, id, addressing })
    });
    known.collect()
}
