//! One state of the inventory, immutable: which port is behind a device.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::changes::Changes;
use super::device::DeviceName;
use super::port::{Port, PortRecord, SourceKind};
use super::trunk::Subport;
use crate::ids::{IfIndex, InstanceId, MacAddress, PortId, ProjectId};
use crate::inventory::shards::Shards;

/// What a port goes by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortKey {
    /// Neutron's id.
    Id(PortId),
    /// The kernel interface, while no source tells the id.
    Device(DeviceName),
}

/// A port that answers to the name of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answering {
    pub(super) key: PortKey,
    /// The index that the interface of this name has if it is this port's, where a source tells it.
    pub(super) index: Option<IfIndex>,
}

/// What all sources together make of one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// They agree whose it is; the other fields come from the most trusted source that knows them.
    Agreed(#[serde(serialize_with = "pointee")] Arc<Port>),
    /// They agree, but no source knows the instance, or none of those that name it knows its project.
    Incomplete(#[serde(serialize_with = "pointee")] Arc<PortRecord>),
    /// Neutron says that it is not an instance's, and no source that it is.
    NoInstance(#[serde(serialize_with = "pointee")] Arc<PortRecord>),
    /// They do not agree, so it is nobody's.
    Disputed(#[serde(serialize_with = "pointee")] Arc<Dispute>),
}

/// Sources that name different instances or projects for one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dispute {
    /// The port, if its id is known.
    pub id: Option<PortId>,
    /// Its kernel interface, if that is known.
    pub device: Option<DeviceName>,
    /// Who says what, the most trusted first.
    pub claims: Vec<Ownership>,
}

/// One side of a [`Dispute`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ownership {
    /// Who says it.
    pub source: SourceKind,
    /// Under which key.
    pub key: String,
    /// The instance it names.
    pub instance: InstanceId,
    /// The project it names.
    pub project: Option<ProjectId>,
}

/// Which port is behind a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// This one.
    Known(Arc<Port>),
    /// No source has said so yet, or not all of it.
    Unknown,
    /// It is not an instance's: a router's, a DHCP server's, a load balancer's.
    NoInstance,
    /// Sources contradict each other, or several ports fit equally well. Never guessed.
    Conflict,
}

/// Several ports fit one device, and nothing tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("several ports fit the device equally well")]
pub struct Ambiguous;

/// How much a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Ports whose owner is known.
    pub ports: usize,
    /// Ports of which the instance or the project is still missing.
    pub incomplete: usize,
    /// Ports that are not an instance's.
    pub no_instance: usize,
    /// Ports whose owner is disputed.
    pub disputed: usize,
}

impl Counts {
    pub(super) fn of(&mut self, entry: &Entry) -> &mut usize {
        match entry {
            Entry::Agreed(_) => &mut self.ports,
            Entry::Incomplete(_) => &mut self.incomplete,
            Entry::NoInstance(_) => &mut self.no_instance,
            Entry::Disputed(_) => &mut self.disputed,
        }
    }
}

/// All that is known, at one moment. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) version: u64,
    pub(super) counts: Counts,
    pub(super) entries: Shards<PortKey, Entry>,
    /// Every name by which a port may be asked for, and the ports that answer to it, in order.
    pub(super) names: Shards<DeviceName, Arc<[Answering]>>,
    /// By parent.
    pub(super) subports: Shards<PortId, Arc<[Subport]>>,
    pub(super) changes: Changes,
}

impl Snapshot {
    /// Finds the port behind a kernel interface.
    ///
    /// Ports that a source places on this very device come first; without one, those whose tap Nova would call
    /// so. If that leaves several, the link's MAC address tells them apart.
    #[must_use]
    pub fn resolve(&self, device: &str, link_mac: Option<MacAddress>) -> Resolution {
        Self::resolution(self.find(device, link_mac))
    }

    /// The same for an interface whose index is known, too.
    #[must_use]
    pub fn resolve_at(&self, device: &str, index: IfIndex, link_mac: Option<MacAddress>) -> Resolution {
        Self::resolution(self.find_at(device, index, link_mac))
    }

