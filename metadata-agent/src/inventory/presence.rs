//! Guest interfaces on this host, and what is missing about each. Input of the sources that can be
//! queried only about single ports: OVN's Southbound database and Neutron's API.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{DeviceName, Entry, Snapshot};
use crate::ids::{IfIndex, InstanceId, MacAddress, PortId};

/// Guest interface on this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Present {
    pub device: DeviceName,
    /// A later interface of the same name has another index.
    pub index: IfIndex,
    /// MAC address of the link. libvirt uses the guest's, with the first octet set to fe.
    pub mac: Option<MacAddress>,
    /// Port id, once a source reports it.
    pub port: Option<PortId>,
    pub need: Need,
}

/// Information that is missing to serve a guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// The instance is known, or the port does not belong to an instance.
    Nothing,
    /// The port, or its instance, or its project.
    Identity,
    /// A decision between these instances.
    Arbitration(BTreeSet<InstanceId>),
}

/// All interfaces, by index.
pub(crate) type Presence = Arc<[Present]>;

impl Present {
    /// Determines from a snapshot what is missing about an interface.
    #[must_use]
    pub(crate) fn from_snapshot(
        device: DeviceName,
        index: IfIndex,
        mac: Option<MacAddress>,
        snapshot: &Snapshot,
    ) -> Self {
        let (port, need) = match snapshot.find_at(device.as_str(), index, mac) {
            Ok(Some(Entry::Agreed(port))) => (port.id, Need::Nothing),
            Ok(Some(Entry::NoInstance(record))) => (record.id, Need::Nothing),
            Ok(Some(Entry::Incomplete(record))) => (record.id, Need::Identity),
            Ok(Some(Entry::Disputed(dispute))) => {
                let instances = dispute.claims.iter().map(|claim| claim.instance).collect();
                (dispute.id, Need::Arbitration(instances))
            }
            // If several ports match, only the MAC address can decide, so no port is named.
            Ok(None) | Err(_) => (None, Need::Identity),
        };
        Self { device, index, mac, port, need }
    }
}
