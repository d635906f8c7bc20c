//! Guests of other hosts, whose requests arrive through Neutron's haproxies or through a namespace
//! on this host. They are identified only through Neutron's API, with the real Keystone and the
//! real neutron-server.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use metadata_agent::ids::NetworkId;
use metadata_tests::agent::Installer;
use metadata_tests::haproxy::{self, Driver, Haproxy};
use metadata_tests::nova::Instance;
use metadata_tests::wait;
use metadata_tests::{Agent, Binding, ControlPlane, Guest, Host, Network, NovaStandIn, Router};
use tempfile::TempDir;

const HOSTNAME: &str = "/latest/meta-data/hostname";
/// A failed query is repeated after half a minute at most.
const RECOVERY: Duration = Duration::from_mins(3);

/// Plugs a guest that Neutron and Nova know into the network on which its requests arrive. For
/// Neutron it is on another host.
fn guest(
    network: &Network,
    known_as: NetworkId,
    address: [u8; 4],
    plane: &ControlPlane,
    nova: &NovaStandIn,
) -> Guest {
    let mut spec = network.spec(address);
    let device = spec.port.instance.to_string();
    let binding = Binding { owner: "compute:nova", device: &device, host: "another-host" };
    spec.port = plane.create_port(known_as, &spec.port, &binding);
    nova.add(Instance::from_port(&spec.port));
    network.plug(spec)
}

/// Starts an agent on a host without guests. It queries this Neutron and serves haproxies on a
/// socket.
fn agent(host: &Host, nova: &NovaStandIn, plane: &ControlPlane, socket: &Path) -> Installer {
    let installer = Agent::on(host, nova)
        .set("metadata_agent", "guest_interfaces", "none*")
        .set("metadata_agent", "serve_metadata_proxy_socket", "true")
        .set("DEFAULT", "metadata_proxy_socket", &socket.display().to_string())
        .set("DEFAULT", "metadata_proxy_user", haproxy::USER);
    let options = plane.password_options();
    options.iter().fold(installer, |agent, (name, value)| agent.set("metadata_agent", name, value))
}

/// Creates a folder that haproxies can read.
fn open_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("neutron-").tempdir().expect("a folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("an open folder");
    folder
}

#[track_caller]
fn assert_served(nova: &NovaStandIn, guest: &Guest) {
    let answer = guest.get(HOSTNAME);
    assert_eq!((answer.status, answer.text()), (200, Instance::from_port(&guest.port).hostname().as_str()));
    let asked = nova.requests().pop().expect("Nova was asked");
    assert_eq!(asked.header("x-instance-id"), Some(guest.port.instance.to_string()));
    assert_eq!(asked.header("x-tenant-id"), Some(guest.port.project.to_string()), "the port's project");
    assert_eq!(asked.header("x-forwarded-for"), Some("10.0.0.5".to_owned()));
}

