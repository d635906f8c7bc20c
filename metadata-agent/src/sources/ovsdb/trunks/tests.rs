//! A trunk with one subport, row by row.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::interfaces::{Interfaces, Reading};
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

/// Every row that matters: table, row, columns.
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

/// A database, and what its subport last said.
struct World {
    interfaces: Interfaces,
    said: Reading,
}

impl World {
    fn new() -> Self {
        Self { interfaces: Interfaces::new(), said: Reading::Gone }
    }

    fn whole() -> Self {
        let mut world = Self::new();
        for (table, row, columns) in rows() {
            world.apply(table, row, &json!({ "insert": columns }));
        }
        assert_eq!(world.said, Reading::Port(seated()));
        world
    }

    fn apply(&mut self, table: &str, row: u128, action: &Value) {
        let update = json!({ table: { Uuid::from_u128(row).to_string(): action } });
        let mut readings = self.interfaces.apply(UpdateFormat::Differences, &update).unwrap();
        if let Some(reading) = readings.remove(&Uuid::from_u128(INT_END)) {
            self.said = reading;
        }
    }
}

fn seated() -> PortRecord {
    PortRecord {
        id: Some(SUBPORT_ID.parse().unwrap()),
        seat: Some(TrunkBinding { parent: PARENT.parse().unwrap(), vlan: VlanId::try_from(7).unwrap() }),
        network: Some(NETWORK.parse().unwrap()),
        mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
        ..PortRecord::default()
    }
}

proptest! {
    #[test]
    fn rows_may_come_and_go_in_any_order(order in Just(rows()).prop_shuffle(), way in Just(rows()).prop_shuffle()) {
        let mut world = World::new();
        for (table, row, columns) in order {
            prop_assert_ne!(&world.said, &Reading::Port(seated()));
            world.apply(table, row, &json!({ "insert": columns }));
        }
        prop_assert_eq!(&world.said, &Reading::Port(seated()));
        for (table, row, _) in way {
            world.apply(table, row, &json!({ "delete": null }));
            prop_assert_ne!(&world.said, &Reading::Port(seated()));
        }
        prop_assert_eq!(world.said, Reading::Gone);
    }
}

#[test]
fn a_change_on_the_way_is_noticed() {
    let mut world = World::whole();
    world.apply(PORT, TRUNK_PORT, &json!({ "modify": { "tag": 8 } }));
    let Reading::Port(PortRecord { seat: Some(seat), .. }) = &world.said else { panic!("{:?}", world.said) };
    assert_eq!(seat.vlan.get(), 8);
    world.apply(PORT, TRUNK_PORT, &json!({ "modify": { "tag": ["set", []] } }));
    assert_eq!(world.said, Reading::Nobodys, "the agent has not written the tag yet");

    let mut world = World::whole();
    world.apply(INTERFACE, TRUNK_END, &json!({ "modify": { "options": ["map", [["peer", "another"]]] } }));
    assert_eq!(world.said, Reading::Nobodys, "patch ports that do not name each other are none");
    let mut world = World::whole();
    world.apply(BRIDGE, BRIDGE_ROW, &json!({ "modify": { "name": "br-other" } }));
    assert_eq!(world.said, Reading::Nobodys, "no bridge of a trunk");
}

#[test]
fn what_cannot_be_understood_is_the_subports_fault() {
    let fault = |world: World| {
        let Reading::Fault { name, error } = world.said else { panic!("{:?}", world.said) };
        assert_eq!(name, "spi-b1b2b3b4-77");
        error.to_string()
    };
    let mut world = World::whole();
    world.apply(PORT, TRUNK_PORT, &json!({ "modify": { "tag": 4095 } }));
    assert!(fault(world).contains("the tag 4095"));
    let mut world = World::whole();
    world.apply(
        INTERFACE,
        INT_END,
        &json!({ "modify": { "external_ids": ["map", [["iface-id", "port1"]]] } }),
    );
    assert!(fault(world).contains("`port1` is not a UUID"));

    let mut world = World::whole();
    let ids = [("iface-id", SUBPORT_ID)];
    world.apply(INTERFACE, 9, &json!({ "insert": { "name": "tap9", "external_ids": ["map", ids] } }));
    world.apply(PORT, 8, &json!({ "insert": { "interfaces": refer(9) } }));
    world.apply(BRIDGE, BRIDGE_ROW, &json!({ "modify": { "ports": refer(8) } }));
    assert!(fault(world).contains("more than one parent"));
}

#[test]
fn the_parent_of_a_trunk_is_on_the_network_of_its_patch_port() {
    let ids = [("iface-id", PARENT), ("attached-mac", "fa:16:3e:11:22:33")];
    let patch = json!({ "name": "tpi-3f2a9d10-77", "type": "patch", "external_ids": ["map", ids] });
    let mut all = rows();
    all.push((INTERFACE, 8, patch));
    all.push((PORT, 9, json!({ "interfaces": refer(8), "other_config": ["map", [["net_uuid", PARENT]]] })));
    // Every row comes last once.
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
        let mut readings = apply(&all[last]);
        let Some(Reading::Port(facts)) = readings.remove(&Uuid::from_u128(TAP)) else { panic!("{last}") };
        assert_eq!(facts.network, Some(PARENT.parse().unwrap()), "{last}");

        let row = Uuid::from_u128(9).to_string();
        let without =
            json!({ PORT: { row: { "modify": { "other_config": ["map", [["net_uuid", PARENT]]] } } } });
        let readings = interfaces.apply(UpdateFormat::Differences, &without).unwrap();
        let Some(Reading::Port(facts)) = readings.get(&Uuid::from_u128(TAP)) else { panic!("{last}") };
        assert_eq!(facts.network, None, "{last}");
    }
}
