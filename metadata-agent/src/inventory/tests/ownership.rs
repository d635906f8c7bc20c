//! Merging of records, disputes and subports.

use super::*;
use crate::ids::VlanId;

#[test]
fn sources_are_merged_field_by_field_in_order_of_trust() {
    let file = Port {
        addressing: PortAddressing {
            network: Some("11111111-1111-4111-8111-111111111111".parse().unwrap()),
            fixed_ips: vec!["10.0.0.5".parse().unwrap()],
            ..PortAddressing::default()
        },
        ..port(Some(PORT), 1)
    };
    let libvirt = Port {
        device: device(TAP),
        addressing: PortAddressing {
            mac: mac("fa:16:3e:00:00:01"),
            fixed_ips: vec!["10.0.0.6".parse().unwrap()],
            ..PortAddressing::default()
        },
        ..port(Some(PORT), 1)
    };
    let mut merged = Port { device: libvirt.device.clone(), ..file.clone() };
    merged.addressing.mac = libvirt.addressing.mac;
    merged.addressing.fixed_ips_source = Some(SourceKind::StaticFile);
    let snapshot = snapshot_of([
        event(SourceKind::Libvirt, "d", [libvirt.clone()]),
        event(SourceKind::StaticFile, "f", [file.clone()]),
    ]);
    assert_eq!(resolve(&snapshot, TAP, None), known(&merged));
    assert_eq!(snapshot.counts(), Counts { ports: 1, disputed: 0, ..Counts::default() });

    let nameless = Port { id: None, ..libvirt };
    let snapshot = snapshot_of([
        event(SourceKind::Libvirt, "d", [nameless]),
        event(SourceKind::StaticFile, "f", [file]),
    ]);
    assert_eq!(resolve(&snapshot, TAP, None), known(&merged), "a record without an id joins by its device");
    assert_eq!(snapshot.counts(), Counts { ports: 1, disputed: 0, ..Counts::default() });
}

/// libvirt keeps the addresses that a port had when it was plugged.
#[test]
fn addresses_come_from_the_control_plane_if_it_knows_the_port() {
    let with = |address: &str| {
        let fixed_ips = vec![address.parse().unwrap()];
        Port { addressing: PortAddressing { fixed_ips, ..PortAddressing::default() }, ..port(Some(PORT), 1) }
    };
    let local = [
        event(SourceKind::StaticFile, "f", [with("10.0.0.5")]),
        event(SourceKind::Libvirt, "d", [with("10.0.0.6")]),
    ];
    let merged = |others: &[Event]| {
        let snapshot = snapshot_of(local.iter().chain(others).cloned());
        let Resolution::Known(port) = resolve(&snapshot, TAP, None) else { panic!("one port") };
        (port.addressing.fixed_ips.clone(), port.addressing.fixed_ips_source)
    };
    let neutron = event(SourceKind::Neutron, "p", [with("10.0.0.7")]);
    let ovn = event(SourceKind::OvnSouthbound, "row", [with("10.0.0.8")]);
    let bare = event(SourceKind::OvnSouthbound, "row", [port(Some(PORT), 1)]);
    let one = |address: &str, source| (vec![address.parse::<std::net::IpAddr>().unwrap()], Some(source));
    assert_eq!(merged(&[]), one("10.0.0.5", SourceKind::StaticFile));
    assert_eq!(merged(std::slice::from_ref(&neutron)), one("10.0.0.7", SourceKind::Neutron));
    assert_eq!(merged(&[neutron.clone(), ovn]), one("10.0.0.8", SourceKind::OvnSouthbound));
    assert_eq!(merged(std::slice::from_ref(&bare)), (Vec::new(), None), "it has no address any more");
    assert_eq!(merged(&[bare, neutron]), one("10.0.0.7", SourceKind::Neutron));
}

fn only(addresses: &[&str]) -> SourcePolicy {
    let mac = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
    let source = |text: &&str| AllowedSource { mac, prefix: text.parse().unwrap() };
    SourcePolicy::Only(addresses.iter().map(source).collect())
}

