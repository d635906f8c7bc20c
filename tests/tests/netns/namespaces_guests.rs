//! Guests behind routers and DHCP servers: each gets its own metadata, however alike they are.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use metadata_ebpf::abi::MAX_PORT_SOURCES;
use metadata_ebpf::reason::Reason;
use metadata_tests::agent::Installer;
use metadata_tests::two_tenants::{HOSTNAME, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, Guest, Host, Instance, Network, NovaStandIn, Ovsdb, Port, Routed, Router};

/// Time to wait for a response that must not come.
const SILENCE: Duration = Duration::from_millis(1500);

/// Installs an agent that serves guests only behind these routers.
fn agent(host: &Host, nova: &NovaStandIn, routers: &[&Router], ports: &[&Port]) -> Installer {
    let names: Vec<&str> = routers.iter().map(|router| router.netns().name()).collect();
    let installer = Agent::on(host, nova).only_in(&names.join(","));
    ports.iter().fold(installer, |installer, port| installer.port(port))
}

fn known(nova: &NovaStandIn, guests: &[&Guest]) {
    for guest in guests {
        nova.add(Instance::from_port(&guest.port));
    }
}

/// Returns the outcome of a new connection, from this address if given.
fn dial(guest: &Guest, from: Option<IpAddr>) -> Result<(), ErrorKind> {
    let source = from.map(|address| SocketAddr::new(address, 0));
    guest.dial(guest.metadata_ipv4(), source, SILENCE).map(|_| ()).map_err(|error| error.kind())
}

#[test]
fn guests_with_one_address_behind_two_routers_get_their_own() {
    for mode in ["tcx", "clsact"] {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let [red, blue] = [host.network(), host.network()];
        let green = host.network_at([10, 0, 1, 1].into(), 24);
        let (mut one, mut other) = (Router::new(&host), Router::new(&host));
        let interfaces = [one.add(&red), one.add(&green), other.add(&blue)];
        let guests = [red.guest([10, 0, 0, 5]), green.guest([10, 0, 1, 5]), blue.guest([10, 0, 0, 5])];
        known(&nova, &guests.each_ref());
        let ports = interfaces.iter().chain(guests.iter().map(|guest| &guest.port)).collect::<Vec<_>>();
        let process = agent(&host, &nova, &[&one, &other], &ports)
            .set("metadata_agent", "attach_mode", mode)
            .install()
            .start();
        for guest in &guests {
            assert_served(guest);
        }
        assert_eq!(process.state()["namespaces"]["served"], 2, "{mode}");
    }
}

#[test]
fn an_isolated_network_is_served_in_its_dhcp_namespace() {
    // The second one is that of Linux bridge, and of `ovs_use_veth`.
    let servers: [fn(&Network) -> Router; 2] = [Router::dhcp, |network| Router::dhcp_by_veth(network).0];
    for create in servers {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let network = host.network();
        let server = create(&network);
        let guest = network.guest([10, 0, 0, 5]);
        known(&nova, &[&guest]);
        let process = agent(&host, &nova, &[&server], &[&guest.port]).install().start();
        assert_served(&guest);
        assert_eq!(process.attachments().len(), 1);
    }
}

/// The host's ends of their veth pairs are named like guests' taps.
#[test]
fn ports_of_neutrons_agents_are_never_attached_as_guests() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let [first, second] = [host.network(), host.network()];
    let guest = first.guest([10, 0, 0, 5]);
    known(&nova, &[&guest]);
    let create = |network: &Network| {
        let mut router = Router::new(&host);
        router.add_by_veth(network);
        let mut snat = Router::named(&host, &format!("snat-{}", network.id));
        snat.add_by_veth(network);
        [Router::dhcp_by_veth(network).0, Router::ovn_metadata(network).0, router, snat]
    };
    let before = create(&first);
    let process = Agent::on(&host, &nova).port(&guest.port).install().start();
    let after = create(&second);
    // Its attachment shows that the agent has seen the others.
    let last = second.guest([10, 0, 0, 6]);
    process.wait_for_attachments([guest.tap.as_str(), last.tap.as_str()]);
    assert_served(&guest);
    let output = process.output();
    for cable in before.iter().chain(&after).flat_map(Router::cables) {
        assert!(cable.starts_with("tap") && !output.contains(cable), "{cable}: {output}");
    }
}

