//! Rows as Neutron's OVN driver makes northd write them.

use super::*;

const PORT: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
const OTHER: &str = "11111111-77c1-4e55-9d0c-2b6f4f1f0a01";
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";
const NETWORK_ID: &str = "b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f";
const ROW: Uuid = Uuid::from_u128(1);

/// A row with these columns beside its name, which are changed before.
fn row(change: impl FnOnce(&mut Value)) -> Value {
    let mut row = json!({
        "logical_port": PORT,
        "type": "",
        "parent_port": ["set", []],
        "mac": "fa:16:3e:11:22:33 10.0.0.5 fd00::5",
        "external_ids": ["map", [
            ["neutron:device_id", INSTANCE],
            ["neutron:device_owner", "compute:nova"],
            ["neutron:project_id", "p1"],
            ["neutron:cidrs", "10.0.0.5/24 fd00::5/64"],
            ["neutron:network_name", format!("neutron-{NETWORK_ID}")],
        ]],
    });
    change(&mut row);
    row
}

fn with_id(key: &'static str, value: &'static str) -> Value {
    row(|row| {
        let pairs = row["external_ids"][1].as_array_mut().unwrap();
        pairs.retain(|pair| pair[0] != key);
        pairs.push(json!([key, value]));
    })
}

fn readings(row: &Value, ports: &[&str]) -> BTreeMap<Uuid, Reading> {
    let mut bindings = Bindings::new();
    let update = json!({ "Port_Binding": { ROW.to_string(): { "initial": row } } });
    bindings.apply(UpdateFormat::Differences, &update).unwrap();
    bindings.read(&ports.iter().map(|port| port.parse().unwrap()).collect())
}

fn says(row: &Value) -> Reading {
    readings(row, &[PORT]).remove(&ROW).expect("the row is of a port here")
}

fn told(row: &Value) -> PortRecord {
    let reading = says(row);
    let Reading::Port(facts) = reading else { panic!("{reading:?}") };
    facts
}

#[test]
fn a_guests_row_tells_all_but_the_instances_project() {
    let wanted = PortRecord {
        id: Some(PORT.parse().unwrap()),
        tenant: Some(Tenant { instance: INSTANCE.parse().unwrap(), project: None }),
        device_owner: DeviceOwner::new("compute:nova"),
        port_project: Some("p1".parse().unwrap()),
        network: Some(NETWORK_ID.parse().unwrap()),
        mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
        fixed_ips: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        ..PortRecord::default()
    };
    assert_eq!(told(&row(|_| ())), wanted);
    assert_eq!(told(&row(|row| row["type"] = "external".into())), wanted);
    assert_eq!(told(&with_id("neutron:cidrs", "")), wanted, "the addresses behind the MAC address stand in");
}

#[test]
fn only_a_port_of_nova_names_an_instance() {
    for (owner, is_told) in [("network:dhcp", true), ("baremetal:none", true), ("", false)] {
        let facts = told(&with_id("neutron:device_owner", owner));
        assert_eq!((facts.tenant, facts.device_owner.is_some()), (None, is_told), "{owner}");
    }
    // What OVN made for itself is no guest, whatever else it says.
    for kind in ["router", "localport", "virtual", "patch", "l2gateway", "vtep", "remote"] {
        let facts = told(&row(|row| row["type"] = kind.into()));
        assert_eq!((facts.tenant, facts.device_owner), (None, None), "{kind}");
    }
}

#[test]
fn the_mac_address_is_the_one_with_addresses_or_the_only_one() {
    let own = "fa:16:3e:11:22:33";
    let set = |entries: &[&str]| json!(["set", entries]);
    for (mac, wanted) in [
        (set(&[]), None),
        (json!("unknown"), None),
        (json!(own), Some(own)),
        (set(&[own, "unknown"]), Some(own)),
        (set(&["00:00:00:00:00:01", "fa:16:3e:11:22:33 10.0.0.5", "unknown"]), Some(own)),
        (set(&["fa:16:3e:11:22:33 10.0.0.5", "fa:16:3e:11:22:33 fd00::5"]), Some(own)),
        (set(&["00:00:00:00:00:01", own]), None),
        (set(&["00:00:00:00:00:01 10.0.0.6", "fa:16:3e:11:22:33 10.0.0.5"]), None),
        (json!("router"), None),
        (json!("dynamic"), None),
    ] {
        let facts = told(&row(|row| row["mac"] = mac.clone()));
        assert_eq!(facts.mac, wanted.map(|mac| mac.parse().unwrap()), "{mac}");
        assert_eq!(facts.fixed_ips.len(), 2, "{mac}: these are told by neutron:cidrs");
    }
}

