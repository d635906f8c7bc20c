//! Ports of this host from the rows of OVN's table `Port_Binding`.
//!
//! | field | source, written by Neutron's OVN driver and copied from the Northbound database by northd |
//! |---|---|
//! | port id | `logical_port` |
//! | device owner | `external_ids:neutron:device_owner`; for a port that is internal to OVN, its `type` |
//! | instance | `external_ids:neutron:device_id`, if the device owner is `compute:*` |
//! | the port's project | `external_ids:neutron:project_id` |
//! | network | `external_ids:neutron:network_name`, which is `neutron-` and the network's id |
//! | fixed IPs | `external_ids:neutron:cidrs`, or else the addresses after the MAC address |
//! | MAC address | `mac`: of `MAC IP...`, `MAC` and `unknown` the MAC address with IP addresses, or the only one |
//! | allowed sources | `port_security`: of each entry the MAC address with the addresses after it, or with any address; of no entry, any source |
//!
//! The column `port_security` exists since OVN 22.09. In an older database only logical flows
//! contain the port's security, so nothing is reported about it.
//!
//! A row with `parent_port` and `tag` is a subport of a trunk: a VLAN on the interface of that
//! port. It belongs to its parent's instance. A row without a tag yet is ignored.
//!
//! Neutron also adds the MAC addresses of allowed address pairs to `mac`, without IP addresses, and
//! the set has no order. If several candidates remain, no MAC address is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovsdb_client::{
    ColumnKind, Monitor, Replica, Row, Session, SessionError, TableSchema, UpdateError, UpdateFormat,
    integer, map_value, text, texts,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::row_tracker::RowState;
use crate::ids::{IdError, InstanceId, MacAddress, NetworkId, PortId, VlanId};
use crate::inventory::{
    AllowedSource, DeviceOwner, PortAddressing, PortRecord, SourcePolicy, Tenant, TrunkBinding,
};

pub(super) const DATABASE: &str = "OVN_Southbound";
const TABLE: &str = "Port_Binding";
const PORT_SECURITY: &str = "port_security";
/// The columns, the one that came last at the end.
const COLUMNS: &[(&str, ColumnKind)] = &[
    ("logical_port", ColumnKind::Optional),
    ("type", ColumnKind::Optional),
    ("parent_port", ColumnKind::Optional),
    ("tag", ColumnKind::Optional),
    ("mac", ColumnKind::Set),
    ("external_ids", ColumnKind::Map),
    (PORT_SECURITY, ColumnKind::Set),
];
const TABLES: &[TableSchema] = &[TableSchema { name: TABLE, columns: COLUMNS }];
const TABLES_BEFORE_22_09: &[TableSchema] =
    &[TableSchema { name: TABLE, columns: COLUMNS.split_at(COLUMNS.len() - 1).0 }];

pub(super) const MONITOR: Monitor = Monitor { database: DATABASE, id: "metadata-agent", tables: TABLES };
const MONITOR_BEFORE_22_09: Monitor = Monitor { tables: TABLES_BEFORE_22_09, ..MONITOR };

/// Types of ports that are never a guest's: OVN's metadata agent, routers, and connections to other
/// networks and switches. A `virtual` port can be a guest's whose address another port may use, and
/// a `remote` one is a guest's in another availability zone.
const INTERNAL_TYPES: [&str; 8] =
    ["localport", "router", "patch", "l3gateway", "chassisredirect", "l2gateway", "localnet", "vtep"];

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

/// Rows that a server sends first.
#[derive(Debug)]
pub(super) struct InitialRows {
    rows: Value,
    port_security: PortSecurityColumn,
}

/// State of the column `port_security` in a server's database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PortSecurityColumn {
    Present,
    /// OVN before 22.09.
    Missing,
}

impl InitialRows {
    /// Monitors the rows of these ports.
    ///
    /// # Errors
    /// The server refuses, or does not reply.
    pub(super) async fn request(
        session: &mut Session,
        ports: &BTreeSet<PortId>,
    ) -> Result<Self, SessionError> {
        let clauses = clauses(ports);
        match session.monitor_where(MONITOR, &clauses).await {
            Err(SessionError::Refused { error, .. }) if error.contains(PORT_SECURITY) => {
                let rows = session.monitor_where(MONITOR_BEFORE_22_09, &clauses).await?;
                Ok(Self { rows, port_security: PortSecurityColumn::Missing })
            }
            rows => Ok(Self { rows: rows?, port_security: PortSecurityColumn::Present }),
        }
    }
}

/// Copy of the monitored rows.
#[derive(Debug)]
pub(super) struct Bindings {
    replica: Replica,
    port_security: PortSecurityColumn,
}

