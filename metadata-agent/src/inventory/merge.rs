//! Merges the claims of all sources about one port: its owner or a dispute, and its subports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::port::{PortAddressing, PortRecord, SourceKind, Subport};
use super::snapshot::{Dispute, Entry, Ownership};
use super::source_policy::SourcePolicy;
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
    let valid: Vec<&Claim> = claims.iter().copied().filter(|claim| !overruled(&claim.record)).collect();

    // Complete the most trusted record with the fields of the others.
    let (first, others) = valid.split_first()?;
    let mut record = PortRecord::clone(&first.record);
    let mut agreed = true;
    for claim in others {
        agreed &= record.complete_with(&claim.record).is_ok();
    }
    record.addressing = addressing(valid);

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

/// Merges what sources report about network and addresses, the most trusted first.
///
/// MAC address and fixed addresses come first from sources that read the control plane. If one of
/// these reports the port, the others' fixed addresses are out of date and do not count, even if it
/// reports none. Allowed sources are merged in the same order, by [`allowed_sources`].
fn addressing(mut claims: Vec<&Claim>) -> PortAddressing {
    let mut merged = PortAddressing::default();
    for claim in &claims {
        merged.network = merged.network.or(claim.record.addressing.network);
    }
    // The sort is stable, so each group stays in the order of trust.
    claims.sort_by_key(|claim| !claim.source.reads_control_plane());
    let current = claims.first().is_some_and(|first| first.source.reads_control_plane());
    let stated = allowed_sources(&claims);
    for claim in claims {
        let PortAddressing { mac, fixed_ips, .. } = &claim.record.addressing;
        merged.mac = merged.mac.or(*mac);
        let is_outdated = current && !claim.source.reads_control_plane();
        if merged.fixed_ips.is_empty() && !fixed_ips.is_empty() && !is_outdated {
            merged.fixed_ips.clone_from(fixed_ips);
            merged.fixed_ips_source = Some(claim.source);
        }
    }
    if let Some((policy, source)) = stated {
        merged.allowed_sources = Some(with_current_addresses(policy, &merged));
        merged.allowed_sources_source = Some(source);
    }
    merged
}

/// Adds the port's addresses of now, which an older statement does not list: an OVN without
/// `port_security` knows them, and the static file may be out of date.
fn with_current_addresses(policy: SourcePolicy, addressing: &PortAddressing) -> SourcePolicy {
    match addressing {
        PortAddressing { mac: Some(mac), fixed_ips, fixed_ips_source: Some(source), .. }
            if source.reads_control_plane() =>
        {
            policy.union(SourcePolicy::secured(*mac, fixed_ips, []))
        }
        _ => policy,
    }
}

/// Returns the allowed sources as the first claim states them that may refuse any.
///
/// The operator's file may allow more than OVN or Neutron. It refuses nothing that these allow,
/// because its addresses may be out of date.
fn allowed_sources(claims: &[&Claim]) -> Option<(SourcePolicy, SourceKind)> {
    let mut stated =
        claims.iter().filter(|claim| claim.source.states_allowed_sources()).filter_map(|claim| {
            let policy = claim.record.addressing.allowed_sources.as_ref()?;
            Some((policy.clone(), claim.source))
        });
    let (first, source) = stated.next()?;
    let operators = stated.filter(|(_, source)| *source == SourceKind::StaticFile);
    Some((operators.fold(first, |policy, (more, _)| policy.union(more)), source))
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
    let mut by_vlan: BTreeMap<VlanId, Vec<&Claim>> = BTreeMap::new();
    for claim in claims {
        if let Some(trunk) = claim.record.trunk {
            by_vlan.entry(trunk.vlan).or_default().push(claim);
        }
    }
    let known = by_vlan.into_iter().filter_map(|(vlan, claims)| {
        let mut ids = claims.iter().filter_map(|claim| claim.record.id);
        let id = ids.next();
        ids.all(|other| Some(other) == id).then(|| Subport { vlan, id, addressing: addressing(claims) })
    });
    known.collect()
}