#[test]
fn a_row_that_cannot_be_understood_is_a_fault_that_quotes_it() {
    let faulty = [
        (with_id("neutron:device_id", "vm1"), "external_ids:neutron:device_id: `vm1` is not a UUID"),
        (with_id("neutron:project_id", "a b"), "`a b` is not a project id"),
        (with_id("neutron:cidrs", "10.0.0/24"), "external_ids:neutron:cidrs: `10.0.0` is not an IP address"),
        (with_id("neutron:network_name", "net1"), "`net1` is not neutron- and a network's id"),
        (row(|row| row["mac"] = "fa:16".into()), "mac: `fa:16` is not a MAC address"),
        (row(|row| row["mac"] = "fa:16:3e:11:22:33 x".into()), "mac: `x` is not an IP address"),
    ];
    for (row, wanted) in faulty {
        let reading = says(&row);
        let Reading::Fault { name, error } = reading else { panic!("{wanted}: {reading:?}") };
        assert_eq!(name, PORT);
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

fn subport(change: impl FnOnce(&mut Value)) -> Value {
    row(|row| {
        row["logical_port"] = OTHER.into();
        row["parent_port"] = PORT.into();
        row["tag"] = 7.into();
        row["external_ids"] = json!([
            "map",
            [
                ["neutron:device_id", ""],
                ["neutron:device_owner", "trunk:subport"],
                ["neutron:project_id", "p1"],
                ["neutron:cidrs", "10.0.0.5/24 fd00::5/64"],
                ["neutron:network_name", format!("neutron-{NETWORK_ID}")],
            ]
        ]);
        change(row);
    })
}

#[test]
fn a_vlan_on_a_port_is_told_by_its_place_and_is_nobodys_by_itself() {
    let wanted = PortRecord {
        id: Some(OTHER.parse().unwrap()),
        seat: Some(TrunkBinding { parent: PORT.parse().unwrap(), vlan: VlanId::try_from(7).unwrap() }),
        network: Some(NETWORK_ID.parse().unwrap()),
        mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
        fixed_ips: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        ..PortRecord::default()
    };
    assert_eq!(told(&subport(|_| ())), wanted);
    // The VLAN's own port has no interface of its own, whatever another source says.
    assert_eq!(readings(&subport(|_| ()), &[OTHER]), [(ROW, Reading::Nobodys)].into());
    assert_eq!(says(&subport(|row| row["tag"] = json!(["set", []]))), Reading::Nobodys);
    for tag in [0, 4095, -1] {
        let reading = says(&subport(|row| row["tag"] = tag.into()));
        let Reading::Fault { name, error } = reading else { panic!("{tag}: {reading:?}") };
        assert_eq!((name.as_str(), error), (OTHER, RowError::BadTag { tag }));
    }
}

#[test]
fn a_row_of_a_port_that_is_elsewhere_is_not_read() {
    assert_eq!(readings(&row(|_| ()), &[OTHER]), BTreeMap::new());
    assert_eq!(readings(&row(|row| row["logical_port"] = "cr-lrp-x".into()), &[PORT]), BTreeMap::new());
}

#[test]
fn without_a_port_here_no_row_is_asked_for() {
    assert_eq!(clauses(&BTreeSet::new()), json!([false]));
    let ports = [PORT, OTHER].map(|port| port.parse().unwrap()).into();
    let wanted = json!([
        ["logical_port", "==", OTHER],
        ["parent_port", "==", OTHER],
        ["logical_port", "==", PORT],
        ["parent_port", "==", PORT],
    ]);
    assert_eq!(clauses(&ports), wanted);
}
