//! Records of all sources, indexed by port.
//!
//! The ledger accepts events in any order and recomputes, per batch, only the affected ports and
//! names. The result depends on the last event of each key, not on the order of the keys.
//!
//! Records with the same port id belong to one port. A record without an id belongs to the port of
//! its device: the port that another source places on the device or, failing that, the port whose
//! tap Nova gives this name.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use tracing::{info, warn};

use super::device::DeviceName;
use super::merge::{Claim, merge, subports};
use super::port::{Event, PortRecord, SourceKind};
use super::shards::Replaced;
use super::snapshot::{Candidate, Entry, PortKey, Snapshot};
use crate::ids::{IfIndex, PortId};

/// Mutable state from which snapshots are made.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    records: HashMap<(SourceKind, Arc<str>), BTreeSet<Arc<PortRecord>>>,
    by_id: HashMap<PortId, BTreeSet<Claim>>,
    by_device: HashMap<DeviceName, BTreeSet<Claim>>,
    by_tap: HashMap<DeviceName, BTreeSet<PortId>>,
    by_parent: HashMap<PortId, BTreeSet<Claim>>,
    touched_parents: HashSet<PortId>,
    touched_ids: HashSet<PortId>,
    touched_names: HashSet<DeviceName>,
    snapshot: Snapshot,
}

impl Ledger {
    /// Applies an event. Its effect is visible after [`Self::settle`].
    pub(super) fn apply(&mut self, event: Event) {
        let origin = (event.source, Arc::from(event.key));
        let now: BTreeSet<Arc<PortRecord>> = event.ports.into_iter().map(Arc::new).collect();
        let before = self.records.remove(&origin).unwrap_or_default();
        let claim = |record: &Arc<PortRecord>| Claim {
            source: origin.0,
            key: Arc::clone(&origin.1),
            record: Arc::clone(record),
        };
        for gone in before.difference(&now) {
            self.remove(&claim(gone));
        }
        for new in now.difference(&before) {
            self.insert(claim(new));
        }
        if !now.is_empty() {
            self.records.insert(origin, now);
        }
    }

    /// Computes the effect of all events since the last call; `None` if nothing changed.
    pub(super) fn settle(&mut self) -> Option<Snapshot> {
        // Collect the affected ports and names.
        let names = std::mem::take(&mut self.touched_names);
        let mut ids = std::mem::take(&mut self.touched_ids);
        for name in &names {
            ids.extend(self.placed_at(name));
            ids.extend(self.by_tap.get(name).into_iter().flatten());
        }
        // Recompute them and collect the changed devices. Every port has at least one name by which
        // it is looked up, so every change concerns a device.
        let mut devices = BTreeSet::new();
        for id in ids {
            self.settle_id(id, &mut devices);
        }
        for name in names {
            self.settle_name(name, &mut devices);
        }
        for parent in std::mem::take(&mut self.touched_parents) {
            let subports = self.by_parent.get(&parent).map(subports).filter(|subports| !subports.is_empty());
            if self.snapshot.subports.set(&parent, subports).is_some() {
                devices.extend(self.names_of(parent));
            }
        }
        if devices.is_empty() {
            return None;
        }
        self.snapshot.version += 1;
        self.snapshot.changes.push(devices);
        Some(self.snapshot.clone())
    }

    /// Returns every name by which a port may be looked up.
    fn names_of(&self, id: PortId) -> impl Iterator<Item = DeviceName> {
        let claims = self.by_id.get(&id).into_iter().flatten();
        claims.filter_map(|claim| claim.record.device.clone()).chain([DeviceName::from_port_id(&id)])
    }

    fn insert(&mut self, claim: Claim) {
        if let Some(trunk) = claim.record.trunk {
            self.touched_parents.insert(trunk.parent);
            self.by_parent.entry(trunk.parent).or_default().insert(claim);
            return;
        }
        self.touch(&claim.record);
        if let Some(id) = claim.record.id {
            self.by_tap.entry(DeviceName::from_port_id(&id)).or_default().insert(id);
            self.by_id.entry(id).or_default().insert(claim.clone());
        }
        if let Some(device) = claim.record.device.clone() {
            self.by_device.entry(device).or_default().insert(claim);
        }
    }

    fn remove(&mut self, claim: &Claim) {
        if let Some(trunk) = claim.record.trunk {
            self.touched_parents.insert(trunk.parent);
            remove_from(&mut self.by_parent, &trunk.parent, claim);
            return;
        }
        self.touch(&claim.record);
        if let Some(id) = claim.record.id {
            remove_from(&mut self.by_id, &id, claim);
            if !self.by_id.contains_key(&id) {
                remove_from(&mut self.by_tap, &DeviceName::from_port_id(&id), &id);
            }
        }
        if let Some(device) = &claim.record.device {
            remove_from(&mut self.by_device, device, claim);
        }
    }

