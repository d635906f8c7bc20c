//! Ports as sources report them, and the events that carry the reports.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use super::device::DeviceName;
use super::source_policy::SourcePolicy;
use crate::ids::{IfIndex, InstanceId, MacAddress, NetworkId, PortId, ProjectId, VlanId};

/// Network and addresses of a port. Fields that no source knows are `None` or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PortAddressing {
    pub network: Option<NetworkId>,
    /// MAC address of the guest, not of the tap.
    pub mac: Option<MacAddress>,
    pub fixed_ips: Vec<IpAddr>,
    /// The source of `fixed_ips`, once records are merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fixed_ips_source: Option<SourceKind>,
    /// Sources that the port may send from. `None` if it is not known: then nothing is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_sources: Option<SourcePolicy>,
    /// The source of `allowed_sources`, once records are merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_sources_source: Option<SourceKind>,
}

impl PortAddressing {
    /// Returns the fixed addresses by which the port may be identified to others: those of a source
    /// that vouches for them.
    #[must_use]
    pub(crate) fn confirmed_ips(&self) -> &[IpAddr] {
        let is_confirmed = self.fixed_ips_source.is_some_and(SourceKind::vouches_for_addresses);
        if is_confirmed { &self.fixed_ips } else { &[] }
    }

    /// Returns the sources that the port may send from. Without a statement, that is any.
    #[must_use]
    pub(crate) fn source_policy(&self) -> SourcePolicy {
        self.allowed_sources.clone().unwrap_or(SourcePolicy::Any)
    }

    /// Returns true if the fixed addresses change as soon as Neutron changes them.
    #[must_use]
    pub(crate) fn follows_changes(&self) -> bool {
        self.fixed_ips_source.is_some_and(SourceKind::follows_addresses)
    }
}

/// Port of a known instance. Fields that no source knows are `None` or empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    /// `None` if the port is known by its device only.
    pub id: Option<PortId>,
    /// Kernel interface.
    pub device: Option<DeviceName>,
    pub instance: InstanceId,
    /// Project of the instance.
    pub project: ProjectId,
    #[serde(flatten)]
    pub addressing: PortAddressing,
}

/// One source's knowledge of a port. A record with neither id nor device belongs to no port.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PortRecord {
    pub id: Option<PortId>,
    /// Kernel interface.
    pub device: Option<DeviceName>,
    /// Index of this interface in the host's namespace. An interface with the same name and another
    /// index is a different interface, to which this record does not apply.
    pub index: Option<IfIndex>,
    /// Parent and VLAN id of a subport. Such a record has neither device nor tenant.
    pub trunk: Option<TrunkBinding>,
    pub tenant: Option<Tenant>,
    pub device_owner: Option<DeviceOwner>,
    /// Project of the port itself, used if no source knows the project of the instance. They may
    /// differ: an administrator can create ports for instances of other projects.
    pub port_project: Option<ProjectId>,
    #[serde(flatten)]
    pub addressing: PortAddressing,
    /// Instances between which this source was asked to arbitrate. `tenant` decides as long as the
    /// other sources name only these.
    pub arbitrated: BTreeSet<InstanceId>,
}

/// Neutron's `device_owner`: the purpose of a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct DeviceOwner(String);

impl DeviceOwner {
    /// Wraps Neutron's text; `None` for the empty text of an unused port.
    #[must_use]
    pub(crate) fn new(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// The purpose of a port that is internal to OVN, by its type.
    #[must_use]
    pub(crate) fn from_ovn_type(kind: &str) -> Self {
        Self(format!("ovn:{kind}"))
    }

    /// Returns true for the port of an instance: `compute:` and the availability zone
    /// (neutron_lib/constants.py, `DEVICE_OWNER_COMPUTE_PREFIX`).
    #[must_use]
    pub(crate) fn is_instance(&self) -> bool {
        self.0.starts_with("compute:")
    }
}

impl fmt::Display for DeviceOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Instance behind a port. The project is the instance's, so a source that reports it also names
/// the instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Tenant {
    pub instance: InstanceId,
    pub project: Option<ProjectId>,
}

/// Two records of one port name different tenants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TenantConflict;

impl PortRecord {
    /// Takes over fields that are not known yet, except the addressing.
    ///
    /// # Errors
    /// The records name different tenants. The other fields are taken over nonetheless.
    pub(super) fn complete_with(&mut self, other: &Self) -> Result<(), TenantConflict> {
        self.id = self.id.or(other.id);
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
        match (&mut self.tenant, &other.tenant) {
            (_, None) => {}
            (tenant @ None, Some(_)) => tenant.clone_from(&other.tenant),
            (Some(ours), Some(theirs)) if ours.instance != theirs.instance => return Err(TenantConflict),
            (Some(ours), Some(theirs)) => {
                if ours.project.is_none() {
                    ours.project.clone_from(&theirs.project);
                }
                if theirs.project.is_some() && ours.project != theirs.project {
                    return Err(TenantConflict);
                }
            }
        }
        Ok(())
    }