impl Bindings {
    pub(super) fn new() -> Self {
        Self { replica: Replica::new(TABLES), port_security: PortSecurityColumn::Missing }
    }

    /// Creates a copy of a server's first rows.
    ///
    /// # Errors
    /// The rows are invalid.
    pub(super) fn from_initial(initial: &InitialRows) -> Result<Self, UpdateError> {
        let mut bindings = Self { port_security: initial.port_security, ..Self::new() };
        bindings.apply(UpdateFormat::Differences, &initial.rows)?;
        Ok(bindings)
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
                ("", _) if local(name).is_some() => row_state(name, self.record(name, row)),
                ("", _) => return None,
                (parent, tag) => match (local(parent), tag) {
                    (Some(parent), Some(tag)) => row_state(name, self.subport(name, row, parent, tag)),
                    (Some(_), None) => RowState::Ignored,
                    (None, _) if local(name).is_some() => RowState::Ignored,
                    (None, _) => return None,
                },
            };
            Some((uuid, state))
        });
        rows.collect()
    }

    /// Reads the row of a subport.
    fn subport(&self, name: &str, row: &Row, parent: PortId, tag: i64) -> Result<PortRecord, BindingError> {
        let vlan = u64::try_from(tag).ok().and_then(|tag| VlanId::try_from(tag).ok());
        let vlan = vlan.ok_or(BindingError::Tag { tag })?;
        let PortRecord { id, addressing, .. } = self.record(name, row)?;
        Ok(PortRecord { id, trunk: Some(TrunkBinding { parent, vlan }), addressing, ..PortRecord::default() })
    }

    fn record(&self, name: &str, row: &Row) -> Result<PortRecord, BindingError> {
        let value = |key| map_value(row, "external_ids", key).filter(|text| !text.is_empty());
        let owner = value("neutron:device_owner").and_then(DeviceOwner::new);
        // Other types do not name an instance. `external` is a guest that OVN does not connect
        // itself.
        let kind = text(row, "type");
        let is_guests = matches!(kind, "" | "external");
        let instance = match value("neutron:device_id") {
            Some(text) if is_guests && owner.as_ref().is_some_and(DeviceOwner::is_instance) => {
                Some(id::<InstanceId>("external_ids:neutron:device_id", text)?)
            }
            Some(_) | None => None,
        };
        // Neutron's word is more precise, unless it contradicts the type.
        let owner = owner.filter(|owner| is_guests || !owner.is_instance());
        let owner =
            owner.or_else(|| INTERNAL_TYPES.contains(&kind).then(|| DeviceOwner::from_ovn_type(kind)));
        let project = value("neutron:project_id");
        let project = project.map(|text| id("external_ids:neutron:project_id", text)).transpose()?;
        let (mac, addresses) = own_mac(texts(row, "mac"))?;
        let cidrs = value("neutron:cidrs").map(fixed_ips).transpose()?;
        Ok(PortRecord {
            id: Some(id("logical_port", name)?),
            tenant: instance.map(|instance| Tenant { instance, project: None }),
            device_owner: owner,
            port_project: project,
            addressing: PortAddressing {
                network: value("neutron:network_name").map(network).transpose()?,
                mac,
                fixed_ips: cidrs.unwrap_or(addresses),
                allowed_sources: self.allowed_sources(row),
                ..PortAddressing::default()
            },
            ..PortRecord::default()
        })
    }

    /// Returns the sources that the port may send from; `None` if the column is missing or an entry
    /// has another form (ovn-nb(5), `port_security`), so that no guest is refused because of it.
    fn allowed_sources(&self, row: &Row) -> Option<SourcePolicy> {
        if self.port_security == PortSecurityColumn::Missing {
            return None;
        }
        let entries: Vec<_> = texts(row, PORT_SECURITY).map(allowed_by).collect::<Option<_>>()?;
        let sources: BTreeSet<_> = entries.into_iter().flatten().collect();
        Some(if sources.is_empty() { SourcePolicy::Any } else { SourcePolicy::Only(sources) })
    }
}

fn row_state(name: &str, record: Result<PortRecord, BindingError>) -> BindingState {
    match record {
        Ok(record) => RowState::Port(record),
        Err(error) => RowState::Invalid { name: name.to_owned(), error },
    }
}

/// Parses `MAC` or `MAC IP[/LENGTH]...`. A MAC address alone may be used with any address.
fn allowed_by(entry: &str) -> Option<Vec<AllowedSource>> {
    let mut words = entry.split_ascii_whitespace();
    let mac = words.next()?.parse().ok()?;
    let sources: Vec<_> =
        words.map(|word| Some(AllowedSource { mac, prefix: word.parse().ok()? })).collect::<Option<_>>()?;
    Some(if sources.is_empty() { AllowedSource::any_address(mac).to_vec() } else { sources })
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
