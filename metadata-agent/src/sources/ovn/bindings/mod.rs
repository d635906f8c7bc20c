//! What the rows of OVN's table `Port_Binding` say of the ports on this host.
//!
//! | fact | from (written by Neutron's OVN driver and copied from the Northbound database by northd) |
//! |---|---|
//! | port id | `logical_port` |
//! | device owner | `external_ids:neutron:device_owner` |
//! | instance | `external_ids:neutron:device_id`, where the device owner is `compute:*` |
//! | the port's project | `external_ids:neutron:project_id` |
//! | network | `external_ids:neutron:network_name`, which is `neutron-` and the network's id |
//! | fixed IPs | `external_ids:neutron:cidrs`, else those that stand behind the MAC address |
//! | MAC address | `mac`: of `MAC IP...`, `MAC` and `unknown` the MAC address that has IP addresses behind it, or the only one there is |
//!
//! A row with `parent_port` and `tag` is of a trunk's subport: a VLAN on the interface of that port. It is told as such, and
//! of whom it is follows from its parent. One whose tag is not chosen yet is nobody's.
//!
//! Neutron lists a port's allowed address pairs with another MAC address among those of `mac`, without IP addresses; the set
//! has no order. Where that leaves several, none is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovsdb_client::{
    ColumnKind, Monitor, Replica, Row, TableSchema, UpdateError, UpdateFormat, integer, map_value, text,
    texts,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::rows;
use crate::ids::{IdError, InstanceId, MacAddress, NetworkId, PortId, VlanId};
use crate::inventory::{DeviceOwner, PortRecord, Tenant, TrunkBinding};

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

/// Where a name of a network of Neutron's begins.
const NETWORK: &str = "neutron-";

/// Why a row says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// An identifier is none.
    #[error("{column}: {source}")]
    BadId {
        /// The column, and the key in it.
        column: &'static str,
        /// Why.
        source: IdError,
    },
    /// Not the name that Neutron gives to a network.
    #[error("external_ids:neutron:network_name: `{text}` is not neutron- and a network's id")]
    BadNetwork {
        /// What is there.
        text: String,
    },
    /// A tag that no VLAN can have.
    #[error("tag: {tag} is not a VLAN id: 1 to 4094")]
    BadTag {
        /// What is there.
        tag: i64,
    },
    /// Not an address of a port.
    #[error("{column}: `{text}` is not an IP address")]
    BadAddress {
        /// The column, and the key in it.
        column: &'static str,
        /// What is there.
        text: String,
    },
}

/// What a row says now; a fault bears the logical port's name.
pub(super) type Reading = rows::Reading<RowError>;

/// The condition on which a row is monitored: that it is of one of these ports, or of a VLAN on one.
pub(super) fn clauses(ports: &BTreeSet<PortId>) -> Value {
    if ports.is_empty() {
        return json!([false]);
    }
    let clause = |column: &str, port: &PortId| json!([column, "==", port.to_string()]);
    ports.iter().flat_map(|port| [clause("logical_port", port), clause("parent_port", port)]).collect()
}

/// The rows as they are now.
#[derive(Debug)]
pub(super) struct Bindings {
    replica: Replica,
}

impl Bindings {
    pub(super) fn new() -> Self {
        Self { replica: Replica::new(TABLES) }
    }

    /// Takes an update in.
    pub(super) fn apply(&mut self, format: UpdateFormat, update: &Value) -> Result<(), UpdateError> {
        self.replica.apply(format, update).map(drop)
    }

    /// What the rows of these ports say, and those of VLANs on them. A row may be there still, or already, that is of none
    /// of them.
    pub(super) fn read(&self, ports: &BTreeSet<PortId>) -> BTreeMap<Uuid, Reading> {
        let here = |name: &str| name.parse().ok().filter(|port| ports.contains(port));
        let rows = self.replica.rows(TABLE).filter_map(|(uuid, row)| {
            let name = text(row, "logical_port");
            let reading = match (text(row, "parent_port"), integer(row, "tag")) {
                ("", _) if here(name).is_some() => read(name, facts(name, row)),
                ("", _) => return None,
                (parent, tag) => match (here(parent), tag) {
                    (Some(parent), Some(tag)) => read(name, subport(name, row, parent, tag)),
                    (Some(_), None) => Reading::Nobodys,
                    (None, _) if here(name).is_some() => Reading::Nobodys,
                    (None, _) => return None,
                },
            };
            Some((uuid, reading))
        });
        rows.collect()
    }
}

