//! Guests' ports from the rows of Open vSwitch's database.
//!
//! | field | source |
//! |---|---|
//! | instance | `Interface.external_ids:vm-uuid`, as os-vif writes it, or `vm-id`, as libvirt does when it plugs itself |
//! | port id | `Interface.external_ids:iface-id` |
//! | MAC address | `Interface.external_ids:attached-mac` |
//! | device | `Interface.name`; where that is the `qvo` of a hybrid plug, the tap with the same eleven characters |
//! | index | `Interface.ifindex`, where the device is the interface itself |
//! | network | `Port.other_config:net_uuid` of the interface's port, written by Neutron's OVS agent but not by OVN's; for the parent of a trunk, that of its patch port `tpi-` |
//!
//! [`Trunks`] reads the patch ports of subports.
//!
//! # The index
//!
//! A later interface may reuse a name, but not an index. `ovs-vswitchd` writes the index of the
//! interface on its bridge, so the row does not apply to a later interface with the same name. The
//! later interface is not served until the row is replaced or `ovs-vswitchd` has written the new
//! index.
//!
//! - Without an index the name decides, as for all other sources: a row is written before
//!   `ovs-vswitchd` handles it, and a row whose interface cannot be opened never gets an index.
//! - The index of a `qvo` is that of a veth, not of the tap on the bridge behind it.
//! - The index counts only for kernel interfaces (`type` empty, `system` or `internal`). For user
//!   space interfaces Open vSwitch invents a number (lib/netdev-dpdk.c, `netdev_dpdk_get_ifindex`).
//!
//! Rows without an instance belong to Neutron (routers, DHCP, trunks) or to the host, and are
//! ignored. So are rows whose `vm-id` is not a UUID, which other software writes, and rows that are
//! not `active` (`iface-status`). Exception: an interface that looks like a guest's but names no
//! instance. Its port id and device are reported, so that OVN and Neutron can be queried about the
//! port. It is `active` and not `internal`; or it is a kernel interface without a status, as on the
//! host's end of the veth pair of OVN's metadata agent.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ovsdb_client::{Replica, Row, UpdateError, UpdateFormat, integer, map_value, references, text};
use serde_json::Value;
use uuid::Uuid;

use super::super::row_tracker::RowState;
use super::schema::{BRIDGE, INTERFACE, InterfaceError, PORT, TABLES, id};
use super::trunks::Trunks;
use crate::ids::{IfIndex, InstanceId, NetworkId, PortId};
use crate::inventory::{DeviceName, PortAddressing, PortRecord, Tenant};

/// State of a row of `Interface`. An invalid row is reported by the interface's name.
pub(super) type InterfaceState = RowState<InterfaceError>;

/// Copy of the rows, and their relations.
#[derive(Debug)]
pub(super) struct Interfaces {
    replica: Replica,
    /// Rows of `Port` by interface. A consistent database has one per interface.
    ports_of: HashMap<Uuid, BTreeSet<Uuid>>,
    trunks: Trunks,
    /// Interfaces on the bridges of trunks.
    on_trunks: BTreeSet<Uuid>,
}

impl Interfaces {
    pub(super) fn new() -> Self {
        Self {
            replica: Replica::new(TABLES),
            ports_of: HashMap::new(),
            trunks: Trunks::default(),
            on_trunks: BTreeSet::new(),
        }
    }

    /// Applies an update, and returns the states of the affected interfaces and of all interfaces
    /// on trunks.
    pub(super) fn apply(
        &mut self,
        format: UpdateFormat,
        updates: &Value,
    ) -> Result<BTreeMap<Uuid, InterfaceState>, UpdateError> {
        // Apply the changes and collect the affected interfaces.
        let mut touched = BTreeSet::new();
        for change in self.replica.apply(format, updates)? {
            self.trunks.apply(&change, &self.replica);
            if change.table == INTERFACE {
                touched.insert(change.row);
                continue;
            }
            if change.table == BRIDGE {
                continue;
            }
            let before = change.before.as_ref().map(interfaces_in).unwrap_or_default();
            let now = self.replica.row(PORT, change.row).map(interfaces_in).unwrap_or_default();
            for interface in before.difference(&now) {
                if let Some(ports) = self.ports_of.get_mut(interface) {
                    ports.remove(&change.row);
                    if ports.is_empty() {
                        self.ports_of.remove(interface);
                    }
                }
            }
            for interface in &now {
                self.ports_of.entry(*interface).or_default().insert(change.row);
            }
            touched.extend(before);
            touched.extend(now);
        }
        // A change of a trunk affects all interfaces on its bridge, before and after.
        let on_trunks = self.trunks.interfaces(&self.replica);
        touched.extend(std::mem::replace(&mut self.on_trunks, on_trunks));
        touched.extend(&self.on_trunks);
        let mut states: BTreeMap<_, _> =
            touched.into_iter().map(|interface| (interface, self.read(interface))).collect();
        for (interface, (name, record)) in self.trunks.read(&self.replica) {
            states.insert(interface, self.state(interface, &name, record));
        }
        Ok(states)
    }

