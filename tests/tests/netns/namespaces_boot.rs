//! Two hundred guests behind one router boot at the same moment, and no request fails.

use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::{io, thread};

use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, Connection, ControlPlane, Guest, Host, Instance, Network, NovaStandIn, Port,
    Response, Routed, Router,
};

const GUESTS: u8 = 200;
const OPEN: &str = "metadata_connections_open";
const META_DATA: &str = "/openstack/2018-08-27/meta_data.json";

/// Requests of cloud-init (`DataSourceOpenStack`) after its probe, each on its own connection.
const DOCUMENTS: [&str; 10] = [
    META_DATA,
    "/openstack/2018-08-27/vendor_data.json",
    "/openstack/2018-08-27/vendor_data2.json",
    "/openstack/2018-08-27/network_data.json",
    "/latest/meta-data/",
    HOSTNAME,
    "/latest/meta-data/instance-id",
    "/latest/meta-data/local-ipv4",
    "/latest/meta-data/public-hostname",
    "/latest/meta-data/security-groups",
];

/// Boots one guest and returns the requests that failed. The probe has a connection for each
/// address family. Its requests are sent when the connections of all guests are open.
fn boot(guest: &Guest, together: &Barrier) -> Vec<String> {
    let probes = [guest.metadata_ipv4(), guest.metadata_ipv6()].map(|to| guest.dial(to, None, PATIENCE));
    together.wait();
    together.wait();
    let probes =
        probes.map(|connected| ("/openstack", connected.and_then(|mut probe| ask(&mut probe, "/openstack"))));
    let documents = DOCUMENTS.map(|path| (path, fetch(guest, guest.metadata_ipv4(), path)));
    let answers = probes.into_iter().chain(documents);
    answers
        .filter_map(|(path, answer)| Some(format!("{}: {path}: {}", guest.tap, fault(guest, path, answer)?)))
        .collect()
}

fn fetch(guest: &Guest, to: SocketAddr, path: &str) -> io::Result<Response> {
    ask(&mut guest.dial(to, None, PATIENCE)?, path)
}

fn ask(connection: &mut Connection<TcpStream>, path: &str) -> io::Result<Response> {
    connection.request("GET", path, &[("Connection", "close")], b"")
}

/// Returns what is wrong with an answer, which must be the guest's own.
fn fault(guest: &Guest, path: &str, answer: io::Result<Response>) -> Option<String> {
    let answer = match answer {
        Ok(answer) if answer.status == 200 => answer,
        Ok(answer) => return Some(answer.status_line),
        Err(error) => return Some(error.to_string()),
    };
    let own = match path {
        META_DATA => guest.port.instance.to_string(),
        HOSTNAME => Instance::from_port(&guest.port).hostname(),
        _ => String::new(),
    };
    (!answer.text().contains(&own)).then(|| format!("not its own: {}", answer.text()))
}

/// Boots all guests at once. Each request must be answered at the first attempt.
fn assert_all_boot(process: &AgentProcess, nova: &NovaStandIn, guests: &[Guest]) {
    let together = Barrier::new(guests.len() + 1);
    let failed: Vec<String> = thread::scope(|scope| {
        let together = &together;
        let boots: Vec<_> = guests.iter().map(|guest| scope.spawn(move || boot(guest, together))).collect();
        together.wait();
        let all = 2 * guests.len() as u64;
        let open = wait::poll(PATIENCE, || (process.count(OPEN) == all).then_some(()));
        together.wait();
        let failed = boots.into_iter().flat_map(|boot| boot.join().expect("a boot ends")).collect();
        open.expect("the connections of all guests are open at once");
        failed
    });
    assert_eq!(failed, [""; 0]);
    let asked = nova.requests();
    for guest in guests {
        let own = Some(guest.port.instance.to_string());
        let asked = asked.iter().filter(|request| request.header("x-instance-id") == own).count();
        assert_eq!(asked, 2 + DOCUMENTS.len(), "{}", guest.tap);
    }
    let metrics = process.metrics();
    let refused: Vec<&str> = metrics.lines().filter(|line| line.starts_with("metadata_rejected_")).collect();
    assert_eq!(refused, [""; 0]);
}

/// Plugs a guest for each of these ports.
fn plug(network: &Network, nova: &NovaStandIn, ports: Vec<Port>) -> Vec<Guest> {
    let plug = |port: Port| {
        nova.add(Instance::from_port(&port));
        let mut spec = network.spec([10, 0, 0, 5]);
        spec.port = port;
        network.plug(spec)
    };
    ports.into_iter().map(plug).collect()
}

fn ports(network: &Network) -> Vec<Port> {
    (10..10 + GUESTS).map(|last| network.spec([10, 0, 0, last]).port).collect()
}

#[test]
fn two_hundred_guests_behind_a_router_boot_at_once() {
    let routed = Routed::new();
    let guests = plug(&routed.network, &routed.nova, ports(&routed.network));
    let installer = guests.iter().fold(routed.agent(), |installer, guest| installer.port(&guest.port));
    assert_all_boot(&installer.install().start(), &routed.nova, &guests);
}

/// The guests are known only to Neutron, as on a network node. The real neutron-server answers one
/// request at a time, so look-ups share requests.
#[test]
fn two_hundred_guests_of_other_hosts_boot_at_once() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let plane = ControlPlane::start(&host);
    let mut network = host.network();
    network.id = plane.create_network("10.0.0.0/24");
    let id = plane.create_router(network.id, [10, 0, 0, 254].into());
    let mut router = Router::named(&host, &format!("qrouter-{id}"));
    router.add(&network);
    let mut ports = ports(&network);
    plane.create_ports(network.id, &mut ports);
    let guests = plug(&network, &nova, ports);
    let options = plane.password_options();
    let agent = options
        .iter()
        .fold(Agent::on(&host, &nova).only_in(router.netns().name()), |agent, (name, value)| {
            agent.set("metadata_agent", name, value)
        });
    assert_all_boot(&agent.install().start(), &nova, &guests);
    let shared = plane.neutron.most_addresses_in_a_query();
    assert!(shared > 1, "no query for ports is about more than one guest");
}
