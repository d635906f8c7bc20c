//! Rows of ports: which are received, and what each changes.

use metadata_agent::ids::InstanceId;
use metadata_tests::nova::Instance;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Port, Router, Southbound};
use serde_json::json;
use uuid::Uuid;

use super::World;
use super::relay::Relay;

#[test]
fn a_guest_is_served_from_open_vswitch_and_ovn_alone() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    world.assert_refused(&guest, "unknown");
    // Without a chassis, as between the hosts of a migration.
    southbound.bind(&guest.port);
    world.assert_served(&guest);
    let port = world.attachment(&guest)["port"].clone();
    assert_eq!(port["network"], guest.port.network.to_string());
    assert_eq!(port["fixed_ips"], json!(["10.0.0.5"]));
    let state = world.until_sound();
    assert_eq!((&state["ports"], &state["ignored"]), (&json!(1), &json!(0)));

    southbound.unbind(&guest.port);
    world.assert_refused(&guest, "unknown");
    southbound.bind(&guest.port);
    world.assert_served(&guest);

    // A VLAN on the port is served as the same instance while it exists.
    let vlan = Port::new(guest.port.network, [10, 0, 1, 5].into());
    southbound.bind_subport(&vlan, &guest.port, 7);
    let attached = wait::until("the VLAN is attached", PATIENCE, || world.vlan(&guest, 7));
    assert_eq!(attached["port"]["id"], vlan.id.to_string());
    assert_eq!(attached["port"]["instance"], guest.port.instance.to_string());
    assert_eq!(attached["port"]["fixed_ips"], json!(["10.0.1.5"]));
    world.assert_served(&guest);
    southbound.unbind(&vlan);
    wait::until("the VLAN is detached", PATIENCE, || world.vlan(&guest, 7).is_none().then_some(()));
    world.assert_served(&guest);

    // A malformed row identifies no port and does not affect others.
    let other = world.guest(6);
    southbound.bind(&other.port);
    world.assert_served(&other);
    southbound.set_external_ids(&guest.port, &[("neutron:device_id", "vm1")]);
    world.until_fault("neutron:device_id: `vm1` is not a UUID");
    world.assert_refused(&guest, "unknown");
    world.assert_served(&other);
    southbound.set_external_ids(&guest.port, &[("neutron:device_id", &guest.port.instance.to_string())]);
    world.assert_served(&guest);
    world.until_sound();
}

#[test]
fn only_rows_of_this_hosts_ports_are_received() {
    let mut southbound = Southbound::start();
    let relay = Relay::before(&southbound.servers()[0]);
    let elsewhere = Port::new(metadata_agent::ids::NetworkId::new(Uuid::new_v4()), [10, 0, 0, 9].into());
    let mut foreign = southbound.bind_foreign(&elsewhere, 2_000);
    let world = World::new(&relay.remote());
    world.until_sound();
    assert!(
        !relay.recorded().contains("logical_port"),
        "a row was received although no port is on this host"
    );

    let [first, second] = [5, 6].map(|last| world.guest(last));
    for guest in [&first, &second] {
        southbound.bind(&guest.port);
        world.assert_served(guest);
    }
    foreign.extend(southbound.bind_foreign(&elsewhere, 100));
    world.network.host().netns().ip(&format!("link del {}", second.tap));
    world.source("dropped the row", |state| state["ports"] == 1);
    // The condition has changed and still does not select rows of other hosts.
    foreign.extend(southbound.bind_foreign(&elsewhere, 100));
    southbound.set_external_ids(&first.port, &[("neutron:device_id", &Uuid::new_v4().to_string())]);
    world.assert_refused(&first, "disputed");
    let traffic = relay.recorded();
    for guest in [&first, &second] {
        assert!(traffic.contains(&guest.port.id.to_string()));
    }
    let received = foreign.iter().filter(|port| traffic.contains(&port.to_string())).count();
    assert_eq!((received, foreign.len()), (0, 2_200));
    assert!(traffic.len() < 16 * 1024, "{} bytes were received: {traffic}", traffic.len());
}

/// The host keeps it until it becomes an instance's port.
#[test]
fn a_port_without_an_instance_is_not_attached() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.unplugged(5);
    let tap = Port::new(guest.port.network, [10, 0, 0, 6].into());
    world.network.host().tap(&tap.tap());
    for port in [&guest.port, &tap] {
        world.plug_without_instance(port);
    }
    let both = [guest.tap.clone(), tap.tap()];
    world.process.wait_for_attachments(both.iter().map(String::as_str));
    for port in [&guest.port, &tap] {
        southbound.bind(port);
        southbound.set_external_ids(port, &[("neutron:device_owner", "network:dhcp")]);
    }
    world.process.wait_for_attachments([]);
    southbound.set_external_ids(&tap, &[("neutron:device_owner", "compute:az1")]);
    world.process.wait_for_attachments([tap.tap().as_str()]);
    southbound.set_external_ids(&guest.port, &[("neutron:device_owner", "compute:nova")]);
    world.process.wait_for_attachments(both.iter().map(String::as_str));
    world.assert_served(&guest);
}

/// Neither its status nor a device owner is known, only its type.
#[test]
fn a_port_that_is_internal_to_ovn_is_not_attached() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    southbound.bind(&guest.port);
    world.assert_served(&guest);
    let tap = Port::new(guest.port.network, [10, 0, 0, 6].into());
    world.network.host().tap(&tap.tap());
    world.ovsdb.insert(&tap.tap(), &[("iface-id", tap.id.to_string())], &[]);
    let [guests, all] = [vec![guest.tap.clone()], vec![guest.tap.clone(), tap.tap()]];
    let attached = |taps: &[String]| {
        world.process.wait_for_attachments(taps.iter().map(String::as_str));
    };
    attached(&all);
    southbound.bind(&tap);
    for kind in ["localport", "router", "patch", "l3gateway", "l2gateway", "vtep"] {
        southbound.set_column(&tap, "type", &json!(kind));
        attached(&guests);
        southbound.set_column(&tap, "type", &json!(""));
        attached(&all);
    }
    world.assert_served(&guest);
}

/// It is not attached at any moment, whatever the order in which it becomes known.
#[test]
fn the_veth_of_ovns_metadata_agent_is_never_attached() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    southbound.bind(&guest.port);
    let (namespace, port) = Router::ovn_metadata(&world.network);
    world.ovsdb.insert(&port.tap(), &[("iface-id", port.id.to_string())], &[]);
    southbound.bind(&port);
    southbound.set_column(&port, "type", &json!("localport"));
    southbound.set_external_ids(&port, &[("neutron:device_owner", "network:distributed")]);
    world.assert_served(&guest);
    let last = world.guest(6);
    world.process.wait_for_attachments([guest.tap.as_str(), last.tap.as_str()]);
    let output = world.process.output();
    assert!(!output.contains(&port.tap()), "{}: {output}", port.tap());
    drop(namespace);
}

#[test]
fn a_port_on_which_the_databases_disagree_is_not_served() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    let other = Port { instance: InstanceId::new(Uuid::new_v4()), ..guest.port.clone() };
    world.nova.add(Instance::from_port(&other));
    southbound.bind(&other);
    world.assert_refused(&guest, "disputed");
    southbound.set_external_ids(&guest.port, &[("neutron:device_id", &guest.port.instance.to_string())]);
    world.assert_served(&guest);
    southbound.set_external_ids(&guest.port, &[("neutron:device_owner", "network:dhcp")]);
    world.assert_refused(&guest, "disputed");
}
