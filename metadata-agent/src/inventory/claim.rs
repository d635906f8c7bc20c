//! What follows from all that sources say of one port: whose it is, or that they disagree, and which subports it has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::port::{PortRecord, SourceKind};
use super::snapshot::{Dispute, Entry, Ownership};
use super::trunk::Subport;
use crate::ids::{InstanceId, VlanId};

/// One record and where it is from. Sorts by trust, then by key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    pub(super) source: SourceKind,
    pub(super) key: Arc<str>,
    pub(super) facts: Arc<PortRecord>,
}

/// Makes one entry of the claims about one port, the most trusted first; `None` of no claim.
pub(super) fn combine(claims: &BTreeSet<&Claim>) -> Option<Entry> {
    let judgement = judgement(claims);
    let overruled = |facts: &PortRecord| {
        judgement.is_some_and(|judged| facts.tenant.as_ref().is_some_and(|tenant| tenant.instance != judged))
    };
    let mut valid = claims.iter().filter(|claim| !overruled(&claim.facts));
    let mut facts = PortRecord::clone(&valid.next()?.facts);
    let mut agreed = true;
    for claim in valid {
        agreed &= facts.complete_with(&claim.facts);
    }
    let not_an_instance = facts.device_owner.as_ref().is_some_and(|owner| !owner.is_instance());
    if agreed && not_an_instance && facts.tenant.is_none() {
        return Some(Entry::NoInstance(Arc::new(facts)));
    }
    if agreed && !not_an_instance {
        return Some(match facts.port() {
            Some(port) => Entry::Agreed(Arc::new(port)),
            None => Entry::Incomplete(Arc::new(facts)),
        });
    }
    let claims = claims.iter().filter_map(|claim| {
        let tenant = claim.facts.tenant.as_ref()?;
        Some(Ownership {
            source: claim.source,
            key: claim.key.as_ref().to_owned(),
            instance: tenant.instance,
            project: tenant.project.clone(),
        })
    });
    Some(Entry::Disputed(Arc::new(Dispute { id: facts.id, device: facts.device, claims: claims.collect() })))
}

/// The instance that a source decided for which was asked about exactly this dispute. It does not count if it names one
/// that no other source names, or if it was asked before one of the others was named: then it may be out of date.
fn judgement(claims: &BTreeSet<&Claim>) -> Option<InstanceId> {
    let judge = claims.iter().find(|claim| !claim.facts.judged.is_empty())?;
    let decided = judge.facts.tenant.as_ref()?.instance;
    let mut confirmed = false;
    for tenant in
        claims.iter().filter(|claim| *claim != judge).filter_map(|claim| claim.facts.tenant.as_ref())
    {
        if !judge.facts.judged.contains(&tenant.instance) {
            return None;
        }
        confirmed |= tenant.instance == decided;
    }
    confirmed.then_some(decided)
}

/// The subports of one parent, by tag. A tag under which sources place different ports is nobody's.
pub(super) fn subports(claims: &BTreeSet<Claim>) -> Arc<[Subport]> {
    let mut by_vlan: BTreeMap<VlanId, Option<PortRecord>> = BTreeMap::new();
    for claim in claims {
        let Some(seat) = claim.facts.seat else { continue };
        let merged = by_vlan.entry(seat.vlan).or_insert_with(|| Some(PortRecord::default()));
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
        let PortRecord { id, network, mac, fixed_ips, allowed_addresses, .. } = facts?;
        Some(Subport { vlan, id, network, mac, fixed_ips, allowed_addresses })
    });
    known.collect()
}
