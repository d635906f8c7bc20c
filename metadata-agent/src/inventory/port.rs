//! What sources say: a port, and the event that carries it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use super::device::DeviceName;
use super::prefix::AddressPrefix;
use super::trunk::TrunkBinding;
use crate::ids::{IfIndex, InstanceId, MacAddress, NetworkId, PortId, ProjectId};

/// A port of an instance. Whose it is, is always known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    /// Neutron's id. `None` if the port is known by its device alone.
    pub id: Option<PortId>,
    /// The kernel interface, where a source knows it.
    pub device: Option<DeviceName>,
    /// The instance behind the port.
    pub instance: InstanceId,
    /// The project that owns the instance.
    pub project: ProjectId,
    /// The network of the port, where a source knows it.
    pub network: Option<NetworkId>,
    /// The guest's MAC address, where a source knows it.
    pub mac: Option<MacAddress>,
    /// The port's own addresses; empty where no source knows them.
    pub fixed_ips: Vec<IpAddr>,
    /// Further addresses that the guest may send from (Neutron's allowed-address-pairs).
    pub allowed_addresses: Vec<AddressPrefix>,
}

/// What one source says of a port: as much as it knows. PortRecord with neither id nor device are of no port.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PortRecord {
    /// Neutron's id.
    pub id: Option<PortId>,
    /// The kernel interface.
    pub device: Option<DeviceName>,
    /// The index that this interface has in the host's namespace, where the source tells it. Another one under the same name
    /// is another interface, of which these facts are not.
    pub index: Option<IfIndex>,
    /// Its place on a trunk, if it is a subport. Such facts are of no device and no tenant.
    pub seat: Option<TrunkBinding>,
    /// Whose it is.
    pub tenant: Option<Tenant>,
    /// What Neutron says it is for.
    pub device_owner: Option<DeviceOwner>,
    /// The project of the port itself. It stands in where nobody knows the instance's, from which it may differ: an
    /// administrator may make ports for other projects' instances.
    pub port_project: Option<ProjectId>,
    /// The network of the port.
    pub network: Option<NetworkId>,
    /// The guest's MAC address.
    pub mac: Option<MacAddress>,
    /// The port's own addresses; empty where the source does not know them.
    pub fixed_ips: Vec<IpAddr>,
    /// Further addresses that the guest may send from (Neutron's allowed-address-pairs).
    pub allowed_addresses: Vec<AddressPrefix>,
    /// The instances between which this source was asked to judge. While sources name these alone, `tenant` decides.
    pub judged: BTreeSet<InstanceId>,
}

/// Neutron's `device_owner`: what a port is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct DeviceOwner(String);

impl DeviceOwner {
    /// The text as Neutron has it; `None` for the empty text of a port that nobody uses yet.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// Whether it is an instance's: `compute:` and the availability zone (neutron_lib/constants.py,
    /// `DEVICE_OWNER_COMPUTE_PREFIX`).
    #[must_use]
    pub fn is_instance(&self) -> bool {
        self.0.starts_with("compute:")
    }
}

impl fmt::Display for DeviceOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The instance behind a port. The project is the instance's, so nobody can tell it who does not name the instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Tenant {
    /// The instance.
    pub instance: InstanceId,
    /// The project that owns it, where the source knows it.
    pub project: Option<ProjectId>,
}

impl PortRecord {
    /// Takes over what is not known yet. Whether both may speak of one tenant.
    pub(super) fn complete_with(&mut self, other: &Self) -> bool {
        self.id = self.id.or(other.id);
        self.network = self.network.or(other.network);
        self.mac = self.mac.or(other.mac);
        if self.device.is_none() {
            self.device.clone_from(&other.device);
            self.index = other.index;
        }
        if self.device_owner.is_none() {
            self.device_owner.clone_from(&other.device_owner);
        }
        if self.port_project.is_none() {
            self.port_project.clone_from(&other.port_project);
        }
        if self.fixed_ips.is_empty() {
            self.fixed_ips.clone_from(&other.fixed_ips);
        }
        if self.allowed_addresses.is_empty() {
            self.allowed_addresses.clone_from(&other.allowed_addresses);
        }
        match (&mut self.tenant, &other.tenant) {
            (_, None) => true,
            (tenant @ None, Some(_)) => {
                tenant.clone_from(&other.tenant);
                true
            }
            (Some(ours), Some(theirs)) if ours.instance != theirs.instance => false,
            (Some(ours), Some(theirs)) => {
                if ours.project.is_none() {
                    ours.project.clone_from(&theirs.project);
                }
                theirs.project.is_none() || ours.project == theirs.project
            }
        }
    }

    /// The port, if it is known whose it is.
    pub(super) fn port(&self) -> Option<Port> {
        let Tenant { instance, project } = self.tenant.as_ref()?;
        Some(Port {
            id: self.id,
            device: self.device.clone(),
            instance: *instance,
            project: project.clone().or_else(|| self.port_project.clone())?,
            network: self.network,
            mac: self.mac,
            fixed_ips: self.fixed_ips.clone(),
            allowed_addresses: self.allowed_addresses.clone(),
        })
    }
}

impl From<Port> for PortRecord {
    fn from(port: Port) -> Self {
        let Port { id, device, instance, project, network, mac, fixed_ips, allowed_addresses } = port;
        let tenant = Some(Tenant { instance, project: Some(project) });
        Self { id, device, tenant, network, mac, fixed_ips, allowed_addresses, ..Self::default() }
    }
}

/// Who says it. The order of the variants is the order of trust: where sources differ on a field, the first
/// that knows it is believed. A new source takes its place in that order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// The file that the operator writes.
    StaticFile,
    /// The database of the host's Open vSwitch.
    Ovsdb,
    /// The XML of the domains that libvirt runs.
    Libvirt,
    /// OVN's Southbound database.
    OvnSouthbound,
    /// Neutron's API.
    Neutron,
}

impl SourceKind {
    /// Every source, the most trusted first.
    pub const ALL: &'static [Self] =
        &[Self::StaticFile, Self::Ovsdb, Self::Libvirt, Self::OvnSouthbound, Self::Neutron];

    /// The label in metrics and in `status`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::StaticFile => "static_file",
            Self::Ovsdb => "ovsdb",
            Self::Libvirt => "libvirt",
            Self::OvnSouthbound => "ovn_southbound",
            Self::Neutron => "neutron",
        }
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// All that a source knows under one key (a file, a domain, a row) is now this.
///
/// An event replaces what the source said under that key before, so per key the last one holds, and between
/// keys and between sources the order is of no consequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Who says it.
    pub source: SourceKind,
    /// About what, in the source's own terms.
    pub key: String,
    /// What is so now; empty when the key is gone.
    pub ports: Vec<PortRecord>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_listed_in_order_of_trust_and_labelled_as_they_are_dumped() {
        assert!(SourceKind::ALL.is_sorted());
        for kind in SourceKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.label());
        }
    }
}
