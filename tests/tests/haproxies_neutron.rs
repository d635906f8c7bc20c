//! Haproxies of Neutron's before an agent on whose host their guests are not: who asks is known from Neutron's API alone, the
//! real Keystone's and the real neutron-server's.

#![expect(clippy::expect_used, reason = "helpers of tests fail the test")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use metadata_agent::ids::NetworkId;
use metadata_tests::haproxy::{Driver, Haproxy};
use metadata_tests::nova::Instance;
use metadata_tests::wait;
use metadata_tests::{Agent, Binding, ControlPlane, Guest, Host, Network, NovaStandIn, privileged};

const HOSTNAME: &str = "/latest/meta-data/hostname";
/// A question that failed is asked again after half a minute at most.
const RECOVERY: Duration = Duration::from_mins(3);

/// A guest that Neutron and Nova know, plugged in where haproxy hears it. To Neutron it is on another host.
fn guest(network: &Network, known_as: NetworkId, plane: &ControlPlane, nova: &NovaStandIn) -> Guest {
    let mut spec = network.spec([10, 0, 0, 5]);
    let device = spec.port.instance.to_string();
    let binding = Binding { owner: "compute:nova", device: &device, host: "another-host" };
    spec.port = plane.create_port(known_as, &spec.port, &binding);
    nova.add(Instance::of(&spec.port));
    network.plug(spec)
}

#[track_caller]
fn assert_served(nova: &NovaStandIn, guest: &Guest) {
    let answer = guest.get(HOSTNAME);
    assert_eq!((answer.status, answer.text()), (200, Instance::of(&guest.port).hostname().as_str()));
    let asked = nova.requests().pop().expect("Nova was asked");
    assert_eq!(asked.header("x-instance-id"), Some(guest.port.instance.to_string()));
    assert_eq!(asked.header("x-tenant-id"), Some(guest.port.project.to_string()), "the port's project");
    assert_eq!(asked.header("x-forwarded-for"), Some("10.0.0.5".to_owned()));
}

#[test]
fn guests_of_other_hosts_are_known_by_network_and_by_router_and_by_nothing_while_neutron_is_away() {
    if !privileged() {
        return;
    }
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let mut plane = ControlPlane::start(&host);
    let folder = tempfile::Builder::new().prefix("neutron-").tempdir().expect("a folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("an open folder");
    let socket = folder.path().join("metadata_proxy");
    let installer = Agent::on(&host, &nova)
        .set("metadata_agent", "guest_interfaces", "none*")
        .set("metadata_agent", "serve_metadata_proxy_socket", "true")
        .set("DEFAULT", "metadata_proxy_socket", &socket.display().to_string());
    let options = plane.password_options();
    let agent =
        options.iter().fold(installer, |agent, (name, value)| agent.set("metadata_agent", name, value));
    let agent = agent.install();
    let process = agent.start();

    // The same address on two networks: behind a DHCP agent's haproxy, and behind a router's.
    let (mut red, mut blue) = (host.network(), host.network());
    let [reds, blues] = [(); 2].map(|()| plane.create_network("10.0.0.0/24"));
    red.id = reds;
    // A haproxy of a router names the router where others name the network.
    blue.id = NetworkId::new(plane.create_router(blues, [10, 0, 0, 254].into()));
    let on_network = guest(&red, reds, &plane, &nova);
    let behind_router = guest(&blue, blues, &plane, &nova);
    let _of_red = Haproxy::start(&red, Driver::Dhcp, &socket);
    let _of_blue = Haproxy::start(&blue, Driver::Router, &socket);
    assert_served(&nova, &on_network);
    assert_served(&nova, &behind_router);
    for guest in [&on_network, &behind_router] {
        let over_ipv6 = guest.get_v6(HOSTNAME);
        assert_eq!(
            (over_ipv6.status, over_ipv6.text()),
            (200, Instance::of(&guest.port).hostname().as_str())
        );
    }
    assert!(process.attachments().is_empty());

    // The dozen requests of a boot are one question, as long as they take less than the five seconds that an answer holds.
    let since = Instant::now();
    let asked = plane.neutron.port_questions().len();
    let mut connection = on_network.connect();
    for _ in 0..20 {
        assert_eq!(connection.request("GET", HOSTNAME, &[], b"").expect("an answer").status, 200);
    }
    let asked = plane.neutron.port_questions().len() - asked;
    let begun = since.elapsed().as_secs() / 5 + 1;
    assert!(asked as u64 <= begun, "{asked} questions in {:?}", since.elapsed());

    // Nobody's port, and a port that is no instance's.
    let stranger = red.guest([10, 0, 0, 66]);
    assert_eq!(stranger.get(HOSTNAME).status, 404);
    let balancer = blue.guest([10, 0, 0, 7]);
    let binding = Binding { owner: "Octavia", device: "lb-1", host: "" };
    let balancers = plane.create_port(blues, &balancer.port, &binding);
    assert_eq!(balancers.fixed_ips, balancer.port.fixed_ips);
    assert_eq!(balancer.get(HOSTNAME).status, 404);

    // Unknown is not "not found".
    plane.neutron.stop();
    let late = red.guest([10, 0, 0, 67]);
    assert_eq!(late.get(HOSTNAME).status, 503);
    plane.neutron.start();
    wait::until("Neutron is asked again", RECOVERY, || (late.get(HOSTNAME).status == 404).then_some(()));
}