    fn touch(&mut self, record: &PortRecord) {
        if let Some(id) = record.id {
            self.touched_ids.insert(id);
            self.touched_names.insert(DeviceName::from_port_id(&id));
        }
        self.touched_names.extend(record.device.clone());
    }

    /// Recomputes the entry of a port with an id, and adds its names if the entry changed.
    fn settle_id(&mut self, id: PortId, changed: &mut BTreeSet<DeviceName>) {
        let entry = self.by_id.get(&id).and_then(|claims| {
            let tap = DeviceName::from_port_id(&id);
            let devices = claims.iter().filter_map(|claim| claim.record.device.as_ref());
            let names: BTreeSet<&DeviceName> = devices.chain([&tap]).collect();
            let held = names.into_iter().filter(|name| self.ids_at(name).contains(&id));
            let nameless = held.flat_map(|name| self.nameless_at(name));
            let claims: BTreeSet<&Claim> = claims.iter().chain(nameless).collect();
            merge(&claims)
        });
        if self.set_entry(&PortKey::Id(id), entry).is_some() {
            changed.extend(self.names_of(id));
        }
    }

    /// Recomputes the candidates of a name, and the entry of a port without an id. Adds the name if
    /// either changed.
    fn settle_name(&mut self, name: DeviceName, changed: &mut BTreeSet<DeviceName>) {
        let key = PortKey::Device(name.clone());
        let mut keys: Vec<PortKey> = self.ids_at(&name).into_iter().map(PortKey::Id).collect();
        let nameless: BTreeSet<&Claim> = self.nameless_at(&name).collect();
        let entry = if keys.is_empty() { merge(&nameless) } else { None };
        if entry.is_some() {
            keys.push(key.clone());
        }
        if keys.len() > 1
            && self
                .snapshot
                .names
                .get(&name)
                .is_none_or(|before| !before.iter().map(|one| &one.key).eq(&keys))
        {
            warn!(device = %name, ports = ?keys, "several ports match one device name; MAC addresses decide");
        }
        let candidates = keys.into_iter().map(|key| Candidate { index: self.index_at(&name, &key), key });
        let candidates: Arc<[Candidate]> = candidates.collect();
        let renamed = self.snapshot.names.set(&name, (!candidates.is_empty()).then_some(candidates));
        let replaced = self.set_entry(&key, entry);
        if renamed.is_some() || replaced.is_some() {
            changed.insert(name);
        }
    }

    /// Returns the ports that match a name: those that a source places on this device, or else
    /// those whose tap has this name.
    fn ids_at(&self, name: &DeviceName) -> BTreeSet<PortId> {
        let placed: BTreeSet<PortId> = self.placed_at(name).collect();
        if placed.is_empty() { self.by_tap.get(name).cloned().unwrap_or_default() } else { placed }
    }

    fn placed_at(&self, name: &DeviceName) -> impl Iterator<Item = PortId> {
        self.by_device.get(name).into_iter().flatten().filter_map(|claim| claim.record.id)
    }

    /// Returns the index of the interface, as reported by the most trusted source that places the
    /// port on it.
    fn index_at(&self, name: &DeviceName, port: &PortKey) -> Option<IfIndex> {
        let id = match port {
            PortKey::Id(id) => Some(*id),
            PortKey::Device(_) => None,
        };
        let mut claims = self
            .by_device
            .get(name)?
            .iter()
            .filter(|claim| claim.record.id.is_none_or(|own| Some(own) == id));
        claims.find_map(|claim| claim.record.index)
    }

    fn nameless_at(&self, name: &DeviceName) -> impl Iterator<Item = &Claim> {
        self.by_device.get(name).into_iter().flatten().filter(|claim| claim.record.id.is_none())
    }

    /// Sets an entry, counts it and logs disputes; `None` if the entry did not change.
    fn set_entry(&mut self, key: &PortKey, entry: Option<Entry>) -> Option<Replaced<Entry>> {
        let after = entry.clone();
        let replaced = self.snapshot.entries.set(key, entry)?;
        self.count(replaced.before.as_ref(), after.as_ref());
        match (&replaced.before, &after) {
            (_, Some(Entry::Disputed(dispute))) => {
                warn!(port = ?key, claims = ?dispute.claims, "sources disagree about the port's owner; the port is not served");
            }
            (Some(Entry::Disputed(_)), _) => {
                info!(port = ?key, "sources agree about the port's owner again");
            }
            (
                Some(Entry::Agreed(_) | Entry::Incomplete(_) | Entry::NoInstance(_)) | None,
                Some(Entry::Agreed(_) | Entry::Incomplete(_) | Entry::NoInstance(_)) | None,
            ) => {}
        }
        Some(replaced)
    }

    fn count(&mut self, before: Option<&Entry>, after: Option<&Entry>) {
        let counts = &mut self.snapshot.counts;
        if let Some(entry) = before {
            *counts.of_entry(entry) -= 1;
        }
        if let Some(entry) = after {
            *counts.of_entry(entry) += 1;
        }
    }
}

fn remove_from<K: Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}
