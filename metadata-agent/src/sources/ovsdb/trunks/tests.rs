//! A trunk with one subport, row by row.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::super::row_tracker::RowState;
use super::super::interfaces::{InterfaceState, Interfaces};
use super::*;
use ovsdb_client::UpdateFormat;

const PARENT: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
const SUBPORT_ID: &str = "b1b2b3b4-77c1-4e55-9d0c-2b6f4f1f0a02";
const NETWORK: &str = "b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f";
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

const TAP: u128 = 1;
const TRUNK_END: u128 = 2;
const INT_END: u128 = 3;
const BRIDGE_ROW: u128 = 7;
const TRUNK_PORT: u128 = 5;

fn refer(row: u128) -> Value {
    json!(["uuid", Uuid::from_u128(row).to_string()])
}

fn patch(name: &str, peer: &str) -> Value {
    let ids = [("iface-id", SUBPORT_ID), ("attached-mac", "fa:16:3e:11:22:33")];
    json!({
        "name": name, "type": "patch", "options": ["map", [["peer", peer]]], "external_ids": ["map", ids],
    })
}

/// Every relevant row: table, row, columns.
fn rows() -> Vec<(&'static str, u128, Value)> {
    let tap = [("iface-id", PARENT), ("iface-status", "active"), ("vm-uuid", INSTANCE)];
    vec![
        (INTERFACE, TAP, json!({ "name": "tap3f2a9d10-77", "external_ids": ["map", tap] })),
        (INTERFACE, TRUNK_END, patch("spt-b1b2b3b4-77", "spi-b1b2b3b4-77")),
        (INTERFACE, INT_END, patch("spi-b1b2b3b4-77", "spt-b1b2b3b4-77")),
        (PORT, 4, json!({ "interfaces": refer(TAP) })),
        (PORT, TRUNK_PORT, json!({ "interfaces": refer(TRUNK_END), "tag": 7 })),
        (PORT, 6, json!({ "interfaces": refer(INT_END), "other_config": ["map", [["net_uuid", NETWORK]]] })),
        (
            BRIDGE,
            BRIDGE_ROW,
            json!({ "name": "tbr-0a0b0c0d-7", "ports": ["set", [refer(4), refer(TRUNK_PORT)]] }),
        ),
    ]
}

/// Database, and the last state of its subport.
struct Database {
    interfaces: Interfaces,
    state: InterfaceState,
}

impl Database {
    fn new() -> Self {
        Self { interfaces: Interfaces::new(), state: RowState::Deleted }
    }

    fn complete() -> Self {
        let mut database = Self::new();
        for (table, row, columns) in rows() {
            database.apply(table, row, &json!({ "insert": columns }));
        }
        assert_eq!(database.state, RowState::Port(subport_record()));
        database
    }

    fn apply(&mut self, table: &str, row: u128, action: &Value) {
        let update = json!({ table: { Uuid::from_u128(row).to_string(): action } });
        let mut states = self.interfaces.apply(UpdateFormat::Differences, &update).unwrap();
        if let Some(state) = states.remove(&Uuid::from_u128(INT_END)) {
            self.state = state;
        }
    }
}

