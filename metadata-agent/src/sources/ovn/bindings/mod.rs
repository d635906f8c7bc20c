//! Ports of this host from the rows of OVN's table `Port_Binding`.
//!
//! | field | source, written by Neutron's OVN driver and copied from the Northbound database by northd |
//! |---|---|
//! | port id | `logical_port` |
//! | device owner | `external_ids:neutron:device_owner` |
//! | instance | `external_ids:neutron:device_id`, if the device owner is `compute:*` |
//! | the port's project | `external_ids:neutron:project_id` |
//! | network | `external_ids:neutron:network_name`, which is `neutron-` and the network's id |
//! | fixed IPs | `external_ids:neutron:cidrs`, or else the addresses after the MAC address |
//! | MAC address | `mac`: of `MAC IP...`, `MAC` and `unknown` the MAC address with IP addresses, or the only one |
//!
//! A row with `parent_port` and `tag` is a subport of a trunk: a VLAN on the interface of that
//! port. It belongs to its parent's instance. A row without a tag yet is ignored.
//!
//! Neutron also adds the MAC addresses of allowed address pairs to `mac`, without IP addresses, and
//! the set has no order. If several candidates remain, no MAC address is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovsdb_client::{
    ColumnKind, Monitor, Replica, Row, TableSchema, UpdateError, UpdateFormat, integer, map_value, text,
    texts,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::row_tracker::RowState;
use crate::ids::{IdError, InstanceId, MacAddress, NetworkId, PortId, VlanId};
use crate::inventory::{DeviceOwner, PortAddressing, PortRecord, Tenant, TrunkBinding};

pub(super) const DATABASE: &str = "OVN_Southbound";
const TABLE: &str = "Port_Binding";
const TABLES: &[TableSchema] = &[TableSchema {
    name: TABLE,
    columns: &[
        ("logical_port", ColumnKind::Optional),
        ("type", ColumnKind::Optional),
        ("parent_port", ColumnKind::Optional),
        ("tag", ColumnKind::Optional),
        ("mac", ColumnKind::Set),
        ("external_ids", ColumnKind::Map),
    ],
}];

pub(super) const MONITOR: Monitor = Monitor { database: DATABASE, id: "metadata-agent", tables: TABLES };

/// Prefix of the names that Neutron gives to networks.
const NETWORK_PREFIX: &str = "neutron-";

