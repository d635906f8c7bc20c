//! Which guests' interfaces are on this host, and what is still missing about them: what a source needs to know that can
//! only be asked about single ports, such as OVN's Southbound database or Neutron's API.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{DeviceName, Entry, Snapshot};
use crate::ids::{IfIndex, InstanceId, MacAddress, PortId};

/// A guest's interface on this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Present {
    /// Its name.
    pub device: DeviceName,
    /// Its index. One that is replaced under the same name has another.
    pub index: IfIndex,
    /// The link's own MAC address. libvirt sets the first octet of the guest's to fe.
    pub mac: Option<MacAddress>,
    /// Neutron's id of its port, once a source tells it.
    pub port: Option<PortId>,
    /// What is missing.
    pub need: Need,
}

/// What is missing to serve a guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Nothing: it is known whose it is, or that it is not an instance's.
    Nothing,
    /// The port, or its instance, or its project.
    Identity,
    /// Somebody who decides which of these instances it is.
    Arbitration(BTreeSet<InstanceId>),
}

/// All of them, by index.
pub type Presence = Arc<[Present]>;

impl Present {
    /// What a snapshot says of an interface.
    #[must_use]
    pub fn from_snapshot(
        device: DeviceName,
        index: IfIndex,
        mac: Option<MacAddress>,
        snapshot: &Snapshot,
    ) -> Self {
        let (port, need) = match snapshot.find_at(device.as_str(), index, mac) {
            Ok(Some(Entry::Agreed(port))) => (port.id, Need::Nothing),
            Ok(Some(Entry::NoInstance(facts))) => (facts.id, Need::Nothing),
            Ok(Some(Entry::Incomplete(facts))) => (facts.id, Need::Identity),
            Ok(Some(Entry::Disputed(dispute))) => {
                let instances = dispute.claims.iter().map(|claim| claim.instance).collect();
                (dispute.id, Need::Arbitration(instances))
            }
            // Which of several ports it is, is told by a MAC address: nobody who is asked about one of them knows better.
            Ok(None) | Err(_) => (None, Need::Identity),
        };
        Self { device, index, mac, port, need }
    }
}