/// By network and by router, and not at all while Neutron is down.
#[test]
fn guests_of_other_hosts_are_identified_through_neutron_only() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let mut plane = ControlPlane::start(&host);
    let folder = open_folder();
    let socket = folder.path().join("metadata_proxy");
    let agent = agent(&host, &nova, &plane, &socket).install();
    let process = agent.start();

    // The same address on two networks: behind a DHCP agent's haproxy, and behind a router's.
    let (mut red, mut blue) = (host.network(), host.network());
    let [reds, blues] = [(); 2].map(|()| plane.create_network("10.0.0.0/24"));
    red.id = reds;
    // The haproxy of a router sends the router's id instead of the network's.
    blue.id = NetworkId::new(plane.create_router(blues, [10, 0, 0, 254].into()));
    let on_network = guest(&red, reds, [10, 0, 0, 5], &plane, &nova);
    let behind_router = guest(&blue, blues, [10, 0, 0, 5], &plane, &nova);
    let _of_red = Haproxy::start(&red, Driver::Dhcp, &socket);
    let _of_blue = Haproxy::start(&blue, Driver::Router, &socket);
    assert_served(&nova, &on_network);
    assert_served(&nova, &behind_router);
    for guest in [&on_network, &behind_router] {
        let over_ipv6 = guest.get_v6(HOSTNAME);
        assert_eq!(
            (over_ipv6.status, over_ipv6.text()),
            (200, Instance::from_port(&guest.port).hostname().as_str())
        );
    }
    assert!(process.attachments().is_empty());

    // An address without a port, and a port without an instance.
    let stranger = red.guest([10, 0, 0, 66]);
    assert_eq!(stranger.get(HOSTNAME).status, 404);
    let balancer = blue.guest([10, 0, 0, 7]);
    let binding = Binding { owner: "Octavia", device: "lb-1", host: "" };
    let balancers = plane.create_port(blues, &balancer.port, &binding);
    assert_eq!(balancers.fixed_ips, balancer.port.fixed_ips);
    assert_eq!(balancer.get(HOSTNAME).status, 404);

    // An unknown client must not get "not found".
    plane.neutron.stop();
    let late = red.guest([10, 0, 0, 67]);
    assert_eq!(late.get(HOSTNAME).status, 503);
    plane.neutron.start();
    wait::until("Neutron is queried again", RECOVERY, || (late.get(HOSTNAME).status == 404).then_some(()));
}

/// On each network one guest takes over an address of another while both run. No event reports this
/// to the host.
#[test]
fn an_address_that_moves_gives_no_access_to_its_old_guest() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let plane = ControlPlane::start(&host);
    let folder = open_folder();
    let socket = folder.path().join("metadata_proxy");
    let mut networks = [host.network(), host.network()];
    for network in &mut networks {
        network.id = plane.create_network("10.0.0.0/24");
    }
    let [by_haproxy, by_namespace] = &networks;
    let server = Router::dhcp(by_namespace);
    let agent = agent(&host, &nova, &plane, &socket)
        .set("metadata_agent", "namespaces", server.netns().name())
        .install();
    let process = agent.start();
    let haproxy = Haproxy::start(by_haproxy, Driver::Dhcp, &socket);

    let pairs = networks.each_ref().map(|network| {
        [[10, 0, 0, 5], [10, 0, 0, 6]].map(|address| guest(network, network.id, address, &plane, &nova))
    });
    for guest in pairs.iter().flatten() {
        assert_is_itself(guest);
    }

    // If the guest's MAC address is seen, a boot's dozen requests cause one or two queries.
    let since = Instant::now();
    let asked = plane.neutron.port_questions().len();
    for _ in 0..20 {
        assert_is_itself(&pairs[1][0]);
    }
    let asked = plane.neutron.port_questions().len() - asked;
    let begun = since.elapsed().as_secs() / 2 + 1;
    assert!(asked as u64 <= begun, "{asked} questions in {:?}", since.elapsed());

    let namespaces = [haproxy.gateway().expect("a gateway of its own").netns(), server.netns()];
    for (([one, other], network), heard_in) in pairs.iter().zip(&networks).zip(namespaces) {
        let moves = |guest: &Guest, last| {
            guest.netns().ip(&format!(
                "address flush dev eth0 scope global\naddress add 10.0.0.{last}/24 dev eth0\n\
                 route add 169.254.169.254 via {}",
                network.gateway
            ));
            // Has the effect of the guest's announcement.
            heard_in.ip("neighbour flush all");
        };
        plane.readdress_port(one.port.id, [10, 0, 0, 9].into());
        moves(one, 9);
        assert_is_itself(one);
        plane.readdress_port(one.port.id, [10, 0, 0, 10].into());
        plane.readdress_port(other.port.id, [10, 0, 0, 9].into());
        moves(one, 10);
        moves(other, 9);
        assert_is_itself(other);
        assert_is_itself(one);
    }
    drop(process);
}

#[track_caller]
fn assert_is_itself(guest: &Guest) {
    let answer = guest.get(HOSTNAME);
    assert_eq!((answer.status, answer.text()), (200, Instance::from_port(&guest.port).hostname().as_str()));
}
