//! Neutron's own clean-up programs, in namespaces that the agent serves.

use std::collections::BTreeMap;

use metadata_tests::neutron_agent::cleanup;
use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Host, Instance, Netns, NovaStandIn, Routed, Router, netns};
use serde_json::{Value, json};

const UPLINK: &str = "md-portal";

fn has_uplink(namespace: &Netns) -> bool {
    namespace.run(&["ip", "-o", "link"]).contains(UPLINK)
}

fn until_idle(process: &AgentProcess, namespace: &Netns) -> Value {
    let name = namespace.name();
    let reason = wait::until("the namespace is idle", PATIENCE, || {
        let idle = process.state()["namespaces"]["idle"].as_array().cloned().unwrap_or_default();
        let mut own = idle.into_iter().filter(|one| one["namespace"] == name);
        own.next().map(|one| one["reason"].clone())
    });
    wait::until("the uplink is removed", PATIENCE, || (!has_uplink(namespace)).then_some(()));
    reason
}

/// The report follows the attachment.
fn until_served(process: &AgentProcess) {
    wait::until("the namespace is not idle", PATIENCE, || {
        let namespaces = process.state()["namespaces"].clone();
        (namespaces["served"] == 1 && namespaces["idle"] == json!([])).then_some(())
    });
}

/// The second agent finds the uplink of the first one.
#[test]
fn neutron_removes_a_router_that_it_has_given_up() {
    for crashes in [false, true] {
        let mut routed = Routed::new();
        let agent = routed.agent().install();
        let mut process = agent.start();
        assert_served(&routed.guest);
        assert!(has_uplink(routed.router.netns()));

        if crashes {
            process.kill9();
            routed.router.unplug();
            process = agent.start();
        } else {
            routed.router.unplug();
        }
        let reason = until_idle(&process, routed.router.netns());
        assert_eq!(reason, "no interface qr-*; found none at all");
        assert_eq!(process.state()["namespaces"]["served"], 0);
        assert_eq!(process.attachments(), BTreeMap::new());

        let name = routed.router.netns().name().to_owned();
        cleanup::remove_if_unused(routed.host.netns(), &name);
        assert!(!netns::names().contains(&name), "crashes: {crashes}");
        wait::until("the agent forgets the namespace", PATIENCE, || {
            (process.state()["namespaces"]["idle"] == json!([])).then_some(())
        });
        assert_eq!(process.stop().code(), Some(0));
    }
}

/// It deletes one interface after the other, with the uplink between them.
#[test]
fn neutron_removes_a_served_router_by_force() {
    let mut routed = Routed::new();
    let process = routed.agent().install().start();
    assert_served(&routed.guest);
    let later = routed.host.network_at([10, 0, 1, 1].into(), 24);
    routed.router.add(&later);
    wait::until("the new interface is attached", PATIENCE, || {
        (process.attachments().len() == 2).then_some(())
    });
    let name = routed.router.netns().name().to_owned();
    cleanup::remove_by_force(routed.host.netns(), &name);
    assert!(!netns::names().contains(&name));
    wait::until("the agent forgets the namespace", PATIENCE, || {
        (process.state()["namespaces"]["served"] == 0).then_some(())
    });
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn a_router_that_gets_a_network_again_is_served_again() {
    let mut routed = Routed::new();
    let agent = routed.agent().install();
    let process = agent.start();
    assert_served(&routed.guest);
    routed.router.unplug();
    until_idle(&process, routed.router.netns());
    let interface = routed.router.add(&routed.network);
    agent.set_ports([&interface, &routed.guest.port]);
    wait::until("the new interface's network is known", PATIENCE, || {
        let attachments = process.state()["attachments"].clone();
        (attachments[0]["network"] == routed.network.id.to_string()).then_some(())
    });
    assert_served(&routed.guest);
    until_served(&process);
}

/// The DHCP agent does so each time that it sets up the server.
#[test]
fn the_dhcp_agents_cleanup_leads_to_a_new_uplink() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let network = host.network();
    let (server, port) = Router::dhcp_by_veth(&network);
    let guest = network.guest([10, 0, 0, 5]);
    nova.add(Instance::from_port(&guest.port));
    let name = server.netns().name();
    let process = Agent::on(&host, &nova).only_in(name).port(&guest.port).install().start();
    assert_served(&guest);
    let before = process.attachments();
    assert_eq!(before.keys().collect::<Vec<_>>(), [&port.tap()]);

    cleanup::remove_stale_interfaces(host.netns(), name, &port);
    let after = wait::until("the interface is attached again", PATIENCE, || {
        let now = process.attachments();
        (now.len() == 1 && now != before).then_some(now)
    });
    assert_served(&guest);
    assert_eq!(after.keys().collect::<Vec<_>>(), [&port.tap()]);
    wait::until("nothing failed", PATIENCE, || {
        (process.state()["namespaces"]["failed"] == json!([])).then_some(())
    });
    assert_eq!(process.stop().code(), Some(0));
}

/// Its only interface has a name that no agent of Neutron gives.
#[test]
fn a_namespace_without_a_guest_interface_is_reported() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let network = host.network();
    let guest = network.guest([10, 0, 0, 5]);
    nova.add(Instance::from_port(&guest.port));
    let (server, port) = Router::dhcp_by_veth(&network);
    let name = server.netns().name().to_owned();
    let rename = |from: &str, to: &str| {
        server.netns().ip(&format!("link set {from} down\nlink set {from} name {to}\nlink set {to} up"));
    };
    rename(&port.tap(), "other0");
    let agent = Agent::on(&host, &nova).only_in(&name).port(&guest.port).install();
    let process = agent.start();
    let reason = until_idle(&process, server.netns());
    assert_eq!(reason, "no interface tap* or ns-*; found other0");
    assert_eq!(process.count("metadata_namespaces_idle"), 1);
    let page = String::from_utf8(agent.query("status", &[]).stdout).expect("text");
    let line = format!("  {name}  idle: no interface tap* or ns-*; found other0");
    assert!(page.lines().any(|found| found == line), "{page}");

    rename("other0", &port.tap());
    wait::until("the interface is attached", PATIENCE, || (process.attachments().len() == 1).then_some(()));
    assert_served(&guest);
    until_served(&process);
}
