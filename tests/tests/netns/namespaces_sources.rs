//! Changes of the ports behind a router while its guests run: a port that is lost for a moment, and
//! an address that changes where no source notices.

use std::net::Ipv4Addr;

use metadata_tests::nova::Instance;
use metadata_tests::two_tenants::{HOSTNAME, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Ovsdb, Port, Routed};

/// The grace counts from the loss, as on a tap. Both the guest's port and the router's are lost.
#[test]
fn a_lost_port_behind_a_router_causes_no_404() {
    let routed = Routed::new();
    let Routed { guest, interface, .. } = &routed;
    let agent = routed.agent().set("metadata_agent", "identity_grace", "4").install();
    let process = agent.start();
    let until_refused = || {
        wait::until("its port is not known", PATIENCE, || {
            Some(guest.get(HOSTNAME)).filter(|got| got.status != 200)
        })
    };
    for lost in [vec![interface], vec![], vec![&guest.port]] {
        assert_served(guest);
        agent.set_ports(lost.iter().copied());
        if lost.iter().any(|port| port.id == guest.port.id) {
            wait::until("the router's port is not known", PATIENCE, || {
                (process.count("metadata_ports") == 1).then_some(())
            });
            assert_served(guest);
        } else {
            let deferred = until_refused();
            assert_eq!((deferred.status, deferred.header("retry-after")), (503, Some("1")), "{deferred:?}");
        }
        agent.set_ports([interface, &guest.port]);
        wait::until("it is served again", PATIENCE, || (guest.get(HOSTNAME).status == 200).then_some(()));
    }
    let nothing: [&Port; 0] = [];
    agent.set_ports(nothing);
    wait::until("the grace is over", PATIENCE, || (guest.get(HOSTNAME).status == 404).then_some(()));
}

/// libvirt's file has the addresses of the moment at which Nova wrote it. Open vSwitch has none.
#[test]
fn a_changed_address_behind_a_router_is_served_with_libvirt() {
    let routed = Routed::new();
    let guest = &routed.guest;
    let ovsdb = Ovsdb::start();
    let agent = routed.install_with_libvirt(&ovsdb);
    let process = agent.start();
    assert_served(guest);
    let changed = Ipv4Addr::new(10, 0, 0, 50);
    guest.netns().ip(&format!("address add {changed}/24 dev eth0"));
    let mut connection = guest.connect_from((changed, 0).into());
    let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
    let hostname = Instance::from_port(&guest.port).hostname();
    assert_eq!((answer.status, answer.text()), (200, hostname.as_str()), "{}", process.state());
}