fn subport_record() -> PortRecord {
    PortRecord {
        id: Some(SUBPORT_ID.parse().unwrap()),
        trunk: Some(TrunkBinding { parent: PARENT.parse().unwrap(), vlan: VlanId::try_from(7).unwrap() }),
        addressing: PortAddressing {
            network: Some(NETWORK.parse().unwrap()),
            mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    }
}

proptest! {
    #[test]
    fn the_order_of_rows_does_not_matter(order in Just(rows()).prop_shuffle(), way in Just(rows()).prop_shuffle()) {
        let mut database = Database::new();
        for (table, row, columns) in order {
            prop_assert_ne!(&database.state, &RowState::Port(subport_record()));
            database.apply(table, row, &json!({ "insert": columns }));
        }
        prop_assert_eq!(&database.state, &RowState::Port(subport_record()));
        for (table, row, _) in way {
            database.apply(table, row, &json!({ "delete": null }));
            prop_assert_ne!(&database.state, &RowState::Port(subport_record()));
        }
        prop_assert_eq!(database.state, RowState::Deleted);
    }
}

#[test]
fn a_change_on_the_path_is_noticed() {
    let mut database = Database::complete();
    database.apply(PORT, TRUNK_PORT, &json!({ "modify": { "tag": 8 } }));
    let RowState::Port(PortRecord { trunk: Some(trunk), .. }) = &database.state else {
        panic!("{:?}", database.state)
    };
    assert_eq!(trunk.vlan.get(), 8);
    database.apply(PORT, TRUNK_PORT, &json!({ "modify": { "tag": ["set", []] } }));
    assert_eq!(database.state, RowState::Ignored, "the agent has not written the tag yet");

    let mut database = Database::complete();
    database.apply(INTERFACE, TRUNK_END, &json!({ "modify": { "options": ["map", [["peer", "another"]]] } }));
    assert_eq!(database.state, RowState::Ignored, "the patch ports do not name each other");
    let mut database = Database::complete();
    database.apply(BRIDGE, BRIDGE_ROW, &json!({ "modify": { "name": "br-other" } }));
    assert_eq!(database.state, RowState::Ignored, "the bridge does not belong to a trunk");
}

#[test]
fn an_invalid_path_is_an_error_of_the_subport() {
    let error_of = |database: Database| {
        let RowState::Invalid { name, error } = database.state else { panic!("{:?}", database.state) };
        assert_eq!(name, "spi-b1b2b3b4-77");
        error.to_string()
    };
    let mut database = Database::complete();
    database.apply(PORT, TRUNK_PORT, &json!({ "modify": { "tag": 4095 } }));
    assert!(error_of(database).contains("tag 4095"));
    let mut database = Database::complete();
    database.apply(
        INTERFACE,
        INT_END,
        &json!({ "modify": { "external_ids": ["map", [["iface-id", "port1"]]] } }),
    );
    assert!(error_of(database).contains("`port1` is not a UUID"));

    let mut database = Database::complete();
    let ids = [("iface-id", SUBPORT_ID)];
    database.apply(INTERFACE, 9, &json!({ "insert": { "name": "tap9", "external_ids": ["map", ids] } }));
    database.apply(PORT, 8, &json!({ "insert": { "interfaces": refer(9) } }));
    database.apply(BRIDGE, BRIDGE_ROW, &json!({ "modify": { "ports": refer(8) } }));
    assert!(error_of(database).contains("more than one parent"));
}

#[test]
fn the_parent_of_a_trunk_has_the_network_of_its_patch_port() {
    let ids = [("iface-id", PARENT), ("attached-mac", "fa:16:3e:11:22:33")];
    let patch = json!({ "name": "tpi-3f2a9d10-77", "type": "patch", "external_ids": ["map", ids] });
    let mut all = rows();
    all.push((INTERFACE, 8, patch));
    all.push((PORT, 9, json!({ "interfaces": refer(8), "other_config": ["map", [["net_uuid", PARENT]]] })));
    // Each row is last once.
    for last in 0..all.len() {
        let mut interfaces = Interfaces::new();
        let mut apply = |(table, row, columns): &(&str, u128, Value)| {
            let row = Uuid::from_u128(*row).to_string();
            interfaces
                .apply(UpdateFormat::Differences, &json!({ *table: { row: { "insert": columns } } }))
                .unwrap()
        };
        let others = all.iter().enumerate().filter(|(place, _)| *place != last);
        others.for_each(|(_, row)| drop(apply(row)));
        let mut states = apply(&all[last]);
        let Some(RowState::Port(record)) = states.remove(&Uuid::from_u128(TAP)) else { panic!("{last}") };
        assert_eq!(record.addressing.network, Some(PARENT.parse().unwrap()), "{last}");

        let row = Uuid::from_u128(9).to_string();
        let without =
            json!({ PORT: { row: { "modify": { "other_config": ["map", [["net_uuid", PARENT]]] } } } });
        let states = interfaces.apply(UpdateFormat::Differences, &without).unwrap();
        let Some(RowState::Port(record)) = states.get(&Uuid::from_u128(TAP)) else { panic!("{last}") };
        assert_eq!(record.addressing.network, None, "{last}");
    }
}