    fn read(&self, interface: Uuid) -> InterfaceState {
        let Some(row) = self.replica.row(INTERFACE, interface) else { return RowState::Deleted };
        let name = text(row, "name");
        let kind = text(row, "type");
        let record = guest(row, name, kind);
        let record = record.map(|record| {
            record
                .map(|record| PortRecord { index: index(row, name, kind, record.device.as_ref()), ..record })
        });
        self.state(interface, name, record)
    }

    /// Adds the network to the record of an interface.
    fn state(
        &self,
        interface: Uuid,
        name: &str,
        record: Result<Option<PortRecord>, InterfaceError>,
    ) -> InterfaceState {
        let record = record.and_then(|record| {
            let Some(mut record) = record else { return Ok(None) };
            record.addressing.network = self.network(interface)?;
            if record.addressing.network.is_none() && self.on_trunks.contains(&interface) {
                record.addressing.network = self.network_of_parent(record.id)?;
            }
            Ok(Some(record))
        });
        match record {
            Ok(None) => RowState::Ignored,
            Ok(Some(record)) => RowState::Port(record),
            Err(error) => RowState::Invalid { name: name.to_owned(), error },
        }
    }

    fn network_of_parent(&self, parent: Option<PortId>) -> Result<Option<NetworkId>, InterfaceError> {
        let patch = parent.and_then(|parent| self.trunks.patch_of(parent, &self.replica));
        patch.map_or(Ok(None), |patch| self.network(patch))
    }

    fn network(&self, interface: Uuid) -> Result<Option<NetworkId>, InterfaceError> {
        let mut network = None;
        for port in self.ports_of.get(&interface).into_iter().flatten() {
            let Some(row) = self.replica.row(PORT, *port) else { continue };
            let Some(id) = id(row, "other_config", "net_uuid")? else { continue };
            if network.replace(id).is_some_and(|other| other != id) {
                return Err(InterfaceError::SeveralNetworks);
            }
        }
        Ok(network)
    }
}

/// Reads a row of `Interface` by itself; `None` if it does not belong to a guest.
fn guest(row: &Row, name: &str, kind: &str) -> Result<Option<PortRecord>, InterfaceError> {
    let value = |key: &str| map_value(row, "external_ids", key);
    let os_vif: Option<InstanceId> = id(row, "external_ids", "vm-uuid")?;
    let libvirt: Option<InstanceId> = value("vm-id").and_then(|text| text.parse().ok());
    let instance = match (os_vif, libvirt) {
        (Some(os_vif), Some(libvirt)) if os_vif != libvirt => {
            return Err(InterfaceError::SeveralInstances { os_vif, libvirt });
        }
        (os_vif, libvirt) => os_vif.or(libvirt),
    };
    let port_id = value("iface-id");
    let is_plugged = match (instance, value("iface-status")) {
        (Some(_), status) => status.is_none_or(|status| status == "active"),
        (None, Some("active")) => kind != "internal" && port_id.is_some(),
        (None, Some(_)) => false,
        // Other software names its logical ports as it likes.
        (None, None) => {
            matches!(kind, "" | "system") && port_id.is_some_and(|text| text.parse::<PortId>().is_ok())
        }
    };
    if !is_plugged {
        return Ok(None);
    }
    let port: Option<PortId> = id(row, "external_ids", "iface-id")?;
    Ok(Some(PortRecord {
        id: port,
        device: device(name, port),
        tenant: instance.map(|instance| Tenant { instance, project: None }),
        addressing: PortAddressing {
            mac: id(row, "external_ids", "attached-mac")?,
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    }))
}

/// Returns the interface that faces the guest; `None` for a user space port, whose name may be
/// invalid in the kernel.
fn device(name: &str, port: Option<PortId>) -> Option<DeviceName> {
    let hybrid = port.filter(|port| name.strip_prefix("qvo") == Some(port.device_suffix().as_str()));
    hybrid.map(|port| DeviceName::from_port_id(&port)).or_else(|| name.parse().ok())
}

/// Returns the index of the device. Zero means no index.
fn index(row: &Row, name: &str, kind: &str, device: Option<&DeviceName>) -> Option<IfIndex> {
    let is_the_kernels = matches!(kind, "" | "system" | "internal");
    let is_itself = device.is_some_and(|device| device.as_str() == name);
    let index = integer(row, "ifindex").filter(|index| *index > 0 && is_the_kernels && is_itself)?;
    u32::try_from(index).ok().map(IfIndex)
}

fn interfaces_in(port: &Row) -> BTreeSet<Uuid> {
    references(port, "interfaces").collect()
}

#[cfg(test)]
mod tests;
