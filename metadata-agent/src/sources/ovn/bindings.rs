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
//! Neutron lists a port's allowed address pairs with another MAC address among those of `mac`, without IP addresses; the set
//! has no order. Where that leaves several, none is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::rows;
use crate::ids::{IdError, InstanceId, MacAddress, NetworkId, PortId};
use crate::inventory::{DeviceOwner, Facts, Tenant};
use crate::ovsdb::{Form, Kind, Monitor, Replica, Row, Table, UpdateError, entry, text, texts};

pub(super) const DATABASE: &str = "OVN_Southbound";
const TABLE: &str = "Port_Binding";
const TABLES: &[Table] = &[Table {
    name: TABLE,
    columns: &[
        ("logical_port", Kind::One),
        ("type", Kind::One),
        ("parent_port", Kind::One),
        ("mac", Kind::Set),
        ("external_ids", Kind::Map),
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
    pub(super) fn apply(&mut self, form: Form, update: &Value) -> Result<(), UpdateError> {
        self.replica.apply(form, update).map(drop)
    }

    /// What the rows of these ports say. A row may be there still, or already, that is of none of them.
    pub(super) fn read(&self, ports: &BTreeSet<PortId>) -> BTreeMap<Uuid, Reading> {
        let is_here = |name: &str| name.parse().is_ok_and(|port| ports.contains(&port));
        let rows = self.replica.rows(TABLE).filter_map(|(uuid, row)| {
            let name = text(row, "logical_port");
            let reading = match text(row, "parent_port") {
                "" if is_here(name) => read(name, row),
                "" => return None,
                parent if is_here(parent) || is_here(name) => Reading::Nobodys,
                _ => return None,
            };
            Some((uuid, reading))
        });
        rows.collect()
    }
}

fn read(name: &str, row: &Row) -> Reading {
    match facts(name, row) {
        Ok(facts) => Reading::Port(facts),
        Err(error) => Reading::Fault { name: name.to_owned(), error },
    }
}

fn facts(name: &str, row: &Row) -> Result<Facts, RowError> {
    let told = |key| entry(row, "external_ids", key).filter(|text| !text.is_empty());
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
    Ok(Facts {
        id: Some(id("logical_port", name)?),
        tenant: instance.map(|instance| Tenant { instance, project: None }),
        device_owner: owner.filter(|owner| is_guests || !owner.is_instance()),
        port_project: project,
        network: told("neutron:network_name").map(network).transpose()?,
        mac,
        fixed_ips: cidrs.unwrap_or(addresses),
        ..Facts::default()
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
