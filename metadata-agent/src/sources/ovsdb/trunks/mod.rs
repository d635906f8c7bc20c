//! Subports of trunks, as Neutron's OVS agent connects them
//! (neutron/services/trunk/drivers/openvswitch/agent/trunk_manager.py).
//!
//! ```text
//!   tbr-<trunk>                                              br-int
//!     tap<parent>   external_ids:iface-id = the parent
//!     tpt-<parent>  ------ patch ------   tpi-<parent>   external_ids:iface-id = the parent
//!                                                        Port.other_config:net_uuid = its network
//!     spt-<subport> ------ patch ------   spi-<subport>  external_ids:iface-id = the subport
//!       Port.tag = the VLAN                              Port.other_config:net_uuid = its network
//! ```
//!
//! The row of `spi-` reports a subport once the whole path to the parent exists: patch ports that
//! name each other, a tag, and one guest interface on the trunk's bridge. The result depends on the
//! present rows only, not on the order of updates. Trunks are few, so all are read again with every
//! change.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ovsdb_client::{Replica, Row, RowChange, integer, map_value, references, text};
use uuid::Uuid;

use super::schema::{BRIDGE, INTERFACE, InterfaceError, PORT, id, parse};
use crate::ids::{PortId, VlanId};
use crate::inventory::{PortAddressing, PortRecord, TrunkBinding};

const TRUNK_BRIDGE: &str = "tbr-";
const SUBPORT: &str = "spi-";
const PARENT: &str = "tpi-";

/// Rows that belong to trunks.
#[derive(Debug, Default)]
pub(super) struct Trunks {
    bridges: BTreeSet<Uuid>,
    subports: BTreeSet<Uuid>,
    /// Patch ports that connect parents to the integration bridge.
    parents: BTreeSet<Uuid>,
}

/// Patch port on the trunk's bridge.
struct TrunkPatch<'a> {
    peer: Option<&'a str>,
    tag: Option<i64>,
    bridge: Uuid,
}

impl Trunks {
    /// Applies a change of a row.
    pub(super) fn apply(&mut self, change: &RowChange, replica: &Replica) {
        let row = replica.row(change.table, change.row);
        let keep = |rows: &mut BTreeSet<Uuid>, is_one: bool| {
            if is_one {
                rows.insert(change.row);
            } else {
                rows.remove(&change.row);
            }
        };
        match change.table {
            BRIDGE => {
                let is_trunk = row.is_some_and(|row| text(row, "name").starts_with(TRUNK_BRIDGE));
                keep(&mut self.bridges, is_trunk);
            }
            INTERFACE => {
                keep(&mut self.subports, row.is_some_and(|row| is_patch(row, SUBPORT)));
                keep(&mut self.parents, row.is_some_and(|row| is_patch(row, PARENT)));
            }
            _ => {}
        }
    }

    /// Returns the interfaces on the bridges of trunks.
    pub(super) fn interfaces(&self, replica: &Replica) -> BTreeSet<Uuid> {
        let bridges = self.bridges.iter().filter_map(|bridge| replica.row(BRIDGE, *bridge));
        let ports =
            bridges.flat_map(|row| references(row, "ports")).filter_map(|port| replica.row(PORT, port));
        ports.flat_map(|port| references(port, "interfaces")).collect()
    }

    /// Returns the patch port that connects a parent to the integration bridge.
    pub(super) fn patch_of(&self, parent: PortId, replica: &Replica) -> Option<Uuid> {
        let mut rows = self.parents.iter().filter_map(|row| Some((*row, replica.row(INTERFACE, *row)?)));
        let id = |row| map_value(row, "external_ids", "iface-id").and_then(|id| id.parse::<PortId>().ok());
        rows.find(|(_, row)| id(row) == Some(parent)).map(|(uuid, _)| uuid)
    }

    /// Returns the interface, the name and the record of each subport. The record is `None` while
    /// its position is not known, and it lacks the network.
    pub(super) fn read(
        &self,
        replica: &Replica,
    ) -> BTreeMap<Uuid, (String, Result<Option<PortRecord>, InterfaceError>)> {
        if self.subports.is_empty() {
            return BTreeMap::new();
        }
        // Collect the patch ports and guest interfaces on the bridges of trunks.
        let mut ends = HashMap::new();
        let mut parents = BTreeMap::new();
        for bridge in &self.bridges {
            let ports = replica.row(BRIDGE, *bridge).into_iter().flat_map(|row| references(row, "ports"));
            for port in ports.filter_map(|port| replica.row(PORT, port)) {
                let tag = integer(port, "tag");
                for row in references(port, "interfaces").filter_map(|one| replica.row(INTERFACE, one)) {
                    match (text(row, "type"), map_value(row, "external_ids", "iface-id")) {
                        ("patch", _) => {
                            let end =
                                TrunkPatch { peer: map_value(row, "options", "peer"), tag, bridge: *bridge };
                            ends.insert(text(row, "name"), end);
                        }
                        ("internal", _) | (_, None) => {}
                        (_, Some(parent)) => {
                            parents.entry(*bridge).or_insert_with(BTreeSet::new).insert(parent);
                        }
                    }
                }
            }
        }
        // Follow each subport's patch port to its trunk.
        let rows = self.subports.iter().filter_map(|row| Some((*row, replica.row(INTERFACE, *row)?)));
        let read = rows.map(|(uuid, row)| {
            let name = text(row, "name");
            let end = map_value(row, "options", "peer").and_then(|peer| ends.get(peer));
            let record = end.filter(|end| end.peer == Some(name)).and_then(|end| {
                let parents = parents.get(&end.bridge)?;
                Some(subport(row, end.tag?, parents))
            });
            (uuid, (name.to_owned(), record.transpose()))
        });
        read.collect()
    }
}

fn is_patch(row: &Row, prefix: &str) -> bool {
    text(row, "type") == "patch" && text(row, "name").starts_with(prefix)
}

fn subport(row: &Row, tag: i64, parents: &BTreeSet<&str>) -> Result<PortRecord, InterfaceError> {
    let parent: PortId = match parents.iter().collect::<Vec<_>>().as_slice() {
        [parent] => parse("external_ids", "iface-id", parent)?,
        _ => return Err(InterfaceError::SeveralParents),
    };
    let vlan = u64::try_from(tag).ok().and_then(|tag| VlanId::try_from(tag).ok());
    let trunk = TrunkBinding { parent, vlan: vlan.ok_or(InterfaceError::Tag { tag })? };
    Ok(PortRecord {
        id: id(row, "external_ids", "iface-id")?,
        trunk: Some(trunk),
        addressing: PortAddressing {
            mac: id(row, "external_ids", "attached-mac")?,
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    })
}

#[cfg(test)]
mod tests;
