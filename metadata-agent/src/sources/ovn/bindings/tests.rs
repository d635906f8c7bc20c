//! Rows as written by northd for Neutron's OVN driver.

use super::*;

const PORT: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
const OTHER: &str = "11111111-77c1-4e55-9d0c-2b6f4f1f0a01";
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";
const NETWORK_ID: &str = "b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f";
const ROW: Uuid = Uuid::from_u128(1);

/// Returns a guest's row after a change.
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

fn states_of(row: &Value, ports: &[&str]) -> BTreeMap<Uuid, BindingState> {
    let mut bindings = Bindings::new();
    let update = json!({ "Port_Binding": { ROW.to_string(): { "initial": row } } });
    bindings.apply(UpdateFormat::Differences, &update).unwrap();
    bindings.read(&ports.iter().map(|port| port.parse().unwrap()).collect())
}

fn state_of(row: &Value) -> BindingState {
    states_of(row, &[PORT]).remove(&ROW).expect("the row does not belong to a local port")
}

fn record_of(row: &Value) -> PortRecord {
    let state = state_of(row);
    let RowState::Port(record) = state else { panic!("{state:?}") };
    record
}

#[test]
fn a_guests_row_has_all_fields_but_the_instances_project() {
    let wanted = PortRecord {
        id: Some(PORT.parse().unwrap()),
        tenant: Some(Tenant { instance: INSTANCE.parse().unwrap(), project: None }),
        device_owner: DeviceOwner::new("compute:nova"),
        port_project: Some("p1".parse().unwrap()),
        addressing: PortAddressing {
            network: Some(NETWORK_ID.parse().unwrap()),
            mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
            fixed_ips: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    };
    assert_eq!(record_of(&row(|_| ())), wanted);
    assert_eq!(record_of(&row(|row| row["type"] = "external".into())), wanted);
    assert_eq!(
        record_of(&with_id("neutron:cidrs", "")),
        wanted,
        "the addresses after the MAC address are used"
    );
}

#[test]
fn only_a_port_of_nova_names_an_instance() {
    for (owner, is_reported) in [("network:dhcp", true), ("baremetal:none", true), ("", false)] {
        let record = record_of(&with_id("neutron:device_owner", owner));
        assert_eq!((record.tenant, record.device_owner.is_some()), (None, is_reported), "{owner}");
    }
    // Other types are not an instance's, whatever their other columns are.
    for kind in ["virtual", "remote"] {
        let record = record_of(&row(|row| row["type"] = kind.into()));
        assert_eq!((record.tenant, record.device_owner), (None, None), "{kind}");
    }
}

#[test]
fn a_port_that_is_internal_to_ovn_is_not_a_guests() {
    for kind in INTERNAL_TYPES {
        let record = record_of(&row(|row| row["type"] = kind.into()));
        let owner = record.device_owner.expect("the purpose of the port");
        assert_eq!((record.tenant, owner.is_instance()), (None, false), "{kind}");
        assert_eq!(owner.to_string(), format!("ovn:{kind}"));
    }
    let mut localport = with_id("neutron:device_owner", "network:distributed");
    localport["type"] = "localport".into();
    assert_eq!(record_of(&localport).device_owner, DeviceOwner::new("network:distributed"));
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
        let record = record_of(&row(|row| row["mac"] = mac.clone()));
        assert_eq!(record.addressing.mac, wanted.map(|mac| mac.parse().unwrap()), "{mac}");
        assert_eq!(record.addressing.fixed_ips.len(), 2, "{mac}: neutron:cidrs has two addresses");
    }
}