/// Error in a row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BindingError {
    #[error("{column}: {source}")]
    Id { column: &'static str, source: IdError },
    #[error("external_ids:neutron:network_name: `{text}` is not `neutron-` and a network id")]
    Network { text: String },
    #[error("tag: {tag} is not a VLAN id (1 to 4094)")]
    Tag { tag: i64 },
    #[error("{column}: `{text}` is not an IP address")]
    Address { column: &'static str, text: String },
}

/// State of a row. An invalid row is reported by the logical port's name.
pub(super) type BindingState = RowState<BindingError>;

/// Returns the condition for the rows of these ports and of their subports.
pub(super) fn clauses(ports: &BTreeSet<PortId>) -> Value {
    if ports.is_empty() {
        return json!([false]);
    }
    let clause = |column: &str, port: &PortId| json!([column, "==", port.to_string()]);
    ports.iter().flat_map(|port| [clause("logical_port", port), clause("parent_port", port)]).collect()
}

/// Copy of the monitored rows.
#[derive(Debug)]
pub(super) struct Bindings {
    replica: Replica,
}

impl Bindings {
    pub(super) fn new() -> Self {
        Self { replica: Replica::new(TABLES) }
    }

    /// Applies an update.
    pub(super) fn apply(&mut self, format: UpdateFormat, update: &Value) -> Result<(), UpdateError> {
        self.replica.apply(format, update).map(drop)
    }

    /// Returns the states of the rows of these ports and of their subports. Rows of other ports may
    /// be present while a change of the condition is in progress; they are skipped.
    pub(super) fn read(&self, ports: &BTreeSet<PortId>) -> BTreeMap<Uuid, BindingState> {
        let local = |name: &str| name.parse().ok().filter(|port| ports.contains(port));
        let rows = self.replica.rows(TABLE).filter_map(|(uuid, row)| {
            let name = text(row, "logical_port");
            let state = match (text(row, "parent_port"), integer(row, "tag")) {
                ("", _) if local(name).is_some() => row_state(name, record(name, row)),
                ("", _) => return None,
                (parent, tag) => match (local(parent), tag) {
                    (Some(parent), Some(tag)) => row_state(name, subport(name, row, parent, tag)),
                    (Some(_), None) => RowState::Ignored,
                    (None, _) if local(name).is_some() => RowState::Ignored,
                    (None, _) => return None,
                },
            };
            Some((uuid, state))
        });
        rows.collect()
    }
}

fn row_state(name: &str, record: Result<PortRecord, BindingError>) -> BindingState {
    match record {
        Ok(record) => RowState::Port(record),
        Err(error) => RowState::Invalid { name: name.to_owned(), error },
    }
}

/// Reads the row of a subport.
fn subport(name: &str, row: &Row, parent: PortId, tag: i64) -> Result<PortRecord, BindingError> {
    let vlan = u64::try_from(tag).ok().and_then(|tag| VlanId::try_from(tag).ok());
    let vlan = vlan.ok_or(BindingError::Tag { tag })?;
    let PortRecord { id, addressing, .. } = record(name, row)?;
    Ok(PortRecord { id, trunk: Some(TrunkBinding { parent, vlan }), addressing, ..PortRecord::default() })
}

fn record(name: &str, row: &Row) -> Result<PortRecord, BindingError> {
    let value = |key| map_value(row, "external_ids", key).filter(|text| !text.is_empty());
    let owner = value("neutron:device_owner").and_then(DeviceOwner::new);
    // Other types, such as `router`, `localport` and `virtual`, are internal to OVN. `external` is
    // a guest that OVN does not connect itself.
    let is_guests = matches!(text(row, "type"), "" | "external");
    let instance = match value("neutron:device_id") {
        Some(text) if is_guests && owner.as_ref().is_some_and(DeviceOwner::is_instance) => {
            Some(id::<InstanceId>("external_ids:neutron:device_id", text)?)
        }
        Some(_) | None => None,
    };
    let project = value("neutron:project_id");
    let project = project.map(|text| id("external_ids:neutron:project_id", text)).transpose()?;
    let (mac, addresses) = own_mac(texts(row, "mac"))?;
    let cidrs = value("neutron:cidrs").map(fixed_ips).transpose()?;
    Ok(PortRecord {
        id: Some(id("logical_port", name)?),
        tenant: instance.map(|instance| Tenant { instance, project: None }),
        device_owner: owner.filter(|owner| is_guests || !owner.is_instance()),
        port_project: project,
        addressing: PortAddressing {
            network: value("neutron:network_name").map(network).transpose()?,
            mac,
            fixed_ips: cidrs.unwrap_or(addresses),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    })
}

/// Returns the port's own MAC address and the IP addresses after it.
fn own_mac<'a>(
    entries: impl Iterator<Item = &'a str>,
) -> Result<(Option<MacAddress>, Vec<IpAddr>), BindingError> {
    let mut macs = BTreeMap::<MacAddress, Vec<IpAddr>>::new();
    for entry in entries {
        let mut words = entry.split_ascii_whitespace();
        // `unknown` names no address, `router` belongs to a router, and `dynamic` is not chosen yet
        // (ovn-nb(5), `addresses`).
        let Some(mac) = words.next().filter(|word| !matches!(*word, "unknown" | "router" | "dynamic")) else {
            continue;
        };
        let addresses = macs.entry(id("mac", mac)?).or_default();
        for word in words {
            addresses.push(address("mac", word)?);
        }
    }
    if macs.len() > 1 {
        macs.retain(|_, addresses| !addresses.is_empty());
    }
    match macs.pop_first() {
        Some((mac, addresses)) if macs.is_empty() => Ok((Some(mac), addresses)),
        Some(_) | None => Ok((None, Vec::new())),
    }
}

/// Parses the addresses of `10.0.0.5/24 fd00::5/64`.
fn fixed_ips(cidrs: &str) -> Result<Vec<IpAddr>, BindingError> {
    let addresses = cidrs.split_ascii_whitespace().map(|cidr| {
        let text = cidr.split_once('/').map_or(cidr, |(address, _prefix)| address);
        address("external_ids:neutron:cidrs", text)
    });
    addresses.collect()
}

fn address(column: &'static str, text: &str) -> Result<IpAddr, BindingError> {
    text.parse().map_err(|_| BindingError::Address { column, text: text.to_owned() })
}

fn network(name: &str) -> Result<NetworkId, BindingError> {
    let id = name.strip_prefix(NETWORK_PREFIX).and_then(|id| id.parse().ok());
    id.ok_or_else(|| BindingError::Network { text: name.to_owned() })
}

fn id<T: std::str::FromStr<Err = IdError>>(column: &'static str, text: &str) -> Result<T, BindingError> {
    text.parse().map_err(|source| BindingError::Id { column, source })
}

#[cfg(test)]
mod tests;