/// Its other end may be moved into the namespace later.
#[test]
fn a_veth_that_becomes_a_port_of_an_agent_is_detached() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let guest = host.network().guest([10, 0, 0, 5]);
    let router = Router::new(&host);
    let process = Agent::on(&host, &nova).port(&guest.port).install().start();
    host.netns().ip("link add tap0 type veth peer name qr-0\nlink set tap0 up\nlink set qr-0 up");
    process.wait_for_attachments([guest.tap.as_str(), "tap0"]);
    host.netns().ip(&format!("link set qr-0 netns {}", router.netns().name()));
    process.wait_for_attachments([guest.tap.as_str()]);
}

/// An address of another network is dropped as forged. An address of a neighbour does not lead to
/// the neighbour's metadata: the port's MAC address is another one.
#[test]
fn forged_addresses_behind_a_router_gain_nothing() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let red = host.network();
    let green = host.network_at([10, 0, 1, 1].into(), 24);
    let mut router = Router::new(&host);
    let interfaces = [router.add(&red), router.add(&green)];
    let (thief, neighbour, other) =
        (red.guest([10, 0, 0, 5]), red.guest([10, 0, 0, 6]), green.guest([10, 0, 1, 5]));
    known(&nova, &[&thief, &neighbour, &other]);
    let ports = [&interfaces[0], &interfaces[1], &thief.port, &neighbour.port, &other.port];
    let process = agent(&host, &nova, &[&router], &ports).install().start();
    assert_served(&thief);
    thief.netns().sysctl("ipv4/conf/all/arp_ignore", "8");
    let steal = |stolen: IpAddr| {
        // A second address, so that the guest's own kernel sends the packet.
        thief.netns().ip(&format!("address add {stolen}/32 dev eth0"));
        stolen
    };
    let foreign = steal([10, 0, 1, 5].into());
    assert_eq!(dial(&thief, Some(foreign)), Err(ErrorKind::TimedOut));
    assert_served(&other);
    let asked = nova.requests().len();
    let mut connection = thief.connect_from((steal([10, 0, 0, 6].into()), 0).into());
    for (method, path) in [("GET", HOSTNAME), ("POST", "/openstack/2013-10-17/password")] {
        assert_eq!(connection.request(method, path, &[], b"").expect("an answer").status, 404, "{path}");
    }
    assert_eq!(nova.requests().len(), asked);
    assert_served(&neighbour);
    let packets = process.state()["datapath"]["packets"].clone();
    assert!(packets["forged_address"].as_u64() > Some(0), "{packets}");
    let state = process.state();
    let attachments = state["attachments"].as_array().expect("attachments");
    let refused =
        attachments.iter().find(|attachment| !attachment["refused"].is_null()).expect("refused packets");
    assert_eq!(refused["refused"]["last"]["address"], "10.0.1.5", "{refused}");
    assert_eq!(refused["refused"]["last"]["mac"], thief.port.mac.to_string(), "{refused}");
}

