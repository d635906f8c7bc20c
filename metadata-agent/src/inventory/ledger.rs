//! Who said what, and of which port.
//!
//! The ledger takes events in any order and settles, per batch, only the ports and names that they touch. What
//! follows is a function of the last event of each key, never of the order in which keys came.
//!
//! Records belong to one port if they bear the same port id. A record without an id belongs to the port that its
//! device names: the one that another source places there, or the one whose tap Nova would call so.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use tracing::{info, warn};

use super::claim::{Claim, combine, subports};
use super::device::DeviceName;
use super::port::{Event, PortRecord, SourceKind};
use super::snapshot::{Answering, Entry, PortKey, Snapshot};
use crate::ids::{IfIndex, PortId};

/// The state behind the snapshots.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    said: HashMap<(SourceKind, Arc<str>), BTreeSet<Arc<PortRecord>>>,
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
    /// Takes an event in. What follows from it shows after [`Self::settle`].
    pub(super) fn apply(&mut self, event: Event) {
        let origin = (event.source, Arc::from(event.key));
        let now: BTreeSet<Arc<PortRecord>> = event.ports.into_iter().map(Arc::new).collect();
        let before = self.said.remove(&origin).unwrap_or_default();
        let claim = |facts: &Arc<PortRecord>| Claim {
            source: origin.0,
            key: Arc::clone(&origin.1),
            facts: Arc::clone(facts),
        };
        for gone in before.difference(&now) {
            self.withdraw(&claim(gone));
        }
        for new in now.difference(&before) {
            self.enter(claim(new));
        }
        if !now.is_empty() {
            self.said.insert(origin, now);
        }
    }

    /// Works out what the events since the last time change; `None` if that is nothing.
    pub(super) fn settle(&mut self) -> Option<Snapshot> {
        let names = std::mem::take(&mut self.touched_names);
        let mut ids = std::mem::take(&mut self.touched_ids);
        for name in &names {
            ids.extend(self.placed_at(name));
            ids.extend(self.by_tap.get(name).into_iter().flatten());
        }
        // A port has a name by which it is asked for, whatever else is known of it. So nothing changes without a device.
        let mut devices = BTreeSet::new();
        for id in ids {
            if self.settle_id(id) {
                devices.extend(self.names_of(id));
            }
        }
        for name in names {
            if self.settle_name(&name) {
                devices.insert(name);
            }
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
        self.snapshot.changes.note(devices);
        Some(self.snapshot.clone())
    }

    /// Every name by which a port may be asked for.
    fn names_of(&self, id: PortId) -> impl Iterator<Item = DeviceName> {
        let claims = self.by_id.get(&id).into_iter().flatten();
        claims.filter_map(|claim| claim.facts.device.clone()).chain([DeviceName::tap_of(&id)])
    }

    fn enter(&mut self, claim: Claim) {
        if let Some(seat) = claim.facts.seat {
            self.touched_parents.insert(seat.parent);
            self.by_parent.entry(seat.parent).or_default().insert(claim);
            return;
        }
        self.touch(&claim.facts);
        if let Some(id) = claim.facts.id {
            self.by_tap.entry(DeviceName::tap_of(&id)).or_default().insert(id);
            self.by_id.entry(id).or_default().insert(claim.clone());
        }
        if let Some(device) = claim.facts.device.clone() {
            self.by_device.entry(device).or_default().insert(claim);
        }
    }

    fn withdraw(&mut self, claim: &Claim) {
        if let Some(seat) = claim.facts.seat {
            self.touched_parents.insert(seat.parent);
            take_out(&mut self.by_parent, &seat.parent, claim);
            return;
        }
        self.touch(&claim.facts);
        if let Some(id) = claim.facts.id {
            take_out(&mut self.by_id, &id, claim);
            if !self.by_id.contains_key(&id) {
                take_out(&mut self.by_tap, &DeviceName::tap_of(&id), &id);
            }
        }
        if let Some(device) = &claim.facts.device {
            take_out(&mut self.by_device, device, claim);
        }
    }

    fn touch(&mut self, facts: &PortRecord) {
        if let Some(id) = facts.id {
            self.touched_ids.insert(id);
            self.touched_names.insert(DeviceName::tap_of(&id));
        }
        self.touched_names.extend(facts.device.clone());
    }

    fn settle_id(&mut self, id: PortId) -> bool {
        let entry = self.by_id.get(&id).and_then(|claims| {
            let tap = DeviceName::tap_of(&id);
            let devices = claims.iter().filter_map(|claim| claim.facts.device.as_ref());
            let names: BTreeSet<&DeviceName> = devices.chain([&tap]).collect();
            let answered = names.into_iter().filter(|name| self.ids_at(name).contains(&id));
            let nameless = answered.flat_map(|name| self.nameless_at(name));
            let claims: BTreeSet<&Claim> = claims.iter().chain(nameless).collect();
            combine(&claims)
        });
        self.set_entry(&PortKey::Id(id), entry)
    }

    fn settle_name(&mut self, name: &DeviceName) -> bool {
        let key = PortKey::Device(name.clone());
        let mut keys: Vec<PortKey> = self.ids_at(name).into_iter().map(PortKey::Id).collect();
        let nameless: BTreeSet<&Claim> = self.nameless_at(name).collect();
        let entry = if keys.is_empty() { combine(&nameless) } else { None };
        if entry.is_some() {
            keys.push(key.clone());
        }
        if keys.len() > 1
            && self.snapshot.names.get(name).is_none_or(|before| !before.iter().map(|one| &one.key).eq(&keys))
        {
            warn!(device = %name, ports = ?keys, "several ports answer to one device name; MAC addresses decide");
        }
        let answering = keys.into_iter().map(|key| Answering { index: self.index_at(name, &key), key });
        let answering: Arc<[Answering]> = answering.collect();
        let renamed = self.snapshot.names.set(name, (!answering.is_empty()).then_some(answering)).is_some();
        self.set_entry(&key, entry) || renamed
    }

    /// The ports that answer to a name: those that a source places there, else those whose tap is called so.
    fn ids_at(&self, name: &DeviceName) -> BTreeSet<PortId> {
        let placed: BTreeSet<PortId> = self.placed_at(name).collect();
        if placed.is_empty() { self.by_tap.get(name).cloned().unwrap_or_default() } else { placed }
    }

    fn placed_at(&self, name: &DeviceName) -> impl Iterator<Item = PortId> {
        self.by_device.get(name).into_iter().flatten().filter_map(|claim| claim.facts.id)
    }

    /// The index that the interface of this name has, as the most trusted source tells that places the port there.
    fn index_at(&self, name: &DeviceName, port: &PortKey) -> Option<IfIndex> {
        let id = match port {
            PortKey::Id(id) => Some(*id),
            PortKey::Device(_) => None,
        };
        let mut claims =
            self.by_device.get(name)?.iter().filter(|claim| claim.facts.id.is_none_or(|own| Some(own) == id));
        claims.find_map(|claim| claim.facts.index)
    }

    fn nameless_at(&self, name: &DeviceName) -> impl Iterator<Item = &Claim> {
        self.by_device.get(name).into_iter().flatten().filter(|claim| claim.facts.id.is_none())
    }

    fn set_entry(&mut self, key: &PortKey, entry: Option<Entry>) -> bool {
        let after = entry.clone();
        let Some(change) = self.snapshot.entries.set(key, entry) else { return false };
        self.count(change.before.as_ref(), after.as_ref());
        match (&change.before, &after) {
            (_, Some(Entry::Disputed(dispute))) => {
                warn!(port = ?key, claims = ?dispute.claims, "sources disagree whose port this is; it gets no answers");
            }
            (Some(Entry::Disputed(_)), _) => {
                info!(port = ?key, "sources no longer disagree whose port this is");
            }
            (
                Some(Entry::Agreed(_) | Entry::Incomplete(_) | Entry::NoInstance(_)) | None,
                Some(Entry::Agreed(_) | Entry::Incomplete(_) | Entry::NoInstance(_)) | None,
            ) => {}
        }
        true
    }

    fn count(&mut self, before: Option<&Entry>, after: Option<&Entry>) {
        let counts = &mut self.snapshot.counts;
        if let Some(entry) = before {
            *counts.of(entry) -= 1;
        }
        if let Some(entry) = after {
            *counts.of(entry) += 1;
        }
    }
}

fn take_out<K: Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}
