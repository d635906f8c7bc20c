//! Monitored tables and columns, and errors in their rows.

use std::str::FromStr;

use ovsdb_client::{ColumnKind, Row, TableSchema, map_value};

use crate::ids::{IdError, InstanceId};

pub(super) const INTERFACE: &str = "Interface";
pub(super) const PORT: &str = "Port";
pub(super) const BRIDGE: &str = "Bridge";

/// Tables and columns to monitor.
pub(super) const TABLES: &[TableSchema] = &[
    TableSchema {
        name: INTERFACE,
        columns: &[
            ("name", ColumnKind::Optional),
            ("type", ColumnKind::Optional),
            ("external_ids", ColumnKind::Map),
            ("options", ColumnKind::Map),
            ("ifindex", ColumnKind::Optional),
        ],
    },
    TableSchema {
        name: PORT,
        columns: &[
            ("interfaces", ColumnKind::Set),
            ("other_config", ColumnKind::Map),
            ("tag", ColumnKind::Optional),
        ],
    },
    TableSchema { name: BRIDGE, columns: &[("name", ColumnKind::Optional), ("ports", ColumnKind::Set)] },
];

/// Error in a row that belongs to a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InterfaceError {
    #[error("{column}:{key}: {source}")]
    Id { column: &'static str, key: &'static str, source: IdError },
    /// os-vif and libvirt name different instances.
    #[error("external_ids names two instances, {os_vif} (vm-uuid) and {libvirt} (vm-id)")]
    SeveralInstances { os_vif: InstanceId, libvirt: InstanceId },
    /// The interface is in several ports with different networks.
    #[error("belongs to ports of different networks")]
    SeveralNetworks,
    #[error("has tag {tag} on the trunk bridge, which is not a VLAN id (1 to 4094)")]
    Tag { tag: i64 },
    /// The trunk bridge has several guest interfaces.
    #[error("is on a trunk bridge with more than one parent")]
    SeveralParents,
}

/// Parses the identifier under a key of a map column.
pub(super) fn id<T: FromStr<Err = IdError>>(
    row: &Row,
    column: &'static str,
    key: &'static str,
) -> Result<Option<T>, InterfaceError> {
    map_value(row, column, key).map(|text| parse(column, key, text)).transpose()
}

/// Parses an identifier, naming its column and key in errors.
pub(super) fn parse<T: FromStr<Err = IdError>>(
    column: &'static str,
    key: &'static str,
    text: &str,
) -> Result<T, InterfaceError> {
    text.parse().map_err(|source| InterfaceError::Id { column, key, source })
}