/// libvirt does not rewrite the addresses of a running domain. Neutron has since given the address
/// of one guest to another, of which no source of this host knows.
#[test]
fn the_new_owner_of_an_address_is_not_its_former_owner() {
    let routed = Routed::new();
    let Routed { guest: former, router, interface, network, nova, .. } = &routed;
    let ovsdb = Ovsdb::start();
    let agent = routed.install_with_libvirt(&ovsdb);
    let _process = agent.start();
    assert_served(former);
    let asked = nova.requests().len();

    former.netns().ip("address flush dev eth0 scope global");
    let owner = network.guest([10, 0, 0, 5]);
    nova.add(Instance::from_port(&owner.port));
    // Has the effect of the guest's announcement.
    router.netns().ip("neighbour flush all");
    for path in ["/openstack/latest/user_data", "/openstack/latest/meta_data.json"] {
        assert_eq!(owner.get(path).status, 404, "{path}");
    }
    assert_eq!(owner.post("/openstack/2013-10-17/password", b"mine").status, 404);
    assert_eq!((nova.requests().len(), nova.password(former.port.instance)), (asked, None));

    // Once a source knows the new owner, the MAC address decides between the two.
    agent.set_ports([interface, &owner.port]);
    wait::until("the new owner is known", PATIENCE, || {
        (owner.get("/openstack/latest/meta_data.json").status == 200).then_some(())
    });
    assert_served(&owner);
}

#[test]
fn ipv6_guests_of_two_routers_get_their_own_metadata() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let [red, blue] = [host.network(), host.network()];
    let mut router = Router::new(&host);
    let interface = router.add(&red);
    let server = Router::dhcp(&blue);
    let guests = [red.guest([10, 0, 0, 5]), blue.guest([10, 0, 0, 5])];
    known(&nova, &guests.each_ref());
    let ports = [&interface, &guests[0].port, &guests[1].port];
    let process = agent(&host, &nova, &[&router, &server], &ports).without_probes().install().start();
    for guest in &guests {
        let answer = guest.get_v6("/openstack/latest/meta_data.json");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.text().contains(&guest.port.instance.to_string()), "{}", answer.text());
        assert_served(guest);
    }
    assert_eq!(process.packets(Reason::Reply), 0, "no guest is on a tap");
    assert!(process.packets(Reason::RoutedReply) > 0);
}

/// keepalived adds the addresses of a highly available router in the namespace that becomes master
/// and removes them in a backup. The interfaces exist in all of them.
#[test]
fn only_the_master_of_an_ha_router_serves() {
    let routed = Routed::new();
    let address = |verb: &str| {
        let (gateway, len) = (routed.network.gateway, routed.network.prefix);
        let device = routed.interface.tap();
        routed.router.netns().ip(&format!("address {verb} {gateway}/{len} dev {device}"));
    };
    address("del");
    let process = routed.agent().install().start();
    let connect = || dial(&routed.guest, None);
    assert_eq!(process.state()["namespaces"]["served"], 1);
    assert_eq!(connect(), Err(ErrorKind::TimedOut), "a backup");
    for _ in 0..2 {
        address("add");
        assert_served(&routed.guest);
        address("del");
        wait::until("the backup does not serve", PATIENCE, || {
            (connect() == Err(ErrorKind::TimedOut)).then_some(())
        });
    }
}

/// There are more subnets than the kernel's map can hold. Those beyond it are not admitted
/// unchecked.
#[test]
fn subnets_beyond_the_limit_are_reported_and_not_served() {
    let routed = Routed::new();
    let device = routed.interface.tap();
    for third in 1..=MAX_PORT_SOURCES {
        routed.router.netns().ip(&format!("address add 10.1.{third}.1/24 dev {device}"));
    }
    let process = routed.agent().install().start();
    assert_served(&routed.guest);
    let failed = process.state()["namespaces"]["failed"].to_string();
    assert!(failed.contains(&format!("{} IPv4 subnets", MAX_PORT_SOURCES + 1)), "{failed}");
    let beyond: IpAddr = format!("10.1.{MAX_PORT_SOURCES}.77").parse().expect("an address");
    routed.guest.netns().ip(&format!("address add {beyond}/32 dev eth0"));
    assert_eq!(dial(&routed.guest, Some(beyond)), Err(ErrorKind::TimedOut));
    assert!(process.packets(Reason::ForgedAddress) > 0);
}
