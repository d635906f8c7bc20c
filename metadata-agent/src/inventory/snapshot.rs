//! Immutable state of the inventory: the port behind each device.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::device::DeviceName;
use super::port::{Port, PortAddressing, PortRecord, SourceKind, Subport};
use super::shards::Shards;
use crate::ids::{IfIndex, InstanceId, MacAddress, PortId, ProjectId};

/// Identifies a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum PortKey {
    Id(PortId),
    /// Kernel interface, as long as no source knows the id.
    Device(DeviceName),
}

/// Port that matches the name of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) key: PortKey,
    /// Index of the port's interface, if a source reports it.
    pub(super) index: Option<IfIndex>,
}

/// Merged view of one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The owner is known. Other fields come from the most trusted source that knows them.
    Agreed(#[serde(serialize_with = "inner")] Arc<Port>),
    /// The instance or its project is not known yet.
    Incomplete(#[serde(serialize_with = "inner")] Arc<PortRecord>),
    /// Neutron reports that the port does not belong to an instance, and no source names one.
    NoInstance(#[serde(serialize_with = "inner")] Arc<PortRecord>),
    /// Sources name different owners, so the port is not served.
    Disputed(#[serde(serialize_with = "inner")] Arc<Dispute>),
}

impl Entry {
    /// Returns the network and the addresses; `None` for a disputed port.
    pub(crate) fn addressing(&self) -> Option<&PortAddressing> {
        match self {
            Self::Agreed(port) => Some(&port.addressing),
            Self::Incomplete(record) | Self::NoInstance(record) => Some(&record.addressing),
            Self::Disputed(_) => None,
        }
    }
}

/// Contradictory claims about the owner of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dispute {
    pub id: Option<PortId>,
    pub device: Option<DeviceName>,
    /// The most trusted source first.
    pub claims: Vec<Ownership>,
}

/// Owner named by one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ownership {
    pub source: SourceKind,
    /// Key of the source's event.
    pub key: String,
    pub instance: InstanceId,
    pub project: Option<ProjectId>,
}

/// Several ports match one device and cannot be distinguished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("several ports match the device")]
pub struct AmbiguousPortError;

/// Number of ports in a snapshot, by kind of entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub ports: usize,
    pub incomplete: usize,
    pub no_instance: usize,
    pub disputed: usize,
}

impl Counts {
    pub(super) fn of_entry(&mut self, entry: &Entry) -> &mut usize {
        match entry {
            Entry::Agreed(_) => &mut self.ports,
            Entry::Incomplete(_) => &mut self.incomplete,
            Entry::NoInstance(_) => &mut self.no_instance,
            Entry::Disputed(_) => &mut self.disputed,
        }
    }
}

/// Everything that is known at one moment. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) version: u64,
    pub(super) counts: Counts,
    pub(super) entries: Shards<PortKey, Entry>,
    /// Every name by which a port may be looked up, with the matching ports in order.
    pub(super) names: Shards<DeviceName, Arc<[Candidate]>>,
    /// By parent port.
    pub(super) subports: Shards<PortId, Arc<[Subport]>>,
    pub(super) changes: ChangeLog,
}

impl Snapshot {
    /// Finds the port behind a kernel interface.
    ///
    /// Ports that a source places on this device come first; without one, those whose tap has this
    /// name. If several ports remain, the link's MAC address decides.
    ///
    /// # Errors
    /// Several ports match.
    pub fn find(
        &self,
        device: &str,
        link_mac: Option<MacAddress>,
    ) -> Result<Option<&Entry>, AmbiguousPortError> {
        let candidates = self.names.get(device).into_iter().flat_map(|candidates| candidates.iter());
        self.choose(candidates, link_mac)
    }

    /// Finds the port behind a kernel interface with a known index.
    ///
    /// If a source reports another index for a port, the port was behind an earlier interface of
    /// this name. A port with this index is preferred to ports without an index.
    ///
    /// # Errors
    /// Several ports match.
    pub(crate) fn find_at(
        &self,
        device: &str,
        index: IfIndex,
        link_mac: Option<MacAddress>,
    ) -> Result<Option<&Entry>, AmbiguousPortError> {
        let Some(candidates) = self.names.get(device) else { return Ok(None) };
        let with_index = |index: Option<IfIndex>| candidates.iter().filter(move |one| one.index == index);
        if with_index(Some(index)).next().is_some() {
            return self.choose(with_index(Some(index)), link_mac);
        }
        self.choose(with_index(None), link_mac)
    }

    fn choose<'a>(
        &self,
        candidates: impl Iterator<Item = &'a Candidate>,
        link_mac: Option<MacAddress>,
    ) -> Result<Option<&Entry>, AmbiguousPortError> {
        let mut matching = Vec::new();
        for Candidate { key, .. } in candidates {
            let Some(entry) = self.entries.get(key) else { continue };
            // A disputed port decides: no other candidate is trusted.
            let Some(addressing) = entry.addressing() else { return Ok(Some(entry)) };
            matching.push((addressing.mac, entry));
        }
        if matching.len() > 1 {
            matching
                .retain(|(mac, _)| mac.zip(link_mac).is_some_and(|(guest, link)| same_guest(guest, link)));
            if matching.len() != 1 {
                return Err(AmbiguousPortError);
            }
        }
        Ok(matching.pop().map(|(_, entry)| entry))
    }

    /// Returns the subports of a trunk's parent port, by VLAN id.
    #[must_use]
    pub(crate) fn subports(&self, parent: &PortId) -> Option<&Arc<[Subport]>> {
        self.subports.get(parent)
    }

    /// Returns the version, which increases with each snapshot.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Returns the devices whose port or subports may have changed since an earlier version,
    /// possibly with repetitions. `None` if that version is too old.
    pub(crate) fn changed_since(&self, version: u64) -> Option<impl Iterator<Item = &DeviceName>> {
        self.changes.last(self.version.checked_sub(version)?)
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Returns all entries, in no particular order.
    pub(crate) fn unordered(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().map(|(_, entry)| entry)
    }

    /// Returns all entries, in a stable order.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries.into_iter().map(|(_, entry)| entry)
    }
}

/// Compares all but the first octet: libvirt gives a tap the MAC address of its guest with the
/// first octet set to fe (virnetdevtap.c); other software uses the address unchanged.
fn same_guest(guest: MacAddress, link: MacAddress) -> bool {
    guest.0[1..] == link.0[1..]
}

fn inner<T: Serialize, S: Serializer>(value: &Arc<T>, serializer: S) -> Result<S::Ok, S::Error> {
    value.as_ref().serialize(serializer)
}

/// Number of remembered snapshots. A reader is only a few behind: attaching an interface takes
/// about ten milliseconds, in which sources rarely report more.
const REMEMBERED: usize = 32;

/// Devices changed by each of the last snapshots, the oldest first. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct ChangeLog(VecDeque<Arc<BTreeSet<DeviceName>>>);

impl ChangeLog {
    /// Adds the devices changed by a new snapshot.
    pub(super) fn push(&mut self, devices: BTreeSet<DeviceName>) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(Arc::new(devices));
    }

    /// Returns the devices changed by the last `count` snapshots; `None` if fewer are remembered.
    fn last(&self, count: u64) -> Option<impl Iterator<Item = &DeviceName>> {
        let first = self.0.len().checked_sub(usize::try_from(count).ok()?)?;
        Some(self.0.iter().skip(first).flat_map(|devices| devices.iter()))
    }
}
