//! Rows as os-vif, libvirt and Neutron write them.

use serde_json::json;

use super::*;

const ID: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";
const NETWORK: &str = "b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f";
const ROW: Uuid = Uuid::from_u128(1);

/// Reads a row with this name and these external ids.
fn read(name: &str, ids: &[(&str, &str)]) -> InterfaceState {
    read_typed(name, "", ids)
}

fn read_typed(name: &str, kind: &str, ids: &[(&str, &str)]) -> InterfaceState {
    let ids: Vec<_> = ids.iter().map(|(key, value)| json!([key, value])).collect();
    let row = json!({ "insert": { "name": name, "type": kind, "external_ids": ["map", ids] } });
    let update = json!({ "Interface": { ROW.to_string(): row } });
    Interfaces::new().apply(UpdateFormat::Differences, &update).unwrap().remove(&ROW).unwrap()
}

fn record(device: Option<&str>) -> PortRecord {
    PortRecord {
        id: Some(ID.parse().unwrap()),
        device: device.map(|name| name.parse().unwrap()),
        tenant: Some(Tenant { instance: INSTANCE.parse().unwrap(), project: None }),
        addressing: PortAddressing {
            mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    }
}

#[test]
fn rows_of_os_vif_and_of_libvirt_are_read() {
    let common = [("iface-id", ID), ("attached-mac", "fa:16:3e:11:22:33"), ("iface-status", "active")];
    let with = |id: (&'static str, &'static str)| [common.as_slice(), &[id]].concat();
    for (name, device) in [
        ("tap3f2a9d10-77", Some("tap3f2a9d10-77")),
        ("qvo3f2a9d10-77", Some("tap3f2a9d10-77")),
        ("qvoaaaaaaaa-bb", Some("qvoaaaaaaaa-bb")),
        ("eth4_3", Some("eth4_3")),
        ("a-port-in-user-space", None),
    ] {
        assert_eq!(
            read(name, &with(("vm-uuid", INSTANCE))),
            RowState::Port(record(device)),
            "os-vif, {name}"
        );
        assert_eq!(read(name, &with(("vm-id", INSTANCE))), RowState::Port(record(device)), "libvirt, {name}");
    }
}

#[test]
fn the_index_is_read_if_the_row_is_the_device_itself() {
    let ids = json!(["map", [["iface-id", ID], ["vm-uuid", INSTANCE]]]);
    let insert = |name: &str, kind: &str, index: Value| {
        let row = json!({ "name": name, "type": kind, "external_ids": ids, "ifindex": index });
        json!({ "Interface": { ROW.to_string(): { "insert": row } } })
    };
    let index = |states: BTreeMap<Uuid, InterfaceState>| match states.get(&ROW) {
        Some(RowState::Port(record)) => record.index.map(|index| index.0),
        other => panic!("{other:?}"),
    };
    for (name, kind, value, wanted) in [
        ("tap3f2a9d10-77", "", json!(7), Some(7)),
        ("tap3f2a9d10-77", "system", json!(["set", [7]]), Some(7)),
        ("tap3f2a9d10-77", "internal", json!(7), Some(7)),
        ("tap3f2a9d10-77", "", json!(["set", []]), None),
        ("tap3f2a9d10-77", "", json!(0), None),
        ("tap3f2a9d10-77", "", json!(-1), None),
        ("tap3f2a9d10-77", "", json!(i64::MAX), None),
        ("qvo3f2a9d10-77", "", json!(7), None),
        ("vhu3f2a9d10-77", "dpdkvhostuserclient", json!(7), None),
    ] {
        let states =
            Interfaces::new().apply(UpdateFormat::Differences, &insert(name, kind, value.clone())).unwrap();
        assert_eq!(index(states), wanted, "{name} {kind} {value}");
    }

    let mut interfaces = Interfaces::new();
    let mut apply = |update: Value| index(interfaces.apply(UpdateFormat::Differences, &update).unwrap());
    assert_eq!(apply(insert("tap3f2a9d10-77", "", json!(7))), Some(7));
    for (value, wanted) in [(json!(["set", []]), None), (json!(8), Some(8))] {
        let modify = json!({ "modify": { "ifindex": value } });
        assert_eq!(apply(json!({ "Interface": { ROW.to_string(): modify } })), wanted);
    }
}

#[test]
fn rows_without_a_plugged_guest_are_ignored() {
    let plugged = [("iface-id", ID), ("attached-mac", "fa:16:3e:11:22:33"), ("iface-status", "active")];
    assert_eq!(read_typed("tap3f2a9d10-77", "internal", &plugged), RowState::Ignored, "of the DHCP agent");
    for ids in [
        [].as_slice(),
        &[("iface-id", "kube-system_coredns")],
        &[("iface-id", ID), ("iface-status", "inactive")],
        &[("iface-status", "active")],
        &[("vm-id", "vm-12345")],
        &[("vm-uuid", INSTANCE), ("iface-status", "inactive")],
    ] {
        assert_eq!(read("tap3f2a9d10-77", ids), RowState::Ignored, "{ids:?}");
    }
    for kind in ["internal", "patch", "geneve", "dpdkvhostuserclient"] {
        let state = read_typed("tap3f2a9d10-77", kind, &[("iface-id", ID)]);
        assert_eq!(state, RowState::Ignored, "{kind}");
    }
}

#[test]
fn a_plugged_interface_without_instance_reports_its_port() {
    let plugged = [("iface-id", ID), ("attached-mac", "fa:16:3e:11:22:33"), ("iface-status", "active")];
    let wanted = PortRecord { tenant: None, ..record(Some("tap3f2a9d10-77")) };
    assert_eq!(read("tap3f2a9d10-77", &plugged), RowState::Port(wanted));
}

/// OVN's metadata agent writes nothing but the port id (neutron/agent/ovn/metadata/agent.py,
/// `provision_datapath`).
#[test]
fn the_veth_of_ovns_metadata_agent_reports_its_port() {
    let addressing = PortAddressing::default();
    let wanted = PortRecord { tenant: None, addressing, ..record(Some("tapb6c7d8e9-00")) };
    for kind in ["", "system"] {
        let state = read_typed("tapb6c7d8e9-00", kind, &[("iface-id", ID)]);
        assert_eq!(state, RowState::Port(wanted.clone()), "{kind:?}");
    }
}

#[test]
fn a_malformed_id_makes_a_row_invalid() {
    for (ids, wanted) in [
        ([("vm-uuid", "vm1"), ("iface-id", ID)], "external_ids:vm-uuid: `vm1` is not a UUID"),
        ([("vm-uuid", INSTANCE), ("iface-id", "port1")], "external_ids:iface-id: `port1` is not a UUID"),
        ([("vm-uuid", INSTANCE), ("attached-mac", "x")], "external_ids:attached-mac: `x` is not a MAC"),
        ([("vm-uuid", INSTANCE), ("vm-id", ID)], "names two instances"),
    ] {
        let RowState::Invalid { name, error } = read("tap0", &ids) else { panic!("{ids:?} is accepted") };
        assert_eq!(name, "tap0");
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn the_network_follows_the_port_of_the_interface() {
    let mut interfaces = Interfaces::new();
    let network = |states: &BTreeMap<Uuid, InterfaceState>| match states.get(&ROW) {
        Some(RowState::Port(record)) => record.addressing.network.map(|network| network.to_string()),
        other => panic!("{other:?}"),
    };
    let (first, second) = (Uuid::from_u128(2), Uuid::from_u128(3));
    let holds = |network: &str| json!({ "interfaces": ["uuid", ROW.to_string()], "other_config": ["map", [["net_uuid", network]]] });
    let ids = json!(["map", [["vm-uuid", INSTANCE]]]);
    let mut apply = |update: Value| interfaces.apply(UpdateFormat::Differences, &update).unwrap();

    let states = apply(json!({ "Port": { first.to_string(): { "insert": holds(NETWORK) } } }));
    assert_eq!(states, [(ROW, RowState::Deleted)].into(), "the interface does not exist yet");
    let row = json!({ "name": "tap0", "external_ids": ids });
    let states = apply(json!({ "Interface": { ROW.to_string(): { "insert": row } } }));
    assert_eq!(network(&states).as_deref(), Some(NETWORK));
    let states = apply(json!({ "Port": { second.to_string(): { "insert": holds(ID) } } }));
    assert!(matches!(states[&ROW], RowState::Invalid { error: InterfaceError::SeveralNetworks, .. }));
    let states = apply(json!({ "Port": { first.to_string(): { "delete": null } } }));
    assert_eq!(network(&states).as_deref(), Some(ID));
    let leaves = json!({ "modify": { "interfaces": ["uuid", ROW.to_string()] } });
    let states = apply(json!({ "Port": { second.to_string(): leaves } }));
    assert_eq!(network(&states), None);
    let states = apply(json!({ "Interface": { ROW.to_string(): { "delete": null } } }));
    assert_eq!(states, [(ROW, RowState::Deleted)].into());
}
