//! Which tables and columns are read, and what can be wrong in them.

use std::str::FromStr;

use ovsdb_client::{ColumnKind, Row, TableSchema, map_value};

use crate::ids::{IdError, InstanceId};

pub(super) const INTERFACE: &str = "Interface";
pub(super) const PORT: &str = "Port";
pub(super) const BRIDGE: &str = "Bridge";

/// What is asked of the server.
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

/// Why a row that names an instance says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// An identifier is none.
    #[error("{column}:{key}: {source}")]
    BadId {
        /// The column.
        column: &'static str,
        /// The key in it.
        key: &'static str,
        /// Why.
        source: IdError,
    },
    /// os-vif and libvirt name different instances.
    #[error("external_ids names two instances, {os_vif} (vm-uuid) and {libvirt} (vm-id)")]
    TwoInstances {
        /// The one of `vm-uuid`.
        os_vif: InstanceId,
        /// The one of `vm-id`.
        libvirt: InstanceId,
    },
    /// Several ports hold the interface, and they are on different networks.
    #[error("is in ports of different networks")]
    TwoNetworks,
    /// The tag of a subport's port is one that no VLAN can have.
    #[error("has the tag {tag} on its trunk's bridge, which is not a VLAN id: 1 to 4094")]
    BadTag {
        /// The tag.
        tag: i64,
    },
    /// The bridge of a trunk has interfaces of several guests.
    #[error("is on the bridge of a trunk with more than one parent")]
    TwoParents,
}

/// The identifier under a key of a column of texts by text.
pub(super) fn id<T: FromStr<Err = IdError>>(
    row: &Row,
    column: &'static str,
    key: &'static str,
) -> Result<Option<T>, RowError> {
    map_value(row, column, key).map(|text| parse(column, key, text)).transpose()
}

/// The same of a text that was read before.
pub(super) fn parse<T: FromStr<Err = IdError>>(
    column: &'static str,
    key: &'static str,
    text: &str,
) -> Result<T, RowError> {
    text.parse().map_err(|source| RowError::BadId { column, key, source })
}
