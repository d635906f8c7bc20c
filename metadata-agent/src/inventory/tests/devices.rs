//! Look-ups by device name, interface index and MAC address.

use super::*;

#[test]
fn a_port_is_found_by_its_device_or_by_the_name_of_its_tap() {
    let placed = Port { device: device("vnet5"), ..port(Some(PORT), 1) };
    let other = port(Some("aaaaaaaa-bb00-4000-8000-000000000000"), 2);
    let snapshot = snapshot_of([event(SourceKind::StaticFile, "f", [placed.clone(), other.clone()])]);
    assert_eq!(resolve(&snapshot, "vnet5", None), known(&placed));
    assert_eq!(resolve(&snapshot, TAP, None), known(&placed), "as with qvo and tap of one hybrid plug");
    assert_eq!(resolve(&snapshot, "tapaaaaaaaa-bb", None), known(&other));
    assert_eq!(resolve(&snapshot, "tapaaaaaaaa-bc", None), Resolution::Unknown);
    assert_eq!(resolve(&snapshot, "", None), Resolution::Unknown);
    assert_eq!(snapshot.counts(), Counts { ports: 2, disputed: 0, ..Counts::default() });
}

#[test]
fn the_device_takes_precedence_over_the_tap_name() {
    let placed = Port { device: device(TAP), ..port(Some(TWIN), 1) };
    let snapshot = snapshot_of([event(SourceKind::StaticFile, "f", [port(Some(PORT), 2), placed.clone()])]);
    assert_eq!(resolve(&snapshot, TAP, None), known(&placed));
}

#[test]
fn an_interface_with_another_index_is_not_the_ports() {
    let placed = Port { device: device(TAP), ..port(Some(PORT), 1) };
    let indexed = PortRecord { index: Some(IfIndex(7)), ..placed.clone().into() };
    let snapshot = snapshot_of([
        event(SourceKind::Ovsdb, "row", [indexed.clone()]),
        event(SourceKind::Libvirt, "domain", [placed.clone()]),
        event(SourceKind::Neutron, "port", [port(Some(PORT), 1)]),
    ]);
    assert_eq!(resolve_at(&snapshot, TAP, IfIndex(7), None), known(&placed));
    assert_eq!(resolve_at(&snapshot, TAP, IfIndex(8), None), Resolution::Unknown);
    assert_eq!(resolve(&snapshot, TAP, None), known(&placed), "of an interface of another namespace");

    // The row is written again, and its index follows later.
    let mut inventory = Ledger::default();
    inventory.apply(event(SourceKind::Ovsdb, "row", [indexed.clone()]));
    assert_eq!(resolve_at(&inventory.settle().unwrap(), TAP, IfIndex(8), None), Resolution::Unknown);
    inventory.apply(event(SourceKind::Ovsdb, "row", [placed.clone()]));
    assert_eq!(resolve_at(&inventory.settle().unwrap(), TAP, IfIndex(8), None), known(&placed));
    inventory.apply(event(SourceKind::Ovsdb, "row", [PortRecord { index: Some(IfIndex(8)), ..indexed }]));
    assert_eq!(resolve_at(&inventory.settle().unwrap(), TAP, IfIndex(8), None), known(&placed));
}

#[test]
fn the_index_distinguishes_ports_with_the_same_name() {
    let one = Port { device: device(TAP), ..port(Some(PORT), 1) };
    let two = Port { device: device(TAP), ..port(Some(TWIN), 2) };
    let indexed = PortRecord { index: Some(IfIndex(7)), ..one.clone().into() };
    let snapshot =
        snapshot_of([event(SourceKind::Ovsdb, "a", [indexed]), event(SourceKind::Ovsdb, "b", [two.clone()])]);
    assert_eq!(resolve_at(&snapshot, TAP, IfIndex(7), None), known(&one));
    assert_eq!(resolve_at(&snapshot, TAP, IfIndex(8), None), known(&two));
    assert_eq!(resolve(&snapshot, TAP, None), Resolution::Conflict);
}

#[test]
fn an_index_applies_to_the_device_of_its_own_record() {
    let hybrid = Port { device: device(TAP), ..port(Some(PORT), 1) };
    let other: PortRecord = PortRecord {
        index: Some(IfIndex(7)),
        ..Port { device: device("vnet5"), ..port(Some(PORT), 1) }.into()
    };
    let snapshot = snapshot_of([
        event(SourceKind::Ovsdb, "a", [hybrid.clone()]),
        event(SourceKind::Ovsdb, "b", [other]),
    ]);
    assert_eq!(resolve_at(&snapshot, TAP, IfIndex(8), None), known(&hybrid));
    assert_eq!(resolve_at(&snapshot, "vnet5", IfIndex(7), None), known(&hybrid));
    assert_eq!(resolve_at(&snapshot, "vnet5", IfIndex(8), None), Resolution::Unknown);
}

#[test]
fn a_record_without_id_belongs_to_the_port_on_its_device() {
    let placed = Port { device: device(TAP), ..port(Some("aaaaaaaa-bb00-4000-8000-000000000000"), 1) };
    let nameless = Port { device: device(TAP), ..port(None, 1) };
    let snapshot = snapshot_of([
        event(SourceKind::StaticFile, "f", [placed.clone(), port(Some(PORT), 2)]),
        event(SourceKind::Libvirt, "d", [nameless]),
    ]);
    assert_eq!(resolve(&snapshot, TAP, None), known(&placed));
    assert_eq!(snapshot.counts(), Counts { ports: 2, disputed: 0, ..Counts::default() });
}

#[test]
fn the_mac_address_distinguishes_ports_with_one_tap_name() {
    let one = with_mac("fa:16:3e:00:00:01", port(Some(PORT), 1));
    let two = with_mac("fa:16:3e:00:00:02", port(Some(TWIN), 2));
    let snapshot = snapshot_of([
        event(SourceKind::StaticFile, "a", [one.clone()]),
        event(SourceKind::StaticFile, "b", [two.clone()]),
    ]);
    assert_eq!(resolve(&snapshot, TAP, mac("fe:16:3e:00:00:01")), known(&one), "as libvirt sets it");
    assert_eq!(resolve(&snapshot, TAP, mac("fa:16:3e:00:00:02")), known(&two), "as the guest has it");
    assert_eq!(resolve(&snapshot, TAP, mac("fe:16:3e:00:00:03")), Resolution::Conflict);
    assert_eq!(resolve(&snapshot, TAP, None), Resolution::Conflict);

    let same_mac = with_mac("fa:16:3e:00:00:01", two);
    let snapshot = snapshot_of([event(SourceKind::StaticFile, "a", [one.clone(), same_mac])]);
    assert_eq!(resolve(&snapshot, TAP, one.addressing.mac), Resolution::Conflict);
}

#[test]
fn an_incomplete_port_still_competes_for_its_tap_name() {
    let one = with_mac("fa:16:3e:00:00:01", port(Some(PORT), 1));
    let two = with_mac("fa:16:3e:00:00:02", port(Some(TWIN), 2));
    let snapshot = snapshot_of([
        event(SourceKind::Ovsdb, "a", [without_project(&one)]),
        event(SourceKind::StaticFile, "b", [two.clone()]),
    ]);
    assert_eq!(resolve(&snapshot, TAP, two.addressing.mac), known(&two));
    assert_eq!(resolve(&snapshot, TAP, one.addressing.mac), Resolution::Unknown);
    assert_eq!(resolve(&snapshot, TAP, None), Resolution::Conflict);
}