/// Each source reports this address as the port's, and this statement about allowed sources.
fn merged_sources(claims: &[(SourceKind, &str, Option<SourcePolicy>)]) -> Option<(SourcePolicy, SourceKind)> {
    let event = |(source, address, policy): &(SourceKind, &str, Option<SourcePolicy>)| {
        let mut port = with_mac("fa:16:3e:00:00:01", port(Some(PORT), 1));
        port.addressing.fixed_ips = vec![address.parse().unwrap()];
        port.addressing.allowed_sources.clone_from(policy);
        event(*source, "key", [port])
    };
    let snapshot = snapshot_of(claims.iter().map(event));
    let Resolution::Known(port) = resolve(&snapshot, TAP, None) else { panic!("one port") };
    port.addressing.allowed_sources.clone().zip(port.addressing.allowed_sources_source)
}

#[test]
fn only_a_source_that_knows_all_allowed_sources_states_them() {
    use SourceKind::{Libvirt, Neutron, OvnSouthbound, Ovsdb};
    for source in [Libvirt, Ovsdb] {
        assert_eq!(merged_sources(&[(source, "10.0.0.5", Some(only(&["10.0.0.5"])))]), None, "{source}");
    }
    let libvirt = (Libvirt, "10.0.0.5", Some(only(&["10.0.0.5"])));
    let neutron = (Neutron, "10.0.0.6", Some(only(&["10.0.0.6"])));
    let ovn = |policy| (OvnSouthbound, "10.0.0.7", policy);
    let both = [libvirt.clone(), neutron.clone()];
    assert_eq!(merged_sources(&both), Some((only(&["10.0.0.6"]), Neutron)));
    let all = [libvirt.clone(), neutron.clone(), ovn(Some(only(&["10.0.0.7"])))];
    assert_eq!(merged_sources(&all), Some((only(&["10.0.0.7"]), OvnSouthbound)));
    let off = [libvirt, neutron.clone(), ovn(Some(SourcePolicy::Any))];
    assert_eq!(merged_sources(&off), Some((SourcePolicy::Any, OvnSouthbound)));
    // An OVN without port security in its database still knows the address of now.
    let older = [neutron, ovn(None)];
    assert_eq!(merged_sources(&older), Some((only(&["10.0.0.6", "10.0.0.7"]), Neutron)));
}

#[test]
fn the_static_file_adds_to_what_the_control_plane_allows() {
    use SourceKind::{OvnSouthbound, StaticFile};
    let file = |policy| (StaticFile, "10.0.0.5", Some(policy));
    let ovn = |policy| (OvnSouthbound, "10.0.0.7", policy);
    assert_eq!(merged_sources(&[file(only(&["10.0.0.5"]))]), Some((only(&["10.0.0.5"]), StaticFile)));
    let stated = ovn(Some(only(&["10.0.0.7"])));
    assert_eq!(
        merged_sources(&[file(only(&["10.0.0.100"])), stated.clone()]),
        Some((only(&["10.0.0.7", "10.0.0.100"]), OvnSouthbound))
    );
    assert_eq!(merged_sources(&[file(SourcePolicy::Any), stated]), Some((SourcePolicy::Any, OvnSouthbound)));
    assert_eq!(
        merged_sources(&[file(only(&["10.0.0.5"])), ovn(None)]),
        Some((only(&["10.0.0.5", "10.0.0.7"]), StaticFile)),
        "the file is older than the port's address"
    );
}