    fn resolution(found: Result<Option<&Entry>, Ambiguous>) -> Resolution {
        match found {
            Ok(Some(Entry::Agreed(port))) => Resolution::Known(Arc::clone(port)),
            Ok(Some(Entry::Incomplete(_)) | None) => Resolution::Unknown,
            Ok(Some(Entry::NoInstance(_))) => Resolution::NoInstance,
            Ok(Some(Entry::Disputed(_))) | Err(Ambiguous) => Resolution::Conflict,
        }
    }

    /// What sources make of the one port behind a kernel interface, found as [`Self::resolve`] does.
    ///
    /// # Errors
    /// Several ports fit equally well.
    pub fn find(&self, device: &str, link_mac: Option<MacAddress>) -> Result<Option<&Entry>, Ambiguous> {
        self.choose(self.names.get(device).into_iter().flat_map(|answering| answering.iter()), link_mac)
    }

    /// The same for an interface whose index is known, too.
    ///
    /// A port whose interface has another index by what a source tells is not behind this one: it was behind one that had the
    /// name before. If one of the others has this very index, it is that one.
    ///
    /// # Errors
    /// Several ports fit equally well.
    pub fn find_at(
        &self,
        device: &str,
        index: IfIndex,
        link_mac: Option<MacAddress>,
    ) -> Result<Option<&Entry>, Ambiguous> {
        let Some(answering) = self.names.get(device) else { return Ok(None) };
        let of_index = |told: Option<IfIndex>| answering.iter().filter(move |one| one.index == told);
        if of_index(Some(index)).next().is_some() {
            return self.choose(of_index(Some(index)), link_mac);
        }
        self.choose(of_index(None), link_mac)
    }

    fn choose<'a>(
        &self,
        answering: impl Iterator<Item = &'a Answering>,
        link_mac: Option<MacAddress>,
    ) -> Result<Option<&Entry>, Ambiguous> {
        let mut fitting = Vec::new();
        for Answering { key, .. } in answering {
            match self.entries.get(key) {
                Some(entry @ Entry::Agreed(port)) => fitting.push((port.mac, entry)),
                Some(entry @ (Entry::Incomplete(facts) | Entry::NoInstance(facts))) => {
                    fitting.push((facts.mac, entry));
                }
                Some(entry @ Entry::Disputed(_)) => return Ok(Some(entry)),
                None => {}
            }
        }
        if fitting.len() > 1 {
            fitting.retain(|(mac, _)| mac.zip(link_mac).is_some_and(|(guest, link)| same_guest(guest, link)));
            if fitting.len() != 1 {
                return Err(Ambiguous);
            }
        }
        Ok(fitting.pop().map(|(_, entry)| entry))
    }

    /// The subports of a trunk's parent port, by VLAN id.
    #[must_use]
    pub fn subports(&self, parent: &PortId) -> Option<&Arc<[Subport]>> {
        self.subports.get(parent)
    }

    /// Grows with every snapshot that differs from the one before.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The devices of which another snapshot, of this earlier version, may say something else, some of them more than once:
    /// who the port behind it is, or which subports that has. `None` if that was too long ago to tell.
    pub fn changed_since(&self, version: u64) -> Option<impl Iterator<Item = &DeviceName>> {
        self.changes.last(self.version.checked_sub(version)?)
    }

    /// How much it holds.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Every port and dispute, in no order.
    pub fn unordered(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().map(|(_, entry)| entry)
    }

    /// Every port and dispute, in a stable order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries.into_iter().map(|(_, entry)| entry)
    }
}

/// libvirt gives a tap its guest's MAC address with the first octet set to fe (virnetdevtap.c), other makers of
/// taps the address as it is.
fn same_guest(guest: MacAddress, link: MacAddress) -> bool {
    guest.0[1..] == link.0[1..]
}

fn pointee<T: Serialize, S: Serializer>(value: &Arc<T>, serializer: S) -> Result<S::Ok, S::Error> {
    value.as_ref().serialize(serializer)
}