fn read(name: &str, facts: Result<PortRecord, RowError>) -> Reading {
    match facts {
        Ok(facts) => Reading::Port(facts),
        Err(error) => Reading::Fault { name: name.to_owned(), error },
    }
}

/// What the row of a VLAN says: where it is, and its addresses.
fn subport(name: &str, row: &Row, parent: PortId, tag: i64) -> Result<PortRecord, RowError> {
    let vlan = u64::try_from(tag).ok().and_then(|tag| VlanId::try_from(tag).ok());
    let vlan = vlan.ok_or(RowError::BadTag { tag })?;
    let PortRecord { id, network, mac, fixed_ips, .. } = facts(name, row)?;
    Ok(PortRecord {
        id,
        seat: Some(TrunkBinding { parent, vlan }),
        network,
        mac,
        fixed_ips,
        ..PortRecord::default()
    })
}

fn facts(name: &str, row: &Row) -> Result<PortRecord, RowError> {
    let told = |key| map_value(row, "external_ids", key).filter(|text| !text.is_empty());
    let owner = told("neutron:device_owner").and_then(DeviceOwner::new);
    // Any other type is OVN's own: `router`, `localport`, `virtual`. `external` is a guest beyond the reach of OVN.
    let is_guests = matches!(text(row, "type"), "" | "external");
    let instance = match told("neutron:device_id") {
        Some(text) if is_guests && owner.as_ref().is_some_and(DeviceOwner::is_instance) => {
            Some(id::<InstanceId>("external_ids:neutron:device_id", text)?)
        }
        Some(_) | None => None,
    };
    let project = told("neutron:project_id");
    let project = project.map(|text| id("external_ids:neutron:project_id", text)).transpose()?;
    let (mac, addresses) = own_mac(texts(row, "mac"))?;
    let cidrs = told("neutron:cidrs").map(fixed_ips).transpose()?;
    Ok(PortRecord {
        id: Some(id("logical_port", name)?),
        tenant: instance.map(|instance| Tenant { instance, project: None }),
        device_owner: owner.filter(|owner| is_guests || !owner.is_instance()),
        port_project: project,
        network: told("neutron:network_name").map(network).transpose()?,
        mac,
        fixed_ips: cidrs.unwrap_or(addresses),
        ..PortRecord::default()
    })
}

/// The MAC address of a port's own, and the IP addresses behind it.
fn own_mac<'a>(
    entries: impl Iterator<Item = &'a str>,
) -> Result<(Option<MacAddress>, Vec<IpAddr>), RowError> {
    let mut macs = BTreeMap::<MacAddress, Vec<IpAddr>>::new();
    for entry in entries {
        let mut words = entry.split_ascii_whitespace();
        // Nothing is known of the one; the other is of a router or still to be chosen (ovn-nb(5), `addresses`).
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

/// The addresses of `10.0.0.5/24 fd00::5/64`.
fn fixed_ips(cidrs: &str) -> Result<Vec<IpAddr>, RowError> {
    let addresses = cidrs.split_ascii_whitespace().map(|cidr| {
        let text = cidr.split_once('/').map_or(cidr, |(address, _prefix)| address);
        address("external_ids:neutron:cidrs", text)
    });
    addresses.collect()
}

fn address(column: &'static str, text: &str) -> Result<IpAddr, RowError> {
    text.parse().map_err(|_| RowError::BadAddress { column, text: text.to_owned() })
}

fn network(name: &str) -> Result<NetworkId, RowError> {
    let id = name.strip_prefix(NETWORK).and_then(|id| id.parse().ok());
    id.ok_or_else(|| RowError::BadNetwork { text: name.to_owned() })
}

fn id<T: std::str::FromStr<Err = IdError>>(column: &'static str, text: &str) -> Result<T, RowError> {
    text.parse().map_err(|source| RowError::BadId { column, source })
}

#[cfg(test)]
mod tests;