#[test]
fn a_port_is_known_once_instance_and_project_are_known() {
    let (_, mut publisher) = Inventory::new();
    let inventory = Arc::clone(&publisher.inventory);
    let current = || resolve(&inventory.load(), TAP, None);
    let incomplete = Counts { incomplete: 1, ..Counts::default() };
    let placed = Port { device: device(TAP), ..port(Some(PORT), 1) };

    publisher.publish([event(SourceKind::Ovsdb, "row", [without_project(&placed)])]);
    assert_eq!((current(), inventory.load().counts()), (Resolution::Unknown, incomplete));
    publisher.publish([event(SourceKind::Libvirt, "d", [Port { id: None, ..placed.clone() }])]);
    assert_eq!(current(), known(&placed));

    let elsewhere = Port { id: None, device: device("vnet7"), ..placed.clone() };
    publisher.publish([event(SourceKind::Libvirt, "d", [elsewhere])]);
    assert_eq!(current(), Resolution::Unknown, "the record is about another port");
    publisher.publish([event(SourceKind::Libvirt, "d", [Port { device: device(TAP), ..port(None, 2) }])]);
    assert_eq!(current(), Resolution::Conflict, "the project of another instance does not count");
    publisher.publish([withdrawal(SourceKind::Libvirt, "d")]);
    assert_eq!((current(), inventory.load().counts()), (Resolution::Unknown, incomplete));
}

#[test]
fn the_ports_project_is_used_if_the_instances_is_unknown() {
    let ovn =
        PortRecord { port_project: Some("admin".parse().unwrap()), ..without_project(&port(Some(PORT), 1)) };
    let stands_in = Port { project: "admin".parse().unwrap(), ..port(Some(PORT), 1) };
    let snapshot = snapshot_of([event(SourceKind::OvnSouthbound, "row", [ovn.clone()])]);
    assert_eq!(resolve(&snapshot, TAP, None), known(&stands_in));

    let libvirt = PortRecord::from(port(Some(PORT), 1));
    let snapshot = snapshot_of([
        event(SourceKind::OvnSouthbound, "row", [ovn]),
        event(SourceKind::Libvirt, "d", [libvirt]),
    ]);
    assert_eq!(
        resolve(&snapshot, TAP, None),
        known(&port(Some(PORT), 1)),
        "another port project is not a dispute"
    );
}

#[test]
fn a_port_with_another_owner_has_no_instance() {
    let dhcp = PortRecord { device_owner: DeviceOwner::new("network:dhcp"), ..without_tenant(PORT) };
    let row = event(SourceKind::OvnSouthbound, "row", [dhcp]);
    let snapshot = snapshot_of([row.clone()]);
    assert_eq!(resolve(&snapshot, TAP, None), Resolution::NoInstance);
    assert_eq!(snapshot.counts(), Counts { no_instance: 1, ..Counts::default() });
    let snapshot = snapshot_of([row, event(SourceKind::Libvirt, "d", [port(Some(PORT), 1)])]);
    assert_eq!(resolve(&snapshot, TAP, None), Resolution::Conflict);

    let compute = PortRecord { device_owner: DeviceOwner::new("compute:nova"), ..port(Some(PORT), 1).into() };
    let snapshot = snapshot_of([event(SourceKind::Neutron, "row", [compute])]);
    assert_eq!(resolve(&snapshot, TAP, None), known(&port(Some(PORT), 1)));
    assert_eq!(DeviceOwner::new(""), None, "the port is unused");
}

#[test]
fn an_arbiter_that_confirms_another_source_settles_a_dispute() {
    let ovsdb = event(SourceKind::Ovsdb, "row", [without_project(&port(Some(PORT), 1))]);
    let libvirt = event(SourceKind::Libvirt, "d", [port(Some(PORT), 2)]);
    let neutron = |decides: u32, arbitrated: &[u32]| {
        let arbitrated = arbitrated.iter().map(|n| instance(*n)).collect();
        event(SourceKind::Neutron, "port", [PortRecord { arbitrated, ..port(Some(PORT), decides).into() }])
    };
    let arbitrate =
        |arbiter: Event| resolve(&snapshot_of([ovsdb.clone(), libvirt.clone(), arbiter]), TAP, None);
    assert_eq!(arbitrate(neutron(1, &[1, 2])), known(&port(Some(PORT), 1)));
    assert_eq!(arbitrate(neutron(2, &[1, 2])), known(&port(Some(PORT), 2)));
    assert_eq!(arbitrate(neutron(3, &[1, 2])), Resolution::Conflict, "no other source names it");
    assert_eq!(arbitrate(neutron(1, &[])), Resolution::Conflict, "was not asked to arbitrate");
    assert_eq!(arbitrate(neutron(2, &[2, 3])), Resolution::Conflict, "was asked about another dispute");
}