#[test]
fn an_error_quotes_the_invalid_value() {
    let faulty = [
        (with_id("neutron:device_id", "vm1"), "external_ids:neutron:device_id: `vm1` is not a UUID"),
        (with_id("neutron:project_id", "a b"), "`a b` is not a project id"),
        (with_id("neutron:cidrs", "10.0.0/24"), "external_ids:neutron:cidrs: `10.0.0` is not an IP address"),
        (with_id("neutron:network_name", "net1"), "`net1` is not `neutron-` and a network id"),
        (row(|row| row["mac"] = "fa:16".into()), "mac: `fa:16` is not a MAC address"),
        (row(|row| row["mac"] = "fa:16:3e:11:22:33 x".into()), "mac: `x` is not an IP address"),
    ];
    for (row, wanted) in faulty {
        let state = state_of(&row);
        let RowState::Invalid { name, error } = state else { panic!("{wanted}: {state:?}") };
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
fn a_subport_is_reported_by_its_parent_and_vlan() {
    let wanted = PortRecord {
        id: Some(OTHER.parse().unwrap()),
        trunk: Some(TrunkBinding { parent: PORT.parse().unwrap(), vlan: VlanId::try_from(7).unwrap() }),
        addressing: PortAddressing {
            network: Some(NETWORK_ID.parse().unwrap()),
            mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
            fixed_ips: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    };
    assert_eq!(record_of(&subport(|_| ())), wanted);
    // A subport has no interface of its own, whatever another source reports.
    assert_eq!(states_of(&subport(|_| ()), &[OTHER]), [(ROW, RowState::Ignored)].into());
    assert_eq!(state_of(&subport(|row| row["tag"] = json!(["set", []]))), RowState::Ignored);
    for tag in [0, 4095, -1] {
        let state = state_of(&subport(|row| row["tag"] = tag.into()));
        let RowState::Invalid { name, error } = state else { panic!("{tag}: {state:?}") };
        assert_eq!((name.as_str(), error), (OTHER, BindingError::Tag { tag }));
    }
}

#[test]
fn a_row_of_a_remote_port_is_not_read() {
    assert_eq!(states_of(&row(|_| ()), &[OTHER]), BTreeMap::new());
    assert_eq!(states_of(&row(|row| row["logical_port"] = "cr-lrp-x".into()), &[PORT]), BTreeMap::new());
}

#[test]
fn without_a_local_port_no_row_is_requested() {
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

/// Returns the allowed sources of a port with these entries in the column `port_security`.
fn allowed_by_entries(entries: &Value) -> Option<SourcePolicy> {
    let row = row(|row| row["port_security"] = entries.clone());
    let rows = json!({ "Port_Binding": { ROW.to_string(): { "initial": row } } });
    let initial = InitialRows { rows, port_security: PortSecurityColumn::Present };
    let bindings = Bindings::from_initial(&initial).unwrap();
    let state = bindings.read(&[PORT.parse().unwrap()].into()).remove(&ROW);
    let Some(RowState::Port(record)) = state else { panic!("{state:?}") };
    record.addressing.allowed_sources
}

#[test]
fn port_security_lists_the_allowed_sources() {
    let (own, virtual_mac) = ("fa:16:3e:11:22:33", "00:00:5e:00:01:33");
    let only = |sources: &[(&str, &str)]| {
        let source = |(mac, prefix): &(&str, &str)| AllowedSource {
            mac: mac.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
        };
        Some(SourcePolicy::Only(sources.iter().map(source).collect()))
    };
    let entry = "fa:16:3e:11:22:33 10.0.0.5 fd00::5 10.1.0.0/16";
    let own_sources = [(own, "10.0.0.5"), (own, "fd00::5"), (own, "10.1.0.0/16")];
    assert_eq!(allowed_by_entries(&json!(entry)), only(&own_sources));
    let pair = "00:00:5e:00:01:33 10.0.0.116";
    let all = [own_sources.as_slice(), &[(virtual_mac, "10.0.0.116")]].concat();
    assert_eq!(allowed_by_entries(&json!(["set", [entry, pair]])), only(&all));
    assert_eq!(allowed_by_entries(&json!(own)), only(&[(own, "0.0.0.0/0"), (own, "::/0")]));
    assert_eq!(allowed_by_entries(&json!(["set", []])), Some(SourcePolicy::Any), "it is off");
    for other in ["VRRPv3 fa:16:3e:11:22:33 00:00:5e:00:01:33 10.0.0.116", "fa:16:3e:11:22:33 x", "x"] {
        assert_eq!(allowed_by_entries(&json!(["set", [entry, other]])), None, "{other}");
    }
    assert_eq!(record_of(&row(|_| ())).addressing.allowed_sources, None, "an older database");
}
