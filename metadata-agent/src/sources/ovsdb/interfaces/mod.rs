//! What the rows of Open vSwitch's database say of guests.
//!
//! | fact | from |
//! |---|---|
//! | instance | `Interface.external_ids:vm-uuid`, as os-vif writes it, or `vm-id`, as libvirt does when it plugs itself |
//! | port id | `Interface.external_ids:iface-id` |
//! | MAC address | `Interface.external_ids:attached-mac` |
//! | device | `Interface.name`; where that is the `qvo` of a hybrid plug, the tap with the same eleven characters |
//! | index | `Interface.ifindex`, where the device is the interface itself |
//! | network | `Port.other_config:net_uuid` of the port that the interface is in, which Neutron's OVS agent writes, and OVN's does not; of the parent of a trunk, which is in a port of the trunk's bridge, that of its patch port `tpi-` |
//!
//! The patch ports of a trunk's subports are read by [`Trunks`].
//!
//! # The index
//!
//! A name passes from one interface to the next; an index does not. `ovs-vswitchd` writes the index of the interface that it has
//! on its bridge, so with it a row is of one interface, and not of the one that has the name after it: until the row was
//! replaced, or `ovs-vswitchd` has found the new interface and written its index, the new one is nobody's.
//!
//! - No index is no statement, and the name decides, as it does for all other sources: a row is written before
//!   `ovs-vswitchd` has looked at it, and one whose interface it cannot open never gets one.
//! - The index of a `qvo` is that of a veth, and tells nothing of the tap on the bridge behind it.
//! - It counts for interfaces of the kernel alone (`type` empty, `system` or `internal`): of its own in user space Open vSwitch
//!   makes up a number (lib/netdev-dpdk.c, `netdev_dpdk_get_ifindex`).
//!
//! Rows that name no instance are Neutron's own (routers, DHCP, trunks) or the host's. So are those whose `vm-id` is
//! no UUID, which other software puts there, and those that are not `active` (`iface-status`). One exception: a kernel
//! interface that was plugged like a guest's (its `type` is not `internal`, it is `active` and has the id of a port) but
//! names no instance. Of such a port is told which interface it has, so that Neutron can be asked what it is.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ovsdb_client::{Replica, Row, UpdateError, UpdateFormat, integer, map_value, references, text};
use serde_json::Value;
use uuid::Uuid;

use super::super::rows;
use super::tables::{BRIDGE, INTERFACE, PORT, RowError, TABLES, id};
use super::trunks::Trunks;
use crate::ids::{IfIndex, InstanceId, NetworkId, PortId};
use crate::inventory::{DeviceName, PortRecord, Tenant};

/// What a row of `Interface` says now; a fault bears the interface's name.
pub(super) type Reading = rows::Reading<RowError>;

/// The rows as they are now.
#[derive(Debug)]
pub(super) struct Interfaces {
    replica: Replica,
    /// The ports that hold an interface; one, in an honest database.
    ports_of: HashMap<Uuid, BTreeSet<Uuid>>,
    trunks: Trunks,
    /// What is on the bridges of trunks.
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

    /// Takes an update in and tells what the interfaces that it touches, and all of trunks, say now.
    pub(super) fn apply(
        &mut self,
        format: UpdateFormat,
        updates: &Value,
    ) -> Result<BTreeMap<Uuid, Reading>, UpdateError> {
        let mut touched = BTreeSet::new();
        for change in self.replica.apply(format, updates)? {
            self.trunks.follow(&change, &self.replica);
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
        let on_trunks = self.trunks.interfaces(&self.replica);
        touched.extend(std::mem::replace(&mut self.on_trunks, on_trunks));
        touched.extend(&self.on_trunks);
        let mut readings: BTreeMap<_, _> =
            touched.into_iter().map(|interface| (interface, self.read(interface))).collect();
        for (interface, (name, facts)) in self.trunks.read(&self.replica) {
            readings.insert(interface, self.reading(interface, &name, facts));
        }
        Ok(readings)
    }

    fn read(&self, interface: Uuid) -> Reading {
        let Some(row) = self.replica.row(INTERFACE, interface) else { return Reading::Gone };
        let name = text(row, "name");
        let kind = text(row, "type");
        let facts = guest(row, name, kind);
        let facts = facts.map(|facts| {
            facts.map(|facts| PortRecord { index: index(row, name, kind, facts.device.as_ref()), ..facts })
        });
        self.reading(interface, name, facts)
    }

    /// What an interface says with its network.
    fn reading(&self, interface: Uuid, name: &str, facts: Result<Option<PortRecord>, RowError>) -> Reading {
        let facts = facts.and_then(|facts| {
            let Some(facts) = facts else { return Ok(None) };
            let mut network = self.network(interface)?;
            if network.is_none() && self.on_trunks.contains(&interface) {
                network = self.network_of_parent(facts.id)?;
            }
            Ok(Some(PortRecord { network, ..facts }))
        });
        match facts {
            Ok(None) => Reading::Nobodys,
            Ok(Some(facts)) => Reading::Port(facts),
            Err(error) => Reading::Fault { name: name.to_owned(), error },
        }
    }

    fn network_of_parent(&self, parent: Option<PortId>) -> Result<Option<NetworkId>, RowError> {
        let patch = parent.and_then(|parent| self.trunks.patch_of(parent, &self.replica));
        patch.map_or(Ok(None), |patch| self.network(patch))
    }

    fn network(&self, interface: Uuid) -> Result<Option<NetworkId>, RowError> {
        let mut network = None;
        for port in self.ports_of.get(&interface).into_iter().flatten() {
            let Some(row) = self.replica.row(PORT, *port) else { continue };
            let Some(told) = id(row, "other_config", "net_uuid")? else { continue };
            if network.replace(told).is_some_and(|other| other != told) {
                return Err(RowError::TwoNetworks);
            }
        }
        Ok(network)
    }
}

/// What a row of `Interface` says by itself; `None` if it is no guest's.
fn guest(row: &Row, name: &str, kind: &str) -> Result<Option<PortRecord>, RowError> {
    let told = |key: &str| map_value(row, "external_ids", key);
    let os_vif: Option<InstanceId> = id(row, "external_ids", "vm-uuid")?;
    let libvirt: Option<InstanceId> = told("vm-id").and_then(|text| text.parse().ok());
    let instance = match (os_vif, libvirt) {
        (Some(os_vif), Some(libvirt)) if os_vif != libvirt => {
            return Err(RowError::TwoInstances { os_vif, libvirt });
        }
        (os_vif, libvirt) => os_vif.or(libvirt),
    };
    let status = told("iface-status");
    let is_plugged = match instance {
        Some(_) => status.is_none_or(|status| status == "active"),
        None => kind != "internal" && status == Some("active") && told("iface-id").is_some(),
    };
    if !is_plugged {
        return Ok(None);
    }
    let port: Option<PortId> = id(row, "external_ids", "iface-id")?;
    Ok(Some(PortRecord {
        id: port,
        device: device(name, port),
        tenant: instance.map(|instance| Tenant { instance, project: None }),
        mac: id(row, "external_ids", "attached-mac")?,
        ..PortRecord::default()
    }))
}

/// The interface that faces the guest. A name that the kernel could not have is that of a port in user space.
fn device(name: &str, port: Option<PortId>) -> Option<DeviceName> {
    let hybrid = port.filter(|port| name.strip_prefix("qvo") == Some(port.device_suffix().as_str()));
    hybrid.map(|port| DeviceName::tap_of(&port)).or_else(|| name.parse().ok())
}

/// The index that a row tells of the device; zero is none.
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