#[test]
fn subports_are_found_by_parent_and_vlan_not_by_device() {
    let parent: PortId = PORT.parse().unwrap();
    let subport = |id: &str, vlan: u64| PortRecord {
        trunk: Some(TrunkBinding { parent, vlan: VlanId::try_from(vlan).unwrap() }),
        ..without_tenant(id)
    };
    let (five, six) = ("aaaaaaaa-bb00-4000-8000-000000000005", "aaaaaaaa-bb00-4000-8000-000000000006");
    let mut ovsdb = subport(five, 5);
    ovsdb.addressing.mac = mac("fa:16:3e:00:00:05");
    let mut neutron = subport(five, 5);
    neutron.addressing.fixed_ips = vec!["10.5.0.5".parse().unwrap()];
    let snapshot = snapshot_of([
        event(SourceKind::Ovsdb, "5", [ovsdb]),
        event(SourceKind::Neutron, "5", [neutron]),
        event(SourceKind::Neutron, "6", [subport(six, 6)]),
        event(SourceKind::Ovsdb, "7", [subport(five, 7)]),
        event(SourceKind::Neutron, "7", [subport(six, 7)]),
    ]);
    let found = snapshot.subports(&parent).unwrap();
    let tags: Vec<_> = found.iter().map(|subport| subport.vlan.get()).collect();
    assert_eq!(tags, [5, 6], "sources disagree about VLAN 7");
    assert_eq!(found[0].id, Some(five.parse().unwrap()));
    assert_eq!(found[0].addressing.mac, mac("fa:16:3e:00:00:05"));
    assert_eq!(found[0].addressing.fixed_ips, ["10.5.0.5".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(resolve(&snapshot, "tapaaaaaaaa-bb", None), Resolution::Unknown);
    assert_eq!(
        resolve(&snapshot, TAP, None),
        Resolution::Unknown,
        "a subport is not found by its parent's tap"
    );
    assert_eq!(snapshot.counts(), Counts::default());
}

#[test]
fn a_port_with_two_owners_is_disputed_until_they_agree() {
    let (_, mut publisher) = Inventory::new();
    let inventory = Arc::clone(&publisher.inventory);
    let current = || resolve(&inventory.load(), TAP, mac("fe:16:3e:00:00:01"));
    let old = Port { device: device(TAP), ..port(Some(PORT), 1) };

    publisher.publish([event(SourceKind::Libvirt, "instance-1.xml", [old.clone()])]);
    assert_eq!(current(), known(&old));
    let by_project = Port { project: "other".parse().unwrap(), ..old.clone() };
    for claim in [port(Some(PORT), 2), by_project, Port { id: None, device: device(TAP), ..port(None, 2) }] {
        publisher.publish([event(SourceKind::StaticFile, "f", [claim])]);
        assert_eq!(current(), Resolution::Conflict);
        assert_eq!(inventory.load().counts(), Counts { ports: 0, disputed: 1, ..Counts::default() });
        let dump = serde_json::to_string(&inventory.load().entries().collect::<Vec<_>>()).unwrap();
        assert!(dump.contains("static_file") && dump.contains("instance-1.xml"), "{dump}");
    }
    let new = Port { instance: instance(2), ..old };
    publisher.publish([event(SourceKind::Libvirt, "instance-2.xml", [new.clone()])]);
    assert_eq!(current(), Resolution::Conflict);
    publisher.publish([withdrawal(SourceKind::Libvirt, "instance-1.xml")]);
    assert_eq!(current(), known(&Port { id: new.id, ..new }));
    publisher.publish([withdrawal(SourceKind::Libvirt, "instance-2.xml")]);
    publisher.publish([withdrawal(SourceKind::StaticFile, "f")]);
    assert_eq!(current(), Resolution::Unknown);
    assert_eq!(inventory.load().counts(), Counts::default());
    assert_eq!(inventory.load().entries().count(), 0);
}