    /// Returns the port if its instance and project are known.
    pub(super) fn port(&self) -> Option<Port> {
        let Tenant { instance, project } = self.tenant.as_ref()?;
        Some(Port {
            id: self.id,
            device: self.device.clone(),
            instance: *instance,
            project: project.clone().or_else(|| self.port_project.clone())?,
            addressing: self.addressing.clone(),
        })
    }
}

impl From<Port> for PortRecord {
    fn from(port: Port) -> Self {
        let Port { id, device, instance, project, addressing } = port;
        let tenant = Some(Tenant { instance, project: Some(project) });
        Self { id, device, tenant, addressing, ..Self::default() }
    }
}

/// Kind of source, in the order of trust: if sources differ in a field, the first one that knows it
/// is believed. Addresses are the exception ([`SourceKind::reads_control_plane`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// File written by the operator.
    StaticFile,
    /// Database of the host's Open vSwitch.
    Ovsdb,
    /// Domain XML of the host's libvirt.
    Libvirt,
    OvnSouthbound,
    Neutron,
}

impl SourceKind {
    /// Every kind, the most trusted first.
    #[cfg(test)]
    pub(crate) const ALL: &'static [Self] =
        &[Self::StaticFile, Self::Ovsdb, Self::Libvirt, Self::OvnSouthbound, Self::Neutron];

    /// Returns true for sources that read addresses where they are assigned. The others know the
    /// addresses of the moment at which a port was plugged or a file was written, so these sources
    /// come first for addresses.
    #[must_use]
    pub(crate) const fn reads_control_plane(self) -> bool {
        match self {
            Self::OvnSouthbound | Self::Neutron => true,
            Self::StaticFile | Self::Ovsdb | Self::Libvirt => false,
        }
    }

    /// Returns true for sources whose statement of a port's allowed sources is complete: port
    /// security, fixed addresses and address pairs. libvirt knows the fixed addresses of the moment
    /// at which Nova wrote them, and no pairs. So neither it nor Open vSwitch may refuse a source.
    #[must_use]
    pub(crate) const fn states_allowed_sources(self) -> bool {
        match self {
            Self::StaticFile | Self::OvnSouthbound | Self::Neutron => true,
            Self::Ovsdb | Self::Libvirt => false,
        }
    }

    /// Returns true for a source to which the control plane pushes changes of addresses. Neutron is
    /// asked once for each interface, and again after a guest was refused, so a change may be
    /// noticed late.
    #[must_use]
    pub(crate) const fn follows_addresses(self) -> bool {
        match self {
            Self::OvnSouthbound => true,
            Self::StaticFile | Self::Ovsdb | Self::Libvirt | Self::Neutron => false,
        }
    }

    /// Returns true for sources by whose addresses a port may be identified to Neutron's metadata
    /// agent: OVN, and the operator's word.
    #[must_use]
    pub(crate) const fn vouches_for_addresses(self) -> bool {
        match self {
            Self::StaticFile | Self::OvnSouthbound => true,
            Self::Ovsdb | Self::Libvirt | Self::Neutron => false,
        }
    }

    /// Label in metrics and in `status`.
    #[must_use]
    pub(crate) const fn label(self) -> &'static str {
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

/// Everything that a source knows under one key: a file, a domain or a row.
///
/// An event replaces the previous one with the same key. The order of events with different keys or
/// from different sources does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub source: SourceKind,
    /// Name of the file, domain or row within the source.
    pub key: String,
    /// Empty if the key no longer exists.
    pub ports: Vec<PortRecord>,
}

/// Position of a subport: a port that reaches its guest as a VLAN on the interface of its parent
/// port. A subport belongs to its parent's instance, so a source that reports it need not know the
/// instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct TrunkBinding {
    /// Parent port of the trunk.
    pub parent: PortId,
    pub vlan: VlanId,
}

/// Subport of a trunk, merged from all sources. Fields that no source knows are `None` or empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Subport {
    pub vlan: VlanId,
    pub id: Option<PortId>,
    #[serde(flatten)]
    pub addressing: PortAddressing,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_sorted_by_trust_and_serialized_by_label() {
        assert!(SourceKind::ALL.is_sorted());
        for kind in SourceKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.label());
        }
    }
}
